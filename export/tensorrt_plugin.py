"""`kvarn::attend_slots` as a TensorRT plugin whose kernel is ours, compiled to PTX at build time.

The only file of this folder that reads kernel sources. Importing it needs TensorRT and a GPU.
TensorRT reads annotations at run time: there is no `from __future__ import annotations` here.
"""
# ruff: noqa: UP006, UP035 (TensorRT looks for `typing.Tuple`)

import inspect
from functools import cache
from typing import Any, Callable, Tuple

# isort: off
# First: it puts itself before TensorRT's own module, and corrects how that validates annotations.
from torch_tensorrt.dynamo.conversion import plugins  # pyright: ignore[reportMissingImports]
import tensorrt as trt  # pyright: ignore[reportMissingImports]
import tensorrt.plugin as trtp  # pyright: ignore[reportMissingImports]
# isort: on

import numpy as np
import torch
from torch import Tensor

from kvarn_ops.errors import BackendError
from kvarn_ops.kernels.engine import INPUTS, INTEGERS, grid, launch_shape, problem_of
from kvarn_ops.kernels.ptx import compile_engine_ptx

__all__ = ["register"]

_OP = "kvarn::attend_slots"
# Builtin annotations fail with NumPy 2.4 when the plugin is made; this one is converted.
_NUMBER = np.ndarray[Any, np.dtype[np.float64]]
_ATTRIBUTES = ("scale", "softcap", "tail_tokens", "ratio", "dense_slots", "splits")
_KINDS = {
    "rotated": "FP16", "unit": "FP32", "k_codes": "INT8", "k_channel_affine": "FP16",
    "k_token_scale": "FP16", "v_codes": "INT8", "v_token_affine": "FP16",
    "v_channel_scale": "FP16", "lengths": "INT32",
}  # fmt: skip
_DTYPES = {"FP16": torch.float16, "BF16": torch.bfloat16, "FP32": torch.float32}


@cache
def register() -> None:
    """Register plugin and converter, once: TensorRT refuses a second definition."""
    three = Tuple[trtp.TensorDesc, trtp.TensorDesc, trtp.TensorDesc]
    made = Tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]
    trtp.register(_OP)(_signed(_describe, (), three))
    trtp.autotune(_OP)(_signed(_combinations, ("outputs",), None))
    trtp.aot_impl(_OP)(_signed(_kernel, ("outputs", "tactic"), made))
    plugins.generate_plugin_converter(
        _OP, capability_validator=_takes, supports_dynamic_shapes=True
    )


def _signed(function: Callable[..., Any], more: Tuple[str, ...], returns: Any) -> Any:
    """The function with the signature that TensorRT expects of it, and looks at."""

    def named(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    kinds = [(name, trtp.TensorDesc) for name in INPUTS]
    if "outputs" not in more or "tactic" in more:
        kinds += [(name, _NUMBER) for name in _ATTRIBUTES]
    extra = {"outputs": Tuple[trtp.TensorDesc], "tactic": int}
    kinds += [(name, extra[name]) for name in more]
    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
        for name, kind in kinds
    ]
    named.__name__ = function.__name__
    empty = inspect.Signature.empty
    named.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        parameters, return_annotation=empty if returns is None else returns
    )
    return named


def _describe(*inputs: Any, **attributes: Any) -> Tuple[Any, Any, Any]:
    """Shapes and dtypes of `part`, `peak`, `weight`."""
    q = inputs[0].shape_expr
    slots = _whole(attributes["dense_slots"]) + _whole(attributes["splits"])
    lead = (q[0], q[1], slots, q[2])
    sizes = ((*lead, q[3]), lead, lead)
    part, peak, weight = (trtp.from_shape_expr(size, dtype=trt.float32) for size in sizes)
    return part, peak, weight


def _combinations(*args: Any) -> list[Any]:
    """Dtypes that the kernel takes, all tensors contiguous; one for each dtype of a model."""
    return [
        trtp.AutoTuneCombination(
            ", ".join([*(_KINDS.get(name, own) for name in INPUTS), "FP32", "FP32", "FP32"]),
            "LINEAR",
            [1],
        )
        for own in _DTYPES
    ]


def _kernel(*args: Any) -> Tuple[str, str, Any, Any]:
    """Name and PTX of the kernel, its launch, and the integers between inputs and outputs."""
    inputs = dict(zip(INPUTS, args, strict=False))
    scale, softcap, *counts = args[len(INPUTS) : len(INPUTS) + len(_ATTRIBUTES)]
    # Batch and new tokens may be symbolic, and are not read.
    shapes = [[_constant(size) for size in x.shape_expr] for x in inputs.values()]
    problem = problem_of(shapes, _number(scale), _number(softcap), *map(_whole, counts))
    rows, queries = inputs["q"].shape_expr[2], inputs["k_new"].shape_expr[2]
    capacity = inputs["k_codes"].shape_expr[2]
    device = torch.device("cuda", torch.cuda.current_device())
    major, minor = torch.cuda.get_device_capability(device)
    dtype = _dtype_of(inputs["q"].dtype)
    try:
        shape = launch_shape(device, problem)
        made = compile_engine_ptx(problem, shape, dtype, f"sm_{major}{minor}")
    except ValueError as error:
        raise BackendError(f"{error}: use mode='fallback' for this model.") from error
    launch = trtp.KernelLaunchParams()
    programs = inputs["q"].shape_expr[0] * problem.heads
    launch.grid_x, launch.grid_y, launch.grid_z = grid(
        programs, rows, made.block_rows, problem.slots
    )
    launch.block_x, launch.shared_mem = made.threads, made.shared_bytes
    integers = trtp.SymIntExprs(len(INTEGERS))
    for index, value in enumerate((rows, queries, capacity)):
        integers[index] = trtp.SymInt32(value)
    return made.name, made.text, launch, integers


def _constant(size: Any) -> int:
    """The size, or 0 if it is not known while the engine is built."""
    return size.constant_value() if size.is_constant else 0


def _number(value: Any) -> float:
    return float(np.asarray(value).reshape(-1)[0])


def _whole(value: Any) -> int:
    return round(_number(value))


def _dtype_of(kind: Any) -> torch.dtype:
    known = {
        trt.float16: torch.float16, trt.bfloat16: torch.bfloat16, trt.float32: torch.float32,
    }  # fmt: skip
    return known[kind]


def _takes(node: torch.fx.Node, settings: Any = None) -> bool:
    """Whether the engine may hold this call: TensorRT's plugins take no uint8."""
    values = [x.meta.get("val") for x in node.args if isinstance(x, torch.fx.Node)]
    return not any(isinstance(x, Tensor) and x.dtype == torch.uint8 for x in values)
