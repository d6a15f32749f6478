"""A `KVarNCache` in a safetensors file.

Live tokens only, so that a file is smaller than the cache and may be read into one of another
capacity. The header carries the format's version, the config line and the model's config; a file
is read only for an equal model and, if one is asked for, an equal config. Weights are not compared:
a cache of a fine-tuned model fits its base model and is nonsense there.

    layers.<i>.<field of TileCache>     packed layers; tiles `[B, H, live, ...]`, forks merged
    layers.<i>.high_water               `[B]` int64
    layers.<i>.<attribute>              layers that are not packed, with a description in the header
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .._compat import cache_capacity
from ..config import KVarNConfig
from ..errors import CacheError
from ..layout import PackedTiles, TileCache, allocate
from . import stock
from .fork import copy_live, merged
from .frame import OWN_FRAME, take_frame
from .layer import KVarNLayer

if TYPE_CHECKING:
    from .cache import KVarNCache

__all__ = ["load", "save"]

FORMAT_VERSION = 2  # 1 had no equalizers
_HEADER = "kvarn_cache"

# Fields of a model's config that do not change what its keys and values are.
_IRRELEVANT = {
    *("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype"),
    *("_attn_implementation", "attn_implementation", "cache_implementation", "use_cache"),
    *("output_attentions", "output_hidden_states", "return_dict", "attention_dropout"),
    *("id2label", "label2id", "problem_type", "initializer_range", "chunk_size_feed_forward"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
}


def save(cache: KVarNCache, path: str | Path) -> None:
    """Write `cache` to `path`, whole or not at all: an older file stays until the new one is done.

    Raises
    ------
    CacheError
        If the cache was never used or the folder cannot be written.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    layers: list[dict[str, Any]] = []
    for index, layer in enumerate(cache.layers):
        prefix = f"layers.{index}"
        if not isinstance(layer, KVarNLayer):
            state = stock.to_plain(layer, prefix, tensors)
            layers.append({"class": type(layer).__name__, "state": state})
            continue
        if layer.tiles is None:
            raise CacheError("this cache is empty, there is nothing to save: use it first.")
        tiles, high_water = merged(layer)
        for name, tensor in (tiles._asdict() | {"high_water": high_water}).items():
            tensors[f"{prefix}.{name}"] = tensor.contiguous()
        layers.append(
            {
                "class": "KVarNLayer",
                "slots": int(layer.cumulative_length),
                "frame": layer.frame,
            }
        )
    header = {
        "version": FORMAT_VERSION,
        "config": cache.kvarn_config.to_string(),
        "model": _model_fields(cache.model_config),
        "capacity": cache_capacity(cache),
        "layers": layers,
    }
    _write(tensors, {_HEADER: json.dumps(header)}, path)


def load(
    path: str | Path,
    model_config: Any,
    max_cache_len: int | None,
    config: KVarNConfig | str | None,
    backend: str,
    device: torch.device,
    offload_tiles: bool,
) -> KVarNCache:
    """Read what `save` wrote; arguments and errors as in `KVarNCache.load`."""
    from .cache import KVarNCache

    path = Path(path)
    header, tensors = _read(path)
    stored = KVarNConfig.from_string(header["config"])
    wanted = stored if config is None else KVarNConfig.coerce(config)
    if wanted.to_string() != stored.to_string():
        raise CacheError(
            f"{path.name} holds a cache of {stored.to_string()}, not of {wanted.to_string()}: "
            "leave config out, or fill a new cache."
        )
    _check_model(header["model"], _model_fields(model_config), path)
    used = max((entry.get("slots", 0) for entry in header["layers"]), default=0)
    capacity = header["capacity"] if max_cache_len is None else max_cache_len
    if capacity < used:
        raise CacheError(
            f"{path.name} holds {used} tokens per row, max_cache_len={capacity} is too small: "
            f"give {used} or more."
        )
    cache = KVarNCache(
        model_config, capacity, stored, backend=backend, device=device, offload_tiles=offload_tiles
    )
    for index, (layer, entry) in enumerate(zip(cache.layers, header["layers"], strict=True)):
        if type(layer).__name__ != entry["class"]:
            raise CacheError(
                f"{path.name} was written with a {entry['class']} as layer {index}, this version "
                f"of transformers makes a {type(layer).__name__}: fill a new cache."
            )
        if isinstance(layer, KVarNLayer):
            take_frame(layer, entry.get("frame", OWN_FRAME))
            _fill(layer, f"layers.{index}", tensors, entry["slots"], device, path)
        else:
            stock.update_from_plain(layer, entry["state"], tensors, device)
    return cache


