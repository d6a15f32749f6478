"""Host side of the kernels: what the ops call. Tensors as in `kvarn_ops.layout.TileCache`.

Nothing here reads a tensor's values, so that everything can be captured in a graph; `run` lets a
compiler wrap each kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .attend import attend_kernel
from .codes import planes
from .combine import combine_kernel
from .encode import encode_kernel
from .heuristics import attend_shape, describe, encode_shape
from .mask import MaskView
from .prepare import prepare_kernel
from .selftest import multiplies_codes
from .store import store_kernel

__all__ = ["Format", "Visible", "append", "attention", "multiplies_codes", "step"]

_QUERIES_PER_LAUNCH = 256  # bounds the partial results of a long chunk of queries

Run = Callable[[Any], Any]


class Format(NamedTuple):
    """What kernels need of a `KVarNConfig`."""

    key_bits: int
    value_bits: int
    group_size: int
    sinks: int
    lag: int  # tail_tokens
    plus: bool
    iters: int
    rotate_keys: bool
    rotate_values: bool


class Visible(NamedTuple):
    """Which tokens a query sees besides those of the cache, and which of these."""

    causal: bool  # among the new tokens
    limited: bool  # query s of S sees the cache's tokens up to position length - (S - 1 - s)
    rank: Tensor | None  # [B, S_new] int32, position among a row's new tokens, -1 for padding
    first: Tensor | None  # [B, S] int64, the first position that each query sees
    mask: Tensor | None = None  # [B or 1, H_q or 1, S or 1, T] bool or float, of the cache alone


def _directly(kernel: Any) -> Any:
    return kernel


def attention(
    q: Tensor, cache: Any, shared: Any | None, k_new: Tensor | None, v_new: Tensor | None,
    visible: Visible, rotation: Tensor, sink_logits: Tensor | None, scale: float, softcap: float,
    form: Format, *, store: bool = False, run: Run = _directly,
) -> Tensor:  # fmt: skip
    """Attention of `q` `[B, Hq, S, D]` over the cache, shared tiles and new tokens.

    With `store` the one token of `k_new`, `v_new` `[B, H, 1, D]` is put into the cache first,
    attended to there, and counted in `seq_lens` at the end.
    """
    queries = q.shape[2]
    if not q.numel():
        return torch.empty_like(q)
    rotation = rotation.contiguous()
    sink_logits = None if sink_logits is None else sink_logits.contiguous()
    outs = []
    for start in range(0, queries, _QUERIES_PER_LAUNCH):
        block = q[:, :, start : start + _QUERIES_PER_LAUNCH].contiguous()
        out = _attention_block(
            block, start, queries, cache, shared, k_new, v_new, visible, rotation, sink_logits,
            scale, softcap, form, store, run,
        )  # fmt: skip
        outs.append(out)
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)


def _attention_block(
    q: Tensor, start: int, total: int, cache: Any, shared: Any | None, k_new: Tensor | None,
    v_new: Tensor | None, visible: Visible, rotation: Tensor, sink_logits: Tensor | None,
    scale: float, softcap: float, form: Format, store: bool, run: Run,
) -> Tensor:  # fmt: skip
    batch, num_q_heads, queries, head_dim = q.shape
    heads, device = cache.k_tail.shape[1], q.device
    described = describe(device)
    ratio = num_q_heads // heads
    rows, programs = ratio * queries, batch * heads
    capacity, ring = cache.k_codes.shape[2], cache.k_tail.shape[2]
    new_tokens = 0 if k_new is None or store else k_new.shape[2]
    shape = attend_shape(
        device, programs, rows, capacity, form.sinks + ring + new_tokens, head_dim,
        form.group_size, form.key_bits, form.value_bits, q.dtype,
    )  # fmt: skip
    shared_shape = None
    if shared is not None:
        shared_shape = attend_shape(
            device, programs, rows, shared.k_codes.shape[2], 0, head_dim,
            form.group_size, form.key_bits, form.value_bits, q.dtype,
        )  # fmt: skip
    own_slots = shape.dense_slots + shape.splits
    slots = own_slots + (shared_shape.splits if shared_shape else 0)

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    rotated = empty(batch, heads, rows, head_dim, dtype=torch.float16)
    unit = empty(batch, heads, rows)
    part = empty(batch, heads, slots, rows, head_dim)
    peak, weight = empty(batch, heads, slots, rows), empty(batch, heads, slots, rows)
    out = torch.empty_like(q)
    k_in, v_in = (q, q) if k_new is None or v_new is None else (k_new, v_new)
    mask = MaskView.of(visible.mask)
    precision = _precision(device)
    pad = triton.next_power_of_2(head_dim)

    block_d = min(64, pad)
    run(prepare_kernel)[(programs, triton.cdiv(rows, 16), triton.cdiv(head_dim, block_d))](
        q, rotation, cache.k_equalizer, rotated, unit, k_in, v_in, cache.k_sink, cache.v_sink,
        cache.k_tail, cache.v_tail, cache.seq_lens, rows, capacity,
        HEADS=heads, D=head_dim, G=form.group_size, SINKS=form.sinks, RING=ring, LAG=form.lag,
        ROTATE=form.rotate_keys, STORE=int(store), M=16, BLOCK_D=block_d, BLOCK_K=32,
        PRECISION=precision, num_warps=4,
    )  # fmt: skip

    def attend(tiles: Any, shape: Any, capacity: int, dense_slots: int, first: int) -> None:
        is_shared = dense_slots == 0
        grid = (programs, dense_slots + shape.splits, triton.cdiv(rows, shape.rows))
        run(attend_kernel)[grid](
            q, rotated, unit, tiles.k_codes, tiles.k_channel_affine, tiles.k_token_scale,
            tiles.v_codes, tiles.v_token_affine, tiles.v_channel_scale,
            cache.k_sink, cache.v_sink, cache.k_tail, cache.v_tail, k_in, v_in,
            q if visible.rank is None else visible.rank, cache.seq_lens,
            q if visible.first is None else visible.first, part, peak, weight,
            scale, softcap, rows, queries, start, total, new_tokens, capacity,
            tiles.k_codes.stride(1) // tiles.k_codes.stride(2), slots, first,
            batch // tiles.k_codes.shape[0], shape.splits, dense_slots,
            q if mask.data is None else mask.data, mask.columns, *mask.strides, mask.step,
            HEADS=heads, D=head_dim, G=form.group_size, KEY_BITS=form.key_bits,
            VALUE_BITS=form.value_bits, SINKS=form.sinks, RING=ring, LAG=form.lag,
            STORED=int(store), N=shape.rows,
            BLOCK_T=shape.block_tokens,
            W_K=triton.next_power_of_2(head_dim // planes(form.key_bits)),
            W_V=form.group_size // planes(form.value_bits), D_PAD=pad,
            HAS_NEW=new_tokens > 0, HAS_VALID=visible.rank is not None,
            CAUSAL_NEW=visible.causal, LIMITED=visible.limited and not is_shared,
            WINDOW=visible.first is not None and not is_shared, SHARED=is_shared,
            MASK=mask.kind, MASK_ROWS=shape.rows if any(mask.strides[1:]) else 1,
            MASK_PACKED=mask.step == 1,
            SOFTCAP=softcap != 0, STAGES=shape.stages, PTX=described.ptx, FOLDS=shape.folds,
            # The interpreter cannot multiply them.
            UPCAST=described.interpreted and q.dtype == torch.bfloat16,
            num_warps=shape.warps,
        )  # fmt: skip

    attend(cache, shape, capacity, shape.dense_slots, 0)
    if shared is not None and shared_shape is not None:
        attend(_evenly_spaced(shared), shared_shape, shared.k_codes.shape[2], 0, own_slots)

    many = rows >= 16 and head_dim <= 128
    block_d = 32 if head_dim <= 128 else 16
    run(combine_kernel)[
        (programs, triton.cdiv(rows, 16 if many else 1), triton.cdiv(head_dim, block_d))
    ](
        part, peak, weight, rotation, cache.v_equalizer,
        q if sink_logits is None else sink_logits, out, unit, cache.seq_lens, rows,
        slots, queries, shape.dense_slots,
        HEADS=heads, D=head_dim, RATIO=ratio,
        ROTATE=form.rotate_values, HAS_SINK_LOGITS=sink_logits is not None, COUNT=int(store),
        M=16 if many else 1, D_PAD=pad, BLOCK_D=block_d, BLOCK_S=1 if many else 16,
        PRECISION=precision, num_warps=4,
    )  # fmt: skip
    return out


def append(
    k: Tensor, v: Tensor, valid: Tensor | None, cache: Any, rotation: Tensor, form: Format, *,
    run: Run = _directly,
) -> None:  # fmt: skip
    """Quantize the tiles that `k`, `v` `[B, H, S, D]` finish, then store and count the tokens."""
    batch, heads, count, head_dim = k.shape
    if not k.numel():
        return
    counts = order = rank = None
    if valid is not None:
        counts = valid.sum(-1)
        valid = valid.contiguous()
        order = torch.argsort(~valid, dim=-1, stable=True).to(torch.int32)
        rank = _ranks(valid)
    encode(k, v, order, counts, cache, rotation, form, stored=False, run=run)
    block = min(16, triton.next_power_of_2(count))
    run(store_kernel)[(batch * heads, triton.cdiv(count, block))](
        k, v, k if rank is None else rank, cache.seq_lens if counts is None else counts,
        cache.k_sink, cache.v_sink, cache.k_tail, cache.v_tail, cache.seq_lens, count,
        HEADS=heads, D=head_dim, SINKS=form.sinks, RING=cache.k_tail.shape[2],
        HAS_VALID=valid is not None, BLOCK_T=block, D_PAD=triton.next_power_of_2(head_dim),
        num_warps=4,
    )  # fmt: skip
    cache.seq_lens.add_(count if counts is None else counts)


def encode(
    k: Tensor, v: Tensor, order: Tensor | None, counts: Tensor | None, cache: Any,
    rotation: Tensor, form: Format, *, stored: bool, run: Run = _directly,
) -> None:  # fmt: skip
    """Quantize finished tiles; `stored` tokens are in the tail and counted already."""
    batch, heads, count, head_dim = k.shape
    tiles = triton.cdiv(count, form.group_size)
    alone, rotation = tiles == 1, rotation.contiguous()
    shape = encode_shape(
        k.device, head_dim, form.group_size, form.key_bits, form.value_bits
    )  # fmt: skip
    per_launch = min(tiles, max(1, shape.programs // (2 * batch * heads)))
    scratch = torch.empty(
        2 * batch * heads * per_launch * shape.chunks * form.group_size * shape.width,
        dtype=torch.float32, device=k.device,
    )  # fmt: skip

    def launch(first: int, programs: int, make: bool, only: bool) -> None:
        run(encode_kernel)[(batch * heads, programs, 2)](
            k, v, k if order is None else order, cache.seq_lens if counts is None else counts,
            rotation, cache.k_codes, cache.k_channel_affine, cache.k_token_scale, cache.v_codes,
            cache.v_token_affine, cache.v_channel_scale, cache.k_tail, cache.v_tail,
            cache.k_equalizer, cache.v_equalizer, cache.seq_lens, scratch, count,
            cache.k_codes.shape[2], first,
            HEADS=heads, D=head_dim, G=form.group_size, KEY_BITS=form.key_bits,
            VALUE_BITS=form.value_bits, SINKS=form.sinks, RING=cache.k_tail.shape[2],
            LAG=form.lag, PLUS=form.plus, ITERS=form.iters, ROTATE_KEYS=form.rotate_keys,
            ROTATE_VALUES=form.rotate_values, MAKE_EQUALIZER=make, EQUALIZER_ONLY=only,
            HAS_VALID=order is not None, STORED=stored, CHUNKS=shape.chunks, WIDTH=shape.width,
            BLOCK_K=shape.block_k, PRECISION=_precision(k.device), num_warps=shape.warps,
            num_stages=shape.stages,
        )  # fmt: skip

    if form.plus and not alone:
        launch(0, 1, True, True)
    for first in range(0, tiles, per_launch):
        launch(first, min(per_launch, tiles - first), form.plus and alone, False)


def step(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, cache: Any, shared: Any | None,
    rotation: Tensor, sink_logits: Tensor | None, scale: float, softcap: float, causal: bool,
    form: Format, first: Tensor | None, *, run: Run = _directly,
) -> Tensor:  # fmt: skip
    """Attend to the cache and the new tokens, then append these; `first` as in `Visible`."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    if k.shape[2] == 1 and valid is None:
        visible = Visible(causal=False, limited=False, rank=None, first=first)
        out = attention(
            q, cache, shared, k, v, visible, rotation, sink_logits, scale, softcap, form,
            store=True, run=run,
        )  # fmt: skip
        encode(k, v, None, None, cache, rotation, form, stored=True, run=run)
        return out
    rank = None if valid is None else _ranks(valid)
    visible = Visible(causal=causal, limited=False, rank=rank, first=first)
    out = attention(
        q, cache, shared, k, v, visible, rotation, sink_logits, scale, softcap, form, run=run
    )
    append(k, v, valid, cache, rotation, form, run=run)
    return out


def _evenly_spaced(tiles: Any) -> Any:
    """Tiles of which all fields have one stride from head to head: views of a cache do."""
    spacing = set()
    for tensor in tiles:
        count = tensor[0, 0, 0].numel()
        heads = tensor.stride(1) // count
        regular = tensor.stride(0) == tensor.shape[1] * tensor.stride(1)
        if tensor.stride(2) != count or not (regular and tensor[0, 0, 0].is_contiguous()):
            heads = -1
        spacing.add(heads)
    if len(spacing) == 1 and -1 not in spacing:
        return tiles
    return type(tiles)(*(tensor.contiguous() for tensor in tiles))


def _ranks(valid: Tensor) -> Tensor:
    """Number of valid tokens of the row before each one, -1 for padding, int32."""
    return (valid.cumsum(-1) - 1).masked_fill(~valid, -1).to(torch.int32).contiguous()


def _precision(device: torch.device) -> str:
    """Products with the rotation: fp32 by three TF32 products on NVIDIA tensor cores."""
    return "tf32x3" if describe(device).ptx else "ieee"
