"""`kvarn-ops verify --compile`: what compilers make of the kernels, for GPUs that are not there.

Needs Triton and no GPU. Registers, spills and shared memory decide how many programs a
multiprocessor holds; instructions per code decide whether decoding is bound by memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import torch

from . import kernel_tools
from .config import KVarNConfig
from .env import is_installed
from .errors import BackendError, InputError

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = [
    "ARCHS",
    "Row",
    "as_dicts",
    "check_archs",
    "compile_case",
    "compile_kernels",
    "compile_named",
    "covering_cases",
    "full_cases",
    "settings_key",
    "spilling",
    "table",
]

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
_TOKENS = 16384


@dataclass(frozen=True)
class Case:
    """A step whose kernels are compiled; `kernels` restricts them."""

    preset: str
    head_dim: int
    q_heads: int = 32
    kv_heads: int = 8
    new_tokens: int = 1
    encoder: str = "plus"
    dtype: str = "bfloat16"
    mask: str = ""  # dtype of the mask of `kvarn::attention`, in place of a step
    mask_heads: int = 1
    kernels: tuple[str, ...] = ()

    @property
    def config(self) -> KVarNConfig:
        """The config of the cache."""
        return KVarNConfig.from_preset(self.preset, encoder=self.encoder)

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype`, of the queries and the cache's unquantized part."""
        return getattr(torch, self.dtype)

    def __str__(self) -> str:
        text = f"{self.preset} D{self.head_dim} {self.q_heads}/{self.kv_heads}"
        text += f" S{self.new_tokens}" if self.new_tokens > 1 else ""
        text += f" {self.encoder}" if self.encoder != "plus" else ""
        text += f" {self.dtype}" if self.dtype != "bfloat16" else ""
        heads = " per head" if self.mask_heads > 1 else ""
        return f"{text} {self.mask} mask{heads}" if self.mask else text


@dataclass(frozen=True)
class Row:
    """One compiled kernel."""

    kernel: str
    config: str
    arch: str
    warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions_per_code: float | None  # of the loop over tiles; NVIDIA only


_ATTEND = ("attend",)


def covering_cases() -> list[Case]:
    """Every kernel, every number of bits and the shapes at which registers are scarce."""
    return [
        Case("k4v2", 128),
        Case("k4v2", 128, new_tokens=16, kernels=("attend", "encode", "store", "combine")),
        Case("k2v2", 64, 16, 2, kernels=("attend", "encode")),
        Case("k4v4", 64, kernels=_ATTEND),
        Case("k3v2", 128, kernels=_ATTEND),
        Case("k8v8", 256, dtype="float16", kernels=_ATTEND),
        Case("k4v2", 256, 16, 1, kernels=("attend", "encode", "combine")),
        Case("k3v3_g64", 80, 32, 32, encoder="paper", kernels=("attend", "encode")),
        Case("k4v4", 128, 2, 2, encoder="paper", kernels=("attend", "encode")),
        Case("k4v2", 256, 8, 2, new_tokens=16, dtype="float32", kernels=_ATTEND),
        Case("k4v2_g64", 128, 8, 2, kernels=("encode",)),
        Case("k4v2", 128, mask="bool", kernels=_ATTEND),
        Case("k4v2", 128, new_tokens=16, mask="float32", kernels=_ATTEND),
    ]


def full_cases() -> list[Case]:
    """Presets by widths by ratios, drafts and chunks: 8.8 s of CPU time per case and GPU."""
    cases = [
        Case(preset, head_dim, ratio * 2, 2, encoder=encoder)
        for preset in ("k4v2", "k2v2", "k3v2", "k4v4", "k8v8", "k4v2_g64", "k2v2_g32")
        for head_dim in (32, 64, 80, 128, 256)
        for ratio, encoder in ((1, "paper"), (4, "plus"), (12, "plus"))
    ]
    more = [
        Case("k4v2", head_dim, 8, 2, new_tokens=count, dtype=dtype)
        for head_dim in (64, 128, 256)
        for count in (1, 4, 16, 256)
        for dtype in ("bfloat16", "float32")
    ]
    wide = [Case("k4v2", 192), Case("k4v4", 576, 16, 1, kernels=_ATTEND)]
    return list(dict.fromkeys(cases + more + wide))


