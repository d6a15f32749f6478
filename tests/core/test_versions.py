"""What is said about releases of torch and transformers that were not tested."""

from __future__ import annotations

import logging

import pytest

import kvarn_ops
from kvarn_ops import versions
from kvarn_ops.errors import UnsupportedModelError


@pytest.fixture
def installed(monkeypatch):
    """Pretend that other releases are installed."""

    def pretend(torch_version: str, transformers_version: str) -> None:
        found = torch_version, transformers_version
        monkeypatch.setattr(versions, "_installed", lambda: found)
        versions.check_versions.cache_clear()

    yield pretend
    versions.check_versions.cache_clear()


def test_tested_versions_are_not_mentioned(installed, caplog) -> None:
    installed("2.13.0+cpu", "5.23.9")
    versions.check_versions()
    assert not caplog.records


def test_newer_versions_are_mentioned_once_and_used(installed, caplog) -> None:
    from tiny_models import tiny_model

    installed("2.99.0a0+git12ab", "6.1.0.dev0")
    for _ in range(2):
        assert kvarn_ops.explain(kvarn_ops.patch(tiny_model())).config is not None
    ours = [record for record in caplog.records if record.name == "kvarn_ops"]
    warned = [record.getMessage() for record in ours if record.levelno == logging.WARNING]
    assert [text.split(" is newer")[0] for text in warned] == [
        "torch 2.99.0a0+git12ab",
        "transformers 6.1.0.dev0",
    ]


def test_old_transformers_are_mentioned_and_older_ones_refused(installed, caplog) -> None:
    from tiny_models import tiny_model

    installed("2.13.0", "4.57.6")
    versions.check_versions()
    assert "transformers 4.57.6 is older than 5.17" in caplog.text
    installed("2.13.0", "4.56.2")
    model = tiny_model()
    with pytest.raises(UnsupportedModelError, match=r"4\.56\.2 is older than 4\.57"):
        kvarn_ops.patch(model)
    assert not hasattr(model, "_kvarn_patch")


def test_assisted_generation_with_old_transformers_is_refused() -> None:
    from transformers.cache_utils import Cache

    from tiny_models import random_ids, tiny_model

    if hasattr(Cache, "activate_past_recording"):
        pytest.skip("these transformers are new enough for assisted generation")
    model = kvarn_ops.patch(tiny_model())
    with pytest.raises(UnsupportedModelError, match=r"needs transformers 5\.17"):
        model.generate(random_ids(1, 20), assistant_model=tiny_model(), max_new_tokens=4)
