"""The order of our passes: one tuple per stage. A new pass is one file and one entry here.

A pass is a class with `__call__(self, graph: torch.fx.Graph) -> int`, the number of rewrites. It
sees only graphs with an op of ours, and reports what it could not do with `record.refuse`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from .append_last import AppendLast
from .find_copies import FindCopies
from .fuse_attention import FuseAttention

__all__ = ["FINAL", "POST_GRAD", "PRE_GRAD", "Pass"]

Pass: TypeAlias = Callable[[torch.fx.Graph], int]

# Graphs as Dynamo made them: torch functions and methods, in-place ops, the same for all devices.
PRE_GRAD: tuple[Pass, ...] = (FuseAttention(),)

# Functional aten graphs, after AOTAutograd: in-place ops are inside auto_functionalized_v2.
POST_GRAD: tuple[Pass, ...] = (AppendLast(),)

# The same graphs after Inductor's own rewrites, as code is generated from them.
FINAL: tuple[Pass, ...] = (FindCopies(),)
