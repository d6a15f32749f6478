"""Where the error comes from: attention outputs of each layer, split into magnitude and direction.

`static`: the dense run's queries meet the dense run's keys and values, quantized: the error that
quantization makes at this place. `accumulated`: the method's own run, whose hidden states already
carry the errors of earlier layers and tokens, as in generation. `keys` and `values` are the errors
of what is stored, static.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import UnsupportedModelError
from .cache import MethodCache, MethodLayer
from .pieces import Case, Piece, Tick
from .protocols import Protocol, teacher_forced
from .scores import Errors, split_error

__all__ = ["KINDS", "attention_piece"]

KINDS = ("static", "accumulated", "keys", "values")
_NAME = "kvarn_eval_probe"


class _Call(NamedTuple):
    """What one attention layer saw in the last forward."""

    query: Tensor  # [B, H_q, s, D]
    key: Tensor  # [B, H_kv, T, D]
    value: Tensor
    mask: Tensor | None
    scaling: float | None
    out: Tensor  # [B, s, H_q, D]


@contextmanager
def _probing(model: Any) -> Iterator[dict[int, _Call]]:
    """Record every attention call of a model; by layer, overwritten by each forward."""
    calls: dict[int, _Call] = {}
    base = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def probe(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        out, weights = base(module, query, key, value, mask, **kwargs)
        calls[module.layer_idx] = _Call(query, key, value, mask, kwargs.get("scaling"), out)
        return out, weights

    ALL_ATTENTION_FUNCTIONS.register(_NAME, probe)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield calls
    finally:
        model.set_attn_implementation(before)


def attention_piece(
    case: Case,
    load: Callable[[], Any],
    windows: Tensor,
    protocol: Protocol,
    key: str,
    label: str,
) -> Piece:
    """Errors of one method on windows `[B, n]`; `<kind>_magnitude`, ... are `[L, B, positions]`."""
    forwards = 2 * len(protocol.spans(windows.shape[1]))

    def run(tick: Tick) -> dict[str, Tensor]:
        model = load()
        with _probing(model) as calls:
            return _measure(case, model, windows, protocol, calls, tick)

    return Piece(key, label, forwards, run)


def _measure(
    case: Case,
    model: Any,
    windows: Tensor,
    protocol: Protocol,
    calls: dict[int, _Call],
    tick: Tick,
) -> dict[str, Tensor]:
    shadow = MethodCache(model.config, case.method, case.config)
    own = MethodCache(model.config, case.method, case.config)
    layers = [i for i, layer in enumerate(shadow.layers) if isinstance(layer, MethodLayer)]
    found: dict[str, list[list[Errors]]] = {"static": [], "accumulated": []}
    dense_cache = DynamicCache(config=model.config)
    dense_run = teacher_forced(model, dense_cache, windows, protocol, tick)
    own_run = teacher_forced(model, own, windows, protocol, tick)
    seen = 0
    for span, _ in dense_run:
        if not set(layers) <= set(calls):
            raise UnsupportedModelError(
                "this model's attention does not go through transformers' attention functions: "
                "leave the attention errors out (--tasks without attention)."
            )
        dense = {index: calls[index] for index in layers}
        static = []
        for index in layers:
            call = dense[index]
            if not seen:  # the first forward, which reads nothing quantized
                prefix = slice(0, protocol.prefix)
                shadow.layers[index].update(call.key[:, :, prefix], call.value[:, :, prefix])
            new = slice(max(seen, protocol.prefix), None)
            keys, values = shadow.layers[index].update(call.key[:, :, new], call.value[:, :, new])
            out = F.scaled_dot_product_attention(
                call.query,
                keys,
                values,
                attn_mask=_mask(call, keys.shape[2]),
                scale=call.scaling,
                enable_gqa=True,
            )
            static.append(split_error(_rows(call.out), _rows(out.transpose(1, 2))))
        seen = span.stop
        found["static"].append(static)
        next(own_run)
        pairs = [(dense[index].out, calls[index].out) for index in layers]
        found["accumulated"].append([split_error(_rows(a), _rows(b)) for a, b in pairs])
    result = {"layers": torch.tensor(layers)}
    for kind, steps in found.items():
        for part in Errors._fields:
            by_layer = [
                torch.cat([getattr(step[i], part) for step in steps], dim=-1)
                for i in range(len(layers))
            ]
            result[f"{kind}_{part}"] = torch.stack(by_layer)
    for kind in ("keys", "values"):
        errors = [_stored_error(dense_cache, shadow, index, kind) for index in layers]
        for part in Errors._fields:
            stacked = torch.stack([getattr(error, part) for error in errors])
            result[f"{kind}_{part}"] = stacked[..., protocol.prefix :]
    return result


def _rows(out: Tensor) -> Tensor:
    """`[B, s, H, D]` to `[B, s, H * D]`: one vector per token."""
    return out.flatten(2)


def _mask(call: _Call, length: int) -> Tensor | None:
    """The mask of the dense call; without one, that of the newest tokens of a causal sequence."""
    if call.mask is not None:
        return call.mask
    count = call.query.shape[2]
    if count == 1:
        return None
    ones = torch.ones(count, length, dtype=torch.bool, device=call.query.device)
    return ones.tril(length - count)


def _stored_error(dense: DynamicCache, shadow: MethodCache, index: int, kind: str) -> Errors:
    """`[B, T]`: error of each stored token, mean over heads."""
    layer: Any = shadow.layers[index]
    layer.quantize_finished()
    error = split_error(getattr(dense.layers[index], kind), getattr(layer, kind))
    return Errors(error.magnitude.mean(1), error.direction.mean(1))
