"""The kernel of `engine.py` as PTX that an engine can launch, compiled without a GPU."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
import triton
from triton.compiler import ASTSource

from .engine import INPUTS, INTEGERS, OUTPUTS, EngineProblem, constants, engine_kernel
from .heuristics import AttendShape
from .static import TYPES, target_of

__all__ = ["SHARED_LIMIT", "EnginePtx", "compile_engine_ptx", "without_scratch"]

# A kernel gets more only by asking for it when it is loaded, which engines are not known to do.
SHARED_LIMIT = 48 * 1024

_FIXED = {
    "rotated": "*fp16", "unit": "*fp32", "k_codes": "*i8", "k_channel_affine": "*fp16",
    "k_token_scale": "*fp16", "v_codes": "*i8", "v_token_affine": "*fp16",
    "v_channel_scale": "*fp16", "lengths": "*i32",
}  # fmt: skip
_ENTRY = re.compile(r"(?P<head>\.visible\s+\.entry\s+[\w$]+\s*\()(?P<params>[^)]*)\)", re.S)


class EnginePtx(NamedTuple):
    """A kernel for engines."""

    name: str
    text: str
    threads: int  # of a block
    shared_bytes: int
    block_rows: int


def compile_engine_ptx(
    problem: EngineProblem, shape: AttendShape, dtype: torch.dtype, arch: str
) -> EnginePtx:
    """Compile for `arch`, `sm_90` say, and queries, sinks, tail and new tokens of `dtype`.

    Fewer stages of prefetching are taken where shared memory is short.

    Raises
    ------
    ValueError
        If the kernel needs more shared memory than engines give.
    """
    for stages in range(shape.stages, 0, -1):
        made = _compiled(problem, shape._replace(stages=stages), dtype, arch)
        if made.shared_bytes <= SHARED_LIMIT:
            return made
    raise ValueError(
        f"the attention kernel needs {made.shared_bytes} bytes of shared memory at head_dim "
        f"{problem.head_dim} with {problem.key_bits} and {problem.value_bits} bits on {arch}, and "
        f"engines give {SHARED_LIMIT}"
    )


def _compiled(
    problem: EngineProblem, shape: AttendShape, dtype: torch.dtype, arch: str
) -> EnginePtx:
    kinds = [_FIXED.get(name, TYPES[dtype]) for name in INPUTS]
    kinds += ["i32"] * len(INTEGERS) + ["*fp32"] * len(OUTPUTS)
    compiled_in = constants(problem, shape, ptx=True)
    names = engine_kernel.arg_names
    signature = dict(zip(names, kinds, strict=False)) | dict.fromkeys(compiled_in, "constexpr")
    source = ASTSource(
        fn=engine_kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in compiled_in.items()},
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, kind in enumerate(kinds)
            if kind.startswith("*")
        },
    )
    made = triton.compile(source, target=target_of(arch), options={"num_warps": shape.warps})
    about = made.metadata
    if getattr(about, "num_ctas", 1) != 1 or getattr(about, "launch_cooperative_grid", False):
        raise ValueError("the kernel needs a cluster or cooperative launch, which engines lack")
    text = without_scratch(made.asm["ptx"], len(kinds))
    return EnginePtx(about.name, text, about.num_warps * 32, about.shared, shape.rows)


def without_scratch(ptx: str, count: int) -> str:
    """`ptx` whose entry has only its first `count` parameters.

    Triton appends pointers to scratch memory (one or two, by release), which engines do not pass.

    Raises
    ------
    ValueError
        If the kernel uses one of them, or has fewer parameters.
    """
    entry = _ENTRY.search(ptx)
    if entry is None:
        raise ValueError("the PTX has no entry")
    params = [text.strip() for text in entry["params"].split(",") if text.strip()]
    if len(params) < count:
        raise ValueError(f"the PTX has {len(params)} parameters where {count} are given")
    for param in params[count:]:
        name = re.escape(param.split()[-1])
        if len(re.findall(rf"\b{name}\b", ptx)) != 1:
            raise ValueError(f"{param} is used: the kernel needs scratch memory")
    kept = "\n\t" + ",\n\t".join(params[:count]) + "\n"
    return ptx[: entry.start("params")] + kept + ptx[entry.end("params") :]
