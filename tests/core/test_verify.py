"""`kvarn-ops verify`: passes here, and fails for every kind of wrong backend."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from kvarn_ops import cli, verify
from kvarn_ops.errors import BackendError
from kvarn_ops.ops import attend
from kvarn_ops.ops.samples import filled_cache


@pytest.fixture
def few_checks(monkeypatch):
    """Two presets, one head_dim, all cases."""
    monkeypatch.setattr(verify, "_CONFIGS", verify._CONFIGS[2:4])
    monkeypatch.setattr(verify, "_HEAD_DIMS", (64,))


def invoke(*arguments):
    return CliRunner().invoke(cli.app, ["verify", *arguments])


def quiet():
    return Console(file=io.StringIO())


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_backends_of_this_machine_pass(few_checks, backend):
    result = invoke("--backend", backend, "--device", "cpu", "--no-compiled")
    assert result.exit_code == 0, result.output
    assert f"{2 * len(verify._CASES)} of {2 * len(verify._CASES)} checks passed" in " ".join(
        result.output.split()
    )
    assert "FAIL" not in result.output


def test_a_compiled_step_passes(monkeypatch, fresh_dynamo):
    monkeypatch.setattr(verify, "_CASES", ())
    monkeypatch.setattr(verify, "_COMPILED", verify._COMPILED[1:])
    report = verify.run_checks("aten", "cpu", True, quiet())
    assert [check.case for check in report.checks] == ["compiled decode"]
    assert report.passed, report.checks


def test_a_wrong_formula_fails_with_exit_code_1(few_checks, monkeypatch):
    right = attend.tile_scores
    monkeypatch.setattr(attend, "tile_scores", lambda *args: right(*args) * 1.01)
    result = invoke("--device", "cpu", "--no-compiled")
    assert result.exit_code == 1
    assert "FAIL k4v4_g32 plus, head_dim 64, decode: outputs differ by" in result.output
    monkeypatch.undo()


def test_json_has_every_check_and_the_same_exit_code(few_checks, monkeypatch):
    monkeypatch.setattr(verify, "_CASES", verify._CASES[:1])
    monkeypatch.setattr(attend, "tile_output", lambda p, *rest: p.new_full((), torch.nan))
    result = invoke("--device", "cpu", "--no-compiled", "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert (report["backend"], report["device"], report["passed"]) == ("aten", "cpu", False)
    assert [check["passed"] for check in report["checks"]] == [False, False]
    assert report["checks"][0]["output_error"] is None  # NaN is no JSON


def test_a_backend_that_raises_is_a_failed_check_and_the_others_go_on(few_checks, monkeypatch):
    right = attend.tile_scores

    def three_bits_break(q, tiles, config, dot):
        if config.key_bits == 3:
            raise RuntimeError("no such kernel\nmore lines")
        return right(q, tiles, config, dot)

    monkeypatch.setattr(attend, "tile_scores", three_bits_break)
    report = verify.run_checks("aten", "cpu", False, quiet())
    failed = {check.preset for check in report.checks if not check.passed}
    assert failed == {"k3v8_g32"}
    assert any(
        check.problem == "RuntimeError: no such kernel more lines" for check in report.checks
    )
    assert all(check.passed for check in report.checks if check.preset == "k4v4_g32")


def test_a_stored_bit_is_seen():
    config, head_dim = verify._CONFIGS[0], 64
    found, _ = filled_cache(config, [400], "cpu", head_dim=head_dim, max_cache_len=512)
    wanted, _ = filled_cache(config, [400], "cpu", head_dim=head_dim, max_cache_len=512)
    assert all(d == 0 for _, d in verify._stored_differences(found, wanted, config, head_dim))
    found.k_codes[0, 0, 0, 0, 0] ^= 1
    found.v_tail[0, 0, 0, 0] += 1
    found.k_token_scale[0, 0, 0, 0] = torch.nan
    different = {
        name for name, d in verify._stored_differences(found, wanted, config, head_dim)
        if not d <= 0
    }  # fmt: skip
    assert different == {"k_codes", "v_tail", "k_token_scale"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--backend", "fast"), "backend='fast' does not exist"),
        (("--device", "toaster"), "device 'toaster' cannot be used"),
    ],
)
def test_bad_options_are_one_sentence(arguments, words):
    error = invoke(*arguments).exception
    assert isinstance(error, BackendError)
    assert words in str(error)
    assert "\n" not in str(error)
