"""`explain` says, layer by layer, what compiled graphs do and why not, from the graphs."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

import kvarn_ops
from kvarn_ops.lowering import inductor_options, record
from tiny_models import random_ids, run, small_cache, tiny_model

DIM, CAPACITY = 32, 256


@pytest.fixture(autouse=True)
def _nothing_recorded(fresh_dynamo: None) -> Iterator[None]:
    record.clear()
    with fresh_cache(), torch.no_grad():  # what comes from a cache is not recorded
        yield


class Attention(nn.Module):
    """A layer with a packed cache and a causal mask over its slots."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = kvarn_ops.KVCache(1, 2, DIM, CAPACITY, "k8v8_g32", num_sink_tokens=8)
        self.project = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        k, v = self.cache.update(self.project(x)[:, :2], x[:, 2:], input_pos=position)
        mask = torch.arange(CAPACITY) <= position[:, None]
        return F.scaled_dot_product_attention(x, *self.chosen(k, v), mask, enable_gqa=True)

    def chosen(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v


class Shuffled(Attention):
    """Reads the cache in a form that must not be fused."""

    def chosen(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k.flip(2), v.flip(2)


class Dense(Attention):
    """Has no cache at all."""

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        k = self.project(x)
        return F.scaled_dot_product_attention(x, k, k)


class Model(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, position)
        return x


def test_an_attention_that_stays_dense_is_listed_with_the_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Model(Attention(), Shuffled(), Dense()).eval()
    with caplog.at_level(logging.WARNING, "kvarn_ops"):
        torch.compile(model, fullgraph=True)(torch.randn(1, 4, 1, DIM), torch.tensor([0]))
    told = kvarn_ops.explain(model)
    (graph,) = told.graphs
    fused, shuffled, dense = graph.sites
    assert [site.module for site in graph.sites] == ["layers.0", "layers.1", "layers.2"]
    assert [site.packed for site in graph.sites] == [True, False, False]
    assert "kvarn::attention" in fused.what
    assert "flip" in shuffled.what
    assert "FuseAttention" in shuffled.what
    assert "F.scaled_dot_product_attention(x, *self.chosen" in shuffled.source
    assert "no packed cache" in dense.what
    assert graph.rewrites["FuseAttention"] == 1
    text = str(told)
    for site in graph.sites:
        assert str(site) in text
    assert "FuseAttention x1" in text
    warnings = [r.getMessage() for r in caplog.records]
    assert any("flip" in text and "FuseAttention" in text for text in warnings)
    assert len(set(warnings)) == len(warnings)


def test_a_cache_that_no_attention_reads() -> None:
    class Mean(Attention):
        def forward(self, x: Tensor, position: Tensor) -> Tensor:
            k, v = self.cache.update(x[:, :2], x[:, 2:], input_pos=position)
            return x + k.mean() + v.mean()

    torch.compile(Mean(), fullgraph=True)(torch.randn(1, 4, 1, DIM), torch.tensor([0]))
    ((site,),) = [graph.sites for graph in record.recorded()]
    assert not site.packed
    assert "mean" in site.what


def test_layers_of_a_patched_model() -> None:
    model = kvarn_ops.patch(tiny_model(), "k8v8_g32", num_sink_tokens=8)
    cache = small_cache(model)
    run(model, random_ids(1, 20), cache)
    step = torch.compile(model, fullgraph=True)
    step(random_ids(1, 1), past_key_values=cache, use_cache=True)
    lines = str(kvarn_ops.explain(model)).splitlines()
    for layer in range(2):
        (at,) = [i for i, line in enumerate(lines) if f"model.layers.{layer}.self_attn" in line]
        assert "compiled: kvarn::step_: reads packed tiles" in lines[at + 1]
    assert not any("attention:" in line for line in lines), "listed twice"


def test_graphs_from_the_cache_on_disk_are_mentioned() -> None:
    def once() -> kvarn_ops.patching.Explanation:
        torch.compiler.reset()
        model = Model(Attention()).eval()
        torch.compile(model, fullgraph=True)(torch.randn(1, 4, 1, DIM), torch.tensor([0]))
        return kvarn_ops.explain(model)

    torch._dynamo.utils.counters.clear()
    assert once().graphs_from_cache == 0
    told = once()
    assert told.graphs_from_cache == 1
    assert "1 more came from Inductor's cache" in str(told)


def test_records_are_bounded() -> None:
    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    with record.recording("many", joins=False) as found:
        for _ in range(1000):
            record.refuse("Test", node, "it is one of many")
    assert found.refused == 1000
    assert len(found.refusals) < 1000
    for _ in range(1000):
        with record.recording("many", joins=False):
            pass
    assert len(record.recorded()) < 1000


def test_options_alone_record_too() -> None:
    q, k, v = torch.randn(1, 4, 1, DIM), *torch.randn(2, 1, 2, 1, DIM)
    cache = kvarn_ops.KVCache(1, 2, DIM, CAPACITY)

    def step(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        cache.append(k, v, input_pos=position)
        return cache.attend(q)

    torch.compile(step, fullgraph=True, options=inductor_options())(q, k, v, torch.tensor([0]))
    (graph,) = record.recorded()
    assert graph.ops["pre_grad"] == {"kvarn::append_at_": 1, "kvarn::attention": 1}
