"""`kvarn-ops inspect`: what would be packed in a model, and what that saves, from `config.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..config import KVarNConfig, parse_presets
from ..errors import InputError, UnsupportedModelError
from .footprint import Footprint, LayerShape, layer_shapes, tokens_that_fit
from .inspection import LayerReport, inspect_model
from .model_dir import ModelDir, open_model_dir

__all__ = ["GIB", "Inspection", "LayerGroup", "PresetSize", "examine"]

GIB = 1 << 30
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


@dataclass(frozen=True)
class LayerGroup:
    """Consecutive layers that are alike."""

    first: int
    last: int
    packed: bool
    reason: str
    num_kv_heads: int
    head_dim: int
    dense_bytes_per_token: float  # 0 for layers whose memory does not grow with the context
    kvarn_bytes_per_token: dict[str, float]  # of one layer, by preset


@dataclass(frozen=True)
class PresetSize:
    """A cache of one kind; `preset` is "dense" for transformers' static cache."""

    preset: str
    bytes_per_token: float
    fixed_bytes: int  # per sequence, in the layers that are packed
    bytes_at_context: dict[int, int]  # whole cache, by tokens per row, at the given batch size
    compression: dict[int, float]  # dense bytes over these, by tokens per row
    break_even: int | None  # from this context on it is smaller than dense
    tokens_that_fit: dict[int, int | None] | None  # by batch size, per row; None: any number


@dataclass(frozen=True)
class Inspection:
    """Everything that `kvarn-ops inspect` says."""

    name: str
    model_class: str
    dtype: str
    weight_bytes: int
    weight_source: str
    memory_bytes: int | None
    batch: int
    max_positions: int | None
    refusal: str | None  # why `patch` would refuse the model
    layers: tuple[LayerGroup, ...]
    sizes: tuple[PresetSize, ...]  # dense first
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def examine(
    directory: Path,
    presets: str = "k4v2",
    memory_gib: float | None = None,
    context: int | None = None,
    batch: int = 1,
    dtype: str | None = None,
) -> Inspection:
    """Say what `patch` would do to the model of a directory; no weight is read.

    Parameters
    ----------
    directory : Path
        In Hugging Face format.
    presets : str
        Preset names, with commas.
    memory_gib : float, optional
        Memory for weights and cache together, in GiB (2**30 bytes).
    context : int, optional
        A context to compare sizes at, besides the usual ones.
    batch : int
        Rows.
    dtype : {"bf16", "fp16", "fp32"}, optional
        Of keys and values; None: that of the model.

    Raises
    ------
    InputError
        If the numbers make no sense, or transformers cannot build the model.
    """
    configs = parse_presets(presets, "--preset")
    if batch < 1 or (context is not None and context < 1):
        raise InputError(f"--batch {batch}, --context {context}: give at least 1.")
    if memory_gib is not None and not memory_gib > 0:
        raise InputError(f"--memory {memory_gib}: give a number of GiB above 0.")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}.")
    opened = open_model_dir(directory, None if dtype is None else DTYPES[dtype])
    reports, refusal = _reports(opened, configs)
    try:
        shapes = layer_shapes(opened.model)
    except UnsupportedModelError:
        if refusal is None:
            raise
        raise UnsupportedModelError(refusal) from None  # the reason that matters more
    packed = [report.index for report in reports if report.packed]
    footprints = {
        name: Footprint(shapes, packed, config, opened.dtype) for name, config in configs.items()
    }
    text_config = opened.model.config.get_text_config(decoder=True)
    longest = getattr(text_config, "max_position_embeddings", None)
    budget = None if memory_gib is None else int(memory_gib * GIB) - opened.weight_bytes
    contexts = _contexts(longest, context)
    dense = next(iter(footprints.values()))
    sizes = [_dense_size(dense, contexts, batch, budget)]
    sizes += [
        _preset_size(name, footprint, contexts, batch, budget)
        for name, footprint in ({} if refusal else footprints).items()
    ]
    found = Inspection(
        name=opened.name,
        model_class=type(opened.model).__name__,
        dtype=str(opened.dtype).removeprefix("torch."),
        weight_bytes=opened.weight_bytes,
        weight_source=opened.weight_source,
        memory_bytes=None if memory_gib is None else int(memory_gib * GIB),
        batch=batch,
        max_positions=longest,
        refusal=refusal,
        layers=tuple(_groups(shapes, reports, footprints)),
        sizes=tuple(sizes),
        warnings=(),
    )
    return Inspection(**(vars(found) | {"warnings": tuple(_warnings(found, opened, context))}))


