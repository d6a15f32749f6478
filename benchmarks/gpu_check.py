"""Everything that needs a GPU, in one call: tests, then measurements, in under `--minutes`.

    python benchmarks/gpu_check.py --out benchmarks/results
    python benchmarks/gpu_check.py --only attention,encode --minutes 4
    python benchmarks/gpu_check.py --dry-run        every stage at tiny sizes, on the CPU, untimed

Stages, in this order: `tests` (tests/kernels and all that is marked `gpu`, on the GPU), `copy`,
`correctness`, `attention`, `encode`, `model`, `smallest`; what each measures is written at the top
of `gpu_<stage>.py`. A stage runs in a process of its own and gets a share of the time that is left;
when that is used up it stops adding rows. A stage that fails, crashes or hangs ends alone. While
the tests run, other processes compile what the later stages need. Files: `gpu_<stage>.csv`, their
summary `gpu_check.csv` and all output in `gpu_check.log`. Exit status: 1 if a stage failed, 2
without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from gpu_stage import DEVICE_LOST, ROOT, circumstances, short
from gpu_tables import print_rows, print_summary

# Shares of the time, roughly seconds of nine minutes.
WEIGHTS = {"tests": 150, "copy": 12, "correctness": 35, "attention": 150, "encode": 30,
           "model": 105, "smallest": 45}  # fmt: skip
GRACE = 20.0  # seconds that the last case of a stage may take beyond its share
COMPILED = ("attention", "smallest", "model")  # stages whose compilation is worth an early start
PATIENCE = 30.0  # seconds that measurements wait for it
RESTARTS = 3
HERE = Path(__file__).resolve().parent
KEYS = ("stage",)


@dataclass
class Outcome:
    """What became of a stage."""

    stage: str
    outcome: str = "passed"  # failed, stopped
    rows: int = 0
    seconds: float = 0.0
    headline: str = ""
    left_out: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


class Run:
    """Options, deadline and open log of one call."""

    def __init__(
        self, options: argparse.Namespace, log: IO[str], command: str, begun: float
    ) -> None:
        self.options, self.log, self.command = options, log, command
        self.dry: bool = options.dry_run
        self.out: Path = options.out
        self.deadline = begun + 60 * options.minutes - GRACE
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "PYTHONUNBUFFERED": "1",
        }
        if not self.dry:
            self.environment.pop("TRITON_INTERPRET", None)

    def share(self, stage: str, later: list[str]) -> float:
        """Seconds for a stage, if the later ones are to have their share."""
        left = self.deadline - time.monotonic()
        return max(0.0, left) * WEIGHTS[stage] / sum(WEIGHTS[s] for s in (stage, *later))

    def start(self, *command: str, output: IO[Any] | None = None) -> subprocess.Popen[bytes]:
        """A process of its own group, with its output in the log or another file."""
        self.log.write(f"\n=== {shlex.join(command)}\n")
        self.log.flush()
        return subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=self.environment,
            stdout=output or self.log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip

    def stage_command(self, stage: str, seconds: float, *more: str) -> list[str]:
        """Of `gpu_stage.py`."""
        command = [str(HERE / "gpu_stage.py"), stage, "--seconds", f"{seconds:.1f}", "--out",
                   str(self.out), "--command", self.command, "--layers",
                   str(self.options.layers), *more]  # fmt: skip
        return command + ["--dry-run"] * self.dry


def main() -> int:
    first = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(WEIGHTS), help="stages, with commas")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--layers", type=int, default=8, help="of the model, of 32")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    asked = [name.strip() for name in options.only.split(",") if name.strip()]
    if unknown := sorted(set(asked) - set(WEIGHTS)):
        parser.error(f"no such stage: {', '.join(unknown)}. Stages: {', '.join(WEIGHTS)}")
    stages = [name for name in WEIGHTS if name in asked]
    if obstacle := "" if options.dry_run else missing_gpu():
        print(f"{obstacle} --dry-run goes through all stages on the CPU.", file=sys.stderr)
        return 2
    if options.out is None:  # what a dry run writes is nothing to keep
        options.out = Path("bench_output/gpu_dry_run" if options.dry_run else HERE / "results")
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    from kvarn_ops.benchmark.results import ResultFile

    around = surroundings(options.dry_run)
    summary = ResultFile(options.out / "gpu_check.csv", KEYS)
    outcomes = []
    with (options.out / "gpu_check.log").open("w", encoding="utf-8") as log:
        run = Run(options, log, around["command"], first)
        print(f"{around['device']}, torch {around['torch']}, triton {around['triton']}", flush=True)
        helpers = [] if options.dry_run else start_compiling(run, stages)
        for index, stage in enumerate(stages):
            later = stages[index + 1 :]
            begun = time.monotonic()
            if stage == "tests":
                outcome = run_tests(run, run.share(stage, later))
            else:
                stop(helpers, min(PATIENCE, run.share(stage, later) / 2))
                outcome = run_stage(run, stage, run.share(stage, later))
            outcome.seconds = time.monotonic() - begun
            outcomes.append(outcome)
            summary.add(columns(outcome) | around)
            print(f"{stage}: {outcome.outcome}, {outcome.seconds:.0f} s", flush=True)
        stop(helpers, 0)
    print_rows(options.out, stages)
    print_summary(outcomes, options.dry_run, options.out)
    return int(any(outcome.outcome != "passed" for outcome in outcomes))


def missing_gpu() -> str:
    """Why nothing can be measured; empty if it can."""
    import torch

    if not torch.cuda.is_available():
        return f"There is no CUDA GPU that torch {torch.__version__} can use."
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)."
    return ""


def surroundings(dry: bool) -> dict[str, str]:
    """The columns of every row; a GPU on which not even the self-test runs is still named."""
    try:
        return circumstances(dry)
    except Exception as error:
        import torch

        print(f"The kernels' self-test fails: {short(error)}", file=sys.stderr)
        return {"device": torch.cuda.get_device_name(0), "threads": "", "torch": torch.__version__,
                "triton": "?", "command": shlex.join(["gpu_check.py", *sys.argv[1:]])}  # fmt: skip


def columns(outcome: Outcome) -> dict[str, Any]:
    """Of the summary."""
    return {
        "stage": outcome.stage, "outcome": outcome.outcome, "rows": outcome.rows,
        "seconds": f"{outcome.seconds:.1f}", "headline": outcome.headline,
        "left_out": len(outcome.left_out), "first_left_out": "; ".join(outcome.left_out[:5]),
        "errors": "; ".join(outcome.errors[:10]),
    }  # fmt: skip


def start_compiling(run: Run, stages: list[str]) -> list[subprocess.Popen[bytes]]:
    """Call what later stages call once, on half of the cores: tests have the others."""
    wanted = [stage for stage in COMPILED if stage in stages]
    cores = max(len(wanted), (os.cpu_count() or 2) // 2)
    parts = {"model": 3, "smallest": max(1, cores // 4)}
    parts["attention"] = max(1, cores - sum(parts[s] for s in wanted if s != "attention"))
    seconds = run.share("tests", stages) if "tests" in stages else 60.0
    return [
        run.start(*run.stage_command(stage, seconds, "--warm", f"{part}/{parts[stage]}"))
        for stage in wanted for part in range(parts[stage])
    ]  # fmt: skip


def stop(processes: list[subprocess.Popen[bytes]], patience: float) -> None:
    """Wait a while, then end what still runs: nothing else may use the GPU while it is timed."""
    until = time.monotonic() + patience
    for process in processes:
        wait(process, max(0.0, until - time.monotonic()))
    processes.clear()


def wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Exit status, or None if the process and what it started had to be ended."""
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # of the group that `start` made
        process.wait()
        return None


