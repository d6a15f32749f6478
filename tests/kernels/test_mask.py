"""`kvarn::attention` with a mask, by kernels against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernel_cases import make_problem, relative_error
from kvarn_ops.kernels.heuristics import attend_shape
from kvarn_ops.kernels.mask import MaskView

OUTPUT_ERROR = {torch.float32: 5e-4, torch.float16: 1e-3, torch.bfloat16: 8e-3}
TOKENS = 300

CASES = {
    # name: (preset, head_dim, lengths, queries, shape of the mask, dtype of the mask, options)
    "all_rows_alike": ("k4v2_g32", 64, [260, 33], 1, (1, 1, 1), torch.bool, {}),
    "per_row": ("k4v2_g32", 64, [260, 0, 90], 1, (3, 1, 1), torch.bool, {}),
    "per_head": ("k2v2_g32", 64, [200, 161], 1, (2, 4, 1), torch.bool, {}),
    "per_head_alone": ("k3v2_g32", 80, [180, 40], 1, (1, 3, 1), torch.float32, {"heads": (3, 1)}),
    "float": ("k4v2_g32", 64, [260, 33], 1, (2, 1, 1), torch.float32, {"softcap": 5.0}),
    "k8v8": ("k8v8_g32", 64, [200], 1, (1, 4, 1), torch.float16, {"dtype": torch.float16}),
    "g128": ("k4v2_g128", 128, [32 + 3 * 128 + 127, 160], 1, (2, 1, 1), torch.bfloat16,
             {"heads": (7, 1), "dtype": torch.bfloat16}),
    "draft": ("k4v2_g32", 64, [260, 0, 50], 5, (3, 1, 5), torch.bool, {"causal": False}),
    "draft_alike": ("k4v2_g32", 64, [260, 50], 5, (1, 1, 1), torch.float32, {}),
    "draft_full": ("k3v3_g32", 64, [200, 129], 5, (2, 4, 5), torch.float32, {"sink_logits": True}),
    "draft_causal": ("k4v4_g32", 64, [260, 70], 5, (2, 1, 5), torch.bool, {"softcap": 20.0}),
    "draft_window": ("k4v2_g32", 64, [260, 70], 5, (2, 1, 5), torch.bool, {"window": 70}),
    "heads_and_queries": ("k2v4_g32", 32, [200], 7, (1, 6, 7), torch.bfloat16,
                          {"heads": (6, 2), "dtype": torch.bfloat16, "causal": False}),
    "chunk": ("k4v2_g32", 64, [250, 40], 40, (1, 1, 40), torch.bool,
              {"causal": False, "tail_tokens": 40}),
    "no_sinks": ("k4v2_g32", 64, [159, 31, 0], 1, (3, 2, 1), torch.bool,
                 {"num_sink_tokens": 0, "heads": (2, 2)}),
}  # fmt: skip


def random_mask(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Half of the tokens hidden, and the others of a float mask raised or lowered."""
    generator = torch.Generator().manual_seed(2)
    shown = torch.rand(shape, generator=generator) < 0.5
    if dtype == torch.bool:
        return shown
    added = 2 * torch.randn(shape, generator=generator)
    return added.masked_fill(~shown, -torch.inf).to(dtype)


@pytest.mark.parametrize("name", CASES)
def test_masked_attention_equals_reference(name: str, device: torch.device) -> None:
    preset, head_dim, lengths, count, shape, dtype, options = CASES[name]
    problem = make_problem(preset, head_dim, lengths, count, device, **options)
    mask = random_mask((*shape, max(lengths) + 9), dtype).to(device)
    wanted, found = problem.attention("reference", mask), problem.attention("triton", mask)
    assert relative_error(found, wanted) < OUTPUT_ERROR[found.dtype]
    assert relative_error(problem.attention("reference"), wanted) > 0.1


@pytest.mark.parametrize("columns", [150, 20])
@pytest.mark.parametrize("name", ["per_row", "draft_full", "draft_causal"])
def test_masks_shorter_than_the_cache(name: str, columns: int, device: torch.device) -> None:
    """150 columns end within the tiles, 20 within the sinks: no later token is seen."""
    preset, head_dim, lengths, count, shape, dtype, options = CASES[name]
    problem = make_problem(preset, head_dim, lengths, count, device, **options)
    mask = random_mask((*shape, columns), dtype).to(device)
    wanted, found = problem.attention("reference", mask), problem.attention("triton", mask)
    assert relative_error(found, wanted) < OUTPUT_ERROR[found.dtype]


