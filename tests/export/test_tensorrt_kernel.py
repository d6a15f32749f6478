"""The kernel that a TensorRT plugin launches: its PTX without a GPU, its numbers interpreted.

No engine is built here. What these tests cannot show is whether TensorRT accepts the plugin.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed (extra 'dev', Linux)")

from fresh_process import last_line, start_python
from kernel_cases import Problem, make_problem, relative_error
from kvarn_ops.kernels import engine
from kvarn_ops.kernels.ptx import SHARED_LIMIT, without_scratch
from kvarn_ops.ops.plain import combined, prepared
from kvarn_ops.ops.read_only import as_engines_take

pytestmark = pytest.mark.export

ARCHS = ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
PTX_CASES: list[dict[str, Any]] = [
    {"arch": arch, "head_dim": 128, "bits": [4, 2], "dtype": "bfloat16"} for arch in ARCHS
] + [
    {"arch": "sm_80", "head_dim": 64, "bits": [3, 2], "dtype": "float32", "group": 32, "lag": 40},
    {"arch": "sm_80", "head_dim": 256, "bits": [8, 8], "dtype": "float16", "softcap": 30.0},
]


@pytest.fixture(scope="module")
def compiled(repo_root, tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ptx")
    script = repo_root / "tests" / "helpers" / "engine_ptx.py"
    done = start_python(script, json.dumps(PTX_CASES), cwd=folder, path=(repo_root,))
    return json.loads(last_line(done))


def test_ptx_has_the_arguments_that_tensorrt_passes_and_assembles(compiled) -> None:
    pointers, numbers = len(engine.INPUTS), len(engine.INTEGERS)
    wanted = [".u64"] * pointers + [".u32"] * numbers + [".u64"] * len(engine.OUTPUTS)
    for case, made in zip(PTX_CASES, compiled, strict=True):
        assert made["assembler"] == "", case
        assert made["params"] == wanted, case
        assert made["entry"] == made["name"], case
        assert made["required_threads"] == made["threads"], case
        assert made["shared_bytes"] <= SHARED_LIMIT, case


def test_arguments_are_those_of_the_op_in_its_order() -> None:
    schema = torch.ops.kvarn.attend_slots.default._schema
    tensors = [a.name for a in schema.arguments if str(a.type) == "Tensor"]
    assert tensors == list(engine.INPUTS)
    given = [name.removesuffix("_ptr") for name in engine.engine_kernel.arg_names]
    order = [*engine.INPUTS, *engine.INTEGERS, *engine.OUTPUTS]
    assert given[: len(order)] == order
    assert all(name.isupper() for name in given[len(order) :])


ENTRY = """.visible .entry kernel(
\t.param .u64 .ptr .global .align 1 kernel_param_0,
\t.param .u32 kernel_param_1,
\t.param .u64 .ptr .global .align 1 kernel_param_2
)
.reqntid 64
{{
\tld.param.b64 %rd1, [kernel_param_0];{used}
}}
"""


def test_scratch_parameters_are_dropped_and_refused_where_used() -> None:
    text = without_scratch(ENTRY.format(used=""), 2)
    assert "kernel_param_2" not in text
    assert ".param .u32 kernel_param_1\n)" in text
    assert without_scratch(ENTRY.format(used=""), 3).count("kernel_param_2") == 1
    with pytest.raises(ValueError, match="kernel_param_2 is used"):
        without_scratch(ENTRY.format(used="\n\tld.param.b64 %rd2, [kernel_param_2];"), 2)
    with pytest.raises(ValueError, match="3 parameters where 4"):
        without_scratch(ENTRY.format(used=""), 4)


@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (4, 1), (8, 1), (9, 2), (64, 8)])
def test_launch_covers_all_rows(rows: int, blocks: int) -> None:
    assert engine.grid(6, rows, 8, 11) == (6, 11, blocks)


def slots_of(problem: Problem, dense_slots: int, splits: int) -> tuple[Any, ...]:
    """Arguments of `kvarn::attend_slots`."""
    cache = as_engines_take(problem.cache)
    batch, heads, _, head_dim = cache.k_tail.shape
    rows = problem.q.reshape(batch, heads, -1, head_dim)
    rotated, unit = prepared(rows, cache.k_equalizer, problem.rotation, problem.config)
    tensors = (rows, rotated.half(), unit, *cache[:-3], problem.k, problem.v, cache.seq_lens)
    lag, ratio = problem.config.tail_tokens, problem.q.shape[1] // heads
    return (*tensors, head_dim**-0.5, problem.softcap, lag, ratio, dense_slots, splits)


def merged(problem: Problem, slots: tuple[Tensor, ...], dense_slots: int) -> Tensor:
    logits, queries = problem.sink_logits, problem.k.shape[2]
    heads = problem.cache.k_tail.shape[1]
    if logits is not None:
        logits = logits.view(1, heads, -1, 1).expand(-1, -1, -1, queries).reshape(1, heads, -1)
    part, peak, weight = slots
    out = combined(
        part, peak, weight, dense_slots, problem.rotation, problem.cache.v_equalizer, logits,
        problem.config,
    )  # fmt: skip
    return out.reshape(problem.q.shape)


CASES = {
    # name: (preset, head_dim, lengths, new tokens, options, (dense slots, splits))
    "one_token": ("k4v2_g32", 64, [260, 0, 33], 1, {}, (2, 3)),
    "k3_capped_sinks": (
        "k3v3_g32",
        64,
        [200, 63],
        5,
        {"softcap": 5.0, "sink_logits": True},
        (1, 4),
    ),
    "k2v8_gqa_lag": ("k2v8_g32", 64, [200, 100], 3, {"heads": (6, 2), "tail_tokens": 40}, (3, 2)),
    "k8v4_d80": ("k8v4_g64", 80, [300, 33], 1, {"heads": (3, 1)}, (1, 1)),
    "paper_half": (
        "k4v2_g32",
        64,
        [95, 31],
        2,
        {"encoder": "paper", "dtype": torch.float16},
        (1, 2),
    ),
    "unrotated": (
        "k4v2_g32",
        32,
        [150],
        12,
        {"rotate_keys": False, "rotate_values": False},
        (2, 5),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_kernel_and_op_give_the_attention_of_a_step(name: str) -> None:
    """What slots hold is poisoned where nothing is stored, and the kernel's unwritten results."""
    preset, head_dim, lengths, count, options, (dense_slots, splits) = CASES[name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problem = make_problem(preset, head_dim, lengths, count, device, **options)
    wanted, _ = problem.step("reference")
    args = slots_of(problem, dense_slots, splits)
    tensors, (scale, softcap, lag, *slots) = args[: len(engine.INPUTS)], args[len(engine.INPUTS) :]
    sizes = engine.problem_of([x.shape for x in tensors], scale, softcap, lag, *slots)
    by_kernel = engine.attend_slots(tensors, sizes)
    by_op = torch.ops.kvarn.attend_slots(*args)
    for made, tolerance in ((by_kernel, 5e-4), (by_op, 5e-4)):
        assert made[0].shape[2] == dense_slots + splits
        error = relative_error(merged(problem, made, dense_slots), wanted)
        assert error < (tolerance if problem.q.dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_step_attention_is_the_attention_of_a_step(backend: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problem = make_problem("k4v2_g32", 64, [260, 40], 3, device, sink_logits=True, softcap=9.0)
    wanted, _ = problem.step("reference")
    found = torch.ops.kvarn.step_attention(
        problem.q, problem.k, problem.v, *as_engines_take(problem.cache), problem.rotation,
        problem.sink_logits, 0.125, 9.0, problem.config.to_string(), backend,
    )  # fmt: skip
    assert relative_error(found, wanted) < (1e-6 if backend == "reference" else 5e-4)
