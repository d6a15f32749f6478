"""A GPU that is not there, for scripts that compile for it and run nothing on it.

Inductor and Triton ask a device for its properties and would tune and load kernels on it. `pretend`
answers the questions, and kernels are compiled without being tuned or loaded. For a process of its
own that sees no real GPU (`CUDA_VISIBLE_DEVICES` empty), since nothing is undone.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch.utils import cpp_extension
from triton.backends.compiler import GPUTarget

_H200 = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
    max_threads_per_block=1024, shared_memory_per_block_optin=232448, total_memory=141 << 30,
    gcnArchName="",
)  # fmt: skip

# Views of a tensor switch to its device, even of one without memory.
_GUARD = """
#include <c10/core/impl/FakeGuardImpl.h>
namespace { C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>); }
"""


class TargetOnly:
    """A driver of Triton that knows what it would compile for, and loads nothing."""

    utils = SimpleNamespace(
        load_binary=lambda *_: (1, 1, 0, 0, _H200.max_threads_per_block),
        get_device_properties=lambda _: {"max_shared_mem": _H200.shared_memory_per_block_optin},
    )

    @staticmethod
    def launcher_cls(*_: Any) -> None:
        """Triton's launcher would load a library of CUDA."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


def pretend() -> None:
    """Let this process compile for an H200."""
    triton.runtime.driver.set_active(TargetOnly())
    triton_helpers.set_driver_to_gpu = lambda: None
    torch.cuda.get_device_properties = lambda device=None: _H200
    torch.cuda.get_device_capability = lambda device=None: (_H200.major, _H200.minor)
    torch.cuda.current_device = lambda: 0
    torch.cuda.device_count = lambda: 1
    CudaInterface.get_device_properties = staticmethod(torch.cuda.get_device_properties)
    for name in ("is_available", "is_bf16_supported"):
        setattr(CudaInterface, name, staticmethod(lambda *_, **__: True))
    for name in ("current_device", "exchange_device", "maybe_exchange_device"):
        setattr(CudaInterface, name, staticmethod(lambda *_: 0))
    cpp_extension.CUDA_HOME = cpp_extension.CUDA_HOME or "/nonexistent"  # only named in commands
    PythonWrapperCodegen.generate_and_run_autotune_block = _compile_kernels
    if not torch.cuda._is_compiled():
        _register_guard()


def _register_guard() -> None:
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(_GUARD)
        subprocess.run(
            [get_cpp_compiler(), "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder}/include",
             str(source), "-o", str(library), f"-L{torch_folder}/lib", "-lc10"],
            check=True,
        )  # fmt: skip
        ctypes.CDLL(str(library))


def _compile_kernels(wrapper: Any) -> None:
    """In place of the block that runs kernels to tune them: keep what is compiled."""
    scope: dict[str, Any] = {}
    exec(wrapper.kernel_autotune_defs.getvalue() + "\nasync_compile.wait(globals())", scope)
    for kernel in scope.values():
        if isinstance(kernel, CachingAutotuner):
            kernel.save_gpu_kernel(0, kernel.launchers[0])
