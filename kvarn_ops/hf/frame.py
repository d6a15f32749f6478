"""The frame in which a layer's values arrive: their own, or rotated by folded weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from ..config import KVarNConfig
from ..errors import CacheError

if TYPE_CHECKING:
    from .layer import KVarNLayer

__all__ = ["Frame", "frames", "take_frame"]


class Frame(NamedTuple):
    """How a layer stores what arrives in one frame."""

    config: KVarNConfig
    line: str  # the config as ops carry it


def frames(config: KVarNConfig) -> dict[bool, Frame]:
    """By whether values arrive rotated: then the layer does not rotate them itself."""
    folded = replace(config, rotate_values=False)
    return {False: Frame(config, config.to_string()), True: Frame(folded, folded.to_string())}


def take_frame(layer: KVarNLayer, folded: bool) -> None:
    """Say whether values of a layer arrive rotated, before it is used for the first time.

    Raises
    ------
    CacheError
        If the layer holds values of the other frame, or they shall not be rotated at all.
    """
    if folded is layer.folded:
        return
    if layer.is_initialized:
        filled, used = ("without", "with") if folded else ("with", "without")
        raise CacheError(
            f"this cache was filled by a model {filled} fold_rotation=True and is now used {used} "
            "it, where values have another frame: fill a new cache."
        )
    if not layer.frames[False].config.rotate_values:
        raise CacheError(
            "this cache was made with rotate_values=False, and the weights of the model rotate "
            "values (fold_rotation=True): leave rotate_values on, or patch without folding."
        )
    layer.folded = folded
    layer.config, layer.config_line = layer.frames[folded]
