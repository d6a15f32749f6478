"""Write what becomes of each form of attention into docs/lowering.md.

    python tests/lowering/stages_table.py           rewrite what stands between the markers
    python tests/lowering/stages_table.py --check   exit code 1 if the page says something else

The forms are those of `forms.py`. Each goes through the stages for real: the graph that Dynamo
makes of it, the passes of `PRE_GRAD`, and the functional graph that AOTAutograd makes of both. The
before and after of each pass are those of its docstring.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from functorch.compile import make_boxed_func  # noqa: E402
from markdown_table import markdown  # noqa: E402
from torch._dynamo.backends.common import aot_autograd  # noqa: E402

from kvarn_ops import KVCache  # noqa: E402
from kvarn_ops.lowering import pipeline, record  # noqa: E402
from kvarn_ops.lowering.graph import count_ops  # noqa: E402
from kvarn_ops.lowering.stage import Stage  # noqa: E402
from tests.lowering import forms  # noqa: E402

PAGE = ROOT / "docs" / "lowering.md"
MARKED = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
HEADS, KV_HEADS, DIM, SLOTS = 4, 2, 32, 64

Form = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Layer(nn.Module):
    """Stores a token and attends to what `KVCache.update` returns, in one form."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.cache = KVCache(1, KV_HEADS, DIM, SLOTS, "k4v2_g32", num_sink_tokens=8)
        self.form = form

    def forward(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        mask = torch.arange(SLOTS)[None, None, None] <= position[:, None]
        return self.form(q, *self.cache.update(k, v, input_pos=position), mask)


def outcome(form: Form) -> list[str]:
    """Cells: Dynamo's graph, after PRE_GRAD, after AOTAutograd."""
    cells: list[str] = []

    def functional(module: torch.fx.GraphModule, inputs: Any) -> Any:
        ops = count_ops(module.graph)
        cells.append("dense copy" if ops["kvarn::dequantize"] else "packed")
        return make_boxed_func(module.forward)

    def compiler(module: torch.fx.GraphModule, inputs: Any) -> Any:
        cells.append("dense copy" if count_ops(module.graph)["kvarn::dequantize"] else "packed")
        Stage("pre_grad", pipeline.PRE_GRAD)(module.graph)
        module.recompile()
        found = record.recorded()[-1]
        reason = found.refusals[0].reason if found.refusals else "no pass knows this form"
        left = count_ops(module.graph)["kvarn::dequantize"]
        cells.append(f"refused: {reason}" if left else "**packed**")
        return aot_autograd(fw_compiler=functional)(module, inputs)

    torch.compiler.reset()
    record.clear()
    q, k, v = torch.randn(1, HEADS, 1, DIM), *torch.randn(2, 1, KV_HEADS, 1, DIM)
    with torch.no_grad():
        layer = Layer(form).eval()
        torch.compile(layer, backend=compiler, fullgraph=True)(q, k, v, torch.tensor([0]))
    return cells


def form_table() -> str:
    """One line per form: those that are fused, then the near misses."""
    every = [*forms.FUSED.values(), *forms.REFUSED]
    head = ["form", "Dynamo's graph", "after `PRE_GRAD`", "after AOTAutograd"]
    return markdown(head, [[f"`{form.__name__}`", *outcome(form)] for form in every])


def pass_sections() -> str:
    """Docstring of every pass, with the graph before and after, in the order of the pipeline."""
    text = []
    for stage in ("PRE_GRAD", "POST_GRAD", "FINAL"):
        for one in getattr(pipeline, stage):
            kind = type(one)
            about, before, after = parts_of(inspect.getdoc(kind) or "", kind.__name__)
            file = f"../lowering/{kind.__module__.rpartition('.')[2]}.py"
            link = f"[{Path(file).name}]({file})"
            text.append(f"### {kind.__name__} (`{stage}`, {link})\n\n{about}\n")
            text.append(f"```\nBefore:{before}\nAfter:{after}\n```\n")
    return "\n".join(text)


def parts_of(doc: str, name: str) -> tuple[str, str, str]:
    """What a pass does, and the graph before and after."""
    match = re.fullmatch(r"(.*?)\n+Before:(.*?)\nAfter:(.*)", doc, re.DOTALL)
    if match is None:
        raise SystemExit(f"the docstring of {name} needs `Before:` and `After:`, in this order")
    return match[1].rstrip(), match[2].rstrip(), match[3].rstrip()


BLOCKS = {"forms": form_table, "passes": pass_sections}


def filled_in(page: str) -> str:
    """The page with everything between its markers made anew."""
    return MARKED.sub(lambda m: f"{m[1]}{BLOCKS[m[2]]()}{m[3]}", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    old = PAGE.read_text(encoding="utf-8")
    new = filled_in(old)
    if args.check and new != old:
        print(f"{PAGE}: not what the code does, run {Path(__file__).relative_to(ROOT)}")
        raise SystemExit(1)
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