def _fill(
    layer: KVarNLayer,
    prefix: str,
    tensors: dict[str, Tensor],
    slots: int,
    device: torch.device,
    path: Path,
) -> None:
    names = (*TileCache._fields, "high_water")
    missing = [name for name in names if f"{prefix}.{name}" not in tensors]
    if missing:
        raise CacheError(f"{path.name} is damaged: {prefix}.{missing[0]} is missing.")
    saved = {name: tensors[f"{prefix}.{name}"] for name in names}
    high_water = saved.pop("high_water")
    tiles = TileCache(**saved)
    batch, heads, _, head_dim = tiles.k_tail.shape
    lengths = tiles.seq_lens
    if lengths.min() < 0 or lengths.max() > slots or high_water.shape != lengths.shape:
        raise CacheError(f"{path.name} is damaged: layer {prefix} has impossible lengths.")
    live = layer.config.num_tiles(int(lengths.max()))
    kind = tiles.k_tail.dtype
    expected = allocate(layer.config, batch, heads, head_dim, 1, kind, "meta")
    for name, tensor, model in zip(TileCache._fields, tiles, expected, strict=True):
        shape = list(model.shape)
        if name in PackedTiles._fields:
            shape[2] = live
        if list(tensor.shape) != shape or tensor.dtype != model.dtype:
            raise CacheError(
                f"{path.name} is damaged: {prefix}.{name} is {tensor.dtype} {list(tensor.shape)} "
                f"instead of {model.dtype} {shape}."
            )
    own = layer.allocated(batch, heads, head_dim, kind, device)
    copy_live(tiles, own, layer.config)
    layer.cumulative_length.fill_(slots)
    layer.adopt(own, high_water=high_water.to(device))


def _write(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    """Write beside the target, force it to disk, then replace: no reader sees half a file."""
    try:
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=".unfinished"
        )
    except OSError as error:
        raise CacheError(f"cannot write {path}: {error.strerror}.") from None
    try:
        os.close(handle)
        save_file(tensors, name, metadata=metadata)
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(name, path)
    except OSError as error:
        raise CacheError(f"cannot write {path}: {error.strerror}.") from None
    finally:
        Path(name).unlink(missing_ok=True)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise CacheError(f"{path} does not exist: give a file that KVarNCache.save wrote.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if _HEADER not in metadata:
                raise CacheError(f"{path.name} is no cache: KVarNCache.save did not write it.")
            header = json.loads(metadata[_HEADER])
            if not {"version", "config", "model", "capacity", "layers"} <= header.keys():
                raise CacheError(f"{path.name} is damaged: its header is incomplete.")
            if (version := header["version"]) > FORMAT_VERSION:
                raise CacheError(
                    f"{path.name} has format version {version}, this package reads up to "
                    f"{FORMAT_VERSION}: upgrade kvarn-ops."
                )
            if version < FORMAT_VERSION:
                raise CacheError(
                    f"{path.name} has format version {version}, this package reads version "
                    f"{FORMAT_VERSION}: fill a new cache."
                )
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CacheError(
            f"{path.name} is truncated or damaged ({error}): save the cache again."
        ) from None


def _model_fields(model_config: Any) -> dict[str, Any]:
    """The decoder's config without what does not matter for keys and values, as JSON."""
    fields = model_config.get_text_config(decoder=True).to_dict()
    kept = {key: value for key, value in fields.items() if key not in _IRRELEVANT}
    return json.loads(json.dumps(kept, default=str, sort_keys=True))


def _check_model(saved: dict[str, Any], current: dict[str, Any], path: Path) -> None:
    # A field that only one side has comes from another version of transformers.
    differing = [key for key in saved if key in current and saved[key] != current[key]]
    if differing:
        key = differing[0]
        raise CacheError(
            f"{path.name} belongs to another model: {key} is {saved[key]!r} there and "
            f"{current[key]!r} here"
            + (f", {len(differing) - 1} more differ." if differing[1:] else ".")
        )
