"""Every way of calling `generate` on a patched model: against the dense model, or done by hand."""

from __future__ import annotations

import io
import threading
from contextlib import redirect_stdout
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

import kvarn_ops
from tiny_models import PAD, patched, random_ids, small_cache, teacher_forced, tiny_model
from tiny_tokenizers import word_tokenizer

GREEDY = {"max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True}


@pytest.fixture(scope="module")
def dense() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def model() -> Any:
    return patched()


# Strategies

STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
    "several samples": {"do_sample": True, "num_return_sequences": 3, "top_k": 20},
    "beams": {"num_beams": 3},
    "prefill in chunks": {"prefill_chunk_size": 33},
}


NEEDS = {
    "prefill in chunks": pytest.mark.transformers("5.17", "generate refuses chunked prefill there")
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=NEEDS.get(name, ())) for name in STRATEGIES]
)
def test_a_strategy_gives_the_dense_text(name: str, model: Any, dense: Any) -> None:
    options = GREEDY | STRATEGIES[name]
    found, wanted = [], []
    for one, texts in ((model, found), (dense, wanted)):
        torch.manual_seed(0)
        texts.append(one.generate(random_ids(2, 60), **options))
    cache = found[0].past_key_values
    assert isinstance(cache, kvarn_ops.KVarNCache)
    assert cache.layers[0].config.num_tiles(int(cache.layers[0].tiles.seq_lens[0])) == 2
    assert torch.equal(found[0].sequences, wanted[0].sequences)
    assert isinstance(wanted[0].past_key_values, DynamicCache)


@pytest.mark.parametrize(
    "options",
    [
        {"num_return_sequences": 3, "length_penalty": 0.5},
        {"do_sample": True, "num_return_sequences": 2},
        {"early_stopping": True, "eos_token_id": 80},
    ],
    ids=["several", "sampled", "early end"],
)
def test_the_score_of_a_beam_is_that_of_its_text(options: dict[str, Any], model: Any) -> None:
    """Computed from scratch: rows of text and rows of the cache were never mixed up."""
    options = {"num_beams": 4, "output_scores": True, "early_stopping": False} | options
    out = model.generate(random_ids(2, 60), **GREEDY | options)
    assert len({tuple(text) for text in out.sequences.tolist()}) == len(out.sequences)
    for text, score in zip(out.sequences, out.sequences_scores, strict=True):
        if (end := options.get("eos_token_id", -1)) in text[60:]:
            text = text[: 61 + text[60:].tolist().index(end)]
        logits = teacher_forced(model, text[None, :-1], small_cache(model), 60)[0, 59:]
        total = logits.log_softmax(-1).gather(1, text[60:, None]).sum()
        wanted = total / (len(text) - 60) ** options.get("length_penalty", 1.0)
        assert abs(float(wanted - score)) < 1e-4


def test_coarse_codes_give_another_text(dense: Any) -> None:
    """The comparison above can fail: two bits do change this text."""
    coarse = patched(preset="k2v2_g32").generate(random_ids(2, 60), **GREEDY).sequences
    assert not torch.equal(coarse, dense.generate(random_ids(2, 60), **GREEDY).sequences)


def test_what_is_returned_is_what_the_model_computed(model: Any) -> None:
    ids = random_ids(2, 60)
    out = model.generate(
        ids, output_logits=True, output_scores=True, output_hidden_states=True, **GREEDY
    )
    logits = teacher_forced(model, out.sequences[:, :-1], small_cache(model), 60)[:, 59:]
    for found in (out.logits, out.scores):
        assert (torch.stack(found, dim=1) - logits).abs().max() < 1e-5
    assert torch.equal(out.sequences[:, 60:], logits.argmax(-1))
    assert [len(step) for step in out.hidden_states] == [3] * 30


@pytest.mark.parametrize("with_ids", [False, True])
def test_embeddings_as_prompt(model: Any, with_ids: bool) -> None:
    ids = random_ids(2, 60)
    embeddings = model.get_input_embeddings()(ids)
    prompt = {"input_ids": ids} if with_ids else {}
    out = model.generate(inputs_embeds=embeddings, **prompt, **GREEDY)
    assert isinstance(out.past_key_values, kvarn_ops.KVarNCache)
    wanted = model.generate(ids, **GREEDY).sequences
    assert torch.equal(out.sequences, wanted if with_ids else wanted[:, 60:])


def test_guidance_runs_its_second_pass_dense(model: Any, dense: Any) -> None:
    """Without a prompt of its own the second pass begins at the last token: no tile to pack."""
    options = GREEDY | {"guidance_scale": 1.5, "output_scores": True, "max_new_tokens": 2}
    out = model.generate(random_ids(2, 60), **options)
    assert isinstance(out.past_key_values, kvarn_ops.KVarNCache)
    wanted = dense.generate(random_ids(2, 60), **options)
    assert torch.equal(out.sequences, wanted.sequences)
    assert (out.scores[1] - wanted.scores[1]).abs().max() < 0.02


