"""Tables of docs/evaluation.md from the CSV files of `evaluation.py`."""

from __future__ import annotations

from functools import partial

from markdown_table import markdown

from kvarn_ops.tables import with_error

Rows = list[dict[str, str]]

METHODS = (
    *("none", "fp8", "rtn", "kivi_g32", "kivi_g64", "kivi_g128", "hadamard", "turbo", "paper"),
    "plus",
)


def _number(row: dict[str, str] | None, factor: float, digits: int) -> str:
    if row is None:
        return ""
    value, error = factor * float(row["value"]), factor * float(row["standard_error"])
    return with_error(value, error, digits)


def _find(rows: Rows, **wanted: str) -> dict[str, str] | None:
    return next((row for row in rows if wanted.items() <= row.items()), None)


def _presets(rows: Rows) -> list[str]:
    return [name for name in dict.fromkeys(row["preset"] for row in rows) if name != "-"]


def _simulated(rows: Rows, preset: str, **wanted: str) -> dict[str, str] | None:
    """The row at a preset; of methods that have no bits to choose, their only one."""
    wanted |= {"cache": "simulated"}
    return _find(rows, preset=preset, **wanted) or _find(rows, preset="-", **wanted)


def _named(method: str) -> str:
    return f"**{method}**" if method == "plus" else method


def by_preset(
    rows: Rows, task: str, metric: str, model: str, protocol: str, factor: float, digits: int
) -> str:
    """A line per method, a column per preset; bits of the first preset."""
    presets = _presets(rows)
    wanted = {"task": task, "metric": metric, "model": model, "protocol": protocol}
    lines = []
    for method in METHODS:
        found = [_simulated(rows, preset, method=method, **wanted) for preset in presets]
        cells = [_number(row, factor, digits) for row in found]
        if any(cells):
            bits = next(row["bits"] for row in rows if row["method"] == method)
            lines.append([_named(method), bits, *cells])
    head = ["method", f"bits at {presets[0]}", *presets]
    return markdown(head, lines)


_TEXT = {"task": "text", "metric": "kl", "factor": 1e3, "digits": 2}
_CHASE = {"task": "chase", "metric": "intact", "protocol": "free", "factor": 100, "digits": 0}
_LINES = {"task": "lines", "metric": "accuracy", "protocol": "free", "factor": 100, "digits": 1}
_PLAIN, _OUTLIERS = {"model": "plain"}, {"model": "outliers_mean"}
text = partial(by_preset, **_TEXT, **_PLAIN, protocol="pseudo")
text_outliers = partial(by_preset, **_TEXT, **_OUTLIERS, protocol="pseudo")
decode = partial(by_preset, **_TEXT, **_PLAIN, protocol="decode")
chase = partial(by_preset, **_CHASE, **_PLAIN)
chase_outliers = partial(by_preset, **_CHASE, **_OUTLIERS)
lines = partial(by_preset, **_LINES, **_PLAIN)
lines_outliers = partial(by_preset, **_LINES, **_OUTLIERS)


def overview(text_rows: Rows, chase_rows: Rows, lines_rows: Rows) -> str:
    """Two bits, all tasks: the table of the README."""
    found = []
    for method in METHODS:
        cells = []
        for rows, task, metric, protocol, factor, digits in (
            (text_rows, "text", "kl", "pseudo", 1e3, 1),
            (chase_rows, "chase", "intact", "free", 100, 0),
            (lines_rows, "lines", "accuracy", "free", 100, 0),
        ):
            for model in ("plain", "outliers_mean"):
                row = _simulated(
                    rows, "k2v2", task=task, metric=metric, protocol=protocol, model=model,
                    method=method,
                )  # fmt: skip
                cells.append(_number(row, factor, digits))
        if any(cells):
            bits = next(row["bits"] for row in text_rows if row["method"] == method)
            found.append([_named(method), bits, *cells])
    head = ["method", "bits", "text KL, 10⁻³ nats", "… outliers", "chains intact, %", "… outliers",
            "lines found, %", "… outliers"]  # fmt: skip
    return markdown(head, found)


def variants(rows: Rows) -> str:
    """A line per variant: text KL at two presets and intact chains, plain and with outliers."""
    names = list(dict.fromkeys(row["method"] for row in rows))
    found = []
    for method in names:
        cells = [next(row["bits"] for row in rows if row["method"] == method)]
        for preset in ("k2v2", "k4v4"):
            for model in ("plain", "outliers_mean"):
                row = _find(rows, task="text", metric="kl", model=model, method=method,
                            preset=preset, cache="simulated")  # fmt: skip
                cells.append(_number(row, 1e3, 2))
        for model in ("plain", "outliers_mean"):
            row = _find(rows, task="chase", metric="intact", model=model, method=method,
                        preset="k2v2", cache="simulated")  # fmt: skip
            cells.append(_number(row, 100, 0))
        found.append([method, *cells])
    head = ["encoder", "bits at k2v2", "k2v2 KL", "… outliers", "k4v4 KL", "… outliers",
            "k2v2 chains, %", "… outliers"]  # fmt: skip
    return markdown(head, found)


def tails(*runs: Rows) -> str:
    """KL by `tail_tokens`."""
    lines = []
    for tail, rows in zip((0, 32, 64, 128), runs, strict=True):
        cells = [
            _number(_find(rows, metric=metric, preset=preset, cache="packed"), factor, 2)
            for preset in ("k2v2", "k4v2")
            for metric, factor in (("kl", 1e3), ("delta_loss", 1e3))
        ]
        lines.append([str(tail), *cells])
    head = ["tail_tokens", "k2v2 KL", "k2v2 Δloss", "k4v2 KL", "k4v2 Δloss"]
    return markdown(head, lines)


def accumulation(rows: Rows) -> str:
    """Error of attention outputs in the first and last layer: static, accumulated, their split."""
    layers = sorted({int(row["layer"]) for row in rows})
    lines = []
    for method in METHODS:
        cells = []
        for layer in (layers[0], layers[-1]):
            for kind in ("static", "accumulated"):
                found = [row for row in rows if row["method"] == method and row["error"] == kind
                         and int(row["layer"]) == layer]  # fmt: skip
                if not found:
                    continue
                magnitude = sum(float(row["magnitude"]) for row in found) / len(found)
                direction = sum(float(row["direction"]) for row in found) / len(found)
                share = magnitude / (magnitude + direction)
                cells.append(f"{1e3 * (magnitude + direction):.1f} ({100 * share:.1f} %)")
        if cells:
            lines.append([method, *cells])
    head = ["method"] + [f"layer {n}, {kind}" for n in (layers[0], layers[-1])
                         for kind in ("static", "accumulated")]  # fmt: skip
    return markdown(head, lines)
