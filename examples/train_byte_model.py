"""Train a small Llama-style byte model on the Python standard library.

The corpus is the text that every machine with Python already has, so nothing is
downloaded. Token ids 0 to 255 are bytes, 256 opens a file and 257 closes it. A few large
modules are kept out of training: they measure the model and serve as unseen long inputs.

Example
-------
    python examples/train_byte_model.py --minutes 40 --threads 2
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import os
import platform
import random
import sysconfig
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

BOS, EOS, VOCAB_SIZE = 256, 257, 258
MAX_CONTEXT = 4096
TOKENS_PER_STEP = 8192
TOKENS_PER_PIECE = 4096  # what a forward and backward pass keeps inside the CPU caches
STEPS_PER_LOG_ROW = 25
# (share of the budget at which the phase ends, context length): attention is the slowest
# kernel on a CPU, so most steps are taken at lengths where it is still cheap.
CONTEXT_PHASES = ((0.40, 1024), (0.75, 2048), (math.inf, MAX_CONTEXT))
BUCKETS = (0, 256, 1024, 2048, MAX_CONTEXT)
HELDOUT = {
    *("_pydecimal.py", "argparse.py", "configparser.py", "difflib.py", "http/cookiejar.py"),
    *("mailbox.py", "statistics.py", "subprocess.py", "tarfile.py", "typing.py"),
    "urllib/request.py",
}
# Tests quote the modules they test, encodings and pydoc_data are mostly tables, and the
# build configuration holds paths of the machine that built Python.
SKIPPED_PARTS = {"test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
SKIPPED_PARTS |= {"site-packages", "dist-packages"}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")

Documents = dict[str, bytes]


def read_documents() -> tuple[Documents, Documents]:
    """Training and held-out files: text by path relative to the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    training: Documents = {}
    heldout: Documents = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        name = relative.as_posix()
        if not SKIPPED_PARTS & set(relative.parts) and not name.startswith(SKIPPED_PREFIXES):
            (heldout if name in HELDOUT else training)[name] = path.read_bytes()
    return training, heldout


def shared_line_share(training: Documents, heldout: Documents, min_length: int = 32) -> float:
    """Share of the long held-out lines that also occur in a training file."""
    known = {line.strip() for text in training.values() for line in text.splitlines()}
    lines = [line.strip() for text in heldout.values() for line in text.splitlines()]
    lines = [line for line in lines if len(line) >= min_length]
    return sum(line in known for line in lines) / len(lines)


def encode(name: str, text: bytes) -> Tensor:
    """Turn one file into token ids, with a header line that names it."""
    return torch.tensor([BOS, *f"# {name}\n".encode(), *text, EOS], dtype=torch.int16)


def pack(documents: Documents, seed: int) -> Tensor:
    """Concatenate whole files in a seeded random order."""
    names = sorted(documents)
    random.Random(seed).shuffle(names)
    return torch.cat([encode(name, documents[name]) for name in names])


def training_windows(stream: Tensor, first: int, count: int, context: int) -> Tensor:
    """Cut ``count`` windows of ``context + 1`` tokens out of the training stream.

    Offsets follow the golden-ratio sequence: it covers the stream evenly whatever the
    window length, and a window depends on its number alone, which makes resuming exact.
    """
    golden = (math.sqrt(5) - 1) / 2
    room = len(stream) - context - 1
    offsets = [int((i * golden) % 1.0 * room) for i in range(first, first + count)]
    return torch.stack([stream[o : o + context + 1] for o in offsets]).long()


def heldout_windows(heldout: Documents, context: int) -> Tensor:
    """Cut every held-out file into consecutive windows; a short tail is dropped."""
    rows = [encode(name, text).unfold(0, context + 1, context) for name, text in heldout.items()]
    return torch.cat(rows).long()


def build_model() -> LlamaForCausalLM:
    """Make the untrained model."""
    layers = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 5}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    places = {"max_position_embeddings": MAX_CONTEXT, "rope_theta": 10000.0}
    special = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS}
    shape = {"vocab_size": VOCAB_SIZE, "tie_word_embeddings": True, **layers, **heads, **places}
    model = LlamaForCausalLM(LlamaConfig(**shape, **special))
    model.generation_config = GenerationConfig(**special)
    return model


def build_optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "layers" not in n]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]


