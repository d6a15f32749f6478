"""The frame in which a layer's values arrive: their own, or that of folded weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config import KVarNConfig
from ..errors import CacheError

if TYPE_CHECKING:
    from .layer import KVarNLayer

__all__ = ["FOLDED", "OWN_FRAME", "Folded", "Form", "forms", "frame_of", "take_frame"]

FOLDED = "kvarn_folded"  # attribute of attention modules with folded weights, a `Folded`
OWN_FRAME = "as the model makes them"


class Folded(NamedTuple):
    """What the weights of an attention module do to values."""

    frame: str  # for people; two caches fit together if it is equal
    values: str  # the submodule that writes them
    output: str  # the one that reads what attention makes of them


class Form(NamedTuple):
    """How a layer stores what arrives in one kind of frame."""

    config: KVarNConfig
    line: str  # the config as ops carry it


def forms(config: KVarNConfig) -> dict[bool, Form]:
    """By whether values arrive rotated: then the layer does not rotate them itself."""
    folded = replace(config, rotate_values=False)
    return {False: Form(config, config.to_string()), True: Form(folded, folded.to_string())}


def frame_of(module: Any) -> str:
    """The frame in which an attention module gives its values to the cache."""
    folded = vars(module).get(FOLDED)
    return OWN_FRAME if folded is None else folded.frame


def take_frame(layer: KVarNLayer, frame: str) -> None:
    """Say in which frame values of a layer arrive, before it is used for the first time.

    Raises
    ------
    CacheError
        If the layer holds values of another frame, or they shall not be rotated at all.
    """
    if frame == layer.frame:
        return
    if layer.is_initialized:
        raise CacheError(
            f"this cache holds values {layer.frame}, and the model that uses it now gives them "
            f"{frame} (patch(fold_rotation=...) differs, or its encoder): fill a new cache."
        )
    if not layer.forms[False].config.rotate_values:
        raise CacheError(
            "this cache was made with rotate_values=False, and the weights of the model rotate "
            "values (fold_rotation=True): leave rotate_values on, or patch without folding."
        )
    layer.frame = frame
    layer.config, layer.config_line = layer.forms[frame != OWN_FRAME]
