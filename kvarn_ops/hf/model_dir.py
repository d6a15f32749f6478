"""A model directory, read without its weights: the model on the meta device, and their size."""

from __future__ import annotations

import json
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import InputError, reason

__all__ = ["ModelDir", "open_model_dir"]

_STORED_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_MAX_HEADER = 100 << 20  # bytes; the format's own limit


@dataclass(frozen=True)
class ModelDir:
    """What a directory in Hugging Face format says about its model."""

    name: str
    model: PreTrainedModel  # on the meta device: shapes without memory
    dtype: torch.dtype  # that keys and values will have
    weight_bytes: int
    weight_source: str  # where the number comes from
    remote_code: bool  # config.json names code of its own, which was not run


def open_model_dir(directory: Path, dtype: torch.dtype | None = None) -> ModelDir:
    """Build the model of `config.json` on the meta device; no weight is read.

    Parameters
    ----------
    directory : Path
        A local directory in Hugging Face format. `config.json` is enough.
    dtype : torch.dtype, optional
        None: what the config says, else what the weights are stored in, else bfloat16.

    Raises
    ------
    InputError
        If the directory holds no config from which transformers can build a model.
    """
    fields = _read_config(directory)
    config = _as_config(directory, fields)
    headers = _safetensors_headers(directory)
    text_config = config.get_text_config(decoder=True)
    stored = getattr(text_config, "dtype", None) or getattr(config, "dtype", None)
    dtype = dtype or stored or _stored_dtype(headers) or torch.bfloat16
    model = _build(directory, config, fields).to(dtype)
    weights, source = _weight_bytes(directory, headers, model)
    return ModelDir(
        directory.resolve().name, model.eval(), dtype, weights, source, "auto_map" in fields
    )


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        raise InputError(
            f"{str(directory)!r} has no config.json: give a local directory in Hugging Face format."
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} cannot be read as JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise InputError(f"{str(path)!r} holds no JSON object: it is not a model's config.")
    return fields


def _as_config(directory: Path, fields: dict[str, Any]) -> Any:
    import transformers

    kind = fields.get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        if "auto_map" in fields:
            raise InputError(
                f"the model in {str(directory)!r} brings code of its own (auto_map in "
                f"config.json), which is not run here, and transformers {transformers.__version__} "
                f"has no model_type {kind!r}: load it with trust_remote_code=True, patch it and "
                "print kvarn_ops.explain(model)."
            )
        raise InputError(
            f"transformers {transformers.__version__} does not know the model_type {kind!r} of "
            f"{str(directory / 'config.json')!r}: a newer version may."
        )
    try:
        return transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # whatever a config class makes of wrong values
        raise InputError(
            f"{str(directory / 'config.json')!r} is no valid {kind} config: {reason(error)}"
        ) from error


def _build(directory: Path, config: Any, fields: dict[str, Any]) -> PreTrainedModel:
    import transformers

    named = (fields.get("architectures") or [None])[0]
    model_class = getattr(transformers, str(named), None)
    try:
        with torch.device("meta"):
            if isinstance(model_class, type) and issubclass(model_class, PreTrainedModel):
                return model_class(config)
            return transformers.AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise InputError(
            f"transformers cannot build {named or 'a causal language model'} from "
            f"{str(directory / 'config.json')!r}: {reason(error)}"
        ) from error


def _safetensors_headers(directory: Path) -> list[dict[str, Any]]:
    """The headers of all weight files; empty unless every file that an index names is there."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_weight_map(index).values()))
    else:
        names = ["model.safetensors"]
    paths = [directory / name for name in names]
    if not all(path.is_file() for path in paths):
        return []
    return [_safetensors_header(path) for path in paths]


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{str(index)!r} is no index of weights: {reason(error)}") from None


def _safetensors_header(path: Path) -> dict[str, Any]:
    """Names, dtypes, shapes and offsets: a length of 8 bytes, then JSON, then the data."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MAX_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for entry in header.values():
            start, stop = entry["data_offsets"]
            entry["bytes"] = stop - start
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise InputError(f"{str(path)!r} is no safetensors file: {reason(error)}") from None
    return header


def _stored_dtype(headers: list[dict[str, Any]]) -> torch.dtype | None:
    sizes: Counter[str] = Counter()
    for header in headers:
        for entry in header.values():
            sizes[str(entry["dtype"])] += entry["bytes"]
    return _STORED_DTYPES.get(sizes.most_common(1)[0][0]) if sizes else None


def _weight_bytes(
    directory: Path, headers: list[dict[str, Any]], model: PreTrainedModel
) -> tuple[int, str]:
    if headers:
        total = sum(entry["bytes"] for header in headers for entry in header.values())
        return total, "safetensors headers"
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        index = directory / name
        if index.is_file():
            try:
                return int(json.loads(index.read_text())["metadata"]["total_size"]), name
            except (ValueError, KeyError, TypeError):
                continue
    files = list(directory.glob("pytorch_model*.bin"))
    if files:
        return sum(path.stat().st_size for path in files), "sizes of the .bin files"
    total = sum(parameter.nbytes for parameter in model.parameters())
    return total, f"config.json, as {str(model.dtype).removeprefix('torch.')}"