def test_cases_are_split(device: torch.device) -> None:
    """One query and a draft of two rows: several programs read tiles."""
    for rows in (2, 10):
        assert attend_shape(device, 4, rows, 19, 64, 64, 32, 4, 2).splits > 1


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_rows_of_which_all_is_hidden_are_zero(dtype: torch.dtype, device: torch.device) -> None:
    problem = make_problem("k4v2_g32", 64, [260, 100], 5, device, causal=False)
    mask = random_mask((2, 4, 5, TOKENS), dtype)
    hidden = False if dtype == torch.bool else -torch.inf
    mask[0, 1, 3] = hidden
    mask[1, :, 2, :100] = hidden  # what it shows lies beyond the row's length
    mask[1, 0, 0, :96] = hidden  # only the tail is left
    mask = mask.to(device)
    wanted, found = problem.attention("reference", mask), problem.attention("triton", mask)
    assert (found[0, 1, 3] == 0).all()
    assert (found[1, :, 2] == 0).all()
    assert relative_error(found, wanted) < OUTPUT_ERROR[torch.float32]


def test_nan_is_not_hidden_by_a_number(device: torch.device) -> None:
    problem = make_problem("k4v2_g32", 64, [200], 1, device)
    problem.q[0, 1] = torch.nan
    found = problem.attention("triton", torch.zeros(1, 1, 1, 200, device=device))
    assert found[0, 1].isnan().all()
    assert found[0, 2:].isfinite().all()


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_a_row_of_the_smallest_number_is_an_average(softcap: float, device: torch.device) -> None:
    """Masks of models hide with it; times log2(e) it would be -inf."""
    problem = make_problem("k4v2_g32", 64, [200], 1, device, softcap=softcap)
    mask = torch.full((1, 4, 1, 200), torch.finfo(torch.float32).min)
    mask[:, 1, :, 50:] = 0.0
    mask = mask.to(device)
    wanted, found = problem.attention("reference", mask), problem.attention("triton", mask)
    assert relative_error(found, wanted) < OUTPUT_ERROR[torch.float32]
    assert (wanted[:, 0] != 0).any()


VIEWS: dict[str, Any] = {
    "expanded": lambda mask: mask[:1, :1].expand(2, 4, -1, -1),
    "columns_alike": lambda mask: mask[..., :1].expand(-1, -1, -1, TOKENS),
    "columns_apart": lambda mask: mask.transpose(-1, -2).contiguous().transpose(-1, -2),
    "part": lambda mask: mask[..., 7:150],
    "every_second": lambda mask: mask[..., ::2],
    "one_column": lambda mask: mask[..., :1],
}


@pytest.mark.parametrize("name", VIEWS)
def test_masks_may_be_views(name: str, device: torch.device) -> None:
    dtype = torch.float32 if name in ("columns_apart", "part") else torch.bool
    problem = make_problem("k4v2_g32", 64, [200, 110], 2, device, causal=False)
    mask = random_mask((2, 4, 2, TOKENS), dtype).to(device)
    mask[..., 0] = True if dtype == torch.bool else 0.5
    view = VIEWS[name](mask)
    wanted, found = problem.attention("reference", view), problem.attention("triton", view)
    assert relative_error(found, wanted) < OUTPUT_ERROR[found.dtype]


def test_nothing_of_a_mask_is_copied() -> None:
    mask = torch.ones(1, 1, 1, 10, dtype=torch.bool).expand(4, 8, 3, -1)
    view = MaskView.of(mask)
    assert view.data is not None
    assert view.data.data_ptr() == mask.data_ptr()
    assert view.strides == (0, 0, 0)
    assert MaskView.of(torch.ones(2, 1, 1, 10)).strides == (10, 0, 0)


def test_an_overfull_row_stays_nan_and_no_other(device: torch.device) -> None:
    problem = make_problem("k4v2_g32", 64, [200, 100], 1, device)
    tiles = problem.cache.k_codes.shape[2]
    problem.cache.seq_lens[0] = 32 + 32 * tiles + 32
    for dtype in (torch.bool, torch.float32):
        found = problem.attention("triton", random_mask((2, 1, 1, 150), dtype).to(device))
        assert found[0].isnan().all()
        assert found[1].isfinite().all()


def test_queries_of_several_launches(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvarn_ops.kernels import launch

    problem = make_problem("k4v2_g32", 64, [200, 90], 9, device)
    mask = random_mask((2, 4, 9, 180), torch.bool).to(device)
    wanted = problem.attention("reference", mask)
    monkeypatch.setattr(launch, "_QUERIES_PER_LAUNCH", 4)
    assert relative_error(problem.attention("triton", mask), wanted) < OUTPUT_ERROR[torch.float32]
