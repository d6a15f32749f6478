"""Each form in which a static cache is written and read, and programs that only look like one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import static_attention as forms
from kvarn_ops.errors import CacheError, UnsupportedModelError
from kvarn_ops.lowering import explain_rewrite, rewrite_kv_cache
from kvarn_ops.lowering.graph import count_ops
from static_attention import HQ, SMALL, Attention, B, D, H, T, causal, expected, exported, step

pytestmark = pytest.mark.export

MANY = ("index_copy", "index_put", "slice_assignment", "narrow", "slice_scatter", "cat")
ONE = (*MANY, "select")


def _assert_rewritten(program, new):
    """One append and one attention, no dense buffer, nothing else lost."""
    assert count_ops(new.graph) == {"kvarn::append_at_": 1, "kvarn::attention": 1}
    dense = {value.shape for name, value in program.named_buffers()}
    assert not {value.shape for name, value in new.named_buffers()} & dense
    assert not explain_rewrite(new).refused


def _run(new, counts, **attention):
    module, start, inputs = new.module(), 0, []
    for count in counts:
        inputs.append(step(count, start))
        out = module(*inputs[-1])
        torch.testing.assert_close(out, expected(inputs, **attention), atol=1e-5, rtol=1e-4)
        start += count


@pytest.mark.parametrize("write", ONE)
def test_decode(write):
    program = exported(Attention(getattr(forms, write)))
    new = rewrite_kv_cache(program, **SMALL, strict=True)
    _assert_rewritten(program, new)
    assert explain_rewrite(new).layers[0].mask == "causal"
    _run(new, [1] * T)


@pytest.mark.parametrize("write", MANY)
def test_any_number_of_tokens(write):
    program = exported(Attention(getattr(forms, write)), None)
    new = rewrite_kv_cache(program, **SMALL, strict=True)
    _assert_rewritten(program, new)
    ranges = [value for key, value in new.range_constraints.items() if str(key)[0] == "s"]
    assert [(int(one.lower), int(one.upper)) for one in ranges] == [(2, T - 1)]
    _run(new, [5, 20, 30, 2, 39])


def test_a_cache_that_shifts_is_exact_until_it_is_full():
    program = exported(Attention(forms.shift, forms.from_the_right))
    new = rewrite_kv_cache(program, **SMALL, strict=True)
    _assert_rewritten(program, new)
    _run(new, [1] * T)
    with pytest.raises(CacheError, match=str(T)):
        new.module()(*step(1, T))


def _head_major(cache, x, pos):
    cache[:, pos] = x.transpose(1, 2)
    return cache


def _channel_major(cache, x, pos):
    return cache.index_copy_(3, pos, x.transpose(2, 3))


def _cast_write(cache, x, pos):
    return cache.index_copy_(2, pos, x.to(cache.dtype))


def _repeat_kv(x):
    return x[:, :, None].expand(B, H, HQ // H, T, D).reshape(B, HQ, T, D)


READS = {
    "repeated by expand": {"read": _repeat_kv},
    "repeated by interleave": {"read": lambda x: x.repeat_interleave(HQ // H, 1)},
    "tokens before heads": {
        "write": _head_major,
        "shape": (B, T, H, D),
        "read": lambda x: x.transpose(1, 2),
    },
    "channels before tokens": {
        "write": _channel_major,
        "shape": (B, H, D, T),
        "read": lambda x: _repeat_kv(x.transpose(2, 3)),
    },
    "stored in bfloat16": {
        "write": _cast_write,
        "dtype": torch.bfloat16,
        "read": lambda x: _repeat_kv(x).float(),
    },
}


@pytest.mark.parametrize("form", READS)
def test_layouts_repeats_and_casts(form):
    module = Attention(**READS[form])
    program = exported(module)
    new = rewrite_kv_cache(program, **SMALL, strict=True)
    _assert_rewritten(program, new)
    if "bfloat16" not in form:
        _run(new, [1] * 60)
        return
    for position in range(60):
        inputs = step(1, position)
        wanted, found = program.module()(*inputs), new.module()(*inputs)
        torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-2)


def _window(module, pos):
    slots = torch.arange(T)
    return {"attn_mask": (slots <= pos[:, None]) & (slots > pos[:, None] - 16)}


def _bias(module, pos):
    distance = (torch.arange(T) - pos[:, None]).float()
    bias = torch.where(distance <= 0, 0.1 * distance, torch.finfo(torch.float32).min)
    return {"attn_mask": bias * torch.ones(HQ, 1, 1)}


def _minus_infinity(module, pos):
    later = torch.arange(T) > pos[:, None]
    return {"attn_mask": torch.zeros(1, T).masked_fill(later, float("-inf"))}


@pytest.mark.parametrize("count", [1, 6])
def test_a_mask_of_another_kind_is_passed_on(count):
    for mask in (_window, _bias):
        program = exported(Attention(mask=mask), count)
        new = rewrite_kv_cache(program, **SMALL, strict=True)
        _assert_rewritten(program, new)
        assert "not the causal one" in explain_rewrite(new).layers[0].mask
        inputs, module = [], new.module()
        for start in range(0, 60, count):
            inputs.append(step(count, start))
            given = mask(None, inputs[-1][3])["attn_mask"][..., : start + count]
            torch.testing.assert_close(
                module(*inputs[-1]), expected(inputs, attn_mask=given), atol=1e-5, rtol=1e-4
            )


def test_a_float_mask_of_zeros_and_infinities_is_proven():
    new = rewrite_kv_cache(exported(Attention(mask=_minus_infinity), None), **SMALL, strict=True)
    assert explain_rewrite(new).layers[0].mask == "causal"
    _run(new, [7, 50])


def test_a_mask_that_is_an_input_is_passed_on():
    class Masked(Attention):
        def forward(self, q, k, v, pos, mask):
            self.mask = lambda module, pos: {"attn_mask": mask}
            return super().forward(q, k, v, pos)

    def given(pos):
        mask = torch.arange(T) <= pos
        mask[:3] = False  # as for a row that is padded on the left
        return mask.view(1, 1, 1, T).repeat(B, 1, 1, 1)

    inputs = step(1, 3)
    program = torch.export.export(Masked(), (*inputs, given(3)))
    new = rewrite_kv_cache(program, **SMALL, strict=True)
    assert "mask depends on mask" in explain_rewrite(new).layers[0].mask
    dense, packed = program.module(), new.module()
    for position in range(50):
        inputs = (*step(1, position), given(position))
        if position > 3:
            torch.testing.assert_close(packed(*inputs), dense(*inputs), atol=2e-2, rtol=2e-2)
        else:
            packed(*inputs), dense(*inputs)


def test_scale_is_kept():
    def scaled(module, pos):
        return {"scale": 0.5, **causal(module, pos)}

    new = rewrite_kv_cache(exported(Attention(mask=scaled)), **SMALL, strict=True)
    inputs = [step(1, 0), step(1, 1)]
    for one in inputs:
        out = new.module()(*one)
    torch.testing.assert_close(out, expected(inputs, scale=0.5), atol=1e-5, rtol=1e-4)


class _Reads(Attention):
    """Returns what `extra` makes of the keys beside the attention's output."""

    extra = staticmethod(lambda keys: keys)

    def forward(self, q, k, v, pos):
        return super().forward(q, k, v, pos), self.extra(self.keys)


