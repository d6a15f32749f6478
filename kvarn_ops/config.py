"""`KVarNConfig`: every choice that decides which bytes are stored, and the names of the presets."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

from .errors import ConfigError, InputError

__all__ = ["DEFAULT_PRESET", "KVarNConfig", "parse_presets"]

DEFAULT_PRESET = "k4v2_g128"
BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128)
ENCODERS = ("paper", "plus")
SCALE_DTYPES = ("fp16",)
PRESET_GRAMMAR = (
    "k<bits>v<bits>[_g<size>] with bits in 2, 3, 4, 8 and size in 32, 64, 128 (128 if left out), "
    'for example "k4v2_g128" or "k2v2"'
)

_PRESET = re.compile(r"k([2348])v([2348])(?:_g(32|64|128))?")
_DENSE_BYTES = 2  # per element of the 16-bit cache that compression ratios refer to
_SCALE_BYTES = 2


@dataclass(frozen=True)
class KVarNConfig:
    """How keys and values are quantized.

    Parameters
    ----------
    key_bits, value_bits : int
        Bits per code: 2, 3, 4 or 8. Bits are better spent on keys.
    group_size : int
        Tokens per tile, the unit that is quantized at once: 32, 64 or 128.
    num_sink_tokens : int
        The first tokens of each sequence, kept in the model's dtype.
    tail_tokens : int
        A complete tile is quantized once its last token is at least this many tokens old (0: as
        soon as it is complete). Removing up to this many of the newest tokens (`crop`) is exact.
    num_norm_iters : int or None
        Iterations of the variance normalization. None: 8 for `paper`, 2 for `plus`.
    encoder : {"plus", "paper"}
        `paper` is Algorithm 1 of arXiv 2606.03458 with min-max rounding, as published. `plus`
        stores the same bytes, chosen better: channels are equalized before the rotation,
        normalization does not depend on amplitude, rows are clipped by squared error, and each
        token keeps its norm.
    scale_dtype : {"fp16"}
        Storage of scales and zero points.
    rotate_keys, rotate_values : bool
        Whether a Hadamard rotation along head_dim precedes the quantization.
    check_finite : bool
        Raise `InputError` when a tile to be quantized holds NaN or Inf, instead of storing NaN as
        0 and Inf as the largest fp16 value. Costs a device synchronization per tile.

    Raises
    ------
    ConfigError
        If a field is outside its legal range.
    """

    key_bits: int = 4
    value_bits: int = 2
    group_size: int = 128
    num_sink_tokens: int = 128
    tail_tokens: int = 0
    num_norm_iters: int | None = None
    encoder: str = "plus"
    scale_dtype: str = "fp16"
    rotate_keys: bool = True
    rotate_values: bool = True
    check_finite: bool = False

    def __post_init__(self) -> None:
        for name, legal in (
            ("key_bits", BITS),
            ("value_bits", BITS),
            ("group_size", GROUP_SIZES),
            ("encoder", ENCODERS),
            ("scale_dtype", SCALE_DTYPES),
        ):
            value = getattr(self, name)
            if type(value) is not type(legal[0]) or value not in legal:
                raise ConfigError(f"{name}={value!r} is not supported: choose one of {legal}.")
        for name in ("num_sink_tokens", "tail_tokens", "num_norm_iters"):
            value = getattr(self, name)
            if name == "num_norm_iters" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"{name}={value!r} is not valid: give an integer >= 0.")
        for name in ("rotate_keys", "rotate_values", "check_finite"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} is not valid: give a bool.")

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> KVarNConfig:
        """Build a config from a preset name such as `"k4v2_g128"`; keywords override fields."""
        match = _PRESET.fullmatch(name) if isinstance(name, str) else None
        if match is None:
            raise ConfigError(f"{name!r} is not a preset name. The grammar is {PRESET_GRAMMAR}.")
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(overrides) - known)
        if unknown:
            raise ConfigError(
                f"{', '.join(unknown)}: no such field of KVarNConfig. Fields: "
                f"{', '.join(sorted(known))}."
            )
        key_bits, value_bits, group_size = match.groups()
        preset: dict[str, Any] = {
            "key_bits": int(key_bits),
            "value_bits": int(value_bits),
            "group_size": int(group_size or 128),
        }
        return cls(**(preset | overrides))

    @classmethod
    def coerce(cls, config: KVarNConfig | str, **overrides: Any) -> KVarNConfig:
        """Return a config from a config or a preset name, with overrides applied."""
        if isinstance(config, cls):
            try:
                return replace(config, **overrides)
            except TypeError as error:
                raise ConfigError(f"{error}: no such field of KVarNConfig.") from None
        return cls.from_preset(config, **overrides)  # type: ignore[arg-type]

    @property
    def preset(self) -> str:
        """The preset name that has this config's bits and group size."""
        return f"k{self.key_bits}v{self.value_bits}_g{self.group_size}"

    @property
    def norm_iters(self) -> int:
        """`num_norm_iters` with None resolved."""
        if self.num_norm_iters is not None:
            return self.num_norm_iters
        return 8 if self.encoder == "paper" else 2

    @property
    def equalizes(self) -> bool:
        """Whether channels are divided by factors of their own before the rotation."""
        return self.encoder == "plus"

    def num_tiles(self, length: int) -> int:
        """Number of quantized tiles of a sequence of `length` tokens."""
        return max(0, (length - self.num_sink_tokens - self.tail_tokens) // self.group_size)

    def allocated_tiles(self, max_cache_len: int) -> int:
        """Tiles that a cache for `max_cache_len` tokens allocates.

        At least two: compilers specialize on sizes 0 and 1, so that a small cache would be
        compiled apart from all others.
        """
        return max(2, self.num_tiles(max_cache_len))

    @property
    def ring_len(self) -> int:
        """Slots of the tail's ring buffer.

        A whole number of tiles, and large enough that after removing `tail_tokens` tokens every
        token of the tiles that are then unfinished again is still held in full precision.
        """
        return self.group_size * (1 + -(-2 * self.tail_tokens // self.group_size))

    def tile_bytes(self, head_dim: int) -> int:
        """Bytes of one tile of one KV head, K and V, codes and scales."""
        codes = self.group_size * head_dim * (self.key_bits + self.value_bits) // 8
        return codes + 3 * _SCALE_BYTES * (self.group_size + head_dim)

    @staticmethod
    def equalizer_bytes(head_dim: int) -> int:
        """Bytes of the equalizers of one KV head of one sequence, K and V."""
        return 2 * head_dim * _SCALE_BYTES

    def bytes_per_token(self, head_dim: int, num_kv_heads: int) -> float:
        """Bytes that one quantized token takes in one layer, K and V of all KV heads together."""
        return num_kv_heads * self.tile_bytes(head_dim) / self.group_size

    def effective_bits(self, head_dim: int) -> float:
        """Bits per element of a quantized tile, scales included (mean of K and V)."""
        return self.tile_bytes(head_dim) * 8 / (2 * self.group_size * head_dim)

    def compression_ratio(self, head_dim: int, context_len: int) -> float:
        """Bytes of a 16-bit cache over bytes of this one, sinks, tail and equalizers counted.

        Parameters
        ----------
        head_dim : int
            Width of a head.
        context_len : int
            Tokens in the sequence, which is also the capacity both caches are allocated for.
        """
        token = 2 * head_dim * _DENSE_BYTES
        dense_slots = self.num_sink_tokens + self.ring_len
        packed = self.allocated_tiles(context_len) * self.tile_bytes(head_dim)
        fixed = dense_slots * token + self.equalizer_bytes(head_dim)
        return context_len * token / (fixed + packed)

    def to_string(self) -> str:
        """The whole config as one line: the form in which ops and exported programs carry it."""
        rotated = ("k" if self.rotate_keys else "") + ("v" if self.rotate_values else "")
        return (
            f"{self.preset}:{self.encoder}{self.norm_iters}:sinks{self.num_sink_tokens}"
            f":tail{self.tail_tokens}:rot{rotated}:{self.scale_dtype}"
            + (":finite" if self.check_finite else "")
        )

    @staticmethod
    def from_string(text: str) -> KVarNConfig:
        """Inverse of `to_string`."""
        return _parse(text)


_LINE = re.compile(
    r"(?P<preset>[^:]+):(?P<encoder>[a-z]+)(?P<iters>\d+):sinks(?P<sinks>\d+):tail(?P<tail>\d+)"
    r":rot(?P<rot>k?v?):(?P<scale>\w+)(?P<finite>:finite)?"
)


@lru_cache(maxsize=256)
def _parse(text: str) -> KVarNConfig:
    match = _LINE.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is not a config line as KVarNConfig.to_string() writes it.")
    return KVarNConfig.from_preset(
        match["preset"],
        encoder=match["encoder"],
        num_norm_iters=int(match["iters"]),
        num_sink_tokens=int(match["sinks"]),
        tail_tokens=int(match["tail"]),
        rotate_keys="k" in match["rot"],
        rotate_values="v" in match["rot"],
        scale_dtype=match["scale"],
        check_finite=match["finite"] is not None,
    )


def parse_presets(text: str, option: str) -> dict[str, KVarNConfig]:
    """Configs by preset name, from what a command-line option was given: names with commas."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise InputError(f"{option} is empty: give preset names, for example k4v2,k2v2.")
    return {name: KVarNConfig.from_preset(name) for name in names}
