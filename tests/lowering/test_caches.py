"""Inductor's caches on disk, in fresh processes: nothing changed is a hit, anything else a miss."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# A pass of the stage of Dynamo's graphs that changes the result, in a module of its own.
PASS = """
import torch

class ScaleOutput:
    def __call__(self, graph: torch.fx.Graph) -> int:
        out = graph.output_node()
        (result,) = out.args[0]
        with graph.inserting_before(out):
            out.args = ((graph.call_function(torch.mul, (result, FACTOR)),),)
        return 1

FACTOR = 2.0
"""
SCRIPT = """
import json, logging, sys, torch, kvarn_ops, own_pass
from kvarn_ops.lowering import inductor_options, record
from kvarn_ops.ops.samples import filled_cache
from torch._dynamo.utils import counters

config = kvarn_ops.KVarNConfig.from_preset(sys.argv[1], num_sink_tokens=32)
cache, rotation = filled_cache(config, [70], "cpu")
q = torch.ones(1, 4, 1, 64)

def step(q, *rest):
    return torch.ops.kvarn.attention(q, *rest, None, 0.1, 0.0, True, config.to_string(), "aten")

options = inductor_options(pre_grad=(own_pass.ScaleOutput(),))
with torch.no_grad():
    eager = step(q, *cache, rotation)
    compiled = torch.compile(step, fullgraph=True, options=options)(q, *cache, rotation)
print(json.dumps({
    "factor": float((compiled / eager).mean()),
    "graph": [counters["inductor"][f"fxgraph_cache_{what}"] for what in ("hit", "miss", "bypass")],
    "autograd": [counters["aot_autograd"][f"autograd_cache_{what}"]
                 for what in ("hit", "miss", "bypass")],
    "rewrites": sum(one.rewrites["ScaleOutput"] for one in record.recorded()),
}))
"""


@pytest.mark.slow
def test_a_changed_pass_or_config_is_compiled_anew(tmp_path: Path, repo_root: Path) -> None:
    (tmp_path / "own_pass.py").write_text(PASS)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(repo_root), str(tmp_path)]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
    }

    def fresh_process(preset: str, **more: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, preset],
            env=environment | more,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "does not implement uuid" not in done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    hit, miss = [1, 0, 0], [0, 1, 0]
    cold = fresh_process("k4v2_g32")
    assert (cold["graph"], cold["autograd"], cold["rewrites"]) == (miss, miss, 1)
    assert cold["factor"] == pytest.approx(2, rel=1e-4)
    warm = fresh_process("k4v2_g32")
    assert warm["graph"] == hit, "the same sources missed the cache of graphs"
    assert warm["autograd"] == hit, "the same sources missed AOTAutograd's cache"
    assert warm["factor"] == cold["factor"]
    assert fresh_process("k8v2_g32")["graph"] == miss, "another config ran as the old one"

    dumps = tmp_path / "dumps"
    assert fresh_process("k4v2_g32", KVARN_OPS_DUMP=str(dumps))["graph"] == miss
    (before,) = dumps.glob("*ScaleOutput.before.txt")
    (after,) = dumps.glob("*ScaleOutput.after.txt")
    assert before.read_text().count(".mul]") + 1 == after.read_text().count(".mul]")

    (tmp_path / "own_pass.py").write_text(PASS.replace("2.0", "3.0"))
    edited = fresh_process("k4v2_g32")
    assert (edited["graph"], edited["autograd"]) == (miss, miss), "the old pass's code ran"
    assert edited["factor"] == pytest.approx(3, rel=1e-4)
