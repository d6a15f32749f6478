"""Both encoders on input that nobody wants: bad values, extremes, zeros, wrong arguments."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvarn_ops.config import BITS
from kvarn_ops.errors import InputError
from kvarn_ops.hadamard import hadamard
from kvarn_ops.reference import encode as encode_module
from kvarn_ops.reference.encode import sanitize
from tiles import (
    ERROR_LIMIT,
    SIDES,
    assert_all_finite,
    assert_equal,
    bit_widths,
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

ENCODERS = ("paper", "plus")
pytestmark = pytest.mark.usefixtures("one_thread")


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
