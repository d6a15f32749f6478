"""A patched model whose layers run kernels."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import kvarn_ops
from kvarn_ops.errors import BackendError
from tiny_models import random_ids, tiny_model


def test_model_with_kernels_computes_what_it_computes_without(device: torch.device) -> None:
    """A prompt, steps of one token across the end of a tile, and a draft of several."""
    ids = random_ids(1, 48).to(device)
    logits = {}
    for backend in ("aten", "triton"):
        torch.manual_seed(0)
        model = tiny_model().to(device)
        kvarn_ops.patch(model, "k8v8_g32", num_sink_tokens=8, backend=backend)
        assert kvarn_ops.explain(model).backend == backend
        cache = kvarn_ops.KVarNCache(
            model.config, 64, "k8v8_g32", num_sink_tokens=8, backend=backend, device=device
        )
        parts = []
        with torch.no_grad():
            for part in (ids[:, :38], *ids[:, 38:42].split(1, dim=1), ids[:, 42:]):
                parts.append(model(part, past_key_values=cache, use_cache=True).logits)
        assert cache.layers[0].tiles.seq_lens.tolist() == [48]
        logits[backend] = torch.cat(parts, dim=1)
    torch.testing.assert_close(logits["triton"], logits["aten"], rtol=1e-2, atol=1e-2)


def test_offloaded_tiles_are_not_read_by_kernels(device: torch.device) -> None:
    model = tiny_model()
    make = partial(kvarn_ops.KVarNCache, model.config, 64, device=device, offload_tiles=True)
    assert make().layers[0].backend == "aten"
    with pytest.raises(BackendError, match="offloaded"):
        make(backend="triton")


def test_cache_made_for_kernels_works_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there is a GPU and the model is not on it; `device` was not given."""
    model = kvarn_ops.patch(tiny_model(), "k8v8_g32", backend="aten")
    cache = kvarn_ops.KVarNCache(model.config, 64, "k8v8_g32", backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with torch.no_grad():
        model(random_ids(1, 5), past_key_values=cache)
    assert cache.layers[0].backend == "aten"
