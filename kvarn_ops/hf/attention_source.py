"""What an attention module does between its cache and the attention function, read from its source.

A packed layer takes the keys and values that `update` was given and knows softmax attention with a
scale, a softcap and sinks. A module that changes keys after the update, or hands more to the
attention function, would be silently wrong. The source says so before anything is patched.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import lru_cache
from typing import Any

import transformers
from torch import nn

from ..versions import release

__all__ = ["why_not_packable"]

# Of a call of the attention function: understood, or without meaning for packed attention.
# `sliding_window` must be None and `output_attentions` false, which is checked when it is called.
_KNOWN_ARGUMENTS = {
    *("query", "key", "value", "attention_mask", "scaling", "dropout", "softcap", "s_aux"),
    *("sliding_window", "position_ids", "output_attentions"),
}
if release(transformers.__version__) < (5, 0):
    # What gpt2 hands over there. Packed attention is causal, whatever is said, and refuses a mask
    # of heads when it is called with one.
    _KNOWN_ARGUMENTS |= {"head_mask", "is_causal"}


@lru_cache(maxsize=256)
def why_not_packable(module_class: type[nn.Module]) -> str | None:
    """Half a sentence about why such modules cannot be packed; None if they can.

    Where no source is available (a frozen application) nothing is found.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(module_class.forward)))
    except (OSError, TypeError, SyntaxError):
        return None
    attends = _calls_of(tree, _names_of_interface(tree))
    if not attends:
        return (
            "does not call attention through transformers' attention interface "
            "(ALL_ATTENTION_FUNCTIONS), so its attention cannot be redirected"
        )
    if len(attends) > 1:
        return "attends more than once per layer, and a packed layer stores tokens as it attends"
    known = {keyword.arg for keyword in attends[0].keywords if keyword.arg}
    unknown = sorted(known - _KNOWN_ARGUMENTS)
    if unknown:
        return f"hands {', '.join(unknown)} to attention, which packed attention does not know"
    return _what_changes_keys(tree, attends[0])


def _names_of_interface(tree: ast.AST) -> set[str]:
    """Variables that hold what `ALL_ATTENTION_FUNCTIONS` gave."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            inside = ast.walk(node.value)
            if any(getattr(part, "id", None) == "ALL_ATTENTION_FUNCTIONS" for part in inside):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def _calls_of(tree: ast.AST, names: set[str]) -> list[ast.Call]:
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call for call in calls if getattr(call.func, "id", None) in names]


def _what_changes_keys(tree: ast.AST, attend: ast.Call) -> str | None:
    """Assignments to the keys or values between `past_key_values.update` and the attention."""
    updates = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and getattr(node.value.func, "attr", None) == "update"
        and len(node.value.args) >= 3
    ]
    if not updates:
        return "does not put keys and values into the cache in its forward"
    if len(updates) > 1 or ast.unparse(updates[0].value.args[2]) not in _LAYER_INDEX:  # type: ignore[attr-defined]
        return "stores more than one set of keys and values per layer"
    stored = _names(updates[0].targets[0])
    read = [ast.unparse(argument) for argument in attend.args[2:4]]
    read += [ast.unparse(k.value) for k in attend.keywords if k.arg in ("key", "value")]
    changed = {
        name
        for node in ast.walk(tree)
        if isinstance(node, (ast.Assign, ast.AugAssign))
        and updates[0].lineno < node.lineno < attend.lineno
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        for name in _names(target)
    }
    if read != stored or changed & set(stored):
        return (
            "changes keys or values between the cache and attention (latent, repeated or padded "
            "heads), so what it attends to is not what it caches"
        )
    return None


_LAYER_INDEX = ("self.layer_idx", "layer_idx")


def _names(target: Any) -> list[str]:
    parts = target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]
    return [part.id for part in parts if isinstance(part, ast.Name)]
