"""The decode step by kernels against the reference: outputs, and what is stored afterwards."""

from __future__ import annotations

import pytest
import torch

from kernel_cases import CODES, DENSE, make_problem, relative_error, share_of_different
from kvarn_ops.errors import CacheError, InputError
from kvarn_ops.ops import validate
from kvarn_ops.ops.samples import sample_inputs
from kvarn_ops.ops.validate import check_for_kernels

# fp32 queries leave the error of fp16 operands inside the kernel; others round the output too.
OUTPUT_ERROR = {torch.float32: 5e-4, torch.float16: 1e-3, torch.bfloat16: 8e-3}
TIES = 1e-4

CASES = {
    # name: (preset, head_dim, lengths, new tokens, options)
    "one_token": ("k4v2_g32", 64, [260, 0, 33], 1, {}),
    "k2v2": ("k2v2_g32", 64, [200, 31, 161], 1, {"dtype": torch.bfloat16}),
    "k3v3": ("k3v3_g32", 64, [200, 63, 95], 1, {"dtype": torch.float16}),
    "k8v8": ("k8v8_g32", 64, [200, 127], 1, {}),
    "k3v2_d80": ("k3v2_g32", 80, [180, 40], 1, {"heads": (3, 1)}),
    "d32_mha": ("k2v4_g32", 32, [200, 40], 1, {"heads": (2, 2)}),
    "d192_mqa": ("k4v4_g32", 192, [160], 1, {"heads": (12, 1)}),
    "d576": ("k4v2_g32", 576, [130], 1, {"heads": (5, 1), "dtype": torch.bfloat16}),
    "g128": ("k4v2_g128", 128, [32 + 3 * 128 + 127, 32 + 127], 1, {"heads": (7, 1)}),
    "g64_paper": ("k4v4_g64", 64, [32 + 191, 300], 1, {"encoder": "paper"}),
    "capped_and_sinks": ("k4v2_g32", 64, [200, 0], 1, {"softcap": 5.0, "sink_logits": True}),
    "long_tail": ("k4v2_g32", 64, [250, 95, 70], 1, {"tail_tokens": 40}),
    "no_sinks": ("k4v2_g32", 64, [159, 31, 0], 1, {"num_sink_tokens": 0}),
    "draft": ("k4v2_g32", 64, [200, 0, 50], 5, {"heads": (6, 2)}),
    "chunk": ("k2v2_g32", 64, [200, 3], 70, {"softcap": 20.0}),
    "chunk_of_all": ("k4v2_g64", 96, [100, 0], 90, {"causal": False, "sink_logits": True}),
    "window": ("k4v2_g32", 64, [250, 0, 90], 1, {"window": 70}),
    "window_of_the_tail": ("k4v2_g32", 64, [250, 100], 5, {"window": 3}),
    "window_and_chunk": ("k2v2_g32", 64, [200, 20], 60, {"window": 45, "tail_tokens": 10}),
    "unrotated": ("k4v2_g32", 64, [150], 33, {"rotate_keys": False, "rotate_values": False}),
}


@pytest.mark.parametrize("name", CASES)
def test_step_equals_reference(name: str, device: torch.device) -> None:
    preset, head_dim, lengths, count, options = CASES[name]
    problem = make_problem(preset, head_dim, lengths, count, device, **options)
    wanted, cache = problem.step("reference")
    found, kernel_cache = problem.step("triton")
    assert relative_error(found, wanted) < OUTPUT_ERROR[found.dtype]
    for field in DENSE:
        assert share_of_different(getattr(kernel_cache, field), getattr(cache, field)) == 0, field
    for field in CODES:
        different = share_of_different(getattr(kernel_cache, field), getattr(cache, field))
        assert different <= TIES, field


