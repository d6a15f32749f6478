"""Tiles to quantize, and what tests ask about the result."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from torch import Tensor

from kvarn_ops.config import BITS, GROUP_SIZES, KVarNConfig
from kvarn_ops.layout import unpack_codes
from kvarn_ops.reference.decode import decode_keys, decode_values
from kvarn_ops.reference.encode import EncodedTiles, encode_keys, encode_values, first_equalizer

SIDES = ("k", "v")
KINDS = ("gauss", "token_spread", "token_outlier", "channel_outlier", "channel_offset")

# Relative errors of gaussian tiles, the worst shape included (576 channels, min-max rounding).
ERROR_LIMIT = {
    "paper": {2: 0.62, 3: 0.27, 4: 0.13, 8: 0.008},
    "plus": {2: 0.37, 3: 0.21, 4: 0.115, 8: 0.008},
}

sides = st.sampled_from(SIDES)
bit_widths = st.sampled_from(BITS)
groups = st.sampled_from(GROUP_SIZES)


def make_config(side: str, bits: int, group: int, **fields: object) -> KVarNConfig:
    """Config with `bits` on one side and the default on the other."""
    name = "key_bits" if side == "k" else "value_bits"
    return KVarNConfig(**{name: bits, "group_size": group, **fields})  # type: ignore[arg-type]


def make_tiles(kind: str, *shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    """Random tiles `[..., tokens, channels]`, fp32, of one of `KINDS`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    tokens, channels = shape[-2:]
    if kind == "token_spread":
        x = x * (torch.randn((*shape[:-1], 1), generator=generator) * 0.7).exp()
    elif kind == "token_outlier":
        x[..., tokens // 3, :] *= 30
    elif kind == "channel_outlier":
        x[..., channels // 5] *= 20
        x[..., channels // 2] *= 8
    elif kind == "channel_offset":
        x = x + 4 * torch.randn((channels,), generator=generator)
    return x * std


def encode(side: str, x: Tensor, config: KVarNConfig) -> EncodedTiles:
    return encode_keys(x, config) if side == "k" else encode_values(x, config)


def decode(side: str, tiles: EncodedTiles, config: KVarNConfig) -> Tensor:
    return decode_keys(tiles, config) if side == "k" else decode_values(tiles, config)


def round_trip(side: str, x: Tensor, config: KVarNConfig, first: Tensor | None = None) -> Tensor:
    """Tiles of sequences whose first tiles are `first`; None: each is the first of its own."""
    equalizer = first_equalizer(x if first is None else first, config)
    if side == "k":
        return decode_keys(encode_keys(x, config, None, equalizer), config, None, equalizer)
    return decode_values(encode_values(x, config, None, equalizer), config, None, equalizer)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).norm() / wanted.norm())


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
