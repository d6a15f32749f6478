"""The programs that engines are made of, run by PyTorch in their place: all three modes.

The step loop below runs the very program that the compiler would get. No engine is built here.
"""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import kvarn_ops
from kvarn_ops.export.engine_program import MODES, check_pure, export_engine_program
from kvarn_ops.export.engine_step import EngineStep
from kvarn_ops.export.step_model import StepModel
from kvarn_ops.export.tensorrt import Partition, _check_partition, partition_of
from kvarn_ops.layout import TileCache, pack_codes, row_bytes, unpack_codes
from kvarn_ops.ops.plain import unpacked
from kvarn_ops.versions import release
from tiny_models import patched, random_ids, run, small_cache, tiny_model

pytestmark = pytest.mark.export

ROOM, LAYERS = 200, 2
OLD = release(torch.__version__) < (2, 13)
OP = {"fallback": "kvarn.step_attention.default", "plugin": "kvarn.attend_slots.default"}

# A snapshot of 2026-11-22: of the operators that the converters of torch_tensorrt 2.13.0 are
# registered for, those that occur here. TensorRT itself is not asked.
CONVERTIBLE = {
    "_to_copy.default", "add.Tensor", "amax.default", "arange.start_step", "bmm.default",
    "cat.default", "clamp.default", "clone.default", "cos.default", "div.Tensor",
    "embedding.default", "exp.default", "expand.default", "floor.default", "ge.Scalar",
    "gt.Scalar", "le.Tensor", "lt.Scalar", "lt.Tensor", "maximum.default", "mean.dim",
    "minimum.default", "mm.default", "mul.Tensor", "neg.default", "permute.default",
    "pow.Tensor_Scalar", "rsqrt.default", "scalar_tensor.default", "sigmoid.default", "sin.default",
    "slice.Tensor", "split_with_sizes.default", "sqrt.default", "squeeze.dims", "sub.Tensor",
    "sum.dim_IntList", "sym_size.int", "tanh.default", "unsqueeze.default", "view.default",
    "where.self",
}  # fmt: skip
# Removed or written out by its own lowering passes.
LOWERED = {"_assert_tensor_metadata.default", "alias.default"}
CASTS = {torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int32, torch.int64}
PYTHON = {"<built-in function getitem>", "<built-in function mul>"}


def exported(mode: str, chunk: int, preset: str = "k4v2_g32", rows: int = 2, **fields: Any) -> Any:
    """A patched model, its step model and the exported program."""
    if OLD and chunk > 1 and mode != "fallback":
        pytest.skip("torch before 2.13, which to_tensorrt refuses, compares strides it cannot know")
    model = patched(fields.pop("family", "llama"), preset, **fields)
    step = StepModel(model, ROOM, rows)
    return model, step, export_engine_program(step, chunk, mode)


