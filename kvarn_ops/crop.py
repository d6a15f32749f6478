"""Which of the newest tokens can be removed from a packed layer without any loss."""

from __future__ import annotations

from torch import Tensor

from .config import KVarNConfig
from .errors import CacheCropError

__all__ = ["check_crop"]


def check_crop(
    count: int, lengths: Tensor, high_water: Tensor, config: KVarNConfig, closed: int | None
) -> None:
    """Raise unless the newest `count` tokens of every row can be removed exactly.

    Parameters
    ----------
    count : int
        Tokens to remove.
    lengths : Tensor
        `[B]` int64, tokens per row.
    high_water : Tensor
        `[B]` int64, the most tokens that each row held: the ring was overwritten up to there.
    closed : int or None
        This many tiles, and those before the layer's own, are shared with a fork and stay
        finished. None: nothing is shared.

    Raises
    ------
    CacheCropError
        If a removed token, or one that becomes part of the tail again, is no longer held in full
        precision, or if a fork shares it.
    """
    sinks, tail, group = config.num_sink_tokens, config.tail_tokens, config.group_size
    if count > tail:
        raise CacheCropError(
            f"cannot remove {count} tokens: only the newest tail_tokens={tail} can be removed "
            "exactly. Patch with a larger tail_tokens, or reset() the cache."
        )
    if count > int(lengths.min()):
        raise CacheCropError(
            f"cannot remove {count} tokens from a row that holds {int(lengths.min())}."
        )
    for length, high in zip(lengths.tolist(), high_water.tolist(), strict=True):
        new = length - count
        if closed is not None and new - sinks - tail < closed * group:
            raise CacheCropError(
                f"cannot remove {count} tokens: this reaches tokens that a fork of the cache "
                "shares. Remove fewer, or fork again from a cache that was cropped before."
            )
        tail_start = config.num_tiles(new) * group
        oldest_held = high - sinks - config.ring_len
        if tail_start < new - sinks and tail_start < oldest_held:
            raise CacheCropError(
                f"cannot remove {count} tokens: together with earlier crops this reaches tokens "
                "that are no longer held in full precision. Use a larger tail_tokens."
            )
