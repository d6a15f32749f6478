"""Draw the pictures of docs/benchmarks.md from the CSV files; nothing is measured.

python benchmarks/plot.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

from kvarn_ops.benchmark.plots import plot_decode_attention, save
from kvarn_ops.benchmark.results import measured
from kvarn_ops.demo.plots import plot_quality
from kvarn_ops.demo.report import Row
from kvarn_ops.figures import COLORS, new_figure

HERE = Path(__file__).resolve().parent
Rows = list[dict[str, str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "images")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, draw in PLOTS.items():
        path = args.results / f"{name}_cpu.csv"
        if rows := measured(path):
            draw(args.out / f"{name}.png", rows)
        else:
            print(f"{path} has no run of this version: no picture of it")


def attention(path: Path, rows: Rows) -> None:
    """The default preset over shapes; the other presets are in the table."""
    plot_decode_attention(path, [row for row in rows if row["preset"] == "k4v2"])


def model_decode(path: Path, rows: Rows) -> None:
    """Tokens per second, a bar per cache with its bytes, a panel per context."""
    contexts = sorted({int(row["context"]) for row in rows})
    figure, panels = new_figure(columns=len(contexts))
    for axes, context in zip(panels, contexts, strict=True):
        shown = [row for row in rows if int(row["context"]) == context][::-1]
        speeds = [float(row["tokens_per_s"]) for row in shown]
        colors = [
            COLORS[1 if "kvarn" in row["cache"] else 0 if "dense" in row["cache"] else 2]
            for row in shown
        ]
        bars = axes.barh([row["cache"] for row in shown], speeds, color=colors)
        sizes = [f"{int(row['bytes']) / 2**20:.1f} MiB" for row in shown]
        axes.bar_label(bars, sizes, padding=4, fontsize=8)
        axes.set_xlim(right=1.25 * max(speeds))
        axes.set_xlabel("tokens per second, quantizing steps counted")
        axes.set_title(f"{context:,} tokens", fontsize=10)
    save(figure, panels, path, "Whole-model decode, and the bytes of the cache", rows[-1])


def encode(path: Path, rows: Rows) -> None:
    """Share of the decode time that encoding takes, against the context."""
    threads = sorted({row["threads"] for row in rows}, key=int)
    figure, panels = new_figure(columns=len(threads))
    for axes, count in zip(panels, threads, strict=True):
        kinds = list(
            dict.fromkeys((row["encoder"], row["preset"], row["head_dim"]) for row in rows)
        )
        for index, kind in enumerate(kinds):
            points = sorted(
                (int(row["context"]), 100 * float(row["share"]))
                for row in rows
                if (row["encoder"], row["preset"], row["head_dim"]) == kind
                and row["threads"] == count
            )
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=4,
                          color=COLORS[index % len(COLORS)],
                          linestyle="--" if kind[0] == "paper" else "-",
                          label=f"{kind[0]}, {kind[1]}, head_dim {kind[2]}")  # fmt: skip
        axes.set_xscale("log", base=2)
        contexts = sorted({int(row["context"]) for row in rows})
        axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens in the cache")
        axes.set_title(f"threads: {count}", fontsize=10)
    panels[0].set_ylabel("encode a tile / decode its 128 tokens, %")
    save(figure, panels, path, "What quantizing costs: lower is better", rows[-1])


def demo_peers(path: Path, rows: Rows) -> None:
    """KL against bits, with the peers in it."""
    numbers = [{k: float(v) for k, v in row.items() if k != "method" and v} for row in rows]
    table = [Row(row["method"], **found) for row, found in zip(rows, numbers, strict=True)]  # type: ignore[arg-type]
    plot_quality(path, table, None, "byte model of 3.8 M parameters, 8 windows of 2048 bytes")


PLOTS = {
    "decode_attention": attention,
    "model_decode": model_decode,
    "encode": encode,
    "demo_peers": demo_peers,
}


if __name__ == "__main__":
    main()
