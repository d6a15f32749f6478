"""How ATen ops that the ONNX exporter of torch does not know, or gets wrong, are written in ONNX.

Operators of the default domain, as of opset 18. Results are bit-equal with torch: everything here
is integer arithmetic or a power of two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from onnxscript import ir
from onnxscript import opset18 as op

__all__ = ["translations"]

_FLOAT = onnx.TensorProto.FLOAT
_INT32 = onnx.TensorProto.INT32
_aten = torch.ops.aten


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For `custom_translation_table` of `torch.onnx.export`."""
    return {
        _aten.frexp.Tensor: _frexp,
        _aten.ldexp.Tensor: _ldexp,
        _aten.__and__.Scalar: _and_scalar,
        _aten.bitwise_and.Scalar: _and_scalar,
        _aten.__lshift__.Tensor: _shift_left,
        _aten.bitwise_left_shift.Tensor: _shift_left,
        _aten.__rshift__.Scalar: _shift_right,
        _aten.bitwise_right_shift.Tensor_Scalar: _shift_right,
        _aten.as_strided.default: _as_strided,
    }


def _scalar(value: float, dtype: ir.DataType = ir.DataType.FLOAT) -> Any:
    array = np.array(value, dtype=dtype.numpy())
    return op.Constant(value=onnx.numpy_helper.from_array(array))


def _power_of_two(exponent: Any) -> Any:
    return op.Pow(_scalar(2.0), exponent)


def _frexp(self: Any) -> tuple[Any, Any]:
    """Mantissa and exponent (int32) of finite fp32; `x = mantissa * 2**exponent`."""
    size = op.Abs(self)
    # A logarithm near a whole number may end up on its other side: compared with the powers.
    guess = op.Floor(op.Div(op.Log(size), _scalar(math.log(2))))
    guess = op.Sub(guess, op.Cast(op.Less(size, _power_of_two(guess)), to=_FLOAT))
    above = op.Add(guess, _scalar(1.0))
    exponent = op.Add(above, op.Cast(op.GreaterOrEqual(size, _power_of_two(above)), to=_FLOAT))
    exponent = op.Where(op.Equal(size, _scalar(0.0)), _scalar(0.0), exponent)
    return op.Div(self, _power_of_two(exponent)), op.Cast(exponent, to=_INT32)


def _ldexp(self: Any, other: Any) -> Any:
    return op.Mul(self, _power_of_two(op.Cast(other, to=_FLOAT)))


def _and_scalar(self: Any, other: int) -> Any:
    """With a constant of the tensor's own dtype, which the exporter's version does not take."""
    if self.dtype == ir.DataType.BOOL:
        return op.And(self, _scalar(bool(other), ir.DataType.BOOL))
    return op.BitwiseAnd(self, _scalar(other, self.dtype))


def _shift_left(self: Any, other: Any) -> Any:
    """By a product: BitShift takes unsigned integers only."""
    power = _power_of_two(op.Cast(other, to=_FLOAT))
    return op.Mul(self, op.Cast(power, to=self.dtype.value))


def _shift_right(self: Any, other: int) -> Any:
    """Of numbers that are not negative, as packed words are."""
    return op.Div(self, _scalar(2**other, self.dtype))


def _as_strided(self: Any, size: Any, stride: Any, storage_offset: int | None = None) -> Any:
    """Our programs take such views of whole contiguous tensors only (`formula.materialized`)."""
    return op.Identity(self)
