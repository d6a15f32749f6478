"""A patched model as the program of an inference engine, which reads a packed cache only.

Engines keep no state and change no input, so that the program is a pure function: fields of the
cache and its lengths come in, logits and the keys and values of the new tokens go out. They are
stored outside (`engine_step.py`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from kvarn_ops import dispatch
from kvarn_ops.errors import InputError, UnsupportedModelError
from kvarn_ops.layout import PackedTiles, TileCache
from kvarn_ops.ops.plain import combined, dense_slot, prepared, tile_slot
from kvarn_ops.ops.read_only import as_engines_take

from .pure_step import PureStep
from .step_model import StepModel

__all__ = ["MODES", "EngineProgram", "check_pure", "engine_fields", "export_engine_program"]

MODES = ("fallback", "plugin", "decompose")
_FIELDS = TileCache._fields[:-1]  # `seq_lens` is one for all layers


def engine_fields(tiles: TileCache) -> list[Tensor]:
    """A layer's cache as engines read it, lengths excepted: views, codes as int8."""
    return list(as_engines_take(tiles)[:-1])


class EngineProgram(PureStep):
    """`(input_ids, lengths, *fields)` to `(logits, *new)`.

    `fields` are those of `kvarn_ops.layout.TileCache` but the last, layer after layer, with codes
    as int8. `lengths` `[B]` int32 are the tokens stored. `new` are keys and values
    `[B, H, S, D]` of the new tokens, layer after layer.

    Parameters
    ----------
    step : StepModel
        Gives the model, and the shapes of its cache.
    chunk : int
        Most new tokens of a call.
    mode : str
        One of `MODES`: how attention is written.

    Raises
    ------
    UnsupportedModelError
        If a model of several widths, or one without sinks, is given.
    """

    def __init__(self, step: StepModel, chunk: int, mode: str) -> None:
        super().__init__(step, chunk, torch.int32)
        self.mode = mode
        if step.kvarn_config.num_sink_tokens == 0:
            raise UnsupportedModelError(
                "num_sink_tokens=0 makes tensors without elements, which engines are not given: "
                "patch with num_sink_tokens=1 or more."
            )
        if len({layer.tiles.k_tail.shape[-1] for layer in self._layers}) > 1:
            raise UnsupportedModelError(
                "layers of different head_dim do not share a rotation: use export_program."
            )

    def forward(self, input_ids: Tensor, lengths: Tensor, *fields: Tensor) -> tuple[Tensor, ...]:
        """Logits `[B, S, vocabulary]`, then keys and values of each layer."""
        width = len(_FIELDS)
        tiles = [
            TileCache(*fields[start : start + width], lengths)
            for start in range(0, len(fields), width)
        ]
        rank = self.ranks
        if len(rank) > 1:
            rank = rank.narrow(0, 0, input_ids.shape[1])
        kwargs: dict[str, Any] = {}
        if self.takes_positions:
            kwargs["position_ids"] = (lengths[:, None] + rank).long()
        new: list[Tensor] = []
        attends = [
            partial(self._attend, layer, own, rank, new)
            for layer, own in zip(self._layers, tiles, strict=True)
        ]
        with self.holding(tiles, lengths, attends):
            logits = self.model(
                input_ids=input_ids, past_key_values=self._cache, use_cache=True, **kwargs
            ).logits
        return logits, *new

    def _attend(
        self, layer: Any, tiles: TileCache, rank: Tensor, new: list[Tensor], query: Tensor,
        key: Tensor, value: Tensor, valid: Tensor | None, sink_logits: Tensor | None, scale: float,
        softcap: float,
    ) -> Tensor:  # fmt: skip
        """In place of `KVarNLayer.attend`: reads `tiles`, and keeps the new keys and values."""
        assert valid is None, "no mask was given"
        config = layer.config  # its own: values of a layer may arrive rotated
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        new += [key, value]
        if self.mode == "fallback":
            return torch.ops.kvarn.step_attention(
                query, key, value, *tiles, self.rotation, sink_logits, scale, softcap,
                layer.config_line, layer.backend,
            )  # fmt: skip
        if scale <= 0:
            raise UnsupportedModelError(f"scale={scale}: this mode needs a positive one.")
        batch, heads, _, head_dim = tiles.k_tail.shape
        ratio = query.shape[1] // heads
        rows = query.reshape(batch, heads, ratio * query.shape[2], head_dim)
        rotated, unit = prepared(rows, tiles.k_equalizer, self.rotation, config)
        if sink_logits is not None:
            sink_logits = sink_logits.float().view(1, heads, ratio, 1)
            sink_logits = sink_logits.expand(-1, -1, -1, query.shape[2]).reshape(1, heads, -1)
        lag, dense_slots = config.tail_tokens, 1
        if self.mode == "plugin":
            dense_slots, splits = dispatch.engine_slots(tiles, ratio, config)
            slots = torch.ops.kvarn.attend_slots(
                rows, rotated.half(), unit, *tiles[:-3], key, value, tiles.seq_lens, scale, softcap,
                lag, ratio, dense_slots, splits,
            )  # fmt: skip
        else:
            dense = dense_slot(rows, ratio, tiles, key, value, rank.float(), lag, scale, softcap)
            packed = PackedTiles(*tiles[: len(PackedTiles._fields)])
            sinks = config.num_sink_tokens
            stored = tile_slot(rotated, unit, packed, tiles.seq_lens, sinks, lag, scale, softcap)
            slots = [torch.cat(pair, dim=2) for pair in zip(dense, stored, strict=True)]
        part, peak, weight = slots
        out = combined(
            part, peak, weight, dense_slots, self.rotation, tiles.v_equalizer, sink_logits,
            config,
        )  # fmt: skip
        # In steps: torch does not find the strides of a direct reshape for a symbolic size.
        out = out.unflatten(2, (ratio, query.shape[2])).flatten(1, 2)
        return out.to(query.dtype)


