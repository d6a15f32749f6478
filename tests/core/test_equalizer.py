"""The equalizer of `plus`: one factor per channel and sequence, from the first tile, kept."""

from __future__ import annotations

import pytest
import torch

from kvarn_ops import KVarNConfig, fake_quantize
from kvarn_ops.hadamard import hadamard
from kvarn_ops.layout import allocate
from kvarn_ops.ops.append import store
from kvarn_ops.reference.normalize import equalizer

CONFIG = KVarNConfig.from_preset("k2v2_g32", num_sink_tokens=8)
DIM = 64


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_loud_channel_is_divided_by_the_root_of_its_loudness():
    tile = torch.ones(32, DIM)
    tile[:, 5] = 16.0
    factor = torch.exp2(equalizer(tile).float())
    assert (factor[5] / factor[0]).item() == pytest.approx(4.0, rel=2e-3)
    assert factor.log2().mean().abs() < 1e-3, "the mean factor is 1"


@pytest.mark.parametrize("amplitude", [1e-6, 1e-3, 1.0, 6e4])
def test_it_does_not_depend_on_amplitude(amplitude):
    tile = gaussian(32, DIM) * torch.exp(gaussian(DIM, seed=1))
    tile = tile / tile.abs().max()
    assert torch.allclose(equalizer(tile * amplitude), equalizer(tile), atol=2e-3)


@pytest.mark.parametrize("kind", ["zeros", "silent channels", "one channel"])
def test_silence_gives_finite_factors(kind):
    tile = gaussian(32, DIM)
    if kind == "zeros":
        tile = torch.zeros_like(tile)
    elif kind == "silent channels":
        tile[:, ::3] = 0
    else:
        tile[:, 1:] = 0
    found = equalizer(tile)
    assert found.isfinite().all()
    assert found.abs().max() <= 4
    if kind == "zeros":
        assert not found.any()
        assert found.signbit().all(), "made, and none: not made again for a fork"


def append(cache, k, v, rotation):
    store(cache, k, v, None, rotation, CONFIG)


def filled(k, v, chunks):
    cache = allocate(CONFIG, k.shape[0], k.shape[1], DIM, 256, torch.float32, "cpu")
    rotation = hadamard(DIM)
    done = 0
    for count in chunks:
        new = slice(done, done + count)
        append(cache, k[:, :, new], v[:, :, new], rotation)
        done += count
    return cache


def test_it_is_made_once_from_the_first_tile_however_tokens_arrive():
    k, v = gaussian(2, 3, 200, DIM), gaussian(2, 3, 200, DIM, seed=1)
    k[..., 3] *= 9
    v[..., 7] *= 5
    at_once, in_steps = filled(k, v, [200]), filled(k, v, [39] + [1] * 161)
    first = slice(8, 40)
    for name, x in (("k_equalizer", k), ("v_equalizer", v)):
        wanted = equalizer(x[:, :, first])
        for cache in (at_once, in_steps):
            assert torch.equal(getattr(cache, name), wanted), name
    assert torch.equal(at_once.k_codes, in_steps.k_codes)


def test_a_row_of_silence_keeps_having_none():
    k, v = torch.zeros(1, 1, 100, DIM), gaussian(1, 1, 100, DIM)
    cache = filled(k, v, [60, 40])
    assert not cache.k_equalizer.any()
    kept = cache.v_equalizer.clone()
    cache.seq_lens.fill_(8)  # as in a fork: its own first tile comes after shared ones
    append(cache, gaussian(1, 1, 40, DIM), gaussian(1, 1, 40, DIM) * 5, hadamard(DIM))
    assert not cache.k_equalizer.any()
    assert torch.equal(cache.v_equalizer, kept)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_does_not_decide_the_factors(bad):
    k, v = gaussian(1, 1, 40, DIM), gaussian(1, 1, 40, DIM, seed=1)
    good = filled(k, v, [40]).k_equalizer
    k[0, 0, 20, 11] = bad
    found = filled(k, v, [40]).k_equalizer
    assert (found - good).abs().max() < 0.1


def test_there_is_none_before_the_first_tile_and_none_for_the_published_encoder():
    k, v = gaussian(1, 1, 39, DIM), gaussian(1, 1, 39, DIM, seed=1)
    assert not filled(k, v, [39]).k_equalizer.any()
    paper = KVarNConfig.from_preset("k2v2_g32", num_sink_tokens=8, encoder="paper")
    cache = allocate(paper, 1, 1, DIM, 256, torch.float32, "cpu")
    store(cache, gaussian(1, 1, 100, DIM), gaussian(1, 1, 100, DIM), None, hadamard(DIM), paper)
    assert not cache.k_equalizer.any()
    assert not cache.v_equalizer.any()


def test_outlier_channels_no_longer_spoil_the_others():
    """Relative error of the quiet channels of K, with 4-fold and 16-fold outliers."""
    k = gaussian(1, 1, 8 + 32 * 6, DIM)
    loud = [5, 20, 41]

    def quiet_error(config, factor):
        x = k.clone()
        x[..., loud] *= factor
        error = (fake_quantize(x, x, config)[0] - x)[:, :, 8:]
        quiet = [c for c in range(DIM) if c not in loud]
        return (error[..., quiet].norm() / x[:, :, 8:][..., quiet].norm()).item()

    paper = KVarNConfig.from_preset("k2v2_g32", num_sink_tokens=8, encoder="paper")
    plain = quiet_error(CONFIG, 1.0)
    assert quiet_error(CONFIG, 4.0) < 1.35 * plain
    assert quiet_error(CONFIG, 16.0) < 2.5 * plain
    assert quiet_error(paper, 16.0) > 3.5 * plain, "what the test is about is gone"
