"""Where kernels run; `tests/conftest.py` decides between the GPU and Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (extra 'dev', Linux)")

import kvarn_ops.kernels.launch  # noqa: F401  (while the variable is as it should be)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
