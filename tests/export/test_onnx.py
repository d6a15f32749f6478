"""`to_onnx`: what the file promises, and what onnxruntime computes from it beside eager mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kvarn_ops
from fresh_process import BLOCKER, run_python
from kvarn_ops.layout import TileCache
from tiny_models import padded, patched, random_ids, run, small_cache, teacher_forced, tiny_model

onnx = pytest.importorskip("onnx", reason="extra 'onnx'")
onnxruntime = pytest.importorskip("onnxruntime", reason="extra 'onnx'")
pytest.importorskip("onnxscript", reason="extra 'onnx'")
from kvarn_ops.export import to_onnx  # noqa: E402

pytestmark = pytest.mark.export

PRESET, LAYERS, ROOM, CHUNK = "k4v2_g32", 2, 460, 80
DTYPES = {"uint8": np.uint8, "int64": np.int64, "float16": np.float16, "float": np.float32}

# Nothing but onnxruntime and numpy: chunks, then a token at a time, cache handed on.
STEPS = """
import numpy as np, onnxruntime, sys
session = onnxruntime.InferenceSession("model.onnx")
given = dict(np.load("given.npz"))
ids, mask, counts = given.pop("ids"), given.pop("mask"), given.pop("counts")
names = [value.name for value in session.get_outputs()]
past, logits, at = given, [], 0
for count in counts:
    new = {{"input_ids": ids[:, at : at + count], "attention_mask": mask[:, at : at + count]}}
    out = dict(zip(names, session.run(None, new | past)))
    logits.append(out.pop("logits"))
    past = {{name.replace("present.", "past."): x for name, x in out.items()}}
    at += count
assert not {{"torch", "kvarn_ops", "onnx"}} & set(sys.modules)
np.savez("made.npz", logits=np.concatenate(logits, 1), **past)
print("done")
"""


@pytest.fixture(scope="module")
def model() -> Any:
    return patched("llama", PRESET, num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def path(model, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("onnx") / "model.onnx"
    return to_onnx(model, target, max_cache_len=ROOM, chunk=CHUNK, attention_mask=True)


@pytest.fixture(scope="module")
def session(path) -> Any:
    return onnxruntime.InferenceSession(path)


def empty(session: Any, rows: int) -> dict[str, np.ndarray]:
    return {
        value.name: np.zeros([rows, *value.shape[1:]], DTYPES[value.type[7:-1]])
        for value in session.get_inputs()
        if value.name.startswith("past.")
    }


def in_fresh_process(path: Path, past: Any, ids: Tensor, counts: list[int]) -> dict[str, Any]:
    np.savez(
        path.parent / "given.npz", ids=ids.numpy(), mask=np.ones(ids.shape, np.int64),
        counts=np.array(counts), **past,
    )  # fmt: skip
    assert run_python(STEPS.format(), cwd=path.parent) == "done"
    return dict(np.load(path.parent / "made.npz"))


def called(session: Any, past: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Any]]:
    new = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    names = [value.name for value in session.get_outputs()]
    out = dict(zip(names, session.run(None, new | past), strict=True))
    logits = torch.from_numpy(out.pop("logits"))
    return logits, {name.replace("present.", "past."): x for name, x in out.items()}


def graphs(graph: Any) -> Any:
    """A graph and those in it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from graphs(attribute.g)


def test_file_holds_plain_operators_the_cache_and_what_it_is(path, session) -> None:
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 20)]
    assert not proto.functions
    found = list(graphs(proto.graph))
    assert len(found) == 1 + 2 * LAYERS, "tiles are encoded behind one condition per layer"
    assert {node.domain for graph in found for node in graph.node} == {""}

    fields = [f"{layer}.{name}" for layer in range(LAYERS) for name in TileCache._fields]
    inputs = {value.name: (value.type, value.shape) for value in session.get_inputs()}
    outputs = {value.name: (value.type, value.shape) for value in session.get_outputs()}
    assert list(inputs) == ["input_ids", *(f"past.{name}" for name in fields), "attention_mask"]
    assert list(outputs) == ["logits", *(f"present.{name}" for name in fields)]
    assert all(inputs[f"past.{name}"] == outputs[f"present.{name}"] for name in fields)
    assert inputs["input_ids"] == ("tensor(int64)", ["batch", "new_tokens"])
    assert outputs["logits"][1] == ["batch", "new_tokens", 96]

    about = session.get_modelmeta().custom_metadata_map
    expected = {"preset": PRESET, "group_size": "32", "num_sink_tokens": "8", "chunk": "80",
                "max_cache_len": "460", "version": kvarn_ops.__version__}  # fmt: skip
    assert expected.items() <= {k.removeprefix("kvarn_ops."): v for k, v in about.items()}.items()
    assert str(Path(kvarn_ops.__file__).parents[1]) not in path.read_bytes().decode("latin-1")


