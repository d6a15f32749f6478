"""`aot_compile` of programs that were exported elsewhere and packed by `rewrite_kv_cache`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.export import Dim, ExportedProgram

import kvarn_ops
from extras import needs_packages
from fresh_process import BLOCKER, run_python
from gpt_fast_example import gpt_fast_model
from kvarn_ops.export import aot_compile
from kvarn_ops.lowering import rewrite_kv_cache
from tiny_models import random_ids

pytestmark = [
    pytest.mark.export,
    needs_packages,
]

BATCH, ROOM = 2, 160
# New tokens of each call; a sequence starts over in between.
CALLS = [[30, 1, 50, 1, 1, 40, 1, 1], [3, 1]]

STEPS = """
import torch
step = torch._inductor.aoti_load_package("model.pt2")
logits = [step(*call) for call in torch.load("calls.pt")]
torch.save(logits, "logits.pt")
print("done")
"""


def dense_program(chunk: int) -> ExportedProgram:
    """One layer with a dense static cache of its own."""
    model = gpt_fast_model(BATCH, ROOM, num_layers=1, native_gqa=True)
    size = Dim("size", min=1, max=chunk)
    given = (torch.zeros(BATCH, 5, dtype=torch.int64), torch.arange(5))
    return torch.export.export(model, given, dynamic_shapes=({1: size}, {0: size}))


@pytest.mark.slow
def test_package_of_a_rewritten_program_steps_without_this_package(tmp_path: Path) -> None:
    program = rewrite_kv_cache(dense_program(64), "k4v2_g32", num_sink_tokens=8, strict=True)
    aot_compile(program, tmp_path / "model.pt2")
    calls = []
    for seed, counts in enumerate(CALLS):
        start, ids = 0, random_ids(BATCH, sum(counts), seed=seed)
        for new in ids.split(counts, 1):
            count = new.shape[1]
            calls.append((new.contiguous(), torch.arange(start, start + count)))
            start += count
    torch.save(calls, tmp_path / "calls.pt")
    code = BLOCKER.format(blocked={"kvarn_ops", "transformers"}) + STEPS
    assert run_python(code, cwd=tmp_path) == "done"
    eager = program.module()
    with torch.no_grad():
        wanted = [eager(*call) for call in calls]
    got = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(got[:2], wanted[:2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(got[-2:], wanted[-2:], rtol=1e-4, atol=1e-4)  # a new sequence


def test_programs_without_a_packed_cache_and_sizes_given_twice_are_refused(tmp_path: Path) -> None:
    program = dense_program(8)
    with pytest.raises(kvarn_ops.UnsupportedModelError, match="rewrite_kv_cache"):
        aot_compile(program, tmp_path / "model.pt2")
    with pytest.raises(kvarn_ops.InputError, match="has its sizes"):
        aot_compile(program, tmp_path / "model.pt2", max_cache_len=64)
    assert not list(tmp_path.iterdir())
