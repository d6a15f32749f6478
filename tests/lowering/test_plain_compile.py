"""`torch.compile(model)` as most people write it, with graph breaks allowed: there is none."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

import kvarn_ops
from tiny_models import random_ids, run, small_cache, tiny_model


@pytest.mark.usefixtures("fresh_dynamo")
def test_one_graph_without_fullgraph() -> None:
    model = kvarn_ops.patch(tiny_model(num_hidden_layers=1), "k8v8_g32", num_sink_tokens=8)
    caches = [small_cache(model), small_cache(model)]
    for cache in caches:
        run(model, random_ids(1, 30), cache)
    counters.clear()
    step = torch.compile(model)
    for count in range(12):  # across the end of a tile
        ids = random_ids(1, 1, seed=count).contiguous()
        got, wanted = run(step, ids, caches[0]), run(model, ids, caches[1])
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert counters["stats"]["unique_graphs"] == 1
