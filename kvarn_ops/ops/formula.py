"""The algebra of attention over packed tiles, with every scale folded out of the codes.

    scores[t] = token_scale[t] * (sum_d q'[d] * code[t, d] + sum_d q'[d] * zero[d])
    out[d]    = channel_scale[d] * (sum_t p'[t] * code[t, d] + sum_t p'[t] * zero[t])

with `q' = q * channel scale`, `p' = p * token scale` and `zero = offset - center`. Codes meet one
multiplication each. The same functions serve eager mode (`dot_matmul`) and Inductor
(`dot_unrolled`), which differ only in how a packed matrix is multiplied with a few vectors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..config import KVarNConfig
from ..layout import Field, PackedTiles, center, fields, to_field_order

__all__ = ["Dot", "dot_matmul", "dot_unrolled", "materialized", "tile_output", "tile_scores"]

# (codes [..., R, bytes] uint8, x [..., M, K] fp32, bits) -> x @ codes.T, [..., M, R] fp32
Dot = Callable[[Tensor, Tensor, int], Tensor]


def tile_scores(q: Tensor, tiles: PackedTiles, config: KVarNConfig, dot: Dot) -> Tensor:
    """Scores of queries against quantized keys.

    Parameters
    ----------
    q : Tensor
        `[..., H_kv, M, D]` fp32, scaled, in the frame of the stored keys; M = all query rows of a
        KV head.
    tiles : PackedTiles
        The tiles to read, `[..., H_kv, n, ...]`; leading dimensions broadcast.

    Returns
    -------
    Tensor
        `[..., H_kv, n, M, G]` fp32.
    """
    scale, offset = tiles.k_channel_affine.float().unbind(-2)
    folded = q.unsqueeze(-3) * scale.unsqueeze(-2)  # [..., H, n, M, D]
    zero = (offset - center(config.key_bits)).unsqueeze(-2)
    bias = (folded * zero).sum(-1, keepdim=True)
    scores = dot(tiles.k_codes, folded, config.key_bits) + bias
    return scores * tiles.k_token_scale.float().unsqueeze(-2)


def tile_output(p: Tensor, tiles: PackedTiles, config: KVarNConfig, dot: Dot) -> Tensor:
    """Weighted sum of quantized values.

    Parameters
    ----------
    p : Tensor
        `[..., H_kv, n, M, G]` fp32 weights.

    Returns
    -------
    Tensor
        `[..., H_kv, M, D]` fp32 in the frame of the stored values.
    """
    scale, offset = tiles.v_token_affine.float().unbind(-2)
    folded = p * scale.unsqueeze(-2)
    zero = (offset - center(config.value_bits)).unsqueeze(-2)
    bias = (folded * zero).sum(-1, keepdim=True)
    out = dot(tiles.v_codes, folded, config.value_bits) + bias  # [..., H, n, M, D]
    return (out * tiles.v_channel_scale.float().unsqueeze(-2)).sum(-3)


def dot_matmul(codes: Tensor, x: Tensor, bits: int) -> Tensor:
    """One matrix product per bit field: the eager form."""
    total = None
    for field, part in zip(fields(bits, x.shape[-1]), to_field_order(x, bits), strict=True):
        values = _field_values(codes, field)
        product = (part * field.weight if field.weight != 1 else part) @ values.mT
        total = product if total is None else total.add_(product)
    assert total is not None
    return total


def dot_unrolled(codes: Tensor, x: Tensor, bits: int) -> Tensor:
    """Multiply and sum, unrolled over the M vectors: Inductor fuses it into one loop over bytes.

    Unrolled, since the loops of the M reductions are then merged and each byte is unpacked once. A
    matrix product would be an external kernel, for which Inductor first writes the codes out.
    """
    operands = [
        (field.weight, _field_values(codes, field), materialized(part))
        for field, part in zip(fields(bits, x.shape[-1]), to_field_order(x, bits), strict=True)
    ]
    columns = []
    for m in range(x.shape[-2]):
        sums: dict[int, Tensor] = {}  # by weight: with 3 bits their rows differ in length
        for weight, values, part in operands:
            product = values * part[..., m, None, :]
            sums[weight] = sums[weight] + product if weight in sums else product
        columns.append(sum(weight * products.sum(-1) for weight, products in sums.items()))
    return torch.stack(columns, dim=-2)


def _field_values(codes: Tensor, field: Field) -> Tensor:
    part = codes[..., field.start : field.stop]
    if field.shift:
        part = part >> field.shift
    if field.mask << field.shift < 255:
        part = part & field.mask
    return part.float()


def materialized(x: Tensor) -> Tensor:
    """Force Inductor to write `x` to memory; inlined, it would be recomputed for every code."""
    x = x.contiguous()
    return torch.as_strided(x, x.shape, x.stride())