@pytest.mark.parametrize("window", [0, 40])
def test_padding_is_dropped(window: int, device: torch.device) -> None:
    valid = torch.ones(3, 50, dtype=torch.bool)
    valid[0, :30] = False
    valid[1] = False
    valid[2, 1::3] = False
    problem = make_problem("k4v2_g32", 64, [120, 50, 0], 50, device, valid=valid, window=window)
    wanted, cache = problem.step("reference")
    found, kernel_cache = problem.step("triton")
    assert kernel_cache.seq_lens.tolist() == [140, 50, 33]
    assert relative_error(found, wanted) < OUTPUT_ERROR[torch.float32]
    for field in (*DENSE, *CODES):
        assert share_of_different(getattr(kernel_cache, field), getattr(cache, field)) <= TIES


def test_rows_that_see_nothing_are_zero(device: torch.device) -> None:
    valid = torch.zeros(2, 3, dtype=torch.bool)
    problem = make_problem("k4v2_g32", 64, [0, 200], 3, device, valid=valid)
    out, _ = problem.step("triton")
    assert (out[0] == 0).all()
    assert out[1].isfinite().all()
    assert (out[1] != 0).any()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("count", [1, 40])
def test_attention_over_the_cache_alone(causal: bool, count: int, device: torch.device) -> None:
    window = 100 if causal else 0
    problem = make_problem(
        "k4v2_g32", 64, [230, 12, 0], count, device, causal=causal, window=window
    )
    wanted, found = problem.attention("reference"), problem.attention("triton")
    assert relative_error(found, wanted) < OUTPUT_ERROR[torch.float32]
    assert (found[2] == 0).all()


def test_rows_do_not_depend_on_the_batch(device: torch.device) -> None:
    """Other rows change the number of splits, which may change rounding only."""
    together = make_problem("k4v2_g32", 64, [300, 40, 150], 1, device)
    out, cache = together.step("triton")
    for row in range(3):
        alone = together._replace(
            cache=type(cache)(*(x[row : row + 1] for x in together.cache)),
            q=together.q[row : row + 1],
            k=together.k[row : row + 1],
            v=together.v[row : row + 1],
        )
        found, own = alone.step("triton")
        torch.testing.assert_close(found[0], out[row], rtol=1e-3, atol=1e-4)
        for field in CODES:
            assert torch.equal(getattr(own, field)[0], getattr(cache, field)[row]), field


def test_shared_tiles(device: torch.device) -> None:
    own = make_problem("k4v2_g32", 64, [100, 60, 40, 33], 1, device)
    donor = make_problem("k4v2_g32", 64, [200, 230], 1, device).cache
    shared = donor.tiles(0, 4)
    arguments = (
        own.q, own.k, own.v, None, *shared, *own.cache, own.rotation, None, 0.125, 0.0, True,
        own.config.to_string(),
    )  # fmt: skip
    wanted, *cache = torch.ops.kvarn.step_shared(*arguments, "reference")
    found, *kernel_cache = torch.ops.kvarn.step_shared(*arguments, "triton")
    assert relative_error(found, wanted) < OUTPUT_ERROR[torch.float32]
    assert all(share_of_different(a, b) == 0 for a, b in zip(kernel_cache, cache, strict=True))


def test_token_beyond_the_capacity(device: torch.device) -> None:
    problem = make_problem("k4v2_g32", 64, [200, 40], 1, device)
    tiles = problem.cache.k_codes.shape[2]
    full = 32 + 32 * tiles + 31
    problem.cache.seq_lens[0] = full
    if device.type == "cpu":
        with pytest.raises(CacheError, match="full"):
            problem.step("triton")
        return
    found, cache = problem.step("triton")
    assert found[0].isnan().all()
    assert found[1].isfinite().all()
    for field in CODES:
        assert torch.equal(getattr(cache, field), getattr(problem.cache, field)), field


def test_offloaded_tiles_are_refused(device: torch.device) -> None:
    problem = make_problem("k4v2_g32", 64, [100], 1, device)
    moved = {name: getattr(problem.cache, name).to("meta") for name in CODES}
    cache = problem.cache._replace(**moved)
    with pytest.raises(InputError, match="offloaded"):
        check_for_kernels(cache, problem.k, problem.v, problem.config)


