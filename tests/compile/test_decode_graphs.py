"""One graph for all positions, no breaks, the same answers: `torch.compile` of a patched model.

Inductor where numbers are compared; where only graphs are counted, a backend that compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache

import kvarn_ops
from tiny_models import patched, random_ids, run, small_cache, teacher_forced, tiny_model

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

PRESET = "k8v8_g32"  # compiles faster than fewer bits; the default has its own test
PROMPTS = (20, 45, 70)


def graphs() -> int:
    """Graphs compiled since the last `start_counting`."""
    return counters["stats"]["unique_graphs"]


def start_counting() -> None:
    torch.compiler.reset()
    counters.clear()


def graph_breaks() -> dict[str, int]:
    return dict(counters["graph_break"])


def assert_codes_agree(cache: Any, other: Any, limit: float) -> None:
    """Bytes of live tiles are equal, but for rounding ties."""
    different = total = 0
    for one, two in zip(cache.layers, other.layers, strict=True):
        assert torch.equal(one.tiles.seq_lens, two.tiles.seq_lens)
        live = one.config.num_tiles(int(one.tiles.seq_lens.max()))
        for name in ("k_codes", "v_codes"):
            a, b = getattr(one.tiles, name)[:, :, :live], getattr(two.tiles, name)[:, :, :live]
            different, total = different + int((a != b).sum()), total + a.numel()
    assert total
    assert different <= limit * total, f"{different} of {total} bytes of codes differ"


def test_one_graph_for_all_positions_and_prompts() -> None:
    model = patched(num_sink_tokens=32)
    start_counting()
    step = torch.compile(model, fullgraph=True)
    for index, prompt in enumerate(PROMPTS):
        length = prompt + (140 if index == 0 else 40)
        ids = random_ids(2, length, seed=index)
        caches = [small_cache(model, 256, PRESET, num_sink_tokens=32) for _ in range(2)]
        found = teacher_forced(model, ids, caches[0], prompt, step)
        wanted = teacher_forced(model, ids, caches[1], prompt)
        error = (found - wanted).abs().amax((0, 2))
        first_tile = 64  # its last token still attends to dense tokens only
        assert error[:first_tile].max() < 1e-4, f"prompt {prompt}: {error[:first_tile].max()}"
        assert error.max() < 1e-2, f"prompt {prompt}: {error.max()} at {int(error.argmax())}"
        assert_codes_agree(*caches, limit=1e-3)
        assert graphs() == 1, f"recompiled while decoding after a prompt of {prompt}"
    assert not graph_breaks()
    assert "step_" in str(kvarn_ops.explain(model).graph_ops) or "append_" in str(
        kvarn_ops.explain(model).graph_ops
    ), "explain() saw no op of ours in the compiled graph"


def test_the_default_config_over_a_tile_boundary() -> None:
    model = patched(preset="k4v2_g128", num_sink_tokens=128)
    start_counting()
    step = torch.compile(model, fullgraph=True)
    ids = random_ids(1, 340)
    caches = [kvarn_ops.KVarNCache(model.config, 340) for _ in range(2)]
    found = teacher_forced(model, ids, caches[0], 200, step)
    wanted = teacher_forced(model, ids, caches[1], 200)
    error = (found - wanted).abs().amax((0, 2))
    assert error[:256].max() < 1e-4
    assert error.max() < 1e-2
    assert_codes_agree(*caches, limit=1e-3)
    assert graphs() == 1
    assert not graph_breaks()


def graphs_of_a_loop(model: Any, make_cache: Callable[[int], Any]) -> list[int]:
    """Graphs compiled so far after each of three prompts with caches of growing capacity."""
    start_counting()
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = []
    for index, prompt in enumerate(PROMPTS):
        ids = random_ids(1, prompt + (80 if index == 0 else 10))
        teacher_forced(model, ids, make_cache(ids.shape[1] + 100 * index), prompt, step)
        found.append(graphs())
    return found


def test_no_recompile_beyond_those_of_a_static_cache() -> None:
    dense = tiny_model()
    stock = graphs_of_a_loop(
        dense, lambda length: StaticCache(config=dense.config, max_cache_len=length)
    )
    model = patched(num_sink_tokens=32)
    ours = graphs_of_a_loop(
        model, lambda length: small_cache(model, length, PRESET, num_sink_tokens=32)
    )
    assert ours[0] == 1, "recompiled within one sequence"
    assert all(one <= other for one, other in zip(ours, stock, strict=True)), (ours, stock)


def test_sliding_layers_compile_as_before() -> None:
    def count(model: Any, make_cache: Callable[[], Any]) -> int:
        start_counting()
        step = torch.compile(model, fullgraph=True, backend="eager")
        teacher_forced(model, random_ids(1, 90), make_cache(), 40, step)
        return graphs()

    dense = tiny_model("gemma3_text")
    model = kvarn_ops.patch(tiny_model("gemma3_text"), "k8v8_g32", num_sink_tokens=8)
    stock = count(dense, lambda: StaticCache(config=dense.config, max_cache_len=128))
    assert count(model, lambda: small_cache(model, 128)) <= stock


# Entry points. The README says which of them compile `generate`; this is where it is measured.

ENTRY_POINTS = {
    "torch.compile(model)": False,
    "model.compile()": True,
    "model.forward = torch.compile(model.forward)": True,
    "generate(compile_config=)": True,
}


def compile_by(entry: str, model: Any, backend: str) -> tuple[Any, dict[str, Any]]:
    """The model to call and extra arguments of `generate`."""
    options = {"fullgraph": True, "backend": backend}
    if entry == "torch.compile(model)":
        return torch.compile(model, **options), {}
    if entry == "model.compile()":
        model.compile(**options)
    elif entry.startswith("model.forward"):
        model.forward = torch.compile(model.forward, **options)
    else:
        config = CompileConfig(fullgraph=True, backend=backend, mode=None)
        config._compile_all_devices = True
        return model, {"compile_config": config}
    return model, {}


def texts_and_graphs(
    entry: str, model: Any, more: dict[str, Any]
) -> tuple[list[Tensor], list[int]]:
    start_counting()
    compiled, options = compile_by(entry, model, "eager")
    texts, counts = [], []
    for index, prompt in enumerate(PROMPTS):
        ids = random_ids(1, prompt, seed=index)
        texts.append(compiled.generate(ids, max_new_tokens=60, do_sample=False, **options, **more))
        counts.append(graphs())
    return texts, counts


@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_entry_points(entry: str) -> None:
    eager = patched(num_sink_tokens=32)
    wanted = [
        eager.generate(random_ids(1, prompt, seed=index), max_new_tokens=60, do_sample=False)
        for index, prompt in enumerate(PROMPTS)
    ]
    texts, counts = texts_and_graphs(entry, patched(num_sink_tokens=32), {})
    for found, other in zip(texts, wanted, strict=True):
        assert torch.equal(found, other)
    assert (counts[-1] > 0) == ENTRY_POINTS[entry], f"graphs compiled: {counts}"
    assert not graph_breaks()
    if ENTRY_POINTS[entry]:
        more = {"cache_implementation": "static"}
        _, stock = texts_and_graphs(entry, tiny_model(), more)
        assert all(one <= other for one, other in zip(counts, stock, strict=True)), (counts, stock)


def test_a_compiled_step_refuses_to_overflow() -> None:
    model = patched(num_sink_tokens=32)
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    cache = small_cache(model, 96, PRESET, num_sink_tokens=32)
    run(model, random_ids(1, 90), cache)
    room = cache.layers[0].tiles.k_codes.shape[2] * 32 + 32 + 31

    def decode(steps: int) -> None:
        with torch.no_grad():
            for _ in range(steps):
                step(random_ids(1, 1), past_key_values=cache, use_cache=True)

    decode(room - 90)
    with pytest.raises(kvarn_ops.CacheError, match="max_cache_len"):
        decode(1)


def test_a_patch_after_a_compiled_call_is_honoured() -> None:
    model = tiny_model()
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = random_ids(1, 100)
    stock = StaticCache(config=model.config, max_cache_len=128)
    teacher_forced(model, ids[:, :30], stock, 20, step)
    kvarn_ops.patch(step, "k8v8_g32", num_sink_tokens=8)
    cache, eager = small_cache(model), small_cache(model)
    found = teacher_forced(model, ids, cache, 20, step)
    assert (found - teacher_forced(model, ids, eager, 20)).abs().max() < 1e-2
    kvarn_ops.unpatch(step)
    with torch.no_grad(), pytest.raises(kvarn_ops.CacheError, match="not patched"):
        model(ids[:, :1], past_key_values=cache)
