"""Generate text with onnxruntime and numpy alone, from a step model with a KVarN cache.

Write the model once, which needs torch, transformers and the extra `onnx`:

    python examples/onnx_generate.py byte_model.onnx --export

Then generate, which needs none of them:

    python examples/onnx_generate.py byte_model.onnx --prompt "import os" --tokens 200

The model in examples/byte_model reads and writes bytes. For others give token ids and decode the
ids that come out with their tokenizer.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

OPENS_FILE = 256  # the byte model's token before a file
DTYPES = {
    "tensor(uint8)": np.uint8,
    "tensor(int64)": np.int64,
    "tensor(float16)": np.float16,
    "tensor(float)": np.float32,
}


class StepModel:
    """A session and the cache of `rows` sequences, which starts empty."""

    def __init__(self, path: str, rows: int = 1, threads: int = 0) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads  # 0: as many as the machine has cores
        self.session = onnxruntime.InferenceSession(path, options)
        about = self.session.get_modelmeta().custom_metadata_map
        self.chunk = int(about["kvarn_ops.chunk"])
        self.max_cache_len = int(about["kvarn_ops.max_cache_len"])
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.empty = {
            value.name: np.zeros([rows, *value.shape[1:]], DTYPES[value.type])
            for value in self.session.get_inputs()
            if value.name.startswith("past.")
        }
        self.past = self.empty

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """Logits `[rows, vocabulary]` after the new tokens `ids` `[rows, S]`, of any length."""
        for start in range(0, ids.shape[1], self.chunk):
            new = {"input_ids": ids[:, start : start + self.chunk]}
            results = self.session.run(None, new | self.past)
            named = dict(zip(self.outputs, results, strict=True))
            logits = named.pop("logits")[:, -1]
            self.past = {name.replace("present.", "past."): x for name, x in named.items()}
        return logits

    def cache_bytes(self) -> int:
        return sum(x.nbytes for x in self.past.values())


def generate(step: StepModel, prompt: list[int], count: int) -> list[int]:
    """Greedy: the most probable token each time."""
    if len(prompt) + count > step.max_cache_len:
        raise SystemExit(f"the model holds {step.max_cache_len} tokens: give a smaller --tokens")
    made: list[int] = []
    new = prompt
    while len(made) < count:
        logits = step(np.array([new], np.int64))
        made.append(int(logits[0].argmax()))
        new = made[-1:]
    return made


def export(path: str, max_cache_len: int, preset: str, chunk: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    import kvarn_ops
    from kvarn_ops.export import to_onnx

    folder = Path(__file__).parent / "byte_model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    kvarn_ops.patch(model, preset)
    to_onnx(model, path, max_cache_len=max_cache_len, batch_size=1, chunk=chunk)


def main() -> None:
    parser = argparse.ArgumentParser(description="Text from a KVarN step model in ONNX.")
    parser.add_argument("model", help="the .onnx file")
    parser.add_argument("--export", action="store_true", help="write it from examples/byte_model")
    parser.add_argument("--max-cache-len", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=256, help="most new tokens of a step")
    parser.add_argument("--preset", default="k4v2_g128")
    parser.add_argument("--prompt", default="# example.py\nimport os\n\n\ndef ")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as there are cores")
    options = parser.parse_args()
    if options.export:
        export(options.model, options.max_cache_len, options.preset, options.chunk)
        return
    step = StepModel(options.model, threads=options.threads)
    prompt = [OPENS_FILE, *options.prompt.encode()]
    start = time.perf_counter()
    made = generate(step, prompt, options.tokens)
    seconds = time.perf_counter() - start
    print(bytes(i for i in made if i < 256).decode(errors="replace"))
    print(
        f"[{options.tokens} tokens, {1000 * seconds / options.tokens:.2f} ms each, "
        f"cache {step.cache_bytes() / 1e6:.2f} MB]"
    )


if __name__ == "__main__":
    main()