@pytest.mark.parametrize("name", ["append_", "attention", "step_"])
def test_ops_pass_opcheck(name: str, device: torch.device) -> None:
    op = getattr(torch.ops.kvarn, name).default
    samples = list(sample_inputs(name, device))
    for args, kwargs in samples if device.type == "cuda" else samples[:1]:  # slow if interpreted
        changed = ("triton" if isinstance(x, str) and x == "aten" else x for x in args)
        torch.library.opcheck(op, tuple(changed), kwargs)


def test_inputs_may_be_views(device: torch.device) -> None:
    """Kernels address contiguous memory: masks, logits and rotations that are not give the same."""
    valid = torch.ones(40, 2, dtype=torch.bool).t()
    valid[0, :25] = False
    problem = make_problem("k4v2_g32", 64, [100, 40], 40, device, valid=valid, sink_logits=True)
    wanted, cache = problem.step("triton")
    logits = torch.stack([problem.sink_logits, problem.sink_logits + 9], dim=1)
    views = problem._replace(
        valid=problem.valid.t().contiguous().t(),
        sink_logits=logits[:, 0],
        rotation=problem.rotation.t().contiguous().t(),
        q=problem.q.transpose(1, 2).contiguous().transpose(1, 2),
        k=problem.k.transpose(1, 2).contiguous().transpose(1, 2),
    )
    assert not views.valid.is_contiguous()
    found, view_cache = views.step("triton")
    assert torch.equal(found, wanted)
    for field in (*DENSE, *CODES):
        assert share_of_different(getattr(view_cache, field), getattr(cache, field)) == 0, field


def test_queries_of_another_dtype(device: torch.device) -> None:
    problem = make_problem("k4v2_g32", 64, [100], 1, device, dtype=torch.float16)
    problem = problem._replace(q=problem.q.float())
    wanted, found = problem.step("reference")[0], problem.step("triton")[0]
    assert found.dtype == torch.float32
    assert relative_error(found, wanted) < OUTPUT_ERROR[torch.float16]


def test_no_queries(device: torch.device) -> None:
    problem = make_problem("k4v2_g32", 64, [100], 0, device)
    out, cache = problem.step("triton")
    assert out.shape == problem.q.shape
    assert cache.seq_lens.tolist() == [100]


@pytest.mark.parametrize("window", [0, 8])
def test_outputs_of_an_overfull_cache_are_nan(
    window: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing may wait for the device, as in a captured graph, no check raises."""
    monkeypatch.setattr(validate, "waits", lambda cache, tokens: False)
    problem = make_problem("k4v2_g32", 64, [200, 40], 1, device, window=window)
    tiles = problem.cache.k_codes.shape[2]
    problem.cache.seq_lens[0] = 32 + 32 * tiles + 31
    found, cache = problem.step("triton")
    assert found[0].isnan().all()
    assert found[1].isfinite().all()
    assert problem._replace(cache=cache).attention("triton")[0].isnan().all()


def test_part_of_a_cache_is_refused(device: torch.device) -> None:
    problem = make_problem("k4v2_g32", 64, [100, 50], 1, device)
    part = problem.cache._replace(k_codes=problem.cache.k_codes[:, :, 1:])
    with pytest.raises(InputError, match="k_codes is not contiguous"):
        problem._replace(cache=part).attention("triton")
    with pytest.raises(InputError, match="k_codes is not contiguous"):
        torch.ops.kvarn.append_(
            problem.k, problem.v, None, *part, problem.rotation, problem.config.to_string(),
            "triton",
        )  # fmt: skip


@pytest.mark.parametrize("scale", [0.0, -0.1])
def test_scale_must_be_positive(scale: float, device: torch.device) -> None:
    problem = make_problem("k4v2_g32", 64, [100], 1, device)
    rest = (problem.rotation, None, scale, 0.0, True, problem.config.to_string(), "triton")
    with pytest.raises(InputError, match="positive"):
        torch.ops.kvarn.attention(problem.q, *problem.cache, *rest)
    with pytest.raises(InputError, match="positive"):
        torch.ops.kvarn.step(problem.q, problem.k, problem.v, None, *problem.cache, *rest)
