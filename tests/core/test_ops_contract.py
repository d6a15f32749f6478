"""Every op keeps the contract of torch.library: schema, fake, aliasing, functional twin."""

from __future__ import annotations

import pytest
import torch

import kvarn_ops
from kvarn_ops.layout import TileCache
from kvarn_ops.ops.samples import OP_NAMES

MUTABLE = [name for name in OP_NAMES if name.endswith("_")]


def op_of(name: str):
    return getattr(torch.ops.kvarn, name).default


def test_every_registered_op_has_samples() -> None:
    registered = {
        schema.name.removeprefix("kvarn::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("kvarn::")
    }
    assert registered == set(OP_NAMES)


@pytest.mark.parametrize("name", OP_NAMES)
def test_opcheck(name: str) -> None:
    for args, kwargs in kvarn_ops.sample_inputs(name):
        torch.library.opcheck(op_of(name), args, kwargs)


@pytest.mark.parametrize("name", OP_NAMES)
def test_schema_uses_only_types_that_every_exporter_knows(name: str) -> None:
    allowed = {"Tensor", "Optional[Tensor]", "int", "float", "bool", "str"}
    for argument in op_of(name)._schema.arguments:
        assert str(argument.type) in allowed, f"{argument.name}: {argument.type}"
    for result in op_of(name)._schema.returns:
        assert str(result.type) == "Tensor"


def mutated_arguments(name: str, args: tuple) -> list[torch.Tensor]:
    schema = op_of(name)._schema.arguments
    found = [x for a, x in zip(schema, args) if a.alias_info and a.alias_info.is_write]
    assert len(found) >= len(TileCache._fields)
    return found


@pytest.mark.parametrize("name", MUTABLE)
def test_functional_twin_gives_what_the_in_place_op_leaves(name: str) -> None:
    for args, _ in kvarn_ops.sample_inputs(name):
        mutated = mutated_arguments(name, args)
        before = [tensor.clone() for tensor in mutated]
        twin = op_of(name.removesuffix("_"))(*args)
        for tensor, kept in zip(mutated, before, strict=True):
            assert torch.equal(tensor, kept), "the functional twin changed its input"
        result = op_of(name)(*args)
        expected = ([] if result is None else [result]) + mutated
        for got, wanted in zip(twin, expected, strict=True):
            assert torch.equal(got, wanted)


def test_fakes_do_not_check_dtype_device_or_divisibility() -> None:
    # Exporters probe ops with small fp32 fakes of arbitrary sizes.
    (args, _) = next(iter(kvarn_ops.sample_inputs("step_")))
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
        fakes[0] = torch.empty(5, 5, 5, 5)
        assert op_of("step_")(*fakes).shape == (5, 5, 5, 5)


def test_unknown_op_names_the_known_ones() -> None:
    with pytest.raises(kvarn_ops.InputError, match="step_"):
        next(iter(kvarn_ops.sample_inputs("stepp")))


def test_backward_raises_and_says_why() -> None:
    args, _ = next(iter(kvarn_ops.sample_inputs("attention")))
    q = args[0].clone().requires_grad_()
    out = torch.ops.kvarn.attention(q, *args[1:])
    assert torch.isfinite(out).all()
    with pytest.raises(kvarn_ops.InputError, match="no_grad"):
        out.sum().backward()
