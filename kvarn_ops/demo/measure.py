"""The demo's measurements: every cache decodes the same windows, then continues the same prompt."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from transformers.cache_utils import StaticCache

import kvarn_ops

from ..config import KVarNConfig
from ..errors import InputError
from ..eval.data import Subject, Window
from ..eval.peers import Peer, cache_bytes
from ..eval.scores import kl_divergence
from ..hf.cache import KVarNCache
from ..hf.layer import KVarNLayer
from .decode import (
    Plan,
    check_tiles_are_quantized,
    compiled,
    continuation,
    other_dense_speeds,
    teacher_forced,
)
from .report import Row, Scores

__all__ = ["Measured", "Setup", "continue_prompt", "decode_windows"]


@dataclass(frozen=True)
class Setup:
    """Everything that is settled before the first step."""

    subject: Subject
    plan: Plan
    configs: dict[str, KVarNConfig]  # by preset name, as the user wrote it
    windows: Tensor  # [B, context + 1] int64
    prompt: Window
    tokens: int  # length of the continuations
    compile: bool
    peers: Sequence[Peer] = ()


@dataclass(frozen=True)
class Measured:
    """Results of the teacher-forced runs, dense first."""

    rows: list[Row]
    scores: dict[str, Scores]
    dense_speeds: dict[str, float]  # tokens per second by form of the dense cache

    def rounding_floor(self, plan: Plan) -> float:
        """Mean KL before any tile is quantized, where caches differ by rounding only."""
        before = min(plan.first_tiles.values()) - plan.prefix
        presets = [self.scores[name].kl for name in plan.first_tiles]
        means = [kl[:before].mean().item() for kl in presets if kl is not None]
        return sum(means) / len(means)


def decode_windows(setup: Setup, scratch: Path, progress: Progress) -> Measured:
    """Teacher-forced decode: dense once, then every preset and peer against its logits."""
    subject, plan = setup.subject, setup.plan
    span = range(plan.prefix, plan.context)
    batch = len(setup.windows)
    names = ("dense", *setup.configs, *(peer.name for peer in setup.peers))
    bars = {
        name: progress.add_task(f"decode, {name}", total=len(span), start=False) for name in names
    }
    hits = {name: torch.zeros(len(span), batch, dtype=torch.bool) for name in names}
    kl = {name: torch.zeros(len(span), batch) for name in names[1:]}

    with tempfile.TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as folder:
        logits_of_dense = _LogitFile(Path(folder) / "logits", len(span))

        def score(name: str) -> Callable[[int, Tensor], None]:
            def each(position: int, logits: Tensor) -> None:
                index = position - plan.prefix
                logits = logits.cpu()
                hits[name][index] = logits.argmax(-1) == setup.windows[:, position + 1]
                if name == "dense":
                    logits_of_dense.write(index, logits)
                else:
                    kl[name][index] = kl_divergence(logits_of_dense.read(index), logits)
                progress.update(bars[name], advance=1, description=f"decode, {name}")

            return each

        progress.start_task(bars["dense"])
        cache: Any = StaticCache(config=subject.model.config, max_cache_len=plan.context)
        seconds = teacher_forced(subject, subject.model, cache, setup.windows, span, score("dense"))
        dense_size = cache_bytes(cache)
        del cache
        forms = {"StaticCache, eager": _mean_step(seconds, plan)}
        forms |= other_dense_speeds(subject, setup.windows, plan, setup.compile)
        element_bits = 8.0 * subject.model.dtype.itemsize
        sizes = {"dense": (dense_size, element_bits)}
        steps = {"dense": min(forms.values())}
        for name in setup.configs:
            progress.start_task(bars[name])
            if setup.compile:
                progress.update(bars[name], description=f"compile, {name}")
            size, bits, seconds = _decode_packed(setup, name, span, score(name))
            sizes[name], steps[name] = (size, bits), _mean_step(seconds, plan)
        for peer in setup.peers:
            progress.start_task(bars[peer.name])
            cache = peer.new_cache(subject.model.config)
            each = score(peer.name)
            seconds = teacher_forced(subject, subject.model, cache, setup.windows, span, each)
            sizes[peer.name] = cache_bytes(cache), math.nan
            steps[peer.name] = _mean_step(seconds, plan)

    scores = {name: Scores(kl.get(name), hits[name]) for name in names}
    rows = [
        Row(
            name,
            cache_bytes=size,
            tile_bits=bits,
            total_bits=element_bits * size / dense_size,
            compression=dense_size / size,
            tokens_per_second=batch / steps[name],
            **scores[name].summary(scores["dense"], plan.first_scored - plan.prefix),
        )
        for name, (size, bits) in sizes.items()
    ]
    return Measured(rows, scores, {form: batch / step for form, step in forms.items()})


def _decode_packed(
    setup: Setup, preset: str, span: range, each: Callable[[int, Tensor], None]
) -> tuple[int, float, list[float]]:
    """Bytes of the cache, bits per element of a tile, seconds per step."""
    subject, model = setup.subject, setup.subject.model
    with kvarn_ops.patched(model, preset):
        step = compiled(model) if setup.compile else model
        cache = KVarNCache(model.config, setup.plan.context, preset, device=subject.device)
        seconds = teacher_forced(subject, step, cache, setup.windows, span, each)
    check_tiles_are_quantized(cache, span.stop)
    if setup.compile:
        torch.compiler.reset()  # compiled code of another preset is no use to the next one
    head_dim = next(
        layer.tiles.k_tail.shape[-1]
        for layer in cache.layers
        if isinstance(layer, KVarNLayer) and layer.tiles is not None
    )
    return cache.memory()["total"], setup.configs[preset].effective_bits(head_dim), seconds


def continue_prompt(setup: Setup, progress: Progress) -> tuple[list[int], dict[str, list[int]]]:
    """Greedy text after the same prompt, from the dense cache and from every preset."""
    subject, model = setup.subject, setup.subject.model
    longest = subject.codec.start(setup.prompt.ids)[: setup.plan.context - setup.tokens]
    prompt = subject.codec.end(longest, setup.plan.first_scored)
    total = setup.tokens * (1 + len(setup.configs))
    bar = progress.add_task("continue a prompt", total=total)

    def tick() -> None:
        progress.advance(bar)

    texts = {"dense": continuation(subject, prompt, setup.tokens, tick)[0]}
    for preset in setup.configs:
        with kvarn_ops.patched(model, preset):
            texts[preset], cache = continuation(subject, prompt, setup.tokens, tick)
        # The last token is returned without having been fed back.
        check_tiles_are_quantized(cache, len(prompt) + len(texts[preset]) - 1)
    progress.update(bar, completed=total)  # some may have ended early
    return prompt.tolist(), texts


class _LogitFile:
    """Logits of all steps in a mapped file: with a large vocabulary they exceed the memory."""

    def __init__(self, path: Path, steps: int) -> None:
        self._path = path
        self._steps = steps
        self._rows: Tensor | None = None

    def write(self, index: int, logits: Tensor) -> None:
        """Store the logits `[B, V]` of one step."""
        if self._rows is None:
            count = self._steps * logits.numel()
            needed, free = count * logits.itemsize, shutil.disk_usage(self._path.parent).free
            if needed > free:
                raise InputError(
                    f"the dense logits take {needed / 1e9:.1f} GB and the disk of --out has "
                    f"{free / 1e9:.1f} GB left: use a smaller --batch or --context."
                )
            rows = torch.from_file(str(self._path), shared=True, size=count, dtype=logits.dtype)
            self._rows = rows.view(self._steps, *logits.shape)
        self._rows[index] = logits

    def read(self, index: int) -> Tensor:
        """Logits `[B, V]` of one step."""
        assert self._rows is not None
        return self._rows[index]


def _mean_step(seconds: list[float], plan: Plan) -> float:
    """A mean, because caches that quantize do so in one of many steps."""
    timed = plan.timed
    return fmean(seconds[timed.start - plan.prefix : timed.stop - plan.prefix])
