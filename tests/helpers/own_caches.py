"""Cache modules as people write them, each with the call that stores tokens in it.

`CACHES[name]` is `(module, store, layout)`: `store(module, k, v, start)` takes `[B, H, S, D]` and
calls the module its own way; `layout` describes what comes back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

B, H, T, D = 2, 3, 200, 32


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    store: Callable[[Any, Tensor, Tensor, int], Any]
    heads_first: bool = True  # of what is returned
    whole: bool = True
    keys_first: bool = True


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape or (B, H, T, D), dtype=dtype)


def slots(start: int, k: Tensor) -> Tensor:
    return torch.arange(start, start + k.shape[2])


class IndexAssignment(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32, persistent: bool = False) -> None:
        super().__init__()
        self.register_buffer("k_cache", zeros(dtype=dtype), persistent=persistent)
        self.register_buffer("v_cache", zeros(dtype=dtype), persistent=persistent)

    def update(self, input_pos, k_val, v_val):
        k_out, v_out = self.k_cache, self.v_cache
        k_out[:, :, input_pos] = k_val
        v_out[:, :, input_pos] = v_val
        return k_out, v_out


class Renamed(nn.Module):
    """No name gives anything away; values of buffers lie in another order than in the call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("zig", zeros(), persistent=False)
        self.register_buffer("zag", zeros(), persistent=False)

    def exchange(self, a, /, b, *, c, flag=False):
        self.zag.index_copy_(2, c, a)
        self.zig.index_copy_(2, c, b)
        return [self.zig, self.zag]


class CountsInside(nn.Module):
    """A counter in a tensor; returns what is filled."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("one", zeros(), persistent=False)
        self.register_buffer("two", zeros(), persistent=False)
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64), persistent=False)

    def forward(self, k, v):
        n = int(self.count)
        self.one[:, :, n : n + k.shape[2]] = k
        self.two[:, :, n : n + k.shape[2]] = v
        self.count += k.shape[2]
        return self.one[:, :, : n + k.shape[2]], self.two[:, :, : n + k.shape[2]]

    @property
    def filled(self) -> int:
        return int(self.count)

    def clear(self) -> None:
        self.one.zero_()
        self.two.zero_()
        self.count.zero_()

    def drop_row(self, row):
        self.one[row] = 0


class TokensFirst(nn.Module):
    """`[B, T, H, D]`, a start index, plain attributes instead of buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.cache_k, self.cache_v = zeros(B, T, H, D), zeros(B, T, H, D)

    def put(self, start_pos: int, xk, xv):
        size = xk.shape[0]
        self.cache_k[:size, start_pos : start_pos + xk.shape[1]] = xk
        self.cache_v[:size, start_pos : start_pos + xk.shape[1]] = xv
        end = start_pos + xk.shape[1]
        return self.cache_k[:size, :end], self.cache_v[:size, :end]


class Transposes(nn.Module):
    """Tokens first outside, heads first inside; new tensors take the place of the buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k", zeros(), persistent=False)
        self.register_buffer("v", zeros(), persistent=False)

    def write(self, name, new, start):
        new = new.transpose(1, 2)
        end = start + new.shape[2]
        setattr(self, name, torch.slice_scatter(getattr(self, name), new, 2, start, end))
        return getattr(self, name).transpose(1, 2)

    def forward(self, keys, values, start):
        return self.write("k", keys, start), self.write("v", values, start)


class MayCount(nn.Module):
    """A position, or none: then it goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k", zeros(), persistent=False)
        self.register_buffer("v", zeros(), persistent=False)
        self.end = 0

    def update(self, k, v, at=None, scale=1.0):
        start = self.end if at is None else int(at[0])
        self.k.narrow(2, start, k.shape[2]).copy_(k)
        self.v.narrow(2, start, k.shape[2]).copy_(v)
        self.end = start + k.shape[2]
        return self.k, self.v


