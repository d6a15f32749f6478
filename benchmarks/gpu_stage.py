"""One stage of `gpu_check.py`, in a process of its own: a crash or a hang ends this stage only.

    python benchmarks/gpu_stage.py attention --seconds 150 --out FOLDER --report FILE --command TEXT

A stage is a module with `KEYS`, `COLUMNS` and `run(stage)`, which returns a headline. It asks
`Stage.each` for its cases, most important first: when the time is used up, the rest is left out.
`--warm 2/6` runs every sixth case from the second once, untimed and without results: compilers
leave their work in their caches on disk, from where the timed run takes it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

STAGES = ("copy", "correctness", "attention", "encode", "model", "smallest")
DRY_DEVICE = "dry run"
DEVICE_LOST = 3  # exit status: no kernel runs in this process any more
FIGURES = "error"  # the last column of a stage, before those of the conditions


class DeviceLost(Exception):
    """The CUDA context is beyond repair: this process can only end."""


def circumstances(dry: bool, command: str | None = None) -> dict[str, str]:
    """Device, versions, date and command, as columns; a dry run has no device."""
    import torch

    from kvarn_ops.benchmark.results import conditions
    from kvarn_ops.env import environment

    device = torch.device("cpu" if dry else "cuda")
    around = conditions(device, torch.get_num_threads())
    if dry:
        around["device"] = DRY_DEVICE
    around["triton"] = environment()["triton"]
    around["cuda"] = str(torch.version.cuda)
    return around if command is None else around | {"command": command}


class Stage:
    """What a stage is given: a device, a clock, a deadline and a file for its rows."""

    def __init__(self, options: argparse.Namespace, module: Any) -> None:
        import torch
        from gpu_timing import Clock

        from kvarn_ops.benchmark.results import ResultFile

        self.name: str = options.stage
        self.dry: bool = options.dry_run
        self.warm = options.warm is not None
        self.layers: int = options.layers
        self.device = torch.device("cpu" if self.dry else "cuda")
        self.clock = Clock(self.device, warm=self.warm)
        self.part, self.parts = map(int, (options.warm or "0/1").split("/"))
        self._deadline = time.monotonic() + options.seconds
        self._columns: Sequence[str] = module.COLUMNS
        self._report: Path | None = options.report
        self._last = 0.0
        self._skipped: list[str] = options.skip
        self._now = ""
        self.left_out: list[str] = []
        self.errors: list[str] = []
        self.headline = ""
        self._around: dict[str, str] = {}
        self._results = None
        if not self.warm:
            path = options.out / f"gpu_{self.name}.csv"
            self._around = circumstances(self.dry, options.command)
            self._results = ResultFile(path, module.KEYS, options.resume)

    @property
    def rows(self) -> list[dict[str, str]]:
        """Rows so far, those of an earlier process included."""
        return self._results.rows if self._results else []

    def seconds_left(self) -> float:
        """Until no further case begins."""
        return self._deadline - time.monotonic()

    def each(self, cases: Sequence[tuple[dict[str, Any], Any]]) -> Iterator[tuple[Any, Any]]:
        """Cases with their keys, while there is time for one more like the last."""
        for index, (keys, case) in enumerate(cases):
            if self.warm and index % self.parts != self.part:
                continue
            if self._results and self._results.has(keys | self._around):
                continue
            if label(keys) in self._skipped:
                continue
            if self.seconds_left() < self._last:
                self.leave_out(*(label(other) for other, _ in cases[index:]))
                return
            begun = time.monotonic()
            self._now = label(keys)
            self.save()
            yield keys, case
            self._last = time.monotonic() - begun
            print(f"{self.name}: {label(keys)}, {self._last:.1f} s", flush=True)

    def leave_out(self, *labels: str) -> None:
        """Say that something was not measured."""
        self.left_out += labels
        self.save()

    def add(self, keys: Mapping[str, Any], **values: Any) -> None:
        """Write a row; columns without a value stay empty."""
        if self._results is None:
            return
        unknown = set(values) - set(self._columns)
        assert not unknown, f"{self.name} has no columns {sorted(unknown)}"
        row = dict(keys) | {name: values.get(name, "") for name in self._columns}
        self._results.add(row | self._around)
        self.save()

    def fail(self, what: str) -> None:
        """Make the stage fail at its end."""
        self.errors.append(what)
        self.save()

    @contextmanager
    def guarded(self, keys: Mapping[str, Any]) -> Iterator[None]:
        """A case that raises becomes a row with its error, and the next one follows."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            text = short(error)
            self.add(keys, **{FIGURES: text})
            self.fail(f"{label(keys)}: {text}")
            self.check_alive()

    def save(self) -> None:
        """Tell the process that started this one how far it is."""
        if self._report is None:
            return
        state = {"headline": self.headline, "rows": len(self.rows), "errors": self.errors,
                 "left_out": self.left_out, "now": self._now}  # fmt: skip
        self._report.write_text(json.dumps(state))

    def check_alive(self) -> None:
        """Raise `DeviceLost` if an error before has left the device unusable."""
        if self.device.type != "cuda":
            return
        import torch

        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise DeviceLost(short(error)) from error


def label(keys: Mapping[str, Any]) -> str:
    """A case in a word or two."""
    return " ".join(str(value) for value in keys.values())


def short(error: BaseException) -> str:
    """Kind and first line of an error, without commas and quotes that make a CSV hard to read."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0].strip()[:160]}".replace('"', "'").replace(",", ";")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--command", default="gpu_stage.py")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--warm", metavar="PART/PARTS")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--skip", action="append", default=[], help="a case that killed a process")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if options.dry_run:  # read when a kernel is defined, hence before anything imports them
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    module = importlib.import_module(f"gpu_{options.stage}")
    stage = Stage(options, module)
    try:
        with torch.no_grad():
            stage.headline = module.run(stage)
    except DeviceLost as error:
        print(f"{stage.name}: the device is lost: {error}", flush=True)
        os._exit(DEVICE_LOST)  # destructors of CUDA objects would raise, or hang
    except Exception as error:
        traceback.print_exc()
        stage.fail(short(error))
    stage.save()
    return int(bool(stage.errors))


if __name__ == "__main__":
    sys.modules["gpu_stage"] = sys.modules[__name__]  # stages import it: one `DeviceLost`, not two
    sys.exit(main())
