"""`kvarn-ops inspect`: its numbers are those that a real cache then measures."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, DeepseekV3Config, Qwen3NextConfig, StaticCache
from typer.testing import CliRunner

import kvarn_ops
from kvarn_ops import cli
from kvarn_ops.errors import InputError
from kvarn_ops.hf import capacity, footprint, model_dir
from tiny_models import FAMILIES, random_ids, run, storages_of, tiny_model

pytestmark = pytest.mark.transformers("5.17", "models do not run on the meta device there")

QWEN3_NEXT = Qwen3NextConfig(
    vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=4, head_dim=32,
    num_attention_heads=4, num_key_value_heads=2, linear_num_value_heads=2,
    linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16, num_experts=2,
    num_experts_per_tok=1, moe_intermediate_size=32, shared_expert_intermediate_size=32,
)  # fmt: skip


def directory_of(config, folder, **fields):
    config.save_pretrained(folder)
    path = folder / "config.json"
    known = {"dtype": "float32"} | json.loads(path.read_text())
    path.write_text(json.dumps(known | fields))
    return folder


def command(*arguments):
    result = CliRunner().invoke(cli.app, ["inspect", *map(str, arguments)])
    if isinstance(result.exception, Exception) and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def sizes(directory, preset, contexts, batch):
    """What inspect promises: `{context: (dense, kvarn)}`."""
    found = {}
    for context in contexts:
        dense, kvarn = capacity.examine(directory, preset, context=context, batch=batch).sizes
        found[context] = dense.bytes_at_context[context], kvarn.bytes_at_context[context]
    return found


def measured(model, preset, context, batch):
    """What real caches hold after a forward."""
    ids = random_ids(batch, min(context, 3))
    dense = StaticCache(config=model.config, max_cache_len=context)
    run(model, ids, dense)
    with kvarn_ops.patched(model, preset):
        packed = kvarn_ops.KVarNCache(model.config, context, preset)
        run(model, ids, packed)
    total = packed.memory()["total"]
    assert total == sum(storages_of(packed).values())
    return sum(storages_of(dense).values()), total


@pytest.mark.parametrize("family", FAMILIES)
def test_promised_bytes_are_the_measured_ones(family, tmp_path):
    model = tiny_model(family)
    directory = directory_of(model.config, tmp_path)
    for preset, batch in (("k4v2", 1), ("k3v8_g32", 3)):
        contexts = (5, 200, 1000)
        wanted = {n: measured(model, preset, n, batch) for n in contexts}
        assert sizes(directory, preset, contexts, batch) == wanted, (preset, batch)


def test_linear_layers_are_counted_as_they_are(tmp_path):
    from transformers import Qwen3NextForCausalLM

    model = Qwen3NextForCausalLM(QWEN3_NEXT).eval()
    directory = directory_of(QWEN3_NEXT, tmp_path)
    assert sizes(directory, "k2v2", (600,), 2) == {600: measured(model, "k2v2", 600, 2)}


def test_half_precision_models_and_the_dtype_option(tmp_path):
    model = tiny_model("llama").to(torch.bfloat16)
    directory = directory_of(model.config, tmp_path, dtype="bfloat16")
    wanted = measured(model, "k4v2", 300, 1)
    assert sizes(directory, "k4v2", (300,), 1) == {300: wanted}
    as_fp32 = capacity.examine(directory, "k4v2", context=300, dtype="fp32").sizes[1]
    assert as_fp32.bytes_at_context[300] == measured(model.float(), "k4v2", 300, 1)[1]


def test_the_largest_context_fits_and_one_more_does_not(tmp_path):
    model = tiny_model("gemma2")
    shapes = footprint.layer_shapes(model.to("meta"))
    config = kvarn_ops.KVarNConfig.from_preset("k4v2")
    sizes_of = footprint.Footprint(shapes, [1, 3], config, torch.float32)
    for size in (sizes_of.dense, sizes_of.kvarn):
        budget = 30_000_000
        most = footprint.tokens_that_fit(size, budget)
        assert size(most) <= budget < size(most + 1)
    assert footprint.tokens_that_fit(sizes_of.kvarn, 1000) == 0
    assert footprint.tokens_that_fit(lambda context: 10, 1000) is None


@pytest.mark.parametrize("preset", ["k4v2", "k8v8_g32", "k2v2_g64"])
def test_break_even_is_where_it_becomes_and_stays_smaller(preset, tmp_path):
    model = tiny_model("qwen3").to("meta")
    config = kvarn_ops.KVarNConfig.from_preset(preset)
    sizes_of = footprint.Footprint(footprint.layer_shapes(model), [0, 1], config, torch.bfloat16)
    start = sizes_of.break_even()
    assert sizes_of.kvarn(start - 1) >= sizes_of.dense(start - 1)
    assert all(sizes_of.kvarn(n) < sizes_of.dense(n) for n in range(start, start + 5000))


def test_memory_left_is_what_the_weights_leave(tmp_path):
    model = tiny_model("llama")
    directory = directory_of(model.config, tmp_path)
    estimate = model_dir.open_model_dir(directory)
    assert estimate.weight_source.startswith("config.json")
    assert estimate.weight_bytes == sum(parameter.nbytes for parameter in model.parameters())
    save_file({"a": torch.zeros(1 << 20)}, directory / "model.safetensors")
    stored = model_dir.open_model_dir(directory)
    assert (stored.weight_bytes, stored.weight_source) == (4 << 20, "safetensors headers")
    found = capacity.examine(directory, "k4v2", memory_gib=8 / 1024, batch=2)
    dense = found.sizes[0]
    for rows, most in dense.tokens_that_fit.items():
        per_row = most * 2 * 2 * 2 * 32 * 4  # layers, K and V, KV heads, head_dim, fp32
        assert per_row * rows <= 4 << 20 < per_row * rows * (most + 1) / most + 16
    assert list(dense.tokens_that_fit) == [1, 2]


def test_shards_are_counted_by_the_index(tmp_path):
    directory = directory_of(tiny_model("llama").config, tmp_path)
    index = {"metadata": {"total_size": 77}, "weight_map": {"a": "m-1.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    opened = model_dir.open_model_dir(directory)
    assert (opened.weight_bytes, opened.weight_source) == (77, "model.safetensors.index.json")
    save_file({"a": torch.zeros(10)}, directory / "m-1.safetensors")
    assert model_dir.open_model_dir(directory).weight_bytes == 40


def test_output_as_tables_and_as_json(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    directory = directory_of(tiny_model("gemma3_text").config, tmp_path)
    arguments = (directory, "--preset", "k4v2,k2v2", "--memory", "1", "--batch", "4")
    printed = command(*arguments, "--context", "5000")
    assert printed.exit_code == 0
    for words in (
        "StaticSlidingWindowLayer", "packed", "k4v2 B/token", "k2v2 B/token", "smaller from",
        "tokens per row that fit in 1 GiB", "batch 4", "2 of 4 layers stay dense",
        "is larger than dense below", "exceeds the 1,024 positions",
    ):  # fmt: skip
        assert words in printed.output, words
    found = json.loads(command(*arguments, "--json").output)
    assert [size["preset"] for size in found["sizes"]] == ["dense", "k4v2", "k2v2"]
    assert [group["packed"] for group in found["layers"]] == [False, True, False, True]
    assert found["refusal"] is None


def test_a_refused_model_is_said_with_exit_code_1(tmp_path):
    config = DeepseekV3Config(
        vocab_size=96, hidden_size=64, intermediate_size=64, moe_intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, q_lora_rank=16,
        kv_lora_rank=16, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=32,
        n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
    )  # fmt: skip
    printed = command(directory_of(config, tmp_path))
    assert printed.exit_code == 1
    assert "patch refuses this model" in printed.output
    assert "latent" in printed.output


def test_a_head_dim_that_cannot_be_packed_is_refused_by_name(tmp_path):
    directory = directory_of(tiny_model("llama", head_dim=24).config, tmp_path)
    found = capacity.examine(directory)
    assert "head_dim=24" in found.refusal
    assert [size.preset for size in found.sizes] == ["dense"]


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        (lambda d: (d / "config.json").unlink(), [], "has no config.json"),
        (lambda d: (d / "config.json").write_text("{"), [], "cannot be read as JSON"),
        (lambda d: (d / "config.json").write_text("[]"), [], "holds no JSON object"),
        (lambda d: (d / "config.json").write_text('{"model_type": "x"}'), [], "does not know"),
        (
            lambda d: (d / "config.json").write_text('{"model_type": "x", "auto_map": {}}'),
            [],
            "trust_remote_code=True",
        ),
        (
            lambda d: (d / "model.safetensors").write_bytes(struct.pack("<Q", 9) + b"{"),
            [],
            "is no safetensors file",
        ),
        (lambda d: None, ["--preset", "k5v5"], "is not a preset name"),
        (lambda d: None, ["--preset", ","], "--preset is empty"),
        (lambda d: None, ["--batch", "0"], "--batch 0"),
        (lambda d: None, ["--memory", "-1"], "--memory -1"),
        (lambda d: None, ["--dtype", "int8"], "--dtype int8"),
    ],
)
def test_bad_input_is_one_sentence(change, arguments, words, tmp_path, capsys, monkeypatch):
    directory = directory_of(tiny_model("llama").config, tmp_path)
    change(directory)
    monkeypatch.setattr("sys.argv", ["kvarn-ops", "inspect", str(directory), *arguments])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_code_of_the_directory_is_not_run_and_said(tmp_path):
    fields = {"auto_map": {"AutoModelForCausalLM": "modeling_x.Model"}}
    directory = directory_of(tiny_model("llama").config, tmp_path, **fields)
    (directory / "modeling_x.py").write_text("raise RuntimeError('it ran')")
    assert "which was not run" in capacity.examine(directory).warnings[0]


def test_a_model_that_is_no_decoder_is_refused(tmp_path):
    config = BertConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    directory = directory_of(config, tmp_path, architectures=["BertForMaskedLM"])
    assert "patch refuses" in "".join(capacity.examine(directory).warnings)
    directory_of(config, tmp_path, hidden_size=63)  # not divisible by the heads
    with pytest.raises(InputError, match="transformers cannot build"):
        model_dir.open_model_dir(tmp_path)


def test_the_attentions_of_the_graph_are_listed(tmp_path, fresh_dynamo):
    directory = directory_of(tiny_model("gemma3_text").config, tmp_path)
    printed = command(directory, "--graph")
    assert printed.exit_code == 0, printed.output
    lines = printed.output.splitlines()
    packed = [i for i, line in enumerate(lines) if "layers.1.self_attn" in line]
    assert "kvarn::step_: reads packed tiles" in lines[packed[0] + 1]
    assert any("layers.0.self_attn" in line and "no packed cache" in line for line in lines)
