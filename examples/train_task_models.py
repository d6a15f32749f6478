"""Train the two small models of the evaluation: pointer chase and line retrieval.

Both tasks are generated, so nothing is downloaded. Each model needs 6 to 20 minutes of one core.

Example
-------
    python examples/train_task_models.py chase
    python examples/train_task_models.py lines
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from kvarn_ops.eval.tasks import chase, lines

TOKENS_PER_STEP = 8192
QUESTIONS = 32  # per training document of the line task
MOVE_ON = 0.95  # accuracy at which the curriculum goes to the next length
LOG_EVERY = 50

Batch = tuple[Tensor, Tensor]  # token ids [n, t], targets [n, t] with -100 where none


class Task(NamedTuple):
    """What a model is trained on; the last length is that of the evaluation."""

    vocab_size: int
    curriculum: tuple[int, ...]
    final: tuple[int, ...]
    positions: int
    tokens: Callable[[int], int]  # of a sequence, by length
    make: Callable[[int, int, torch.Generator], Batch]


def chase_batch(count: int, length: int, generator: torch.Generator) -> Batch:
    """Whole chains; only the chain is learned."""
    prompts, answers = chase.make_chases(count, length, generator)
    ids = torch.cat([prompts, answers[:, :-1]], dim=-1)
    targets = torch.full_like(ids, -100)
    targets[:, prompts.shape[1] - 1 :] = answers
    return ids, targets


def lines_batch(count: int, length: int, generator: torch.Generator) -> Batch:
    """Documents with many questions, so that one document teaches a lot."""
    documents, questions, answers = lines.make_lines(
        count, length, min(length, QUESTIONS), generator, min(2 * length, lines.NAMES)
    )
    turns = torch.cat([questions, answers], dim=-1)
    targets = torch.full_like(turns, -100)
    targets[..., 1:2] = answers
    ids = torch.cat([documents, turns.flatten(1)], dim=-1)
    return ids, torch.cat([torch.full_like(documents, -100), targets.flatten(1)], dim=-1)


TASKS = {
    "chase": Task(
        chase.VOCAB_SIZE, (4, 8, 16, 32, 64, 96, 126), (64, 126), 512,
        lambda n: 4 * n + 1, chase_batch,
    ),
    "lines": Task(
        lines.VOCAB_SIZE, (4, 8, 16, 32, 64, 128, 240), (128, 240), 1024,
        lambda n: 3 * (n + min(n, QUESTIONS)), lines_batch,
    ),
}  # fmt: skip


def build_model(task: Task) -> LlamaForCausalLM:
    """Four layers of two query heads and one KV head of 64; 0.6 M parameters and the embedding."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": task.vocab_size - 1}
    config = LlamaConfig(
        vocab_size=task.vocab_size,
        max_position_embeddings=task.positions,
        tie_word_embeddings=True,
        rope_theta=10000.0,
        **shape,
        **heads,
        **special,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**special)
    return model


def train(task: Task, args: argparse.Namespace, log: Path) -> LlamaForCausalLM:
    """Curriculum at a constant rate, then a mix of long lengths with a falling one."""
    model = build_model(task)
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01
    )
    started, stage, step, tokens = time.monotonic(), 0, 0, 0
    recent: list[float] = []
    stage_started = started
    bar = tqdm(total=len(task.curriculum) + 1, unit="stage")
    with log.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "tokens", "length", "loss", "accuracy", "lr", "seconds"])
        while True:
            now = time.monotonic()
            if stage < len(task.curriculum):
                length, factor = task.curriculum[stage], min(1.0, (step + 1) / 100)
            else:
                progress = (now - stage_started) / (60 * args.final_minutes)
                if progress >= 1:
                    break
                length = task.final[step % len(task.final)]
                factor = 0.5 * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
            ids, targets = task.make(
                max(8, TOKENS_PER_STEP // task.tokens(length)), length, generator
            )
            for group in optimizer.param_groups:
                group["lr"] = args.lr * factor
            logits = model(input_ids=ids, use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step, tokens = step + 1, tokens + ids.numel()
            asked = targets != -100
            recent.append((logits.argmax(-1) == targets)[asked].float().mean().item())
            accuracy = sum(recent[-20:]) / len(recent[-20:])
            if step % LOG_EVERY == 0:
                row = [step, tokens, length, f"{loss.item():.4f}", f"{accuracy:.4f}"]
                writer.writerow([*row, f"{args.lr * factor:.3g}", f"{now - started:.0f}"])
                file.flush()
                bar.set_postfix(length=length, accuracy=f"{accuracy:.4f}", step=step)
            if stage < len(task.curriculum) and len(recent) >= 20 and accuracy >= MOVE_ON:
                stage, recent, stage_started = stage + 1, [], time.monotonic()
                bar.update(1)
    bar.close()
    return model


def main() -> None:
    """Train one model and store it with its log."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("--seed", type=int, default=0, help="weights and data (default 0)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak rate (default %(default)s)")
    parser.add_argument("--final-minutes", type=float, default=7.0, help="length of the last stage")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="default: <task>_model beside this script")
    args = parser.parse_args()
    output = args.output or Path(__file__).resolve().parent / f"{args.task}_model"
    output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = train(TASKS[args.task], args, output / "training_log.csv")
    copy.deepcopy(model).save_pretrained(output)


if __name__ == "__main__":
    main()
