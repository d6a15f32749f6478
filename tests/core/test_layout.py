"""Packed rows: bit positions, round trips, the order that readers use, and exact sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvarn_ops import layout
from kvarn_ops.config import BITS, KVarNConfig

sizes = st.integers(2, 36).map(lambda k: 16 * k)
bit_widths = st.sampled_from(BITS)
quick = settings(max_examples=60, deadline=None, derandomize=True)


def random_codes(bits: int, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)


def pack_by_hand(codes: list[int], bits: int) -> list[int]:
    """The documented layout, one bit field at a time."""
    if bits == 3:
        words = len(codes) // 8
        high = [0] * words
        for index, code in enumerate(codes):
            high[index % words] |= (code >> 2) << (index // words)
        return pack_by_hand([code & 3 for code in codes], 2) + high
    words = len(codes) * bits // 16
    packed = bytearray()
    for j in range(words):
        word = 0
        for i in range(16 // bits):
            word |= codes[i * words + j] << (i * bits)
        packed += word.to_bytes(2, "little")
    return list(packed)


@quick
@given(bit_widths, sizes, st.integers(0, 1000))
def test_packing_round_trips(bits: int, n: int, seed: int) -> None:
    codes = random_codes(bits, 2, 3, n, seed=seed)
    packed = layout.pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, 3, layout.row_bytes(n, bits))
    assert packed.shape[-1] * 8 == n * bits
    unpacked = layout.unpack_codes(packed, bits, n)
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked, codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", [32, 48, 64, 80, 112, 128, 576])
def test_bits_lie_where_the_documentation_says(bits: int, n: int) -> None:
    codes = random_codes(bits, n, seed=n)
    assert layout.pack_codes(codes, bits).tolist() == pack_by_hand(codes.tolist(), bits)


def test_one_code_sets_one_field() -> None:
    """Literal positions, so that the model above cannot be wrong in the same way."""
    n = 64

    def nonzero(bits: int, index: int) -> dict[int, int]:
        codes = torch.zeros(n, dtype=torch.uint8)
        codes[index] = 2**bits - 1
        packed = layout.pack_codes(codes, bits)
        return {int(i): int(packed[i]) for i in packed.nonzero().flatten()}

    # 2 bits: 8 words. Code 11 = plane 1, word 3: bits 2 and 3 of its low byte, byte 6.
    assert nonzero(2, 11) == {6: 0b1100}
    assert nonzero(2, 35) == {7: 0b0011}  # plane 4, word 3: the high byte
    # 4 bits: 16 words. Code 17 = plane 1, word 1.
    assert nonzero(4, 17) == {2: 0xF0}
    assert nonzero(4, 63) == {31: 0xF0}
    # 8 bits: 32 words. Code 33 = plane 1, word 1.
    assert nonzero(8, 33) == {3: 0xFF}
    # 3 bits: as 2 bits, and the high bits start at byte 16, one byte per word.
    assert nonzero(3, 11) == {6: 0b1100, 16 + 3: 0b10}
    assert nonzero(3, 35) == {7: 0b0011, 16 + 3: 0b10000}


@quick
@given(bit_widths, sizes, st.integers(0, 1000))
def test_fields_and_field_order_give_the_dot_product(bits: int, n: int, seed: int) -> None:
    codes = random_codes(bits, 4, n, seed=seed)
    x = torch.randint(-50, 50, (n,), generator=torch.Generator().manual_seed(seed + 1))
    packed = layout.pack_codes(codes, bits).long()
    parts = list(layout.to_field_order(x, bits))
    fields = layout.fields(bits, n)
    assert len(parts) == len(fields)
    total = torch.zeros(4, dtype=torch.int64)
    for field, part in zip(fields, parts):
        in_range = packed[:, field.start : field.stop]
        assert part.shape == in_range.shape[-1:]
        total += (((in_range >> field.shift) & field.mask) * field.weight * part).sum(-1)
    assert torch.equal(total, (codes.long() * x).sum(-1))


@pytest.mark.parametrize("bits", BITS)
def test_fields_cover_every_bit_once(bits: int) -> None:
    n = 96
    covered = [0] * layout.row_bytes(n, bits)
    for field in layout.fields(bits, n):
        for byte in range(field.start, field.stop):
            assert covered[byte] & (field.mask << field.shift) == 0
            covered[byte] |= field.mask << field.shift
    assert covered == [255] * len(covered)


@pytest.mark.parametrize("bits", BITS)
def test_the_centre_is_the_middle_of_the_codes(bits: int) -> None:
    assert layout.center(bits) == sum(range(2**bits)) / 2**bits


@pytest.mark.parametrize("preset", ["k4v2_g128", "k3v8_g32", "k2v4_g64"])
@pytest.mark.parametrize("head_dim", [80, 128])
def test_an_empty_cache_has_the_documented_tensors(preset: str, head_dim: int) -> None:
    config = KVarNConfig.from_preset(preset, num_sink_tokens=7, tail_tokens=40)
    batch, heads, group, tiles = 2, 3, config.group_size, 3
    length = 7 + 40 + tiles * group
    cache = layout.allocate(config, batch, heads, head_dim, length, torch.bfloat16, "cpu")
    lead, half = (batch, heads), torch.float16
    expected = {
        "k_codes": ((*lead, tiles, group, head_dim * config.key_bits // 8), torch.uint8),
        "k_channel_affine": ((*lead, tiles, 2, head_dim), half),
        "k_token_scale": ((*lead, tiles, group), half),
        "v_codes": ((*lead, tiles, head_dim, group * config.value_bits // 8), torch.uint8),
        "v_token_affine": ((*lead, tiles, 2, group), half),
        "v_channel_scale": ((*lead, tiles, head_dim), half),
        "k_sink": ((*lead, 7, head_dim), torch.bfloat16),
        "v_sink": ((*lead, 7, head_dim), torch.bfloat16),
        "k_tail": ((*lead, config.ring_len, head_dim), torch.bfloat16),
        "v_tail": ((*lead, config.ring_len, head_dim), torch.bfloat16),
        "k_equalizer": ((*lead[:2], head_dim), torch.float16),
        "v_equalizer": ((*lead[:2], head_dim), torch.float16),
        "seq_lens": ((batch,), torch.int64),
    }
    found = {name: (tuple(t.shape), t.dtype) for name, t in cache._asdict().items()}
    assert found == expected
    assert all(not tensor.any() for tensor in cache)
    assert len({tensor.untyped_storage().data_ptr() for tensor in cache}) == len(cache)


def test_rows_are_views() -> None:
    cache = layout.allocate(KVarNConfig(), 3, 1, 64, 300, torch.float32, "cpu")
    rows = cache.rows(1, 2)
    assert all(part.shape[0] == 2 for part in rows)
    rows.k_sink.fill_(1)
    rows.seq_lens.fill_(5)
    assert cache.seq_lens.tolist() == [0, 5, 5]
    assert cache.k_sink[0].sum() == 0
    assert cache.k_sink[1:].min() == 1


@quick
@given(
    st.sampled_from((32, 64, 128)),
    st.integers(0, 200),
    st.integers(0, 300),
    st.integers(0, 3000),
)
def test_a_cache_has_room_for_the_length_asked_for(
    group: int, sinks: int, tail: int, length: int
) -> None:
    config = KVarNConfig(group_size=group, num_sink_tokens=sinks, tail_tokens=tail)
    tiles = config.allocated_tiles(length)
    assert layout.capacity(config, tiles) >= length
    assert config.num_tiles(layout.capacity(config, tiles)) == tiles
    assert config.num_tiles(layout.capacity(config, tiles) + 1) == tiles + 1
