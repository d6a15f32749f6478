"""Whether Torch-TensorRT can be used here, found out without importing it where that must fail."""

from __future__ import annotations

import importlib
import importlib.util
from importlib import metadata

import torch

from kvarn_ops.errors import BackendError, reason
from kvarn_ops.versions import release

__all__ = ["check_available", "unavailable"]

# The release whose sources this was written against, with TensorRT 11. Older ones use TensorRT 10.
_OLDEST = (2, 13)
_INSTALL = "pip install 'kvarn-ops[tensorrt]' in an environment with a CUDA build of torch"


def unavailable() -> str:
    """Why Torch-TensorRT cannot be used here, with the remedy; empty if it can.

    Importing it fails without a GPU and with CPU builds of torch, with errors of several kinds
    that do not say so.
    """
    if importlib.util.find_spec("torch_tensorrt") is None:
        return f"torch_tensorrt is not installed: {_INSTALL}"
    try:
        found = metadata.version("torch-tensorrt")
    except metadata.PackageNotFoundError:
        return f"torch_tensorrt was not installed as a package: {_INSTALL}"
    if release(found) != release(torch.__version__):
        return (
            f"torch-tensorrt {found} does not fit torch {torch.__version__}: install releases of "
            "the same number, of which pip makes sure if both are given to it at once"
        )
    if release(found) < _OLDEST:
        return (
            f"torch-tensorrt {found} is older than {'.'.join(map(str, _OLDEST))}, which this was "
            "written for: install a newer one together with its torch"
        )
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is not a CUDA build, which torch_tensorrt needs: install "
            "torch from the index of CUDA wheels"
        )
    if not torch.cuda.is_available():
        return "there is no CUDA device, without which torch_tensorrt cannot even be imported"
    try:
        importlib.import_module("torch_tensorrt")
    except Exception as error:  # a bare Exception if TensorRT's libraries are missing
        return (
            f"torch_tensorrt cannot be imported ({reason(error)}): TensorRT's libraries come from "
            "NVIDIA's own package index, reinstall with that index reachable"
        )
    return ""


def check_available() -> None:
    """Raise `BackendError` if Torch-TensorRT cannot be used here."""
    why = unavailable()
    if why:
        raise BackendError(f"to_tensorrt cannot run here: {why}.")
