"""The pieces of work that the options of an evaluation mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..config import KVarNConfig, parse_presets
from ..errors import InputError
from .attention_error import attention_piece
from .checks import can_be_packed, check_options, check_probe, check_room, head_dim_of
from .data import Subject, cut_windows, find_model, load_model, load_subject, read_documents
from .methods import Method, parse_methods
from .options import Options, chosen
from .outliers import check_outliers, with_outliers
from .peers import Peer, parse_peers
from .pieces import Case, Piece, generator_for
from .protocols import PROTOCOLS, protocol
from .puzzle_runs import puzzle_piece
from .question_runs import question_piece
from .tasks.catalogue import TEXT_TASKS
from .tasks.code_answers import HumanEval, with_code_execution
from .tasks.puzzles import PUZZLES, Puzzle
from .text import DenseRun, text_piece

__all__ = ["TASKS", "Job", "jobs", "tasks_of"]

TASKS = ("text", "attention", *PUZZLES, *TEXT_TASKS)
_OWN_MODEL_TASKS = ("text", "attention")
_PACKED_METHODS = ("plus",)  # also run in the product's cache, to show that the numbers are its own
_ATTENTION_ROWS = 2  # windows of the attention errors: means over thousands of tokens need few


@dataclass(frozen=True)
class Job:
    """A piece, and the columns that describe it in the tables."""

    piece: Piece
    kind: str  # text, attention, puzzle or questions
    columns: dict[str, str]
    positions: range = field(default=range(0))  # of the last axis of the piece's tensors
    first: int = 0  # position from which on means are taken: every preset reads a tile


def jobs(options: Options) -> list[Job]:
    """All work of a run, in an order that shares models and dense logits.

    Raises
    ------
    InputError
        For options, a model or a text that do not go together.
    """
    methods = parse_methods(options.methods)
    presets = parse_presets(options.presets, "--presets")
    peers = parse_peers(options.peers)
    names = chosen(options.protocols or ",".join(PROTOCOLS), PROTOCOLS, "--protocols")
    tasks = tasks_of(options)
    check_options(options, tasks)
    found: list[Job] = []
    if set(tasks) - set(PUZZLES):
        subject = load_subject(find_model(options.model), *options.placed())
        if not can_be_packed(subject.model, options.adjusted(presets).values()):
            methods = [method._replace(encoder=None) for method in methods]
        if set(tasks) & set(_OWN_MODEL_TASKS):
            found += _text_jobs(options, subject, tasks, names, methods, presets, peers)
        for task in tasks:
            if task in TEXT_TASKS:
                found += _question_jobs(options, subject, task, methods, presets, peers)
    for task in tasks:
        if task in PUZZLES:
            found += _puzzle_jobs(options, PUZZLES[task], methods, presets, peers)
    return found


def tasks_of(options: Options) -> list[str]:
    """The tasks that were asked for, or those that fit the model."""
    default = ",".join(_OWN_MODEL_TASKS if options.model else (*_OWN_MODEL_TASKS, *PUZZLES))
    return chosen(default if options.tasks is None else options.tasks, TASKS, "--tasks")


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
    methods: list[Method], presets: dict[str, KVarNConfig], peers: list[Peer] | None
) -> Iterator[Case]:
    """Every method at every preset, in the product's cache too; `peers` None: simulated only."""
    done = set()
    for preset, config in presets.items():
        for method in methods:
            name = preset if method.depends_on_bits() else "-"
            if (method.name, name) in done:
                continue
            done.add((method.name, name))
            yield Case(method, name, config)
            if peers is not None and method.name in _PACKED_METHODS and method.encoder:
                yield Case(method, name, config, packed=True)
    for peer in peers or ():
        yield Case.of_peer(peer, next(iter(presets.values())))


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
    peers: list[Peer],
) -> Iterator[Job]:
    presets = options.adjusted(presets)
    windows = _windows(options, subject, list(presets.values()))
    head_dim = head_dim_of(subject.model.config)
    batches = windows.split(options.batch)
    longest = max(presets.values(), key=lambda config: protocol("decode", config, 1).prefix)
    first = max(c.num_sink_tokens + c.tail_tokens + c.group_size for c in presets.values())
    variants = _Variants(subject.model, options.placements)
    for variant in variants.names:
        load = variants.loader(variant)
        for name in names if "text" in tasks else ():
            how = protocol(name, longest, options.block)
            for index, batch in enumerate(batches):
                dense = DenseRun(load, batch, how)
                for case in _cases(methods, presets, peers):
                    key = f"text_{variant}_{name}_{case.key}_{index}"
                    label = f"text, {variant}, {name}, {case.key}"
                    yield Job(
                        text_piece(case, dense, key, label),
                        "text",
                        _columns("text", variant, name, case, head_dim) | {"batch": str(index)},
                        how.scored(batch.shape[1] - 1),
                        first if name != "prefill" else 0,
                    )
        if "attention" in tasks and variant == "plain":
            check_probe(subject.model)
            how = protocol("pseudo", longest, options.block)
            rows = batches[0][:_ATTENTION_ROWS, :-1]
            some = dict(list(presets.items())[: 1 if options.quick else None])
            for case in _cases([m for m in methods if m.name != "none"], some, None):
                key = f"attention_{variant}_{case.key}"
                label = f"attention, {variant}, {case.key}"
                yield Job(
                    attention_piece(case, load, rows, how, key, label),
                    "attention",
                    _columns("attention", variant, "pseudo", case, head_dim),
                    how.scored(rows.shape[1]),
                )


