"""The quantizers that evaluations compare: right errors, right bits, one schedule for all."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

from kvarn_ops import KVarNConfig, fake_quantize
from kvarn_ops.errors import InputError
from kvarn_ops.eval.baselines import gaussian_codebook
from kvarn_ops.eval.cache import MethodCache, MethodLayer
from kvarn_ops.eval.methods import METHODS, parse_methods
from tiny_models import tiny_model

K2V2 = KVarNConfig.from_preset("k2v2")


def relative_error(method, x, config=K2V2):
    tensors = (METHODS[method].keys(x, x, config), METHODS[method].values(x, x, config))
    return [((y - x).norm() / x.norm()).item() for y in tensors]


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_codebooks_are_the_known_optimal_quantizers_of_a_gaussian():
    # Max (1960), table 1: the positive levels.
    assert gaussian_codebook(2)[2:] == pytest.approx([0.4528, 1.5104], abs=2e-4)
    assert gaussian_codebook(3)[4:] == pytest.approx([0.2451, 0.7560, 1.3439, 2.1520], abs=2e-4)
    assert gaussian_codebook(4)[-1] == pytest.approx(2.7326, abs=2e-4)


def test_turbo_reaches_the_error_of_its_codebook():
    error = relative_error("turbo", gaussian(64, 128, 128))
    # 0.1175 is the mean squared error of the best four levels; keeping the norm adds to it.
    angle = math.acos(math.sqrt(1 - 0.1175))
    assert error == pytest.approx([2 * math.sin(angle / 2)] * 2, rel=0.02)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_round_to_nearest_keeps_what_lies_on_its_grid(bits):
    config = KVarNConfig.from_preset(f"k{bits}v{bits}")
    codes = torch.randint(2**bits, (3, 128, 64), generator=torch.Generator().manual_seed(0))
    codes[..., ::64, :], codes[..., 1::64, :] = 0, 2**bits - 1  # every group spans the range
    codes[..., :, 0], codes[..., :, 1] = 0, 2**bits - 1
    x = codes * 0.5 - 3.0
    for method in ("rtn", "kivi_g64", "kivi_g128"):
        assert relative_error(method, x, config) == pytest.approx([0, 0], abs=1e-6), method


def test_smaller_groups_have_smaller_errors():
    x = gaussian(8, 128, 128)
    errors = [relative_error(f"kivi_g{group}", x) for group in (32, 64, 128)]
    assert errors[0] < errors[1] < errors[2], "K first, then V"
    assert errors[0][1] < errors[1][1] < errors[2][1]


def test_fp8_rounds_to_three_bits_of_mantissa():
    x = torch.tensor([1.0, 1.125, 1.0625001, 448.0, 1e4, -0.15625]).expand(1, 128, 6)
    back = METHODS["fp8"].keys(x, x, K2V2)
    assert back[0, 0].tolist() == [1.0, 1.125, 1.125, 448.0, 448.0, -0.15625]


def test_a_method_without_a_zero_point_is_not_harmed_by_zeros():
    zeros = torch.zeros(1, 128, 64)
    for name, method in METHODS.items():
        for quantize in (method.keys, method.values):
            assert quantize(zeros, zeros, K2V2).abs().max() < 1e-6, name


# At group size 64 and head_dim 64 these are the bits of the study in the paper's notation.
@pytest.mark.parametrize(
    ("method", "bits"),
    [("none", 16), ("rtn", 2.5), ("kivi_g64", 2.5), ("kivi_g32", 3), ("kivi_g128", 2.5),
     ("hadamard", 2.5), ("turbo", 2.25), ("fp8", 8), ("paper", 2.75), ("plus", 2.75),
     ("plus/log8", 2.375 + 16 / 8192), ("plus/kv_symmetric", 2.5), ("plus/k_token", 2.75)],
)  # fmt: skip
def test_effective_bits(method, bits):
    config = KVarNConfig.from_preset("k2v2_g64")
    assert METHODS[method].bits(config, 64) == pytest.approx(bits)


@pytest.mark.parametrize("preset", ["k2v2", "k3v3", "k4v4", "k8v8"])
def test_the_variant_that_changes_nothing_is_plus(preset):
    config = KVarNConfig.from_preset(preset)
    x = gaussian(4, 128, 64) * torch.exp(gaussian(64, seed=1))
    assert relative_error("plus/same", x, config) == pytest.approx(
        relative_error("plus", x, config), rel=0.01
    )


@settings(max_examples=25, deadline=None)
@given(
    method=st.sampled_from(["paper", "plus"]),
    chunks=st.lists(st.integers(1, 90), min_size=1, max_size=8),
    sinks=st.sampled_from([0, 8, 40]),
    tail=st.sampled_from([0, 20]),
)
def test_a_layer_holds_what_fake_quantize_defines(method, chunks, sinks, tail):
    config = KVarNConfig.from_preset(
        "k4v2_g32", num_sink_tokens=sinks, tail_tokens=tail, encoder=method
    )
    length = sum(chunks)
    k, v = gaussian(2, 2, length, 64), gaussian(2, 2, length, 64, seed=1)
    layer = MethodLayer(METHODS[method], config)
    done = 0
    for count in chunks:
        keys, _ = layer.update(k[:, :, done : done + count], v[:, :, done : done + count])
        assert torch.equal(keys[:, :, done:], k[:, :, done : done + count]), "new keys are exact"
        done += count
    layer.quantize_finished()
    for name, got, wanted in zip(
        "kv", (layer.keys, layer.values), fake_quantize(k, v, config), strict=True
    ):
        assert torch.allclose(got, wanted, atol=1e-5), name


def test_rows_with_left_padding_are_stored_like_the_rows_alone():
    config = KVarNConfig.from_preset("k2v2_g32", num_sink_tokens=8)
    k, v = gaussian(2, 1, 120, 32), gaussian(2, 1, 120, 32, seed=1)
    layer = MethodLayer(METHODS["plus"], config, starts=[17, 0])
    layer.update(k, v)
    layer.quantize_finished()
    wanted, _ = fake_quantize(k[:1, :, 17:], v[:1, :, 17:], config)
    assert torch.allclose(layer.keys[:1, :, 17:], wanted, atol=1e-5)
    assert torch.equal(layer.keys[:1, :, :17], k[:1, :, :17])
    wanted, _ = fake_quantize(k[1:], v[1:], config)
    assert torch.allclose(layer.keys[1:], wanted, atol=1e-5)


def test_sliding_layers_stay_as_they_are():
    model = tiny_model("gemma2")
    cache = MethodCache(model.config, METHODS["rtn"], K2V2)
    assert [isinstance(layer, MethodLayer) for layer in cache.layers] == [False, True] * 2


def test_a_model_without_full_attention_is_refused():
    with pytest.raises(InputError, match="no full-attention layer"):
        MethodCache(tiny_model("mistral_sliding").config, METHODS["rtn"], K2V2)


@pytest.mark.parametrize("names", ["", "plus,kvarn", "Plus"])
def test_unknown_methods_are_named(names):
    with pytest.raises(InputError, match="choose of none, rtn"):
        parse_methods(names)
