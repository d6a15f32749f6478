"""Which families of transformers are folded, as tiny random models, and whether it is right.

    python benchmarks/fold_families.py --out benchmarks/results/fold_families.csv

Per family: layers that `patch` packs and that `fold_rotation=True` folds, why others are not, the
relative change of the outputs without a KVarN cache (`dense_change`) and with one that stores 8
bits (`cached_change`), and whether outputs are bit-equal after `unpatch`. Families that cannot be
built, patched or run on token ids alone are left out (docs/models.md lists them).
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from tiny_families import build, model_types
from transformers.utils import logging as transformers_logging

import kvarn_ops
from kvarn_ops.benchmark.results import ResultFile, conditions

CONFIG = {"config": "k8v8_g32", "num_sink_tokens": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("fold_families.csv"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    logging.getLogger("kvarn_ops").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    results = ResultFile(args.out, ["family"])
    around = conditions(torch.device("cpu"), 1)
    for family in model_types():
        try:
            row = measure(build(family))
        except Exception as error:  # whatever a family needs that is not here
            print(f"{family}: left out, {type(error).__name__}")
            continue
        results.add({"family": family} | row | around)
        print(family, *row.values(), flush=True)


@torch.no_grad()
def measure(model: Any) -> dict[str, Any]:
    ids = torch.randint(2, 100, (1, 61), generator=torch.Generator().manual_seed(3))

    def outputs(cached: bool) -> torch.Tensor:
        if not cached:
            return model(input_ids=ids, use_cache=False)[0]
        cache = kvarn_ops.KVarNCache(model.config, 96, **CONFIG)
        parts = (ids[:, :60], ids[:, 60:])
        return torch.cat([model(input_ids=x, past_key_values=cache)[0] for x in parts], dim=1)

    dense = outputs(cached=False)
    with kvarn_ops.patched(model, **CONFIG):
        cached = outputs(cached=True)
    with kvarn_ops.patched(model, **CONFIG, fold_rotation=True):
        said = [layer.reason for layer in kvarn_ops.explain(model).layers if layer.packed]
        changes = [distance(outputs(False), dense), distance(outputs(True), cached)]
    reasons = {reason.partition(": ")[2] for reason in said if "not folded" in reason}
    return {
        "packed": len(said),
        "folded": sum(reason == "packed, rotation folded" for reason in said),
        "why_not": "; ".join(sorted(reasons)),
        "dense_change": f"{changes[0]:.1e}",
        "cached_change": f"{changes[1]:.1e}",
        "undone": torch.equal(outputs(cached=False), dense),
    }


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


if __name__ == "__main__":
    main()
