"""The algebra of attention over packed tiles, with every scale folded out of the codes.

    scores[t] = token_scale[t] * (sum_d q'[d] * code[t, d] + sum_d q'[d] * zero[d])
    out[d]    = channel_scale[d] * (sum_t p'[t] * code[t, d] + sum_t p'[t] * zero[t])

with `q' = q * channel scale`, `p' = p * token scale` and `zero = offset - center`. Codes meet one
multiplication each. The same functions serve eager mode (`dot_matmul`) and Inductor
(`dot_unrolled`), which differ only in how a packed matrix is multiplied with a few vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .._compat import fused_multiply_add
from ..config import KVarNConfig
from ..layout import Field, PackedTiles, center, field_groups, fields

__all__ = ["Dot", "dot_matmul", "dot_unrolled", "materialized", "tile_output", "tile_scores"]


class Dot(NamedTuple):
    """How packed codes are multiplied with a few vectors.

    Codes stay at their place in the byte, and operands are divided by their unit instead: a shift
    is one more pass over the codes in eager mode, and vector units have none for bytes.
    """

    # (x [..., n] fp32, bits) -> [..., fields, bytes] by `field_groups`
    operands: Callable[[Tensor, int], list[Tensor]]
    # (codes [..., R, bytes] uint8, operands of x [..., M, n], bits) -> x @ codes.T, [..., M, R]
    product: Callable[[Tensor, list[Tensor], int], Tensor]


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
    zero = scale * (offset - center(config.key_bits))
    bias = (q.unsqueeze(-3) * zero.unsqueeze(-2)).sum(-1, keepdim=True)  # [..., n, M, 1]
    # Permuted before they are multiplied: the product has M times as many elements as the scales.
    folded = [
        a.unsqueeze(-4) * b.unsqueeze(-3)  # [..., n, M, fields, bytes]
        for a, b in zip(
            dot.operands(q, config.key_bits), field_groups(scale, config.key_bits), strict=True
        )
    ]
    scores = dot.product(tiles.k_codes, folded, config.key_bits) + bias
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
    operands = dot.operands(folded, config.value_bits)
    out = dot.product(tiles.v_codes, operands, config.value_bits) + bias  # [..., H, n, M, D]
    return (out * tiles.v_channel_scale.float().unsqueeze(-2)).sum(-3)


def _product_by_matmul(codes: Tensor, operands: list[Tensor], bits: int) -> Tensor:
    total = None
    for members, group in _fields_of(codes, operands, bits):
        for field, part in zip(members, group.unbind(-2), strict=True):
            unit = field.weight * 2.0**-field.shift
            product = (part * unit if unit != 1 else part) @ _field_values(codes, field).mT
            total = product if total is None else total.add_(product)
    assert total is not None
    return total


def _operands_by_unit(x: Tensor, bits: int) -> list[Tensor]:
    n, low_bits = x.shape[-1], 2 if bits == 3 else bits
    plane = torch.arange(n, device=x.device) // (n * low_bits // 16)
    shifts = [plane % (8 // low_bits) * low_bits]
    if bits == 3:
        shifts.append(plane - 2)  # the high bits: one plane each, and they count 4
    # Scaled before they are permuted, which is a loop of its own in any case.
    scaled = [x * materialized(torch.exp2(-shift.float())) for shift in shifts]
    return [field_groups(y, bits)[index] for index, y in enumerate(scaled)]


def _product_unrolled(codes: Tensor, operands: list[Tensor], bits: int) -> Tensor:
    groups = [
        [
            (_field_values(codes, field).unsqueeze(-3), group[..., i, :])
            for i, field in enumerate(members)
        ]
        for members, group in _fields_of(codes, [materialized(x) for x in operands], bits)
    ]
    columns = []
    for m in range(operands[0].shape[-3]):
        column = None
        for group in groups:
            total = None
            for values, operand in group:
                vector = operand[..., m : m + 1, None, :]
                if total is None:
                    total = values * vector
                else:
                    total = fused_multiply_add(values, vector, total)
            assert total is not None
            part = total.sum(-1)  # with 3 bits the groups' rows differ in length
            column = part if column is None else column + part
        assert column is not None
        columns.append(column)
    # Each sum [..., 1, R] is written straight into its rows of the result.
    return torch.cat(columns, dim=-2)


# One matrix product per bit field: the eager form.
dot_matmul = Dot(field_groups, _product_by_matmul)
# Multiply and sum, unrolled over the M vectors: Inductor merges the loops of the M reductions, so
# that each byte is unpacked once. A matrix product would be an external kernel, for which Inductor
# first writes the codes out.
dot_unrolled = Dot(_operands_by_unit, _product_unrolled)


def _fields_of(
    codes: Tensor, operands: list[Tensor], bits: int
) -> Iterator[tuple[list[Field], Tensor]]:
    """Each group of operands with its fields."""
    row = iter(fields(bits, codes.shape[-1] * 8 // bits))
    for group in operands:
        yield [next(row) for _ in range(group.shape[-2])], group


def _field_values(codes: Tensor, field: Field) -> Tensor:
    """A field's bits at their place in the byte, fp32."""
    part, mask = codes[..., field.start : field.stop], field.mask << field.shift
    return (part & mask if mask < 255 else part).float()


def materialized(x: Tensor) -> Tensor:
    """Force Inductor to write `x` to memory; inlined, it would be recomputed for every code."""
    x = x.contiguous()
    return torch.as_strided(x, x.shape, x.stride())
