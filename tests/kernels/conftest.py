"""Kernels run on the GPU where there is one, in Triton's interpreter elsewhere."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read when a kernel is defined, hence before anything imports kvarn_ops.kernels.
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton", reason="Triton is not installed (extra 'dev', Linux)")

import kvarn_ops.kernels.launch  # noqa: F401  (while the variable is as it should be)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
