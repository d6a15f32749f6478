"""Quality must not regress: the acceptance of the evaluation, cut down to about three minutes.

The thresholds hold with a wide margin today (docs/evaluation.md has the figures); a failure here
means that stored values changed for the worse.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

pytest.importorskip("transformers")

from kvarn_ops import KVarNConfig
from kvarn_ops.eval.data import cut_windows, find_model, load_model, load_subject, read_documents
from kvarn_ops.eval.methods import METHODS
from kvarn_ops.eval.outliers import with_outliers
from kvarn_ops.eval.pieces import Case, generator_for
from kvarn_ops.eval.protocols import protocol
from kvarn_ops.eval.puzzle_runs import puzzle_piece
from kvarn_ops.eval.scores import proportion
from kvarn_ops.eval.tasks.puzzles import PUZZLES
from kvarn_ops.eval.text import DenseRun, text_piece

pytestmark = pytest.mark.slow
PLACEMENTS = range(5)
SAMPLES = 64


@cache
def puzzle_model(name, placement):
    model = load_model(find_model(None, PUZZLES[name].model), "cpu", "float32")
    return model if placement is None else with_outliers(model, placement)


def puzzle(name, method, preset, placement=None, metric="intact", packed=False):
    task = PUZZLES[name]
    config = KVarNConfig.from_preset(
        f"{preset}_g{task.group_size}", num_sink_tokens=task.num_sink_tokens
    )
    batch = task.make(SAMPLES, task.length, generator_for(0, name))
    case = Case(METHODS[method], preset, config, packed)
    piece = puzzle_piece(case, lambda: puzzle_model(name, placement), batch, "", "")
    return piece.run(lambda: None)[metric]


def chase_with_outliers(method, preset="k2v2"):
    shares = [puzzle("chase", method, preset, p).float().mean().item() for p in PLACEMENTS]
    return sum(shares) / len(shares)


def test_chains_of_lookups_survive_two_bits():
    dense = puzzle("chase", "none", "k2v2").float().mean().item()
    assert dense >= 0.97, "the model itself follows the chain"
    plus = puzzle("chase", "plus", "k2v2", packed=True).float().mean().item()
    assert plus >= 0.9, f"{plus} of the chains are intact in the packed cache"
    assert puzzle("chase", "rtn", "k2v2").float().mean() < 0.85, "the task tells methods apart"


def test_chains_survive_outlier_channels_where_others_break():
    plus, paper, turbo = (chase_with_outliers(name) for name in ("plus", "paper", "turbo"))
    assert plus >= paper + 0.2, (plus, paper)
    assert plus >= turbo, (plus, turbo)
    assert plus >= 0.85, plus


@pytest.mark.parametrize("placement", [None, 1])
def test_chains_at_k4v2_are_dense_within_noise(placement):
    dense = puzzle("chase", "none", "k4v2", placement)
    plus = puzzle("chase", "plus", "k4v2", placement)
    noise = proportion(dense).error + proportion(plus).error
    assert plus.float().mean() >= dense.float().mean() - noise


def test_lines_at_k4v2():
    """Not within noise of dense (99.95 %): this model needs keys to a percent, fp8 finds 85 %."""
    found = {
        name: [puzzle("lines", name, "k4v2", p, "accuracy").mean().item() for p in (None, 1)]
        for name in ("none", "fp8", "paper", "plus")
    }
    assert min(found["none"]) >= 0.99, found
    assert found["plus"][0] >= 0.95, found
    assert found["plus"][1] >= 0.88, found
    for other in ("fp8", "paper"):
        assert min(a - b for a, b in zip(found["plus"], found[other], strict=True)) > 0.05, found


def test_text_on_the_outlier_model_is_twice_as_close_as_published():
    subject = load_subject(find_model(None), "cpu", "float32")
    documents, _ = read_documents(find_model(None), None)
    tokens = {name: subject.codec.encode(text) for name, text in documents.items()}
    windows = torch.stack([window.ids for window in cut_windows(tokens, 2049, 3)])
    model = with_outliers(subject.model, 0)
    config = KVarNConfig.from_preset("k2v2")
    dense = DenseRun(lambda: model, windows, protocol("pseudo", config, 64))
    kl = {
        name: text_piece(Case(METHODS[name], "k2v2", config), dense, "", "").run(lambda: None)["kl"]
        for name in ("plus", "paper", "turbo")
    }
    means = {name: value.mean().item() for name, value in kl.items()}
    assert means["plus"] <= 0.5 * means["paper"], means
    assert means["plus"] <= means["turbo"], means
