"""Script: package a decode step of two layers with AOTInductor for a GPU that is not there.

Prints what the package runs (kernels and calls of custom ops), and which kernels it embeds.
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor_config
from torch._subclasses import FakeTensorMode

import absent_gpu
import kvarn_ops  # noqa: F401  (registers the ops)
from kvarn_ops import KVarNConfig
from kvarn_ops.layout import allocate

_OPTIONS = {
    "aot_inductor.package_cpp_only": True,  # CUDA's headers and libraries may be missing
    "aot_inductor.embed_kernel_binary": True,
    "aot_inductor.precompile_headers": False,
}


_CONFIG = KVarNConfig.from_preset("k4v2_g32", num_sink_tokens=32)


class TwoLayers(torch.nn.Module):
    def forward(self, rotation: Any, q: Any, k: Any, v: Any, *cache: Any) -> Any:
        for _ in range(2):
            q = torch.ops.kvarn.step_(
                q, k, v, None, *cache, rotation, None, 0.125, 0.0, True, _CONFIG.to_string(),
                "triton",
            )  # fmt: skip
        return q


def main(package: Path) -> None:
    absent_gpu.pretend()
    kind: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda:0"}
    with FakeTensorMode(), torch.no_grad():
        cache = allocate(_CONFIG, 2, 2, 64, 512, torch.bfloat16, "cuda:0")
        q, k, v = (torch.empty(2, heads, 1, 64, **kind) for heads in (4, 2, 2))
        rotation = torch.empty(64, 64, device="cuda:0")
        program = torch.export.export(TwoLayers(), (rotation, q, k, v, *cache), strict=False)
    # Of the program's own fake mode.
    inputs = tuple(node.meta["val"] for node in program.graph.find_nodes(op="placeholder"))
    program.example_inputs = (inputs, {})
    with inductor_config.patch(compile_threads=1):
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(package), inductor_configs=_OPTIONS
        )
    with zipfile.ZipFile(package) as archive:
        names = archive.namelist()
        (code,) = (archive.read(name).decode() for name in names if name.endswith("wrapper.cpp"))
        objects = b"".join(archive.read(name) for name in names if name.endswith(".o"))
    body = code[code.rindex("AOTInductorModel::run_impl(") :]
    embedded = re.findall(r"loadKernel\(__(\w+)_start", code)
    print(json.dumps({
        "launches": re.findall(r"\bcall_(\w+?)_\d+\(", body),
        "ops": re.findall(r"aoti_torch_\w*(?:proxy|call_dispatcher)\w*", body),
        "copies": re.findall(r"aoti_torch_copy_\w*", body),
        "embedded": [
            re.sub(r"_\d+$", "", name) for name in embedded if f"__{name}_start".encode() in objects
        ],
    }))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
