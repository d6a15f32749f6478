"""`KVarNConfig`: names, limits, and sizes that equal what is allocated."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn_ops import layout
from kvarn_ops.config import BITS, GROUP_SIZES, KVarNConfig
from kvarn_ops.errors import ConfigError, KVarNError

PRESETS = [
    f"k{k}v{v}_g{g}" for k, v, g in itertools.product((2, 3, 4, 8), (2, 3, 4, 8), (32, 64, 128))
]
HEAD_DIMS = (32, 64, 80, 96, 112, 128, 192, 256, 576)

configs = st.builds(
    KVarNConfig,
    key_bits=st.sampled_from(BITS),
    value_bits=st.sampled_from(BITS),
    group_size=st.sampled_from(GROUP_SIZES),
    num_sink_tokens=st.integers(0, 300),
    tail_tokens=st.integers(0, 700),
    num_norm_iters=st.none() | st.integers(0, 20),
    encoder=st.sampled_from(("paper", "plus")),
    rotate_keys=st.booleans(),
    rotate_values=st.booleans(),
    check_finite=st.booleans(),
)
quick = settings(max_examples=100, deadline=None, derandomize=True)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_name_sets_bits_and_group(name: str) -> None:
    config = KVarNConfig.from_preset(name)
    assert config.preset == name
    assert f"k{config.key_bits}v{config.value_bits}_g{config.group_size}" == name
    assert config == KVarNConfig.coerce(name)
    if name.endswith("_g128"):
        assert KVarNConfig.from_preset(name.removesuffix("_g128")) == config


def test_the_defaults_are_the_documented_ones() -> None:
    config = KVarNConfig()
    assert config == KVarNConfig.from_preset("k4v2_g128")
    assert (config.num_sink_tokens, config.tail_tokens, config.encoder) == (128, 0, "plus")
    assert config.scale_dtype == "fp16"
    assert config.rotate_keys
    assert config.rotate_values
    assert config.norm_iters == 2
    assert KVarNConfig(encoder="paper").norm_iters == 8
    assert KVarNConfig(encoder="paper", num_norm_iters=0).norm_iters == 0


@pytest.mark.parametrize(
    "name",
    ["", "k4", "k4v", "k5v2", "k4v1", "k4v16", "K4V2", "k4v2_g16", "k4v2_g256", "k4v2_128"]
    + ["k4v2g128", "k4_v2", " k4v2", "k4v2\n", "k04v2", "int4", "k4v2_g128_plus"]
    + [None, 42, b"k4v2", ("k4", "v2")],
)
def test_a_wrong_preset_name_gives_the_grammar(name: object) -> None:
    with pytest.raises(ConfigError, match=r"k<bits>v<bits>\[_g<size>\].*2, 3, 4, 8") as caught:
        KVarNConfig.from_preset(name)  # type: ignore[arg-type]
    assert repr(name) in str(caught.value)
    with pytest.raises(ConfigError):
        KVarNConfig.coerce(name)  # type: ignore[arg-type]


ILLEGAL = [
    *(
        (field, value)
        for field in ("key_bits", "value_bits")
        for value in (0, 1, 5, 6, 7, 16, -4, 4.0, "4", None, True)
    ),
    *(("group_size", value) for value in (0, 1, 16, 48, 256, -128, 128.0, "128", None)),
    *(("encoder", value) for value in ("", "Plus", "kivi", None, 2)),
    *(("scale_dtype", value) for value in ("", "fp32", "log8", None, torch.float16)),
    *(
        (field, value)
        for field in ("num_sink_tokens", "tail_tokens")
        for value in (-1, 1.5, 128.0, "128", None, True)
    ),
    *(("num_norm_iters", value) for value in (-1, 2.0, "8", False)),
    *(
        (field, value)
        for field in ("rotate_keys", "rotate_values", "check_finite")
        for value in (0, 1, "yes", None)
    ),
]


@pytest.mark.parametrize(("field", "value"), ILLEGAL)
def test_an_illegal_field_is_refused_by_name(field: str, value: object) -> None:
    for build in (KVarNConfig, lambda **f: KVarNConfig.from_preset("k4v2", **f)):
        with pytest.raises(ConfigError, match=field) as caught:
            build(**{field: value})
        assert repr(value) in str(caught.value)
    with pytest.raises(ConfigError, match=field):
        KVarNConfig.coerce(KVarNConfig(), **{field: value})


def test_every_field_has_an_illegal_value_above() -> None:
    assert {field for field, _ in ILLEGAL} == {f.name for f in dataclasses.fields(KVarNConfig)}


def test_an_unknown_field_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="keybits"):
        KVarNConfig.from_preset("k4v2", keybits=2)
    with pytest.raises(ConfigError, match="keybits"):
        KVarNConfig.coerce(KVarNConfig(), keybits=2)


def test_errors_are_also_the_builtin_kind() -> None:
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, KVarNError)


def test_a_config_is_immutable_and_hashable() -> None:
    config = KVarNConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.key_bits = 2  # type: ignore[misc]
    assert {config: 1}[KVarNConfig.from_preset("k4v2")] == 1
    assert KVarNConfig.coerce(config, key_bits=8).key_bits == 8
    assert config.key_bits == 4


@quick
@given(configs)
def test_the_line_form_round_trips(config: KVarNConfig) -> None:
    line = config.to_string()
    resolved = dataclasses.replace(config, num_norm_iters=config.norm_iters)
    assert KVarNConfig.from_string(line) == resolved
    assert resolved.to_string() == line
    assert "\n" not in line


@quick
@given(configs, configs)
def test_different_configs_have_different_lines(one: KVarNConfig, other: KVarNConfig) -> None:
    same = KVarNConfig.from_string(one.to_string()) == KVarNConfig.from_string(other.to_string())
    assert (one.to_string() == other.to_string()) == same


@pytest.mark.parametrize("line", ["", "k4v2", "k4v2_g128:plus2", "k9v2_g128:plus2:sinks0:tail0"])
def test_a_wrong_line_is_refused(line: str) -> None:
    with pytest.raises(ConfigError, match=r"to_string\(\)"):
        KVarNConfig.from_string(line)
    good = KVarNConfig().to_string()
    with pytest.raises(ConfigError):
        KVarNConfig.from_string(good.replace("k4", "k5"))
    with pytest.raises(ConfigError):
        KVarNConfig.from_string(good.replace("plus", "minus"))


@pytest.mark.parametrize(
    ("preset", "bytes_per_token"),
    [("k4v2_g128", 108), ("k2v2_g128", 76), ("k4v4_g128", 140), ("k4v2_g64", 114)],
)
def test_known_sizes_at_head_dim_128(preset: str, bytes_per_token: int) -> None:
    config = KVarNConfig.from_preset(preset)
    assert config.bytes_per_token(128, 1) == bytes_per_token
    assert config.bytes_per_token(128, 8) == 8 * bytes_per_token
    assert config.effective_bits(128) == bytes_per_token * 8 / 256


@pytest.mark.parametrize("preset", PRESETS)
def test_the_promised_size_is_the_allocated_size(preset: str) -> None:
    config, heads, tiles = KVarNConfig.from_preset(preset), 3, 2
    length = config.num_sink_tokens + tiles * config.group_size
    for head_dim in HEAD_DIMS:
        cache = layout.allocate(config, 2, heads, head_dim, length, torch.bfloat16, "meta")
        packed = sum(
            getattr(cache, name).nbytes for name in layout.CODE_FIELDS + layout.SCALE_FIELDS
        )
        promised = config.bytes_per_token(head_dim, heads)
        assert packed == 2 * tiles * config.group_size * promised, head_dim


@pytest.mark.parametrize("preset", ["k4v2", "k2v2_g64", "k3v3_g32", "k8v8"])
@pytest.mark.parametrize("tail", [0, 10, 512])
def test_the_compression_ratio_is_that_of_allocated_bytes(preset: str, tail: int) -> None:
    config = KVarNConfig.from_preset(preset, tail_tokens=tail)
    for length in (config.num_sink_tokens + config.ring_len, 2048, 8192, 32768):
        cache = layout.allocate(config, 1, 1, 128, length, torch.float16, "meta")
        stored = sum(t.nbytes for t in cache) - cache.seq_lens.nbytes
        assert config.compression_ratio(128, length) == pytest.approx(length * 512 / stored)


def test_the_compression_ratio_grows_to_the_limit() -> None:
    config = KVarNConfig()
    ratios = [config.compression_ratio(128, n) for n in (128, 512, 2048, 8192, 32768, 1 << 22)]
    assert ratios == sorted(ratios)
    assert ratios[0] < 1.0, "sinks, tail and two tiles are allocated even for a short context"
    assert ratios[2] == pytest.approx(3.0, abs=0.15)
    assert ratios[3] == pytest.approx(4.1, abs=0.15)
    assert ratios[-1] == pytest.approx(512 / 108, rel=1e-3)
    assert config.compression_ratio(128, 0) == 0.0


@quick
@given(configs, st.integers(0, 5000))
def test_tiles_are_complete_and_old_enough(config: KVarNConfig, length: int) -> None:
    group, end = config.group_size, length - config.num_sink_tokens - config.tail_tokens
    expected = 0
    while (expected + 1) * group <= end:
        expected += 1
    assert config.num_tiles(length) == expected


@quick
@given(configs, st.integers(0, 5000), st.data())
def test_the_ring_holds_what_a_crop_reopens(
    config: KVarNConfig, length: int, data: st.DataObject
) -> None:
    removed = data.draw(st.integers(0, min(length, config.tail_tokens)))
    first_unfinished = (
        config.num_sink_tokens + config.num_tiles(length - removed) * config.group_size
    )
    assert length - first_unfinished <= config.ring_len
    assert config.ring_len % config.group_size == 0
