"""KVarN KV-cache quantization for PyTorch: custom ops, compiler passes and export paths.

Importing this package registers ``torch.ops.kvarn.*`` and needs torch only. Names that need more
(transformers, Triton) are imported when they are first used.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "CacheCropError",
    "CacheError",
    "ConfigError",
    "InputError",
    "KVCache",
    "KVarNCache",
    "KVarNConfig",
    "KVarNError",
    "UnsupportedModelError",
    "__version__",
    "explain",
    "fake_quantize",
    "patch",
    "patched",
    "sample_inputs",
    "supported_models",
    "unpatch",
]

# Every lazily imported public name: package -> name -> submodule that defines it. A submodule never
# has the name of something public: importing it would put the module where the function should be.
_LAZY: dict[str, dict[str, str]] = {
    "kvarn_ops": {
        "KVCache": "kv_cache",
        "KVarNCache": "hf.cache",
        "explain": "patching",
        "fake_quantize": "reference.fake",
        "patch": "patching",
        "patched": "patching",
        "sample_inputs": "ops.samples",
        "supported_models": "patching",
        "unpatch": "patching",
    },
    "kvarn_ops.kernels": {},
    "kvarn_ops.lowering": {
        "explain_rewrite": "rewrite_report",
        "inductor_options": "hooks",
        "rewrite_kv_cache": "rewrite_program",
    },
    "kvarn_ops.export": {
        "aot_compile": "aoti",
        "Comparison": "comparison",
        "compare": "comparison",
        "export_program": "program",
        "load_engine": "tensorrt",
        "save_engine": "tensorrt",
        "save_program": "program",
        "to_onnx": "onnx_model",
        "to_tensorrt": "tensorrt",
    },
}


def _lazy_getattr(package: str) -> Callable[[str], Any]:
    """Return a module ``__getattr__`` that imports the public names of `package` on first use."""
    table = _LAZY[package]

    def __getattr__(name: str) -> Any:
        # First, and as AttributeError: pickle (hence Inductor's cache) asks every loaded module for
        # names that are not ours.
        if name not in table:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if package.endswith(".kernels"):
            _require_triton()
        try:
            value = getattr(importlib.import_module(f"{package}.{table[name]}"), name)
        except ModuleNotFoundError as error:
            from kvarn_ops.env import missing_package_message

            message = missing_package_message(error.name, needed_by=f"{package}.{name}")
            if message is None:
                raise
            raise ImportError(message, name=error.name) from error
        setattr(sys.modules[package], name, value)
        return value

    return __getattr__


def _require_triton() -> None:
    from kvarn_ops.env import is_installed

    if not is_installed("triton"):
        raise BackendError(
            "kvarn_ops.kernels needs Triton, which is not installed: CUDA and ROCm builds of torch "
            "bring it, elsewhere install `triton`, or use backend='aten', which needs none."
        )


def _find_root_folders() -> None:
    """Make kernels/, lowering/ and export/ subpackages, with their public names loaded lazily.

    In a wheel they lie inside this folder, in a checkout (editable installs included) beside it.
    They have no ``__init__.py``, so that no top-level package `kernels` can appear; the modules
    made here from a path search are what ``import kvarn_ops.kernels`` finds.
    """
    here = Path(__file__).resolve().parent
    for package, table in _LAZY.items():
        name = package.rpartition(".")[2]
        if package == __name__:
            continue
        parent = next((path for path in (here, here.parent) if (path / name).is_dir()), None)
        spec = PathFinder.find_spec(package, [str(parent)]) if parent else None
        if spec is None:
            continue
        module = importlib.util.module_from_spec(spec)
        module.__dict__["__getattr__"] = _lazy_getattr(package)
        module.__dict__["__all__"] = sorted(table)
        sys.modules[package] = globals()[name] = module


_find_root_folders()
__getattr__ = _lazy_getattr(__name__)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Below, because the modules imported here may use the subpackages made above.
from kvarn_ops import ops as _ops  # noqa: E402, F401
from kvarn_ops.config import KVarNConfig  # noqa: E402
from kvarn_ops.errors import (  # noqa: E402
    BackendError,
    CacheCropError,
    CacheError,
    ConfigError,
    InputError,
    KVarNError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from kvarn_ops.hf.cache import KVarNCache
    from kvarn_ops.kv_cache import KVCache
    from kvarn_ops.ops.samples import sample_inputs
    from kvarn_ops.patching import explain, patch, patched, supported_models, unpatch
    from kvarn_ops.reference.fake import fake_quantize
