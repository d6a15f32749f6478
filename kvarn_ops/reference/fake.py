"""`fake_quantize`: what a cache would return for given keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import DEFAULT_PRESET, KVarNConfig
from ..errors import InputError
from ..hadamard import check_head_dim
from .decode import decode_keys, decode_values
from .encode import encode_keys, encode_values, first_equalizer

__all__ = ["fake_quantize"]


def fake_quantize(
    k: Tensor, v: Tensor, config: KVarNConfig | str = DEFAULT_PRESET
) -> tuple[Tensor, Tensor]:
    """Quantize and dequantize as a cache that holds these tokens would: the method's definition.

    Parameters
    ----------
    k, v : Tensor
        `[B, H_kv, T, D]` keys (after RoPE) and values, fp16, bf16 or fp32; D may differ.
    config : KVarNConfig or str
        Config or preset name.

    Returns
    -------
    k_hat, v_hat : Tensor
        `[B, H_kv, T, D]` fp32 in the original frame. The first `num_sink_tokens` tokens and the
        tail pass through; every tile that a cache of T tokens has quantized is replaced.

    Raises
    ------
    InputError
        For wrong ranks, lengths, dtypes or an unsupported head_dim.
    ConfigError
        For an invalid config.
    """
    config = KVarNConfig.coerce(config)
    for name, x, rotate in (("k", k, config.rotate_keys), ("v", v, config.rotate_values)):
        if x.ndim != 4:
            raise InputError(
                f"{name} has shape {tuple(x.shape)}: give [batch, heads, tokens, dim]."
            )
        if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise InputError(f"{name} is {x.dtype}: give float16, bfloat16 or float32.")
        check_head_dim(x.shape[-1], rotate)
    if k.shape[:3] != v.shape[:3]:
        raise InputError(
            f"k {tuple(k.shape)} and v {tuple(v.shape)} differ in batch, heads or tokens."
        )
    tiles = config.num_tiles(k.shape[2])
    start, count = config.num_sink_tokens, tiles * config.group_size
    k_hat, v_hat = k.float().clone(), v.float().clone()
    if tiles and k.numel():
        for x, out, encode, decode in (
            (k, k_hat, encode_keys, decode_keys),
            (v, v_hat, encode_values, decode_values),
        ):
            body = x.narrow(2, start, count).unflatten(2, (tiles, config.group_size))
            equalizer = first_equalizer(body[:, :, :1], config)
            encoded = encode(body, config, equalizer=equalizer)
            decoded = decode(encoded, config, equalizer=equalizer)
            out.narrow(2, start, count).copy_(decoded.flatten(2, 3))
    return k_hat, v_hat
