"""What needs a GPU with TensorRT, in one call: builds all modes of `to_tensorrt` and checks them.

    python benchmarks/tensorrt_check.py --out FOLDER
    python benchmarks/tensorrt_check.py --dry-run       without a GPU: PyTorch in place of engines

`kernel` needs a GPU and no TensorRT: the PTX of the plugin is launched through CUDA's driver with
the arguments that TensorRT passes, and compared with the arithmetic. For each mode, with a small
random model: what is inside of the engine and what outside, logits beside the patched model over
several tiles (an engine that keeps an old cache fails here), calls of 1 to 8 tokens through one
engine, a saved and loaded engine, and the time of a step beside the patched model's. The model is
so small that times are those of launches. Writes `tensorrt_check.csv`. Exit status: 1 if a check
failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import kvarn_ops  # noqa: E402
from kvarn_ops.errors import reason  # noqa: E402
from kvarn_ops.export.engine_program import (  # noqa: E402
    MODES,
    example_inputs,
    export_engine_program,
)
from kvarn_ops.export.engine_step import EngineStep  # noqa: E402
from kvarn_ops.export.step_model import StepModel  # noqa: E402
from kvarn_ops.export.tensorrt import (  # noqa: E402
    load_engine,
    partition_of,
    save_engine,
    to_tensorrt,
)
from kvarn_ops.export.tensorrt_support import unavailable  # noqa: E402

PRESET, SINKS, ROOM, LENGTH = "k4v2_g32", 8, 256, 8 + 5 * 32
BEFORE = SINKS + 32  # nothing is quantized up to here
KERNEL_CASES = {  # preset, head_dim, dtype, lengths, new tokens
    "k4v2 D128 bf16": ("k4v2_g128", 128, torch.bfloat16, [700, 130], 1),
    "k3v2 D64 fp16, 5 new": ("k3v2_g32", 64, torch.float16, [200, 0, 33], 5),
    "k8v8 D256 fp32": ("k8v8_g64", 256, torch.float32, [300], 1),
}


class Report:
    """Rows of the checks, printed as they come."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, mode: str, check: str, outcome: str, figure: float | str = "", why: str = ""):
        """One finished check."""
        row = {"mode": mode, "check": check, "outcome": outcome, "figure": figure, "why": why}
        self.rows.append(row)
        shown = f"{figure:.3g}" if isinstance(figure, float) else figure
        print(f"{mode:10} {check:34} {outcome:8} {shown} {why}", flush=True)

    def run(self, mode: str, check: str, measure: Callable[[], float | str]) -> bool:
        """A check that raises if it fails, and gives a figure."""
        try:
            self.add(mode, check, "passed", measure())
        except Exception as error:  # whatever CUDA, TensorRT or an assertion says
            self.add(mode, check, "failed", why=f"{type(error).__name__}: {reason(error, 2)}")
            return False
        return True


def kernel_error(preset: str, head_dim: int, dtype: torch.dtype, lengths: list[int], count: int):
    """Relative error of the launched PTX against the op's arithmetic on the CPU."""
    from launch_ptx import Loaded

    from kvarn_ops.kernels.engine import INPUTS, grid, launch_shape, problem_of
    from kvarn_ops.kernels.ptx import compile_engine_ptx
    from kvarn_ops.ops.plain import combined, prepared
    from kvarn_ops.ops.read_only import as_engines_take
    from kvarn_ops.ops.samples import filled_cache

    config = kvarn_ops.KVarNConfig.from_preset(preset, num_sink_tokens=32)
    cache, rotation = filled_cache(
        config, lengths, "cpu", num_kv_heads=2, head_dim=head_dim, max_cache_len=1024, dtype=dtype
    )
    cache = as_engines_take(cache)
    generator = torch.Generator().manual_seed(1)
    batch = len(lengths)
    rows = torch.randn(batch, 2, 4 * count, head_dim, generator=generator).to(dtype)
    new = torch.randn(2, batch, 2, count, head_dim, generator=generator).to(dtype)
    rotated, unit = prepared(rows, cache.k_equalizer, rotation, config)
    tensors = (rows, rotated.half(), unit, *cache[:-3], *new, cache.seq_lens)
    numbers = (head_dim**-0.5, 0.0, config.tail_tokens, 4, 3, 4)

    def merged(slots: tuple[Tensor, ...]) -> Tensor:
        part, peak, weight = (x.cpu() for x in slots)
        return combined(part, peak, weight, 3, rotation, cache.v_equalizer, None, config)

    wanted = merged(torch.ops.kvarn.attend_slots(*tensors, *numbers))
    there = [x.cuda().contiguous() for x in tensors]
    problem = problem_of([x.shape for x in tensors], *numbers)
    major, minor = torch.cuda.get_device_capability()
    shape = launch_shape(there[0].device, problem)
    made = compile_engine_ptx(problem, shape, dtype, f"sm_{major}{minor}")
    lead = (batch, 2, problem.slots, 4 * count)
    # NaN wherever the kernel does not write.
    outputs = [
        torch.full(size, torch.nan, device="cuda") for size in ((*lead, head_dim), lead, lead)
    ]
    assert len(there) == len(INPUTS)
    Loaded(made.text, made.name).launch(
        grid(batch * 2, 4 * count, made.block_rows, problem.slots), made.threads,
        made.shared_bytes,
        [*there, 4 * count, count, cache.k_codes.shape[2], *outputs],
    )  # fmt: skip
    error = relative_error(merged(tuple(outputs)), wanted)
    assert error < (1e-3 if dtype == torch.float32 else 1e-2), f"relative error {error:.2e}"
    return error


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of `wanted`; NaN if anything is not a number."""
    found, wanted = found.double().cpu(), wanted.double().cpu()
    return ((found - wanted).norm() / wanted.norm()).item()


def small_model(device: str) -> Any:
    """A patched model of two layers; the same weights every time."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64, max_position_embeddings=1024,
        pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # attention that is not uniform shows a wrong cache
    model = model.to(device, torch.float16 if device == "cuda" else torch.float32)
    return kvarn_ops.patch(model, PRESET, num_sink_tokens=SINKS)


