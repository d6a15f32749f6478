"""Whether a device multiplies codes as they are: fp16 subnormals, exactly."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_SHAPES = ((8, 2), (16, 4), (32, 8))  # query rows and warps of the kernels: other instructions


@triton.jit
def _product_kernel(codes_ptr, x_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr):
    row = tl.arange(0, M)[:, None]
    inner, column = tl.arange(0, M), tl.arange(0, N)[None, :]
    codes = tl.load(codes_ptr + row * M + inner[None, :]).to(tl.float16, bitcast=True)
    x = tl.load(x_ptr + inner[:, None] * N + column)
    tl.store(out_ptr + row * N + column, tl.dot(codes, x))


def multiplies_codes(device: torch.device) -> bool:
    """Multiply a matrix of codes at every bit position used with small integers.

    AMD's MI200 flushes subnormals to zero in its matrix units; the answer there is False.
    """
    m = 128
    codes = torch.arange(m * m, device=device).reshape(m, m)
    codes = (codes % 16) << (codes // 16 % 5)
    for n, warps in _SHAPES:
        x = torch.arange(m * n, device=device).reshape(m, n) % 7 - 3
        out = torch.full((m, n), float("nan"), device=device)
        _product_kernel[(1,)](codes.to(torch.int16), x.half(), out, M=m, N=n, num_warps=warps)
        if not bool((out.double() == codes.double() @ x.double() * 2.0**-24).all()):
            return False
    return True
