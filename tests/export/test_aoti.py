"""`aot_compile`: a package that a process without kvarn_ops loads and steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kvarn_ops
from fresh_process import run_python
from kvarn_ops.export import aot_compile
from kvarn_ops.versions import release
from tiny_models import patched, random_ids, run, small_cache

OLD = release(torch.__version__) < (2, 13)
needs_new = pytest.mark.skipif(OLD, reason="packages need torch 2.13")

PREFILL, LENGTH, CHUNK = 200, 300, 120

STEPS = """
import sys, torch
step = torch._inductor.aoti_load_package({folder!r} + "/model.pt2")
ids = torch.load({folder!r} + "/ids.pt")
chunks = [ids[:, :120], ids[:, 120:{prefill}]]
chunks += [ids[:, i : i + 1] for i in range({prefill}, ids.shape[1])]
torch.save(torch.cat([step(chunk) for chunk in chunks], 1), {folder!r} + "/logits.pt")
print([name for name in sys.modules if name.partition(".")[0] == "kvarn_ops"])
"""


@needs_new
@pytest.mark.export
def test_package_steps_without_this_package_as_the_model_does(tmp_path: Path) -> None:
    model, ids = patched("llama", "k4v2_g32"), random_ids(1, LENGTH)
    run(model, ids[:, :150], small_cache(model, LENGTH, "k4v2_g32"))  # used before
    package = aot_compile(model, tmp_path / "model.pt2", max_cache_len=LENGTH, chunk=CHUNK)
    torch.save(ids, tmp_path / "ids.pt")
    code = STEPS.format(folder=str(tmp_path), prefill=PREFILL)
    assert run_python(code, cwd=tmp_path) == "[]", "the package needed kvarn_ops"
    got = torch.load(tmp_path / "logits.pt")
    cache = small_cache(model, LENGTH, "k4v2_g32")
    first = run(model, ids[:, :CHUNK], cache)
    rest = [run(model, ids[:, CHUNK:PREFILL], cache)]
    rest += [run(model, ids[:, i : i + 1], cache) for i in range(PREFILL, LENGTH)]
    quantized = 8 + 32  # sinks and the first tile: up to there nothing is rounded
    torch.testing.assert_close(got[:, :quantized], first[:, :quantized], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got, torch.cat([first, *rest], 1), rtol=1e-2, atol=1e-2)
    assert package == tmp_path / "model.pt2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.pt", "logits.pt", "model.pt2"]


@needs_new
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
def test_releases_that_compile_it_wrongly_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.12.1+cpu")
    with pytest.raises(kvarn_ops.BackendError, match=r"2\.13"):
        aot_compile(patched(), tmp_path / "model.pt2", max_cache_len=64)
    assert not list(tmp_path.iterdir())
