"""Copies of whole cache buffers are found in the graph, with who causes them."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache, run_and_get_code

import kvarn_ops
from kvarn_ops.lowering import inductor_options, record

DIM = 32


def compiled(
    function: Callable[..., Any], *args: Any, caplog: pytest.LogCaptureFixture
) -> tuple[record.GraphRecord, list[str], str]:
    """Record of the only compiled graph, warnings, and generated code."""
    torch.compiler.reset()
    record.clear()
    caplog.clear()
    step = torch.compile(function, fullgraph=True, options=inductor_options())
    with torch.no_grad(), fresh_cache(), caplog.at_level(logging.INFO, "kvarn_ops"):
        _, codes = run_and_get_code(step, *args)
    (found,) = record.recorded()
    ours = [r for r in caplog.records if r.name == "kvarn_ops"]
    warnings = [r.getMessage() for r in ours if r.levelno >= logging.WARNING]
    infos = [r.getMessage() for r in ours if r.levelno == logging.INFO]
    assert len([text for text in infos if text == found.summary()]) == 1, "one summary per graph"
    return found, warnings, "\n".join(codes)


def allocations(code: str, buffer: Tensor) -> int:
    """How often generated code allocates as many elements as a buffer has."""
    shapes = re.findall(r"= empty_strided\w*\(\(([\d, ]*)\)", code)
    sizes = [math.prod(int(n) for n in shape.split(",") if n.strip()) for shape in shapes]
    return sizes.count(buffer.numel())


def make_cache() -> kvarn_ops.KVCache:
    return kvarn_ops.KVCache(1, 2, DIM, 8 + 32 * 13, "k8v8_g32", num_sink_tokens=8)


def test_reading_old_and_new_content_in_one_graph(caplog: pytest.LogCaptureFixture) -> None:
    cache = make_cache()
    k, v = torch.randn(2, 1, 2, 1, DIM)

    def read_write_read(k: Tensor, v: Tensor, *tensors: Tensor) -> Tensor:
        old = tensors[0].float().mean(-1)
        torch.ops.kvarn.append_(k, v, None, *tensors, cache.config_line, "aten")
        new = tensors[0].float().mean(-1)
        torch.ops.kvarn.append_(k, v, None, *tensors, cache.config_line, "aten")
        return old @ new.mT

    args = (k, v, *cache.tiles, cache.rotation)
    found, warnings, code = compiled(read_write_read, *args, caplog=caplog)
    copied = {copy.buffer: copy for copy in found.copies}
    assert "k_codes" in copied
    assert copied["k_codes"].size == cache.tiles.k_codes.nbytes
    assert "tensors[0].float().mean(-1)" in copied["k_codes"].cause
    assert allocations(code, cache.tiles.k_codes), "the report is not true: nothing is copied"
    assert len(warnings) == 1, "one line per graph"
    assert "k_codes" in warnings[0]


def test_a_snapshot_that_the_program_takes(caplog: pytest.LogCaptureFixture) -> None:
    cache = make_cache()
    k, v = torch.randn(2, 1, 2, 1, DIM)

    def snapshot(k: Tensor, v: Tensor) -> Tensor:
        old = cache.v_codes.clone()
        cache.append(k, v)
        return old

    found, warnings, code = compiled(snapshot, k, v, caplog=caplog)
    assert [copy.buffer for copy in found.copies] == ["v_codes"]
    assert "cache.v_codes.clone()" in found.copies[0].cause
    assert allocations(code, cache.tiles.v_codes)
    assert len(warnings) == 1


def test_silence_on_the_good_graph(caplog: pytest.LogCaptureFixture) -> None:
    caches = [make_cache(), make_cache()]
    q, k, v = torch.randn(1, 4, 1, DIM), *torch.randn(2, 1, 2, 1, DIM)

    def two_layers(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        for cache in caches:
            cache.append(k, v, input_pos=position)
            q = cache.attend(q)
        return q

    found, warnings, code = compiled(two_layers, q, k, v, torch.tensor([0]), caplog=caplog)
    assert found.ops["post_grad"]["kvarn::append_at_"] == 2
    assert (found.copies, warnings) == ([], [])
    for cache in caches:
        assert not allocations(code, cache.tiles.k_codes)
