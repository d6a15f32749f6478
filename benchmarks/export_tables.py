"""The table of docs/export.md that comes from a CSV file."""

from __future__ import annotations

from markdown_table import markdown

STEPS = "exported_steps_cpu.csv"


def steps(rows: list[dict[str, str]]) -> str:
    """Milliseconds of the prompt, of a token and of the whole text, by form."""
    names = ("form", "prompt_ms", "token_ms", "minimum_ms", "whole_ms")
    tokens, text = rows[0]["prompt_tokens"], rows[0]["tokens"]
    head = ["ms", f"prompt of {tokens}", "each token", "in the fastest round"]
    head.append(f"prompt and {text} tokens")
    return markdown(head, [[row[name] for name in names] for row in rows])
