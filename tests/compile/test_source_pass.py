"""A changed source of ours never runs as its old compiled code, and other code is left alone."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from torch import Tensor
from torch._inductor.utils import fresh_cache, run_and_get_code

import kvarn_ops
from fresh_process import last_line, start_python
from kvarn_ops.lowering import source_pass
from tiny_models import tiny_model

PACKAGE_FOLDERS = ("kvarn_ops", "kernels", "lowering", "export")

# A decode step of one layer over packed tiles. Prints the logits' sum and the cache counters.
SCRIPT = """
import json, torch, kvarn_ops
from torch._dynamo.utils import counters
from tiny_models import random_ids, run, small_cache, tiny_model
torch.set_num_threads(1)
model = kvarn_ops.patch(tiny_model(num_hidden_layers=1), "k8v8_g32", num_sink_tokens=8)
cache = small_cache(model, 128, "k8v8_g32")
run(model, random_ids(1, 90), cache)
step = torch.compile(model, fullgraph=True)
with torch.no_grad():
    logits = step(random_ids(1, 1), past_key_values=cache, use_cache=True).logits
print(json.dumps({
    "file": kvarn_ops.__file__,
    "answer": float(logits.abs().sum()),
    "hits": counters["inductor"]["fxgraph_cache_hit"],
    "misses": counters["inductor"]["fxgraph_cache_miss"],
    "bypasses": counters["inductor"]["fxgraph_cache_bypass"],
}))
"""


@pytest.mark.slow
def test_two_processes_and_one_warm_cache(tmp_path: Path, repo_root: Path) -> None:
    package = tmp_path / "package"
    for folder in PACKAGE_FOLDERS:
        shutil.copytree(
            repo_root / folder, package / folder, ignore=shutil.ignore_patterns("__pycache__")
        )

    def fresh_process() -> dict[str, Any]:
        done = start_python(
            "-c", SCRIPT, cwd=tmp_path, path=[package, repo_root / "tests" / "helpers"],
            PYTHONDONTWRITEBYTECODE="1", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"),
        )  # fmt: skip
        result = json.loads(last_line(done))
        assert Path(result["file"]).is_relative_to(package), "another copy was imported"
        assert result["bypasses"] == 0, "the compile cache is off: nothing is tested"
        return result

    cold = fresh_process()
    assert (cold["hits"], cold["misses"]) == (0, 1)
    warm = fresh_process()
    assert (warm["hits"], warm["misses"]) == (1, 0), "the same sources missed the cache"
    assert warm["answer"] == cold["answer"]

    formula = package / "kvarn_ops" / "ops" / "formula.py"
    formula.write_text(
        formula.read_text() + "\n_tile_scores = tile_scores\n\n\n"
        "def tile_scores(*args):\n    return 2 * _tile_scores(*args)\n"
    )
    edited = fresh_process()
    assert (edited["hits"], edited["misses"]) == (0, 1), "old compiled code ran for a new source"
    assert abs(edited["answer"] - cold["answer"]) > 1e-3


# Code of others


def block(x: Tensor, weight: Tensor) -> Tensor:
    heads = (x @ weight).unflatten(-1, (4, -1)).transpose(1, 2)
    out = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    return torch.nn.functional.gelu(out.transpose(1, 2).flatten(2)) + x


def code_of_block() -> str:
    torch.compiler.reset()
    with torch.no_grad(), fresh_cache():
        _, (code,) = run_and_get_code(
            torch.compile(block), torch.randn(2, 16, 64), torch.randn(64, 64)
        )
    return re.sub(r"AOT ID: .*", "", code)  # a running number


def test_code_without_our_ops_is_the_same_with_and_without_the_pass() -> None:
    with inductor_config.patch(post_grad_custom_pre_pass=None):
        plain = code_of_block()
    with inductor_config.patch(post_grad_custom_pre_pass=[source_pass.SourcePass()]):
        seen = source_pass.seen_ops()
        assert code_of_block() == plain
        assert source_pass.seen_ops() == seen


def test_the_pass_of_a_user_still_runs() -> None:
    graphs = []

    class Theirs(torch._inductor.custom_graph_pass.CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            graphs.append(graph)

        def uuid(self) -> str:
            return "theirs"

    theirs = Theirs()
    with inductor_config.patch(post_grad_custom_pre_pass=theirs):
        with kvarn_ops.patched(tiny_model()):
            assert theirs in inductor_config.post_grad_custom_pre_pass
            code_of_block()
            assert len(graphs) == 1, "patch() took the place of the user's pass"
        code_of_block()
        assert len(graphs) == 2


def test_options_for_one_compilation() -> None:
    with inductor_config.patch(post_grad_custom_pre_pass=None):
        options = kvarn_ops.lowering.inductor_options()
        assert inductor_config.post_grad_custom_pre_pass is None
        (own,) = [options["post_grad_custom_pre_pass"]]
        assert isinstance(own, source_pass.SourcePass)
        assert own.uuid().startswith("kvarn_ops-")
        torch.compiler.reset()
        with torch.no_grad():
            torch.compile(lambda x: x + 1, options=options)(torch.ones(3))
