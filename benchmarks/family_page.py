"""docs/models.md and kvarn_ops/families.py, written from the rows of model_families.csv."""

from __future__ import annotations

import re
from collections.abc import Callable

__all__ = ["page", "supported", "supported_module"]

Row = dict[str, str]

_INTRO = """# Models

Every decoder that transformers {transformers} knows, as a tiny model with random weights, patched
with `k8v8_g32` and compared with the same model unpatched. `python benchmarks/model_families.py`
writes this page from [model_families.csv](../benchmarks/results/model_families.csv).

What a family has to pass to be listed as **works**; otherwise the run fails:

- Logits of a prefill, a chunk and 48 single tokens; sliding windows are crossed on the way. Before
  the first tile is full the cache is exact and the error below {exact}; with 8-bit tiles it stays
  below {close} of the norm of the logits, and above zero where layers are packed.
- Greedy `generate` of a left-padded batch: equal tokens up to near ties, logits as close as above.
- Without a KVarN cache, with a `DynamicCache`, and after `unpatch`: bit-equal to the unpatched
  model.
- The bytes per token that `explain` promises are those of the cache.

Models that also read images or sound are compared on text alone. Real checkpoints have other sizes:
a head_dim that cannot be packed, or keys and values of different widths, are refused when you
patch. Quality at 2 to 4 bits is not what this page is about.

torch {torch}, transformers {transformers}, one CPU thread, {date}.
"""


def page(rows: list[Row]) -> str:
    """The text of docs/models.md."""
    from check_family import CLOSE, EXACT

    dates = sorted(row["date"][:10] for row in rows)
    parts = [
        _INTRO.format(
            exact=f"{EXACT:g}",
            close=f"{CLOSE:g}",
            torch=_one(rows, "torch"),
            transformers=_one(rows, "transformers"),
            date=dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}",
        )
    ]
    makers: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
        "works": ("Works", _works),
        "dense by design": ("Nothing to pack", _dense),
        "refused": ("Refused", _by_sentence),
        "WRONG": ("Wrong: bugs of this package", _by_sentence),
        "CRASH": ("Crashes: bugs of this package", _by_sentence),
        "not built": ("Not compared", _by_sentence),
    }
    for outcome, (title, make) in makers.items():
        chosen = [row for row in rows if row["outcome"] == outcome]
        if chosen:
            parts.append(f"## {title} ({len(chosen)})\n\n{make(chosen)}")
    return "\n".join(parts)


def supported(rows: list[Row]) -> list[str]:
    """Model types that work as what their checkpoints are: see `Outcome.note`."""
    works = [row["family"] for row in rows if row["outcome"] == "works" and not row["note"]]
    return sorted({name.split(",")[0] for name in works})


def supported_module(rows: list[Row]) -> str:
    """The source of kvarn_ops/families.py."""
    lines = "".join(f'    "{name}",\n' for name in supported(rows))
    return (
        '"""Model types of transformers that pass the comparison of docs/models.md.\n\n'
        'Written by benchmarks/model_families.py; do not edit.\n"""\n\n'
        f"TESTED_FAMILIES: tuple[str, ...] = (\n{lines})\n"
    )


def _works(rows: list[Row]) -> str:
    lines = [
        "`packed` and `dense` are layers of the tiny model: each kind of layer that the family has "
        "is there.\nDense ones are sliding, chunked, linear or have no attention.\n\n",
        "| model type | class | packed | dense | error with 8 bits | remark |\n",
        "|---|---|---|---|---|---|\n",
    ]
    for row in rows:
        cells = [row["family"], row["class"], row["packed"], row["dense"], row["error_packed"]]
        lines.append(f"| {' | '.join([*cells, row['note']])} |\n")
    return "".join(lines)


def _dense(rows: list[Row]) -> str:
    text = (
        "All layers are sliding, chunked or linear with the defaults of their configs: `patch`\n"
        "accepts the model and says that no layer is packed.\n\n"
    )
    return text + "".join(f"- {row['family']}: {row['note']}\n" for row in rows)


def _by_sentence(rows: list[Row]) -> str:
    """Families under the sentence that `patch` raises for them."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        sentence = re.sub(rf"\b{re.escape(row['class'])}\b", "*Model*", row["note"])
        sentence = re.sub(r" \(\w+, layer \d+\)| \(layer \d+, \w+\)", "", sentence)
        sentence = re.sub(r"layer \d+", "layer *n*", sentence)
        groups.setdefault(_escaped(sentence), []).append(row["family"])
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[1]))
    return "".join(f"- {sentence}\n  **{', '.join(names)}**\n" for sentence, names in ordered)


def _escaped(text: str) -> str:
    return text.replace("<", "&lt;").replace("|", "\\|")


def _one(rows: list[Row], column: str) -> str:
    return ", ".join(sorted({row[column] for row in rows}))
