"""One family, patched, against the same model unpatched: a step of `model_families.py`."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from tiny_families import VOCAB, WINDOW, build
from torch import Tensor
from transformers import CONFIG_MAPPING, DynamicCache, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

import kvarn_ops
from kvarn_ops.errors import KVarNError, UnsupportedModelError

# 8 bits and tiles of 32 tokens: errors of the format are small, and several tiles fill.
PRESET, SINKS = "k8v8_g32", 8
FIRST_TILE = SINKS + 32
# Prefill, single tokens (which cross the window), a chunk on top of the cache, single tokens.
SCHEDULE = (20, *[1] * 24, 32, *[1] * 24)
# Until the first tile is full the cache is exact: only the order of float32 sums differs.
EXACT, CLOSE = 2e-5, 0.05
NEAR_TIE = 0.1

assert SCHEDULE[0] < WINDOW < SCHEDULE[0] + 24


@dataclass
class Outcome:
    """What the sweep says about a family; `note` is the reason or the sentence of the refusal."""

    family: str
    outcome: str
    packed: int = 0
    dense: int = 0
    error_exact: float = 0.0
    error_packed: float = 0.0
    note: str = ""


@torch.no_grad()
def check(family: str) -> Outcome:
    """Build, patch, compare, unpatch."""
    try:
        dense = build(family)
    except Exception as error:
        return Outcome(family, "not built", note=_one_line(error))
    ids = torch.randint(2, VOCAB - 2, (2, sum(SCHEDULE)), generator=torch.manual_seed(0))
    assert isinstance(dense, PreTrainedModel)
    model = copy.deepcopy(dense)
    try:
        kvarn_ops.patch(model, PRESET, num_sink_tokens=SINKS)
    except UnsupportedModelError as error:
        return Outcome(family, "refused", note=_one_line(error, name=False))
    layers = kvarn_ops.explain(model).layers
    packed = sum(layer.packed for layer in layers)
    found = Outcome(family, "works" if packed else "dense by design", packed, len(layers) - packed)
    found.note = _remark(family) if packed else _kinds(layers)
    try:
        wanted = _stepwise(dense, ids, DynamicCache(config=dense.config))
        before = dense(ids, use_cache=False).logits
        text = _greedy(dense, ids)
    except Exception as error:
        return Outcome(family, "not built", note=f"unpatched it fails too: {_one_line(error)}")
    try:
        _compare(found, model, ids, wanted, before, text)
    except UnsupportedModelError as error:
        found.outcome, found.note = "refused", f"at the first forward: {_one_line(error, False)}"
    except Exception as error:  # whatever it is, it belongs into the table
        kind = "WRONG" if isinstance(error, AssertionError) else "CRASH"
        found.outcome, found.note = kind, _one_line(error)
    return found


def _compare(
    found: Outcome, model: Any, ids: Tensor, wanted: Tensor, before: Tensor, text: list[Tensor]
) -> None:
    assert torch.equal(model(ids, use_cache=False).logits, before), "without a cache it differs"
    stock = _stepwise(model, ids, DynamicCache(config=model.config))
    assert torch.equal(stock, wanted), "with a DynamicCache it differs from the unpatched model"
    cache = kvarn_ops.KVarNCache(model.config, ids.shape[1] + 8, PRESET, num_sink_tokens=SINKS)
    logits = _stepwise(model, ids, cache)
    found.error_exact = _relative(logits[:, :FIRST_TILE], wanted[:, :FIRST_TILE])
    found.error_packed = _relative(logits[:, FIRST_TILE:], wanted[:, FIRST_TILE:])
    assert found.error_exact < EXACT, f"wrong by {found.error_exact:.1%} before tiles are packed"
    assert found.error_packed < CLOSE, f"wrong by {found.error_packed:.1%} with 8-bit tiles"
    if found.packed:
        assert found.error_packed > 1e-6, "nothing was read from tiles"
    for layer, state in zip(kvarn_ops.explain(model).layers, cache.layers, strict=True):
        if layer.packed:
            heads, width = state.tiles.k_tail.shape[1], state.tiles.k_tail.shape[-1]
            promised = cache.kvarn_config.bytes_per_token(width, heads)
            assert layer.bytes_per_token == promised, "another size than explain says"
    _compare_text(_greedy(model, ids), text)
    kvarn_ops.unpatch(model)
    assert torch.equal(model(ids, use_cache=False).logits, before), "unpatched it differs"


def _greedy(model: Any, ids: Tensor) -> list[Tensor]:
    """Logits `[rows, vocab]` of every step of generate, on a left-padded batch."""
    ids = ids[:, :60].clone()
    mask = torch.ones_like(ids)
    ids[1, :13], mask[1, :13] = 0, 0
    options = {"max_new_tokens": 20, "do_sample": False, "attention_mask": mask}
    options |= {"return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}
    return list(model.generate(ids, **options).logits)


def _compare_text(found: list[Tensor], wanted: list[Tensor]) -> None:
    """Until the first near tie, after which the texts are about different things."""
    for row in range(len(wanted[0])):
        for step, (one, other) in enumerate(zip(found, wanted, strict=True)):
            one, other = one[row].float(), other[row].float()
            error, limit = _relative(one, other), EXACT if step == 0 else CLOSE
            assert error < limit, f"generate: row {row}, step {step}: wrong by {error:.1%}"
            if one.argmax() != other.argmax():
                best = other.topk(2).values
                gap = (best[0] - best[1]) / other.std()
                assert gap < NEAR_TIE, f"generate: row {row}, step {step}: other token, no near tie"
                break


def _stepwise(model: Any, ids: Tensor, cache: Any) -> Tensor:
    logits, start = [], 0
    for count in SCHEDULE:
        chunk = ids[:, start : start + count]
        logits.append(model(chunk, past_key_values=cache, use_cache=True).logits)
        start += count
    return torch.cat(logits, dim=1)


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / (wanted - wanted.mean()).norm())


def _remark(family: str) -> str:
    """What of the family works, if it is not what its checkpoints are."""
    config = CONFIG_MAPPING[family.split(",")[0]]()
    if getattr(config, "is_encoder_decoder", False):
        return "its decoder alone"
    encoder = family in MODEL_FOR_MASKED_LM_MAPPING_NAMES and hasattr(config, "is_decoder")
    return "with is_decoder=True" if encoder else ""


def _kinds(layers: tuple[Any, ...]) -> str:
    kinds = dict.fromkeys(layer.reason for layer in layers)
    return "; ".join(kinds)


def _one_line(error: Exception, name: bool = True) -> str:
    text = " ".join(str(error).split())[:400]
    return f"{type(error).__name__}: {text}" if name and not isinstance(error, KVarNError) else text
