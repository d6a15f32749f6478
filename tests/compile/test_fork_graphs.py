"""Compiled decoding from forks: right, one graph, no copy of the shared tiles."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import ReinplaceCounters, counters
from torch._inductor.utils import fresh_cache, run_and_get_code

from tiny_models import patched, random_ids, run, small_cache, teacher_forced

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

PRESET = "k8v8_g32"


def test_a_compiled_fork_goes_on_as_an_eager_one() -> None:
    model = patched(preset=PRESET)
    prompt, more = random_ids(1, 150), random_ids(3, 70, seed=1)
    source = small_cache(model, 300, PRESET)
    run(model, prompt, source)
    eager, first, second = source.fork(3), source.fork(3), source.fork(3)
    wanted = teacher_forced(model, more, eager, 1)
    torch.compiler.reset()
    counters.clear()
    step = torch.compile(model, fullgraph=True)
    for fork in (first, second):
        found = teacher_forced(model, more, fork, 1, step)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-2)
        assert counters["stats"]["unique_graphs"] == 1, "recompiled while decoding"
    assert not counters["graph_break"]


def test_a_compiled_fork_copies_neither_shared_nor_own_tiles() -> None:
    model = patched(preset=PRESET)
    source = small_cache(model, 8 + 32 * 13, PRESET)
    run(model, random_ids(1, 370), source)
    fork = source.fork(2)
    ReinplaceCounters.clear()
    with torch.no_grad(), fresh_cache():
        _, codes = run_and_get_code(
            torch.compile(model, fullgraph=True),
            random_ids(2, 1), past_key_values=fork, use_cache=True,
        )  # fmt: skip
    code = "\n".join(codes)
    assert ReinplaceCounters.get_total_missed() == 0
    assert "aten.clone" not in code
    shared = fork.layers[0].shared.k_codes
    rows, heads, tiles, group, width = shared.shape
    assert tiles == 11
    for batch in (rows, len(fork.layers[0].tiles.seq_lens)):
        assert f"empty_strided_cpu(({batch}, {heads}, {tiles}, {group}, {width})" not in code


def test_more_query_rows_than_share_a_pass_over_the_codes() -> None:
    """Their loop over shared tiles is unrolled for 16 rows; one KV head here has 17."""
    model = patched(
        num_hidden_layers=1, num_attention_heads=17, num_key_value_heads=1, hidden_size=544
    )
    source = small_cache(model, 200)
    run(model, random_ids(1, 150), source)
    ids = random_ids(2, 1, seed=1)
    wanted = run(model, ids, source.fork(2))
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = run(step, ids, source.fork(2))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)
