"""Options of an evaluation, and the pieces of work that they mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kvarn_ops

from ..config import KVarNConfig, parse_presets
from ..errors import InputError
from .attention_error import attention_piece
from .data import Subject, cut_windows, find_model, load_model, load_subject, read_documents
from .methods import DEFAULT_METHODS, Method, parse_methods
from .outliers import check_outliers, with_outliers
from .pieces import Case, Piece, generator_for
from .protocols import PROTOCOLS, protocol
from .puzzle_runs import puzzle_piece
from .tasks.puzzles import PUZZLES, Puzzle
from .text import DenseRun, text_piece

__all__ = ["TASKS", "Job", "Options", "jobs", "make_options"]

TASKS = ("text", "attention", *PUZZLES)
_OWN_MODEL_TASKS = ("text", "attention")
_PACKED_METHODS = ("plus",)  # also run in the product's cache, to show that the numbers are its own
_CONTEXT = 4096
_PSEUDO_BLOCK = 16
_ATTENTION_ROWS = 2  # windows of the attention errors: means over thousands of tokens need few


@dataclass(frozen=True)
class Options:
    """What the command line was given; None means that the evaluation chooses."""

    out: Path
    model: Path | None = None
    text: Path | None = None
    tasks: str | None = None
    methods: str = DEFAULT_METHODS
    presets: str = "k2v2,k3v2,k3v3,k4v2,k4v4"
    protocols: str = "decode,pseudo,prefill"
    context: int | None = None
    windows: int = 8
    batch: int = 8
    samples: int = 64
    placements: int = 5
    block: int = _PSEUDO_BLOCK
    sinks: int | None = None
    tail: int = 0
    seed: int = 0
    device: str | None = None
    dtype: str | None = None

    def settings(self) -> dict[str, Any]:
        """What decides the numbers; stored with the results."""
        values = {name: value for name, value in vars(self).items() if name != "out"}
        return {
            name: str(value) if isinstance(value, Path) else value for name, value in values.items()
        } | {"kvarn_ops": kvarn_ops.__version__}


_QUICK: dict[str, Any] = {
    "presets": "k2v2,k4v2",
    "protocols": "pseudo,prefill",
    "windows": 4,
    "batch": 4,
    "placements": 2,
}


def make_options(out: Path, quick: bool, given: dict[str, Any]) -> Options:
    """Options from what was given on the command line; None is not given.

    `quick` replaces defaults, not what was given. With a model of one's own, outlier variants are
    made only if they are asked for.
    """
    defaults = _QUICK if quick else {}
    if given.get("model") is not None:
        defaults = defaults | {"placements": 0}
    chosen = {name: value for name, value in given.items() if value is not None}
    return Options(out=out, **(defaults | chosen))


@dataclass(frozen=True)
class Job:
    """A piece, and the columns that describe it in the tables."""

    piece: Piece
    kind: str  # text, attention or puzzle
    columns: dict[str, str]
    positions: range = field(default=range(0))  # of the last axis of the piece's tensors


def jobs(options: Options) -> list[Job]:
    """All work of a run, in an order that shares models and dense logits.

    Raises
    ------
    InputError
        For options, a model or a text that do not go together.
    """
    methods = parse_methods(options.methods)
    presets = parse_presets(options.presets, "--presets")
    names = _chosen(options.protocols, PROTOCOLS, "--protocols")
    default = ",".join(TASKS if options.model is None else _OWN_MODEL_TASKS)
    tasks = _chosen(default if options.tasks is None else options.tasks, TASKS, "--tasks")
    for name in ("windows", "batch", "samples", "block"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} {getattr(options, name)}: give at least 1.")
    if options.placements < 0:
        raise InputError(f"--placements {options.placements}: give 0 or more.")
    found: list[Job] = []
    if set(tasks) & set(_OWN_MODEL_TASKS):
        subject = load_subject(find_model(options.model), *_placed(options))
        found += _text_jobs(options, subject, tasks, names, methods, presets)
    for task in tasks:
        if task in PUZZLES:
            found += _puzzle_jobs(options, PUZZLES[task], methods, presets)
    return found


def _chosen(text: str, known: tuple[str, ...], option: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in known:
            raise InputError(f"{option} {name}: choose of {', '.join(known)}.")
    if not names:
        raise InputError(f"{option} is empty: choose of {', '.join(known)}.")
    return names


def _placed(options: Options) -> tuple[str, str]:
    """Device and dtype."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    # 16-bit rounding would hide what 4 bits do; large models may only fit in their own dtype.
    return device, options.dtype or ("float32" if device == "cpu" else "auto")


class _Variants:
    """A model and its outlier variants; one is made when it is first used, and the last is kept."""

    def __init__(self, model: Any, placements: int) -> None:
        self.model = model
        self.names = ["plain", *(f"outliers{seed}" for seed in range(placements))]
        self._kept: tuple[str, Any] = ("plain", model)
        if placements:
            check_outliers(model)

    def loader(self, name: str) -> Callable[[], Any]:
        """What gives the variant."""

        def load() -> Any:
            if self._kept[0] != name:
                seed = int(name.removeprefix("outliers")) if name != "plain" else None
                model = self.model if seed is None else with_outliers(self.model, seed)
                self._kept = (name, model)
            return self._kept[1]

        return load


