"""Head repeats are told by the axes of a chain, and agree with what the chain does to real data."""

import random

import pytest
import torch
from torch import Tensor, nn

from kvarn_ops.lowering.axes import value_of
from kvarn_ops.lowering.head_repeat import HeadRepeat, is_head_repeat

B, H, T, D = 2, 3, 8, 4


def _graph(function, *examples, dynamic=None):
    class Module(nn.Module):
        def forward(self, *args):
            return function(*args)

    shapes = None if dynamic is None else (tuple(dynamic),)
    return torch.export.export(Module(), examples, dynamic_shapes=shapes).graph


def _is_input(node):
    return node.op == "placeholder"


def _found(function, shape=(B, H, T, D), dynamic=None, **kwargs):
    graph = _graph(function, torch.zeros(shape), dynamic=dynamic)
    return is_head_repeat(graph.output_node().args[0][0], _is_input, **kwargs)


def _repeat_kv(x: Tensor, times: int) -> Tensor:
    b, h, t, d = x.shape
    return x[:, :, None, :, :].expand(b, h, times, t, d).reshape(b, h * times, t, d)


REPEATS = {
    "expand": lambda x: _repeat_kv(x, 4),
    "interleave": lambda x: x.repeat_interleave(4, dim=1),
    "negative dim": lambda x: torch.repeat_interleave(x, 4, -3),
    "token-major": lambda x: x.transpose(1, 2).repeat_interleave(4, dim=2).transpose(1, 2),
    "casts": lambda x: _repeat_kv(x.half(), 4).float().contiguous(),
    "stepwise": lambda x: x.repeat_interleave(2, 1).repeat_interleave(2, 1),
    "repeat behind": lambda x: x.unsqueeze(2).repeat(1, 1, 4, 1, 1).flatten(1, 2),
}
OTHERS = {
    "tiled": lambda x: x.repeat(1, 4, 1, 1),
    "expanded in front": lambda x: x[:, None].expand(B, 4, H, T, D).reshape(B, 4 * H, T, D),
    "tokens mixed in": lambda x: _repeat_kv(x, 4).transpose(1, 2).reshape(B, H * 4, T, D),
    "tokens repeated": lambda x: x.repeat_interleave(4, dim=2),
    "last tokens": lambda x: _repeat_kv(x[:, :, 1:], 4),
    "every other token": lambda x: _repeat_kv(x[:, :, ::2], 4),
    "fewer channels": lambda x: _repeat_kv(x[..., :2], 4),
    "fewer heads": lambda x: _repeat_kv(x[:, :2], 4),
    "one head": lambda x: x[:, :1].expand(B, 4, T, D),
    "rows swapped in": lambda x: x.transpose(0, 1).reshape(B, H, T, D),
}


@pytest.mark.parametrize("form", REPEATS)
def test_the_usual_forms_are_recognised(form):
    found = _found(REPEATS[form])
    assert isinstance(found, HeadRepeat), found
    assert (found.times, found.length, found.root.op) == (4, T, "placeholder")


@pytest.mark.parametrize("form", OTHERS)
def test_near_misses_are_refused_with_a_reason(form):
    found = _found(OTHERS[form])
    assert isinstance(found, str)
    assert any(word in found for word in ("order", "tokens", "axis", "between", "axes"))


def test_a_prefix_of_the_tokens_is_named():
    found = _found(lambda x: _repeat_kv(x[:, :, :5], 4))
    assert (found.times, found.length) == (4, 5)


def test_no_repeat_is_one_time():
    assert _found(lambda x: x.transpose(1, 2).transpose(1, 2)).times == 1


def test_another_layout_of_the_cache():
    def read(x):
        return x.transpose(1, 2).repeat_interleave(2, 1)

    assert _found(read, (B, T, H, D), layout=(0, 2, 1, 3)).times == 2
    assert isinstance(_found(read, (B, T, H, D)), str)


def test_arithmetic_in_between_is_no_view():
    assert "between" in _found(lambda x: _repeat_kv(x * 2, 4))


def test_unknown_sizes():
    batch = length = torch.export.Dim.AUTO  # torch 2.11 cannot prove a guard on a named one
    found = _found(lambda x: _repeat_kv(x, 4), dynamic=[{0: batch, 2: length}])
    assert found.times == 4
    tiled = _found(
        lambda x: x[:, None].expand(-1, 4, -1, -1, -1).flatten(1, 2),
        dynamic=[{0: batch, 2: length}],
    )
    assert "order" in tiled


def _random_chain(rng: random.Random):
    """A function of random views of a `[B, H, T, D]`, which ends with four axes."""
    steps = []
    for _ in range(rng.randrange(1, 5)):
        kind = rng.choice(("swap", "interleave", "tile", "expand", "merge", "slice", "cast"))
        dims = rng.sample(range(4), 2)
        steps.append((kind, dims, rng.choice((1, 2, 3))))

    def run(x: Tensor) -> Tensor:
        for kind, (one, other), n in steps:
            if kind == "swap":
                x = x.transpose(one, other)
            elif kind == "interleave":
                x = x.repeat_interleave(n, one)
            elif kind == "tile":
                x = x.repeat(*(n if axis == one else 1 for axis in range(4)))
            elif kind == "expand":
                shape = list(x.shape)
                shape[one] *= n
                x = (
                    x.unsqueeze(one + 1)
                    .expand(*x.shape[: one + 1], n, *x.shape[one + 1 :])
                    .reshape(shape)
                )
            elif kind == "merge":
                low = min(one, 2)
                shape = list(x.shape)
                shape[low], shape[low + 1] = shape[low + 1], shape[low]
                x = x.flatten(low, low + 1).reshape(shape)
            elif kind == "slice":
                x = x[:, :, : max(1, x.shape[2] - n)]
            else:
                x = x.double()
        return x

    return run


def test_agrees_with_real_data_on_random_chains():
    """What is claimed holds, and what holds is found."""
    rng, claims = random.Random(0), 0
    data = torch.arange(B * H * T * D, dtype=torch.float64).view(B, H, T, D)
    for _ in range(150):
        chain = _random_chain(rng)
        graph = _graph(chain, torch.zeros(B, H, T, D))
        operand = graph.output_node().args[0][0]
        found, real = is_head_repeat(operand, _is_input), chain(data)
        times, length = real.shape[1] // H, real.shape[2]
        fits = real.shape[0] == B and real.shape[3] == D and real.shape[1] % H == 0
        same = (
            fits
            and times > 0
            and length <= T
            and torch.equal(real, data[:, :, :length].repeat_interleave(times, 1))
        )
        assert isinstance(found, HeadRepeat) == bool(same), (found, [n.name for n in graph.nodes])
        if same:
            claims += 1
            assert (found.times, found.length) == (times, length)
    assert claims > 15


def test_graphs_of_dynamo_have_methods_and_functions():
    """Before AOTAutograd the same chain is written in `call_method` and `getitem`."""
    graphs = []

    def backend(module, _):
        graphs.append(module.graph)
        return module.forward

    torch.compile(lambda x: (_repeat_kv(x, 4), x.repeat(1, 4, 1, 1)), backend=backend)(
        torch.zeros(B, H, T, D)
    )
    good, bad = graphs[0].output_node().args[0]
    assert value_of(good) is not None
    assert is_head_repeat(good, _is_input).times == 4
    assert "order" in is_head_repeat(bad, _is_input)
