"""Unmodified models of other packages (extra `thirdparty`), patched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import kvarn_ops
from kvarn_ops import UnsupportedModelError
from kvarn_ops.config import KVarNConfig
from kvarn_ops.lowering import record

CONFIG = KVarNConfig(key_bits=8, value_bits=8, group_size=32, num_sink_tokens=8)
B, T, PROMPT, TOTAL = 2, 256, 30, 150  # the first tile is quantized at 40 tokens, the third at 104


class Family(NamedTuple):
    model: nn.Module
    setup: Callable[[], None]
    step: Callable[[Any, Tensor, Tensor], Tensor]
    reset: Callable[[], None]
    call: str


def needed(package: str) -> None:
    # Not importorskip: some of these fail in other ways with releases that do not fit.
    try:
        __import__(package)
    except Exception as error:
        pytest.skip(f"{package} does not import (extra 'thirdparty'): {error}")


def torchtune_llama() -> Family:
    needed("torchtune.models.llama3")
    from torchtune.models.llama3 import llama3

    torch.manual_seed(0)
    model = llama3(
        vocab_size=96, num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=128, max_seq_len=T,
        intermediate_dim=192,
    ).eval()  # fmt: skip
    causal = torch.ones(T, T, dtype=torch.bool).tril()

    def step(run: Any, ids: Tensor, positions: Tensor) -> Tensor:
        mask = causal[positions].expand(B, -1, -1)
        return run(ids, mask=mask, input_pos=positions.expand(B, -1))

    def setup() -> None:
        model.setup_caches(B, torch.float32, decoder_max_seq_len=T)

    return Family(model, setup, step, lambda: model.reset_caches(), "setup_caches(batch_size")


def litgpt_llama() -> Family:
    needed("litgpt.model")
    from litgpt import GPT, Config

    torch.manual_seed(0)
    config = Config(
        name="tiny", block_size=T, n_layer=2, n_head=4, n_query_groups=2, n_embd=128,
        padded_vocab_size=96, vocab_size=96, intermediate_size=192, norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP", rotary_percentage=1.0, bias=False, parallel_residual=False,
    )  # fmt: skip
    model = GPT(config).eval()
    return Family(
        model,
        lambda: model.set_kv_cache(B, dtype=torch.float32),
        lambda run, ids, positions: run(ids, positions),
        lambda: None,  # position 0 starts over
        "set_kv_cache(batch_size",
    )


families = pytest.mark.parametrize("make", [torchtune_llama, litgpt_llama])


@torch.no_grad()
def logits(family: Family, ids: Tensor, run: Any = None) -> Tensor:
    """Teacher-forced; single tokens go through `run`."""
    family.reset()
    steps = [family.step(family.model, ids[:, :PROMPT], torch.arange(PROMPT))]
    for place in range(PROMPT, ids.shape[1]):
        token, position = ids[:, place : place + 1], torch.tensor([place])
        steps.append(family.step(family.model if run is None else run, token, position))
    return torch.cat(steps, 1)


@torch.no_grad()
def greedy(family: Family) -> Tensor:
    family.reset()
    ids = torch.randint(96, (B, PROMPT), generator=torch.Generator().manual_seed(1))
    positions, new = torch.arange(PROMPT), ids
    while ids.shape[1] < TOTAL:
        new = family.step(family.model, new, positions)[:, -1:].argmax(-1)
        positions, ids = positions[-1:] + 1, torch.cat([ids, new], 1)
    return ids


@families
def test_eager_decode(make: Callable[[], Family]) -> None:
    dense, family = make(), make()
    with pytest.raises(UnsupportedModelError) as error:
        kvarn_ops.patch(family.model, CONFIG)
    assert f"model.{family.call}" in str(error.value)
    dense.setup()
    family.setup()
    kvarn_ops.patch(family.model, CONFIG)
    assert [layer.packed for layer in kvarn_ops.explain(family.model).layers] == [True, True]
    ids = greedy(dense)
    wanted, got = logits(dense, ids), logits(family, ids)
    torch.testing.assert_close(got[:, :39], wanted[:, :39], rtol=1e-5, atol=1e-5)
    assert 0 < (got - wanted).norm() / wanted.norm() < 2e-3
    assert torch.equal(greedy(family), greedy(family))
    kvarn_ops.unpatch(family.model)
    assert torch.equal(logits(family, ids), wanted)


@families
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_decode_is_one_fused_graph(make: Callable[[], Family]) -> None:
    record.clear()
    family = make()
    family.setup()
    kvarn_ops.patch(family.model, CONFIG)
    ids = greedy(family)
    wanted = logits(family, ids)
    counters.clear()
    got = logits(family, ids, torch.compile(family.model, fullgraph=True))
    assert counters["stats"]["unique_graphs"] == 1
    [graph] = record.recorded()
    assert graph.ops["pre_grad"] == {"kvarn::append_at_": 2, "kvarn::attention": 2}
    torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-2)
    sizes = {getattr(module, "size", TOTAL) for module in family.model.modules()}
    assert sizes == {TOTAL}, "torchtune's own count of tokens"


def test_a_sliding_window_of_litgpt_stays_dense() -> None:
    needed("litgpt.model")
    from litgpt import GPT, Config

    config = Config(
        name="tiny", block_size=T, n_layer=2, n_head=2, n_embd=64, padded_vocab_size=96,
        vocab_size=96, rotary_percentage=1.0, sliding_window_size=16, sliding_window_indices=[1, 0],
    )  # fmt: skip
    model = GPT(config).eval()
    model.set_kv_cache(1)
    kvarn_ops.patch(model, CONFIG)
    window, whole = kvarn_ops.explain(model).layers
    assert (window.packed, whole.packed) == (False, True)
    assert "window" in window.reason


def test_caches_of_x_transformers_are_the_callers() -> None:
    needed("x_transformers")
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=64, depth=2, heads=2, attn_dim_head=32, rotary_pos_emb=True)
    model = TransformerWrapper(num_tokens=96, max_seq_len=T, attn_layers=layers)
    with pytest.raises(UnsupportedModelError, match="takes and returns"):
        kvarn_ops.patch(model, CONFIG)
