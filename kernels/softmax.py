"""What all partial softmaxes share; scores are kept in units of log 2."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def softcapped(scores, softcap):
    """`softcap * tanh(scores / softcap)`."""
    return softcap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2E / softcap)) + 1.0))
