"""transformers' QuantizedCache in the demo: its rows and bytes, what is said if it is missing."""

from __future__ import annotations

import csv
import io
import math
import random

import pytest
import torch
from rich.console import Console

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from kvarn_ops.demo import run
from kvarn_ops.errors import InputError
from kvarn_ops.eval import peers
from tiny_models import tiny_model

CONTEXT, LAYERS, KV_HEADS, HEAD_DIM = 208, 2, 1, 32


@pytest.fixture
def options(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM,
        max_position_embeddings=512, initializer_range=0.3, bos_token_id=256, eos_token_id=257,
        pad_token_id=257,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    text = tmp_path / "words.txt"
    text.write_text(" ".join(random.Random(0).choices(["yes", "no", "perhaps"], k=300)))
    return dict(
        model=tmp_path / "model", text=text, out=tmp_path / "out", presets="k4v2_g32",
        context=CONTEXT, tokens=8, batch=2, compile=False, device="cpu",
    )  # fmt: skip


def test_a_peer_is_a_row_with_its_own_numbers(options):
    console = Console(file=io.StringIO(), width=200)
    rows = run.run_demo(run.Options(**options, peers="fp8"), console)
    dense, kvarn, fp8 = rows
    assert [row.method for row in rows] == ["dense", "k4v2_g32", "fp8"]
    codes = 2 * 2 * CONTEXT * LAYERS * KV_HEADS * HEAD_DIM  # two rows, K and V, a byte each
    assert codes <= fp8.cache_bytes <= codes + 100
    assert fp8.compression == pytest.approx(dense.cache_bytes / fp8.cache_bytes)
    assert fp8.kl > 0
    assert fp8.tokens_per_second > 0
    assert math.isnan(fp8.tile_bits)
    text = console.file.getvalue()
    floor = float(text.split("only rounding differs, KL is ")[1].split(".\n")[0])
    assert floor < 0.1 * kvarn.kl, "the floor is that of caches which are not quantized yet"
    lines = [line for line in (options["out"] / "table.csv").read_text().splitlines()
             if line[0] != "#"]  # fmt: skip
    assert [row["method"] for row in csv.DictReader(lines)] == ["dense", "k4v2_g32", "fp8"]


def test_bytes_are_those_of_the_tensors_inside_tensors():
    class Wrapped(torch.Tensor):
        @staticmethod
        def __new__(cls, inner, scale):
            return torch.Tensor._make_wrapper_subclass(cls, (1000, 1000))

        def __init__(self, inner, scale):
            self.inner, self.scale = inner, scale

        def __tensor_flatten__(self):
            return ["inner", "scale"], None

        @classmethod
        def __torch_dispatch__(cls, *args, **kwargs):
            raise AssertionError("sizes are read, nothing is computed")

    class Layer:
        def __init__(self):
            codes, meta = torch.zeros(100, dtype=torch.uint8), {"scale": torch.zeros(3)}
            self.keys = Wrapped(torch.zeros(10, dtype=torch.uint8), torch.zeros(2))
            self.values = (codes, meta)
            self.view_of_values = codes[:5]

    class Cache:
        layers = (Layer(), Layer())

    assert peers.cache_bytes(Cache()) == 2 * (10 + 8 + 100 + 12)


def test_bytes_of_a_dense_cache_are_all_of_them():
    model = tiny_model("llama")
    cache = StaticCache(config=model.config, max_cache_len=50)
    model(torch.ones(3, 4, dtype=torch.int64), past_key_values=cache)
    assert peers.cache_bytes(cache) == 2 * (2 * 3 * 2 * 50 * 32 * 4 + 8)


@pytest.mark.parametrize(
    ("names", "words"),
    [("int4", "there is no such cache"), ("hqq4", "hqq4 needs hqq, which is not installed: pip")],
)
def test_what_cannot_be_compared_is_said_before_any_work(names, words, options, monkeypatch):
    monkeypatch.setattr(peers, "is_installed", lambda package: False)
    with pytest.raises(InputError, match=words):
        run.run_demo(run.Options(**options, peers=names), Console(file=io.StringIO()))


@pytest.mark.parametrize("name", ["quanto4", "quanto2", "hqq4"])
def test_caches_of_optional_packages_quantize(name):
    peer = peers.PEERS[name]
    if peer.missing:
        pytest.skip(peer.missing)
    model = tiny_model("llama", head_dim=64).to(torch.bfloat16)
    cache = peer.new_cache(model.config)
    dense = StaticCache(config=model.config, max_cache_len=130)
    ids = torch.randint(2, 96, (1, 128))
    with torch.no_grad():
        for one in (cache, dense):
            model(ids, past_key_values=one)
            model(ids[:, :1], past_key_values=one)
    assert 2 < peers.cache_bytes(dense) / peers.cache_bytes(cache) < 16 / peer.bits
