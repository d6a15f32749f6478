"""What folding the rotation of values into the weights gains per decode step, on a CPU.

    python benchmarks/fold_rotation.py --out benchmarks/results/fold_rotation_cpu.csv

A Llama of 4 layers with random weights takes one token per step, with and without
`fold_rotation=True`, eagerly and compiled. The contenders take turns; `step_ms` is the least CPU
time of this process over the rounds, on one thread, which other work on the machine disturbs
least. `prefill_ms` is that of a forward over 640 tokens, which quantizes four tiles per
layer and KV head. `gain` is the time without folding over the time with it.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvarn_ops
from kvarn_ops.benchmark.results import ResultFile, conditions

KEYS = ("context", "form", "folded")
MODEL = {
    "vocab_size": 256, "hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128,
    "max_position_embeddings": 1 << 17,
}  # fmt: skip
PREFILL = 640


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("fold_rotation_cpu.csv"))
    parser.add_argument("--contexts", default="512,4096")
    parser.add_argument("--rounds", type=int, default=120)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = ResultFile(args.out, KEYS)
    around = conditions(torch.device("cpu"), 1)
    for context in map(int, args.contexts.split(",")):
        for row in measure(context, args.rounds):
            results.add(row | around)
            print({key: row[key] for key in list(row)}, flush=True)


@torch.no_grad()
def measure(context: int, rounds: int) -> list[dict[str, Any]]:
    torch.compiler.reset()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**MODEL)).to(torch.bfloat16).eval()
    token = torch.full((1, 1), 7)
    steps: dict[tuple[str, bool], Callable[[], Any]] = {}
    prefills: dict[tuple[str, bool], Callable[[], Any]] = {}
    for folded in (False, True):
        # The same weights in another model object: a patch belongs to one object.
        shared = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        kvarn_ops.patch(shared, fold_rotation=folded)
        prefills["eager", folded] = lambda model=shared: first_tokens(model)
        for form in ("eager", "compiled"):
            step = shared if form == "eager" else torch.compile(shared, fullgraph=True)
            cache = filled_cache(shared, context, rounds)
            steps[form, folded] = lambda step=step, cache=cache: step(
                input_ids=token, past_key_values=cache, use_cache=True
            )
    for call in steps.values():  # compiles
        call()
    step_ms = least(steps, rounds)
    prefill_ms = least(prefills, 8)
    rows = []
    for (form, folded), ms in step_ms.items():
        once = prefill_ms.get((form, folded))
        rows.append(
            {
                "context": context,
                "form": form,
                "folded": folded,
                "step_ms": f"{ms:.4f}",
                "gain": f"{step_ms[form, False] / ms:.3f}",
                "prefill_ms": "" if once is None else f"{once:.2f}",
                "prefill_gain": "" if once is None else f"{prefill_ms[form, False] / once:.3f}",
            }
        )
    return rows


def first_tokens(model: Any) -> Any:
    ids = torch.randint(256, (1, PREFILL), generator=torch.Generator().manual_seed(0))
    cache = kvarn_ops.KVarNCache(model.config, PREFILL + 8)
    return model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


def filled_cache(model: Any, context: int, rounds: int) -> Any:
    ids = torch.randint(256, (1, context), generator=torch.Generator().manual_seed(0))
    cache = kvarn_ops.KVarNCache(model.config, context + rounds + 8)
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def least(calls: dict[tuple[str, bool], Callable[[], Any]], rounds: int) -> dict[Any, float]:
    """Least CPU milliseconds of each call, one call of each per round."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            call()
            best[name] = min(best[name], 1e3 * (time.process_time() - start))
    return best


if __name__ == "__main__":
    main()
