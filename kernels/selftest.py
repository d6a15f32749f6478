"""Whether a device multiplies codes as they are: fp16 subnormals, exactly."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _product_kernel(codes_ptr, x_ptr, out_ptr, N: tl.constexpr):
    place = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    codes = tl.load(codes_ptr + place).to(tl.float16, bitcast=True)
    tl.store(out_ptr + place, tl.dot(codes, tl.load(x_ptr + place)))


def multiplies_codes(device: torch.device) -> bool:
    """Multiply a matrix of codes at every bit position used with small integers.

    AMD's MI200 flushes subnormals to zero in its matrix units; the answer there is False.
    """
    n = 16
    codes = torch.arange(n * n, device=device).reshape(n, n)
    codes = (codes % 16) << (codes // 16 % 5)
    x = torch.arange(n * n, device=device).reshape(n, n) % 7 - 3
    out = torch.full((n, n), float("nan"), device=device)
    _product_kernel[(1,)](codes.to(torch.int16), x.half(), out, N=n)
    wanted = codes.double() @ x.double() * 2.0**-24
    return bool((out.double() == wanted).all())
