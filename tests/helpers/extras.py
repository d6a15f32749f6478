"""What some tests of exports need, and skip without."""

from __future__ import annotations

import pytest
import torch

from kvarn_ops.versions import release

PACKAGES = release(torch.__version__) >= (2, 13)
needs_packages = pytest.mark.skipif(not PACKAGES, reason="packages need torch 2.13")


def need_onnx() -> None:
    """Skip where the extra `onnx` is not installed."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="extra 'onnx'")
