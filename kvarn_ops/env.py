"""What runs here: versions, hardware and compilers, as text for bug reports and result files."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

__all__ = ["environment", "is_installed", "missing_package_message"]

NOT_INSTALLED = "not installed"

# Distribution names. Read from metadata: importing torch_tensorrt without a GPU raises.
_DISTRIBUTIONS = {
    "triton": ("triton", "pytorch-triton-rocm", "pytorch-triton-xpu", "triton-windows"),
    "transformers": ("transformers",),
    "onnx": ("onnx",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "torch_tensorrt": ("torch-tensorrt",),
}

_EXTRA_OF_PACKAGE = {
    "accelerate": "hf",
    "matplotlib": "bench",
    "numpy": "bench",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "rich": "bench",
    "safetensors": "hf",
    "torch_tensorrt": "tensorrt",
    "transformers": "hf",
}

# Those that decide which code Inductor or the kernels' authors care about.
_CPU_FLAGS = (
    "avx2", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile",
    "amx_int8", "amx_bf16", "asimd", "asimddp", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip


def environment() -> dict[str, str]:
    """Describe the machine and the installed versions.

    Returns
    -------
    dict of str to str
        Stable keys in the order of printing. A package that is not installed has the value
        ``"not installed"``; nothing but torch is imported.
    """
    from kvarn_ops import __version__

    kind, location = _source()
    values = {
        "kvarn_ops": __version__,
        "source": kind,
        "location": location,
        "python": f"{platform.python_version()} ({sys.executable})",
        "os": platform.platform(),
        "torch": torch.__version__,
    }
    for name, distributions in _DISTRIBUTIONS.items():
        values[name] = _first_version(distributions)
    values |= {
        "cpu": _cpu_model(),
        "cpu_features": _cpu_features(),
        "threads": f"{torch.get_num_threads()} used by torch, {os.cpu_count()} logical cores",
        "cuda": str(torch.version.cuda or "not in this build of torch"),
        "rocm": str(torch.version.hip or "not in this build of torch"),
        "devices": _devices(),
        "cxx": _cxx_compiler(),
        "backend": _backend(),
    }
    return values


def missing_package_message(package: str | None, *, needed_by: str) -> str | None:
    """Say which extra installs `package`; None if it is installed, or no optional package of ours.

    Parameters
    ----------
    package : str or None
        The ``name`` of an `ImportError`: a package or a module in it.
    needed_by : str
        The subject of the sentence.
    """
    top_level = (package or "").partition(".")[0]
    extra = _EXTRA_OF_PACKAGE.get(top_level)
    if extra is None or is_installed(top_level):
        return None
    return (
        f"{needed_by} needs {top_level}, which is not installed: "
        f"pip install 'kvarn-ops[{extra}]' (or {top_level} alone)."
    )


def is_installed(package: str) -> bool:
    """Tell whether a top-level package can be found, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # a finder that blocks it; a half-initialized module
        return False


def _first_version(distributions: tuple[str, ...]) -> str:
    for distribution in distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return NOT_INSTALLED


def _source() -> tuple[str, str]:
    """Return how the running code got here (checkout, editable or wheel), and its folder."""
    here = Path(__file__).resolve().parent
    if not (here.parent / "pyproject.toml").is_file():
        return "wheel", str(here)
    try:
        direct_url = metadata.distribution("kvarn-ops").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        direct_url = None
    origin = json.loads(direct_url) if direct_url else {}
    editable = origin.get("dir_info", {}).get("editable", False)
    return ("editable" if editable else "checkout"), str(here)


def _cpu_info() -> dict[str, str]:
    """Return the first processor's entry of /proc/cpuinfo; empty where there is none."""
    try:
        first, _, _ = Path("/proc/cpuinfo").read_text().partition("\n\n")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _cpu_model() -> str:
    model = _cpu_info().get("model name") or platform.processor() or platform.machine()
    return f"{model} ({platform.machine()})"


def _cpu_features() -> str:
    info = _cpu_info()
    present = (info.get("flags") or info.get("Features") or "").split()
    flags = [flag for flag in _CPU_FLAGS if flag in present]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{capability} in ATen; {', '.join(flags) or 'flags unknown'}"


def _devices() -> str:
    if not torch.cuda.is_available():
        return "none"
    described = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        gib = device.total_memory / 2**30
        described.append(f"{device.name} (sm_{device.major}{device.minor}, {gib:.0f} GiB)")
    return "; ".join(described)


def _cxx_compiler() -> str:
    """Name the C++ compiler that Inductor would call (CXX, else the platform's default)."""
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    path = shutil.which(name.split()[0])
    if path is None:
        return f"{name}: not found (torch.compile on CPU needs a C++ compiler; set CXX)"
    try:
        answer = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=10, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        answer = ""
    return f"{path}: {answer.splitlines()[0] if answer else 'version unknown'}"


def _backend() -> str:
    from kvarn_ops import dispatch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return f"{dispatch.resolve('auto', device)} on {device}"