def score(model: LlamaForCausalLM, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Bits and correctness of the top choice for every token but the first of each row."""
    targets = windows[:, 1:]
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits.float()
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view_as(targets) / math.log(2), logits.argmax(-1) == targets


@torch.inference_mode()
def score_heldout(model: LlamaForCausalLM, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Apply ``score`` to one window at a time, which bounds the memory."""
    rows = [score(model, window) for window in tqdm(windows.split(1), "evaluate", leave=False)]
    bits, hits = zip(*rows, strict=True)
    return torch.cat(bits), torch.cat(hits)


def position_table(bits: Tensor, hits: Tensor) -> list[dict[str, float]]:
    """Mean loss and accuracy by position in the window; the last row covers all of it."""
    table = []
    for low, high in [*itertools.pairwise(BUCKETS), (0, MAX_CONTEXT)]:
        loss, accuracy = (round(x[:, low:high].float().mean().item(), 4) for x in (bits, hits))
        table.append({"from": low, "to": high, "bits_per_byte": loss, "accuracy": accuracy})
    return table


def save_checkpoint(model: LlamaForCausalLM, output: Path) -> None:
    """Write a bfloat16 Hugging Face checkpoint; each file is replaced atomically."""
    with tempfile.TemporaryDirectory(dir=output) as folder:
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
        for path in Path(folder).iterdir():
            path.chmod(0o644)
            path.replace(output / path.name)


def schedule(progress: float) -> tuple[float, int]:
    """Learning rate factor and context length at a share of the time budget.

    The rate warms up over 2 %, stays flat to 50 %, then falls linearly to 1 %.
    """
    factor = min(progress / 0.02 + 0.01, (1.0 - progress) / 0.5 + 0.01, 1.0)
    return max(factor, 0.01), next(c for end, c in CONTEXT_PHASES if progress < end)


class Trainer:
    """Model, optimizers and counters of a run, which can be stored and resumed."""

    def __init__(self, args: argparse.Namespace, training: Documents, heldout: Documents) -> None:
        self.args = args
        self.stream = pack(training, args.seed)
        self.heldout = heldout
        self.model = build_model()
        self.optimizers = build_optimizers(self.model, args.lr)
        self.state = {"step": 0, "tokens": 0, "windows": 0, "seconds": 0.0, "best": math.inf}
        self.state_path: Path = args.scratch / "state.pt"
        self.log_path: Path = args.output / "training_log.csv"
        if args.resume:
            saved = torch.load(self.state_path, weights_only=True)
            self.model.load_state_dict(saved["model"])
            for optimizer, values in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(values)
            self.state = saved["state"]
        else:
            self.log_path.write_text("step,tokens,context,train_bits,heldout_bits,lr,seconds\n")

    def take_step(self, lr: float, context: int) -> float:
        """Update the weights once; returns the training loss in bits per byte."""
        count = TOKENS_PER_STEP // context
        windows = training_windows(self.stream, self.state["windows"], count, context)
        total = 0.0
        for piece in windows.split(max(1, TOKENS_PER_PIECE // context)):
            with torch.autocast("cpu", torch.bfloat16):
                bits, _ = score(self.model, piece)
            loss = bits.sum() / TOKENS_PER_STEP
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.state["step"] += 1
        self.state["tokens"] += TOKENS_PER_STEP
        self.state["windows"] += count
        return total

    def save(self, context: int) -> float:
        """Score the model, keep it if it is the best so far, and store the state."""
        windows = heldout_windows(self.heldout, context)
        stride = max(1, windows.numel() // self.args.eval_bytes)
        with torch.autocast("cpu", torch.bfloat16):
            bits = score_heldout(self.model, windows[::stride])[0].mean().item()
        if bits < self.state["best"]:
            self.state["best"] = bits
            save_checkpoint(self.model, self.args.output)
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        saved = {"model": self.model.state_dict(), "optimizers": optimizers, "state": self.state}
        torch.save(saved, self.state_path.with_suffix(".tmp"))
        self.state_path.with_suffix(".tmp").replace(self.state_path)
        return bits

    def run(self) -> None:
        """Train until the time budget is spent."""
        state, budget, recent = self.state, self.args.minutes * 60, []
        interval = self.args.save_minutes * 60
        origin, saved_at = time.monotonic() - state["seconds"], state["seconds"]
        bar = tqdm(total=round(budget), initial=round(state["seconds"]), unit="s")
        while state["seconds"] < budget:
            factor, context = schedule(state["seconds"] / budget)
            recent.append(self.take_step(self.args.lr * factor, context))
            state["seconds"] = time.monotonic() - origin
            saving = state["seconds"] >= min(saved_at + interval, budget)
            if not saving and len(recent) < STEPS_PER_LOG_ROW:
                continue
            heldout_bits = f"{self.save(context):.4f}" if saving else ""
            if saving:
                saved_at = state["seconds"] = time.monotonic() - origin
            train_bits = f"{sum(recent) / len(recent):.4f}"
            row = [state["step"], state["tokens"], context, train_bits, heldout_bits]
            row += [f"{self.args.lr * factor:.3g}", f"{state['seconds']:.0f}"]
            with self.log_path.open("a") as file:
                print(*row, sep=",", file=file)
            bar.update(round(state["seconds"]) - bar.n)
            bar.set_postfix(step=state["step"], train=train_bits, best=f"{state['best']:.4f}")
            recent.clear()
        bar.close()


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--minutes", type=float, default=40.0, help="wall clock budget (default %(default)s)")
    add("--lr", type=float, default=7e-3, help="peak learning rate (default %(default)s)")
    add("--seed", type=int, default=0, help="initial weights and file order (default 0)")
    add("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all)")
    add("--save-minutes", type=float, default=2.5, help="time between checkpoints")
    add("--eval-bytes", type=int, default=60_000, help="held-out bytes scored at a checkpoint")
    output = Path(__file__).resolve().parent / "byte_model"
    add("--output", type=Path, default=output, help="checkpoint directory")
    scratch = Path(tempfile.gettempdir()) / "kvarn_byte_model"
    add("--scratch", type=Path, default=scratch, help="directory of the resumable state")
    add("--resume", action="store_true", help="continue from the state in --scratch")
    add("--evaluate-only", action="store_true", help="score the checkpoint in --output")
    return parser.parse_args()


def main() -> None:
    """Train the model, then score the saved checkpoint on all held-out windows."""
    args = parse_args()
    for folder in (args.output, args.scratch):
        folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    training, heldout = read_documents()
    if not args.evaluate_only:
        Trainer(args, training, heldout).run()
    model = AutoModelForCausalLM.from_pretrained(args.output, dtype=torch.float32)
    table = position_table(*score_heldout(model, heldout_windows(heldout, MAX_CONTEXT)))
    report = {
        "python_version": platform.python_version(),
        "modules": {name: len(text) for name, text in heldout.items()},
        "train_files": len(training),
        "train_bytes": sum(map(len, training.values())),
        "shared_line_share": round(shared_line_share(training, heldout), 4),
        "positions": table,
    }
    (args.output / "heldout.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