def operators(program: ExportedProgram) -> list[torch.fx.Node]:
    """After decompositions, what no result depends on left out."""
    decomposed = program.run_decompositions()
    graph = decomposed.graph_module.graph
    for node in graph.find_nodes(
        op="call_function", target=torch.ops.aten._assert_tensor_metadata.default
    ):
        graph.erase_node(node)
    graph.eliminate_dead_code()
    return [node for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_unpacking_by_floor_is_exact_for_every_byte(bits: int, dtype: torch.dtype) -> None:
    codes = 8 * 256  # every row holds each byte in each place of a word
    width = row_bytes(codes, bits)
    packed = (torch.arange(width) + torch.arange(256)[:, None]).to(torch.uint8)
    wanted = unpack_codes(packed, bits, codes)
    found = unpacked(packed.view(dtype), bits, codes)
    assert found.dtype == torch.float16
    assert torch.equal(found, wanted.half())
    assert torch.equal(pack_codes(found.to(torch.uint8), bits), packed)


@pytest.mark.parametrize("mode", ["plugin", "decompose"])
def test_what_belongs_into_the_engine_has_converters(mode: str) -> None:
    _, _, program = exported(mode, 4, "k3v4_g32", num_hidden_layers=1)
    nodes = operators(program)
    used = {str(node.target).removeprefix("aten.") for node in nodes} - {OP.get(mode, "")}
    assert used <= CONVERTIBLE | LOWERED | PYTHON, used - CONVERTIBLE
    assert ("floor.default" in used) == (mode == "decompose")
    casts = {node.kwargs["dtype"] for node in nodes if "_to_copy" in str(node.target)}
    assert casts <= CASTS


@pytest.mark.parametrize("mode", MODES)
def test_program_reads_int8_caches_and_changes_nothing(mode: str) -> None:
    _, step, program = exported(mode, 1)
    names = [str(node.target) for node in program.graph.nodes]
    assert sum(name.startswith("kvarn.") for name in names) == (LAYERS if mode in OP else 0)
    assert names.count(OP.get(mode, "")) == (LAYERS if mode in OP else 0)
    values = [node.meta["val"] for node in program.graph.find_nodes(op="placeholder")]
    constants = len(program.graph_signature.parameters) + len(program.graph_signature.buffers)
    tokens, lengths, *fields = values[constants:]
    assert (tokens.dtype, lengths.dtype) == (torch.int64, torch.int32)
    width = len(TileCache._fields) - 1
    assert len(fields) == LAYERS * width
    kinds = [x.dtype for x in fields[:width]]
    assert torch.uint8 not in {x.dtype for x in values}
    assert [name for name, kind in zip(TileCache._fields, kinds) if kind == torch.int8] == [
        "k_codes",
        "v_codes",
    ]
    outputs = [node.meta["val"] for node in program.graph.output_node().args[0]]
    assert len(outputs) == 1 + 2 * LAYERS
    assert all(tuple(x.shape) == (2, 2, 1, 32) for x in outputs[1:]), "the new rows only"
    held = {name.split(".")[-1] for name, _ in step.named_buffers() if "past_" in name}
    assert not held & {name.split(".")[-1] for name in program.graph_signature.buffers}


CHUNKS = {
    1: [60] + [1] * 90,  # a prompt beyond the chunk goes through the model
    40: [40, 3, 20, 60] + [1] * 27,
}


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("mode", MODES)
def test_steps_by_the_program_are_those_of_the_model(mode: str, chunk: int) -> None:
    """Four tiles of two rows: what was appended outside the program is read by it later."""
    model, step_model, program = exported(mode, chunk)
    calls = []
    module = program.module()

    def counted(*args: Tensor) -> Any:
        calls.append(args[0].shape[1])
        return module(*args)

    step = EngineStep(step_model, counted, chunk)
    ids, counts = random_ids(2, 150), CHUNKS[chunk]
    for _ in range(2):
        cache = small_cache(model, ROOM, "k4v2_g32")
        pairs = [(step(part), run(model, part, cache)) for part in ids.split(counts, 1)]
        found, wanted = (torch.cat(parts, 1) for parts in zip(*pairs, strict=True))
        before = 8 + 32
        torch.testing.assert_close(found[:, :before], wanted[:, :before], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)
        assert step.length == 150
        assert (step_model.cache.layers[0].tiles.seq_lens == 150).all()
        assert step_model.cache.layers[1].tiles.k_codes.any()
        if mode != "fallback" or chunk > 1:
            break
        step.reset()  # and once more from an empty cache
    assert sorted(set(calls)) == sorted({count for count in counts if count <= chunk})


@pytest.mark.parametrize("mode", ["plugin", "decompose"])
@pytest.mark.parametrize(
    ("family", "preset", "options"),
    [
        ("llama", "k3v3_g32", {"tail_tokens": 20}),
        ("gpt2", "k8v2_g32", {"n_layer": 1}),
        ("llama", "k2v4_g32", {"encoder": "paper", "rotate_values": False, "num_hidden_layers": 1}),
    ],
)
def test_other_models_and_configs(mode: str, family: str, preset: str, options: Any) -> None:
    model, step_model, program = exported(mode, 1, preset, rows=1, family=family, **options)
    step = EngineStep(step_model, program.module(), 1)
    own = {name: value for name, value in options.items() if "layer" not in name}
    cache = small_cache(model, ROOM, preset, **own)
    ids = random_ids(1, 130)
    for part in ids.split([100] + [1] * 30, 1):
        torch.testing.assert_close(step(part), run(model, part, cache), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("mode", MODES)
def test_layers_whose_values_arrive_rotated(mode: str) -> None:
    model = tiny_model(num_hidden_layers=1)
    kvarn_ops.patch(model, "k4v2_g32", num_sink_tokens=8, fold_rotation=True)
    step_model = StepModel(model, ROOM)
    layer = step_model.cache.layers[0]
    assert step_model.kvarn_config.rotate_values
    assert not layer.config.rotate_values
    step = EngineStep(step_model, export_engine_program(step_model, 1, mode).module(), 1)
    cache = small_cache(model, ROOM, "k4v2_g32")
    for part in random_ids(1, 90).split([80] + [1] * 10, 1):
        torch.testing.assert_close(step(part), run(model, part, cache), rtol=1e-2, atol=1e-2)


def test_step_refuses_what_the_engine_was_not_made_for() -> None:
    _, step_model, program = exported("fallback", 1, rows=1)
    step = EngineStep(step_model, program.module(), 1)
    with pytest.raises(kvarn_ops.InputError, match="rows needs another engine"):
        step(random_ids(2, 1))
    with pytest.raises(kvarn_ops.InputError, match="int64"):
        step(random_ids(1, 1).int())
    with pytest.raises(kvarn_ops.InputError, match="new tokens"):
        step(random_ids(1, 0))
    step(random_ids(1, ROOM))
    with pytest.raises(kvarn_ops.CacheError, match=rf"{ROOM} tokens.*{ROOM + 1}.*reset"):
        step(random_ids(1, 1))
    step.reset()
    step(random_ids(1, 1))


class Remembers(nn.Module):
    """Changes its buffer, or its input, as models with a cache of their own do."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.own = own
        self.register_buffer("past", torch.zeros(4, 8))

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        kept = self.past if self.own else state
        kept[1:2] = x
        return kept.sum(0)


@pytest.mark.parametrize(("own", "says"), [(True, "past"), (False, "state")])
def test_programs_that_change_something_are_refused(own: bool, says: str) -> None:
    with torch.no_grad():
        program = torch.export.export(Remembers(own), (torch.ones(1, 8), torch.ones(4, 8)))
    with pytest.raises(kvarn_ops.UnsupportedModelError, match=f"{says}.*silently"):
        check_pure(program)


def test_bytes_are_refused() -> None:
    class Reads(nn.Module):
        def forward(self, codes: Tensor) -> Tensor:
            return codes.float() + 1

    program = torch.export.export(Reads(), (torch.zeros(3, dtype=torch.uint8),))
    with pytest.raises(kvarn_ops.UnsupportedModelError, match=r"codes.*int8"):
        check_pure(program)
    check_pure(torch.export.export(Reads(), (torch.zeros(3, dtype=torch.int8),)))


@pytest.mark.parametrize(
    ("mode", "chunk", "fields", "error", "says"),
    [
        ("inside", 1, {}, kvarn_ops.InputError, "fallback, plugin, decompose"),
        ("plugin", 0, {}, kvarn_ops.InputError, "max_cache_len"),
        ("plugin", ROOM + 1, {}, kvarn_ops.InputError, "max_cache_len"),
        ("decompose", 1, {"num_sink_tokens": 0}, kvarn_ops.UnsupportedModelError, "num_sink_tok"),
    ],
)
def test_impossible_programs_say_what_to_do(mode, chunk, fields, error, says) -> None:
    step = StepModel(patched("llama", "k4v2_g32", **fields), ROOM)
    with pytest.raises(error, match=says):
        export_engine_program(step, chunk, mode)


def test_dense_layers_are_refused() -> None:
    model = patched("gemma2", "k4v2_g32")
    with pytest.raises(kvarn_ops.UnsupportedModelError, match="dense"):
        StepModel(model, ROOM)


def test_partition_is_read_from_the_names_of_the_parts() -> None:
    """Of a module in the shape of Torch-TensorRT's: what it names its parts is not tested here."""

    class Inside(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    size = graph.call_function(torch.ops.aten.sym_size.int, (x, 0))
    graph.call_function(operator.mul, (size, 2))
    for name in ("_run_on_acc_0", "_run_on_gpu_1"):
        x = graph.call_module(name, (x,))
    graph.output(x)
    outside = torch.fx.symbolic_trace(lambda x: torch.ops.aten.sin.default(x))
    root = {"_run_on_acc_0": Inside(), "_run_on_gpu_1": outside}
    found = partition_of(torch.fx.GraphModule(root, graph))
    assert found == (["_run_on_acc_0"], ["aten.sin.default"])
    with pytest.raises(kvarn_ops.BackendError, match=r"left aten\.sin\.default outside"):
        _check_partition(found, "plugin", LAYERS)
    with pytest.raises(kvarn_ops.BackendError, match="0 of 2 layers"):
        _check_partition(found, "fallback", LAYERS)
    _check_partition(Partition(["_run_on_acc_0"], []), "decompose", LAYERS)
    _check_partition(Partition([], [OP["fallback"]] * LAYERS), "fallback", LAYERS)
