"""What generating text costs with each form of an exported model, on one thread.

    python benchmarks/exported_steps.py --folder exports --program build/aot_cpp/generate \
        --out benchmarks/results/exported_steps_cpu.csv

The model is examples/byte_model in fp32, its prompt 1000 bytes of source code. Missing files are
exported into `--folder` (8 minutes of CPU time) and used again by the next run; `--program` is
`examples/aot_cpp`, built. The forms take turns; every text must be the text of eager mode. `prompt`
is the time to the first token, `token` that of each further one, tiles that are quantized included.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; the C++ program inherits it

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import kvarn_ops
from kvarn_ops.benchmark.results import ResultFile, conditions
from kvarn_ops.benchmark.timing import Timing, noise
from kvarn_ops.export import aot_compile, to_onnx

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples" / "byte_model"
OPENS_FILE = 256  # the model's token before a file
SIZES = {"max_cache_len": 2048, "chunk": 256}
Generate = Callable[[int], tuple[str, float]]  # count of tokens to text and seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("exported_steps_cpu.csv"))
    parser.add_argument("--folder", type=Path, default=Path("exports"))
    parser.add_argument("--program", type=Path, help="examples/aot_cpp, built")
    parser.add_argument("--preset", default="k4v2_g128")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    prompt = (ROOT / "kvarn_ops" / "tables.py").read_text(encoding="utf-8")
    prompt = prompt.encode("ascii", "ignore").decode()[:1000]
    forms = contenders(args.folder, args.preset, prompt, args.program)
    taken = alternated(forms, args.tokens, args.rounds)
    results = ResultFile(args.out, ("form",))
    around = conditions(torch.device("cpu"), 1)
    spreads = {}
    for form, (first, whole) in taken.items():
        further = [(b - a) / (args.tokens - 1) for a, b in zip(first, whole, strict=True)]
        timing, start = Timing.of(further), Timing.of(first)
        spreads[form] = timing.spread
        row = {
            "form": form,
            "preset": args.preset,
            "prompt_tokens": len(prompt) + 1,
            "tokens": args.tokens,
            "prompt_ms": f"{start.median:.1f}",
            "token_ms": f"{timing.median:.3f}",
            "minimum_ms": f"{timing.minimum:.3f}",
            "whole_ms": f"{1e3 * statistics.median(whole):.0f}",
            "spread": f"{timing.spread:.3f}",
            "rounds": args.rounds,
        }
        results.add(row | around)
        print(f"{form}: {row['prompt_ms']} ms for the prompt, {row['token_ms']} ms a token")
    print(noise(spreads) or "")


def alternated(
    forms: dict[str, Generate], count: int, rounds: int
) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds to the first token and to the last, by form."""
    texts = {form: generate(count)[0] for form, generate in forms.items()}  # and warms up
    other = [form for form, text in texts.items() if text != next(iter(texts.values()))]
    if other:
        raise SystemExit(f"not the text of eager mode: {', '.join(other)}")
    taken: dict[str, tuple[list[float], list[float]]] = {form: ([], []) for form in forms}
    for _ in range(rounds):
        for form, generate in forms.items():
            for seconds, length in zip(taken[form], (1, count), strict=True):
                seconds.append(generate(length)[1])
    return taken


def contenders(folder: Path, preset: str, prompt: str, program: Path | None) -> dict[str, Generate]:
    model = kvarn_ops.patch(loaded(), preset)
    packages = exported(folder, model, preset)
    ids = [OPENS_FILE, *prompt.encode()]
    cache = kvarn_ops.KVarNCache(model.config, SIZES["max_cache_len"], preset)
    compiled = torch.compile(model, fullgraph=True)

    def eager(new: Tensor) -> Tensor:
        return model(new, past_key_values=cache).logits

    def compiled_decode(new: Tensor) -> Tensor:  # prompts eagerly, as generate does
        return (compiled if new.shape[1] == 1 else model)(new, past_key_values=cache).logits

    package = torch._inductor.aoti_load_package(str(packages["aot"]))
    state = json.loads(package.get_metadata()["kvarn_ops.state"])
    empty = {
        name: torch.zeros(shape, dtype=getattr(torch, x)) for name, (x, shape) in state.items()
    }

    def emptied() -> None:
        package.load_constants(empty, check_full_update=False)

    found = {
        "eager": in_torch(eager, cache.reset, ids),
        "torch.compile": in_torch(compiled_decode, cache.reset, ids),
        "AOTInductor, Python": in_torch(package, emptied, ids),
    }
    if program is None:
        print("AOTInductor, C++: not measured without --program")
    else:
        found["AOTInductor, C++"] = in_cpp(program, packages["aot"], prompt)
    found["onnxruntime"] = in_onnxruntime(packages["onnx"], ids)
    return found


def loaded() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def exported(folder: Path, model: Any, preset: str) -> dict[str, Path]:
    """The files, made where they are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"aot": folder / f"{preset}.pt2", "onnx": folder / f"{preset}.onnx"}
    if not paths["aot"].exists():
        aot_compile(model, paths["aot"], **SIZES)
    if not paths["onnx"].exists():
        to_onnx(model, paths["onnx"], batch_size=1, **SIZES)
    return paths


def in_torch(
    step: Callable[[Tensor], Tensor], reset: Callable[[], None], ids: list[int]
) -> Generate:
    @torch.inference_mode()
    def generate(count: int) -> tuple[str, float]:
        reset()
        start = time.perf_counter()
        new, made = ids, []
        while len(made) < count:
            for part in torch.tensor([new]).split(SIZES["chunk"], 1):
                logits = step(part.contiguous())
            new = [int(logits[0, -1].argmax())]
            made += new
        return text_of(made), time.perf_counter() - start

    return generate


def in_onnxruntime(path: Path, ids: list[int]) -> Generate:
    example: dict[str, Any] = runpy.run_path(str(ROOT / "examples" / "onnx_generate.py"))
    step = example["StepModel"](str(path), threads=1)

    def generate(count: int) -> tuple[str, float]:
        step.past = step.empty
        start = time.perf_counter()
        made = example["generate"](step, ids, count)
        return text_of(made), time.perf_counter() - start

    return generate


def in_cpp(program: Path, package: Path, prompt: str) -> Generate:
    """As the program says it, in a process of its own whose first text only warms up."""

    def generate(count: int) -> tuple[str, float]:
        words = [str(program), str(package), str(count), prompt, prompt]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        line = rf"(.*?)\n\[{count} tokens, ([\d.]+) ms each.*?\]\n"
        _, (text, each) = re.findall(line, done.stdout, re.DOTALL)
        return text, count * float(each) / 1e3

    return generate


def text_of(ids: list[int]) -> str:
    return bytes(i for i in ids if i < 256).decode(errors="replace")


if __name__ == "__main__":
    main()
