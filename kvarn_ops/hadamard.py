"""Orthonormal Hadamard matrices: the rotation that spreads outlier channels over head_dim.

Powers of two use Sylvester's construction; other sizes are a Paley matrix of order 12, 20, 28 or
36 (Kronecker) Sylvester, which covers the head_dims of current models up to 576.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import InputError

__all__ = ["MAX_HEAD_DIM", "MIN_HEAD_DIM", "check_head_dim", "hadamard", "has_construction"]

MIN_HEAD_DIM, MAX_HEAD_DIM = 32, 576
_PALEY_ORDERS = (12, 20, 28, 36)
_HOST: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}


def has_construction(n: int) -> bool:
    """Whether a Hadamard matrix of order `n` is built here."""
    return _factor(n) is not None


def check_head_dim(head_dim: int, rotated: bool = True) -> None:
    """Raise `InputError` if tiles of this width cannot be packed or rotated."""
    if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM or head_dim % 16:
        raise InputError(
            f"head_dim={head_dim} is not supported: it has to be a multiple of 16 between "
            f"{MIN_HEAD_DIM} and {MAX_HEAD_DIM}, because codes are packed into 16-bit words."
        )
    if rotated and not has_construction(head_dim):
        raise InputError(
            f"head_dim={head_dim} has no Hadamard construction here (powers of two, and 12, 20, 28 "
            "or 36 times a power of two, have one). Pass rotate_keys=False, rotate_values=False to "
            "quantize without rotation, at lower accuracy."
        )


def hadamard(
    n: int, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Tensor:
    """Orthonormal matrix `H` `[n, n]`: rotate with `x @ H`, rotate back with `x @ H.T`."""
    if not has_construction(n):
        check_head_dim(n)
        raise InputError(f"no Hadamard matrix of order {n} is constructed here.")
    return (_signs(n) / n**0.5).to(device=device, dtype=dtype)


def _factor(n: int) -> tuple[int, int] | None:
    """`n = base * 2**k` as `(base, 2**k)` with base 1 or a Paley order, else None."""
    if n < 1:
        return None
    for base in (1, *_PALEY_ORDERS):
        rest, remainder = divmod(n, base)
        if remainder == 0 and rest & (rest - 1) == 0:
            return base, rest
    return None


def _signs(n: int) -> Tensor:
    # Not cached, and on an explicit device: a model may be built under a default device or a fake
    # tensor mode, and a tensor kept from there would break every later use.
    factor = _factor(n)
    assert factor is not None
    base, power = factor
    sylvester = torch.ones(1, 1, **_HOST)
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], **_HOST)
    while sylvester.shape[0] < power:
        sylvester = torch.kron(step, sylvester)
    return torch.kron(_paley(base), sylvester) if base > 1 else sylvester


def _paley(order: int) -> Tensor:
    """Hadamard matrix of signs by Paley's constructions over GF(p), p prime."""
    if order in (12, 20):  # construction I: p = order - 1 = 3 (mod 4)
        p = order - 1
        jacobsthal = _jacobsthal(p)
        skew = torch.zeros(order, order, **_HOST)
        skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, jacobsthal
        return skew + torch.eye(order, **_HOST)
    p = order // 2 - 1  # construction II: p = 1 (mod 4)
    jacobsthal = _jacobsthal(p)
    symmetric = torch.zeros(p + 1, p + 1, **_HOST)
    symmetric[0, 1:], symmetric[1:, 0], symmetric[1:, 1:] = 1, 1, jacobsthal
    eye = torch.eye(p + 1, **_HOST)
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], **_HOST)
    minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], **_HOST)
    return torch.kron(symmetric, plus) + torch.kron(eye, minus)


def _jacobsthal(p: int) -> Tensor:
    """`Q[i, j]` = quadratic character of `i - j` modulo the prime `p`."""
    squares = {x * x % p for x in range(1, p)}
    character = [0.0] + [1.0 if x in squares else -1.0 for x in range(1, p)]
    return torch.tensor([[character[(i - j) % p] for j in range(p)] for i in range(p)], **_HOST)
