"""`rewrite_kv_cache`: packed caches in a program that somebody exported with dense ones."""

from __future__ import annotations

import logging
from typing import Any

from torch.export import ExportedProgram

from kvarn_ops.config import DEFAULT_PRESET, KVarNConfig
from kvarn_ops.errors import UnsupportedModelError

from .cached_attention import match_attentions
from .evaluate import Evaluator
from .functional_program import exported_again, opened, ranges_of
from .mask_proof import Prover
from .packed_buffers import PackedBuffers
from .rewrite_report import RewriteReport, RewrittenLayer, remember

__all__ = ["rewrite_kv_cache"]

_logger = logging.getLogger("kvarn_ops")


def rewrite_kv_cache(
    program: ExportedProgram,
    config: KVarNConfig | str = DEFAULT_PRESET,
    *,
    strict: bool = False,
    backend: str = "auto",
    **config_overrides: Any,
) -> ExportedProgram:
    """Replace the static dense KV caches of an exported program by packed ones.

    A cache is a buffer with four axes to which the program writes new tokens at a position
    (``index_copy_``, ``index_put_`` and slice assignment, ``slice_scatter``, ``cat``) and that
    ``scaled_dot_product_attention`` reads, directly or with repeated heads, casts and transposes.
    Its place is taken by packed buffers, named after it, and by the ops ``kvarn::append_at_`` and
    ``kvarn::attention``; everything else is kept. What cannot be proven to mean the same is left
    as it is: `explain_rewrite` tells what and why.

    The new program has the same inputs, outputs and dynamic sizes. It needs ``import kvarn_ops``
    where it runs. Writing position 0 starts a new sequence, a gap is a `CacheError`, and going back
    by more than ``tail_tokens`` tokens a `CacheCropError`.

    Parameters
    ----------
    program : ExportedProgram
        Before decomposition to core ops, with empty caches; may come from ``torch.export.load``.
    config : KVarNConfig or str
        Config or preset name.
    strict : bool
        Raise if an attention layer stays dense, or if there is none to rewrite.
    backend : {"auto", "reference", "aten", "triton"}
        As in `kvarn_ops.patch`, for the device of each cache.
    **config_overrides
        Fields of `KVarNConfig`, for example `tail_tokens=512`.

    Returns
    -------
    ExportedProgram
        A new program, or the given one if nothing is rewritten. The given one never changes.

    Raises
    ------
    ConfigError
        For an invalid config.
    BackendError
        If the backend cannot run on a cache's device.
    UnsupportedModelError
        With `strict=True`, and for a program that torch cannot make functional or export again.
    """
    config = KVarNConfig.coerce(config, **config_overrides)
    functional, module = opened(program)
    prover = Prover(Evaluator(module), ranges_of(functional))
    found, left = match_attentions(module, prover, config)
    done = [
        RewrittenLayer(
            one.layer,
            (one.keys.name, one.values.name),
            True,
            "causal" if one.mask is None else f"passed on: {one.note}",
        )
        for one in found
    ]
    if strict and (left or not found):
        reasons = "\n".join(f"  {layer}" for layer in left) or "  it has no attention with a cache"
        raise UnsupportedModelError(
            f"{len(left)} attention layers of this program cannot be rewritten:\n{reasons}\n"
            "Change the model accordingly, or pass strict=False to leave them dense."
        )
    if not found:
        report = RewriteReport(tuple(left))
        _logger.warning("rewrite_kv_cache changed nothing: %s", report)
        remember(program, report)
        return program
    packed = PackedBuffers(module, config, backend)
    for one in found:
        packed(one)
    packed.finish()
    result = exported_again(module, functional)
    for name, value in program.state_dict.items():  # second names of tied weights
        if name not in packed.removed:
            result.state_dict.setdefault(name, value)
    report = RewriteReport((*done, *left), packed.removed, packed.packed_bytes)
    _logger.log(logging.WARNING if left else logging.INFO, "rewrite_kv_cache: %s", report)
    remember(result, report)
    return result
