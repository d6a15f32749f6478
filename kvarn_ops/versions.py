"""Which releases of torch and transformers were tested, and what is said about others.

`make versions` runs the tests under them; tests/core/test_versions.py compares the bounds here with
its results and with pyproject.toml.
"""

from __future__ import annotations

import logging
import re
from functools import cache
from importlib import metadata

import torch

from .errors import UnsupportedModelError

__all__ = ["check_versions", "release"]

_logger = logging.getLogger("kvarn_ops")

TESTED_TORCH = ((2, 11), (2, 13))
TESTED_TRANSFORMERS = ((5, 17), (5, 23))
# From here on dense decoder models work; hybrids and assisted generation do not.
OLDEST_TRANSFORMERS = (4, 57)


@cache
def check_versions(uses_transformers: bool = True) -> None:
    """Refuse transformers that are too old; say, once in a process, what was never tried.

    Newer releases than the tested ones are used, never refused.

    Raises
    ------
    UnsupportedModelError
        If transformers lacks what a patched model needs.
    """
    torch_version, transformers = _installed()
    _mention_newer("torch", torch_version, *TESTED_TORCH)
    if transformers is None or not uses_transformers:
        return
    if release(transformers) < OLDEST_TRANSFORMERS:
        raise UnsupportedModelError(
            f"transformers {transformers} is older than {_text(OLDEST_TRANSFORMERS)}, the first "
            "with the caches and masks that patched models use: install kvarn-ops[hf], which "
            f"brings {_text(TESTED_TRANSFORMERS[0])} or newer."
        )
    if release(transformers) < TESTED_TRANSFORMERS[0]:
        _logger.warning(
            "transformers %s is older than %s: plain decoder models work, hybrid models and "
            "assisted generation do not, and less is tested. (This is said once.)",
            transformers,
            _text(TESTED_TRANSFORMERS[0]),
        )
    _mention_newer("transformers", transformers, *TESTED_TRANSFORMERS)


def _installed() -> tuple[str, str | None]:
    try:
        return str(torch.__version__), metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return str(torch.__version__), None


def _mention_newer(
    name: str, version: str, lowest: tuple[int, int], highest: tuple[int, int]
) -> None:
    if release(version) > highest:
        _logger.warning(
            "%s %s is newer than those that this version of kvarn_ops was tested with (%s to %s): "
            "`kvarn-ops verify` compares the ops with their reference. (This is said once.)",
            name,
            version,
            _text(lowest),
            _text(highest),
        )


def release(version: str) -> tuple[int, int]:
    """The first two numbers, whatever follows: 2.14.0a0+git12ab is (2, 14)."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _text(number: tuple[int, int]) -> str:
    return ".".join(map(str, number))
