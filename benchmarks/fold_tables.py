"""The tables of docs/fold_rotation.md, from the rows of its three CSV files."""

from __future__ import annotations

from statistics import mean

from markdown_table import markdown

__all__ = ["families", "quality", "speed"]

Rows = list[dict[str, str]]
_FOLDS = {
    "off": "not folded",
    "on": "folded: equalized and rotated by weights",
    "on, rotation": "folded, without the factors (for comparison)",
}


def families(rows: Rows) -> str:
    """One sentence of counts over all families with packed layers."""
    packed = [row for row in rows if int(row["packed"])]
    whole = [row for row in packed if row["folded"] == row["packed"]]
    none = [row for row in packed if row["folded"] == "0"]
    folded = [row for row in packed if row["folded"] != "0"]
    changes = sorted(float(row["dense_change"]) for row in folded)
    cached = sorted(float(row["cached_change"]) for row in folded)
    undone = sum(row["undone"] == "True" for row in packed)
    version = rows[0]["transformers"]
    middle = len(folded) // 2
    return (
        f"Of {len(packed)} families of transformers {version} with packed layers (tiny random "
        f"models that run on token ids alone, {rows[0]['date'].split()[0]}), {len(whole)} are "
        f"folded in all layers, {len(packed) - len(whole) - len(none)} in some and {len(none)} in "
        f"none. Outputs of folded ones change by {changes[middle]:.0e} in the median and "
        f"{changes[-1]:.0e} at most without a KVarN cache, by {cached[middle]:.0e} and "
        f"{cached[-1]:.0e} with an 8-bit one. Outputs after `unpatch` are bit-equal in {undone} of "
        f"{len(packed)}.\n"
    )


def quality(rows: Rows) -> str:
    """A line per way of folding; outlier variants are averaged."""

    def cell(fold: str, task: str, preset: str, plain: bool) -> str:
        found = [
            float(row["value"])
            for row in rows
            if (row["fold_rotation"], row["task"], row["preset"]) == (fold, task, preset)
            and (row["model"] == "plain") is plain
        ]
        factor, digits = (1e3, 2) if task == "text" else (100, 0)
        return f"{factor * mean(found):.{digits}f}" if found else ""

    lines = [
        [name]
        + [cell(f, "text", p, plain) for p in ("k2v2", "k4v2") for plain in (True, False)]
        + [cell(f, "chains", "k2v2", plain) for plain in (True, False)]
        for f, name in _FOLDS.items()
    ]
    head = ["`plus`", "k2v2 text KL, 10⁻³ nats", "… outliers", "k4v2 KL", "… outliers",
            "k2v2 chains intact, %", "… outliers"]  # fmt: skip
    return markdown(head, lines)


def speed(rows: Rows) -> str:
    """A line per context and form; the ratio is without folding over with it."""
    by_key = {(row["context"], row["form"], row["folded"]): row for row in rows}
    lines = []
    for (context, form, folded), row in by_key.items():
        if folded == "True":
            plain = by_key[context, form, "False"]
            lines.append([context, form, plain["step_ms"], row["step_ms"], row["gain"],
                          row["prefill_gain"] or "not measured"])  # fmt: skip
    head = ["context", "form", "ms per step", "folded", "gain", "gain of a prefill of 640 tokens"]
    return markdown(head, lines)
