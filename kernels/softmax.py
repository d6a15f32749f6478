"""What all partial softmaxes share; scores are kept in units of log 2."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def softcapped(scores, softcap):
    """`softcap * tanh(scores / softcap)`."""
    return softcap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2E / softcap)) + 1.0))


@triton.jit
def raised(peak, highest, MAY_BE_EMPTY: tl.constexpr):
    """The new peak, what exponents are relative to, and the factor for what came before.

    `MAY_BE_EMPTY`: all scores so far may be -inf, of which differences would be NaN.
    """
    peak_new = tl.maximum(peak, highest)
    base = tl.where(peak_new == -float("inf"), 0.0, peak_new) if MAY_BE_EMPTY else peak_new
    return peak_new, base, tl.exp2(peak - base)
