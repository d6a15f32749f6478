"""Methods by name: how a tile of keys or values is stored and read back, and what that costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from ..config import KVarNConfig
from ..errors import InputError
from ..reference.decode import decode_keys, decode_values
from ..reference.encode import encode_keys, encode_values, first_equalizer
from . import baselines
from .baselines import SCALE_BITS
from .variants import VARIANTS

__all__ = ["DEFAULT_METHODS", "METHODS", "Method", "parse_methods"]

# (tile, first tile of the sequence, config) -> what is read back, all [..., G, D] fp32
Quantize = Callable[[Tensor, Tensor, KVarNConfig], Tensor]


class Method(NamedTuple):
    """A quantizer of tiles `[..., group_size, head_dim]` fp32, and its effective bits."""

    name: str
    keys: Quantize
    values: Quantize
    bits: Callable[[KVarNConfig, int], float]  # (config, head_dim): per element, mean of K and V
    encoder: str | None = None  # of the product's cache, if that can store the same

    def product_config(self, config: KVarNConfig) -> KVarNConfig:
        """The product's config that stores what this method stores."""
        if self.encoder is None:
            raise InputError(f"the method {self.name} is not one of the product's encoders.")
        return replace(config, encoder=self.encoder, num_norm_iters=None)

    def depends_on_bits(self) -> bool:
        """Whether presets differ for this method."""
        return self.name not in ("none", "fp8")


def _mean_bits(config: KVarNConfig) -> float:
    return (config.key_bits + config.value_bits) / 2


def _none() -> Method:
    return Method("none", lambda x, first, c: x, lambda x, first, c: x, lambda c, d: 16.0)


def _fp8() -> Method:
    return Method(
        "fp8",
        lambda x, first, c: baselines.fp8(x),
        lambda x, first, c: baselines.fp8(x),
        lambda c, d: 8.0,
    )


def _rtn() -> Method:
    """Round to nearest per token: one scale and zero point over head_dim."""
    return Method(
        "rtn",
        lambda x, first, c: baselines.round_to_nearest(x, c.key_bits, -1),
        lambda x, first, c: baselines.round_to_nearest(x, c.value_bits, -1),
        lambda c, d: _mean_bits(c) + 2 * SCALE_BITS / d,
    )


def _kivi(group: int) -> Method:
    """KIVI (arXiv 2402.02750): K per channel over `group` tokens, V per token over channels."""

    def bits(config: KVarNConfig, head_dim: int) -> float:
        per_key = 2 * SCALE_BITS / min(group, config.group_size)
        per_value = 2 * SCALE_BITS / min(group, head_dim)
        return _mean_bits(config) + (per_key + per_value) / 2

    return Method(
        f"kivi_g{group}",
        lambda x, first, c: baselines.round_to_nearest_groups(x, c.key_bits, -2, group),
        lambda x, first, c: baselines.round_to_nearest_groups(x, c.value_bits, -1, group),
        bits,
    )


def _hadamard() -> Method:
    """KVarN without the normalization: rotate, K per channel of a tile, V per token."""

    def keys(tile: Tensor, first: Tensor, config: KVarNConfig) -> Tensor:
        x, matrix = baselines.rotated(tile)
        return baselines.round_to_nearest(x, config.key_bits, -2) @ matrix.mT

    def values(tile: Tensor, first: Tensor, config: KVarNConfig) -> Tensor:
        x, matrix = baselines.rotated(tile)
        return baselines.round_to_nearest(x, config.value_bits, -1) @ matrix.mT

    return Method(
        "hadamard",
        keys,
        values,
        lambda c, d: _mean_bits(c) + SCALE_BITS / c.group_size + SCALE_BITS / d,
    )


def _turbo() -> Method:
    return Method(
        "turbo",
        lambda x, first, c: baselines.turbo(x, c.key_bits),
        lambda x, first, c: baselines.turbo(x, c.value_bits),
        lambda c, d: _mean_bits(c) + SCALE_BITS / d,
    )


def _product(encoder: str) -> Method:
    def keys(tile: Tensor, first: Tensor, config: KVarNConfig) -> Tensor:
        config = replace(config, encoder=encoder, num_norm_iters=None)
        factors = first_equalizer(first, config)
        return decode_keys(encode_keys(tile, config, None, factors), config, None, factors)

    def values(tile: Tensor, first: Tensor, config: KVarNConfig) -> Tensor:
        config = replace(config, encoder=encoder, num_norm_iters=None)
        factors = first_equalizer(first, config)
        return decode_values(encode_values(tile, config, None, factors), config, None, factors)

    return Method(encoder, keys, values, lambda c, d: c.effective_bits(d), encoder)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        _none(),
        _rtn(),
        _kivi(32),
        _kivi(64),
        _kivi(128),
        _hadamard(),
        _turbo(),
        _fp8(),
        _product("paper"),
        _product("plus"),
    )
}
DEFAULT_METHODS = ",".join(METHODS)
METHODS |= {
    f"plus/{name}": Method(f"plus/{name}", variant.keys, variant.values, variant.bits)
    for name, variant in VARIANTS.items()
}


def parse_methods(text: str) -> list[Method]:
    """Methods by name, with commas.

    Raises
    ------
    InputError
        If a name is unknown or none is given.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise InputError(
            f"--methods {text!r}: {', '.join(unknown) or 'nothing'} is no method; choose of "
            f"{', '.join(METHODS)}."
        )
    return [METHODS[name] for name in names]
