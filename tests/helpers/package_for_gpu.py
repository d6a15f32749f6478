"""Script: `aot_compile` of a model on a GPU that is not there.

Prints what the package runs (kernels and calls of custom ops), which kernels it embeds, and what it
says of its state.
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
import torch._inductor.graph
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily

import absent_gpu
import kvarn_ops
from kvarn_ops import dispatch
from kvarn_ops.export import aoti
from tiny_models import tiny_model

_OPTIONS = {
    "aot_inductor.package_cpp_only": True,  # CUDA's headers and libraries may be missing
    "aot_inductor.precompile_headers": False,
    "aot_inductor.package_constants_in_so": False,  # weights have no memory
    "compile_threads": 1,
}


def model_on_gpu() -> Any:
    """Two layers in bf16 whose weights have no memory; to be called in a fake mode."""
    model = tiny_model(head_dim=64)
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                fake = torch.empty(weight.shape, dtype=torch.bfloat16, device="cuda:0")
                module._parameters[name] = torch.nn.Parameter(fake, requires_grad=False)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, device="cuda:0")
    return kvarn_ops.patch(model, "k4v2_g32", backend="triton", num_sink_tokens=32)


def export_in_one_mode(step: Any, most: int) -> Any:
    """`export_step`, with weights, cache and example inputs of the program's own fake mode."""
    program = exported(step, most)
    values = {x.name: x.meta["val"] for x in program.graph.find_nodes(op="placeholder")}
    inputs = []
    for spec in program.graph_signature.input_specs:
        if spec.target is None:
            inputs.append(values[spec.arg.name])
            continue
        for held in (program.state_dict, program.constants):
            if spec.target in held:
                held[spec.target] = values[spec.arg.name]
    program.example_inputs = (tuple(inputs), {})
    return program


def compile_outside(*args: Any, **kwargs: Any) -> Any:
    """Inductor makes its own fake mode."""
    with unset_fake_temporarily():
        return compiled(*args, **kwargs)


exported, compiled = aoti.export_step, torch._inductor.aoti_compile_and_package


def main(package: Path) -> None:
    absent_gpu.pretend()
    dispatch._obstacle = lambda *_: ""  # type: ignore[assignment]  # it would run a kernel
    aoti.export_step = export_in_one_mode
    torch._inductor.aoti_compile_and_package = compile_outside
    torch._inductor.graph.is_same_tensor = lambda one, other: one is other
    with FakeTensorMode(), torch.no_grad(), inductor_config.patch(_OPTIONS):
        aoti.aot_compile(model_on_gpu(), package, max_cache_len=256, chunk=1)
    with zipfile.ZipFile(package) as archive:
        names = archive.namelist()
        (code,) = (archive.read(name).decode() for name in names if name.endswith("wrapper.cpp"))
        objects = b"".join(archive.read(name) for name in names if name.endswith(".o"))
        about = [archive.read(name) for name in names if name.endswith("metadata.json")]
    body = code[code.rindex("AOTInductorModel::run_impl(") :]
    embedded = re.findall(r"loadKernel\(__(\w+)_start", code)
    print(json.dumps({
        "launches": re.findall(r"\bcall_(\w+?)_\d+\(", body),
        "ops": re.findall(r"aoti_torch_\w*(?:proxy|call_dispatcher)\w*", body),
        "copies": re.findall(r"aoti_torch_copy_\w*", body),
        "embedded": [
            re.sub(r"_\d+$", "", name) for name in embedded if f"__{name}_start".encode() in objects
        ],
        "state": sorted(json.loads(json.loads(about[0])["kvarn_ops.state"])) if about else [],
    }))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
