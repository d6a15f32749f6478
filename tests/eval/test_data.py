"""How texts become tokens and windows, and what is measured on them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from kvarn_ops.errors import InputError
from kvarn_ops.eval import data, scores
from kvarn_ops.eval.codec import ByteCodec, load_codec


def test_windows_come_from_different_documents_and_do_not_overlap():
    documents = {"a": torch.arange(35), "b": torch.arange(100, 121), "c": torch.arange(5)}
    windows = data.cut_windows(documents, 10, 9)
    assert [(window.source, window.start) for window in windows] == [
        ("a", 10), ("b", 10), ("a", 0), ("b", 0), ("a", 20),
    ]  # fmt: skip
    assert all(len(window.ids) == 10 for window in windows)


def test_a_tokenizer_in_the_directory_is_used(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "<unk>": 1, "yes": 2, "no": 3}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", unk_token="<unk>")
    fast.save_pretrained(tmp_path)
    codec = load_codec(tmp_path, 4)
    ids = codec.encode(b"yes no yes")
    assert ids.tolist() == [2, 3, 2]
    assert codec.start(ids).tolist() == [0, 2, 3]
    assert codec.decode([0, 2, 3]) == "yes no"


def test_a_model_without_tokenizer_that_is_not_of_bytes_is_refused(tmp_path):
    with pytest.raises(InputError, match="no tokenizer"):
        load_codec(tmp_path, 32_000)


def test_bytes_survive_and_prompts_end_with_a_line():
    codec = ByteCodec()
    text = "one\ntwo äöü"
    ids = codec.encode(text.encode())
    assert codec.decode(ids.tolist()) == text
    assert codec.decode([256, *ids.tolist()]) == text
    assert codec.decode(codec.end(ids, 3).tolist()) == "one\n"
    assert len(codec.end(ids, 5)) == len(ids)


def test_kl_is_that_of_float64():
    dense, other = torch.randn(2, 5, 258) * 4
    p, q = dense.double().softmax(-1), other.double().softmax(-1)
    wanted = (p * (p / q).log()).sum(-1)
    assert torch.allclose(scores.kl_divergence(dense, other).double(), wanted, rtol=1e-5)
