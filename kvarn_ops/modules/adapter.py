"""Replace the buffers of a recognised cache module by a `KVCache`, in place.

The module stays the same object. Its class becomes a subclass of its own, made here, since model
code asks `isinstance`: update and reset methods go to the `KVCache`, attributes that held the
buffers give a dense copy of what is stored, all else is inherited. In the place of the buffers lie
hollow ones, `[B, H, T, 0]`. They follow `.to(...)`; and methods with state of their own (a counter
of tokens, a length that they return) run on them at every call, before the `KVCache`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..config import KVarNConfig
from ..errors import CacheError, InputError
from .plan import Plan, Update
from .subject import float_buffers

__all__ = ["CHILD", "is_packed", "pack", "restore"]

CHILD = "kvarn_cache"  # the KVCache's name among the children of a packed module


class _Packed:
    """Mixed into the class of a packed module, before it."""

    _kvarn_undo: dict[str, Any]
    _kvarn_hollow: bool  # True while a method of the original class runs on the hollow buffers

    def __reduce_ex__(self, protocol: Any) -> Any:
        base, plan = type(self).__mro__[2], self._kvarn_undo["plan"]
        return _blank, (base, plan), dict(vars(self))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        plan: Plan = self._kvarn_undo["plan"]
        for name, dense in zip((plan.keys, plan.values), _dense(self), strict=True):
            if prefix + name in destination:
                destination[prefix + name] = dense

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        plan: Plan = self._kvarn_undo["plan"]
        hollow = {prefix + name: vars(self)["_buffers"][name] for name in (plan.keys, plan.values)}
        known = {key: value for key, value in hollow.items() if key in state_dict}
        super()._load_from_state_dict(state_dict | known, prefix, *rest)  # type: ignore[misc]


def is_packed(module: nn.Module) -> bool:
    """Whether a module's buffers were replaced."""
    return isinstance(module, _Packed)


def pack(module: nn.Module, plan: Plan, config: KVarNConfig, backend: str) -> None:
    """Replace the buffers; what they hold is given up."""
    from ..kv_cache import KVCache

    keys, values = (float_buffers(module)[name] for name in (plan.keys, plan.values))
    batch, heads, tokens, width = keys.shape
    if not plan.heads_first:
        heads, tokens = tokens, heads
    cache = KVCache(
        *(batch, heads, width, tokens, config),
        dtype=keys.dtype,
        device=keys.device,
        backend=backend,
    )
    cache.train(module.training)
    undo: dict[str, Any] = {"plan": plan, "width": width, "attributes": [], "state": {}}
    for name, buffer in ((plan.keys, keys), (plan.values, values)):
        if name not in module._buffers:
            undo["attributes"].append(name)
            delattr(module, name)
        module.register_buffer(
            name,
            buffer.new_empty((*buffer.shape[:3], 0)),
            persistent=name in module._buffers and name not in module._non_persistent_buffers_set,
        )
    if any(update.follows for update in plan.updates):
        undo["state"] = _state(module, plan)
    module.__class__ = _packed_class(type(module), plan)
    module._kvarn_undo = undo
    module._kvarn_hollow = False
    module.add_module(CHILD, cache)


def restore(module: nn.Module) -> None:
    """Undo `pack`: the module is as it was, with empty buffers of zeros."""
    undo = module._kvarn_undo
    plan: Plan = undo["plan"]
    module.__class__ = type(module).__mro__[2]
    delattr(module, CHILD)
    for name in ("_kvarn_undo", "_kvarn_hollow"):
        delattr(module, name)
    for name in (plan.keys, plan.values):
        hollow = module._buffers[name]
        assert hollow is not None
        buffer = hollow.new_zeros((*hollow.shape[:3], undo["width"]))
        if name in undo["attributes"]:
            delattr(module, name)
            setattr(module, name, buffer)
        else:
            module._buffers[name] = buffer
    for name, value in undo["state"].items():
        held = getattr(module, name)
        if isinstance(value, Tensor) and isinstance(held, Tensor) and held.shape == value.shape:
            held.copy_(value)
        else:
            setattr(module, name, value)


def _state(module: nn.Module, plan: Plan) -> dict[str, Any]:
    """What a module of its own counts with: small tensors and numbers."""
    plain = {**module._buffers, **vars(module)}
    return {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in plain.items()
        if name not in (plan.keys, plan.values, "training")
        and isinstance(value, (Tensor, bool, int, float))
        and not isinstance(value, nn.Parameter)
    }


_classes: dict[Any, type] = {}


