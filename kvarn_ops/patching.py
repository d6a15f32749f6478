"""`patch`, `unpatch`, `patched`, `explain`: the public face of the package."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from . import dispatch
from ._compat import graphs_from_cache
from .config import DEFAULT_PRESET, KVarNConfig
from .errors import ConfigError, UnsupportedModelError
from .explanation import Explanation
from .families import TESTED_FAMILIES
from .versions import check_versions

__all__ = ["Explanation", "explain", "patch", "patched", "supported_models", "unpatch"]

_logger = logging.getLogger("kvarn_ops")

_Model = TypeVar("_Model", bound=nn.Module)


def patch(
    model: _Model,
    config: KVarNConfig | str = DEFAULT_PRESET,
    *,
    backend: str = "auto",
    strict: bool = True,
    fold_rotation: bool = False,
    **config_overrides: Any,
) -> _Model:
    """Make a model keep its keys and values in a KVarN cache. In place, for this instance only.

    Weights, `state_dict` keys and `config.json` do not change, and a patched model that runs
    without a KVarN cache computes what it did before. `generate` uses a `KVarNCache` by default.
    Cache modules of other models keep their methods and lose their dense buffers.

    Parameters
    ----------
    model : nn.Module
        A decoder-only Hugging Face model, or any model with KV-cache modules of its own, set up
        and empty (docs/modules.md). A compiled module is accepted: its original is patched.
    config : KVarNConfig or str
        Config or preset name (`k4v2_g128`: 4-bit keys, 2-bit values, tiles of 128 tokens).
    backend : {"auto", "reference", "aten", "triton"}
        `reference` is the eager specification, `aten` the formula that Inductor fuses.
    strict : bool
        Raise if an attention layer can neither be packed nor is dense by design (sliding, chunked,
        linear layers). False leaves such a model dense and logs why.
    fold_rotation : bool
        Put the rotation of values into copies of the weights around the cache, in every layer where
        a trial run shows that this is the same function (docs/fold_rotation.md). `state_dict`
        and what is saved stay as they are; without a KVarN cache the model computes what it did
        up to rounding. For models that no adapter is added to.
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
    if fold_rotation and not wanted.rotate_values:
        raise ConfigError(
            "fold_rotation=True folds the rotation of values, which rotate_values=False turns off: "
            "choose one."
        )
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"{_name(model)} is not a Hugging Face model nor any other torch.nn.Module: give the "
            "model itself."
        )
    adapter, target = _adapter(model)
    if fold_rotation and not adapter.FOLDS_ROTATION:
        raise UnsupportedModelError(
            f"{_name(model)} has KV-cache modules of its own, whose values no weights are known to "
            "make: fold_rotation=True is for Hugging Face models, leave it out."
        )
    resolved = dispatch.resolve(backend, adapter.device_of(target))
    record = vars(target).get("_kvarn_patch")
    if record is not None and record.lost(target):
        record.undo(target)
    elif record is not None:
        asked = (wanted, resolved, fold_rotation)
        if (record.config, record.backend, record.fold_rotation) == asked:
            _logger.info("%s is already patched with %s.", _name(target), wanted.to_string())
            return model
        raise ConfigError(
            f"{_name(target)} is already patched with {record.config.to_string()} on backend "
            f"{record.backend!r}, fold_rotation={record.fold_rotation}: call "
            "kvarn_ops.unpatch(model) first."
        )
    try:
        reports = adapter.inspect_model(target, wanted)
    except UnsupportedModelError as error:
        if strict:
            raise
        _logger.warning("left dense: %s", error)
        return model
    _mention_compiled(model, target)
    record = adapter.PatchRecord(wanted, resolved, reports, Lifetime())
    if fold_rotation:
        from .lowering.fold_rotation import fold_rotation as fold

        record.fold_rotation = True
        fold(model, target, record)
    adapter.attach(target, record)
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
    """Put a patched model back exactly as it was; a model that is not patched is left alone.

    Buffers of cache modules, which a patched model does not have, are allocated anew and empty.

    Everything patched is undone: the model itself, what it wraps, and parts patched on their own.
    """
    for target in _patched_parts(model):
        record = vars(target)["_kvarn_patch"]
        record.undo(target)
        if record.fold_rotation:
            from .lowering.fold_rotation import unfold_rotation

            unfold_rotation(target, record)
        _logger.info("%s: unpatched.", _name(target))
    return model


