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
) -> None:
    """Decode from a dense and from packed caches: memory, speed, quality and text, side by side."""
    from rich.console import Console

    from kvarn_ops.demo.run import Options, run_demo

    options = Options(model, text, out, presets, context, tokens, batch, compile_steps, device)
    run_demo(options, Console())


@app.command()
def verify(
    backend: Annotated[
        str, typer.Option(help="auto, aten or reference: the backend to check.")
    ] = "auto",
    device: Annotated[
        str | None, typer.Option(help="Default: cuda if there is one, else cpu.")
    ] = None,
    compile_too: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Check compiled decode steps too.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compare the backend that runs here with the reference; exit code 1 if they differ."""
    from rich.console import Console

    from kvarn_ops.verify import as_dict, run_checks, summary

    report = run_checks(backend, device, compile_too, Console(stderr=True))
    if as_json:
        import json

        typer.echo(json.dumps(as_dict(report), indent=2))
    else:
        Console().print(summary(report))
    if not report.passed:
        raise typer.Exit(1)


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