def _cases(
    methods: list[Method], presets: dict[str, KVarNConfig], with_packed: bool = True
) -> Iterator[Case]:
    done = set()
    for preset, config in presets.items():
        for method in methods:
            name = preset if method.depends_on_bits() else "-"
            if (method.name, name) in done:
                continue
            done.add((method.name, name))
            yield Case(method, name, config)
            if with_packed and method.name in _PACKED_METHODS:
                yield Case(method, name, config, packed=True)


def _columns(task: str, variant: str, protocol: str, case: Case, head_dim: int) -> dict[str, str]:
    return {
        "task": task,
        "model": variant,
        "protocol": protocol,
        "preset": case.preset,
        "method": case.method.name,
        "cache": case.cache_name,
        "bits": f"{case.method.bits(case.config, head_dim):.4g}",
    }


def _text_jobs(
    options: Options,
    subject: Subject,
    tasks: list[str],
    names: list[str],
    methods: list[Method],
    presets: dict[str, KVarNConfig],
) -> Iterator[Job]:
    changes: dict[str, int] = {"tail_tokens": options.tail}
    if options.sinks is not None:
        changes["num_sink_tokens"] = options.sinks
    presets = {name: replace(config, **changes) for name, config in presets.items()}
    windows = _windows(options, subject, list(presets.values()))
    head_dim = _head_dim(subject.model.config)
    batches = windows.split(options.batch)
    longest = max(presets.values(), key=lambda config: protocol("decode", config, 1).prefix)
    variants = _Variants(subject.model, options.placements)
    for variant in variants.names:
        load = variants.loader(variant)
        for name in names if "text" in tasks else ():
            how = protocol(name, longest, options.block)
            for index, batch in enumerate(batches):
                dense = DenseRun(load, batch, how)
                for case in _cases(methods, presets):
                    key = f"text_{variant}_{name}_{case.key}_{index}"
                    label = f"text, {variant}, {name}, {case.key}"
                    yield Job(
                        text_piece(case, dense, key, label),
                        "text",
                        _columns("text", variant, name, case, head_dim) | {"batch": str(index)},
                        how.scored(batch.shape[1] - 1),
                    )
        if "attention" in tasks:
            how = protocol("pseudo", longest, options.block)
            rows = batches[0][:_ATTENTION_ROWS, :-1]
            for case in _cases([m for m in methods if m.name != "none"], presets, False):
                key = f"attention_{variant}_{case.key}"
                label = f"attention, {variant}, {case.key}"
                yield Job(
                    attention_piece(case, load, rows, how, key, label),
                    "attention",
                    _columns("attention", variant, "pseudo", case, head_dim),
                    how.scored(rows.shape[1]),
                )


def _windows(options: Options, subject: Subject, configs: list[KVarNConfig]) -> Tensor:
    """`[windows, context + 1]` int64 of unseen text."""
    longest = getattr(subject.model.config.get_text_config(decoder=True),
                      "max_position_embeddings", None)  # fmt: skip
    context = options.context or min(_CONTEXT, longest or _CONTEXT)
    if longest and context > longest:
        raise InputError(
            f"--context {context} exceeds the {longest} positions that {subject.name} knows: use "
            f"--context {longest} or less."
        )
    needed = max(c.num_sink_tokens + c.tail_tokens + 2 * c.group_size for c in configs)
    if context < needed:
        raise InputError(
            f"--context {context} leaves hardly a quantized tile to read: use {needed} or more."
        )
    documents, _ = read_documents(find_model(options.model), options.text)
    tokens = {name: subject.codec.encode(text) for name, text in documents.items()}
    windows = cut_windows(tokens, context + 1, options.windows)
    return torch.stack([subject.codec.start(window.ids) for window in windows]).to(subject.device)


def _puzzle_jobs(
    options: Options, puzzle: Puzzle, methods: list[Method], presets: dict[str, KVarNConfig]
) -> Iterator[Job]:
    model = load_model(find_model(None, puzzle.model), *_placed(options))
    head_dim = _head_dim(model.config)
    changes = {"group_size": puzzle.group_size, "num_sink_tokens": puzzle.num_sink_tokens}
    presets = {name: replace(config, **changes) for name, config in presets.items()}
    # The same questions for every method and variant.
    batch = puzzle.make(options.samples, puzzle.length, generator_for(options.seed, puzzle.name))
    batch = type(batch)(*(tensor.to(model.device) for tensor in batch))
    variants = _Variants(model, options.placements)
    for variant in variants.names:
        for case in _cases(methods, presets):
            key = f"{puzzle.name}_{variant}_{case.key}"
            label = f"{puzzle.name}, {variant}, {case.key}"
            yield Job(
                puzzle_piece(case, variants.loader(variant), batch, key, label),
                "puzzle",
                _columns(puzzle.name, variant, "free", case, head_dim),
            )


def _head_dim(model_config: Any) -> int:
    text = model_config.get_text_config(decoder=True)
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
