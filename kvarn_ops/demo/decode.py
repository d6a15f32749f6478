"""Decode through real caches: one token per step, teacher-forced or free-running.

Prefill attends to exact new keys and values, whatever the cache; what quantization costs shows in
decode mode only. Hence a short prefix, which finishes no tile, then one step per token.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, StaticCache

from ..config import KVarNConfig
from ..errors import BackendError, CacheError, KVarNError, reason
from ..eval.data import Subject
from ..eval.protocols import last_logits_only
from ..hf.cache import KVarNCache
from ..hf.layer import KVarNLayer

__all__ = [
    "Plan",
    "check_tiles_are_quantized",
    "compiled",
    "continuation",
    "other_dense_speeds",
    "teacher_forced",
]

WARMUP_STEPS = 8
TIMED_STEPS = 128  # of the largest tile, and of the residual of transformers' QuantizedCache

Step = Callable[..., Any]


@dataclass(frozen=True)
class Plan:
    """Which positions are decoded, scored and timed. A position is the number of cached tokens."""

    context: int
    prefix: int  # tokens of the prefill
    first_scored: int  # from here on every preset reads at least one quantized tile
    first_tiles: dict[str, int]  # by preset, the first position that reads a tile
    tile_starts: tuple[int, ...]  # positions that first read a tile, if presets agree on them

    @classmethod
    def make(cls, configs: dict[str, KVarNConfig], context: int) -> Plan:
        """Plan for some presets; `context` tokens end up in the cache."""
        first = {
            name: config.num_sink_tokens + config.tail_tokens + config.group_size
            for name, config in configs.items()
        }
        groups = {config.group_size for config in configs.values()}
        agreed = len(groups) == 1 and len(set(first.values())) == 1
        starts = range(max(first.values()), context, max(groups)) if agreed else ()
        prefix = min(first.values()) - min(groups) // 2
        return cls(context, prefix, max(first.values()), first, tuple(starts))

    @property
    def shortest_context(self) -> int:
        """Below this there would be hardly anything to score or to time."""
        return self.first_scored + 2 * WARMUP_STEPS

    @property
    def timed(self) -> range:
        """Positions whose steps are timed: the middle, since some caches slow down as they fill."""
        start = max(self.prefix + WARMUP_STEPS, (self.context - TIMED_STEPS) // 2)
        return range(start, min(self.context, start + TIMED_STEPS))


def teacher_forced(
    subject: Subject,
    step: Step,
    cache: Any,
    windows: Tensor,
    span: range,
    each: Callable[[int, Tensor], None] | None = None,
) -> list[float]:
    """Prefill `span.start` tokens, then decode the rest of the span one token at a time.

    Parameters
    ----------
    subject : Subject
        Its model does the prefill, not compiled.
    step : callable
        The model, or the model compiled.
    cache : Cache
        Empty.
    windows : Tensor
        `[B, n]` int64 token ids.
    span : range
        Positions to decode.
    each : callable, optional
        Called after every step with the position and the logits `[B, V]`.

    Returns
    -------
    list of float
        Seconds of every step; the first one contains the compilation.
    """
    model, device = subject.model, subject.device
    columns = windows.T.contiguous().to(device)  # [n, B]: a row is one step's input
    keep = last_logits_only(model)
    seconds = []
    with torch.no_grad():
        prefix = columns[: span.start].T.contiguous()
        model(input_ids=prefix, past_key_values=cache, use_cache=True, **keep)
        for position in span:
            token = columns[position].unsqueeze(1)
            _synchronize(device)
            started = time.perf_counter()
            logits = step(input_ids=token, past_key_values=cache, use_cache=True).logits
            _synchronize(device)
            seconds.append(time.perf_counter() - started)
            if each is not None:
                each(position, logits[:, -1])
    return seconds


def compiled(model: Any) -> Step:
    """The model under `torch.compile`, whose failure to compile is one sentence."""
    function = torch.compile(model, fullgraph=True)
    finished = False

    def step(**kwargs: Any) -> Any:
        nonlocal finished
        if finished:
            return function(**kwargs)
        try:
            result = function(**kwargs)
        except KVarNError:
            raise
        except RuntimeError as error:  # Dynamo's and Inductor's errors are subclasses
            raise BackendError(
                f"torch.compile failed: {reason(error, lines=2)} On a CPU it "
                "needs a C++ compiler, which `kvarn-ops env` shows; --no-compile runs without one."
            ) from error
        finished = True
        return result

    return step


def other_dense_speeds(
    subject: Subject, windows: Tensor, plan: Plan, compile_too: bool
) -> dict[str, float]:
    """Mean seconds per step of the dense caches that the scores do not come from, by name."""
    config = subject.model.config
    span = range(plan.timed.start - WARMUP_STEPS, plan.timed.stop)

    def measure(step: Step, cache: Any) -> float:
        return fmean(teacher_forced(subject, step, cache, windows, span)[WARMUP_STEPS:])

    speeds = {"DynamicCache, eager": measure(subject.model, DynamicCache(config=config))}
    if compile_too:
        cache = StaticCache(config=config, max_cache_len=plan.context)
        speeds["StaticCache, compiled"] = measure(compiled(subject.model), cache)
        torch.compiler.reset()
    return speeds


def check_tiles_are_quantized(cache: Any, tokens: int) -> int:
    """Raise unless every packed layer holds `tokens` tokens per row in quantized tiles.

    Returns
    -------
    int
        Quantized tiles per row and layer.

    Raises
    ------
    CacheError
        If a layer is not packed as it should be: scores would not be those of a quantized cache.
    """
    layers = [layer for layer in getattr(cache, "layers", ()) if isinstance(layer, KVarNLayer)]
    if not isinstance(cache, KVarNCache) or not layers:
        raise CacheError("nothing was quantized: the model ran without a KVarN cache.")
    tiles = layers[0].config.num_tiles(tokens)
    for index, layer in enumerate(layers):
        held = [] if layer.tiles is None else layer.tiles.seq_lens.tolist()
        if not held or tiles < 1 or set(held) != {tokens}:
            raise CacheError(
                f"nothing was quantized in packed layer {index}: its rows hold {held} tokens and "
                f"{tiles} tiles, {tokens} tokens were decoded."
            )
        assert layer.tiles is not None
        scales = layer.tiles.k_token_scale[:, :, :tiles], layer.tiles.v_channel_scale[:, :, :tiles]
        if not all(bool(scale.any(-1).all()) for scale in scales):
            raise CacheError(f"packed layer {index} holds a tile that was never written.")
    return tiles


class _Ticker:
    """A transformers streamer that only counts; the prompt is the first thing it is given."""

    def __init__(self, tick: Callable[[], None]) -> None:
        self._tick = tick
        self._started = False

    def put(self, value: Any) -> None:
        if self._started:
            self._tick()
        self._started = True

    def end(self) -> None:
        pass


def continuation(
    subject: Subject, prompt: Tensor, tokens: int, tick: Callable[[], None]
) -> tuple[list[int], Any]:
    """Greedy `generate` after a prompt `[n]`; the new ids, and the cache that was used."""
    model = subject.model
    ids = prompt.unsqueeze(0).to(subject.device)
    padding = model.generation_config.pad_token_id
    result = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0 if padding is None else padding,
        return_dict_in_generate=True,
        streamer=_Ticker(tick),
    )
    return result.sequences[0, len(prompt) :].tolist(), result.past_key_values


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
