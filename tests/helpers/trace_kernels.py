"""Script: trace a compiled decode step of kernels as on a GPU, print what Inductor makes of it.

Inductor asks Triton's driver for the target when it looks up what a kernel writes to. The driver
here only answers that question, so that no GPU is needed; nothing is run.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import triton
from torch._functorch.aot_autograd import aot_module_simplified
from torch._inductor.fx_passes.reinplace import reinplace_inplaceable_ops_core

import kvarn_ops  # noqa: F401  (registers the ops)
from absent_gpu import TargetOnly
from kvarn_ops import KVarNConfig
from kvarn_ops.hadamard import hadamard
from kvarn_ops.layout import allocate


class Traced(Exception):
    """The graph is there; the rest of the compilation is not wanted."""


def main() -> None:
    triton.runtime.driver.set_active(TargetOnly())
    config = KVarNConfig.from_preset("k4v2_g32", num_sink_tokens=32)
    cache = allocate(config, 2, 2, 64, 512, torch.float32, "cpu")
    rotation = hadamard(64)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        raise Traced

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        return aot_module_simplified(
            graph, inputs, fw_compiler=keep, keep_inference_input_mutations=True
        )

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *cache: torch.Tensor) -> Any:
        # Two layers read what the first one wrote, as in a model.
        for _ in range(2):
            q = torch.ops.kvarn.step_(
                q, k, v, None, *cache, rotation, None, 0.125, 0.0, True, config.to_string(),
                "triton",
            )  # fmt: skip
        return q

    q, (k, v) = torch.randn(2, 4, 1, 64), torch.randn(2, 2, 2, 1, 64)
    with torch.no_grad():
        try:
            torch.compile(step, backend=backend, fullgraph=True)(q, k, v, *cache)
        except Exception as error:
            if "Traced" not in f"{type(error)}{error}":
                raise
    graph = graphs[0].graph
    reinplace_inplaceable_ops_core(graph)
    kernels = [
        {
            "name": _name(node),
            "clones": [str(x) for x in node.kwargs["tensors_to_clone"]],
        }
        for node in graph.nodes
        if "triton_kernel_wrapper_functional" in str(node.target)
    ]
    left = [str(node.target) for node in graph.nodes if "kvarn" in str(node.target)]
    clones = [
        list(node.meta["val"].shape)
        for node in graph.nodes
        if node.target is torch.ops.aten.clone.default and "val" in node.meta
    ]
    print(json.dumps({"kernels": kernels, "ops": left, "clones": clones}))


def _name(node: torch.fx.Node) -> str:
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])  # type: ignore[arg-type]
    return kernel.fn.__name__


if __name__ == "__main__":
    main()