class _Sums(_Reads):
    extra = staticmethod(torch.sum)


class _Apart(Attention):
    def forward(self, q, k, v, pos):
        k, v = forms.index_copy(self.keys, k, pos), forms.index_copy(self.values, v, pos.flip(0))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **causal(self, pos))


class _Late(Attention):
    def forward(self, q, k, v, pos):
        old = self.keys.sum()
        return super().forward(q, k, v, pos) + old


class _OneQuery(Attention):
    def forward(self, q, k, v, pos):
        return super().forward(q[:, :, -1:], k, v, pos)


def _swapped_rows(cache, x, pos):
    return cache.index_copy_(2, pos.flip(0), x)


def _next_slot(cache, x, pos):
    return cache.index_copy_(2, (pos + 1) % T, x)


def _every_other(cache, x, pos):
    return cache.index_copy_(2, pos * 2 % T, x)


def _added(cache, x, pos):
    return cache.index_add_(2, pos, x)


def _random_slot(cache, x, pos):
    return cache.index_copy_(2, torch.full_like(pos, x.long().sum() % T), x)


def _look_ahead(module, pos):
    return {"attn_mask": torch.arange(T) <= pos[:, None] + 1}


def _last(module, pos):
    return {"attn_mask": causal(module, pos)["attn_mask"][:, 1:]}


def _short_table(module, pos):
    return {"attn_mask": torch.ones(40, T, dtype=torch.bool).tril()[pos]}


def _rows(cache, x, pos):
    cache[: x.shape[0], :, pos] = x
    return cache


