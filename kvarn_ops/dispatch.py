"""Which implementation runs. Decided once, at patch time; ops carry the answer as an argument."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from .errors import BackendError

__all__ = ["BACKENDS", "attend", "resolve"]

BACKENDS = ("auto", "reference", "aten", "triton")

_logger = logging.getLogger("kvarn_ops")


def resolve(backend: str, device: torch.device | str) -> str:
    """Turn a backend name into the one that will run on `device`.

    Raises
    ------
    BackendError
        If the name is unknown, or the backend cannot run on this device.
    """
    if backend not in BACKENDS:
        raise BackendError(f"backend={backend!r} does not exist: choose one of {BACKENDS}.")
    kind = torch.device(device).type
    if backend == "triton":
        if kind != "cuda":
            raise BackendError(
                f'backend="triton" needs a CUDA or ROCm device and the model is on {kind}: use '
                'backend="aten", or "auto" to let the package choose.'
            )
        raise BackendError(
            'backend="triton" has no kernels in this version: use backend="aten" or "auto".'
        )
    if backend != "auto":
        return backend
    _log_choice(kind)
    return "aten"


@lru_cache(maxsize=8)
def _log_choice(kind: str) -> None:
    if kind == "cpu":
        _logger.info('backend "auto" chose "aten": Inductor fuses it on CPU.')
    else:
        _logger.warning(
            'backend "auto" chose "aten" on %s: there are no Triton kernels in this version, so '
            "the cache is smaller than a dense one but decoding may be slower.",
            kind,
        )


def attend(backend: str) -> Callable[..., Tensor]:
    """The eager attention of a resolved backend; see `kvarn_ops.reference.attention.attend`."""
    if backend == "reference":
        from .reference import attention

        return attention.attend
    if backend == "aten":
        from .ops import attend as aten

        return aten.attend
    raise BackendError(f"{backend!r} is not a resolved backend.")
