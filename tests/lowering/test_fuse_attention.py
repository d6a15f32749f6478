"""`FuseAttention`: every form of attention that is rewritten, and those that must not be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kvarn_ops import KVCache
from kvarn_ops.config import KVarNConfig
from kvarn_ops.lowering import record
from kvarn_ops.lowering.fuse_attention import FuseAttention
from tests.lowering import forms

B, H, Q, D, T, LENGTH = 2, 2, 6, 32, 200, 150
CONFIG = KVarNConfig(group_size=32, num_sink_tokens=32)


class Attention(nn.Module):
    """Appends, reads everything back, attends."""

    def __init__(self, form: Callable[..., Tensor]) -> None:
        super().__init__()
        self.cache = KVCache(B, H, D, T, CONFIG)
        self.form = form
        self.register_buffer("causal", torch.ones(T, T, dtype=torch.bool).tril())

    def forward(self, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor) -> Tensor:
        k, v = self.cache.update(k, v, input_pos=input_pos)
        return self.form(q, k, v, self.causal[None, None, input_pos])


class Rewriting:
    """A compiler that runs the pass on Dynamo's graph, and the graph as it is then."""

    def __init__(self) -> None:
        self.rewrites = 0
        self.before: Counter[str] = Counter()
        self.after: Counter[str] = Counter()

    def __call__(self, module: torch.fx.GraphModule, inputs: list) -> Callable:
        self.before = kvarn_ops_in(module.graph)
        self.rewrites = FuseAttention()(module.graph)
        self.after = kvarn_ops_in(module.graph)
        module.recompile()
        return module.forward


def kvarn_ops_in(graph: torch.fx.Graph) -> Counter[str]:
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    return Counter(name.split(".")[1] for name in names if name.startswith("kvarn."))


def run(form: Callable[..., Tensor], count: int) -> tuple[Tensor, Tensor, Rewriting]:
    """What eager code and rewritten code give."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, B, H, LENGTH + count, D, generator=generator)
    q = torch.randn(B, Q, count, D, generator=generator)
    last, results = torch.arange(LENGTH, LENGTH + count), []
    backend = Rewriting()
    for compiled in (False, True):
        module = Attention(form).eval()
        module.cache.append(k[:, :, :LENGTH], v[:, :, :LENGTH], input_pos=torch.arange(LENGTH))
        call = torch.compile(module, backend=backend, fullgraph=True) if compiled else module
        with torch.no_grad():
            torch.manual_seed(1)  # dropout
            results.append(call(q, k[:, :, LENGTH:], v[:, :, LENGTH:], last))
    return results[0], results[1], backend


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("name", forms.FUSED)
def test_form_is_rewritten_and_keeps_its_numbers(name: str, count: int) -> None:
    wanted, got, backend = run(forms.FUSED[name], count)
    assert backend.before == {"append_at_": 1, "dequantize": 1}
    assert (backend.rewrites, backend.after) == (1, {"append_at_": 1, "attention": 1})
    tolerance = 2e-2 if name == "casts" else 1e-4
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    assert got.stride() == wanted.stride()


@pytest.mark.parametrize("form", forms.REFUSED, ids=lambda form: form.__name__)
def test_near_miss_is_left_alone_and_reported(form: Callable[..., Tensor]) -> None:
    with record.recording("test") as found:
        wanted, got, backend = run(form, 5)
    assert (backend.rewrites, backend.after) == (0, backend.before)
    torch.testing.assert_close(got, wanted)
    reasons = [refusal.reason for refusal in found.refusals]
    assert reasons, "nothing was reported"
    assert any(forms.REFUSED[form] in reason for reason in reasons), reasons


def test_a_cache_that_changes_before_it_is_read_is_left_alone() -> None:
    class Late(Attention):
        def forward(self, q, k, v, input_pos):
            k_hat, v_hat = self.cache.update(k, v, input_pos=input_pos)
            self.cache.append(k, v, input_pos=input_pos + k.shape[2])
            return self.form(q, k_hat, v_hat, self.causal[None, None, input_pos])

    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, B, H, 3, D, generator=generator)
    q = torch.randn(B, Q, 3, D, generator=generator)
    backend = Rewriting()
    torch._dynamo.reset()
    wanted = Late(forms.enable_gqa)(q, k, v, torch.arange(3))
    got = torch.compile(Late(forms.enable_gqa), backend=backend)(q, k, v, torch.arange(3))
    torch.testing.assert_close(got, wanted)
    assert backend.rewrites == 0


def test_graphs_without_a_cache_are_left_at_once() -> None:
    backend = Rewriting()
    q, k, v = torch.randn(3, B, H, 5, D)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    torch._dynamo.reset()
    torch.compile(forms.enable_gqa, backend=backend)(q, k, v, mask)
    assert backend.rewrites == 0


def test_what_else_the_graph_changes_in_place_stays() -> None:
    class Counting(Attention):
        def __init__(self) -> None:
            super().__init__(forms.enable_gqa)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, q, k, v, input_pos):
            self.calls.add_(1)
            return super().forward(q, k, v, input_pos)

    module, backend = Counting(), Rewriting()
    torch._dynamo.reset()
    step = torch.compile(module, backend=backend, fullgraph=True)
    for place in range(3):
        q, k, v = torch.randn(B, Q, 1, D), torch.randn(B, H, 1, D), torch.randn(B, H, 1, D)
        step(q, k, v, torch.tensor([place]))
    assert backend.rewrites == 1
    assert module.calls.item() == 3
    assert module.cache.seq_lens.tolist() == [3, 3]
