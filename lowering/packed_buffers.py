"""Replace the dense caches of a program by packed buffers and kvarn ops."""

from __future__ import annotations

from typing import Any

import torch

from kvarn_ops._compat import is_saved
from kvarn_ops.kv_cache import KVCache
from kvarn_ops.layout import TileCache

from .attention_node import four_axes, with_strides_of
from .axes import Node, op_name, value_of
from .cached_attention import CachedAttention
from .evaluate import attribute, remove_attribute
from .static_cache import CacheWrite

__all__ = ["PackedBuffers"]

_ATEN, _OPS = torch.ops.aten, torch.ops.kvarn


class PackedBuffers:
    """Rewrites a functional program in place, one attention after the other.

    Before::

        k_all = index_copy(key_cache, 2, positions, k)           value_cache alike
        out = scaled_dot_product_attention(q, repeat(k_all), repeat(v_all), mask)
        copy_(key_cache, k_all)

    After::

        append_at_(k, v, positions, key_cache_high_water, key_cache_k_codes, ...)
        out = attention(q, key_cache_k_codes, ..., causal=True)

    Parameters
    ----------
    module : torch.fx.GraphModule
        The program, functional except for `copy_(buffer, result)`.
    config : KVarNConfig
        Of the packed buffers.
    backend : str
        As in `kvarn_ops.KVCache`.
    """

    def __init__(self, module: torch.fx.GraphModule, config: Any, backend: str) -> None:
        self._module, self._graph = module, module.graph
        self._config, self._backend = config, backend
        self._caches: dict[str, tuple[KVCache, list[Node]]] = {}  # by the keys' name
        self._rotations: dict[tuple[int, torch.device], Node] = {}
        self._checked: set[Node] = set()
        self._stores: list[CacheWrite] = []
        self._read = self._targets()
        self.removed: dict[str, int] = {}  # buffers that are gone, with their bytes
        self.packed_bytes = 0

    def __call__(self, one: CachedAttention) -> None:
        """Rewrite one attention; the append of its cache goes in with the first one."""
        if one.keys.name not in self._caches:
            self._caches[one.keys.name] = self._append(one.keys, one.values)
        if one.assumes is not None and one.assumes not in self._checked:
            self._checked.add(one.assumes)
            self._check_consecutive(one.assumes)
        cache, buffers = self._caches[one.keys.name]
        with self._graph.inserting_before(one.node):
            mask = one.mask
            if mask is not None:
                mask = four_axes(self._graph, mask, value_of(mask).ndim)
            result = self._graph.call_function(
                _OPS.attention.default,
                (
                    one.query, *buffers[:-1], buffers[-1], None, one.scale, 0.0, one.mask is None,
                    cache.config_line, cache.backend, 0, mask,
                ),
            )  # fmt: skip
            result = with_strides_of(self._graph, result, one.node)
        one.node.replace_all_uses_with(result)
        self._erase(one.node)

    def finish(self) -> None:
        """Remove the dense buffers, and others that nothing reads any more; once, at the end."""
        for write in self._stores:
            self._erase(write.store)
        buffers = dict(self._module.named_buffers())
        for name in sorted(self._read - self._targets()):
            if name in buffers:
                remove_attribute(self._module, name)
                self.removed[name] = buffers[name].nbytes
        self._graph.lint()
        self._module.recompile()

    def _append(self, keys: CacheWrite, values: CacheWrite) -> tuple[KVCache, list[Node]]:
        dense = value_of(keys.buffer)
        shape = [dense.shape[axis] for axis in keys.layout]
        cache = KVCache(
            shape[0], shape[1], shape[3], shape[2], self._config, dtype=dense.dtype,
            device=dense.device, backend=self._backend,
        )  # fmt: skip
        self._stores += [keys, values]
        high_water, *tiles = self._register(cache, keys, values)
        rotation = self._rotation(cache)
        last = max(keys.result, values.result, key=list(self._graph.nodes).index)
        with self._graph.inserting_after(last):
            anchor = self._graph.call_function(_ATEN.alias.default, (last,))  # to insert before
        with self._graph.inserting_before(anchor):
            if keys.rows is not None:
                high_water, *tiles = (
                    self._call("slice.Tensor", node, 0, 0, keys.rows)
                    for node in (high_water, *tiles)
                )
            self._graph.call_function(
                _OPS.append_at_.default,
                (
                    self._tokens(keys), self._tokens(values), self._position(keys), high_water,
                    *tiles, rotation, cache.config_line, cache.backend, cache.max_cache_len,
                ),
            )  # fmt: skip
        self._graph.erase_node(anchor)
        return cache, [*tiles, rotation]

    def _register(self, cache: KVCache, keys: CacheWrite, values: CacheWrite) -> list[Node]:
        """Buffers beside the dense ones, named after them: `high_water` and the tiles."""
        nodes = []
        for field in ("high_water", *TileCache._fields):
            write = values if field.startswith("v_") else keys
            tensor = getattr(cache, field).clone()
            self.packed_bytes += tensor.nbytes
            nodes.append(self._buffer(f"{write.name}_{field}", tensor, write))
        return nodes

    def _rotation(self, cache: KVCache) -> Node:
        """One for all layers of the same width."""
        matrix = cache.rotation
        key = (matrix.shape[0], matrix.device)
        if key not in self._rotations:
            name = f"kvarn_rotation_{matrix.shape[0]}"
            self.packed_bytes += matrix.nbytes
            self._rotations[key] = self._buffer(name, matrix.clone(), None)
        return self._rotations[key]

    def _buffer(self, path: str, tensor: torch.Tensor, write: CacheWrite | None) -> Node:
        prefix, _, leaf = path.rpartition(".")
        owner = attribute(self._module, prefix) if prefix else self._module
        while hasattr(owner, leaf):
            leaf, path = f"{leaf}_", f"{path}_"
        old = None if write is None else write.name.rpartition(".")[2]
        owner.register_buffer(leaf, tensor, persistent=old is not None and is_saved(owner, old))
        with self._graph.inserting_before(self._start()):
            return self._graph.get_attr(path)

    def _tokens(self, write: CacheWrite) -> Node:
        """What is written, as `[B, H, S, D]` in the cache's dtype."""
        node = write.tokens
        for _ in range(write.missing):
            node = self._call("unsqueeze.default", node, 0)
        if write.lacks_axis:
            node = self._call("unsqueeze.default", node, write.axis)
        if write.layout != (0, 1, 2, 3):
            node = self._call("permute.default", node, list(write.layout))
        dtype = value_of(write.buffer).dtype
        if value_of(write.tokens).dtype != dtype:
            node = self._call("to.dtype", node, dtype)
        return node

    def _position(self, write: CacheWrite) -> Node:
        """The first slot that is written, as the first element of an int64 tensor."""
        position: Any = write.position
        if isinstance(position, Node) and value_of(position) is None:
            if op_name(position) in ("item", "_local_scalar_dense"):
                position = position.args[0]
        if isinstance(position, Node) and value_of(position) is not None:
            if value_of(position).dtype != torch.int64:
                position = self._call("to.dtype", position, torch.int64)
            return position
        device = value_of(write.buffer).device
        return self._graph.call_function(
            _ATEN.full.default, ([1], position), {"dtype": torch.int64, "device": device}
        )

    def _check_consecutive(self, source: Node) -> None:
        """Raise at run time unless the input's elements are consecutive along its last axis."""
        value = value_of(source)
        with self._graph.inserting_before(self._start()):
            size = self._call("sym_size.int", source, value.ndim - 1)
            steps = self._graph.call_function(
                _ATEN.arange.default, (size,), {"dtype": value.dtype, "device": value.device}
            )
            first = self._call("select.int", self._call("reshape.default", source, [-1]), 0, 0)
            wanted = self._call("add.Tensor", steps, first)
            equal = self._call("all.default", self._call("eq.Tensor", source, wanted))
            message = f"{source.name} has to hold consecutive positions: a packed cache has no gaps"
            self._call("_assert_async.msg", equal, message)

    def _targets(self) -> set[str]:
        return {str(node.target) for node in self._graph.find_nodes(op="get_attr")}

    def _start(self) -> Node:
        """The node before which all inputs are there."""
        return self._graph.find_nodes(op="placeholder")[-1].next

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Node:
        packet, _, overload = name.partition(".")
        return self._graph.call_function(getattr(getattr(_ATEN, packet), overload), args, kwargs)

    def _erase(self, node: Node) -> None:
        """Remove a node, and what it alone needed."""
        stack, erased = [node], set()
        while stack:
            one = stack.pop()
            if one.users or one in erased or one.op in ("placeholder", "output"):
                continue
            inputs = one.all_input_nodes
            self._graph.erase_node(one)
            erased.add(one)
            stack += inputs