def _reports(
    opened: ModelDir, configs: dict[str, KVarNConfig]
) -> tuple[list[LayerReport], str | None]:
    """The layers as `patch` would treat them, which does not depend on the bits."""
    try:
        return inspect_model(opened.model, next(iter(configs.values()))), None
    except UnsupportedModelError as error:
        return [], str(error)


def _contexts(longest: int | None, asked: int | None) -> list[int]:
    known = [n for n in _CONTEXTS if longest is None or n <= longest]
    return sorted({*known, *([asked] if asked else [])}) or [longest or _CONTEXTS[0]]


def _dense_size(
    footprint: Footprint, contexts: list[int], batch: int, budget: int | None
) -> PresetSize:
    return PresetSize(
        "dense",
        footprint.bytes_per_token()[0],
        0,
        {n: footprint.dense(n, batch) for n in contexts},
        dict.fromkeys(contexts, 1.0),
        None,
        _fits(footprint.dense, batch, budget),
    )


def _preset_size(
    name: str, footprint: Footprint, contexts: list[int], batch: int, budget: int | None
) -> PresetSize:
    sizes = {n: footprint.kvarn(n, batch) for n in contexts}
    return PresetSize(
        name,
        footprint.bytes_per_token()[1],
        footprint.fixed(),
        sizes,
        {n: footprint.dense(n, batch) / size for n, size in sizes.items() if size},
        footprint.break_even(),
        _fits(footprint.kvarn, batch, budget),
    )


def _fits(size: Any, batch: int, budget: int | None) -> dict[int, int | None] | None:
    if budget is None:
        return None
    return {rows: tokens_that_fit(partial(size, batch=rows), budget) for rows in {1: 0, batch: 0}}


def _groups(
    shapes: tuple[LayerShape, ...],
    reports: list[LayerReport],
    footprints: dict[str, Footprint],
) -> list[LayerGroup]:
    groups: list[LayerGroup] = []
    by_index = {report.index: report for report in reports}
    for index, shape in enumerate(shapes):
        report = by_index.get(index)
        packed = report is not None and report.packed
        pairs = {name: fp.layer_bytes_per_token(index) for name, fp in footprints.items()}
        group = LayerGroup(
            index,
            index,
            packed,
            "stays dense" if report is None else report.reason,
            shape.num_kv_heads,
            shape.head_dim,
            next(iter(pairs.values()))[0],
            {name: kvarn for name, (_, kvarn) in pairs.items()} if packed else {},
        )
        last = groups[-1] if groups else None
        if last and _alike(last, group):
            groups[-1] = LayerGroup(**(vars(last) | {"last": index}))
        else:
            groups.append(group)
    return groups


def _alike(a: LayerGroup, b: LayerGroup) -> bool:
    ignored = {"first": 0, "last": 0}
    return vars(a) | ignored == vars(b) | ignored


def _warnings(found: Inspection, opened: ModelDir, context: int | None) -> list[str]:
    warnings = []
    if opened.remote_code:
        warnings.append(
            "config.json names code of its own (auto_map), which was not run: this is what "
            f"transformers' own {found.model_class} would do."
        )
    if found.refusal:
        warnings.append(f"patch refuses this model: {found.refusal}")
    dense_layers = sum(g.last - g.first + 1 for g in found.layers if not g.packed)
    count = sum(g.last - g.first + 1 for g in found.layers)
    if dense_layers and not found.refusal:
        warnings.append(
            f"{dense_layers} of {count} layers stay dense; their memory is counted on both sides."
        )
        if dense_layers == count:
            warnings.append("no layer can be packed: patching this model changes nothing.")
    for size in found.sizes[1:]:
        if size.break_even is not None:
            warnings.append(
                f"{size.preset} is larger than dense below {size.break_even:,} tokens: sinks, tail "
                f"and two tiles take {size.fixed_bytes / 2**20:,.1f} MiB per sequence at any "
                "length."
            )
    if found.max_positions and context and context > found.max_positions:
        warnings.append(
            f"--context {context:,} exceeds the {found.max_positions:,} positions that the model "
            "knows."
        )
    if found.memory_bytes is not None:
        left = found.memory_bytes - found.weight_bytes
        if left <= 0:
            warnings.append(
                f"the weights ({found.weight_bytes / GIB:,.1f} GiB) leave nothing of "
                f"{found.memory_bytes / GIB:,.1f} GiB for a cache."
            )
        most = [fit for size in found.sizes for fit in (size.tokens_that_fit or {}).values()]
        if found.max_positions and any(fit is None or fit > found.max_positions for fit in most):
            warnings.append(
                f"more tokens fit than the {found.max_positions:,} positions that the model knows."
            )
    return warnings