def export_engine_program(step: StepModel, chunk: int, mode: str) -> ExportedProgram:
    """Export for 1 to `chunk` new tokens, and check that nothing is changed by a call.

    Raises
    ------
    InputError
        If the mode or a size is out of range.
    UnsupportedModelError
        If a call would change an input or a buffer, or takes uint8.
    """
    if mode not in MODES:
        raise InputError(f"mode={mode!r}: choose one of {', '.join(MODES)}.")
    if not 1 <= chunk <= step.max_cache_len:
        raise InputError(
            f"chunk={chunk}: give the most new tokens of a call, 1 to max_cache_len "
            f"({step.max_cache_len})."
        )
    program = EngineProgram(step, chunk, mode).eval()
    inputs = example_inputs(step, min(2, chunk))
    shapes: Any = None
    if chunk > 1:
        new = {1: Dim("new_tokens", min=1, max=chunk)}
        shapes = (new, None, (None,) * (len(inputs) - 2))
    with torch.no_grad():
        exported = torch.export.export(program, inputs, dynamic_shapes=shapes, strict=False)
    check_pure(exported)
    return exported


def example_inputs(step: StepModel, count: int) -> tuple[Tensor, ...]:
    """Inputs of a program for `count` new tokens and the cache as it is."""
    fields = [x for layer in step.cache.layers for x in engine_fields(layer.tiles)]
    device = fields[0].device
    tokens = torch.zeros(step.batch_size, count, dtype=torch.int64, device=device)
    lengths = torch.zeros(step.batch_size, dtype=torch.int32, device=device)
    return tokens, lengths, *fields


def check_pure(program: ExportedProgram) -> None:
    """Refuse what Torch-TensorRT 2.13 compiles without a word, and wrongly.

    It takes a buffer that a call changes for a constant of the engine and drops the change.

    Raises
    ------
    UnsupportedModelError
        If a call changes a buffer or an input, or an input is uint8.
    """
    # Seen after decompositions only: before them a change of a part of a buffer is some call.
    with torch.no_grad():
        signature = program.run_decompositions({}).graph_signature
    changed = {**signature.buffers_to_mutate, **signature.user_inputs_to_mutate}
    if changed:
        raise UnsupportedModelError(
            f"a call of this program changes {', '.join(sorted(map(str, changed.values())))}, and "
            "an engine would silently keep the old values: pass state as inputs and return it."
        )
    for node in program.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dtype == torch.uint8:
            raise UnsupportedModelError(
                f"input {node.name} is uint8, which TensorRT's plugins do not take: pass "
                ".view(torch.int8)."
            )
