"""What folding the rotation of values does to quality: text and chains of look-ups.

    python benchmarks/fold_quality.py --out benchmarks/results/fold_quality.csv

The shipped models and their outlier variants (`kvarn_ops.eval`), each through the product's packed
cache with the encoder `plus`:

    off             patch(model): channels of values are equalized by the first tile, then rotated
    on              fold_rotation=True: equalized by the weights, in the weights
    on, rotation    the same without that factor, to see what it is worth

Text: mean KL divergence from the dense run over the same windows, teacher-forced in blocks. Chains:
share of samples in which every answer is right.
"""

from __future__ import annotations

import argparse
import itertools
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch as replaced

import torch
from torch import Tensor

import kvarn_ops
from kvarn_ops.benchmark.results import ResultFile, conditions
from kvarn_ops.eval.data import cut_windows, find_model, load_model, load_subject, read_documents
from kvarn_ops.eval.methods import METHODS
from kvarn_ops.eval.outliers import with_outliers
from kvarn_ops.eval.pieces import Case, generator_for
from kvarn_ops.eval.protocols import protocol
from kvarn_ops.eval.puzzle_runs import puzzle_piece
from kvarn_ops.eval.tasks.puzzles import PUZZLES
from kvarn_ops.eval.text import DenseRun, text_piece
from kvarn_ops.lowering import fold_rotation

FOLDS = ("off", "on", "on, rotation")
KEYS = ("task", "model", "preset", "fold_rotation")


class Folded(Case):
    """A case that runs in the packed cache of a folded model."""

    rotation_only = False

    def run(self, model: Any, slots: int, body: Any, starts: Any = None) -> Any:
        factors = nullcontext()
        if self.rotation_only:
            factors = replaced.object(fold_rotation, "_channel_factors", ones)
        config = self.method.product_config(self.config)
        with factors, kvarn_ops.patched(model, config, fold_rotation=True):
            assert "not folded" not in str(kvarn_ops.explain(model))
            return body(kvarn_ops.KVarNCache(model.config, slots, config, device=model.device))


class RotationOnly(Folded):
    """Without the factors by which weights equalize channels."""

    rotation_only = True


def ones(values: Any, rows: Tensor) -> Tensor:
    return torch.ones_like(rows, dtype=torch.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("fold_quality.csv"))
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--placements", type=int, default=2)
    parser.add_argument("--block", type=int, default=64)
    args = parser.parse_args()
    results = ResultFile(args.out, KEYS)
    around = conditions(torch.device("cpu"), torch.get_num_threads())
    for row in itertools.chain(text(args), chains(args)):
        results.add(row | around)
        print({key: row[key] for key in list(row)}, flush=True)


def cases(preset: str, config: kvarn_ops.KVarNConfig) -> dict[str, Case]:
    kinds = zip(FOLDS, (Case, Folded, RotationOnly), strict=True)
    return {name: kind(METHODS["plus"], preset, config, packed=True) for name, kind in kinds}


def models(plain: Any, placements: int) -> Any:
    yield "plain", plain
    for placement in range(placements):
        yield f"outliers {placement}", with_outliers(plain, placement)


def text(args: argparse.Namespace) -> Any:
    subject = load_subject(find_model(None), "cpu", "float32")
    documents, _ = read_documents(find_model(None), None)
    tokens = {name: subject.codec.encode(words) for name, words in documents.items()}
    cut = cut_windows(tokens, args.context + 1, args.windows)
    windows = torch.stack([subject.codec.start(window.ids) for window in cut])
    for name, model in models(subject.model, args.placements):
        for preset in ("k2v2", "k4v2"):
            config = kvarn_ops.KVarNConfig.from_preset(preset)
            how = protocol("pseudo", config, args.block)
            dense = DenseRun(lambda model=model: model, windows, how)
            for fold, case in cases(preset, config).items():
                scores = text_piece(case, dense, "", "").run(lambda: None)
                kl = scores["kl"].double().mean().item()
                yield row("text", name, preset, fold, "kl", f"{kl:.6f}")


def chains(args: argparse.Namespace) -> Any:
    puzzle = PUZZLES["chase"]
    plain = load_model(find_model(None, puzzle.model), "cpu", "float32")
    batch = puzzle.make(args.samples, puzzle.length, generator_for(0, puzzle.name))
    sizes = {"group_size": puzzle.group_size, "num_sink_tokens": puzzle.num_sink_tokens}
    for name, model in models(plain, args.placements):
        config = replace(kvarn_ops.KVarNConfig.from_preset("k2v2"), **sizes)
        for fold, case in cases("k2v2", config).items():
            piece = puzzle_piece(case, lambda model=model: model, batch, "", "")
            intact = piece.run(lambda: None)["intact"].double().mean().item()
            yield row("chains", name, "k2v2", fold, "intact", f"{intact:.4f}")


def row(task: str, model: str, preset: str, fold: str, metric: str, value: str) -> dict[str, str]:
    return {
        "task": task, "model": model, "preset": preset, "fold_rotation": fold, "metric": metric,
        "value": value,
    }  # fmt: skip


if __name__ == "__main__":
    main()
