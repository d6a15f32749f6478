"""Which part may import which: read from the sources, so that it holds for code no test runs.

`kernels` imports nothing of ours; the core imports kernels only in `dispatch` and `kernel_tools`,
and lowering only inside functions of `patching`; lowering imports the core; export imports both,
and the TensorRT plugin reads kernel sources.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = {"core": "kvarn_ops", "kernels": "kernels", "lowering": "lowering", "export": "export"}
COMMAND_LINE = (
    "kvarn_ops.cli", "kvarn_ops.__main__", "kvarn_ops.benchmark", "kvarn_ops.demo",
    "kvarn_ops.eval", "kvarn_ops.export_command", "kvarn_ops.verify",
)  # fmt: skip
# Core packages that may need more than torch when they are imported; the rest of the core may not.
NEEDS_EXTRAS = (*COMMAND_LINE, "kvarn_ops.hf")
# Compiles a kernel's source for TensorRT.
READS_KERNELS = "kvarn_ops.export.tensorrt_plugin"


class Import(NamedTuple):
    target: str  # absolute module name, as far as the source tells
    in_function: bool
    line: int


def module_name(path: Path, root: Path = ROOT) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    parts = parts if parts[0] == "kvarn_ops" else ("kvarn_ops", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str | None:
    first, _, rest = module.partition(".")
    if first != "kvarn_ops":
        return None
    second = rest.partition(".")[0]
    return second if second in PARTS else "core"


def is_in(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def is_type_checking(test: ast.expr) -> bool:
    return "TYPE_CHECKING" in ast.unparse(test)


def imports(source: str, module: str, is_package: bool = False) -> Iterator[Import]:
    """Yield every import, also `importlib.import_module("...")`; not those for type checkers."""

    def visit(node: ast.AST, in_function: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, in_function, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, *([base] if base else [])])
            for alias in node.names:
                # `from kvarn_ops import lowering` imports kvarn_ops.lowering.
                is_part = base == "kvarn_ops" and alias.name in PARTS
                yield Import(f"{base}.{alias.name}" if is_part else base, in_function, node.lineno)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield Import(str(node.args[0].value), in_function, node.lineno)
        if isinstance(node, ast.If) and is_type_checking(node.test):
            children: list[ast.AST] = list(node.orelse)
        else:
            children = list(ast.iter_child_nodes(node))
        inside = in_function or isinstance(
            node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
        )
        for child in children:
            yield from visit(child, inside)

    return visit(ast.parse(source), in_function=False)


def violation(module: str, found: Import) -> str | None:
    """Return the rule that an import breaks, or None."""
    source, target = part_of(module), part_of(found.target)
    if target is None:
        top_level = found.target.partition(".")[0]
        if top_level in ("kernels", "lowering", "export", "tests"):
            return f"`{top_level}` is not a top-level package of ours"
        if found.in_function or top_level in sys.stdlib_module_names or top_level == "torch":
            return None
        if source == "kernels":
            return None if top_level == "triton" else "kernels import torch and triton only"
        if source == "core" and not is_in(module, NEEDS_EXTRAS):
            return "the core needs torch only: import inside a function"
        return None
    if target == source:
        return None
    if is_in(module, COMMAND_LINE):
        return None if found.in_function or target == "core" else "the CLI imports inside functions"
    if source == "kernels":
        return "kernels import nothing of ours"
    if source == "core" and target == "kernels":
        allowed = module in ("kvarn_ops.dispatch", "kvarn_ops.kernel_tools")
        return None if allowed else "only dispatch and kernel_tools import kernels"
    if source == "core" and target == "lowering":
        allowed = module == "kvarn_ops.patching" and found.in_function
        return None if allowed else "only functions of kvarn_ops.patching import lowering"
    if (source, target) in {("lowering", "core"), ("export", "core"), ("export", "lowering")}:
        return None
    if (source, target) == ("export", "kernels") and module == READS_KERNELS:
        return None
    return f"{source} does not import {target}"


def test_no_import_points_upward():
    problems = []
    for folder in PARTS.values():
        for path in sorted((ROOT / folder).rglob("*.py")):
            module = module_name(path)
            for found in imports(path.read_text(), module, path.name == "__init__.py"):
                if rule := violation(module, found):
                    where = f"{path.relative_to(ROOT)}:{found.line}"
                    problems.append(f"{where}: imports {found.target}: {rule}")
    assert not problems, "\n".join(problems)


def test_nothing_imports_a_root_folder_by_its_bare_name():
    problems = []
    for folder in ("tests", "benchmarks", "examples", "docs"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for found in imports(path.read_text(), f"{folder}.{path.stem}"):
                if found.target.partition(".")[0] in ("kernels", "lowering", "export"):
                    problems.append(f"{path.relative_to(ROOT)}:{found.line}: {found.target}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kvarn_ops.kernels.decode", "from kvarn_ops.layout import words"),
        ("kvarn_ops.kernels.decode", "from ..layout import words"),
        ("kvarn_ops.kernels.decode", "def f():\n    import kvarn_ops"),
        ("kvarn_ops.kernels.decode", "import numpy"),
        ("kvarn_ops.layout", "def f():\n    from kvarn_ops.kernels import decode"),
        ("kvarn_ops.layout", "import importlib\nimportlib.import_module('kvarn_ops.kernels.x')"),
        ("kvarn_ops.layout", "import transformers"),
        ("kvarn_ops.patching", "from kvarn_ops.lowering import Stage"),
        ("kvarn_ops.patching", "def f():\n    from . import export"),
        ("kvarn_ops.ops.append", "def f():\n    from ..lowering import Stage"),
        ("kvarn_ops.cli", "from kvarn_ops import export"),
        ("kvarn_ops.lowering.fold", "from kvarn_ops.kernels.decode import launch"),
        ("kvarn_ops.lowering.fold", "def f():\n    import kvarn_ops.export.onnx"),
        ("kvarn_ops.export.onnx", "def f():\n    from ..kernels import decode"),
        ("kvarn_ops.export.tensorrt", "def f():\n    from ..kernels import decode"),
        ("kvarn_ops.layout", "import kernels"),
    ],
)
def test_the_rules_catch(module, source):
    assert [rule for found in imports(source, module) if (rule := violation(module, found))]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kvarn_ops.kernels.decode", "import triton\nfrom .unpack import unpack_codes"),
        ("kvarn_ops.dispatch", "def f():\n    from kvarn_ops.kernels import decode"),
        ("kvarn_ops.patching", "def f():\n    from .lowering.hooks import acquire"),
        ("kvarn_ops.cli", "def f():\n    from kvarn_ops.export import to_onnx"),
        ("kvarn_ops.lowering.fold", "from kvarn_ops.layout import words"),
        ("kvarn_ops.export.onnx", "from ..lowering import rewrite_kv_cache\nimport onnx"),
        ("kvarn_ops.export.tensorrt_plugin", "from kvarn_ops.kernels.ptx import compile"),
        ("kvarn_ops.hf.cache", "import transformers"),
        ("kvarn_ops.layout", "if TYPE_CHECKING:\n    import transformers"),
    ],
)
def test_the_rules_allow(module, source):
    assert not [rule for found in imports(source, module) if (rule := violation(module, found))]