@contextmanager
def patched(
    model: _Model,
    config: KVarNConfig | str = DEFAULT_PRESET,
    *,
    backend: str = "auto",
    strict: bool = True,
    fold_rotation: bool = False,
    **config_overrides: Any,
) -> Iterator[_Model]:
    """`patch` for the length of a `with` block."""
    patch(
        model,
        config,
        backend=backend,
        strict=strict,
        fold_rotation=fold_rotation,
        **config_overrides,
    )
    try:
        yield model
    finally:
        unpatch(model)


def supported_models() -> tuple[str, ...]:
    """`model_type`s of transformers that pass the comparison of docs/models.md."""
    return TESTED_FAMILIES


def explain(model: nn.Module) -> Explanation:
    """Say, layer by layer, what is packed and why, and what compiled graphs do.

    Graphs are those that this process compiled so far; a graph knows the paths of modules, not
    whose they are, so two models with the same paths are not told apart.
    """
    from .lowering.record import recorded, seen_ops

    parts = _patched_parts(model)
    record = vars(parts[0])["_kvarn_patch"] if parts else None
    return Explanation(
        config=record and record.config,
        backend=record and record.backend,
        layers=tuple(record.layers) if record else (),
        graph_ops=dict(seen_ops()),
        graphs=recorded(),
        graphs_from_cache=graphs_from_cache(),
    )


def passes_only(module: Any, inputs: Any) -> Any:
    """A backend for `torch.compile` that runs our passes on Dynamo's graph, and compiles nothing.

    It also works on the meta device, where nothing can be computed.
    """
    from .lowering.pipeline import PRE_GRAD
    from .lowering.stage import Stage

    Stage("pre_grad", PRE_GRAD)(module.graph)
    module.recompile()
    return module.forward


class Lifetime:
    """Keeps our Inductor pass installed while a patched model or a copy of it lives."""

    def __init__(self) -> None:
        from .lowering.hooks import acquire

        acquire(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Lifetime:
        return self

    def __reduce__(self) -> tuple[type[Lifetime], tuple[()]]:
        return Lifetime, ()


def _adapter(model: nn.Module) -> tuple[Any, Any]:
    """The module with the functions that patch this kind of model, and the module to patch."""
    target = _transformers_model(model)
    check_versions(target is not None)
    if target is not None:
        from .hf import adapter

        return adapter, target
    from .modules import attach

    return attach, model._modules.get("_orig_mod", model)


def _transformers_model(model: nn.Module) -> Any:
    """The transformers model to patch: the given one, the only one inside a wrapper, or None.

    Wrappers are compiled modules, adapters (PEFT), training modules, `nn.Sequential`, ...
    """
    # A model of transformers exists only where it was imported; other models do without.
    modeling = sys.modules.get("transformers.modeling_utils")
    found = _outermost(model, modeling.PreTrainedModel) if modeling else {}
    if len(found) > 1:
        names = ", ".join(f"{path} ({_name(module)})" for path, module in found.items())
        raise UnsupportedModelError(
            f"{_name(model)} holds {len(found)} Hugging Face models: {names}. Patch the one that "
            "generates, by itself."
        )
    return next(iter(found.values()), None)


def _outermost(module: nn.Module, kind: type, path: str = "") -> dict[str, nn.Module]:
    """Modules of a type, by path, without those inside another one of them."""
    if isinstance(module, kind) and "_orig_mod" not in module._modules:
        return {path: module}
    found: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        found |= _outermost(child, kind, f"{path}.{name}" if path else name)
    return found


def _patched_parts(model: Any) -> list[Any]:
    """The patched modules in a model, outermost first."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return [module for module in modules if "_kvarn_patch" in vars(module)]


def _name(model: Any) -> str:
    return type(model).__name__


def _mention_compiled(model: Any, target: nn.Module) -> None:
    compiled = (
        any("_orig_mod" in module._modules for module in model.modules())
        or any(getattr(module, "_compiled_call_impl", None) for module in target.modules())
        or hasattr(vars(target).get("forward"), "_torchdynamo_orig_callable")
    )
    if compiled:
        _logger.warning(
            "%s was compiled before it was patched: the original module is patched, and compiled "
            "code is traced again at the next call. Patch before torch.compile to compile once.",
            _name(target),
        )