def made(model: Any, mode: str, chunk: int, dry: bool) -> EngineStep:
    """An engine, or its program run by PyTorch."""
    if not dry:
        return to_tensorrt(model, max_cache_len=ROOM, mode=mode, chunk=chunk)
    step = StepModel(model, ROOM)
    return EngineStep(step, export_engine_program(step, chunk, mode).module(), chunk)


@torch.no_grad()
def compared(model: Any, step: Callable[[Tensor], Tensor], counts: list[int]) -> float:
    """Largest relative error of a call's logits, of calls with so many tokens."""
    device = next(model.parameters()).device
    cache = kvarn_ops.KVarNCache(model.config, ROOM, PRESET, num_sink_tokens=SINKS)
    ids = torch.randint(1, 512, (1, sum(counts)), generator=torch.Generator().manual_seed(2))
    worst = 0.0
    for part in ids.to(device).split(counts, 1):
        wanted = model(part, past_key_values=cache, use_cache=True).logits
        error = relative_error(step(part), wanted)
        worst = max(worst, error) if error == error else error
    assert worst < 5e-2, f"relative error {worst:.2e}"
    return worst


@torch.no_grad()
def step_time(call: Callable[[Tensor], Any], device: str) -> float:
    """Median milliseconds of a call with one token."""
    token = torch.ones(1, 1, dtype=torch.int64, device=device)
    times = []
    for _ in range(40):
        if device == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        call(token)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(times[10:])


def reloaded(step: EngineStep, folder: Path) -> float:
    """Relative error of a saved and loaded engine."""
    inputs = example_inputs(step.model, 1)
    path = save_engine(step, folder / "engine.ep")
    model, room = step.model.model, step.model.max_cache_len
    again = load_engine(model, path, max_cache_len=room, batch_size=step.model.batch_size)
    path.unlink()
    error = relative_error(again.program(*inputs)[0], step.program(*inputs)[0])
    assert error < 1e-3, f"relative error {error:.2e}"
    return error


def check_mode(report: Report, mode: str, device: str, out: Path, dry: bool) -> None:
    """All checks of one mode."""
    model = small_model(device)
    steps: dict[int, EngineStep] = {}

    def build(chunk: int) -> float:
        begun = time.perf_counter()
        steps[chunk] = made(model, mode, chunk, dry)
        return time.perf_counter() - begun

    if not report.run(mode, "build, 1 token (s)", lambda: build(1)):
        return
    one = steps[1]

    def partition() -> str:  # `to_tensorrt` refuses another one than the mode promises
        found = partition_of(one.program)
        assert mode == "fallback" or len(found.engines) == 1, found
        return f"{len(found.engines)} engines, {len(found.outside)} operators outside"

    if not dry:
        report.run(mode, "partition", partition)
    counts = [BEFORE + 10] + [1] * (LENGTH - BEFORE - 10)
    report.run(mode, "logits, prompt and single tokens", lambda: compared(model, one, counts))
    one.reset()
    report.run(mode, "logits, from an empty cache", lambda: compared(model, one, [1] * LENGTH))
    if not dry:
        report.run(mode, "saved and loaded", lambda: reloaded(one, out))
    one.reset()
    report.run(mode, "time of a step (ms)", lambda: step_time(one, device))
    if report.run(mode, "build, 1 to 8 tokens (s)", lambda: build(8)):
        counts = [8, 3, 1, 40, 8, 7, *[1] * 20, *[5] * 10]
        report.run(mode, "logits, calls of 1 to 8", lambda: compared(model, steps[8], counts))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--only", default=",".join(("kernel", *MODES)), help="with commas")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    only = options.only.split(",")
    if not options.dry_run and not torch.cuda.is_available():
        print("there is no CUDA device: --dry-run goes through the checks without one.")
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    device, report = ("cpu" if options.dry_run else "cuda"), Report()
    for name, case in KERNEL_CASES.items() if "kernel" in only else ():
        if options.dry_run:
            report.add("kernel", name, "skipped", why="a dry run has no GPU")
        else:
            report.run("kernel", name, lambda case=case: kernel_error(*case))
    obstacle = "" if options.dry_run else unavailable()
    for mode in (mode for mode in MODES if mode in only):
        if obstacle:
            report.add(mode, "all", "skipped", why=obstacle)
        else:
            check_mode(report, mode, device, options.out, options.dry_run)
    if not obstacle:
        model = small_model(device)
        cache = kvarn_ops.KVarNCache(model.config, ROOM, PRESET, num_sink_tokens=SINKS)

        def eager(token: Tensor) -> Any:
            return model(token, past_key_values=cache, use_cache=True)

        report.run("patched", "time of a step (ms)", lambda: step_time(eager, device))
    from gpu_stage import circumstances

    from kvarn_ops.env import environment
    from kvarn_ops.tables import write_rows

    around = circumstances(options.dry_run, "python benchmarks/tensorrt_check.py")
    around["torch_tensorrt"] = str(environment()["torch_tensorrt"])
    path = options.out / "tensorrt_check.csv"
    write_rows(path, [row | around for row in report.rows])
    failed = sum(row["outcome"] == "failed" for row in report.rows)
    print(f"{len(report.rows)} checks, {failed} failed: {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