class Converts(nn.Module):
    """Buffers in bfloat16, results in the dtype of what was given."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k", zeros(dtype=torch.bfloat16), persistent=False)
        self.register_buffer("v", zeros(dtype=torch.bfloat16), persistent=False)

    def update(self, k, v, pos):
        self.k[:, :, pos] = k.to(self.k.dtype)
        self.v[:, :, pos] = v.to(self.v.dtype)
        return self.k.to(k.dtype), self.v.to(v.dtype)


def _optional(m: Any, k: Tensor, v: Tensor, start: int) -> Any:
    # A position now and then: the others follow.
    return m.update(k, v) if start % 3 else m.update(k, v, at=slots(start, k))


def _flip(k: Tensor) -> Tensor:
    return k.transpose(1, 2)


CACHES: dict[str, Case] = {
    "index assignment": Case(IndexAssignment, lambda m, k, v, n: m.update(slots(n, k), k, v)),
    "by keyword": Case(
        IndexAssignment, lambda m, k, v, n: m.update(v_val=v, k_val=k, input_pos=slots(n, k))
    ),
    "renamed": Case(Renamed, lambda m, k, v, n: m.exchange(k, v, c=slots(n, k)), keys_first=False),
    "counts inside": Case(CountsInside, lambda m, k, v, n: m(k, v), whole=False),
    "tokens first": Case(
        TokensFirst, lambda m, k, v, n: m.put(n, _flip(k), _flip(v)), heads_first=False, whole=False
    ),
    "transposes": Case(Transposes, lambda m, k, v, n: m(_flip(k), _flip(v), n), heads_first=False),
    "may count": Case(MayCount, _optional),
    "int32 positions": Case(IndexAssignment, lambda m, k, v, n: m.update(slots(n, k).int(), k, v)),
}


class Window(IndexAssignment):
    def update(self, input_pos, k_val, v_val):
        return super().update(input_pos % T, k_val, v_val)


class Shifts(IndexAssignment):
    def update(self, k, v):
        self.k_cache = torch.cat([self.k_cache, k], 2)[:, :, -T:]
        self.v_cache = torch.cat([self.v_cache, v], 2)[:, :, -T:]
        return self.k_cache, self.v_cache


class Rounds(IndexAssignment):
    def update(self, input_pos, k_val, v_val):
        return super().update(input_pos, k_val.round(), v_val)


class KeysTwice(IndexAssignment):
    def update(self, input_pos, k_val, v_val):
        return super().update(input_pos, k_val, k_val)


class ReturnsTheNew(IndexAssignment):
    def update(self, input_pos, k_val, v_val):
        super().update(input_pos, k_val, v_val)
        return k_val, v_val


class Adds(IndexAssignment):
    """Right as long as the buffers are 0."""

    def update(self, input_pos, k_val, v_val):
        self.k_cache.index_add_(2, input_pos, k_val)
        self.v_cache.index_add_(2, input_pos, v_val)
        return self.k_cache, self.v_cache


class LooksAtWidth(CountsInside):
    def forward(self, k, v):
        assert k.shape[-1] > 1
        return super().forward(k, v)


class InForward(nn.Module):
    """Attention that writes its buffers itself, in the middle of other work."""

    def __init__(self) -> None:
        super().__init__()
        self.kv = nn.Linear(H * D, 2 * H * D)
        self.cache_k, self.cache_v = zeros(B, T, H, D), zeros(B, T, H, D)

    def forward(self, x, start):
        k, v = self.kv(x).unflatten(-1, (2 * H, D)).chunk(2, 2)
        self.cache_k[:, start : start + x.shape[1]] = k
        self.cache_v[:, start : start + x.shape[1]] = v
        return self.cache_k.sum() + self.cache_v.sum()


class AngleTables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(T), torch.ones(D))[None, None]
        self.register_buffer("cos_cached", angles.cos(), persistent=False)
        self.register_buffer("sin_cached", angles.sin(), persistent=False)

    def forward(self, x, length):
        return self.cos_cached[:, :, :length], self.sin_cached[:, :, :length]
