"""`patch`, `unpatch`, `patched`, `explain`: the public face of the package."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from . import dispatch
from .config import DEFAULT_PRESET, KVarNConfig
from .errors import ConfigError, UnsupportedModelError

__all__ = ["Explanation", "explain", "patch", "patched", "supported_models", "unpatch"]

_logger = logging.getLogger("kvarn_ops")

_Model = TypeVar("_Model", bound=nn.Module)

# Families whose tests are part of this repository; others with the same structure work too.
_TESTED_FAMILIES = ("gemma2", "gemma3_text", "gpt2", "llama", "mistral", "phi3", "qwen2", "qwen3")


def patch(
    model: _Model,
    config: KVarNConfig | str = DEFAULT_PRESET,
    *,
    backend: str = "auto",
    strict: bool = True,
    **config_overrides: Any,
) -> _Model:
    """Make a model keep its keys and values in a KVarN cache. In place, for this instance only.

    Weights, `state_dict` keys and `config.json` do not change, and a patched model that runs
    without a KVarN cache computes what it did before. `generate` uses a `KVarNCache` by default.

    Parameters
    ----------
    model : nn.Module
        A decoder-only Hugging Face model. A compiled module is accepted: its original is patched.
    config : KVarNConfig or str
        Config or preset name (`k4v2_g128`: 4-bit keys, 2-bit values, tiles of 128 tokens).
    backend : {"auto", "reference", "aten", "triton"}
        `reference` is the eager specification, `aten` the formula that Inductor fuses.
    strict : bool
        Raise if an attention layer can neither be packed nor is dense by design (sliding, chunked,
        linear layers). False leaves such a model dense and logs why.
    **config_overrides
        Fields of `KVarNConfig`, for example `tail_tokens=512`.

    Returns
    -------
    nn.Module
        The same object.

    Raises
    ------
    UnsupportedModelError
        What the model does that cannot be packed, and what to do.
    ConfigError
        For an invalid config, or if the model is already patched with another one.
    BackendError
        If the backend cannot run on the model's device.
    """
    wanted = KVarNConfig.coerce(config, **config_overrides)
    target = _original(model)
    try:
        from .hf import adapter
    except ModuleNotFoundError as error:
        raise UnsupportedModelError(
            f"{type(target).__name__} cannot be patched: {error.name} is not installed, and only "
            "Hugging Face models are supported. Install kvarn-ops[hf]."
        ) from None
    _check_is_transformers(target)
    resolved = dispatch.resolve(backend, adapter.device_of(target))
    record = getattr(target, "_kvarn_patch", None)
    if record is not None:
        if record.config == wanted and record.backend == resolved:
            _logger.info("%s is already patched with %s.", _name(target), wanted.to_string())
            return model
        raise ConfigError(
            f"{_name(target)} is already patched with {record.config.to_string()} on backend "
            f"{record.backend!r}: call kvarn_ops.unpatch(model) first."
        )
    try:
        reports = adapter.inspect_model(target, wanted)  # type: ignore[arg-type]
    except UnsupportedModelError as error:
        if strict:
            raise
        _logger.warning("left dense: %s", error)
        return model
    _mention_compiled(model, target)
    record = adapter.PatchRecord(wanted, resolved, reports)
    adapter.attach(target, record)  # type: ignore[arg-type]
    from .lowering.source_pass import acquire

    acquire(record.lifetime)
    packed = [report for report in reports if report.packed]
    _logger.info(
        "%s: %d attention layers packed (%s, backend %s, %.0f bytes per token and layer), %d stay "
        "dense.",
        _name(target),
        len(packed),
        wanted.to_string(),
        resolved,
        packed[0].bytes_per_token if packed else 0,
        len(reports) - len(packed),
    )
    return model


def unpatch(model: _Model) -> _Model:
    """Put a patched model back exactly as it was; a model that is not patched is left alone."""
    target = _original(model)
    if getattr(target, "_kvarn_patch", None) is None:
        return model
    from .hf import adapter

    adapter.detach(target)  # type: ignore[arg-type]
    _logger.info("%s: unpatched.", _name(target))
    return model


@contextmanager
def patched(
    model: _Model,
    config: KVarNConfig | str = DEFAULT_PRESET,
    *,
    backend: str = "auto",
    strict: bool = True,
    **config_overrides: Any,
) -> Iterator[_Model]:
    """`patch` for the length of a `with` block."""
    patch(model, config, backend=backend, strict=strict, **config_overrides)
    try:
        yield model
    finally:
        unpatch(model)


def supported_models() -> tuple[str, ...]:
    """`model_type`s of transformers that are tested with this version."""
    return _TESTED_FAMILIES


@dataclass(frozen=True)
class Explanation:
    """What `patch` did to a model. Print it for a table.

    Attributes
    ----------
    config : KVarNConfig or None
        None if the model is not patched.
    backend : str or None
    layers : tuple
        One `LayerReport` per layer of the cache: index, module path, packed, reason,
        bytes_per_token.
    graph_ops : dict
        How often each `kvarn` op was seen in graphs compiled so far in this process.
    """

    config: KVarNConfig | None
    backend: str | None
    layers: tuple[Any, ...]
    graph_ops: dict[str, int]

    def __str__(self) -> str:
        if self.config is None:
            return "not patched: call kvarn_ops.patch(model)."
        lines = [f"{self.config.to_string()}, backend {self.backend}"]
        for layer in self.layers:
            size = "" if layer.bytes_per_token is None else f"{layer.bytes_per_token:.0f} B/token"
            lines.append(f"{layer.index:4d}  {layer.module or '-':40s} {layer.reason:32s} {size}")
        seen = ", ".join(f"{name} x{count}" for name, count in sorted(self.graph_ops.items()))
        lines.append(f"compiled graphs: {seen or 'none yet'}")
        return "\n".join(lines)


def explain(model: nn.Module) -> Explanation:
    """Say, layer by layer, what is packed and why, and what compiled graphs contained."""
    from .lowering.source_pass import seen_ops

    record = getattr(_original(model), "_kvarn_patch", None)
    counts = dict(seen_ops())
    if record is None:
        return Explanation(None, None, (), counts)
    return Explanation(record.config, record.backend, tuple(record.layers), counts)


def _original(model: Any) -> nn.Module:
    """The module behind `torch.compile(model)`."""
    return getattr(model, "_orig_mod", model)


def _name(model: nn.Module) -> str:
    return type(model).__name__


def _mention_compiled(model: Any, target: nn.Module) -> None:
    compiled = model is not target or getattr(target, "_compiled_call_impl", None) is not None
    if compiled:
        _logger.warning(
            "%s was compiled before it was patched: the original module is patched, and compiled "
            "code is traced again at the next call. Patch before torch.compile to compile once.",
            _name(target),
        )


def _check_is_transformers(model: nn.Module) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a Hugging Face model (transformers.PreTrainedModel): "
            "modules with a KV cache of their own are not supported in this version."
        )