def _tiled(x):
    return x.repeat(1, HQ // H, 1, 1)


NEAR_MISSES = {
    "keys are returned": (_Reads(), 1, "also read by"),
    "keys are summed": (_Sums(), 1, "also read by"),
    "keys are read before": (_Late(), 1, "before it is written"),
    "keys and values in other slots": (_Apart(), 4, "written to slots"),
    "fewer queries than tokens": (_OneQuery(), 4, "queries attend"),
    "slots backwards": (Attention(_swapped_rows), 4, "written to slots"),
    "slots one later": (Attention(_next_slot), 1, "written to slots [1]"),
    "slots with gaps": (Attention(_every_other), 1, "written to slots"),
    "slots from data": (Attention(_random_slot), 1, "depend on k"),
    "added to": (Attention(_added), 1, "not a recognised write"),
    "heads tiled": (Attention(read=_tiled), 1, "order"),
    "channels backwards": (Attention(read=lambda x: x.flip(3)), 1, "no static cache"),
    "tokens backwards": (Attention(read=lambda x: x.flip(2)), 1, "no static cache"),
    "not the first tokens": (Attention(mask=_last, read=lambda x: x[:, :, 1:]), 1, "first tokens"),
    "a mask that looks ahead": (Attention(mask=_look_ahead), 1, "hold no token yet"),
    "no mask": (Attention(mask=lambda m, p: {}), 1, "hold no token yet"),
    "a mask that ends early": (Attention(mask=_short_table), 1, "fails at position 40"),
    "every other row": (Attention(_rows, read=lambda x: x[::2].repeat(2, 1, 1, 1)), 1, "first tok"),
    "is_causal": (Attention(mask=lambda m, p: {"is_causal": True}), 4, "is_causal=True"),
    "dropout": (Attention(mask=lambda m, p: {"dropout_p": 0.5} | causal(m, p)), 1, "dropout"),
    "a shift without mask": (Attention(forms.shift, lambda m, p: {}), 1, "no mask tells"),
    "a shift with the mask of slots": (Attention(forms.shift), 1, "hold no token yet"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay_dense_and_say_why(name):
    module, count, why = NEAR_MISSES[name]
    program = exported(module, count)
    new = rewrite_kv_cache(program, **SMALL)
    assert new is program
    assert not count_ops(new.graph)
    (layer,) = explain_rewrite(new).refused
    assert why in layer.reason, layer.reason
    with pytest.raises(UnsupportedModelError, match="cannot be rewritten") as error:
        rewrite_kv_cache(program, **SMALL, strict=True)
    assert why in str(error.value)


def test_a_cache_that_holds_tokens_is_not_emptied():
    module = Attention()
    module.keys[0, 0, 0, 0] = 1.0
    program = exported(module)
    assert rewrite_kv_cache(program, **SMALL) is program
    assert "already holds tokens" in explain_rewrite(program).refused[0].reason


def test_one_layer_of_two_is_rewritten_and_the_other_one_still_right():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.good, self.bad = Attention(), Attention(read=_tiled)

        def forward(self, q, k, v, pos):
            return self.good(q, k, v, pos), self.bad(q, k, v, pos)

    program = exported(Two())
    new = rewrite_kv_cache(program, **SMALL)
    report = explain_rewrite(new)
    assert [layer.layer for layer in report.refused] == ["bad"]
    assert count_ops(new.graph) == {"kvarn::append_at_": 1, "kvarn::attention": 1}
    assert "bad.keys" in dict(new.named_buffers())
    dense, packed = program.module(), new.module()
    for position in range(20):
        wanted, found = dense(*step(1, position)), packed(*step(1, position))
        assert torch.equal(wanted[1], found[1])
        torch.testing.assert_close(wanted[0], found[0], atol=1e-2, rtol=1e-2)


def test_positions_that_are_not_consecutive_are_refused_when_it_runs():
    new = rewrite_kv_cache(exported(Attention(), 3), **SMALL, strict=True)
    q, k, v, _ = step(3, 0)
    with pytest.raises(RuntimeError, match="consecutive"):
        new.module()(q, k, v, torch.tensor([0, 2, 4]))
    with pytest.raises(CacheError, match="gap"):
        new.module()(q, k, v, torch.tensor([5, 6, 7]))


def test_the_given_program_does_not_change():
    program = exported(Attention())
    before = str(program.graph)
    rewrite_kv_cache(program, **SMALL, strict=True)
    assert str(program.graph) == before
    assert set(dict(program.named_buffers())) == {"keys", "values"}
