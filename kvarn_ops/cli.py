"""The command line: ``kvarn-ops <command>``.

Each command is a thin function here and imports what it needs inside, so that ``kvarn-ops --help``
stays quick. Errors that the package raises on purpose become one sentence and exit code 2.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from kvarn_ops.errors import KVarNError
from kvarn_ops.eval.command import evaluate
from kvarn_ops.export_command import export

__all__ = ["app", "main"]

EXIT_ERROR = 2  # bad input or a missing package; 1 is left to commands whose check failed

app = typer.Typer(
    name="kvarn-ops",
    help="KVarN KV-cache quantization for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(value: bool) -> None:
    if value:
        from kvarn_ops import __version__

        typer.echo(f"kvarn-ops {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """KVarN KV-cache quantization for PyTorch."""


@app.command()
def env(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print versions, hardware and the active backend: paste it into bug reports."""
    from kvarn_ops.env import environment

    values = environment()
    if as_json:
        import json

        typer.echo(json.dumps(values, indent=2))
        return

    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in values.items():
        table.add_row(key, Text(value))  # Text: values are data, brackets in them are no markup
    Console().print(table)


@app.command()
def demo(
    model: Annotated[
        Path | None,
        typer.Option(help="Local causal language model; default: the byte model of a checkout."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Text to score; default: what the model's training left out."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for tables and pictures.")] = Path(
        "demo_output"
    ),
    presets: Annotated[str, typer.Option(help="Presets, with commas.")] = "k4v2,k2v2,k4v4",
    context: Annotated[
        int | None, typer.Option(help="Tokens per window; default: 2048 or what the model knows.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the free-running continuation.")] = 256,
    batch: Annotated[int, typer.Option(help="Windows, decoded together.")] = 8,
    compile_steps: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Decode under torch.compile.")
    ] = True,
    device: Annotated[
        str | None, typer.Option(help="Default: cuda if there is one, else cpu.")
    ] = None,
    peers: Annotated[
        str,
        typer.Option(help="Quantized caches of transformers too: quanto4, quanto2, hqq4, fp8."),
    ] = "",
) -> None:
    """Decode from a dense and from packed caches: memory, speed, quality and text, side by side."""
    from rich.console import Console

    from kvarn_ops.demo.run import Options, run_demo

    options = Options(
        model, text, out, presets, context, tokens, batch, compile_steps, device, peers
    )
    run_demo(options, Console())


