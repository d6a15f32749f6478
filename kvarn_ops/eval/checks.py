"""What is found out about options and models before any work is done."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

import kvarn_ops

from ..config import KVarNConfig
from ..errors import InputError, UnsupportedModelError
from ..hadamard import check_head_dim
from .cache import MethodCache
from .data import find_model
from .methods import METHODS
from .options import Options
from .tasks.puzzles import PUZZLES

__all__ = [
    "can_be_packed",
    "check_options",
    "check_probe",
    "check_room",
    "fingerprint",
    "head_dim_of",
]

_logger = logging.getLogger("kvarn_ops")
_EDGE = 1 << 20  # bytes at both ends of a large file that are hashed
_MODEL_FILES = (".json", ".safetensors", ".bin", ".model")


def check_options(options: Options, tasks: list[str]) -> None:
    """Raise `InputError` for numbers out of range, and tasks that do not go with the model."""
    for name in ("windows", "batch", "samples", "block", "context", "limit", "max_new_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: give at least 1.")
    for name in ("placements", "sinks", "tail"):
        value = getattr(options, name)
        if value is not None and value < 0:
            raise InputError(f"--{name} {value}: give 0 or more.")
    own = [task for task in tasks if task in PUZZLES]
    if options.model is not None and own:
        raise InputError(
            f"{', '.join(own)} runs on a model of its own that knows nothing else: leave --model "
            "out, or choose text, attention or line_text for your model."
        )
    words = [task for task in tasks if task not in PUZZLES and task not in ("text", "attention")]
    if options.model is None and words:
        raise InputError(f"{', '.join(words)}: give a model that answers questions with --model.")
    sized = [name for name in options.presets.split(",") if "_g" in name]
    if own and sized:
        raise InputError(
            f"{', '.join(own)} has tiles of {PUZZLES[own[0]].group_size} tokens, its documents are "
            f"short: write {sized[0].strip().split('_')[0]} instead of {sized[0].strip()}."
        )


def can_be_packed(model: Any, configs: Iterable[KVarNConfig]) -> bool:
    """Whether the product takes this model; if not, that is logged, and simulations still run.

    Raises
    ------
    InputError
        If not even simulations can: no full-attention layer, or a head_dim without rotation.
    """
    MethodCache(model.config, METHODS["none"], KVarNConfig())
    check_head_dim(head_dim_of(model.config), True)
    try:
        for config in configs:
            with kvarn_ops.patched(model, config):
                pass
    except UnsupportedModelError as error:
        _logger.warning(
            "%s cannot be packed, methods are only simulated: %s", type(model).__name__, error
        )
        return False
    return True


def head_dim_of(model_config: Any) -> int:
    """Width of a head."""
    text = model_config.get_text_config(decoder=True)
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def check_room(model: Any, tokens: int, what: str) -> None:
    """Raise `InputError` if the model knows fewer positions than `tokens`."""
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest and tokens > longest:
        raise InputError(f"{what} needs {tokens} positions and the model knows {longest}.")


def check_probe(model: Any) -> None:
    """Raise `InputError` unless attention can be recorded without changing the model."""
    used = model.config.get_text_config(decoder=True)._attn_implementation
    if used != "sdpa":
        raise InputError(
            f"attention errors are recorded with SDPA and this model uses {used!r}, which may "
            "compute something else: leave attention out of --tasks."
        )


def fingerprint(options: Options, tasks: list[str]) -> dict[str, str]:
    """What besides the options decides the numbers: code, weights, texts, device."""
    package = Path(kvarn_ops.__file__).parent
    device, dtype = options.placed()
    models = [find_model(options.model)] if set(tasks) - set(PUZZLES) else []
    models += [find_model(None, PUZZLES[task].model) for task in tasks if task in PUZZLES]
    weights = [p for folder in models for p in folder.iterdir() if p.suffix in _MODEL_FILES]
    data = [options.text] if options.text else []
    if options.data is not None:
        data += [path for path in options.data.rglob("*") if path.is_file()]
    return {
        "code": _digest(package.rglob("*.py"), package),
        "weights": _digest(weights),
        "texts": _digest(data),
        "placed": f"{device} {dtype}",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }


def _digest(paths: Iterable[Path], root: Path | None = None) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(root) if root else path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_EDGE))
            file.seek(max(0, size - _EDGE))
            digest.update(file.read(_EDGE))
    return digest.hexdigest()[:16]
