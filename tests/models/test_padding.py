"""A row of a padded batch is the row alone: padding is dropped before anything is stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kvarn_ops
from kvarn_ops.hf.layer import KVarNLayer
from tiny_models import padded, random_ids, run, small_cache, tiny_model

LENGTHS = (75, 38, 111)
sides = pytest.mark.parametrize("side", ["left", "right"])


@pytest.fixture(scope="module")
def model() -> Any:
    return kvarn_ops.patch(tiny_model(), "k8v8_g32", num_sink_tokens=8)


def rows_of(lengths: tuple[int, ...]) -> list[Tensor]:
    return [random_ids(1, length, seed=length)[0] for length in lengths]


def layers_of(cache: Any) -> list[KVarNLayer]:
    return [layer for layer in cache.layers if isinstance(layer, KVarNLayer)]


def assert_rows_equal(batch: Any, row: int, alone: Any) -> None:
    """Stored tokens are equal: codes bit by bit but for ties, dense tokens to rounding."""
    for layer, other in zip(layers_of(batch), layers_of(alone), strict=True):
        length = int(other.tiles.seq_lens[0])
        assert int(layer.tiles.seq_lens[row]) == length, "padding was counted as a token"
        tiles = other.config.num_tiles(length)
        for name, one, two in zip(layer.tiles._fields, layer.tiles, other.tiles, strict=True):
            if name == "seq_lens":
                continue
            one, two = one[row], two[0]
            if name.endswith("codes"):
                wrong = (one[:, :tiles] != two[:, :tiles]).float().mean() if tiles else 0
                assert wrong <= 1e-3, f"{wrong:.1%} of the bytes of {name} differ"
            else:
                torch.testing.assert_close(
                    one, two, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
                )


@sides
def test_prefill_stores_and_answers_as_the_row_alone(model: Any, side: str) -> None:
    rows = rows_of(LENGTHS)
    ids, mask, positions = padded(rows, side)
    cache = small_cache(model)
    logits = run(model, ids, cache, attention_mask=mask, position_ids=positions)
    for index, row in enumerate(rows):
        alone = small_cache(model)
        wanted = run(model, row[None], alone)[0]
        found = logits[index][mask[index].bool()]
        assert (found - wanted).abs().max() < 1e-5, f"row {index}"
        assert_rows_equal(cache, index, alone)


@sides
def test_decode_after_padding_answers_as_the_row_alone(model: Any, side: str) -> None:
    rows = rows_of(LENGTHS)
    ids, mask, positions = padded(rows, side)
    cache = small_cache(model)
    run(model, ids, cache, attention_mask=mask, position_ids=positions)
    new = random_ids(len(rows), 40, seed=5)
    position = torch.tensor([[length] for length in LENGTHS])
    batch = []
    for step in range(new.shape[1]):  # every row finishes a tile, each at another step
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        token = new[:, step : step + 1]
        batch.append(run(model, token, cache, attention_mask=mask, position_ids=position + step))
    found = torch.cat(batch, dim=1)
    for index, row in enumerate(rows):
        alone = small_cache(model)
        run(model, row[None], alone)
        steps = [run(model, token.view(1, 1), alone) for token in new[index]]
        error = (found[index] - torch.cat(steps, dim=1)[0]).abs().max()
        assert error < 1e-3, f"row {index}: {error}"  # a rounding tie may fall the other way
        assert_rows_equal(cache, index, alone)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_generate_with_left_padding_continues_each_row_as_alone(family: str) -> None:
    model = kvarn_ops.patch(tiny_model(family), "k8v8_g32", num_sink_tokens=8)
    rows = rows_of((50, 37, 61))
    ids, mask, _ = padded(rows, "left")
    options = {
        "max_new_tokens": 40,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    batch = model.generate(ids, attention_mask=mask, **options)
    for index, row in enumerate(rows):
        alone = model.generate(row[None], attention_mask=torch.ones(1, len(row)), **options)
        for step, (found, wanted) in enumerate(zip(batch.logits, alone.logits, strict=True)):
            error = (found[index] - wanted[0]).abs().max()
            assert error < 1e-3, f"row {index}, step {step}: logits differ by {error}"
        # Logits as close as that give the same tokens, but for exact ties of a random model.
        agreement = (batch.sequences[index, 61:] == alone.sequences[0, len(row) :]).float().mean()
        assert agreement == 1.0


def test_rows_that_have_finished_do_not_disturb_the_others(model: Any) -> None:
    ids = random_ids(2, 45)
    options = {"max_new_tokens": 50, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    free = model.generate(ids, **options)
    eos = int(free[0, 47])  # the third new token of row 0 ends it
    assert eos not in free[1, 45:], "choose another seed: both rows end"
    ended = model.generate(ids, **options, eos_token_id=eos, pad_token_id=0)
    stop = 45 + free[0, 45:].tolist().index(eos) + 1
    assert torch.equal(ended[0, :stop], free[0, :stop])
    assert not ended[0, stop:].any(), "a finished row is not filled with padding"
    assert torch.equal(ended[1], free[1]), "a finished row changed its neighbour"


@sides
def test_a_row_of_padding_only_is_empty_and_finite(model: Any, side: str) -> None:
    rows = [*rows_of((60,)), torch.zeros(0, dtype=torch.int64)]
    ids, mask, positions = padded(rows, side)
    cache = small_cache(model)
    logits = run(model, ids, cache, attention_mask=mask, position_ids=positions)
    assert logits.isfinite().all()
    assert [int(layer.tiles.seq_lens[1]) for layer in layers_of(cache)] == [0, 0]
    alone = small_cache(model)
    wanted = run(model, rows[0][None], alone)[0]
    assert (logits[0] - wanted).abs().max() < 1e-5
    # With nothing to attend to, attention gives zeros: every position is the same token's answer.
    assert (logits[1] - logits[1, :1]).abs().max() < 1e-5
    step = run(model, torch.tensor([[5], [6]]), cache, position_ids=torch.tensor([[60], [0]]))
    assert (step[1] - run(model, torch.tensor([[6]]), small_cache(model))[0]).abs().max() < 1e-5


def test_sinks_are_the_first_real_tokens(model: Any) -> None:
    (row,) = rows_of((60,))
    caches = []
    for side, length in (("left", 100), ("right", 100), ("left", 60)):
        ids, mask, positions = padded([row], side, length)
        caches.append(small_cache(model))
        run(model, ids, caches[-1], attention_mask=mask, position_ids=positions)
    for cache in caches[:2]:
        for layer, other in zip(layers_of(cache), layers_of(caches[2]), strict=True):
            torch.testing.assert_close(layer.tiles.k_sink, other.tiles.k_sink, rtol=0, atol=1e-5)


def test_padding_in_the_middle_and_in_a_single_step_is_dropped(model: Any) -> None:
    (row,) = rows_of((70,))
    ids = torch.cat([row[:30], torch.zeros(7, dtype=torch.int64), row[30:]])[None]
    mask = torch.ones_like(ids)
    mask[:, 30:37] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cache, alone = small_cache(model), small_cache(model)
    run(model, ids[:, :36], cache, attention_mask=mask[:, :36], position_ids=positions[:, :36])
    run(model, ids[:, 36:37], cache, attention_mask=mask[:, :37], position_ids=positions[:, 36:37])
    found = run(model, ids[:, 37:], cache, attention_mask=mask, position_ids=positions[:, 37:])
    wanted = run(model, row[None], alone)[:, 30:]
    assert [int(layer.tiles.seq_lens[0]) for layer in layers_of(cache)] == [70, 70]
    assert (found - wanted).abs().max() < 1e-4