@pytest.mark.parametrize(
    "options",
    [
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "low"},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"num_beams": 4, "force_words_ids": [[5]]},
    ],
    ids=["contrastive", "dola", "group beams", "constrained beams"],
)
def test_strategies_that_left_transformers_say_so(model: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="transformers-community"):
        model.generate(random_ids(1, 20), max_new_tokens=2, **options)


def contrastive_search(
    model: Any, input_ids: Tensor, generation_config: Any, **kwargs: Any
) -> tuple[Any, Tensor]:
    """Of the best 4 next tokens the one whose state is least like the others: it repeats, crops
    and selects rows of the cache in every step, as the strategy on the hub does."""
    cache = kwargs["past_key_values"]

    def states(ids: Tensor) -> Any:
        return model(ids, past_key_values=cache, use_cache=True, output_hidden_states=True)

    out = states(input_ids)
    context = out.hidden_states[-1]
    for _ in range(generation_config.max_new_tokens):
        chances, tokens = out.logits[:, -1].softmax(-1).topk(4)
        cache.batch_repeat_interleave(4)
        tried = states(tokens.view(-1, 1)).hidden_states[-1]
        likeness = torch.cosine_similarity(context.repeat_interleave(4, 0), tried, dim=-1).amax(1)
        best = (0.4 * chances - 0.6 * likeness.view(-1, 4)).argmax(-1)
        cache.crop(-1)
        cache.batch_select_indices(torch.arange(len(best)) * 4 + best)
        chosen = tokens.gather(1, best[:, None])
        input_ids = torch.cat([input_ids, chosen], dim=1)
        out = states(chosen)
        context = torch.cat([context, out.hidden_states[-1]], dim=1)
    return cache, input_ids


@pytest.mark.transformers("5.17", "generate makes no dense cache for such strategies there")
def test_a_strategy_of_the_user_gets_a_cache_that_it_can_rearrange(dense: Any) -> None:
    model = patched(tail_tokens=1)
    found = [
        one.generate(
            random_ids(2, 60, seed=1), max_new_tokens=25, custom_generate=contrastive_search
        )
        for one in (model, dense)
    ]
    assert isinstance(found[0][0], kvarn_ops.KVarNCache)
    assert torch.equal(found[0][1], found[1][1])
    greedy = dense.generate(random_ids(2, 60), max_new_tokens=25, do_sample=False)
    assert not torch.equal(greedy, found[0][1]), "the strategy does nothing"


# Stopping and streaming


class StopAt(StoppingCriteria):
    def __init__(self, lengths: list[int]) -> None:
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return input_ids.shape[1] >= self.lengths


def test_rows_that_stop_early_leave_the_others_alone(model: Any) -> None:
    ids = random_ids(3, 60)
    wanted = model.generate(ids, **GREEDY).sequences
    ends, unused = [65, 80, 72], next(i for i in range(2, 96) if i not in wanted)
    stop = StoppingCriteriaList([StopAt(ends)])
    found = model.generate(ids, stopping_criteria=stop, eos_token_id=unused, **GREEDY).sequences
    assert found.shape == (3, 80), "generation went on after every row had stopped"
    for row, end in enumerate(ends):
        assert torch.equal(found[row, :end], wanted[row, :end])
        assert (found[row, end:] == PAD).all()


def test_streamers_see_the_text_as_it_is_made(model: Any) -> None:
    tokenizer, ids = word_tokenizer(), random_ids(1, 60)
    wanted = tokenizer.decode(model.generate(ids, **GREEDY).sequences[0, 60:])
    with redirect_stdout(io.StringIO()) as printed:
        model.generate(ids, streamer=TextStreamer(tokenizer, skip_prompt=True), **GREEDY)
    assert printed.getvalue().split() == wanted.split()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    options = GREEDY | {"streamer": streamer}
    thread = threading.Thread(target=model.generate, args=(ids,), kwargs=options)
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert len(pieces) > 5, "the text came at once"
    assert "".join(pieces).split() == wanted.split()


def test_pipeline(model: Any, dense: Any) -> None:
    prompts = [" ".join(f"w{i % 90}" for i in range(count)) for count in (70, 45)]
    texts = []
    for one in (model, dense):
        generator = pipeline("text-generation", model=one, tokenizer=word_tokenizer())
        options = {"max_new_tokens": 20, "do_sample": False, "return_full_text": False}
        texts.append(generator(prompts, batch_size=2, **options))
    assert texts[0] == texts[1]
    assert len(texts[0][0][0]["generated_text"].split()) > 5
