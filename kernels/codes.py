"""Device helpers that turn packed words into codes which a tensor core takes as they are.

A code left at bit position `shift` of a 16-bit word whose other bits are zero *is* the fp16 number
`code * 2**(shift - 24)`, a subnormal, as long as it lies in the low ten bits. So unpacking is one
AND for two codes, without a conversion; the power of two goes into the other operand of the
product. All helpers keep the natural order of codes: plane `i`, word `j` is code `i * W + j`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def planes(bits):
    """Codes per 16-bit word; 3 bits are stored as 2 + 1."""
    return 8 if bits == 3 else 16 // bits


@triton.constexpr_function
def word_shift(bits, plane):
    """How far a word moves right before the plane is masked out of its low ten bits."""
    if bits == 2:
        return plane // 3 * 6
    if bits == 4:
        return plane // 2 * 8
    return plane * (2 if bits == 3 else 8)


@triton.constexpr_function
def code_shift(bits, plane):
    """Bit position at which the plane's codes stay, 0 to 4."""
    if bits == 3:
        return 0
    return (0 if bits == 8 else plane * bits) - (0 if bits == 8 else word_shift(bits, plane))


@triton.constexpr_function
def _low_mask(bits, plane):
    return (2 ** (2 if bits == 3 else bits) - 1) << code_shift(bits, plane)


@triton.constexpr_function
def _ptx(bits, plane):
    """PTX for two words at once; ptxas merges equal shifts of different planes."""
    mask = _low_mask(bits, plane)
    low = f"shr.b32 a, $1, {word_shift(bits, plane)}; and.b32 a, a, {mask | mask << 16};"
    if bits != 3:
        return f"{{ .reg .b32 a; {low} mov.b32 $0, a; }}"
    move = f"shr.b32 b, $2, {plane - 2};" if plane >= 2 else f"shl.b32 b, $2, {2 - plane};"
    return f"{{ .reg .b32 a, b; {low} {move} and.b32 b, b, {4 | 4 << 16}; or.b32 $0, a, b; }}"


@triton.jit
def _plane(words, high, BITS: tl.constexpr, PLANE: tl.constexpr, PTX: tl.constexpr):
    """Codes of one plane of `words` [R, W] int16, as fp16 subnormals."""
    if PTX:
        if BITS == 3:
            return tl.inline_asm_elementwise(
                _ptx(BITS, PLANE), "=r,r,r", [words, high], dtype=tl.float16, is_pure=True, pack=2
            )
        return tl.inline_asm_elementwise(
            _ptx(BITS, PLANE), "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2
        )
    field = (words >> word_shift(BITS, PLANE)) & _low_mask(BITS, PLANE)
    if BITS == 3:
        field = field | (((high >> PLANE) & 1) << 2)
    return field.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def unpack(words, high, BITS: tl.constexpr, PTX: tl.constexpr):
    """Codes `[R, planes * W]` of `words` [R, W] int16 as fp16 subnormals.

    `high` [R, W] int16 holds the third bits of 3-bit codes; it is ignored otherwise.
    """
    R: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    p0 = _plane(words, high, BITS, 0, PTX)
    p1 = _plane(words, high, BITS, 1, PTX)
    if planes(BITS) == 2:
        joined = tl.join(p0, p1)
    else:
        p2 = _plane(words, high, BITS, 2, PTX)
        p3 = _plane(words, high, BITS, 3, PTX)
        if planes(BITS) == 4:
            joined = tl.join(tl.join(p0, p2), tl.join(p1, p3))
        else:
            p4 = _plane(words, high, BITS, 4, PTX)
            p5 = _plane(words, high, BITS, 5, PTX)
            p6 = _plane(words, high, BITS, 6, PTX)
            p7 = _plane(words, high, BITS, 7, PTX)
            even = tl.join(tl.join(p0, p4), tl.join(p2, p6))
            odd = tl.join(tl.join(p1, p5), tl.join(p3, p7))
            joined = tl.join(even, odd)
    joined = tl.reshape(joined, (R, W, planes(BITS)))
    return tl.reshape(tl.permute(joined, (0, 2, 1)), (R, planes(BITS) * W))


@triton.jit
def load_codes(codes_ptr, row, word, mask, COUNT: tl.constexpr, BITS: tl.constexpr):
    """Operands of `unpack` from rows of `COUNT` codes: `row` [R], `word` [W], `mask` of [R, W]."""
    ROW: tl.constexpr = COUNT * BITS // 8
    words_ptr = codes_ptr.to(tl.pointer_type(tl.int16))
    words = tl.load(words_ptr + row[:, None] * (ROW // 2) + word[None, :], mask=mask, other=0)
    high = words
    if BITS == 3:
        # Bytes of third bits follow the row's words.
        high_ptr = codes_ptr + row[:, None] * ROW + COUNT // 4 + word[None, :]
        high = tl.load(high_ptr, mask=mask, other=0).to(tl.int16)
    return words, high


@triton.jit
def code_weights(positions, W: tl.constexpr, BITS: tl.constexpr):
    """`2**-code_shift` of the plane that each position of an unpacked row comes from."""
    plane = positions // W
    shift = plane * 0
    if BITS == 2:
        shift = plane % 3 * 2
    if BITS == 4:
        shift = plane % 2 * 4
    return tl.exp2(-shift.to(tl.float32))
