"""The table of docs/export.md that comes from a CSV file."""

from __future__ import annotations

from markdown_table import markdown

STEPS = "exported_steps_cpu.csv"


def steps(rows: list[dict[str, str]]) -> str:
    """Milliseconds of the prompt, of a token and of the whole text, by form."""
    lines = [[row["form"], row["prompt_ms"], row["token_ms"], row["whole_ms"]] for row in rows]
    first = rows[0]
    head = ["", f"prompt of {first['prompt_tokens']}, ms", "each token, ms"]
    return markdown([*head, f"prompt and {first['tokens']} tokens, ms"], lines)
