"""Rotations are orthonormal Hadamard matrices for every head_dim that has a construction."""

from __future__ import annotations

import pytest
import torch

from kvarn_ops.errors import InputError
from kvarn_ops.hadamard import check_head_dim, hadamard, has_construction

POWERS = {32, 64, 128, 256, 512}
PALEY = {48, 80, 96, 112, 144, 160, 192, 224, 288, 320, 384, 448, 576}
MULTIPLES = range(32, 577, 16)


def test_the_head_dims_with_a_construction() -> None:
    assert {n for n in MULTIPLES if has_construction(n)} == POWERS | PALEY


@pytest.mark.parametrize("n", sorted(POWERS | PALEY))
def test_orthonormal_with_entries_of_equal_size(n: int) -> None:
    check_head_dim(n)
    matrix = hadamard(n)
    assert matrix.dtype == torch.float32
    assert matrix.device.type == "cpu"
    assert torch.allclose(matrix.abs(), torch.full((n, n), n**-0.5), rtol=0, atol=1e-7)
    eye = torch.eye(n, dtype=torch.float64)
    for product in (matrix.double() @ matrix.double().T, matrix.double().T @ matrix.double()):
        assert (product - eye).abs().max() < 1e-5
    signs = (hadamard(n, torch.float64) * n**0.5).round()
    assert torch.equal(signs @ signs.T, n * eye)


def test_powers_of_two_are_sylvester() -> None:
    n = 64
    index = torch.arange(n)
    bits = (index[:, None] & index[None, :]).tolist()
    signs = torch.tensor([[(-1.0) ** bin(b).count("1") for b in row] for row in bits])
    assert torch.equal(hadamard(n) * n**0.5, signs)


@pytest.mark.parametrize("n", [n for n in MULTIPLES if n not in POWERS | PALEY])
def test_other_head_dims_are_refused_with_a_way_out(n: int) -> None:
    for refuse in (check_head_dim, hadamard):
        with pytest.raises(InputError, match=rf"head_dim={n} .*rotate_keys=False"):
            refuse(n)
    check_head_dim(n, rotated=False)


@pytest.mark.parametrize("n", [-16, 0, 1, 16, 24, 31, 33, 40, 72, 100, 592, 600, 640, 1024])
def test_head_dims_that_cannot_be_packed_are_refused(n: int) -> None:
    for rotated in (True, False):
        with pytest.raises(InputError, match=rf"head_dim={n} .*multiple of 16 between 32 and 576"):
            check_head_dim(n, rotated)


def test_a_matrix_is_the_callers_own() -> None:
    hadamard(64).zero_()
    assert hadamard(64).abs().min() > 0


def test_models_built_on_another_default_device_leave_nothing_behind() -> None:
    with torch.device("meta"):
        assert hadamard(448).device.type == "cpu"
    with torch.inference_mode():
        hadamard(448)
    matrix = hadamard(448)
    assert not matrix.is_inference()
    assert matrix.isfinite().all()
    assert hadamard(64, torch.bfloat16, "meta").device.type == "meta"
