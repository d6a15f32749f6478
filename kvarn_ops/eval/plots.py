"""Pictures of an evaluation. Everything is drawn from the rows of its tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..figures import color, finish, marker, new_figure
from .report import OUTLIERS_MEAN

__all__ = ["draw"]

Row = dict[str, str]

_NOTHING_QUANTIZED = 1e-8  # KL of positions before the first tile is read: rounding
_ALWAYS_SHOWN = ("paper", "plus")  # these keep their colours whatever else is drawn


def draw(
    out: Path, summary: list[Row], positions: list[Row], layers: list[Row], note: str = ""
) -> None:
    """Draw every picture for which there are rows."""
    # Every error of a prefill is 0.
    simulated = [r for r in summary if r["cache"] == "simulated" and r["protocol"] != "prefill"]
    positions = [r for r in positions if r["cache"] == "simulated" and r["protocol"] != "prefill"]
    methods = _ordered(simulated + layers) or ["none"]
    text = [row for row in simulated if row["task"] == "text" and row["metric"] == "kl"]
    if text:
        _quality_against_bits(out / "quality_vs_bits.png", text, methods, note)
    if positions:
        _error_against_position(out / "error_vs_position.png", positions, methods, note)
    intact = [row for row in simulated if row["metric"] == "intact"]
    if intact:
        _intact_answers(out / "intact_answers.png", intact, methods, note)
    if layers:
        _error_by_layer(out / "error_by_layer.png", layers, methods, note)
        _static_and_accumulated(out / "static_vs_accumulated.png", layers, methods, note)


def _ordered(rows: list[Row]) -> list[str]:
    names = list(dict.fromkeys(row["method"] for row in rows if row["method"] != "none"))
    return [n for n in names if n not in _ALWAYS_SHOWN] + [n for n in _ALWAYS_SHOWN if n in names]


def _style(methods: list[str], method: str) -> dict[str, Any]:
    index = methods.index(method)
    if method in _ALWAYS_SHOWN:
        own = _ALWAYS_SHOWN.index(method)
        return {"color": color(own), "marker": marker(own), "linewidth": 2.0, "zorder": 3}
    shade = ("#009E73", "#CC79A7", "#B8860B", "#E69F00", "#56B4E9", "#7F7F7F", "#000000")
    return {
        "color": shade[index % len(shade)],
        "marker": marker(index + 2),
        "linewidth": 1.1,
        "alpha": 0.85,
    }


def _presets(rows: list[Row]) -> list[str]:
    """Presets in order; "-" alone if no method depends on bits."""
    return [p for p in dict.fromkeys(row["preset"] for row in rows) if p != "-"] or ["-"]


def _variants(rows: list[Row]) -> list[str]:
    known = {row["model"] for row in rows}
    return [name for name in ("plain", OUTLIERS_MEAN) if name in known]


def _quality_against_bits(path: Path, rows: list[Row], methods: list[str], note: str) -> None:
    protocol = "decode" if any(row["protocol"] == "decode" for row in rows) else "pseudo"
    variants = _variants(rows)
    figure, panels = new_figure(columns=len(variants))
    for axes, variant in zip(panels, variants, strict=True):
        for method in methods:
            points = sorted(
                (float(row["bits"]), float(row["value"]), float(row["standard_error"]))
                for row in rows
                if (row["method"], row["model"], row["protocol"]) == (method, variant, protocol)
            )
            if points:
                bits, values, errors = zip(*points, strict=True)
                axes.errorbar(
                    bits, values, yerr=errors, capsize=3, label=method, **_style(methods, method)
                )
        axes.set_yscale("log")
        axes.set_xlabel("bits per element of a quantized tile, scales included")
        axes.set_title("plain model" if variant == "plain" else "outlier channels, mean of "
                       "placements", fontsize=10)  # fmt: skip
    panels[0].set_ylabel("KL(dense ‖ quantized), nats per token")
    finish(figure, panels, path, f"Quality against bits: text, protocol {protocol}", note)


def _error_against_position(path: Path, rows: list[Row], methods: list[str], note: str) -> None:
    protocol = "decode" if any(row["protocol"] == "decode" for row in rows) else "pseudo"
    presets = _presets(rows)[:2]
    figure, panels = new_figure(columns=len(presets))
    for axes, preset in zip(panels, presets, strict=True):
        for method in methods:
            points = [
                (int(row["position"]), float(row["kl"]))
                for row in rows
                if row["method"] == method
                and float(row["kl"]) > _NOTHING_QUANTIZED
                and row["preset"] in (preset, "-")
                and (row["model"], row["protocol"]) == ("plain", protocol)
            ]
            if points:
                style = _style(methods, method) | {"marker": "", "label": method}
                axes.plot(*zip(*points, strict=True), **style)
        axes.set_yscale("log")
        axes.set_xlabel("position: tokens in the cache")
        axes.set_title(preset, fontsize=10)
    panels[0].set_ylabel("KL(dense ‖ quantized), nats per token")
    finish(figure, panels, path, f"Error against position, plain model, protocol {protocol}", note)


def _intact_answers(path: Path, rows: list[Row], methods: list[str], note: str) -> None:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    presets = _presets(rows)[:2]
    figure, panels = new_figure(
        columns=len(presets), rows=len(tasks), size=(13, 1 + 4 * len(tasks))
    )
    names = ["none", *methods]
    for index, axes in enumerate(panels):
        task, preset = tasks[index // len(presets)], presets[index % len(presets)]
        for offset, variant in enumerate(_variants(rows)):
            found = {
                row["method"]: row
                for row in rows
                if (row["task"], row["model"]) == (task, variant) and row["preset"] in (preset, "-")
            }
            shown = [name for name in names if name in found]
            axes.bar(
                [names.index(name) + 0.4 * offset - 0.2 for name in shown],
                [float(found[name]["value"]) for name in shown],
                yerr=[float(found[name]["standard_error"]) for name in shown],
                width=0.38,
                capsize=2,
                color=color(0 if offset == 0 else 4),
                label="plain" if variant == "plain" else "outlier channels, mean of placements",
            )
        axes.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)
        axes.set_ylim(0, 1.05)
        axes.set_title(f"{task}, {preset}", fontsize=10)
        axes.set_ylabel("share of intact answers")
    finish(figure, panels, path, "Free running: share of answers without an error", note, grid="y")


def _error_by_layer(path: Path, rows: list[Row], methods: list[str], note: str) -> None:
    """Heat map: accumulated error of attention outputs, layers against methods."""
    preset = _presets(rows)[0]
    wanted = [
        row
        for row in rows
        if row["preset"] in (preset, "-")
        and (row["model"], row["error"]) == ("plain", "accumulated")
    ]
    layers = sorted({int(row["layer"]) for row in wanted})
    parts = ("magnitude", "direction")
    figure, panels = new_figure(columns=2, size=(13, 1.5 + 0.42 * len(methods)))
    from matplotlib.colors import LogNorm

    table = {
        part: [[_layer_mean(wanted, method, layer, part) for layer in layers] for method in methods]
        for part in parts
    }
    everything = [value for part in parts for line in table[part] for value in line if value > 0]
    norm = LogNorm(min(everything), max(everything))
    image = None
    for axes, part in zip(panels, parts, strict=True):
        image = axes.imshow(table[part], aspect="auto", cmap="viridis", norm=norm)
        axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
        axes.set_yticks(range(len(methods)), methods)
        axes.set_xlabel("layer")
        axes.set_title(f"wrong {part}", fontsize=10)
        for line, values in enumerate(table[part]):
            for column, value in enumerate(values):
                shade = "black" if value > (norm.vmax * norm.vmin) ** 0.5 else "white"
                axes.text(column, line, f"{value:.1e}", ha="center", va="center", fontsize=7,
                          color=shade)  # fmt: skip
    figure.colorbar(image, ax=panels, label="squared error / squared norm")
    title = f"Accumulated error of attention outputs by layer, plain model, {preset}"
    finish(figure, panels, path, title, note, grid="")


def _layer_mean(rows: list[Row], method: str, layer: int, part: str) -> float:
    values = [
        float(row[part]) for row in rows if row["method"] == method and int(row["layer"]) == layer
    ]
    return sum(values) / len(values)


def _static_and_accumulated(path: Path, rows: list[Row], methods: list[str], note: str) -> None:
    """Error of the last layer's attention output by quarter of the context, both kinds."""
    preset = _presets(rows)[0]
    last = str(max(int(row["layer"]) for row in rows))
    kinds = ("static", "accumulated")
    figure, panels = new_figure(columns=2)
    for axes, kind in zip(panels, kinds, strict=True):
        for method in methods:
            points = [
                ((int(row["from"]) + int(row["to"])) / 2,
                 float(row["magnitude"]) + float(row["direction"]))
                for row in rows
                if (row["method"], row["model"], row["error"], row["layer"])
                == (method, "plain", kind, last)
                and row["preset"] in (preset, "-")
            ]  # fmt: skip
            if points:
                axes.plot(*zip(*points, strict=True), label=method, **_style(methods, method))
        axes.set_yscale("log")
        axes.set_xlabel("position: tokens in the cache")
        axes.set_title(kind, fontsize=10)
    panels[0].set_ylabel("squared error / squared norm of attention output")
    title = f"Error of the last layer's attention output, plain model, {preset}"
    finish(figure, panels, path, title, note)