def run_stage(run: Run, stage: str, seconds: float) -> Outcome:
    """A measuring stage; after a crash it goes on with the next case."""
    outcome, until = Outcome(stage), time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        more = ["--report", str(report)]
        for _ in range(1 + RESTARTS):
            left = until - time.monotonic()
            process = run.start(*run.stage_command(stage, left, *more))
            status = wait(process, max(1.0, left) + GRACE)
            state = json.loads(report.read_text()) if report.is_file() else {}
            report.unlink(missing_ok=True)
            outcome.rows = state.get("rows", outcome.rows)
            outcome.headline = state.get("headline") or outcome.headline
            outcome.errors += state.get("errors", [])
            outcome.left_out = state.get("left_out", [])
            if status is None:
                outcome.outcome = "stopped"
                outcome.errors.append(f"ended after {left + GRACE:.0f} s, in the middle of a case")
            elif status:
                outcome.outcome = "failed"
            if status and not state:
                outcome.errors.append(f"exit status {status}: see the end of gpu_check.log")
            crashed = status == DEVICE_LOST or (status is not None and status < 0)
            if not crashed or until - time.monotonic() < GRACE:
                break
            if status is not None and status < 0:  # killed by a signal, which leaves no row behind
                outcome.errors.append(f"{state.get('now', '?')}: signal {-status}")
            more = ["--report", str(report), "--resume", "--skip", state.get("now", "")]
    return outcome


def run_tests(run: Run, seconds: float) -> Outcome:
    """Pytest on what kernels do, and on everything else that is marked `gpu`."""
    outcome, until = Outcome("tests"), time.monotonic() + seconds
    marked = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").rglob("test_*.py"))
              if "kernels" not in path.parts and "mark.gpu" in path.read_text()]  # fmt: skip
    # `slow` ones compile for other GPUs, on the CPU; the last one is a dry run of this script.
    suites = [["tests/kernels", "-m", "not slow", "--ignore", "tests/kernels/test_gpu_check.py"]]
    suites += [[*marked, "-m", "gpu"]] if marked else []
    if run.dry:
        suites = [["tests/kernels/test_backend.py"]]
    flags = ["-v", "-p", "no:cacheprovider"]
    cores = os.cpu_count() or 1
    if importlib.util.find_spec("xdist") and cores >= 8:
        flags += ["-n", str(min(6, cores // 2))]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        for suite in suites:
            process = run.start("-m", "pytest", *suite, *flags, output=output)
            status = wait(process, max(1.0, until - time.monotonic()))
            if status is None:
                outcome.outcome = "stopped"
                outcome.errors.append(f"out of time in {suite[0]}")
            elif status not in (0, 5):  # 5: no tests were selected
                outcome.outcome = "failed"
                outcome.errors.append(f"pytest {suite[0]}: exit status {status}")
        output.seek(0)
        text = output.read()
    run.log.write(text)
    counts, failed = count_results(text)
    outcome.rows = sum(counts.values())
    outcome.errors += failed
    outcome.headline = ", ".join(f"{kind.lower()} {count}" for kind, count in counts.items())
    return outcome


def count_results(text: str) -> tuple[Counter[str], list[str]]:
    """Results in the output of `pytest -v`, with or without xdist, finished or not."""
    kinds = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
    plain = re.findall(rf"^(tests/\S+::.*?) ({kinds})\b", text, re.MULTILINE)
    spread = re.findall(
        rf"^\[gw\d+\] \[ *\d+%\] ({kinds}) (tests/\S+::.*?)\s*$", text, re.MULTILINE
    )
    results = plain + [(name, kind) for kind, name in spread]
    failed = [f"{kind} {name}" for name, kind in results if kind in ("FAILED", "ERROR")]
    return Counter(kind for _, kind in results), failed


if __name__ == "__main__":
    sys.exit(main())
