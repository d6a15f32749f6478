"""The options of `kvarn-ops eval`. Imports nothing that is slow: the command line reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["evaluate"]


def evaluate(
    out: Annotated[Path, typer.Option(help="Folder for tables and pictures.")] = Path(
        "eval_output"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="All methods in minutes: less text, fewer presets.")
    ] = False,
    model: Annotated[
        Path | None, typer.Option(help="Local causal language model; default: those of a checkout.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text to score; default: what training left out.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="text, attention, chase, lines; with --data: math500, aime24, humaneval, ifeval; "
            "line_text. With commas; default: the first four, the first two of an own model."
        ),
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Methods, with commas; default: all of them.")
    ] = None,
    presets: Annotated[
        str | None, typer.Option(help="Presets, with commas; default: k2v2,k3v2,k3v3,k4v2,k4v4.")
    ] = None,
    protocols: Annotated[
        str | None, typer.Option(help="decode, pseudo, prefill, with commas; default: all.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens per window; default: 4096 or what the model knows.")
    ] = None,
    windows: Annotated[int | None, typer.Option(help="Windows of text.")] = None,
    samples: Annotated[int | None, typer.Option(help="Puzzles per variant.")] = None,
    placements: Annotated[
        int | None, typer.Option(help="Outlier variants of each model; 0 for none.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Windows or prompts run together.")] = None,
    block: Annotated[
        int | None, typer.Option(help="Tokens per forward of the protocol pseudo.")
    ] = None,
    sinks: Annotated[int | None, typer.Option(help="num_sink_tokens for text.")] = None,
    tail: Annotated[int | None, typer.Option(help="tail_tokens for text.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with local copies: math500.jsonl, ...")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Questions of each benchmark.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Length of an answer.")] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Let humaneval run code that the model wrote.")
    ] = False,
    peers: Annotated[
        str | None,
        typer.Option(help="transformers' quantized caches too: quanto4, quanto2, hqq4, fp8."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of generated tasks and samples.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Default: cuda if there is one, else cpu.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Default: float32 on a CPU, the model's own elsewhere.")
    ] = None,
) -> None:
    """Measure quality in decode mode: KVarN, other quantizers and dense, through one cache.

    A run that was stopped continues where it was when it is started again with the same options.
    """
    from rich.console import Console

    from .options import make_options
    from .run import run_eval

    given = dict(
        model=model, text=text, tasks=tasks, methods=methods, presets=presets, protocols=protocols,
        context=context, windows=windows, samples=samples, placements=placements, batch=batch,
        block=block, sinks=sinks, tail=tail, data=data, limit=limit, max_new_tokens=max_new_tokens,
        allow_code=allow_code or None, peers=peers, seed=seed, device=device, dtype=dtype,
    )  # fmt: skip
    run_eval(make_options(out, quick, given), Console())
