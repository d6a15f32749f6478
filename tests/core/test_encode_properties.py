"""Both encoders: against a float64 model, over amplitudes, and on input that nobody wants."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import float64_model
from kvarn_ops.config import BITS, GROUP_SIZES, KVarNConfig
from kvarn_ops.errors import InputError
from kvarn_ops.hadamard import hadamard
from kvarn_ops.layout import unpack_codes
from kvarn_ops.reference import encode as encode_module
from kvarn_ops.reference.encode import EncodedTiles, sanitize
from tiles import KINDS, SIDES, decode, encode, make_config, make_tiles, relative_error, round_trip

HEAD_DIMS = (32, 64, 80, 96, 112, 128, 192, 576)
ENCODERS = ("paper", "plus")
# Relative errors of gaussian tiles, the worst shape included (576 channels, min-max rounding).
ERROR_LIMIT = {
    "paper": {2: 0.62, 3: 0.27, 4: 0.13, 8: 0.008},
    "plus": {2: 0.37, 3: 0.21, 4: 0.115, 8: 0.008},
}

sides = st.sampled_from(SIDES)
bit_widths = st.sampled_from(BITS)
groups = st.sampled_from(GROUP_SIZES)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiles are small: a second thread only waits, and badly on a machine with other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def quick(examples: int) -> settings:
    # No shrinking: whole tiles shrink slowly, and a failing example names its few parameters.
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        phases=(Phase.explicit, Phase.generate),
    )


def codes_of(side: str, tiles: EncodedTiles, config: KVarNConfig) -> Tensor:
    """Codes `[..., rows, columns]` in the orientation in which the method describes a tile."""
    bits = config.key_bits if side == "k" else config.value_bits
    return unpack_codes(tiles.codes, bits, tiles.affine.shape[-1]).mT


def unrotated(config: KVarNConfig) -> KVarNConfig:
    return replace(config, rotate_keys=False, rotate_values=False)


def assert_equal(found: EncodedTiles, wanted: EncodedTiles) -> None:
    for name, one, other in zip(EncodedTiles._fields, found, wanted):
        assert torch.equal(one, other), f"{name} differs"


def assert_all_finite(tiles: EncodedTiles) -> None:
    assert tiles.codes.dtype == torch.uint8
    for name in ("affine", "other_scale"):
        tensor = getattr(tiles, name)
        assert tensor.dtype == torch.float16
        assert tensor.isfinite().all(), f"{name} is not finite"
    assert (tiles.affine[..., 0, :] >= 0).all(), "a negative scale"
    assert (tiles.other_scale >= 0).all(), "a negative scale"
    assert tiles.affine[..., 1, :].abs().max() <= 2048, "an unbounded offset"


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
        restored = round_trip(side, x, make_config(side, bits, 64))
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


# --- input that nobody wants -------------------------------------------------------------------


def test_what_sanitize_stores() -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -7e4, 65504.0, 1e-40, -2.5, 0.0])
    expected = [0.0, 65504.0, -65504.0, 65504.0, -65504.0, 65504.0, float(x[6]), -2.5, 0.0]
    assert sanitize(x).tolist() == expected
    for dtype in (torch.float16, torch.bfloat16):
        assert sanitize(torch.tensor([torch.nan, torch.inf, -1.5], dtype=dtype)).tolist() == [
            0.0,
            65504.0,
            -1.5,
        ]
        assert sanitize(x.to(dtype)).dtype == torch.float32


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("side", SIDES)
def test_nan_is_stored_as_zero_and_inf_as_the_largest_half(side: str, encoder: str) -> None:
    x = make_tiles("gauss", 64, 64)
    x[3, 4], x[5, 6], x[7, 8] = torch.nan, torch.inf, -torch.inf
    by_hand = x.clone()
    by_hand[3, 4], by_hand[5, 6], by_hand[7, 8] = 0.0, 65504.0, -65504.0
    config = make_config(side, 4, 64, encoder=encoder)
    assert_equal(encode(side, x, config), encode(side, by_hand, config))


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("rotate", [True, False])
@quick(25)
@given(
    side=sides,
    bits=bit_widths,
    group=groups,
    dtype=st.sampled_from((torch.float16, torch.bfloat16, torch.float32)),
    base=st.sampled_from(("zeros", "constant", "gauss", "same_token", "same_channel", "extreme")),
    exponent=st.integers(-45, 38),
    spoil=st.lists(
        st.tuples(
            st.sampled_from(("element", "token", "channel")),
            st.integers(0, 31),
            st.sampled_from(
                (0.0, 1e-45, 1e-40, 6e-8, 1e-5, 1.0, 3e4, 65504.0, -65504.0, 1e6, 3e38)
                + (torch.nan, torch.inf, -torch.inf)
            ),
        ),
        max_size=4,
    ),
)
def test_anything_at_all_gives_finite_values(
    encoder: str,
    rotate: bool,
    side: str,
    bits: int,
    group: int,
    dtype: torch.dtype,
    base: str,
    exponent: int,
    spoil: list[tuple[str, int, float]],
) -> None:
    x = make_tiles("gauss", group, 32)
    x = {
        "zeros": torch.zeros_like(x),
        "constant": torch.ones_like(x),
        "gauss": x,
        "same_token": x[:1].expand_as(x).clone(),
        "same_channel": x[:, :1].expand_as(x).clone(),
        "extreme": x.sign() * 65504.0,
    }[base]
    x = x.double().mul(10.0**exponent).float() if base != "extreme" else x
    for what, index, value in spoil:
        if what == "element":
            x[index, (7 * index) % 32] = value
        elif what == "token":
            x[index] = value
        else:
            x[:, index] = value
    x = x.to(dtype)
    config = make_config(side, bits, group, encoder=encoder, rotate_keys=rotate)
    config = replace(config, rotate_values=rotate)
    tiles = encode(side, x, config)
    assert_all_finite(tiles)
    restored = decode(side, tiles, config)
    assert restored.isfinite().all()
    if encoder == "plus":  # the published method can be off by a factor of ten on such tiles
        assert restored.norm() <= 1.01 * sanitize(x).norm() + 1e-4


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("bits", BITS)
def test_zero_tokens_come_back_as_zeros_with_plus(side: str, bits: int) -> None:
    x = make_tiles("token_spread", 2, 64, 64, std=20.0)
    alive = torch.ones(64, dtype=torch.bool)
    alive[[0, 5, 63]] = False
    x[:, ~alive] = 0.0
    config = make_config(side, bits, 64)
    restored = round_trip(side, x, config)
    assert (restored[:, ~alive] == 0).all()
    dense = relative_error(restored[:, alive], x[:, alive])
    assert dense < ERROR_LIMIT["plus"][bits], "zero tokens spoiled the others"
    assert not round_trip(side, torch.zeros_like(x), config).any()


@pytest.mark.parametrize("side", SIDES)
def test_a_nearly_zero_token_does_not_spoil_the_others(side: str) -> None:
    """At every size: one that counted in some iterates only once decided which was the best."""
    x = make_tiles("gauss", 4, 64, 64) * make_tiles("gauss", 4, 64, 1, seed=1).exp()
    others = torch.arange(64) != 7
    config = make_config(side, 2, 64)
    reference = relative_error(round_trip(side, x, config)[:, others], x[:, others])
    for exponent in range(-12, 0):
        x[:, 7] = make_tiles("gauss", 4, 64, seed=2, std=10.0**exponent)
        error = relative_error(round_trip(side, x, config)[:, others], x[:, others])
        assert error < 1.08 * reference, f"a token of size 1e{exponent}"


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("side", SIDES)
def test_constant_rows_and_tiles_are_kept(side: str, rotate: bool, encoder: str) -> None:
    config = make_config(side, 2, 64, encoder=encoder, rotate_keys=rotate)
    config = replace(config, rotate_values=rotate)
    for constant in (1.0, -3.5, 200.0):
        x = torch.full((64, 64), constant)
        # `paper` stores zero points apart from scales, both rounded.
        limit = 2e-3 if encoder == "plus" else 1e-2
        assert relative_error(round_trip(side, x, config), x) < limit
    same_tokens = make_tiles("gauss", 1, 64).expand(64, 64)
    limit = 2e-3 if side == "k" else 0.62  # V rows are tokens: nothing constant along them
    assert relative_error(round_trip(side, same_tokens, config), same_tokens) < limit


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("side", SIDES)
def test_the_extremes_of_half_precision(side: str, encoder: str) -> None:
    signs = make_tiles("gauss", 2, 64, 64).sign()
    config = make_config(side, 4, 64, encoder=encoder)
    for x in (65504 * signs, 65504 * torch.ones_like(signs), 3e4 + 3e4 * signs):
        x = x.half()
        tiles = encode(side, x, config)
        assert_all_finite(tiles)
        assert relative_error(decode(side, tiles, config), x) < 0.15


@pytest.mark.parametrize("side", SIDES)
def test_one_huge_element_costs_its_own_token_only(side: str) -> None:
    x = make_tiles("gauss", 64, 64)
    x[9, 9] = 6e4
    config = make_config(side, 4, 64)
    restored = round_trip(side, x, config)
    others = torch.arange(64) != 9
    assert relative_error(restored[9], x[9]) < 0.2
    if side == "k":
        assert relative_error(restored[others], x[others]) < 2 * ERROR_LIMIT["plus"][4]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("side", SIDES)
def test_low_precision_input_is_read_exactly(side: str, encoder: str, dtype: torch.dtype) -> None:
    x = make_tiles("gauss", 2, 64, 96).to(dtype)
    config = make_config(side, 4, 64, encoder=encoder)
    assert_equal(encode(side, x, config), encode(side, x.float(), config))


# --- check_finite, arguments -------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_check_finite_raises_and_changes_nothing(side: str, bad: float) -> None:
    x = make_tiles("gauss", 2, 64, 64)
    config = make_config(side, 2, 64, check_finite=True)
    assert_equal(encode(side, x, config), encode(side, x, replace(config, check_finite=False)))
    x[1, 2, 3] = bad
    before = x.clone()
    with pytest.raises(InputError, match=r"NaN or Inf.*check_finite=False"):
        encode(side, x, config)
    assert torch.equal(x.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("side", SIDES)
def test_inputs_are_not_written_and_a_given_rotation_is_used(side: str, encoder: str) -> None:
    x = make_tiles("gauss", 64, 64)
    x[0, 0] = torch.nan
    before, config = x.clone(), make_config(side, 2, 64, encoder=encoder)
    run = encode_module.encode_keys if side == "k" else encode_module.encode_values
    assert_equal(run(x, config, hadamard(64)), run(x, config))
    assert torch.equal(x.nan_to_num(), before.nan_to_num())
    assert_equal(run(x, unrotated(config), hadamard(64)), run(x, unrotated(config)))
