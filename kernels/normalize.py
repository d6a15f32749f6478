"""Variance normalization of one tile (Algorithm 1 of arXiv 2606.03458), for both encoders.

The same arithmetic as `kvarn_ops.reference.normalize`: columns first (tokens of K, channels of V),
then rows, and the best iterate of the tile is kept.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import channel_std, channel_table, token_std

LOG_MAX = tl.constexpr(10.0)
STD_MAX = tl.constexpr(1e3)
IMBALANCE_FLOOR = tl.constexpr(1e-8)
ZERO_STD = tl.constexpr(1e-6)


@triton.jit
def _step(log_scale, std, PLUS: tl.constexpr):
    std_min: tl.constexpr = 1e-2 if PLUS else 1e-3
    log_min: tl.constexpr = -4.6 if PLUS else -0.3
    log_std = tl.log(tl.minimum(tl.maximum(std, std_min), STD_MAX))
    return tl.minimum(tl.maximum(log_scale + log_std, log_min), LOG_MAX)


@triton.jit
def _spread(std, skip):
    """Largest over smallest standard deviation of what is not skipped."""
    largest = tl.max(tl.where(skip, 0.0, std))
    smallest = tl.min(tl.where(skip, float("inf"), std))
    return largest / tl.maximum(smallest, IMBALANCE_FLOOR)


@triton.jit
def normalize(
    scratch_ptr, unit, D: tl.constexpr, G: tl.constexpr, CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr, PLANES: tl.constexpr, ITERS: tl.constexpr, TOKENS_FIRST: tl.constexpr,
    PLUS: tl.constexpr,
):  # fmt: skip
    """Scales of channels `[CHUNKS, WIDTH]` and tokens `[G]` that balance `unit` times the tile."""
    absent = channel_table(D, CHUNKS, WIDTH, PLANES) >= D
    channel_log = tl.zeros((CHUNKS, WIDTH), tl.float32)
    token_log = tl.zeros((G,), tl.float32)
    channel_scale = tl.exp(channel_log)
    token_scale = tl.exp(token_log)
    by_channel, by_token = channel_scale, token_scale * unit
    of_channels = channel_std(scratch_ptr, by_channel, by_token)
    of_tokens = token_std(scratch_ptr, by_channel, by_token, D, PLANES)
    skip_channels = absent
    skip_tokens = of_tokens < 0.0
    if PLUS:
        skip_channels = absent | (of_channels < ZERO_STD)
        skip_tokens = of_tokens < ZERO_STD
    best = _spread(of_channels, skip_channels) + _spread(of_tokens, skip_tokens)
    for _ in range(ITERS):
        if TOKENS_FIRST:
            token_log = _step(token_log, of_tokens, PLUS)
            by_token = tl.exp(-token_log) * unit
            of_channels = channel_std(scratch_ptr, by_channel, by_token)
            channel_log = _step(channel_log, of_channels, PLUS)
            by_channel = tl.exp(-channel_log)
        else:
            channel_log = _step(channel_log, of_channels, PLUS)
            by_channel = tl.exp(-channel_log)
            of_tokens = token_std(scratch_ptr, by_channel, by_token, D, PLANES)
            token_log = _step(token_log, of_tokens, PLUS)
            by_token = tl.exp(-token_log) * unit
        of_channels = channel_std(scratch_ptr, by_channel, by_token)
        of_tokens = token_std(scratch_ptr, by_channel, by_token, D, PLANES)
        imbalance = _spread(of_channels, skip_channels) + _spread(of_tokens, skip_tokens)
        better = imbalance <= best
        best = tl.where(better, imbalance, best)
        channel_scale = tl.where(better, tl.exp(channel_log), channel_scale)
        token_scale = tl.where(better, tl.exp(token_log), token_scale)
    return channel_scale, token_scale
