"""Write the tables of docs/*.md and README.md from the CSV files.

    python benchmarks/tables.py           rewrite what stands between the markers
    python benchmarks/tables.py --check   exit code 1 if a page does not say what the CSV says

A table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import evaluation_tables as evaluated
import export_tables as exported
import fold_tables as folding
from markdown_table import markdown

from kvarn_ops.benchmark.results import measured
from kvarn_ops.tables import with_error

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
DOCS = HERE.parent / "docs"
PAGES = [
    DOCS / "benchmarks.md",
    DOCS / "evaluation.md",
    DOCS / "export.md",
    DOCS / "fold_rotation.md",
    DOCS / "kernels.md",
    DOCS / "modules.md",
    HERE.parent / "README.md",
]
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
Rows = list[dict[str, str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, action="append", help="default: all pages")
    args = parser.parse_args()
    differing = []
    for page in args.page or PAGES:
        old = page.read_text(encoding="utf-8")
        new = filled_in(old, args.results)
        if new != old:
            differing.append(str(page))
            if not args.check:
                page.write_text(new, encoding="utf-8")
    if args.check and differing:
        print(f"{', '.join(differing)}: not what {args.results} says, run benchmarks/tables.py")
        raise SystemExit(1)


def filled_in(page: str, results: Path) -> str:
    """The page with every table made anew from the CSV files of a folder."""

    def table(match: re.Match[str]) -> str:
        files, make = TABLES[match[2]]
        found = [measured(results / name) for name in files]
        missing = [name for name, rows in zip(files, found, strict=True) if not rows]
        body = make(*found) if not missing else f"No run yet: {', '.join(missing)}.\n"
        return f"{match[1]}{body}{match[3]}"

    return MARKED.sub(table, page)


def picture(name: str, says: str) -> Callable[[Rows], str]:
    """A link to what `plot.py` draws from the same rows."""
    return lambda rows: f"![{says}](images/{name}.png)\n"


def kilo(tokens: str | int) -> str:
    """`4K` of 4096."""
    return f"{int(tokens) // 1024}K" if int(tokens) % 1024 == 0 else str(tokens)


def conditions(rows: Rows) -> str:
    """One line per set of conditions: a file may hold runs with different numbers of threads."""
    lines = {}
    for row in rows:
        where = (
            f"{row['device']}, threads: {row['threads']}; torch {row['torch']}, transformers "
            f"{row['transformers']}, kvarn_ops {row['kvarn_ops']}"
        )
        lines.setdefault(where, []).append(row)
    text = []
    for where, group in lines.items():
        dates = sorted({row["date"].split()[0] for row in group})
        spreads = sorted(float(row["spread"]) for row in group if row.get("spread"))
        line = f"- {where}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}"
        line += f"; load at the start {group[0]['load']}"
        if spreads:
            middle, worst = spreads[len(spreads) // 2], spreads[-1]
            line += f"; spread of the rounds {middle:.0%} in the middle row, {worst:.0%} at worst"
        text.append(line + "\n")
    return "".join(text)


def decode_attention(rows: Rows) -> str:
    """Ratio to dense by shape, and to the packed form in brackets."""
    contexts = sorted({int(row["context"]) for row in rows})
    cells: dict[tuple[str, ...], dict[int, str]] = {}
    for row in rows:
        key = row["preset"], row["batch"], f"{row['q_heads']}/{row['kv_heads']}", row["head_dim"]
        ratio = f"{float(row['speedup']):.2f}"
        shown = f"**{ratio}**" if float(row["speedup"]) >= 1 else ratio
        text = f"{shown} ({float(row['speedup_over_packed_gqa']):.2f})"
        cells.setdefault(key, {})[int(row["context"])] = text
    head = ["preset", "batch", "heads", "head_dim", *map(kilo, contexts)]
    return markdown(head, [[*key, *(by.get(n, "") for n in contexts)] for key, by in cells.items()])


def decode_attention_default(rows: Rows) -> str:
    """The same for the default preset alone."""
    return decode_attention([row for row in rows if row["preset"] == "k4v2"])


def decode_attention_times(rows: Rows) -> str:
    lines = [
        [
            row["preset"],
            row["batch"],
            f"{row['q_heads']}/{row['kv_heads']}",
            row["head_dim"],
            kilo(row["context"]),
            *(f"{float(row[name + '_ms']):.3f}" for name in ("kvarn_compiled", "kvarn_eager",
                                                            "dense_bf16",
                                                            "dense_bf16_packed_gqa")),
        ]
        for row in rows
    ]  # fmt: skip
    head = ["preset", "batch", "heads", "head_dim", "tokens", "KVarN compiled", "KVarN eager",
            "dense", "dense, packed GQA"]  # fmt: skip
    return markdown(head, lines)


def model_decode(rows: Rows) -> str:
    lines = []
    for row in rows:
        promise = "exact" if row["promised_bytes"] == row["bytes"] else ""
        if row["promised_bytes"] and not promise:
            promise = f"promised {row['promised_bytes']}"
        lines.append(
            [
                kilo(row["context"]),
                row["cache"],
                f"{float(row['tokens_per_s']):.1f}",
                f"{float(row['step_ms']):.1f}",
                f"{float(row['flush_ms']):.1f}" if row["flush_ms"] else "-",
                f"{int(row['bytes']) / 2**20:.2f}",
                f"{float(row['times_smaller']):.2f}",
                promise or "-",
                f"{float(row['fill_ms']):,.0f}",
            ]
        )
    head = ["context", "cache", "tokens/s", "median step, ms", "quantizing step, ms", "MiB",
            "times smaller", "bytes as promised", "fill, ms"]  # fmt: skip
    return markdown(head, lines)


def model_decode_long(rows: Rows) -> str:
    """The longest context, without the columns that need an explanation."""
    longest = max(int(row["context"]) for row in rows)
    lines = [
        [
            row["cache"],
            f"{float(row['tokens_per_s']):.1f}",
            f"{int(row['bytes']) / 2**20:.1f}",
            f"{float(row['times_smaller']):.2f}",
        ]
        for row in rows
        if int(row["context"]) == longest
    ]
    return markdown(["cache", "tokens/s", "MiB", "times smaller"], lines)


def encode(rows: Rows) -> str:
    contexts = sorted({int(row["context"]) for row in rows})
    cells: dict[tuple[str, ...], dict[int, dict[str, str]]] = {}
    for row in rows:
        key = row["threads"], row["preset"], row["encoder"], row["head_dim"]
        cells.setdefault(key, {})[int(row["context"])] = row
    lines = []
    for key, by in cells.items():
        append = max(float(row["append_ms"]) for row in by.values())
        shares = [f"{100 * float(by[n]['share']):.1f} %" if n in by else "" for n in contexts]
        lines.append([*key, f"{append:.2f}", *shares])
    head = ["threads", "preset", "encoder", "head_dim", "append with encode, ms",
            *map(kilo, contexts)]  # fmt: skip
    return markdown(head, lines)


def peers_quality(rows: Rows) -> str:
    lines = []
    for row in rows:
        dense = row["method"] == "dense"
        kl = "0" if dense else with_error(1e3 * float(row["kl"]), 1e3 * float(row["kl_se"]))
        delta = with_error(100 * float(row["delta"]), 100 * float(row["delta_se"]), signed=True)
        lines.append(
            [
                row["method"],
                f"{int(row['cache_bytes']) / 2**20:.2f}",
                f"{float(row['compression']):.2f}",
                f"{float(row['tokens_per_second']):,.0f}",
                kl,
                f"{100 * float(row['accuracy']):.2f}" if dense else delta,
            ]
        )
    head = ["cache", "MiB", "times smaller", "tokens/s", "KL to dense, 10⁻³ nats",
            "next-byte accuracy minus dense, %"]  # fmt: skip
    return markdown(head, lines)


def targets(attention: Rows, model: Rows) -> str:
    """What was aimed at, and whether this run has it."""
    goal = {"preset": "k4v2", "batch": "1", "q_heads": "16", "kv_heads": "4", "head_dim": "128",
            "context": "16384"}  # fmt: skip
    found = [float(row["speedup"]) for row in attention if goal.items() <= row.items()]
    text = "batch 1, 16/4 heads of 128, 16K tokens: dense bf16 SDPA time / KVarN time"
    lines = [_target(f"decode attention, {text}", 1.0, found[0] if found else None)]
    speed = {row["cache"]: float(row["tokens_per_s"]) for row in model if row["context"] == "8192"}
    ours = speed.get("kvarn k4v2, compiled")
    for other, least in (("dense static", 1.0), ("quanto4", 2.2)):
        ratio = ours / speed[other] if ours and other in speed else None
        text = f"whole model, 8K tokens: KVarN tokens/s / {other} tokens/s"
        lines.append(_target(text, least, ratio))
    return markdown(["target", "at least", "measured", ""], lines)


def _target(text: str, least: float, measured: float | None) -> list[str]:
    if measured is None:
        return [text, f"{least:.1f}", "-", "not measured"]
    return [text, f"{least:.1f}", f"{measured:.2f}", "met" if measured >= least else "**missed**"]


ATTENTION, MODEL = "decode_attention_cpu.csv", "model_decode_cpu.csv"
ENCODE, PEERS = "encode_cpu.csv", "demo_peers_cpu.csv"
FOLD_SPEED = "fold_rotation_cpu.csv"
OWN_CACHE = "own_cache_cpu.csv"
EVAL_TEXT = "eval_text_summary.csv"
EVAL_CHASE, EVAL_LINES = "eval_chase_summary.csv", "eval_lines_summary.csv"


def own_cache(rows: Rows) -> str:
    """Milliseconds per step of a model with its own cache, by how it repeats heads."""
    forms = list(dict.fromkeys(row["gqa"] for row in rows))
    steps = {(r["context"], r["cache"], r["form"], r["gqa"]): r for r in rows}
    lines = []
    for context, cache, form in dict.fromkeys((key[:3]) for key in steps):
        found = [steps[context, cache, form, gqa] for gqa in forms]
        times = [f"{float(row['step_ms']):.1f}" for row in found]
        lines.append([kilo(context), f"{cache}, {form}", *times, found[0]["mib"]])
    heads = [f"ms, `{gqa}`" for gqa in forms]
    return markdown(["context", "cache", *heads, "MiB"], lines)


def kernels_static(rows: Rows) -> str:
    """One line per kernel and config, the architectures side by side."""
    archs = list(dict.fromkeys(row["arch"] for row in rows))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        text = f"{row['registers']} · {row['spill_bytes']} · {int(row['shared_bytes']) / 1024:.0f}K"
        if row["instructions_per_code"]:
            text += f" · **{row['instructions_per_code']}**"
        cells.setdefault((row["kernel"], row["config"]), {})[row["arch"]] = text
    lines = [[*key, *(by.get(arch, "") for arch in archs)] for key, by in cells.items()]
    return markdown(["kernel", "config", *archs], lines)


TABLES: dict[str, tuple[tuple[str, ...], Callable[..., str]]] = {
    "targets": ((ATTENTION, MODEL), targets),
    "decode-attention-picture": (
        (ATTENTION,),
        picture("decode_attention", "speed against context"),
    ),
    "decode-attention-conditions": ((ATTENTION,), conditions),
    "decode-attention": ((ATTENTION,), decode_attention),
    "decode-attention-default": ((ATTENTION,), decode_attention_default),
    "decode-attention-times": ((ATTENTION,), decode_attention_times),
    "model-decode-picture": ((MODEL,), picture("model_decode", "speed and size of caches")),
    "model-decode-conditions": ((MODEL,), conditions),
    "model-decode": ((MODEL,), model_decode),
    "model-decode-long": ((MODEL,), model_decode_long),
    "encode-picture": ((ENCODE,), picture("encode", "share of encoding")),
    "encode-conditions": ((ENCODE,), conditions),
    "encode": ((ENCODE,), encode),
    "peers-quality": ((PEERS,), peers_quality),
    "eval-overview": ((EVAL_TEXT, EVAL_CHASE, EVAL_LINES), evaluated.overview),
    "eval-text": ((EVAL_TEXT,), evaluated.text),
    "eval-text-outliers": ((EVAL_TEXT,), evaluated.text_outliers),
    "eval-decode": (("eval_decode_summary.csv",), evaluated.decode),
    "eval-chase": ((EVAL_CHASE,), evaluated.chase),
    "eval-chase-outliers": ((EVAL_CHASE,), evaluated.chase_outliers),
    "eval-lines": ((EVAL_LINES,), evaluated.lines),
    "eval-lines-outliers": ((EVAL_LINES,), evaluated.lines_outliers),
    "eval-accumulation": (("eval_attention_layers.csv",), evaluated.accumulation),
    "eval-variants": (("eval_variants_summary.csv",), evaluated.variants),
    "own-cache": ((OWN_CACHE,), own_cache),
    "own-cache-conditions": ((OWN_CACHE,), conditions),
    "exported-steps": ((exported.STEPS,), exported.steps),
    "exported-steps-conditions": ((exported.STEPS,), conditions),
    "fold-families": (("fold_families.csv",), folding.families),
    "fold-quality": (("fold_quality.csv",), folding.quality),
    "fold-speed": ((FOLD_SPEED,), folding.speed),
    "fold-speed-conditions": ((FOLD_SPEED,), conditions),
    "kernels-static": (("kernels_static.csv",), kernels_static),
    "eval-tails": (
        tuple(f"eval_tail{tail}_summary.csv" for tail in (0, 32, 64, 128)),
        evaluated.tails,
    ),
}


if __name__ == "__main__":
    main()
