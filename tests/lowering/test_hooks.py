"""Our stages in Inductor's slots: beside those of others, and only while a patched model lives."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import fresh_cache

import kvarn_ops
from kvarn_ops.lowering import hooks
from kvarn_ops.lowering.stage import Stage
from tiny_models import random_ids, tiny_model

SLOTS = ("pre_grad_custom_pass", "post_grad_custom_pre_pass", "post_grad_custom_post_pass")
ALL, NONE = [True] * 3, [False] * 3


class Theirs(CustomGraphPass):
    """A user's pass, which notes the graphs that it gets."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.Graph] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.graphs.append(graph)

    def uuid(self) -> str:
        return "theirs"


def ours() -> list[bool]:
    """Whether each slot holds one stage of ours, as this thread sees it."""
    counts = [sum(isinstance(p, Stage) for p in hooks.passes_in(slot)) for slot in SLOTS]
    assert max(counts) <= 1, "installed twice"
    return [count == 1 for count in counts]


@pytest.fixture
def _empty_slots() -> Iterator[None]:
    """No pass of anybody in the slots: other tests of this process may hold patched models."""
    gc.collect()
    with inductor_config.patch(dict.fromkeys(SLOTS)):
        users = dict(hooks._users)
        hooks._users.clear()
        yield
        hooks._users.update(users)


pytestmark = pytest.mark.usefixtures("_empty_slots")


def test_the_passes_go_with_the_last_patched_model() -> None:
    assert ours() == NONE
    one, two = kvarn_ops.patch(tiny_model()), kvarn_ops.patch(tiny_model())
    assert ours() == ALL
    kvarn_ops.unpatch(one)
    assert ours() == ALL, "gone while a model is patched"
    kvarn_ops.unpatch(two)
    assert [getattr(inductor_config, slot) for slot in SLOTS] == [None] * 3


def test_the_passes_go_when_the_model_is_collected() -> None:
    model = kvarn_ops.patch(tiny_model(), "k8v8_g32")
    model.generate(random_ids(1, 20), max_new_tokens=2)
    assert ours() == ALL
    del model
    gc.collect()
    assert ours() == NONE, "the pass outlived the model, or something keeps it alive"


def test_the_passes_stay_for_a_copy() -> None:
    model = kvarn_ops.patch(tiny_model())
    twin = copy.deepcopy(model)
    kvarn_ops.unpatch(model)
    assert ours() == ALL, "the copy would be compiled without the pass"
    kvarn_ops.unpatch(twin)
    assert ours() == NONE


def test_another_thread_compiles_with_our_passes() -> None:
    """Since torch 2.13 an assignment to Inductor's config is seen in one thread only."""
    seen: list[list[bool]] = []

    def in_a_thread() -> None:
        thread = threading.Thread(target=lambda: seen.append(ours()))
        thread.start()
        thread.join()

    model = kvarn_ops.patch(tiny_model())
    in_a_thread()
    kvarn_ops.unpatch(model)
    in_a_thread()
    assert seen == [ALL, NONE]


@pytest.mark.parametrize("slot", SLOTS)
def test_passes_of_others_stay(slot: str) -> None:
    theirs, later = Theirs(), Theirs()
    setattr(inductor_config, slot, theirs)
    model = kvarn_ops.patch(tiny_model())
    assert hooks.passes_in(slot)[0] is theirs
    assert ours() == ALL
    setattr(inductor_config, slot, hooks.as_slot_value((*hooks.passes_in(slot), later)))
    kvarn_ops.unpatch(model)
    assert hooks.passes_in(slot) == (theirs, later)
    setattr(inductor_config, slot, theirs)
    kvarn_ops.unpatch(kvarn_ops.patch(model))
    assert getattr(inductor_config, slot) is theirs


@pytest.mark.parametrize("slot", SLOTS)
def test_the_pass_of_a_user_still_runs(slot: str) -> None:
    def compile_something() -> None:
        torch.compiler.reset()
        with torch.no_grad(), fresh_cache():
            torch.compile(lambda x: x + 1)(torch.ones(3))

    theirs = Theirs()
    setattr(inductor_config, slot, theirs)
    with kvarn_ops.patched(tiny_model()):
        compile_something()
        assert len(theirs.graphs) == 1, "patch() took the place of the user's pass"
    compile_something()
    assert len(theirs.graphs) == 2


def test_options_for_one_compilation() -> None:
    options = kvarn_ops.lowering.inductor_options()
    assert sorted(options) == sorted(SLOTS)
    assert ours() == NONE, "a global setting was changed"
    for slot in SLOTS:
        assert isinstance(options[slot], Stage)
        assert options[slot].uuid().startswith("kvarn_ops-")
    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(lambda x: x + 1, options=options)(torch.ones(3))
    setattr(inductor_config, SLOTS[0], theirs := Theirs())
    joined = kvarn_ops.lowering.inductor_options()
    with inductor_config.patch(joined):
        assert hooks.passes_in(SLOTS[0])[0] is theirs
        assert ours() == ALL


def test_a_pass_of_ones_own_is_in_the_cache_key() -> None:
    def keys(**passes: Any) -> list[Any]:
        return [stage.uuid() for stage in kvarn_ops.lowering.inductor_options(**passes).values()]

    plain, extended = keys(), keys(pre_grad=(Theirs(),))
    assert extended[0] not in (None, plain[0])
    assert extended[1:] == plain[1:]
    made_up = type("MadeUp", (), {"__call__": lambda self, graph: 0, "__module__": "nowhere"})
    assert keys(pre_grad=(made_up(),))[0] is None, "code that cannot be hashed would be cached"
