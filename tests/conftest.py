"""What every test gets: poisoned fresh memory, fixed seeds, few threads, its own compile cache.

Markers `gpu`, `tensorrt` and `transformers` skip by themselves, with the reason, where they cannot
run.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

# Both before torch is imported. OpenMP threads that wait sleep: by default they spin, and two test
# runs on two cores then take ten times as long as one.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# One Inductor cache per checkout, kept between runs (a warm cache saves
# minutes) and away from the user's own. Tests that need a cold or a shared one set their own.
_ROOT = Path(__file__).resolve().parents[1]
_USER = getattr(os, "getuid", int)()  # by number: a container may have no name for it
_KEY = hashlib.sha256(f"{_USER}:{_ROOT}".encode()).hexdigest()[:12]
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"kvarn_ops_tests_{_KEY}")
)

import pytest  # noqa: E402
import torch  # noqa: E402

# Kernels run on the GPU where there is one, in Triton's interpreter elsewhere. Triton reads it when
# it is imported, for its own functions too, and tests of torch.compile import Triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

_FOLDERS_THAT_COMPILE = {"compile", "lowering", "export"}
_GPU_POISON_BYTES = 1 << 30


def _set_malloc_fill(fill: bool) -> bool:
    """Let glibc fill fresh allocations with 0xFF: NaN in each float dtype, 255 or -1 in others.

    In malloc rather than by patching `torch.empty`: it reaches allocations made in C++, by ATen and
    by code that Inductor generated, and it changes no traced graph. (Torch's own
    `fill_uninitialized_memory` acts only with deterministic algorithms on, which changes what
    Inductor generates.)
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    m_perturb = -6
    # glibc fills with the complement of the low byte, and only if the whole value is not 0.
    return mallopt(m_perturb, 0x100 if fill else 0) == 1


def _fresh_memory_is_poisoned() -> bool:
    # Of a size that malloc maps anew, so that no recycled block answers.
    return bool(torch.empty(1 << 20).isnan().all())


_POISONED = _set_malloc_fill(True) and _fresh_memory_is_poisoned()


@cache
def _tensorrt_unavailable() -> str:
    """Return why torch_tensorrt cannot run. (`importorskip` does not do: no ImportError.)"""
    from kvarn_ops.export.tensorrt_support import unavailable

    return unavailable()


def pytest_configure(config: pytest.Config) -> None:
    # xdist workers share the cores: with two threads each they would stand in each other's way.
    torch.set_num_threads(1 if hasattr(config, "workerinput") else 2)


def pytest_report_header() -> list[str]:
    poison = "filled with 0xFF" if _POISONED else "NOT poisoned (needs glibc)"
    return [
        f"torch {torch.__version__}, cuda {torch.version.cuda}, fresh memory {poison}",
        f"inductor cache: {os.environ['TORCHINDUCTOR_CACHE_DIR']}",
    ]


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for marker in item.iter_markers("transformers"):
            needed, why = marker.args
            found = metadata.version("transformers")
            if _version(found) < _version(needed):
                reason = f"transformers {found} is older than {needed}: {why}"
                item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("tensorrt") and _tensorrt_unavailable():
            item.add_marker(pytest.mark.skip(reason=_tensorrt_unavailable()))


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


@pytest.fixture(autouse=True)
def _poison_gpu_memory(request: pytest.FixtureRequest) -> None:
    """Before a GPU test, leave a large freed block full of 0xFF in the caching allocator's pool."""
    if request.node.get_closest_marker("gpu") and torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.full((_GPU_POISON_BYTES,), 0xFF, dtype=torch.uint8, device="cuda")


@pytest.fixture(autouse=True)
def _reset_after_compile_folders(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if request.path.parent.name in _FOLDERS_THAT_COMPILE:
        torch.compiler.reset()


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """No compiled code and no recompile counts from earlier tests; none left for later ones."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def unpoisoned() -> Iterator[None]:
    """Plain malloc, for tests that measure time or memory of the process."""
    _set_malloc_fill(False)
    yield
    _set_malloc_fill(_POISONED)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The root of the checkout."""
    return _ROOT


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiles are small: a second thread only waits, and badly on a machine with other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
