"""Stage `attention`: `kvarn::attention` for one query per row against the best dense attention.

The caches hold random codes: what they hold does not change what is read. `kvarn_us` is the op by
kernels (three launches); `dense` the fastest of the dense implementations for the same tokens in
bfloat16, found in a few rounds and then timed in turn with the op; `ratio = dense / kvarn`, above 1
KVarN is faster. `gb_per_s` counts the bytes of live tiles, sinks and tail, each once;
`share_of_copy` is that over the rate of a large copy. `fp8` and `dequantized` (our tiles, by the
eager ops) are caches that are made bfloat16 first and then attended to by the best of SDPA.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from gpu_caches import dense_bytes, random_caches, stored_bytes
from gpu_dense import NAMES, SDPA, Attention, calls_of, fp8_calls
from gpu_stage import Stage, short
from gpu_timing import Calls, memory_rates, micros, rate

from kvarn_ops import KVarNConfig
from kvarn_ops.benchmark.decode_step import Shape
from kvarn_ops.hadamard import hadamard
from kvarn_ops.layout import TileCache

KEYS = ("preset", "batch", "q_heads", "kv_heads", "head_dim", "context")
CONVERTED = ("fp8", "dequantized")
COLUMNS = (
    "kvarn_us", "kvarn_min_us", "spread", "stored_bytes", "gb_per_s", "share_of_copy", "dense",
    "dense_us", "dense_bytes", "dense_gb_per_s", "ratio", *(f"{name}_us" for name in NAMES),
    *(f"{name}_us" for name in CONVERTED), "copies", "rounds", "not_run", "error",
)  # fmt: skip
K = 1024
# Batch and context, the most telling first.
POINTS = (
    (8, 16 * K), (1, 16 * K), (32, 4 * K), (1, 128 * K), (8, 4 * K), (32, 16 * K), (1, 4 * K),
    (8, 32 * K), (1, 32 * K), (32, 32 * K), (8, 128 * K), (32, 128 * K), (1, K), (8, K), (32, K),
)  # fmt: skip
FIRST_POINTS = 4
MAIN = ("k4v2", "32/8", 128)
KINDS = (
    MAIN, ("k2v2", "32/8", 128), ("k4v4", "32/8", 128), ("k3v2", "32/8", 128), ("k4v2", "32/8", 64),
    ("k4v2", "32/8", 256), ("k4v2", "16/2", 128), ("k4v2", "16/2", 256), ("k4v2", "16/2", 64),
)  # fmt: skip
FLEX_POINTS = ((8, 16 * K), (1, 16 * K), (32, 16 * K), (1, 128 * K))  # each compiles for seconds
CONVERTED_TOKENS = 8 * 16 * K  # batch x context, above which conversion takes too much memory
SCREEN_ROUNDS, ROUNDS = 4, 15
AGREEMENT = 2e-2  # between dense implementations, norm of the difference over the norm


class Case(NamedTuple):
    """One row of the table."""

    config: KVarNConfig
    shape: Shape
    context: int
    main: bool  # of the kind that is looked at most closely


def cases(dry: bool) -> list[tuple[dict[str, Any], Case]]:
    """Everything that is measured, in that order, with the columns that name it."""
    listed: list[tuple[Any, ...]]
    if dry:
        listed = [("k4v2_g32", "4/2", 64, 1, 100), ("k3v2_g32", "4/1", 64, 2, 100)]
    else:
        others = [(kind, point) for kind in KINDS[1:] for point in POINTS]
        others.sort(key=lambda item: POINTS.index(item[1]) >= FIRST_POINTS)  # stable
        rest = [(preset, heads, dim) for dim in (64, 128, 256) for heads in ("32/8", "16/2")
                for preset in ("k4v2", "k2v2", "k4v4", "k3v2")]  # fmt: skip
        rest = [kind for kind in rest if kind not in KINDS]
        pairs = [(MAIN, point) for point in POINTS] + others
        pairs += [(kind, point) for kind in rest for point in POINTS]
        listed = [(*kind, *point) for kind, point in pairs]
    found = []
    for preset, heads, dim, batch, context in listed:
        shape = Shape.parse(batch, heads, dim)
        config = KVarNConfig.from_preset(preset, **({"num_sink_tokens": 32} if dry else {}))
        keys = {"preset": preset, **vars(shape), "context": context}
        found.append((keys, Case(config, shape, context, dry or (preset, heads, dim) == MAIN)))
    return found


def run(stage: Stage) -> str:
    copy = 1.0 if stage.warm else memory_rates(stage.clock)["copy"]
    best: dict[tuple[Shape, int], str] = {}
    for keys, case in stage.each(cases(stage.dry)):
        with stage.guarded(keys):
            measure(stage, keys, case, copy, best)
    done = [row for row in stage.rows if row["ratio"]]
    if not done:
        return "nothing measured"
    row = done[0]
    ratios = [float(row["ratio"]) for row in done]
    return (
        f"{row['preset']} {row['q_heads']}/{row['kv_heads']} {row['batch']}x{row['context']}: "
        f"{row['kvarn_us']} us, {float(row['share_of_copy']):.0%} of the copy rate, "
        f"{row['ratio']}x {row['dense']}; all ratios {min(ratios)} to {max(ratios)}"
    )


def measure(
    stage: Stage, keys: dict[str, Any], case: Case, copy: float, best: dict[tuple[Shape, int], str]
) -> None:
    """One row; `best` remembers which dense implementation won for a shape."""
    config, shape, context, _ = case
    clock, stored, dense = stage.clock, stored_bytes(*case[:3]), dense_bytes(shape, context)
    copies, dense_copies = clock.copies(stored), clock.copies(dense)
    if not clock.fits(2 * copies * stored + 2 * dense_copies * dense):
        stage.leave_out(f"{' '.join(map(str, keys.values()))} (does not fit this memory)")
        return
    caches = random_caches(config, shape, context, stage.device, copies)
    q = _random(stage, shape.batch, shape.q_heads, 1, shape.head_dim)
    kvarn = kvarn_calls(q, caches, config)
    if stage.warm:
        clock.measure({"kvarn": kvarn})
        if case.main and (shape.batch, context) in FLEX_POINTS:
            calls_of("flex", q, pairs(stage, shape, context, 1))[0]()
        return
    finite = bool(kvarn[0]().isfinite().all())
    assert finite, "the output of kvarn::attention is not finite"
    stored_pairs = pairs(stage, shape, context, dense_copies)
    known = best.get((shape, context))
    names = [known] if known else candidates(stage, case)
    values, failed, winner, winning = screen(stage, names, q, stored_pairs)
    assert winning, f"no dense attention runs: {failed}"
    best[shape, context] = winner
    if case.main:
        values |= converted(stage, case, q, stored_pairs, caches, values, failed)
    timings = clock.measure({"kvarn": kvarn, "dense": winning}, rounds=ROUNDS)
    ours, theirs = timings["kvarn"], timings["dense"]
    speed = rate(stored, ours.median)
    stage.add(
        keys,
        kvarn_us=micros(ours), kvarn_min_us=f"{1e3 * ours.minimum:.4g}",
        spread=f"{max(ours.spread, theirs.spread):.3f}", stored_bytes=stored,
        gb_per_s=f"{speed:.4g}", share_of_copy=f"{speed / copy:.3f}", dense=winner,
        dense_us=micros(theirs), dense_bytes=dense,
        dense_gb_per_s=f"{rate(dense, theirs.median):.4g}",
        ratio=f"{theirs.median / ours.median:.3f}",
        **{f"{name}_us": f"{1e3 * value:.4g}" for name, value in values.items()},
        copies=copies, rounds=ROUNDS if clock.on_gpu else 3,
        not_run="; ".join(f"{name}: {why}" for name, why in failed.items()),
    )  # fmt: skip


def kvarn_calls(q: torch.Tensor, caches: list[TileCache], config: KVarNConfig) -> Calls:
    """The op on every cache."""
    rotation = hadamard(q.shape[3], device=q.device)
    rest = (rotation, None, q.shape[3] ** -0.5, 0.0, True, config.to_string(), "triton")
    return [lambda cache=cache: torch.ops.kvarn.attention(q, *cache, *rest) for cache in caches]


def candidates(stage: Stage, case: Case) -> list[str]:
    """Dense implementations to try, none of which is known not to be installed."""
    names = [*SDPA]
    point = (case.shape.batch, case.context)
    if stage.dry or (case.main and point in FLEX_POINTS):
        names.append("flex")
    return [*names, "flash_attn", "flashinfer"]


def screen(
    stage: Stage, names: list[str], q: torch.Tensor, stored: list[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[dict[str, float], dict[str, str], str, Calls]:
    """Milliseconds of those that run and agree, why others do not, and the fastest."""
    values: dict[str, float] = {}
    failed: dict[str, str] = {}
    winner, winning = "", ()
    wanted: torch.Tensor | None = None
    for name in names:
        try:
            calls = calls_of(name, q, stored)
            found = calls[0]().float()
            wanted = found if wanted is None else wanted
            error = ((found - wanted).norm() / wanted.norm()).item()
            if not error <= AGREEMENT:
                raise ValueError(f"differs from {next(iter(values))} by {error:.1e}")
            values[name] = stage.clock.measure({name: calls}, rounds=SCREEN_ROUNDS)[name].median
            if values[name] == min(values.values()):
                winner, winning = name, calls
        except Exception as error:
            failed[name] = "not installed" if isinstance(error, ImportError) else short(error)[:70]
            stage.check_alive()
    return values, failed, winner, winning


def converted(
    stage: Stage, case: Case, q: torch.Tensor, stored: list[tuple[torch.Tensor, torch.Tensor]],
    caches: list[TileCache], values: dict[str, float], failed: dict[str, str],
) -> dict[str, float]:  # fmt: skip
    """Milliseconds of attending to bfloat16 copies made of fp8 and of our tiles."""
    if case.shape.batch * case.context > CONVERTED_TOKENS:
        return {}
    known = [name for name in values if name in SDPA]
    attend = SDPA[min(known, key=lambda name: values[name]) if known else next(iter(SDPA))]
    found: dict[str, float] = {}
    makers = {
        "fp8": lambda: fp8_calls(attend, q, stored),
        "dequantized": lambda: dequantized_calls(attend, q, caches, case),
    }
    for name, make in makers.items():
        try:
            found[name] = stage.clock.measure({name: make()}, rounds=SCREEN_ROUNDS)[name].median
        except Exception as error:
            failed[name] = short(error)[:70]
            stage.check_alive()
    return found


def dequantized_calls(
    attend: Attention, q: torch.Tensor, caches: list[TileCache], case: Case
) -> Calls:
    """`kvarn::dequantize_*` of all tiles, sinks and tail put around them, then attention."""
    config, line = case.config, case.config.to_string()
    rotation = hadamard(q.shape[3], device=q.device)
    tiles = config.num_tiles(case.context)
    tail = case.context - config.num_sink_tokens - tiles * config.group_size

    def call(cache: TileCache) -> torch.Tensor:
        live = cache.tiles(0, tiles)
        keys = torch.ops.kvarn.dequantize_keys(
            live.k_codes, live.k_channel_affine, live.k_token_scale, rotation,
            cache.k_equalizer.unsqueeze(2), line,
        )  # fmt: skip
        values = torch.ops.kvarn.dequantize_values(
            live.v_codes, live.v_token_affine, live.v_channel_scale, rotation,
            cache.v_equalizer.unsqueeze(2), line,
        )  # fmt: skip
        k = [cache.k_sink, keys.to(q.dtype).flatten(2, 3), cache.k_tail[:, :, :tail]]
        v = [cache.v_sink, values.to(q.dtype).flatten(2, 3), cache.v_tail[:, :, :tail]]
        return attend(q, torch.cat(k, dim=2), torch.cat(v, dim=2))

    return [lambda cache=cache: call(cache) for cache in caches]


def pairs(
    stage: Stage, shape: Shape, context: int, copies: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random keys and values `[B, H_kv, context, D]`."""
    size = (shape.batch, shape.kv_heads, context, shape.head_dim)
    return [(_random(stage, *size), _random(stage, *size)) for _ in range(copies)]


def _random(stage: Stage, *size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.bfloat16, device=stage.device).normal_()
