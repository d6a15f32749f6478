"""Both encoders: against a float64 model, their accuracy, and that tiles do not see each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import float64_model
from kvarn_ops.config import BITS, GROUP_SIZES
from kvarn_ops.hadamard import hadamard
from kvarn_ops.reference import encode as encode_module
from kvarn_ops.reference.encode import EncodedTiles
from tiles import (
    ERROR_LIMIT,
    KINDS,
    SIDES,
    assert_all_finite,
    assert_equal,
    bit_widths,
    codes_of,
    decode,
    encode,
    groups,
    make_config,
    make_tiles,
    quick,
    relative_error,
    round_trip,
    sides,
    unrotated,
)

HEAD_DIMS = (32, 64, 80, 96, 112, 128, 192, 576)
ENCODERS = ("paper", "plus")
pytestmark = pytest.mark.usefixtures("one_thread")


# --- the float64 model -------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("encoder", ENCODERS)
@quick(10)
@given(
    side=sides,
    bits=bit_widths,
    group=groups,
    kind=st.sampled_from(KINDS),
    std=st.sampled_from((0.02, 0.3, 1.0, 25.0)),
    seed=st.integers(0, 10**6),
)
def test_codes_and_values_are_those_of_the_model(
    encoder: str,
    head_dim: int,
    side: str,
    bits: int,
    group: int,
    kind: str,
    std: float,
    seed: int,
) -> None:
    x = make_tiles(kind, group, head_dim, seed=seed, std=std)
    config = make_config(side, bits, group, encoder=encoder)
    tiles = encode(side, x, config)
    assert_all_finite(tiles)
    codes = codes_of(side, tiles, config).long().numpy()

    rotation = hadamard(head_dim, torch.float64)
    tile = (x.double() @ rotation).numpy()
    tile, token_axis = (tile.T, 1) if side == "k" else (tile, 0)
    candidates = float64_model.encode(tile, bits, encoder, config.norm_iters, token_axis)
    model = min(candidates, key=lambda c: int((c.codes != codes).sum()))

    # Float32 cannot see on which side of a tie these lie.
    from_tie = abs(model.unrounded - model.unrounded.round())
    tie = abs(from_tie - 0.5) < 1e-5 * 2**bits
    differ = (model.codes != codes) & ~model.ambiguous_rows[:, None]
    assert not (differ & ~tie).any(), f"{int((differ & ~tie).sum())} codes differ off a tie"
    assert abs(model.codes - codes)[differ].max(initial=0) <= 1
    assert differ.sum() <= 3 + 1e-4 * codes.size

    # Fp16 scales and offsets cost up to 2**-11 each.
    restored = torch.from_numpy(model.restored)
    restored = (restored.T if side == "k" else restored) @ rotation.T
    found = decode(side, tiles, config)
    assert relative_error(found, x) == pytest.approx(
        relative_error(restored, x), rel=0.01, abs=5e-4
    )
    if (model.codes == codes).all():
        assert relative_error(found, restored) <= 2.5e-3


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_combination_of_bits_group_and_head_dim(encoder: str, head_dim: int) -> None:
    for group in GROUP_SIZES:
        x = make_tiles("gauss", 1, group, head_dim, seed=group)
        for bits in BITS:
            for side in SIDES:
                config = make_config(side, bits, group, encoder=encoder)
                tiles = encode(side, x, config)
                rows, packed = (group, head_dim) if side == "k" else (head_dim, group)
                assert tiles.codes.shape == (1, rows, packed * bits // 8)
                assert tiles.affine.shape == (1, 2, packed)
                assert tiles.other_scale.shape == (1, rows)
                error = relative_error(decode(side, tiles, config), x)
                assert error < ERROR_LIMIT[encoder][bits], (group, bits, side)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_any_number_of_iterations(encoder: str, side: str) -> None:
    x = make_tiles("token_spread", 64, 64)
    errors = {
        n: relative_error(
            round_trip(side, x, c := make_config(side, 2, 64, encoder=encoder, num_norm_iters=n)),
            round_trip(side, x, replace(c, num_norm_iters=8)),
        )
        for n in (0, 1, 2, 16)
    }
    assert errors[0] > errors[2], "normalization changed nothing"
    assert errors[16] < 0.35  # codes near ties move, and nothing else


# --- quality -----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", KINDS)
def test_plus_is_more_accurate_than_paper_at_two_bits(kind: str, side: str) -> None:
    x = make_tiles(kind, 8, 128, 128)
    paper, plus = (
        relative_error(round_trip(side, x, make_config(side, 2, 128, encoder=encoder)), x)
        for encoder in ENCODERS
    )
    assert plus < 0.85 * paper


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("side", SIDES)
def test_accuracy_of_plus_does_not_depend_on_amplitude(side: str, bits: int) -> None:
    for kind in ("gauss", "token_spread", "channel_outlier"):
        x = make_tiles(kind, 4, 64, 64)
        x = x / x.std()
        config = make_config(side, bits, 64)
        reference = relative_error(round_trip(side, x, config), x)
        highest = 4 if kind == "gauss" else 3  # beyond, outliers leave fp16's range
        for exponent in range(-6, highest + 1):
            scaled = x.double().mul(10.0**exponent).float()
            error = relative_error(round_trip(side, scaled, config), scaled)
            assert error == pytest.approx(reference, rel=0.02), (kind, exponent)


def test_paper_loses_accuracy_where_the_published_floor_binds() -> None:
    """The defect that `plus` removes is kept in `paper`, which has to match published vectors."""
    x = make_tiles("token_spread", 8, 128, 128)
    paper, plus = (make_config("k", 2, 128, encoder=encoder) for encoder in ENCODERS)
    worse = relative_error(round_trip("k", x / 100, paper), x / 100)
    assert worse > 1.2 * relative_error(round_trip("k", x, paper), x)
    assert relative_error(round_trip("k", x / 100, plus), x / 100) < 0.6 * worse


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("bits", BITS)
def test_plus_keeps_the_norm_of_each_token(side: str, bits: int) -> None:
    for kind in KINDS:
        x = make_tiles(kind, 4, 64, 80, std=3.0)
        config = make_config(side, bits, 64)
        restored = decode(side, encode(side, x, config), config)  # the norm of what is rotated
        ratio = restored.norm(dim=-1) / x.norm(dim=-1)
        assert (ratio - 1).abs().max() < 1.5e-3, kind


@pytest.mark.parametrize("side", SIDES)
def test_clipping_without_the_norm_correction_shrinks_tokens(
    side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, config = make_tiles("token_spread", 8, 128, 128), make_config(side, 2, 128)

    def bias(restored: Tensor) -> float:
        """Mean relative change of the score of a query that looks for exactly this token."""
        return float(((restored * x).sum(-1) / x.square().sum(-1) - 1).mean())

    def norm_change(restored: Tensor) -> float:
        return float((restored.norm(dim=-1) / x.norm(dim=-1) - 1).mean())

    corrected = round_trip(side, x, config)
    monkeypatch.setattr(encode_module, "_norm_ratio", lambda tile, *_, **__: torch.ones(()))
    clipped_only = round_trip(side, x, config)
    assert abs(norm_change(corrected)) < 1e-3
    assert norm_change(clipped_only) < -0.03
    assert abs(bias(clipped_only)) > 1.5 * abs(bias(corrected))


def test_the_norm_correction_is_bounded() -> None:
    tile, restored = torch.full((4, 3), 100.0), torch.full((4, 3), 1e-3)
    restored[:, 1] = 50.0
    restored[:, 2] = 0.0
    ratio = encode_module._norm_ratio(tile, restored, channel_dim=-2)
    assert ratio.tolist() == [[8.0, 2.0, 1.0]]


# --- tiles do not see each other ---------------------------------------------------------------


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("side", SIDES)
def test_a_batch_of_tiles_is_encoded_as_each_alone(side: str, encoder: str) -> None:
    """In particular the best iterate: these tiles disagree about which one it is."""
    x = torch.stack([make_tiles(kind, 64, 64, std=s) for kind in KINDS for s in (0.01, 1, 50)])
    x = torch.cat([x, torch.zeros(1, 64, 64), torch.ones(1, 64, 64)]).reshape(1, 1, -1, 64, 64)
    # Without rotation: a matrix product may sum in another order for another batch.
    config = unrotated(make_config(side, 2, 64, encoder=encoder))
    together = encode(side, x, config)
    for index in range(x.shape[2]):
        alone = encode(side, x[:, :, index : index + 1].contiguous(), config)
        assert_equal(alone, EncodedTiles(*(t[:, :, index : index + 1] for t in together)))


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("side", SIDES)
def test_the_layout_of_the_input_in_memory_does_not_matter(side: str, encoder: str) -> None:
    x = make_tiles("token_spread", 2, 3, 64, 80)
    config = make_config(side, 4, 64, encoder=encoder)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    padded = torch.full((2, 3, 64, 96), torch.nan)
    padded[..., :80] = x
    for view in (strided, padded[..., :80]):
        found, wanted = round_trip(side, view, config), round_trip(side, x, config)
        assert (found - wanted).abs().max() <= 1e-2 * x.abs().max()
        assert relative_error(found, wanted) < 1e-2


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e38, -65504.0])
def test_a_bad_value_stays_in_its_tile(side: str, encoder: str, bad: float) -> None:
    x = make_tiles("gauss", 2, 2, 3, 64, 64)  # rows, heads, tiles
    dirty = x.clone()
    dirty[1, 0, 2, 7, 5] = bad
    config = make_config(side, 2, 64, encoder=encoder)
    clean_tiles, dirty_tiles = encode(side, x, config), encode(side, dirty, config)
    assert_all_finite(dirty_tiles)
    assert decode(side, dirty_tiles, config).isfinite().all()
    others = torch.ones(2, 2, 3, dtype=torch.bool)
    others[1, 0, 2] = False
    assert_equal(
        EncodedTiles(*(t[others] for t in dirty_tiles)),
        EncodedTiles(*(t[others] for t in clean_tiles)),
    )