def test_steps_without_torch_give_the_logits_and_codes_of_eager_mode(path, session, model) -> None:
    """Two rows: chunks that finish two tiles, none and one, then 330 single tokens."""
    counts = [80, 5, 30] + [1] * 330
    length = sum(counts)
    ids = random_ids(2, length)
    cache = small_cache(model, ROOM, PRESET)
    logits = [run(model, part, cache) for part in ids.split(counts, 1)]
    made = in_fresh_process(path, empty(session, 2), ids, counts)
    got, wanted = torch.from_numpy(made.pop("logits")), torch.cat(logits, 1)
    torch.testing.assert_close(got[:, :80], wanted[:, :80], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-2)
    for layer, stored in enumerate(cache.layers):
        for name in ("k_codes", "v_codes"):
            codes, expected = made[f"past.{layer}.{name}"], getattr(stored.tiles, name).numpy()
            assert codes.any()
            assert (codes != expected).mean() <= 1e-4, f"{name} of layer {layer}"
        assert (made[f"past.{layer}.seq_lens"] == length).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_dropped_and_any_number_of_rows_goes(session, side: str) -> None:
    rows = [random_ids(1, n, seed=n)[0] for n in (70, 41, 3)]
    ids, mask, _ = padded(rows, side)
    together, past = called(session, empty(session, 3), ids, mask)
    assert past["past.0.seq_lens"].tolist() == [70, 41, 3]
    next_ids, ones = random_ids(3, 1), torch.ones(3, 1, dtype=torch.int64)
    following, _ = called(session, past, next_ids, ones)
    for index, row in enumerate(rows):
        new = torch.ones_like(row)[None]
        alone, own = called(session, empty(session, 1), row[None], new)
        real = together[index][mask[index].bool()]
        torch.testing.assert_close(real, alone[0], rtol=1e-4, atol=1e-4)
        one = slice(index, index + 1)
        after, _ = called(session, own, next_ids[one], ones[one])
        torch.testing.assert_close(following[one], after, rtol=1e-3, atol=1e-3)


def test_too_many_tokens_are_refused_or_marked(session) -> None:
    ids = random_ids(1, CHUNK + 1)
    with pytest.raises(Exception, match="at_most_80_new_tokens"):
        called(session, empty(session, 1), ids, torch.ones_like(ids))
    past = empty(session, 1)
    full = ROOM + 31  # the last unfinished tile has room
    for layer in range(LAYERS):
        past[f"past.{layer}.seq_lens"][:] = full
    token = random_ids(1, 1)
    logits, _ = called(session, past, token, torch.ones_like(token))
    assert logits.isnan().all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "preset", "opset", "chunk"),
    [("qwen2", "k3v2_g32", 18, 40), ("gpt2", "k8v8_g32", 23, 1), ("phi3", "k2v4_g32", 20, 32)],
)
def test_families_presets_and_opsets(family, preset, opset, chunk, tmp_path) -> None:
    one_layer = {
        "gpt2": {"n_layer": 1},
        "qwen2": {"num_hidden_layers": 1, "layer_types": ["full_attention"]},
    }
    model = patched(family, preset, **one_layer.get(family, {"num_hidden_layers": 1}))
    target = to_onnx(
        model, tmp_path / "m.onnx", max_cache_len=120, batch_size=1, chunk=chunk, opset=opset
    )
    session = onnxruntime.InferenceSession(target)
    assert onnx.load(target).opset_import[0].version == opset
    ids = random_ids(1, 110)
    wanted = teacher_forced(model, ids, small_cache(model, 120, preset), chunk)
    past, logits = empty(session, 1), []
    names = [value.name.replace("present.", "past.") for value in session.get_outputs()[1:]]
    for part in ids.split([chunk] + [1] * (110 - chunk), 1):
        out, *state = session.run(None, {"input_ids": part.numpy()} | past)
        past = dict(zip(names, state, strict=True))
        logits.append(torch.from_numpy(out))
    torch.testing.assert_close(torch.cat(logits, 1), wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("make", "options", "error", "says"),
    [
        (tiny_model, {}, kvarn_ops.UnsupportedModelError, "patch"),
        (patched, {"opset": 17}, kvarn_ops.InputError, "opset 18"),
        (patched, {"opset": 999}, kvarn_ops.InputError, "opset"),
        (patched, {"chunk": 0}, kvarn_ops.InputError, "chunk"),
        (patched, {"batch_size": 0}, kvarn_ops.InputError, "batch_size"),
        (patched, {"max_cache_len": 0}, kvarn_ops.InputError, "max_cache_len"),
    ],
)
def test_impossible_exports_say_what_to_do(make, options, error, says, tmp_path) -> None:
    with pytest.raises(error, match=says):
        to_onnx(make(), tmp_path / "m.onnx", **({"max_cache_len": 64} | options))
    assert not list(tmp_path.iterdir())


def test_folder_that_does_not_exist(tmp_path) -> None:
    with pytest.raises(kvarn_ops.InputError, match="folder that exists"):
        to_onnx(patched(), tmp_path / "no" / "m.onnx", max_cache_len=64)


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_missing_package_is_named_with_its_extra(missing, tmp_path) -> None:
    code = BLOCKER.format(blocked={missing}) + (
        "import kvarn_ops\n"
        "try:\n    kvarn_ops.export.to_onnx\n"
        "except ImportError as error:\n    print(error)\n"
    )
    root = Path(kvarn_ops.__file__).parents[1]
    assert f"kvarn-ops[onnx]' (or {missing} alone)" in run_python(code, cwd=tmp_path, path=root)
