"""Numbers that compare a run with the dense run, and their standard errors."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Errors",
    "Mean",
    "compare_logits",
    "kl_divergence",
    "mean_of_rows",
    "proportion",
    "split_error",
]

_ELEMENTS_AT_ONCE = 1 << 26  # of logits: a large vocabulary makes long prefills exceed memory


def compare_logits(dense: Tensor, other: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Compare logits `[B, s, V]` for the next tokens `targets` `[B, s]`.

    Returns
    -------
    dict of str to Tensor
        `[B, s]` fp32: `kl` (nats, of dense from the other), `delta_loss` (nats, other minus dense),
        `agreement` (1 where the most likely tokens are the same), `accuracy` (1 where the other's
        most likely token is the target).
    """
    step = max(1, _ELEMENTS_AT_ONCE // (dense.shape[0] * dense.shape[-1]))
    if dense.shape[1] > step:
        parts = [
            compare_logits(*(x[:, i : i + step] for x in (dense, other, targets)))
            for i in range(0, dense.shape[1], step)
        ]
        return {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
    log_p, log_q = dense.float().log_softmax(-1), other.float().log_softmax(-1)
    at = targets.unsqueeze(-1)
    best = log_q.argmax(-1)
    return {
        "kl": _kl(log_p, log_q),
        "delta_loss": (log_p.gather(-1, at) - log_q.gather(-1, at)).squeeze(-1),
        "agreement": (best == log_p.argmax(-1)).float(),
        "accuracy": (best == targets).float(),
    }


def kl_divergence(dense: Tensor, other: Tensor) -> Tensor:
    """`[...]` nats: how far the distribution of logits `other` `[..., V]` is from the dense one."""
    return _kl(dense.float().log_softmax(-1), other.float().log_softmax(-1))


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


class Errors(NamedTuple):
    """Squared error of vectors relative to their squared norm, split in two; each `[...]`."""

    magnitude: Tensor
    direction: Tensor


def split_error(dense: Tensor, other: Tensor) -> Errors:
    """Split the error of vectors `[..., D]` into magnitude and direction.

    With x the dense vector, y the other and t the angle between them,
    `|x - y|^2 = (|x| - |y|)^2 + 2 |x| |y| (1 - cos t)`: the first term is a wrong scale, the second
    a wrong direction (the split of equation 3 of arXiv 2606.03458). Both are divided by `|x|^2`.
    """
    x, y = dense.float(), other.float()
    x_norm, y_norm = x.norm(dim=-1), y.norm(dim=-1)
    whole = (x - y).square().sum(-1)
    magnitude = (x_norm - y_norm).square()
    scale = x_norm.square().clamp_min(1e-12)
    return Errors(magnitude / scale, (whole - magnitude).clamp_min(0) / scale)


class Mean(NamedTuple):
    """A mean and its standard error (NaN where one observation says nothing about it)."""

    value: float
    error: float


def mean_of_rows(values: Tensor) -> Mean:
    """Mean of `[rows, positions]`; rows are independent, positions of a row are not."""
    rows = values.double().mean(-1)
    error = rows.std().item() / math.sqrt(len(rows)) if len(rows) > 1 else math.nan
    return Mean(rows.mean().item(), error)


def proportion(hits: Tensor) -> Mean:
    """Share of `[n]` independent trials that succeeded.

    The error is that of a binomial with one success and one failure added, so that 64 of 64 is not
    reported as certain.
    """
    count = hits.numel()
    share = hits.double().mean().item()
    shrunk = (hits.double().sum().item() + 1) / (count + 2)
    return Mean(share, math.sqrt(shrunk * (1 - shrunk) / (count + 2)))


def mean_of_means(parts: list[Mean]) -> Mean:
    """Mean over placements of outliers, all of which saw the same rows.

    The error has the spread between placements, and that of the rows, which is not made smaller by
    more placements.
    """
    values = torch.tensor([part.value for part in parts], dtype=torch.float64)
    rows = sum(part.error for part in parts) / len(parts)
    between = values.std().item() / math.sqrt(len(parts)) if len(parts) > 1 else math.nan
    return Mean(values.mean().item(), math.hypot(rows, between))
