"""Tables of a run: one line per number in `summary.csv`, and errors by position and by layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from ..tables import with_error
from .attention_error import KINDS
from .plan import Job
from .question_runs import answers_of
from .scores import Errors, Mean, mean_of_means, mean_of_rows, proportion

__all__ = ["Results", "collect", "summary_table"]

_BIN = 64  # positions per line of positions.csv; divides every tile
_LABELS = ("task", "model", "protocol", "preset", "method", "cache", "bits")
OUTLIERS_MEAN = "outliers_mean"  # the model column of means over placements
HEADLINE = {
    "text": "kl",
    "chase": "intact",
    "lines": "accuracy",
    "math500": "accuracy",
    "aime24": "accuracy",
    "humaneval": "pass@1",
    "ifeval": "prompt_strict",
    "line_text": "accuracy",
}

Row = dict[str, str]


class Results(NamedTuple):
    """Rows of the files."""

    summary: list[Row]
    positions: list[Row]
    layers: list[Row]
    answers: list[Row]


def collect(done: Iterable[tuple[Job, dict[str, Tensor]]]) -> Results:
    """Turn finished pieces into rows; pieces of one run on several batches become one."""
    groups: dict[tuple[str, ...], list[tuple[Job, dict[str, Tensor]]]] = defaultdict(list)
    for job, tensors in done:
        groups[tuple(job.columns[name] for name in _LABELS)].append((job, tensors))
    results = Results([], [], [], [])
    for label, members in groups.items():
        columns: Row = dict(zip(_LABELS, label, strict=True))
        first = members[0][0]
        if first.kind == "attention":
            results.layers.extend(_layer_rows(columns, first, members[0][1]))
            continue
        if first.kind == "questions":
            results.answers.extend(_answer_rows(columns, members))
        tensors = {
            name: torch.cat([part[name] for _, part in members])
            for name in sorted(members[0][1])
            if name != "answers"
        }
        for metric, values in tensors.items():
            if first.kind == "text":  # before the first tile is read, all are dense
                values = values[:, first.first - first.positions.start :]
            results.summary.append(_number(columns, metric, _mean(first, values), values))
        if first.kind == "text":
            results.positions.extend(_position_rows(columns, first.positions, tensors))
    results.summary.extend(_over_placements(results.summary))
    return results


def _mean(job: Job, values: Tensor) -> Mean:
    if job.kind == "text":
        return mean_of_rows(values)
    if bool(((values == 0) | (values == 1)).all()):  # trials that succeeded or did not
        return proportion(values.bool())
    return mean_of_rows(values.unsqueeze(-1))


def _number(columns: Row, metric: str, mean: Mean, values: Tensor) -> Row:
    return {
        **columns,
        "metric": metric,
        "value": f"{mean.value:.6g}",
        "standard_error": f"{mean.error:.3g}",
        "n": str(len(values)),
    }


def _over_placements(rows: list[Row]) -> list[Row]:
    """A row per number that exists for outlier placements: the mean over them."""
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row["model"].startswith("outliers"):
            rest = tuple(value for name, value in row.items() if name in (*_LABELS, "metric")
                         and name != "model")  # fmt: skip
            groups[rest].append(row)
    found = []
    for members in groups.values():
        parts = [Mean(float(row["value"]), float(row["standard_error"])) for row in members]
        mean = mean_of_means(parts)
        found.append(
            members[0]
            | {
                "model": OUTLIERS_MEAN,
                "value": f"{mean.value:.6g}",
                "standard_error": f"{mean.error:.3g}",
            }
        )
    return found


def _position_rows(columns: Row, positions: range, tensors: dict[str, Tensor]) -> list[Row]:
    rows = []
    first = -(-positions.start // _BIN) * _BIN
    for start in range(first, positions.stop - _BIN + 1, _BIN):
        part = slice(start - positions.start, start - positions.start + _BIN)
        means = {name: f"{values[:, part].mean():.6g}" for name, values in tensors.items()}
        rows.append({**columns, "position": str(start + _BIN // 2), **means})
    return rows


def _answer_rows(columns: Row, members: list[tuple[Job, dict[str, Tensor]]]) -> list[Row]:
    return [{**columns, **line} for _, tensors in members for line in answers_of(tensors)]


def _layer_rows(columns: Row, job: Job, tensors: dict[str, Tensor]) -> list[Row]:
    """Mean over windows and positions, for each layer and quarter of the context."""
    rows = []
    for kind in KINDS:
        parts = {part: tensors[f"{kind}_{part}"].mean(1) for part in Errors._fields}  # [L, T]
        quarters = torch.linspace(0, len(job.positions), 5).long().tolist()
        for index, layer in enumerate(tensors["layers"].tolist()):
            for low, high in pairwise(quarters):
                rows.append(
                    {
                        **columns,
                        "error": kind,
                        "layer": str(layer),
                        "from": str(job.positions.start + low),
                        "to": str(job.positions.start + high),
                    }
                    | {name: f"{x[index, low:high].mean():.6g}" for name, x in parts.items()}
                )
    return rows


def summary_table(rows: list[Row]) -> Table:
    """Headline numbers: a line per method and preset, a column per task and model."""
    wanted = [row for row in rows if row["metric"] == HEADLINE.get(row["task"])
              and row["model"] in ("plain", OUTLIERS_MEAN)
              and row["protocol"] != "prefill"]  # fmt: skip
    heads = list(dict.fromkeys((row["task"], row["protocol"], row["model"]) for row in wanted))
    lines = list(
        dict.fromkeys((row["preset"], row["method"], row["cache"], row["bits"]) for row in wanted)
    )
    values = {
        (row["preset"], row["method"], row["cache"], row["bits"], row["task"], row["protocol"],
         row["model"]): row
        for row in wanted
    }  # fmt: skip
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in ("preset", "method", "cache", "bits"):
        table.add_column(name, no_wrap=True)
    for task, protocol, model in heads:
        unit = "KL, 10⁻³ nats" if task == "text" else f"{HEADLINE[task]}, %"
        variant = "outliers" if model == OUTLIERS_MEAN else model
        table.add_column(f"{task}, {protocol}\n{variant}\n{unit}", justify="right")
    for line in lines:
        cells = []
        for head in heads:
            row = values.get((*line, *head))
            factor = 1000 if head[0] == "text" else 100
            cells.append("" if row is None else _cell(row, factor))
        table.add_row(*line, *cells)
    return table


def _cell(row: Row, factor: float) -> str:
    value, error = factor * float(row["value"]), factor * float(row["standard_error"])
    return with_error(value, error, digits=0 if factor == 100 else 2)
