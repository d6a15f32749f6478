"""Teacher forcing, free running and the numbers that are computed from them."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers")

from kvarn_ops import KVarNConfig, UnsupportedModelError
from kvarn_ops.eval import scores
from kvarn_ops.eval.attention_error import attention_piece
from kvarn_ops.eval.cache import MethodCache
from kvarn_ops.eval.methods import METHODS
from kvarn_ops.eval.outliers import check_outliers, with_outliers
from kvarn_ops.eval.pieces import Case
from kvarn_ops.eval.protocols import Protocol, free_running, protocol, teacher_forced
from kvarn_ops.eval.text import DenseRun, text_piece
from tiny_models import SMALL, tiny_model

CONFIG = KVarNConfig.from_preset("k2v2_g32", **{k: v for k, v in SMALL.items() if k[0] == "n"})


def ids(rows=2, tokens=160, seed=0):
    return torch.randint(1, 96, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def nothing():
    return None


def text_scores(model, case, how, windows):
    return text_piece(case, DenseRun(lambda: model, windows, how), "", "").run(nothing)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.mark.parametrize("name", ["decode", "pseudo"])
@pytest.mark.parametrize("encoder", ["plus", "paper"])
def test_the_products_cache_gives_the_numbers_of_the_simulated_one(model, name, encoder):
    how = protocol(name, CONFIG, 8)
    method = METHODS[encoder]
    found = [
        text_scores(model, Case(method, "k2v2", CONFIG, packed), how, ids())
        for packed in (False, True)
    ]
    simulated, packed = found
    assert simulated["kl"].mean() > 1e-4, "nothing was quantized"
    for metric in ("kl", "delta_loss"):
        # A rounding difference may tip a code, rarely; means must agree.
        assert packed[metric].mean().item() == pytest.approx(
            simulated[metric].mean().item(), rel=0.03
        ), metric


@pytest.mark.parametrize("method", ["rtn", "turbo", "plus"])
def test_prefill_alone_shows_nothing(model, method):
    how = protocol("prefill", CONFIG, 8)
    found = text_scores(model, Case(METHODS[method], "k2v2", CONFIG), how, ids())
    assert found["kl"].abs().max() < 1e-5
    assert found["agreement"].min() == 1


def test_no_quantization_scores_zero_and_more_bits_score_better(model):
    how = protocol("decode", CONFIG, 1)

    def kl(method, preset="k2v2"):
        config = KVarNConfig.from_preset(f"{preset}_g32", num_sink_tokens=8)
        return text_scores(model, Case(METHODS[method], preset, config), how, ids())["kl"].mean()

    assert kl("none") < 1e-6
    assert kl("plus", "k8v8") < kl("plus", "k4v4") / 4 < kl("plus", "k2v2") / 16


def test_every_position_is_fed_once_and_scored_after_the_prefix():
    how = protocol("pseudo", CONFIG, 16)
    spans = how.spans(100)
    assert [i for span in spans for i in span] == list(range(100))
    assert spans[0] == range(how.prefix)
    assert {len(span) for span in spans[1:-1]} == {16}
    assert how.prefix < CONFIG.num_sink_tokens + CONFIG.group_size, "the prefix reads no tile"


def test_decode_and_prefill_give_the_logits_of_one_forward(model):
    tokens = ids(2, 50)
    whole = model(input_ids=tokens).logits
    for how in (Protocol("decode", 10, 1), Protocol("prefill", 0, 0)):
        cache = MethodCache(model.config, METHODS["none"], CONFIG)
        parts = [logits for _, logits in teacher_forced(model, cache, tokens, how)]
        assert torch.allclose(torch.cat(parts, 1), whole[:, how.prefix :], atol=1e-4)


def test_free_running_is_greedy_generate(model):
    prompt = ids(2, 20)
    cache = MethodCache(model.config, METHODS["none"], CONFIG)
    ours = free_running(model, cache, prompt, 30)
    theirs = model.generate(prompt, max_new_tokens=30, do_sample=False)
    assert torch.equal(ours, theirs[:, 20:])


@pytest.mark.parametrize("packed", [False, True], ids=["simulated", "packed"])
def test_left_padding_does_not_change_the_text(model, packed):
    case = Case(METHODS["plus"], "k2v2", CONFIG, packed)
    short, long = ids(1, 70, seed=3), ids(1, 90, seed=4)

    def alone(prompt):
        return case.run(model, 200, lambda cache: free_running(model, cache, prompt, 60))

    padded = torch.cat([torch.zeros(1, 20, dtype=torch.int64), short], dim=1)
    mask = torch.ones(2, 90, dtype=torch.int64)
    mask[0, :20] = 0
    both = case.run(
        model,
        200,
        lambda cache: free_running(model, cache, torch.cat([padded, long]), 60, mask),
        starts=[20, 0],
    )
    assert torch.equal(both[:1], alone(short))
    assert torch.equal(both[1:], alone(long))


def test_free_running_ends_when_all_rows_have_stopped(model):
    prompt = ids(2, 20)
    cache = MethodCache(model.config, METHODS["none"], CONFIG)
    full = free_running(model, cache, prompt, 40)
    stops = frozenset(full[:, 5].tolist())
    cache = MethodCache(model.config, METHODS["none"], CONFIG)
    cut = free_running(model, cache, prompt, 40, stop_ids=stops)
    assert cut.shape[1] <= 6
    assert torch.equal(cut, full[:, : cut.shape[1]])


def test_outliers_change_keys_and_values_but_not_the_function(model):
    changed = with_outliers(model, placement=3)
    before, after = (m(input_ids=ids(2, 60)) for m in (model, changed))
    assert torch.allclose(before.logits, after.logits, atol=1e-4)
    for kind in ("keys", "values"):
        pairs = zip(before.past_key_values.layers, after.past_key_values.layers, strict=True)
        for x, y in ((getattr(a, kind), getattr(b, kind)) for a, b in pairs):
            ratio = (y.square().sum((0, 2)) / x.square().sum((0, 2))).sqrt()  # [H_kv, D]
            count = {"keys": 6, "values": 3}[kind]
            assert ((ratio - 4).abs() < 0.01).sum(-1).tolist() == [count] * 2, kind
            assert ((ratio - 1).abs() < 0.01).sum(-1).tolist() == [32 - count] * 2, kind
    again, other = with_outliers(model, placement=3), with_outliers(model, placement=4)
    weights = [m.model.layers[0].self_attn.k_proj.weight for m in (changed, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("family", "words"), [("qwen3", "normalizes queries and keys"), ("gpt2", "has no q_proj")]
)
def test_models_that_cannot_carry_outliers_are_refused(family, words):
    with pytest.raises(UnsupportedModelError, match=words):
        check_outliers(tiny_model(family))


def test_a_model_that_outliers_would_change_is_refused():
    from transformers import StableLmConfig, StableLmForCausalLM

    shape = dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                 num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3)  # fmt: skip
    torch.manual_seed(0)
    model = StableLmForCausalLM(StableLmConfig(**shape)).eval()  # RoPE on a quarter of a head
    with pytest.raises(UnsupportedModelError, match="is another function with outlier channels"):
        check_outliers(model)
    check_outliers(tiny_model("llama"))


def test_errors_split_into_magnitude_and_direction():
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    y = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    scaled = scores.split_error(x, 1.5 * x)
    assert torch.allclose(scaled.magnitude, torch.full((5,), 0.25), atol=1e-5)
    assert scaled.direction.max() < 1e-5
    turned = scores.split_error(x, y * x.norm(dim=-1, keepdim=True) / y.norm(dim=-1, keepdim=True))
    assert turned.magnitude.max() < 1e-10
    both = scores.split_error(x, y)
    whole = (x - y).square().sum(-1) / x.square().sum(-1)
    assert torch.allclose(both.magnitude + both.direction, whole, rtol=1e-5)


def test_attention_errors_start_equal_and_accumulate(model):
    case = Case(METHODS["rtn"], "k2v2", CONFIG)
    how = protocol("pseudo", CONFIG, 8)
    found = attention_piece(case, lambda: model, ids(2, 160), how, "", "").run(nothing)
    static, own = (found[f"{kind}_direction"] for kind in ("static", "accumulated"))
    assert static.shape == own.shape == (2, 2, 160 - how.prefix)
    # Before a tile is read nothing is wrong; the first layer's input never carries errors.
    first = CONFIG.num_sink_tokens + CONFIG.group_size - how.prefix
    assert static[..., :first].max() < 1e-4
    assert torch.allclose(static[0], own[0], atol=1e-5)
    assert own[1, :, first:].mean() > static[1, :, first:].mean() > 1e-5
    assert model.config._attn_implementation == "sdpa", "the probe is gone"


def test_attention_errors_of_exact_storage_are_zero(model):
    case = Case(METHODS["none"], "-", CONFIG)
    how = protocol("decode", CONFIG, 1)
    found = attention_piece(case, lambda: model, ids(1, 100), how, "", "").run(nothing)
    assert found.pop("layers").tolist() == [0, 1]
    assert max(tensor.max().item() for tensor in found.values()) < 1e-5


def test_standard_errors():
    certain = scores.proportion(torch.ones(64, dtype=torch.bool))
    assert certain.value == 1
    assert 0.01 < certain.error < 0.03, "64 of 64 is not certainty"
    half = scores.proportion(torch.arange(100) % 2 == 0)
    assert half == pytest.approx((0.5, 0.05), abs=1e-3)
    rows = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    assert scores.mean_of_rows(rows) == pytest.approx((4.0, 2.0))
    assert math.isnan(scores.mean_of_rows(rows[:1]).error)
    parts = [scores.Mean(0.2, 0.03), scores.Mean(0.4, 0.04)]
    # 0.035 from the rows, 0.1 between the two placements.
    assert scores.mean_of_means(parts) == pytest.approx((0.3, math.hypot(0.035, 0.1)))
    assert math.isnan(scores.mean_of_means(parts[:1]).error)


def test_each_batch_is_compared_with_its_own_dense_run(model):
    how = protocol("pseudo", CONFIG, 16)
    runs = [DenseRun(lambda: model, ids(1, 100, seed), how) for seed in (1, 2)]
    first, second, again = (
        torch.cat([logits for _, logits in run.logits()], 1) for run in (*runs, runs[0])
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert [bool(run._kept) for run in runs] == [True, False], "one batch at a time is kept"