def _packed_class(base: type, plan: Plan) -> type:
    """The subclass of a cache's class for a plan; the same one for the same plan."""
    try:
        return _classes[base, plan]
    except KeyError:
        pass
    except TypeError:  # a default that cannot be hashed
        return _make_class(base, plan)
    made = _classes[base, plan] = _make_class(base, plan)
    return made


def _make_class(base: type, plan: Plan) -> type:
    body: dict[str, Any] = {"__module__": base.__module__, "__doc__": base.__doc__}
    for place, name in enumerate((plan.keys, plan.values)):
        body[name] = _buffer_property(name, place)
    for update in plan.updates:
        body[update.name] = _update_method(getattr(base, update.name), update)
    follows = any(update.follows for update in plan.updates)
    for name in plan.resets:
        body[name] = _reset_method(getattr(base, name), follows)
    for name in plan.refused:
        body[name] = _refused_method(getattr(base, name))
    return type(f"Packed{base.__name__}", (_Packed, base), body)


def _blank(base: type, plan: Plan) -> Any:
    """An empty instance to unpickle into."""
    made = _packed_class(base, plan)
    return made.__new__(made)


def _buffer_property(name: str, place: int) -> property:
    def read(self: Any) -> Tensor:
        return self._buffers[name] if self._kvarn_hollow else _dense(self)[place]

    read.__doc__ = "A dense copy of what is stored, in the shape of the buffer that was here."
    return property(read)


def _update_method(original: Any, update: Update) -> Any:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._kvarn_hollow:
            return original(self, *args, **kwargs)
        given = update.bind(args, kwargs)
        keys, values = given[update.keys], given[update.values]
        _check_hollow(self)
        position = None if update.position is None else given[update.position]
        start, shapes = _first_position(position, update, keys), None
        if update.follows:
            args, kwargs = update.replaced(args, kwargs, keys[..., :0], values[..., :0])
            shapes = _on_hollow(self, original, args, kwargs)
        if not update.heads_first:
            keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        cache, dtype = self.kvarn_cache, keys.dtype
        converted = bool(update.other_dtype) and dtype != cache.k_tail.dtype
        if converted:
            keys, values = keys.to(cache.k_tail.dtype), values.to(cache.k_tail.dtype)
        stored = cache.update(keys, values, input_pos=start)
        result: list[Any] = [None, None]
        for place, dense in zip((update.keys_out, update.values_out), stored, strict=True):
            if converted and update.other_dtype == "given":
                dense = dense.to(dtype)
            if not update.heads_first_out:
                dense = dense.transpose(1, 2)
            if shapes is not None:
                axis = 2 if update.heads_first_out else 1
                dense = dense.narrow(axis, 0, shapes[place].shape[axis])
            result[place] = dense
        return result if update.as_list else (result[0], result[1])

    return method


def _reset_method(original: Any, follows: bool) -> Any:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._kvarn_hollow:
            return original(self, *args, **kwargs)
        result = _on_hollow(self, original, args, kwargs) if follows else None
        self.kvarn_cache.reset()
        return result

    return method


def _refused_method(original: Any) -> Any:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._kvarn_hollow:
            return original(self, *args, **kwargs)
        raise CacheError(
            f"{original.__name__}() uses the dense buffers of a cache that kvarn_ops.patch has "
            "packed, in a way that was not understood. Call kvarn_ops.unpatch(model) first."
        )

    return method


def _on_hollow(module: Any, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    module._kvarn_hollow = True
    try:
        return original(module, *args, **kwargs)
    finally:
        module._kvarn_hollow = False


def _first_position(position: Any, update: Update, keys: Tensor) -> Tensor | None:
    if position is None:
        if not update.counts:
            raise InputError(f"{update.name}() needs the position of the new tokens.")
        return None
    if not isinstance(position, Tensor):
        return torch.full((1,), position, dtype=torch.int64, device=keys.device)
    if position.ndim > 1:
        if position.shape[0] != 1:
            raise InputError(
                f"positions {tuple(position.shape)}: rows of a packed cache are at one position. "
                "Give positions [S], the same for all rows."
            )
        position = position[0]
    return position.to(torch.int64)


def _check_hollow(module: Any) -> None:
    plan: Plan = module._kvarn_undo["plan"]
    if any(module._buffers[name].shape[-1] for name in (plan.keys, plan.values)):
        raise CacheError(
            f"{plan.keys!r} or {plan.values!r} of a packed cache was assigned, and would be "
            "ignored. Call kvarn_ops.unpatch(model), set up the caches, and patch again."
        )


def _dense(module: Any) -> tuple[Tensor, Tensor]:
    keys, values = module.kvarn_cache.dequantized()
    if module._kvarn_undo["plan"].heads_first:
        return keys, values
    return keys.transpose(1, 2), values.transpose(1, 2)
