"""Compile kernels for a GPU that is not there, and read what the compiler made of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

__all__ = ["TYPES", "Binary", "Launch", "Recorder", "compile_launch", "target_of"]

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
_OPTIONS = ("num_warps", "num_stages")
_MATRIX_INSTRUCTION = re.compile(r"^(HMMA|IMMA|QMMA|HGMMA|WGMMA|UTCHMMA)")


class Launch(NamedTuple):
    """One recorded kernel launch."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Binary(NamedTuple):
    """What a compiled kernel takes of a multiprocessor, per thread or block."""

    kernel: str
    arch: str
    warps: int
    registers: int
    spill_bytes: int  # of local memory, per thread
    shared_bytes: int
    loop_instructions: int | None  # of the loop over tiles, per thread; NVIDIA only


class Recorder:
    """Stands in for `run` of the launch functions: nothing runs, every launch is kept."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def __call__(self, kernel: Any) -> Any:
        """What the launch functions index with a grid and call."""
        recorder = self

        class _Recorded:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                def launch(*args: Any, **kwargs: Any) -> None:
                    recorder.launches.append(Launch(kernel, grid, args, kwargs))

                return launch

        return _Recorded()


def target_of(arch: str) -> GPUTarget:
    """`sm_90` or `gfx942` as Triton's target.

    Raises
    ------
    ValueError
        If the name is neither.
    """
    if re.fullmatch(r"sm_\d{2,3}", arch):
        return GPUTarget("cuda", int(arch[3:]), 32)
    if re.fullmatch(r"gfx\w{3,4}", arch):
        return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    raise ValueError(f"{arch!r} is not an architecture: give sm_80, sm_90, sm_100 or gfx942.")


def compile_launch(launch: Launch, arch: str) -> Binary:
    """Compile one launch with Triton's own compiler and assembler."""
    target = target_of(arch)
    kwargs = dict(launch.kwargs)
    options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, name in enumerate(launch.kernel.arg_names):
        if name in kwargs:
            signature[name], constants[index,] = "constexpr", kwargs[name]
            continue
        value = launch.args[index]
        if _is_one(launch.kernel, name, value):
            signature[name], constants[index,] = "constexpr", 1
            continue
        aligned = True
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
        elif isinstance(value, float):
            signature[name], aligned = "fp32", False
        else:
            signature[name] = "i32"
            aligned = value % 16 == 0 and value > 0
            aligned = aligned and name not in launch.kernel.do_not_specialize
        if aligned:
            attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes
    )
    compiled = triton.compile(source, target=target, options=options)
    read = _read_cubin if target.backend == "cuda" else _read_amdgcn
    registers, spill_bytes, loop = read(compiled)
    return Binary(
        launch.kernel.fn.__name__.removesuffix("_kernel"), arch, options.get("num_warps", 4),
        registers, spill_bytes, compiled.metadata.shared, loop,
    )  # fmt: skip


def _is_one(kernel: Any, name: str, value: Any) -> bool:
    """Whether Triton's launcher writes an argument into the binary, as it does with integers 1."""
    return type(value) is int and value == 1 and name not in kernel.do_not_specialize


def _read_cubin(compiled: Any) -> tuple[int, int, int | None]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run(
                [str(tool), option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("-res-usage", "-sass")
        )
    registers, stack = (
        int(re.search(rf"{name}:(\d+)", usage)[1])  # type: ignore[index]
        for name in ("REG", "STACK")
    )
    return registers, stack, _loop_instructions(sass)


def _read_amdgcn(compiled: Any) -> tuple[int, int, None]:
    text = compiled.asm["amdgcn"]
    registers, scratch = (
        int(re.search(rf"\.{name}:\s*(\d+)", text)[1])  # type: ignore[index]
        for name in ("vgpr_count", "private_segment_fixed_size")
    )
    return registers, scratch, None


def _loop_instructions(sass: str) -> int | None:
    """Instructions of the innermost loop that unpacks codes and multiplies matrices."""
    code = [
        (int(address, 16), text)
        for address, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass)
    ]
    position = {address: index for index, (address, _) in enumerate(code)}
    found: list[tuple[int, int]] = []
    for index, (address, text) in enumerate(code):
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        start = position.get(int(jump[1], 16)) if jump else None
        if jump is None or start is None or int(jump[1], 16) >= address:
            continue
        body = [re.sub(r"^@\S+\s+", "", line) for _, line in code[start : index + 1]]
        masks = sum(map(_unpacks, body))
        if masks and any(_MATRIX_INSTRUCTION.match(line) for line in body):
            found.append((masks, -len(body)))
    # Jumps back from code moved out of a loop span parts of it, or more than it.
    return -max(found)[1] if found else None


def _unpacks(line: str) -> bool:
    """Whether an instruction masks two codes: the same bits in both halves of a register."""
    constants = (int(x, 16) for x in re.findall(r"0x([0-9a-f]+)", line))
    return line.startswith("LOP3") and any(x and x % 0x10001 == 0 for x in constants)


def unique(launches: Iterable[Launch]) -> list[Launch]:
    """Launches that compile to different binaries."""
    seen: dict[str, Launch] = {}
    for launch in launches:
        named = zip(launch.kernel.arg_names, launch.args, strict=False)
        kinds = [
            x.dtype if isinstance(x, torch.Tensor) else (type(x), _is_one(launch.kernel, name, x))
            for name, x in named
        ]
        seen.setdefault(repr((launch.kernel, kinds, launch.kwargs)), launch)
    return list(seen.values())
