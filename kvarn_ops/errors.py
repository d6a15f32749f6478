"""The exception types of the package. Every message says what happened, why, and what to do."""

from __future__ import annotations

__all__ = [
    "BackendError",
    "CacheCropError",
    "CacheError",
    "ConfigError",
    "InputError",
    "KVarNError",
    "UnsupportedModelError",
    "reason",
]


class KVarNError(Exception):
    """Base class: catch this to catch everything that `kvarn_ops` raises on purpose."""


class ConfigError(KVarNError, ValueError):
    """A preset name or a field of `KVarNConfig` is not valid."""


class InputError(KVarNError, ValueError):
    """A tensor has a shape, dtype, device or value that the called function does not accept."""


class UnsupportedModelError(KVarNError, TypeError):
    """A model, or one of its attention layers, cannot be patched."""


class CacheError(KVarNError, RuntimeError):
    """A cache is too small, belongs to another model, or is used in a way it cannot serve."""


class CacheCropError(CacheError):
    """More tokens were to be removed than `tail_tokens` keeps in full precision."""


class BackendError(KVarNError, RuntimeError):
    """The named backend cannot run here."""


def reason(error: BaseException, lines: int = 1) -> str:
    """What an error of another package says, in the first `lines` lines that are not empty."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(said[:lines]) or type(error).__name__
