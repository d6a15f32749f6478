"""Script: compile the engines' attention kernel for GPUs that are not there, and assemble it.

Prints what TensorRT's launcher relies on, one JSON list for the cases given as a JSON list.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton

from kvarn_ops.kernels import heuristics
from kvarn_ops.kernels.engine import EngineProblem, shape_for
from kvarn_ops.kernels.ptx import compile_engine_ptx

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def assembled(text: str) -> str:
    """What the assembler for the PTX's target says; empty if it accepts the text."""
    found = re.search(r"\.target\s+(sm_(\d+)\w*)", text)
    assert found
    tool = TOOLS / ("ptxas-blackwell" if int(found[2]) >= 100 else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(text)
        done = subprocess.run(
            [str(tool), f"--gpu-name={found[1]}", str(source), "-o", str(source) + ".cubin"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    return (done.stdout + done.stderr).strip() if done.returncode else ""


def described(case: dict[str, Any]) -> dict[str, Any]:
    arch, head_dim, heads, ratio = case["arch"], case["head_dim"], 4, case.get("ratio", 4)
    key_bits, value_bits = case["bits"]
    group, sinks, lag = case.get("group", 128), 128, case.get("lag", 0)
    ring = group * (1 + -(-2 * lag // group))
    device = heuristics.Device(arch, 132, ptx=True, wavefront=32, interpreted=False)
    with heuristics.assumed(device):
        shape = shape_for(
            torch.device("cuda"), 1, heads, ratio, 64, sinks + ring + 1, head_dim, group, key_bits,
            value_bits,
        )  # fmt: skip
    problem = EngineProblem(
        heads, head_dim, group, key_bits, value_bits, sinks, ring, lag, head_dim**-0.5,
        case.get("softcap", 0.0), ratio, shape.dense_slots, shape.splits,
    )  # fmt: skip
    made = compile_engine_ptx(problem, shape, getattr(torch, case["dtype"]), arch)
    entry = re.search(r"\.visible\s+\.entry\s+(\S+?)\((.*?)\)", made.text, re.S)
    assert entry
    required = re.search(r"\.reqntid (\d+)", made.text)
    return {
        "name": made.name,
        "entry": entry[1],
        "params": [param.split()[1] for param in entry[2].split(",")],
        "required_threads": required and int(required[1]),
        "threads": made.threads,
        "shared_bytes": made.shared_bytes,
        "block_rows": made.block_rows,
        "assembler": assembled(made.text),
    }


if __name__ == "__main__":
    print(json.dumps([described(case) for case in json.loads(sys.argv[1])]))
