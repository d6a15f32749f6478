"""Load a PTX text and launch its kernel through CUDA's driver, as an engine does: no Triton."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor


class Loaded:
    """A kernel on the current device."""

    def __init__(self, ptx: str, name: str) -> None:
        torch.cuda.synchronize()  # makes the context of the device the current one
        self.driver = ctypes.CDLL("libcuda.so.1")
        self.module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(self.module), ptx.encode() + b"\0")
        self._call("cuModuleGetFunction", ctypes.byref(self.function), self.module, name.encode())

    def _call(self, name: str, *args: object) -> None:
        status = getattr(self.driver, name)(*args)
        if status:
            text = ctypes.c_char_p()
            self.driver.cuGetErrorString(status, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'unknown').decode()} ({status})")

    def launch(
        self, grid: tuple[int, int, int], threads: int, shared: int, args: Sequence[Tensor | int]
    ) -> None:
        """Pointers of tensors and 32-bit integers, in this order, and nothing else."""
        values = [
            ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else ctypes.c_int32(x)
            for x in args
        ]
        places = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self._call(
            "cuLaunchKernel", self.function, *grid, threads, 1, 1, shared, stream, places, None
        )
        torch.cuda.synchronize()
