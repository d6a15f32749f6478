"""Find the linear layers around a cache by what they do, in one trial run of the model.

Every linear layer of an attention module is made to give numbers that say which feature of which
layer they are, and so is the attention function. What arrives as values, and what a linear layer
is given after attention, then says where each number came from. If anything but a rearrangement
lies between (a norm, a gate, a clamp, an adapter, repeated heads), the numbers are not those, and
nothing is found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["Wiring", "eager_eval", "find_wirings"]

_NAME = "kvarn_fold_probe"
_BASE = 128  # digits and marks are exact in every floating dtype
_TOKENS = 5  # three digits of a feature's number, the layer's mark, a magnitude
_ATTENTION_MARK = _BASE - 1


class Wiring(NamedTuple):
    """Where an attention module's values come from and where its output goes."""

    values: nn.Linear
    value_rows: Tensor  # [H_kv, D] int64, features that `values` writes
    output: nn.Linear
    output_columns: Tensor  # [H_q, D] int64, features that `output` reads


class _Seen:
    """What one attention module did in the trial run."""

    def __init__(self, linears: list[nn.Linear]) -> None:
        self.linears = linears
        self.calls = [0] * len(linears)
        self.inputs: list[Tensor | None] = [None] * len(linears)
        self.value: Tensor | None = None
        self.query_heads = 0

    def hook(self, mark: int) -> Callable[..., Tensor | None]:
        """Forward hook of the linear layer with this mark."""

        def forward_hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> Tensor | None:
            self.calls[mark] += 1
            if not (args and isinstance(args[0], Tensor) and isinstance(out, Tensor)):
                return None
            if out.numel() != _TOKENS * out.shape[-1]:
                return None
            self.inputs[mark] = args[0].detach().reshape(_TOKENS, -1)
            return _marks(out.shape[-1], mark, out).reshape(out.shape)

        return forward_hook


def find_wirings(
    model: nn.Module, modules: list[nn.Module], configs: list[Any], forward: Callable[[int], Any]
) -> list[Wiring | str]:
    """For each attention module its wiring, or half a sentence about why there is none.

    Parameters
    ----------
    model : nn.Module
        The model that `forward(n)` runs on n tokens, without a cache.
    modules : list
        Attention modules that call attention through transformers' interface.
    configs : list
        The config objects in which the modules read the name of their attention function.
    """
    seen = {id(module): _Seen(_linears(module)) for module in modules}
    with ExitStack() as stack:
        stack.enter_context(_attention_replaced(configs, seen))
        for state in seen.values():
            for mark, linear in enumerate(state.linears[: _ATTENTION_MARK - 1]):
                handle = linear.register_forward_hook(state.hook(mark))
                stack.callback(handle.remove)
        forward(_TOKENS)
    return [_wiring(seen[id(module)]) for module in modules]


@contextmanager
def eager_eval(model: nn.Module) -> Iterator[None]:
    """Run a model as it would infer, whatever its modes are, and without compiling it."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


@contextmanager
def _attention_replaced(configs: list[Any], seen: dict[int, _Seen]) -> Iterator[None]:
    before = [config._attn_implementation for config in configs]

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        batch, heads, count, head_dim = query.shape
        state = seen.get(id(module))
        if state is None or count != _TOKENS:
            return query.transpose(1, 2).contiguous(), None
        state.value, state.query_heads = value.detach(), heads
        marks = _marks(heads * head_dim, _ATTENTION_MARK, query)
        return marks.reshape(batch, count, heads, head_dim), None

    ALL_ATTENTION_FUNCTIONS[_NAME] = attention
    ALL_MASK_ATTENTION_FUNCTIONS[_NAME] = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    try:
        for config in configs:
            config._attn_implementation = _NAME
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
        del ALL_ATTENTION_FUNCTIONS[_NAME], ALL_MASK_ATTENTION_FUNCTIONS[_NAME]


def _marks(count: int, mark: int, like: Tensor) -> Tensor:
    """`[tokens, count]`: digits of 0..count-1, the layer's mark, and magnitudes of both signs."""
    number = torch.arange(count, device=like.device)
    digits = [number % _BASE, number // _BASE % _BASE, number // _BASE**2]
    size = torch.exp2((number * 7 % 25 - 10).float()) * (1 - 2 * (number % 2))
    return torch.stack([*digits, torch.full_like(number, mark), size]).to(like.dtype)


def _numbers(x: Tensor, mark: int, count: int) -> Tensor | None:
    """Of which feature each column of `x` `[tokens, n]` is, if each is one of `_marks`."""
    digits = x[:3].double()
    number = (digits[0] + digits[1] * _BASE + digits[2] * _BASE**2).nan_to_num(-1)
    number = number.clamp(0, count - 1).long()
    if not torch.equal(_marks(count, mark, x)[:, number], x):
        return None
    return number if number.unique().numel() == number.numel() else None


def _wiring(seen: _Seen) -> Wiring | str:
    if seen.value is None:
        return "its attention was not reached in a trial run"
    if max(seen.calls, default=0) > 1:
        return "one of its linear layers is used more than once, or by other modules too"
    batch, _, count, head_dim = seen.value.shape
    if batch != 1 or count != _TOKENS:
        return "its values are not one vector per token and head"
    value = seen.value[0].movedim(1, 0).reshape(_TOKENS, -1)
    mark = int(value[3, 0].nan_to_num(-1))
    rows = None
    if 0 <= mark < len(seen.linears):
        rows = _numbers(value, mark, seen.linears[mark].out_features)
    if rows is None:
        return "what reaches the cache as values is not the output of one linear layer, rearranged"
    width = seen.query_heads * head_dim
    readers = [
        (linear, x)
        for linear, x in zip(seen.linears, seen.inputs, strict=True)
        if x is not None and (x[3] == _ATTENTION_MARK).any()
    ]
    numbers = None
    if len(readers) == 1 and readers[0][1].shape[1] == width:
        numbers = _numbers(readers[0][1], _ATTENTION_MARK, width)
    if numbers is None:
        return (
            "what one linear layer reads after attention is not attention's output, rearranged "
            "(a gate or a norm may lie between)"
        )
    shape = (-1, head_dim)
    return Wiring(
        seen.linears[mark],
        rows.cpu().reshape(shape),
        readers[0][0],
        numbers.argsort().cpu().reshape(shape),
    )
