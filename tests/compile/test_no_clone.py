"""A compiled decode step copies no cache buffer: asked of Inductor, and read in its code."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import ReinplaceCounters
from torch._inductor.utils import fresh_cache, run_and_get_code

import kvarn_ops
from tiny_models import random_ids, run, small_cache, tiny_model

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

# Capacity is prime, so that no activation happens to have the size of a cache buffer.
CAPACITY = 8 + 32 * 13


def compiled_code(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    ReinplaceCounters.clear()
    with torch.no_grad(), fresh_cache():  # what comes from a cache is not counted
        _, codes = run_and_get_code(function, *args, **kwargs)
    assert codes, "nothing was compiled"
    return "\n".join(codes)


def allocated_sizes(code: str) -> list[int]:
    """Elements of every buffer that generated code allocates (sizes that are known then)."""
    found = []
    for shape in re.findall(r"= empty_strided\w*\(\(([^)]*)\)", code):
        product = 1
        for part in filter(None, (part.strip() for part in shape.split(","))):
            if not part.isdigit():  # a symbolic size: the live tiles
                product = -1
                break
            product *= int(part)
        found.append(product)
    return found


def copies_in(code: str) -> list[str]:
    names = ("aten.clone", "aten.copy", ".clone()", ".copy_(", "auto_functionalized")
    return [line.strip() for line in code.splitlines() if any(name in line for name in names)]


def test_a_decode_step_copies_no_cache_buffer() -> None:
    model = kvarn_ops.patch(tiny_model(), "k8v8_g32", num_sink_tokens=8)
    cache = small_cache(model, CAPACITY, "k8v8_g32")
    run(model, random_ids(1, 90), cache)
    step = torch.compile(model, fullgraph=True)
    addresses = [tensor.data_ptr() for layer in cache.layers for tensor in layer.tiles]
    code = compiled_code(step, random_ids(1, 1), past_key_values=cache, use_cache=True)

    assert ReinplaceCounters.get_total_missed() == 0, "a mutation was not done in place"
    assert code.count("torch.ops.kvarn.append_.default(") == model.config.num_hidden_layers
    assert not copies_in(code), copies_in(code)
    sizes = allocated_sizes(code)
    assert sizes, "no allocation found: the code has changed its form, and this test sees nothing"
    held = {tensor.numel() for tensor in cache.layers[0].tiles if tensor.numel() > 256}
    assert not held & set(sizes), "a buffer of the size of one of the cache's is allocated"
    dense_keys = 2 * CAPACITY * 32
    assert max(sizes) < dense_keys / 2
    assert addresses == [tensor.data_ptr() for layer in cache.layers for tensor in layer.tiles]


def test_the_check_sees_a_copy() -> None:
    """The control: a buffer that is read before and after a mutation, both needed at the end."""
    model = kvarn_ops.patch(tiny_model(), "k8v8_g32", num_sink_tokens=8)
    cache = small_cache(model, CAPACITY, "k8v8_g32")
    run(model, random_ids(1, 1), cache)
    layer = cache.layers[0]
    k, v = torch.randn(2, 1, 2, 1, 32)

    def read_mutate_read(k: Tensor, v: Tensor, *tensors: Tensor) -> Tensor:
        codes, config = tensors[0], layer.config_line
        old = codes.float().mean(-1)
        torch.ops.kvarn.append_(k, v, None, *tensors, config, "aten")
        new = codes.float().mean(-1)
        torch.ops.kvarn.append_(k, v, None, *tensors, config, "aten")
        return old @ new.mT

    step = torch.compile(read_mutate_read, fullgraph=True)
    code = compiled_code(step, k, v, *layer.tiles, layer.rotation)
    assert ReinplaceCounters.get_total_missed() > 0
    assert layer.tiles.k_codes.numel() in allocated_sizes(code)
