"""`export_program`: a patched model exported, saved, and run in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kvarn_ops
from fresh_process import run_python
from kvarn_ops.export import export_program
from tiny_models import patched, random_ids, run, small_cache, teacher_forced, tiny_model

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gpt2", "gemma2", "gemma3_text"]
WITH_WINDOWS = {"gemma2", "gemma3_text"}  # attended in another order: codes may differ at ties
LENGTH, PREFILL = 300, 40

STEPS = """
import torch, kvarn_ops
folder, prefill = {folder!r}, {prefill}
step = torch.export.load(folder + "/model.pt2").module()
ids = torch.load(folder + "/ids.pt")
with torch.no_grad():
    logits = [step(ids[:, :prefill])]
    logits += [step(ids[:, i : i + 1]) for i in range(prefill, ids.shape[1])]
torch.save(torch.cat(logits, 1), folder + "/logits.pt")
print("done")
"""


@pytest.mark.export
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_program_steps_in_a_fresh_process_as_the_model_does(
    family: str, tmp_path: Path
) -> None:
    model = patched(family, "k4v2_g32")
    ids = random_ids(2, LENGTH)
    wanted = teacher_forced(model, ids, small_cache(model, LENGTH, "k4v2_g32"), PREFILL)
    program = export_program(model, max_cache_len=LENGTH, batch_size=2, dynamic=64)
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save(ids, tmp_path / "ids.pt")
    root = Path(kvarn_ops.__file__).parents[1]
    code = STEPS.format(folder=str(tmp_path), prefill=PREFILL)
    assert run_python(code, cwd=tmp_path, path=root) == "done"
    got = torch.load(tmp_path / "logits.pt")
    exact = 8 + 32 if family in WITH_WINDOWS else LENGTH  # up to there nothing is rounded
    torch.testing.assert_close(got[:, :exact], wanted[:, :exact], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.export
def test_program_starts_empty_and_holds_no_dense_cache() -> None:
    model = patched("llama", "k4v2_g32")
    cache = small_cache(model, 256, "k4v2_g32")
    run(model, random_ids(1, 200), cache)  # used before
    program = export_program(model, max_cache_len=256, dynamic=64)
    buffers = dict(program.named_buffers())
    state = {name: x for name, x in buffers.items() if "past_" in name}
    assert state
    assert not any(bool(x.any()) for x in state.values()), "the state is not empty"
    config = model.config
    heads, width = config.num_key_value_heads, config.head_dim
    dense = heads * 256 * width
    assert all(x.numel() < dense for x in state.values() if x.is_floating_point())
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert names.count("kvarn.step_.default") == config.num_hidden_layers
    assert not any("scaled_dot_product" in name for name in names)


@pytest.mark.export
def test_decode_only_program_takes_one_token() -> None:
    model = patched("llama", "k4v2_g32")
    step = export_program(model, max_cache_len=64, dynamic=False).module()
    ids = random_ids(1, 3)
    cache = small_cache(model, 64, "k4v2_g32")
    for index in range(3):
        token = ids[:, index : index + 1]
        with torch.no_grad():
            torch.testing.assert_close(step(token), run(model, token, cache))


@pytest.mark.export
@pytest.mark.parametrize(
    ("make", "options", "error", "says"),
    [
        (tiny_model, {}, kvarn_ops.UnsupportedModelError, "patch"),
        (lambda: patched("mistral_sliding"), {}, kvarn_ops.UnsupportedModelError, "is packed"),
        (lambda: patched().train(), {}, kvarn_ops.InputError, "eval"),
        (patched, {"batch_size": 0}, kvarn_ops.InputError, "batch_size"),
        (patched, {"dynamic": 65}, kvarn_ops.InputError, "max_cache_len"),
        (patched, {"max_cache_len": 0}, kvarn_ops.InputError, "max_cache_len"),
    ],
)
def test_impossible_exports_say_what_to_do(make, options, error, says) -> None:
    with pytest.raises(error, match=says):
        export_program(make(), **({"max_cache_len": 64} | options))
