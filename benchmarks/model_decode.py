"""Whole-model decode: KVarN, dense caches and transformers' QuantizedCache, step by step in turn.

    python benchmarks/model_decode.py --out benchmarks/results/model_decode_cpu.csv

A Llama of 4 layers with random weights (hidden 2048, 16 query and 4 KV heads of 128, bfloat16, 92 M
parameters) takes one token per step. Every cache is filled with the same random keys and values;
filling is timed too. All caches then take turns, one step each per round, so that what else the
machine does meets all of them. Each round adds a token: exactly one of 128 steps quantizes (a
finished tile; the flush of QuantizedCache, which quantizes everything again), and
`amortized_ms = (127 median + that step) / 128`. Bytes are those of the distinct storages at the
end. The peers need `pip install optimum-quanto hqq`; one that is missing is named and left out.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache, StaticCache

import kvarn_ops
from kvarn_ops.benchmark.results import ResultFile, conditions
from kvarn_ops.benchmark.timing import Contender, Timing, alternate
from kvarn_ops.eval.peers import PEERS, cache_bytes
from kvarn_ops.hf.footprint import Footprint, layer_shapes

PERIOD = 128  # a tile, and the residual length of QuantizedCache
WARMUP = 3
KEYS = ("context", "cache")
MODEL = {
    "vocab_size": 256, "hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 4,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128,
    "max_position_embeddings": 1 << 17,
}  # fmt: skip
LOGIT_BOUND = 0.05  # between two ways of computing the same, of the largest logit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("model_decode_cpu.csv"))
    parser.add_argument("--contexts", default="2048,8192")
    parser.add_argument("--presets", default="k4v2")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=MODEL["hidden_size"])
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--resume", action="store_true", help="keep the contexts that are there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = ResultFile(args.out, KEYS, args.resume)
    around = conditions(torch.device("cpu"), args.threads)
    peers = []
    for name in filter(None, args.peers.split(",")):
        if sentence := PEERS[name].missing:
            print(sentence)
        else:
            peers.append(name)
    model = make_model(args.hidden)
    for context in map(int, args.contexts.split(",")):
        names = [*DENSE, *(f"kvarn {p}" for p in args.presets.split(",")), *peers]
        if all(results.has({"context": context, "cache": name} | around) for name in names):
            continue
        for row in measure(model, context, args.presets.split(","), peers, not args.no_compile):
            results.add(row | around)
            print({key: row[key] for key in list(row)[:9]}, flush=True)


DENSE = ("dense dynamic", "dense static")


def make_model(hidden: int) -> Any:
    fields = MODEL | {"hidden_size": hidden, "intermediate_size": hidden}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**fields)).to(torch.bfloat16).eval()


class Subject:
    """A cache, the callable that decodes with it, and what its steps did."""

    def __init__(self, cache: Any, step: Callable[..., Any], flushes: Callable[[], bool]) -> None:
        self.cache, self.step, self.flushes = cache, step, flushes
        self.fill_ms = 0.0
        self.flushed: list[bool] = []  # by step

    def once(self) -> torch.Tensor:
        token = torch.full((1, 1), 7)
        return self.step(input_ids=token, past_key_values=self.cache, use_cache=True).logits


@torch.no_grad()
def measure(
    model: Any, context: int, presets: list[str], peers: list[str], compile_too: bool
) -> list[dict[str, Any]]:
    torch.compiler.reset()
    room = context + WARMUP + PERIOD + 1
    subjects: dict[str, Subject] = {}
    promised: dict[str, int] = {}
    config = model.config

    def never() -> bool:
        return False

    subjects["dense dynamic"] = Subject(DynamicCache(config=config), model, never)
    subjects["dense static"] = Subject(StaticCache(config, max_cache_len=room), model, never)
    if compile_too:
        step = torch.compile(copy.copy(model), fullgraph=True)
        cache = StaticCache(config, max_cache_len=room)
        subjects["dense static, compiled"] = Subject(cache, step, never)
    shapes = layer_shapes(LlamaForCausalLM(config).to(torch.bfloat16).to("meta"))
    for preset in presets:
        kvarn = kvarn_ops.KVarNConfig.from_preset(preset)
        size = Footprint(shapes, range(len(shapes)), kvarn, torch.bfloat16)
        forms = {"": None, ", compiled": torch.compile} if compile_too else {"": None}
        for form, compiler in forms.items():
            # The same weights in another model object: a patch belongs to one object.
            shared = copy.deepcopy(model, {id(p): p for p in model.parameters()})
            kvarn_ops.patch(shared, preset)
            step = shared if compiler is None else compiler(shared, fullgraph=True)
            cache = kvarn_ops.KVarNCache(config, room, preset)
            name = f"kvarn {preset}{form}"
            subjects[name] = Subject(cache, step, tile_finished(cache, kvarn))
            promised[name] = size.kvarn(room)
    promised["dense static"] = size.dense(room)
    for name in peers:
        cache = PEERS[name].new_cache(config)
        subjects[name] = Subject(cache, model, residual_emptied(cache))

    fill(subjects, context, config)
    check(subjects)
    seconds = alternate(
        {name: Contender(subject.once) for name, subject in subjects.items()},
        PERIOD,
        torch.device("cpu"),
        warmup=WARMUP - 1,  # one was the check
        each=lambda: [s.flushed.append(s.flushes()) for s in subjects.values()],
    )
    dense_bytes = cache_bytes(subjects["dense static"].cache)
    rows = []
    for name, subject in subjects.items():
        timing = Timing.of(seconds[name])
        flushes = [1e3 * s for s, is_flush in zip(seconds[name], subject.flushed) if is_flush]
        assert len(flushes) <= 1, f"{name} quantized {len(flushes)} times in {PERIOD} steps"
        if (name in PEERS and name != "fp8") or name.startswith("kvarn"):
            assert flushes, f"{name} never quantized in {PERIOD} steps"
        flush = flushes[0] if flushes else timing.median
        amortized = ((PERIOD - 1) * timing.median + flush) / PERIOD
        held = cache_bytes(subject.cache)
        if name in promised:
            assert held == promised[name], f"{name} holds {held} bytes, promised {promised[name]}"
        rows.append(
            {
                "context": context,
                "cache": name,
                "step_ms": f"{timing.median:.3f}",
                "min_ms": f"{timing.minimum:.3f}",
                "flush_ms": f"{flushes[0]:.3f}" if flushes else "",
                "amortized_ms": f"{amortized:.3f}",
                "tokens_per_s": f"{1e3 / amortized:.2f}",
                "bytes": held,
                "times_smaller": f"{dense_bytes / held:.3f}",
                "promised_bytes": promised.get(name, ""),
                "fill_ms": f"{subject.fill_ms:.1f}",
                "spread": f"{timing.spread:.3f}",
                "hidden": config.hidden_size,
            }
        )
    return rows


def tile_finished(cache: Any, config: kvarn_ops.KVarNConfig) -> Callable[[], bool]:
    def now() -> bool:
        length = int(cache.layers[0].tiles.seq_lens[0])
        return config.num_tiles(length) > config.num_tiles(length - 1)

    return now


def residual_emptied(cache: Any) -> Callable[[], bool]:
    return lambda: hasattr(cache.layers[0], "residual_length") and not cache.layers[0].keys.numel()


def fill(subjects: dict[str, Subject], context: int, config: Any) -> None:
    """The same random keys and values into every cache; milliseconds for all layers together."""
    generator = torch.Generator().manual_seed(1)
    shape = (2, 1, config.num_key_value_heads, context, config.head_dim)
    states = [torch.randn(shape, generator=generator).to(torch.bfloat16)
              for _ in range(config.num_hidden_layers)]  # fmt: skip
    for name, subject in subjects.items():
        if name in PEERS:  # the first call of a backend loads, or even builds, its extension
            few = PEERS[name].new_cache(config)
            for _ in range(2):
                few.update(*states[0][:, :, :, :128].clone(), 0)
        elif name.startswith("kvarn"):
            few = kvarn_ops.KVarNCache(config, 512, subject.cache.kvarn_config)
            store(few, 0, *states[0][:, :, :, :512])
        start = time.perf_counter()
        for index, (keys, values) in enumerate(states):
            if name.startswith("kvarn"):
                store(subject.cache, index, keys, values)
            else:
                subject.cache.update(keys, values, index)
        subject.fill_ms = 1e3 * (time.perf_counter() - start)


def store(cache: Any, index: int, keys: torch.Tensor, values: torch.Tensor) -> None:
    """What a patched module does after attending: `update` alone stores nothing."""
    layer = cache.layers[index]
    layer.lazy_initialization(keys, values)
    torch.ops.kvarn.append_(
        keys, values, None, *layer.tiles, layer.rotation, layer.config_line, layer.backend
    )
    layer.cumulative_length.add_(keys.shape[2])


def check(subjects: dict[str, Subject]) -> None:
    """Caches that hold the same have to give the same logits, before anything is timed."""
    logits = {name: subject.once().float() for name, subject in subjects.items()}
    for name, found in logits.items():
        base = name.removesuffix(", compiled").replace("dynamic", "static")
        error = ((found - logits[base]).abs().max() / logits[base].abs().max()).item()
        assert error <= LOGIT_BOUND, f"{name} differs from {base} by {error:.1e} of its logits"


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
