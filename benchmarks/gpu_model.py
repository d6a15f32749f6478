"""Stage `model`: tokens per second of a Llama-3-8B shape, and what fits into this GPU's memory.

Random weights in bfloat16; `layers` of the 32 are built, because compiling all of them takes longer
than the stage has: tokens per second are of that smaller model, with its full vocabulary. Caches
are filled with random numbers. They take turns in each form, blocks of steps without waiting in
between, 128 steps in all, so that exactly one of them finishes tiles:

`kvarn`     `KVarNCache` after `kvarn_ops.patch`.
`dense`     `StaticCache` and SDPA as transformers calls it: with a mask for the free slots, because
            of which it repeats the KV heads and cannot take its fastest kernels.
`unmasked`  the same cache without mask and repetition, an attention function of our own: it attends
            to free slots too, takes the time of the best dense decoding, and `ratio` refers to it.

`largest batch` is what fits beside the weights of all 32 layers (`gpu_memory`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from gpu_memory import (
    LLAMA,
    TINY,
    cache_bytes,
    dense_cache,
    kvarn_cache,
    largest_batch,
    make_model,
    shared_copy,
    unmasked_attention,
    weight_bytes,
)
from gpu_stage import Stage, short

import kvarn_ops

KEYS = ("measure", "cache", "form", "batch", "context")
COLUMNS = (
    "tokens_per_s", "ms_per_step", "ratio", "ratio_to_dense", "layers", "cache_bytes",
    "bytes_per_row", "value", "confirmed", "spread", "error",
)  # fmt: skip
K = 1024
PRESET = "k4v2"
POINTS = ((8, 16 * K), (32, 16 * K), (1, 32 * K), (8, 64 * K), (1, 128 * K))
LARGEST = (32 * K, 128 * K, 8 * K)  # contexts
FORMS = ("eager", "compiled", "reduce-overhead")
CACHES = ("unmasked", "kvarn", "dense")
BLOCKS, STEPS = 4, 32  # together one tile
WARMUP = 4  # compilation, recording of graphs


class Subject(NamedTuple):
    """A cache, the callable that decodes with it, and what puts the cache back."""

    step: Callable[..., Any]
    cache: Any
    reset: Callable[[int], None]  # to a length


def run(stage: Stage) -> str:
    fields = TINY if stage.dry else LLAMA
    points = ((1, 70),) if stage.dry else POINTS
    layers = fields["num_hidden_layers"] if stage.dry else stage.layers
    model = make_model(fields | {"num_hidden_layers": layers}, stage.device)
    assert layers < fields["num_hidden_layers"] or weight_bytes(fields) == sum(
        x.nbytes for x in model.parameters()
    )
    models = {"unmasked": shared_copy(model), "kvarn": shared_copy(model), "dense": model}
    models["unmasked"].set_attn_implementation(unmasked_attention())
    config = kvarn_ops.KVarNConfig.from_preset(
        PRESET + "_g32" * stage.dry, **({"num_sink_tokens": 32} if stage.dry else {})
    )
    kvarn_ops.patch(models["kvarn"], config, backend="triton")
    listed = [({"measure": "decode", "cache": "both", "form": "all", "batch": batch,
                "context": context}, (batch, context)) for batch, context in points]  # fmt: skip
    if stage.warm:  # a process per cache: compilation is what takes long
        models = {CACHES[stage.part]: models[CACHES[stage.part]]}
        stage.part, stage.parts = 0, 1
    else:
        fitting = [({"measure": "largest batch", "cache": "both", "form": "", "batch": "",
                     "context": context}, context) for context in
                   ((128,) if stage.dry else LARGEST)]  # fmt: skip
        for keys, context in stage.each(fitting):
            with stage.guarded(keys):
                largest_batch(stage, fields, config, context)
    # Dense and patched forwards in all forms are compilations of the same function.
    torch._dynamo.config.recompile_limit = 64
    for keys, (batch, context) in stage.each(listed):
        with stage.guarded(keys):
            decode(stage, models, config, layers, batch, context)
    return headline(stage)


def decode(
    stage: Stage, models: dict[str, Any], config: Any, layers: int, batch: int, context: int
) -> None:
    """A row per cache and form."""
    fields = next(iter(models.values())).config
    row_bytes = 4 * fields.num_key_value_heads * fields.head_dim * layers
    if not stage.clock.fits(3 * batch * context * row_bytes):
        stage.leave_out(f"decode {batch}x{context} (does not fit this memory)")
        return
    torch.compiler.reset()  # of the point before
    room = context + max(WARMUP, BLOCKS * STEPS) + 1
    makers = {"dense": dense_cache, "unmasked": dense_cache, "kvarn": kvarn_cache}
    stores = {name: makers[name](models[name].config, config, batch, context, room, stage.device)
              for name in models}  # fmt: skip
    ids = torch.full((batch, 1), 7, device=stage.device)
    last = 0.0
    for form in FORMS:
        if stage.seconds_left() < last:
            stage.leave_out(f"decode {batch}x{context} {form}")
            continue
        begun = time.monotonic()
        subjects: dict[str, Subject] = {}
        for name, model in models.items():
            keys = decode_keys(name, form, batch, context)
            try:
                subjects[name] = Subject(compiled(model, form, stage.dry), *stores[name])
                warm_up(subjects[name], ids, context, 1 if stage.dry else WARMUP)
            except Exception as error:
                subjects.pop(name, None)
                stage.add(keys, layers=layers, error=short(error))
                stage.fail(f"decode {name} {form} {batch}x{context}: {short(error)}")
                stage.check_alive()
        if not stage.warm:
            measure_form(stage, subjects, ids, form, layers, batch, context)
        last = time.monotonic() - begun
        print(f"model: {batch}x{context} {form}, {last:.1f} s", flush=True)


def decode_keys(name: str, form: str, batch: int, context: int) -> dict[str, Any]:
    return {"measure": "decode", "cache": name, "form": form, "batch": batch, "context": context}


def warm_up(subject: Subject, ids: torch.Tensor, context: int, steps: int) -> None:
    """Compile, record, and look at the result."""
    subject.reset(context)
    for _ in range(steps - 1):
        one_step(subject, ids)
    out = one_step(subject, ids)
    assert bool(out.isfinite().all()), "logits are not finite"


def measure_form(
    stage: Stage, subjects: dict[str, Subject], ids: torch.Tensor, form: str, layers: int,
    batch: int, context: int,
) -> None:  # fmt: skip
    """Blocks of steps in turn, and a row per cache."""
    blocks, steps = (1, 1) if stage.dry else (BLOCKS, STEPS)
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for block in range(blocks):
        for name, subject in subjects.items():
            subject.reset(context + block * steps)
            seconds[name].append(block_seconds(subject, ids, steps, stage.clock.on_gpu))
    totals = {name: sum(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        total = totals[name]
        stage.add(
            decode_keys(name, form, batch, context),
            tokens_per_s=f"{batch * steps * blocks / total:.5g}",
            ms_per_step=f"{1e3 * total / blocks / steps:.4g}",
            ratio=f"{totals['unmasked'] / total:.3f}" if "unmasked" in totals else "",
            ratio_to_dense=f"{totals['dense'] / total:.3f}" if "dense" in totals else "",
            layers=layers,
            cache_bytes=cache_bytes(subjects[name].cache),
            spread=f"{(max(values) - min(values)) * blocks / total:.3f}",
        )  # fmt: skip


def compiled(model: Any, form: str, dry: bool) -> Callable[..., Any]:
    """The model's forward in one of the forms."""
    if form == "eager":
        return model
    if dry:  # what kernels are interpreted is not compiled
        return torch.compile(model, backend="eager", fullgraph=True)
    return torch.compile(model, fullgraph=True, mode=None if form == "compiled" else form)


def one_step(subject: Subject, ids: torch.Tensor) -> torch.Tensor:
    torch.compiler.cudagraph_mark_step_begin()
    return subject.step(input_ids=ids, past_key_values=subject.cache, use_cache=True).logits


def block_seconds(subject: Subject, ids: torch.Tensor, steps: int, on_gpu: bool) -> float:
    """Of steps one after the other, as generation makes them."""
    if on_gpu:
        torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(steps):
        one_step(subject, ids)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def headline(stage: Stage) -> str:
    """The first point, every form, and the first context of the largest batch."""
    parts = []
    for row in stage.rows:
        if row["measure"] == "largest batch" and row["value"]:
            parts.append(f"{row['cache']} fits {row['value']}x{row['context']}")
        elif row["cache"] == "kvarn" and row["tokens_per_s"]:
            point = f"{row['batch']}x{row['context']} {row['form']}"
            parts.append(
                f"{point}: {row['tokens_per_s']} tokens/s, {row['ratio']}x unmasked, "
                f"{row['ratio_to_dense']}x dense"
            )
    return "; ".join(parts)