def _question_jobs(
    options: Options,
    subject: Subject,
    name: str,
    methods: list[Method],
    presets: dict[str, KVarNConfig],
    peers: list[Peer],
) -> Iterator[Job]:
    task = TEXT_TASKS[name]
    if isinstance(task, HumanEval):
        if not options.allow_code:
            raise InputError(
                "humaneval runs code that a model wrote on this machine: add --allow-code if that "
                "is what you want."
            )
        task = with_code_execution(task)
    path = None if name == "line_text" else options.data_of(name)
    questions = task.load(path, options.limit, options.seed)
    presets = options.adjusted(presets)
    head_dim = head_dim_of(subject.model.config)
    steps = options.max_new_tokens or task.max_new_tokens
    longest = max(len(subject.codec.prompt(question.prompt)) for question in questions)
    check_room(subject.model, longest + steps, f"{name} with {steps} new tokens")
    # Prompts of similar length together: padding is work.
    order = sorted(questions, key=lambda question: len(question.prompt))
    for case in _cases(methods, presets, peers):
        for index in range(0, len(order), options.batch):
            key = f"{name}_{case.key}_{index}"
            yield Job(
                question_piece(
                    case,
                    lambda: subject.model,
                    subject.codec,
                    task,
                    order[index : index + options.batch],
                    steps,
                    key,
                    f"{name}, {case.key}",
                ),
                "questions",
                _columns(name, "plain", "free", case, head_dim) | {"batch": str(index)},
            )


def _windows(options: Options, subject: Subject, configs: list[KVarNConfig]) -> Tensor:
    """`[windows, context + 1]` int64 of unseen text."""
    text_config = subject.model.config.get_text_config(decoder=True)
    context = options.context_for(getattr(text_config, "max_position_embeddings", None))
    check_room(subject.model, context, f"--context {context}")
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
    options: Options,
    puzzle: Puzzle,
    methods: list[Method],
    presets: dict[str, KVarNConfig],
    peers: list[Peer],
) -> Iterator[Job]:
    model = load_model(find_model(None, puzzle.model), *options.placed())
    head_dim = head_dim_of(model.config)
    changes = {"group_size": puzzle.group_size, "num_sink_tokens": puzzle.num_sink_tokens}
    presets = {name: replace(config, **changes) for name, config in presets.items()}
    # The same questions for every method and variant.
    batch = puzzle.make(options.samples, puzzle.length, generator_for(options.seed, puzzle.name))
    batch = type(batch)(*(tensor.to(model.device) for tensor in batch))
    variants = _Variants(model, options.placements)
    for variant in variants.names:
        for case in _cases(methods, presets, peers):
            key = f"{puzzle.name}_{variant}_{case.key}"
            label = f"{puzzle.name}, {variant}, {case.key}"
            yield Job(
                puzzle_piece(case, variants.loader(variant), batch, key, label),
                "puzzle",
                _columns(puzzle.name, variant, "free", case, head_dim),
            )
