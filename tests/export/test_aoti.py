"""`aot_compile`: a package that a process without kvarn_ops loads and steps."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kvarn_ops
from byte_text import PRESET, PROMPT, ROOM
from extras import needs_packages
from fresh_process import BLOCKER, run_python
from kvarn_ops.export import aot_compile
from tiny_models import patched, random_ids, run

LENGTH = 400  # 8 tiles are quantized
CUTS = (64, 128, 192, 220)  # chunks that finish no tile, two and one, then a token at a time

STEPS = """
import sys, torch
step = torch._inductor.aoti_load_package({package!r})
pieces = torch.load("ids.pt").tensor_split({cuts}, 1)
torch.save(torch.cat([step(piece.contiguous()) for piece in pieces], 1), "logits.pt")
print([name for name in sys.modules if name.partition(".")[0] == "kvarn_ops"])
"""

# `step` and `empty` are the example's.
AFTER_RESETS = """
def logits(step, ids):
    pieces = [ids[:, :60], *(ids[:, i : i + 1] for i in range(60, ids.shape[1]))]
    return torch.cat([step(piece.contiguous()) for piece in pieces], 1)

def restart():
    step.load_constants(empty, check_full_update=False)

long, other, short = torch.load("ids.pt")
weights = [name for name in step.get_constant_fqns() if name not in empty]
assert weights and not any(name.startswith("past_") for name in weights)
wanted = logits(torch._inductor.aoti_load_package(PACKAGE), other)
logits(step, short)
assert not torch.equal(logits(step, other), wanted), "the state changes nothing"
for before in (long, short, torch.cat([long, long[:, :160]], 1)):
    restart()
    overflows = before.shape[1] > 543
    assert logits(step, before)[:, -1].isnan().all() == overflows
    restart()
    assert torch.equal(logits(step, other), wanted)
ruined = {name: torch.full_like(x, torch.nan) for name, x in empty.items() if x.is_floating_point()}
step.load_constants(ruined, check_full_update=False)
restart()
assert torch.equal(logits(step, other), wanted)

held = {name: x.clone() for name, x in empty.items()}
step.load_constants(held, check_full_update=False, user_managed=True)
assert torch.equal(logits(step, other), wanted)
saved = {name: x.clone() for name, x in held.items()}
first = logits(step, short)
for name, x in saved.items():
    held[name].copy_(x)
assert torch.equal(logits(step, short), first), "no way back to a copy of the state"
for x in held.values():
    x.zero_()
assert torch.equal(logits(step, other), wanted)
print("done")
"""


@pytest.mark.slow
@pytest.mark.export
def test_package_steps_without_this_package_as_the_model_does(
    byte_model: Any, byte_package: Path, tmp_path: Path
) -> None:
    ids = text_ids(LENGTH)
    cuts = [*CUTS, *range(CUTS[-1] + 1, LENGTH)]
    torch.save(ids, tmp_path / "ids.pt")
    code = STEPS.format(package=str(byte_package), cuts=cuts)
    assert run_python(code, cwd=tmp_path) == "[]", "the package needed kvarn_ops"
    got = torch.load(tmp_path / "logits.pt")
    cache = kvarn_ops.KVarNCache(byte_model.config, ROOM, PRESET)
    wanted = torch.cat([run(byte_model, piece, cache) for piece in ids.tensor_split(cuts, 1)], 1)
    quantized = 128 + 32  # sinks and the first tile: up to there nothing is rounded
    torch.testing.assert_close(got[:, :quantized], wanted[:, :quantized], rtol=1e-4, atol=1e-4)
    # Then a code at a tie of rounding may differ, and what later tokens store with it.
    assert (got - wanted).norm() <= 5e-3 * wanted.norm()
    assert list(byte_package.parent.iterdir()) == [byte_package], "something was left behind"


def text_ids(length: int) -> Tensor:
    """Text that the model may have seen, `[1, length]`."""
    return torch.tensor([list((PROMPT * 4).encode()[:length])])


@pytest.mark.slow
@pytest.mark.export
def test_package_says_what_it_is(byte_package: Path) -> None:
    about = torch._inductor.aoti_load_package(byte_package).get_metadata()
    expected = {"preset": PRESET, "group_size": "32", "num_sink_tokens": "128", "chunk": "64",
                "max_cache_len": "512", "num_layers": "5", "batch_size": "1",
                "version": kvarn_ops.__version__}  # fmt: skip
    assert expected.items() <= {k.removeprefix("kvarn_ops."): v for k, v in about.items()}.items()
    assert about["torch.version"] == str(torch.__version__)


@pytest.mark.slow
@pytest.mark.export
def test_zeros_for_the_state_start_a_new_sequence(
    byte_package: Path, tmp_path: Path, repo_root: Path
) -> None:
    """docs/export.md's lines, in a process without this package, after each kind of past."""
    page = (repo_root / "docs" / "export.md").read_text()
    example = re.search(r"<!-- reset -->\n```python\n(.*?)```", page, re.DOTALL)
    assert example is not None
    assert 'load_package("step.pt2")' in example[1]
    lines = example[1].replace("step.pt2", str(byte_package))
    torch.save([random_ids(1, n, seed=n) for n in (LENGTH, 300, 7)], tmp_path / "ids.pt")
    code = BLOCKER.format(blocked={"kvarn_ops", "transformers"}) + lines + AFTER_RESETS
    assert run_python(code.replace("PACKAGE", repr(str(byte_package))), cwd=tmp_path) == "done"


@needs_packages
@pytest.mark.export
@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("model.so", {}, r"\.pt2"),
        ("model.pt2", {"chunk": 65}, "max_cache_len"),
        ("model.pt2", {"chunk": 0}, "max_cache_len"),
    ],
)
def test_impossible_packages_leave_nothing(
    name: str, options: dict[str, int], says: str, tmp_path: Path
) -> None:
    with pytest.raises(kvarn_ops.InputError, match=says):
        aot_compile(patched(), tmp_path / name, max_cache_len=64, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.export
@pytest.mark.parametrize(
    ("device", "limit", "says"),
    [("cuda", 64, "chunk=1"), ("cuda", None, "chunk=1"), ("meta", 1, "cpu")],
)
def test_packages_that_do_not_exist_are_refused(device: str, limit: int | None, says: str) -> None:
    from kvarn_ops.export.aoti import _check_platform

    with pytest.raises(kvarn_ops.BackendError, match=says):
        _check_platform(torch.device(device), limit)
    _check_platform(torch.device("cuda"), 1)


@pytest.mark.export
def test_releases_that_compile_it_wrongly_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.12.1+cpu")
    with pytest.raises(kvarn_ops.BackendError, match=r"2\.13"):
        aot_compile(patched(), tmp_path / "model.pt2", max_cache_len=64)
    assert not list(tmp_path.iterdir())
