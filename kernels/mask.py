"""A mask of the caller: which tokens a query row sees, or what is added to its scores."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .softmax import LOG2E


class MaskView(NamedTuple):
    """How kernels address a mask `[B or 1, H_q or 1, S or 1, T]`: nothing is expanded or copied."""

    data: Tensor | None
    kind: int  # `MASK`
    columns: int
    strides: tuple[int, int, int]  # of row, head and query
    step: int  # from column to column

    @classmethod
    def of(cls, mask: Tensor | None) -> MaskView:
        """Of a mask, or of none."""
        if mask is None:
            return cls(None, 0, 0, (0, 0, 0), 1)
        row, head, query, step = (
            0 if size == 1 else stride
            for size, stride in zip(mask.shape, mask.stride(), strict=True)
        )
        columns = mask.shape[3]
        kind, data = 2, mask
        if mask.dtype == torch.bool:
            kind, data = 1, mask.view(torch.uint8)
        # A single column has any step, and kernels are specialized on 1.
        return cls(data, kind, columns, (row, head, query), step if columns > 1 else 1)


@triton.jit
def load_mask(mask_ptr, row_offset, position, held, columns, step, MASK: tl.constexpr):
    """`[T, rows]` of the mask's `columns` at `position` `[T]`: bool, or fp32.

    Row r begins at `row_offset[r]` int64, or all do at one offset; a token that is not `held`, or
    lies beyond the columns, is not seen. `MASK`: 1 for bool, 2 for float.
    """
    place = row_offset[None, :] + (position.to(tl.int64) * step)[:, None]
    inside = (held & (position < columns))[:, None]
    if MASK == 1:
        mask = tl.load(mask_ptr + place, mask=inside, other=0) != 0
    else:
        mask = tl.load(mask_ptr + place, mask=inside, other=-float("inf")).to(tl.float32)
    return mask


@triton.jit
def masked(scores, mask, MASK: tl.constexpr):
    """Scores `[T, rows]`, in units of log 2 if `MASK` is 2, with what `load_mask` gave."""
    if MASK == 1:
        scores = tl.where(mask, scores, -float("inf"))
    elif MASK == 2:
        # The smallest finite number, which masks of models use, must not become -inf in units of
        # log 2: a row of nothing else is an average.
        lowered = scores + mask * LOG2E
        lowered = tl.maximum(lowered, -3e38, propagate_nan=tl.PropagateNan.ALL)
        scores = tl.where(mask == -float("inf"), mask, lowered)
    return scores
