"""Outlier channels put into a model that has few, without changing what it computes.

Large models have channels of K and V far larger than the rest; small ones hardly do. Keys of some
RoPE pairs are scaled up and the matching queries down; values of some channels up and the output
projection down. In exact arithmetic the model computes the same function. A `placement` is a seed
that decides which pairs and channels, for each layer and KV head.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModelError

__all__ = ["FACTOR", "check_outliers", "with_outliers"]

FACTOR = 4.0  # a power of two: rounding does not change
PAIRS = 3  # RoPE pairs of K per KV head
CHANNELS = 3  # channels of V per KV head
_ROUNDING = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of logits


@torch.no_grad()
def with_outliers(model: Any, placement: int, factor: float = FACTOR) -> Any:
    """A copy of a model with outlier channels in keys and values.

    Parameters
    ----------
    model : PreTrainedModel
        With `q_proj`, `k_proj`, `v_proj`, `o_proj` per attention layer, RoPE over halves of a head,
        and no normalization between projection and RoPE (`check_outliers`).
    placement : int
        Seed of the choice of pairs and channels.
    factor : float
        How much larger they become.
    """
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(placement)
    for _, module in _attention_layers(changed):
        _scale_layer(module, generator, factor)
    return changed


def check_outliers(model: Any) -> None:
    """Raise `UnsupportedModelError` if `with_outliers` does not know how to change this model."""
    layers = _attention_layers(model)
    for name, module in layers:
        if any(hasattr(module, part) for part in ("q_norm", "k_norm")):
            raise UnsupportedModelError(
                f"{name} normalizes queries and keys, which undoes their scale: outliers cannot be "
                "put into this model. Leave the outlier variants out (--placements 0)."
            )
    if not layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no q_proj, k_proj, v_proj and o_proj side by side: "
            "outliers cannot be put into this model. Leave them out (--placements 0)."
        )
    # What the names do not tell: partial or interleaved RoPE, norms under other names.
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(vocabulary, (1, 32), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    with torch.no_grad():
        before = model(input_ids=ids).logits.float()
        after = with_outliers(model, 0)(input_ids=ids).logits.float()
    difference = ((after - before).norm() / before.norm()).item()
    if not difference < _ROUNDING[model.dtype]:
        raise UnsupportedModelError(
            f"{type(model).__name__} is another function with outlier channels (logits differ by "
            f"{difference:.2g}): its heads rotate or normalize in a way that is not known here. "
            "Leave the outlier variants out (--placements 0)."
        )


def _attention_layers(model: Any) -> list[tuple[str, Any]]:
    parts = ("q_proj", "k_proj", "v_proj", "o_proj")
    return [(n, m) for n, m in model.named_modules() if all(hasattr(m, part) for part in parts)]


def _scale_layer(module: Any, generator: torch.Generator, factor: float) -> None:
    head_dim = module.head_dim
    kv_heads = module.k_proj.weight.shape[0] // head_dim
    group = module.q_proj.weight.shape[0] // head_dim // kv_heads
    for head in range(kv_heads):
        pairs = torch.randperm(head_dim // 2, generator=generator)[:PAIRS]
        channels = torch.randperm(head_dim, generator=generator)[:CHANNELS]
        both_halves = torch.cat([pairs, pairs + head_dim // 2])
        queries = range(head * group, (head + 1) * group)
        _scale_rows(module.k_proj, head * head_dim + both_halves, factor)
        _scale_rows(module.v_proj, head * head_dim + channels, factor)
        for query in queries:
            _scale_rows(module.q_proj, query * head_dim + both_halves, 1 / factor)
            module.o_proj.weight[:, query * head_dim + channels] /= factor


def _scale_rows(linear: Any, rows: Tensor, factor: float) -> None:
    linear.weight[rows] *= factor
    if linear.bias is not None:
        linear.bias[rows] *= factor
