"""Device helpers of the encoder: a tile in scratch memory, its statistics, powers of two.

A rotated tile `[G, D]` fp32 lies in scratch memory (in practice the L2 cache) as `CHUNKS` pieces
`[G, WIDTH]`, and every pass reads it again: registers then limit neither `D` nor the occupancy.
What belongs to channels is a table `[CHUNKS, WIDTH]`. Position `p` of chunk `c` is channel
`p // W * (D / PLANES) + c * W + p % W` with `W = WIDTH / PLANES`: all planes of a packed word are
in one chunk. Positions without a channel hold zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def channels(c, D: tl.constexpr, WIDTH: tl.constexpr, PLANES: tl.constexpr):
    """Channels `[WIDTH]` of a chunk; `D` where there is none."""
    W: tl.constexpr = WIDTH // PLANES
    position = tl.arange(0, WIDTH)
    word = c * W + position % W
    return tl.where(word < D // PLANES, position // W * (D // PLANES) + word, D)


@triton.jit
def channel_table(D: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr, PLANES: tl.constexpr):
    """`channels` of all chunks, `[CHUNKS, WIDTH]`."""
    # The formula again: through one function `encode` took 30 registers more on sm_100.
    W: tl.constexpr = WIDTH // PLANES
    position = tl.arange(0, WIDTH)[None, :]
    word = tl.arange(0, CHUNKS)[:, None] * W + position % W
    return tl.where(word < D // PLANES, position // W * (D // PLANES) + word, D)


@triton.jit
def pick(table, c):
    """Row `c` of a table."""
    if table.shape[0] == 1:
        return tl.reshape(table, (table.shape[1],))
    rows = tl.arange(0, table.shape[0])[:, None]
    return tl.sum(tl.where(rows == c, table, 0.0), axis=0)


@triton.jit
def put(table, c, row):
    """The table with row `c` replaced."""
    rows = tl.arange(0, table.shape[0])[:, None]
    return tl.where(rows == c, row[None, :], table)


@triton.jit
def chunk_place(c, G: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets `[G, WIDTH]` of chunk `c` in scratch memory."""
    return (c * G + tl.arange(0, G)[:, None]) * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def load_chunk(scratch_ptr, c, G: tl.constexpr, WIDTH: tl.constexpr):
    """Chunk `c` of the tile."""
    return tl.load(scratch_ptr + chunk_place(c, G, WIDTH))


@triton.jit
def balanced(chunk, c, by_channel, by_token):
    """Chunk `c` times factors of channels and tokens: the inverses of their scales."""
    return chunk * pick(by_channel, c)[None, :] * by_token[:, None]


@triton.jit
def balanced_chunk(scratch_ptr, c, by_channel, by_token):
    """`balanced` of `load_chunk`."""
    chunk = load_chunk(scratch_ptr, c, by_token.shape[0], by_channel.shape[1])
    return balanced(chunk, c, by_channel, by_token)


@triton.jit
def power_of_two(exponent):
    """`2.0**exponent`, exact for exponents in [-126, 127]."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponent_of(x):
    """The exponent that frexp gives: `x = m * 2**e` with m in [0.5, 1); 0 for 0, else >= -126."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x > 0, ((bits >> 23) & 255) - 126, 0)


@triton.jit
def rounded(x):
    """To the nearest integer, ties to even, for |x| < 2**22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def as_fp16(x):
    """Rounded to fp16, still fp32."""
    return x.to(tl.float16).to(tl.float32)


@triton.jit
def sanitized(x):
    """NaN to 0, everything else into the range of fp16, as fp32."""
    x = x.to(tl.float32)
    x = tl.where(x == x, x, 0.0)
    return tl.minimum(tl.maximum(x, -65504.0), 65504.0)


@triton.jit
def gauge(peak, square_sum, peak_exponent, COUNT: tl.constexpr):
    """Exponent of the power of two near the RMS, from the sum of `(x * 2**-peak_exponent)**2`."""
    rms = tl.sqrt(square_sum / COUNT)
    exponent = tl.maximum(exponent_of(rms) + peak_exponent, -64)
    return tl.where(peak > 0, exponent, 0)


@triton.jit
def token_std(scratch_ptr, by_channel, by_token, D: tl.constexpr, PLANES: tl.constexpr):
    """Standard deviation over the channels of the balanced tile, `[G]`; two passes."""
    CHUNKS: tl.constexpr = by_channel.shape[0]
    mean = tl.zeros((by_token.shape[0],), tl.float32)
    for c in range(0, CHUNKS):
        mean += tl.sum(balanced_chunk(scratch_ptr, c, by_channel, by_token), axis=1)
    mean = mean / D
    square = tl.zeros((by_token.shape[0],), tl.float32)
    for c in range(0, CHUNKS):
        part = balanced_chunk(scratch_ptr, c, by_channel, by_token) - mean[:, None]
        inside = channels(c, D, by_channel.shape[1], PLANES) < D
        square += tl.sum(tl.where(inside[None, :], part * part, 0.0), axis=1)
    return tl.sqrt(square / (D - 1))


@triton.jit
def channel_std(scratch_ptr, by_channel, by_token):
    """Standard deviation over the tokens of the balanced tile, a table `[CHUNKS, WIDTH]`."""
    G: tl.constexpr = by_token.shape[0]
    table = by_channel
    for c in range(0, by_channel.shape[0]):
        part = balanced_chunk(scratch_ptr, c, by_channel, by_token)
        part = part - (tl.sum(part, axis=0) / G)[None, :]
        table = put(table, c, tl.sqrt(tl.sum(part * part, axis=0) / (G - 1)))
    return table
