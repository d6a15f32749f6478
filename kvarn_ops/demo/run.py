"""The demo from options to files: check and load everything, measure, report."""

from __future__ import annotations

import importlib
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import kvarn_ops

from ..config import KVarNConfig, parse_presets
from ..errors import InputError
from ..eval.data import Subject, cut_windows, find_model, load_subject, read_documents
from ..eval.peers import Peer, parse_peers
from ..tables import write_rows
from . import plots, report
from .decode import Plan
from .measure import Measured, Setup, continue_prompt, decode_windows

__all__ = ["Options", "run_demo"]

DEFAULT_CONTEXT = 2048


@dataclass(frozen=True)
class Options:
    """What the command line was given; None means that the demo chooses."""

    model: Path | None = None
    text: Path | None = None
    out: Path = Path("demo_output")
    presets: str = "k4v2,k2v2,k4v4"
    context: int | None = None
    tokens: int = 256
    batch: int = 8
    compile: bool = True
    device: str | None = None
    peers: str = ""


def run_demo(options: Options, console: Console) -> list[report.Row]:
    """Run the demo; returns the table, dense first.

    Raises
    ------
    InputError
        For a model, a text or numbers that do not go together.
    CacheError
        If a cache that is said to be quantized is not.
    """
    started = time.perf_counter()
    importlib.import_module("matplotlib")  # if it is missing: said now, not after minutes
    with _progress(console) as progress:
        setup, header = _prepare(options, progress)
    console.print(report.describe(header))
    with _progress(console) as progress:
        measured = decode_windows(setup, options.out, progress)
        prompt, texts = continue_prompt(setup, progress)
    codec = setup.subject.codec
    console.print(report.results_table(measured.rows, codec.unit))
    console.print(_notes(setup, measured), highlight=False, markup=False, style="dim")
    console.print(report.continuation_panels(prompt, texts, codec, console))

    out = options.out
    write_rows(out / "table.csv", [asdict(row) for row in measured.rows], header)
    report.write_positions(out / "positions.csv", measured.scores, setup.plan.prefix)
    report.write_continuations(out / "continuations.txt", prompt, texts, codec, setup.prompt.source)
    plan = setup.plan
    subtitle = f"{header['model']}; {len(setup.windows)} windows of {plan.context} {codec.unit}s"
    floor = measured.rounding_floor(plan)
    plots.plot_quality(out / "quality_vs_bits.png", measured.rows, floor, subtitle)
    plots.plot_kl_by_position(out / "kl_vs_position.png", measured.scores, plan, subtitle)
    console.print(
        f"Done in {time.perf_counter() - started:.0f} s. Written to {out}: table.csv, "
        "positions.csv, continuations.txt, quality_vs_bits.png, kl_vs_position.png",
        highlight=False,
        markup=False,
    )
    return measured.rows


def _prepare(options: Options, progress: Progress) -> tuple[Setup, dict[str, str]]:
    """Check and load everything; the setup, and the lines that describe it."""
    configs = parse_presets(options.presets, "--presets")
    peers = parse_peers(options.peers)
    for name in ("tokens", "batch"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} {getattr(options, name)}: give at least 1.")
    directory = find_model(options.model)
    documents, missing = read_documents(directory, options.text)
    _make_folder(options.out)
    task = progress.add_task("load the model", total=1)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    subject = load_subject(directory, device)
    for preset in configs:  # a model that cannot be patched is refused before any work is done
        with kvarn_ops.patched(subject.model, preset):
            pass
    _check_peers(peers, subject)
    plan = _plan(options, subject, configs)
    tokens = {name: subject.codec.encode(text) for name, text in documents.items()}
    windows = cut_windows(tokens, plan.context + 1, options.batch + 1)
    # One window more than is scored, so that the continued prompt is another text.
    prompt = windows.pop() if len(windows) > 1 else windows[0]
    batch = torch.stack([subject.codec.start(window.ids) for window in windows])
    setup = Setup(subject, plan, configs, batch, prompt, options.tokens, options.compile, peers)
    progress.advance(task)

    sources = ", ".join(dict.fromkeys(window.source for window in windows))
    count = f"{len(windows)} windows"
    if len(windows) < options.batch:
        count += f" (the text has no more, {options.batch} were asked for)"
    unit = subject.codec.unit
    parameters = sum(parameter.numel() for parameter in subject.model.parameters())
    header = {
        "model": f"{subject.name}: {type(subject.model).__name__}, {parameters / 1e6:.2f} M "
        f"parameters, {str(subject.model.dtype).removeprefix('torch.')}",
        "context": f"{plan.context} {unit}s, the first {plan.prefix} prefilled, the rest decoded",
        "batch": f"{count} of {'' if options.text else 'held-out '}text: {sources}",
        "runs on": f"{subject.device}, torch {torch.__version__}, {torch.get_num_threads()} "
        f"threads, {'compiled' if options.compile else 'not compiled'}",
    }
    if missing:
        header["left out"] = f"not in this Python's standard library: {', '.join(missing)}"
    return setup, header


def _check_peers(peers: list[Peer], subject: Subject) -> None:
    for peer in peers:
        try:
            peer.new_cache(subject.model.config)
        except ValueError as error:
            raise InputError(f"{peer.name} cannot cache {subject.name}: {error}") from None


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the output folder {str(out)!r} cannot be made: {error}") from None


def _plan(options: Options, subject: Subject, configs: dict[str, KVarNConfig]) -> Plan:
    text_config = subject.model.config.get_text_config(decoder=True)
    longest = getattr(text_config, "max_position_embeddings", None)
    context = options.context
    if context is None:
        context = min(DEFAULT_CONTEXT, longest or DEFAULT_CONTEXT)
    if longest and context > longest:
        raise InputError(
            f"--context {context} exceeds the {longest} positions that {subject.name} knows: use "
            f"--context {longest} or less."
        )
    plan = Plan.make(configs, context)
    if context < plan.shortest_context:
        raise InputError(
            f"a context of {context} tokens leaves no quantized tile to score: these presets need "
            f"--context {plan.shortest_context} or more."
        )
    if context - options.tokens < plan.first_scored:
        raise InputError(
            f"--tokens {options.tokens} leaves a prompt of less than {plan.first_scored} tokens in "
            f"a context of {context}: use --tokens {context - plan.first_scored} or less."
        )
    return plan


def _notes(setup: Setup, measured: Measured) -> str:
    plan, unit = setup.plan, setup.subject.codec.unit
    speeds = ", ".join(f"{form} {speed:,.0f}" for form, speed in measured.dense_speeds.items())
    return (
        "Size: the whole cache. Tile bits: per element of a quantized tile, scales included.\n"
        f"KL and accuracy: decode steps with {plan.first_scored} or more cached {unit}s, all of "
        "which read quantized tiles; ± is the standard error over windows. Before the first tile, "
        f"where only rounding differs, KL is {measured.rounding_floor(plan):.1e}.\n"
        f"tokens/s: all windows together, mean step at {plan.timed.start} to {plan.timed.stop} "
        f"cached {unit}s, steps that quantize included. Dense is the fastest of: {speeds}.\n"
    )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