def compile_kernels(
    archs: Sequence[str],
    cases: Sequence[Case],
    on_done: Callable[[str], None] = lambda name: None,
    failures: list[str] | None = None,
) -> list[Row]:
    """Compile all kernels of all cases for all architectures.

    Parameters
    ----------
    archs : sequence of str
        For example `sm_90` or `gfx942`.
    cases : sequence of Case
        What to compile.
    on_done : callable
        Called with a name after each case and architecture.
    failures : list of str, optional
        Gets the names of what does not compile; without it the first failure is raised.

    Raises
    ------
    BackendError
        If Triton is not installed, or set to interpret kernels, or a kernel does not compile.
    InputError
        If an architecture is unknown to Triton.
    """
    if not is_installed("triton"):
        raise BackendError("compiling kernels needs Triton: pip install triton.")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise BackendError("TRITON_INTERPRET=1 is set, with which nothing is compiled: unset it.")
    for arch in archs:
        kernel_tools.check_arch(arch)
    jobs = [(case, arch) for arch in archs for case in cases]
    results: dict[tuple[Case, str], list[Row]] = {}
    # Spawned: a forked child of a process with OpenMP threads may hang.
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        futures = {pool.submit(compile_case, *job): job for job in jobs}
        for future in as_completed(futures):
            case, arch = futures[future]
            name = f"{arch} {case}"
            try:
                results[case, arch] = future.result()
            except Exception as error:  # whatever a compiler raises
                if failures is None:
                    raise BackendError(f"{name} does not compile: {error}") from error
                failures.append(name)
            on_done(name)
    return [row for job in jobs for row in results.get(job, ())]


def settings_key(case: Case, kernel: str) -> str:
    """Name of a case's settings in `kernels/settings.json`, for `attend` or `encode`."""
    if kernel == "encode":
        return kernel_tools.encode_key(case.config, case.head_dim)
    rows = case.q_heads // case.kv_heads * case.new_tokens
    return kernel_tools.attend_key(case.config, case.head_dim, rows, case.torch_dtype)


def compile_case(case: Case, arch: str) -> list[Row]:
    """All kernels of one step."""
    return list(_rows(case, arch))


def _rows(case: Case, arch: str) -> Iterator[Row]:
    config = case.config
    for binary in kernel_tools.compiled_step(
        config, case.head_dim, case.q_heads, case.kv_heads, case.new_tokens, case.dtype, _TOKENS,
        arch, case.kernels, (case.mask, case.mask_heads),
    ):  # fmt: skip
        per_code = None
        if binary.kernel == "attend" and binary.loop_instructions:
            codes = 2 * config.group_size * case.head_dim
            per_code = round(binary.loop_instructions * 32 * binary.warps / codes, 2)
        yield Row(
            binary.kernel, str(case), arch, binary.warps, binary.registers, binary.spill_bytes,
            binary.shared_bytes, per_code,
        )  # fmt: skip


def compile_named(archs: str, full: bool) -> tuple[list[Row], list[str]]:
    """Compile the covering or the full cases, with a progress bar; `archs` as in `check_archs`.

    Returns the rows, and the names of what does not compile.
    """
    from tqdm import tqdm

    wanted = check_archs(archs)
    cases = full_cases() if full else covering_cases()
    with tqdm(total=len(cases) * len(wanted), unit="step", desc="compiling") as bar:

        def advance(name: str) -> None:
            bar.set_postfix_str(name)
            bar.update()

        failures: list[str] = []
        return compile_kernels(wanted, cases, advance, failures), failures


def spilling(rows: Sequence[Row]) -> list[Row]:
    """Rows with spills where none are expected: at head_dim up to 256."""
    return [row for row in rows if row.spill_bytes and "D576" not in row.config]


def table(rows: Sequence[Row]) -> RenderableType:
    """One line per kernel, spills in red."""
    from rich import box
    from rich.table import Table

    found = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in ("kernel", "config", "arch"):
        found.add_column(name, no_wrap=True)
    for name in ("warps", "registers", "spill\nbytes", "shared\nbytes", "instr.\nper code"):
        found.add_column(name, justify="right")
    for row in rows:
        cells = [str(value) for value in asdict(row).values()]
        if row.spill_bytes:
            cells[5] = f"[bold red]{cells[5]}[/]"
        cells[7] = "" if row.instructions_per_code is None else cells[7]
        found.add_row(*cells)
    return found


def as_dicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows for JSON and CSV."""
    return [asdict(row) for row in rows]


def check_archs(text: str) -> list[str]:
    """Architectures from what a command-line option was given: names with commas, or `all`."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["all"]:
        return list(ARCHS)
    if not names:
        raise InputError("--compile is empty: give sm_80, sm_90, sm_100, gfx942 or all.")
    return names
