"""`fake_quantize`: which tokens it touches, what it refuses, and that it is a pure function."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kvarn_ops
from kvarn_ops.config import KVarNConfig
from kvarn_ops.errors import ConfigError, InputError
from kvarn_ops.reference.fake import fake_quantize
from tiles import make_tiles, relative_error, round_trip

CONFIGS = [
    KVarNConfig.from_preset(preset, num_sink_tokens=sinks, tail_tokens=tail, encoder=encoder)
    for preset, sinks, tail, encoder in (
        ("k2v2_g32", 0, 0, "plus"),
        ("k4v2_g32", 5, 7, "paper"),
        ("k3v8_g64", 32, 100, "plus"),
        ("k4v2_g128", 128, 0, "plus"),
        ("k2v4_g128", 128, 1, "plus"),
    )
]


def keys_and_values(length: int, k_dim: int = 64, v_dim: int = 64) -> tuple[Tensor, Tensor]:
    return (
        make_tiles("gauss", 2, 3, length, k_dim, seed=1),
        make_tiles("token_spread", 2, 3, length, v_dim, seed=2),
    )


def test_it_is_public() -> None:
    assert kvarn_ops.fake_quantize is fake_quantize


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.to_string())
@pytest.mark.parametrize("offset", [-1, 0, 1, 40])
@pytest.mark.parametrize("tiles", [0, 1, 3])
def test_exactly_the_tiles_of_a_cache_are_replaced(
    config: KVarNConfig, offset: int, tiles: int
) -> None:
    length = config.num_sink_tokens + config.tail_tokens + tiles * config.group_size + offset
    k, v = keys_and_values(length := max(length, 0))
    start = config.num_sink_tokens
    end = start + config.num_tiles(length) * config.group_size
    assert end <= max(start, length - config.tail_tokens)
    for x, x_hat in zip((k, v), fake_quantize(k, v, config)):
        assert x_hat.dtype == torch.float32
        assert x_hat.shape == x.shape
        touched = (x_hat != x).any(dim=-1)
        assert touched[..., start:end].all(), "a token of a complete tile passed through"
        assert not touched[..., :start].any(), "a sink token changed"
        assert not touched[..., end:].any(), "a token of the tail changed"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.to_string())
def test_a_tile_is_what_the_encoder_makes_of_it(config: KVarNConfig) -> None:
    group, start = config.group_size, config.num_sink_tokens
    k, v = keys_and_values(start + config.tail_tokens + 2 * group + 3)
    for side, x, x_hat in zip("kv", (k, v), fake_quantize(k, v, config)):
        for tile in range(2):
            at = slice(start + tile * group, start + (tile + 1) * group)
            alone = round_trip(side, x[1, 2, at], config, x[1, 2, start : start + group])
            assert relative_error(x_hat[1, 2, at], alone) < 1e-3


def test_later_tokens_change_nothing_that_is_quantized() -> None:
    config = KVarNConfig.from_preset("k2v2_g32", num_sink_tokens=8)
    k, v = keys_and_values(8 + 5 * 32)
    length = 8 + 2 * 32
    for long, short in zip(
        fake_quantize(k, v, config), fake_quantize(k[:, :, :length], v[:, :, :length], config)
    ):
        assert relative_error(long[:, :, :length], short) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_inputs_are_unchanged_and_results_repeat(dtype: torch.dtype) -> None:
    k, v = (x.to(dtype) for x in keys_and_values(300))
    k_before, v_before = k.clone(), v.clone()
    first, second = fake_quantize(k, v), fake_quantize(k, v, "k4v2_g128")
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert torch.equal(k, k_before)
    assert torch.equal(v, v_before)
    first[0].zero_()
    first[1].zero_()
    assert torch.equal(k, k_before)
    assert torch.equal(v, v_before)
    exact = fake_quantize(k.float(), v.float())
    assert all(torch.equal(a, b) for a, b in zip(second, exact))


@pytest.mark.parametrize(("k_dim", "v_dim"), [(64, 128), (192, 128), (80, 32), (576, 512)])
def test_keys_and_values_may_have_different_widths(k_dim: int, v_dim: int) -> None:
    k, v = keys_and_values(128 + 128, k_dim, v_dim)
    k_hat, v_hat = fake_quantize(k, v, "k4v4")
    assert k_hat.shape == k.shape
    assert v_hat.shape == v.shape
    assert 0 < relative_error(k_hat, k) < 0.12
    assert 0 < relative_error(v_hat, v) < 0.12


def test_more_bits_are_more_accurate() -> None:
    k, v = keys_and_values(512)
    errors = [
        [relative_error(x_hat, x) for x_hat, x in zip(fake_quantize(k, v, f"k{b}v{b}"), (k, v))]
        for b in (2, 3, 4, 8)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1][0] < 0.01


def test_rotation_switches() -> None:
    k, v = keys_and_values(256)
    k[..., 3] *= 30
    v[..., 9] *= 30
    both = fake_quantize(k, v, "k2v2")
    plain = KVarNConfig.from_preset("k2v2", rotate_keys=False)
    no_keys = fake_quantize(k, v, plain)
    assert not torch.equal(no_keys[0], both[0])
    assert torch.equal(no_keys[1], both[1])
    no_values = fake_quantize(k, v, KVarNConfig.from_preset("k2v2", rotate_values=False))
    assert torch.equal(no_values[0], both[0])
    assert not torch.equal(no_values[1], both[1])


def test_a_head_dim_without_rotation() -> None:
    k, v = keys_and_values(256, 176, 128)
    with pytest.raises(InputError, match=r"head_dim=176.*rotate_keys=False"):
        fake_quantize(k, v)
    with pytest.raises(InputError, match="head_dim=176"):
        fake_quantize(v, k, KVarNConfig(rotate_keys=False))
    k_hat, _ = fake_quantize(k, v, KVarNConfig(rotate_keys=False))
    assert relative_error(k_hat, k) < 0.15


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_value_stays_in_its_tile(bad: float) -> None:
    config = KVarNConfig.from_preset("k2v2_g32", num_sink_tokens=4)
    k, v = keys_and_values(4 + 3 * 32 + 5)
    dirty_k, dirty_v = k.clone(), v.clone()
    for x in (dirty_k, dirty_v):
        x[1, 0, 4 + 32 + 6, 3] = bad  # second tile
        x[0, 1, 2, 5] = bad  # a sink token
        x[0, 1, -1, 5] = bad  # the tail
    hats = zip(fake_quantize(dirty_k, dirty_v, config), fake_quantize(k, v, config))
    for dirty, clean in hats:
        assert dirty[1, 0].isfinite().all()
        assert not dirty[0, 1, 2, 5].isfinite(), "sinks keep dense behaviour"
        assert not dirty[0, 1, -1, 5].isfinite(), "the tail keeps dense behaviour"
        same = (dirty == clean).all(dim=-1)
        same[1, 0, 4 + 32 : 4 + 64] = True
        same[0, 1, [2, -1]] = True
        assert same.all()


def test_check_finite_looks_at_tiles_only() -> None:
    config = KVarNConfig.from_preset("k2v2_g32", num_sink_tokens=4, check_finite=True)
    k, v = keys_and_values(4 + 32 + 5)
    k[0, 0, 0, 0] = v[0, 0, -1, 0] = torch.nan
    fake_quantize(k, v, config)
    for x in (k, v):
        kept = x[1, 1, 20, 0].clone()
        x[1, 1, 20, 0] = torch.inf
        before = x.clone()
        with pytest.raises(InputError, match="NaN or Inf"):
            fake_quantize(k, v, config)
        assert torch.equal(x.nan_to_num(), before.nan_to_num())
        x[1, 1, 20, 0] = kept


def test_empty_and_short_inputs_pass_through() -> None:
    for length in (0, 1, 128, 255):
        k, v = keys_and_values(length)
        k_hat, v_hat = fake_quantize(k, v)
        assert torch.equal(k_hat, k)
        assert torch.equal(v_hat, v)
    k_hat, _ = fake_quantize(torch.zeros(0, 2, 300, 64), torch.zeros(0, 2, 300, 64))
    assert k_hat.shape == (0, 2, 300, 64)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int8, torch.bool, torch.float64, torch.float8_e4m3fn]
)
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    k, v = keys_and_values(300)
    with pytest.raises(InputError, match=rf"k is {dtype}.*float16, bfloat16 or float32"):
        fake_quantize(k.to(dtype), v)
    with pytest.raises(InputError, match=rf"v is {dtype}"):
        fake_quantize(k, v.to(dtype))


def test_other_shapes_are_refused() -> None:
    k, v = keys_and_values(300)
    for wrong in (k[0], k[None], k[..., 0]):
        with pytest.raises(InputError, match=r"k has shape .*\[batch, heads, tokens, dim\]"):
            fake_quantize(wrong, v)
        with pytest.raises(InputError, match="v has shape"):
            fake_quantize(k, wrong)
    for other in (v[:1], v[:, :2], v[:, :, :299]):
        with pytest.raises(InputError, match="differ in batch, heads or tokens"):
            fake_quantize(k, other)
    for head_dim in (16, 40, 608):
        narrow = torch.zeros(1, 1, 300, head_dim)
        for pair in ((narrow, torch.zeros(1, 1, 300, 64)), (torch.zeros(1, 1, 300, 64), narrow)):
            with pytest.raises(InputError, match=f"head_dim={head_dim}"):
                fake_quantize(*pair)
            with pytest.raises(InputError, match=f"head_dim={head_dim}"):
                fake_quantize(*pair, KVarNConfig(rotate_keys=False, rotate_values=False))


def test_a_wrong_config_is_refused() -> None:
    k, v = keys_and_values(300)
    with pytest.raises(ConfigError, match="k<bits>v<bits>"):
        fake_quantize(k, v, "int4")
    with pytest.raises(ConfigError):
        fake_quantize(k, v, None)  # type: ignore[arg-type]