@app.command()
def verify(
    backend: Annotated[
        str, typer.Option(help="auto, aten, triton or reference: the backend to check.")
    ] = "auto",
    device: Annotated[
        str | None, typer.Option(help="Default: cuda if there is one, else cpu.")
    ] = None,
    compiled_too: Annotated[
        bool, typer.Option("--compiled/--no-compiled", help="Check compiled decode steps too.")
    ] = True,
    archs: Annotated[
        str | None,
        typer.Option(
            "--compile",
            metavar="ARCHS",
            help="Instead, compile the Triton kernels for GPUs that need not be here (sm_80, "
            "sm_90, sm_100, gfx942 or all): registers, spills, shared memory.",
        ),
    ] = None,
    full: Annotated[bool, typer.Option(help="With --compile: the full matrix, long.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compare the backend that runs here with the reference; exit code 1 if they differ.

    With --compile, exit code 1 if one does not compile or, at head_dim up to 256, spills registers.
    """
    import json

    from rich.console import Console

    if archs is not None:
        from kvarn_ops import kernel_report

        rows, failures = kernel_report.compile_named(archs, full)
        result = kernel_report.as_dicts(rows)
        passed = not (failures or kernel_report.spilling(rows))
        for name in failures:
            typer.echo(f"DOES NOT COMPILE: {name}", err=True)
        shown, width = kernel_report.table(rows), None if sys.stdout.isatty() else 140
    else:
        from kvarn_ops.verify import as_dict, run_checks, summary

        report = run_checks(backend, device, compiled_too, Console(stderr=True))
        result, passed = as_dict(report), report.passed
        shown, width = summary(report), None
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        Console(width=width).print(shown)
    if not passed:
        raise typer.Exit(1)


@app.command()
def tune(
    presets: Annotated[str, typer.Option(help="With commas.")] = "k4v2,k2v2,k4v4",
    head_dims: Annotated[str, typer.Option(help="With commas.")] = "64,128",
    heads: Annotated[str, typer.Option(help="Query heads / KV heads.")] = "32/8",
    batches: Annotated[str, typer.Option(help="With commas.")] = "1,8",
    contexts: Annotated[str, typer.Option(help="With commas.")] = "4096,16384",
    rounds: Annotated[int, typer.Option(help="Calls per setting.", min=1)] = 20,
    out: Annotated[
        Path | None, typer.Option(help="Folder; default: where kernels look for it.")
    ] = None,
    device: Annotated[str, typer.Option(help="A GPU.")] = "cuda",
) -> None:
    """Measure launch settings of the Triton kernels on this GPU and keep the best in a file.

    Kernels read it from then on, in new processes; delete it to go back to the built-in rule.
    """
    from rich.console import Console

    from kvarn_ops import tuning

    path = tuning.tune_named(presets, head_dims, heads, batches, contexts, rounds, out, device)
    Console().print(f"Written to {path}:\n{path.read_text()}")


@app.command()
def inspect(
    directory: Annotated[
        Path, typer.Argument(metavar="MODEL_DIR", help="In Hugging Face format; weights optional.")
    ],
    preset: Annotated[str, typer.Option(help="Presets, with commas.")] = "k4v2",
    memory: Annotated[
        float | None, typer.Option(help="GiB for weights and cache together.")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Compare sizes at this context too.")] = None,
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    dtype: Annotated[
        str | None, typer.Option(help="Of keys and values: bf16, fp16 or fp32; default: the model.")
    ] = None,
    graph: Annotated[
        bool, typer.Option(help="Trace a decode step too, and list the attentions of its graph.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """What would be packed in a model and what that saves; exit code 1 if it would be refused."""
    from kvarn_ops.hf import capacity, capacity_tables

    found = capacity.examine(directory, preset, memory, context, batch, dtype)
    if as_json:
        import json

        typer.echo(json.dumps(found.as_dict(), indent=2))
    else:
        from rich.console import Console

        Console().print(capacity_tables.summary(found))
        if graph and not found.refusal:
            from kvarn_ops.hf.traced_step import explain_step

            typer.echo(str(explain_step(directory, preset.partition(",")[0])))
    if found.refusal:
        raise typer.Exit(1)


@app.command()
def bench(
    model: Annotated[
        Path | None, typer.Option(help="Take heads and head_dim from this directory's config.json.")
    ] = None,
    heads: Annotated[str, typer.Option(help="Query heads / KV heads.")] = "16/4",
    head_dim: Annotated[int, typer.Option(help="Width of a head.")] = 128,
    contexts: Annotated[str, typer.Option(help="Tokens in the cache.")] = "1024,4096,16384",
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    presets: Annotated[str, typer.Option(help="Presets, with commas.")] = "k4v2",
    refcheck: Annotated[
        bool, typer.Option("--refcheck", help="Compare every output with the reference first.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for the CSV and the picture.")] = Path(
        "bench_output"
    ),
    rounds: Annotated[int, typer.Option(help="Calls per contender; the median counts.")] = 15,
    threads: Annotated[int | None, typer.Option(help="Threads of torch on the CPU.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Default: cuda if there is one, else cpu.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Time decode attention of one layer against dense attention, on this machine.

    With --refcheck the exit code is 1 if an output differs from the reference.
    """
    from rich.console import Console

    from kvarn_ops.benchmark import command, run

    options = command.Options(
        model, heads, head_dim, contexts, batch, presets, refcheck, out, rounds, threads, device
    )
    rows, differences, path = command.run_bench(options, Console(stderr=True))
    if as_json:
        import json

        typer.echo(json.dumps(rows, indent=2))
    else:
        Console().print(run.table(rows))
        typer.echo(f"Written to {path.parent}: {path.name}, {path.stem}.png")
    for difference in differences:
        typer.echo(f"DIFFERENT: {difference}", err=True)
    if differences:
        raise typer.Exit(1)


app.command(name="eval")(evaluate)
app.command()(export)


def _fail(message: str) -> NoReturn:
    typer.echo(f"kvarn-ops: {' '.join(message.split())}", err=True)
    sys.exit(EXIT_ERROR)


def main() -> None:
    """Run the command line; the entry point of the console script."""
    from kvarn_ops.env import missing_package_message

    try:
        app()
    except KVarNError as error:
        _fail(str(error))
    except ImportError as error:
        # `name` of our own messages is the missing package too (kvarn_ops.__getattr__).
        message = missing_package_message(error.name, needed_by="this command")
        if message is None:
            raise
        _fail(message)
