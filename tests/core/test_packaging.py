"""What a wheel holds; every public name imports from checkout, editable install and wheel."""

from __future__ import annotations

import email
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import kvarn_ops
from fresh_process import BLOCKER, run_python

ROOT = Path(__file__).resolve().parents[2]
MAPPED = ("kernels", "lowering", "export")
NAMESPACES = ("kvarn_ops", *(f"kvarn_ops.{name}" for name in MAPPED))
# Everything optional, numpy included: torch works without it.
BLOCKED = (
    "transformers", "triton", "numpy", "safetensors", "accelerate", "matplotlib", "onnx", "rich",
    "onnxruntime", "onnxscript", "torch_tensorrt", "typer", "kernels",
)  # fmt: skip

IMPORT_ALL = """
import importlib, sys
count = 0
for package in {packages!r}:
    names = importlib.import_module(package).__all__
    for name in names:
        scope = {{}}
        exec(f"from {{package}} import {{name}}", scope)
        value = scope[name]
        assert type(value).__name__ != "module", f"{{package}}.{{name}} is a module"
        count += 1
import kvarn_ops
assert "kernels" not in sys.modules or hasattr(sys.modules["kernels"], "__file__")
print(count, kvarn_ops.__file__)
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A copy of what a build reads: building in the checkout would leave build/ behind."""
    target = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    for name in ("kvarn_ops", *MAPPED):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    return target


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory) -> Path:
    return build_wheel(sources, tmp_path_factory.mktemp("wheel"))


def build_wheel(folder: Path, target: Path) -> Path:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index",
         "--quiet", "--wheel-dir", target, folder],
        check=True,
    )  # fmt: skip
    (path,) = target.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def source_archive(tmp_path_factory) -> tuple[Path, set[str]]:
    """The unpacked archive of all that git knows or would add, and the names of that."""
    listing = ["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard"]
    done = subprocess.run(listing, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("not a git checkout: nothing says which files belong to the project")
    names = {name for name in done.stdout.splitlines() if (ROOT / name).is_file()}
    tree, target = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("archive")
    for name in names:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    code = f"import setuptools.build_meta as b; print(b.build_sdist({str(target)!r}))"
    with tarfile.open(target / run_python(code, cwd=tree)) as archive:
        archive.extractall(target, filter="data")
    return target / f"kvarn_ops-{kvarn_ops.__version__}", names


@pytest.fixture(scope="module")
def wheel_site(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet",
         "--target", target, wheel],
        check=True,
    )  # fmt: skip
    return target


@pytest.fixture(scope="module")
def editable_site(sources, tmp_path_factory) -> Path:
    """What `pip install -e` puts into site-packages, without touching this environment."""
    target = tmp_path_factory.mktemp("editable")
    code = f"import setuptools.build_meta as b; print(b.build_editable({str(target)!r}))"
    name = run_python(code, cwd=sources)
    with zipfile.ZipFile(target / name) as archive:
        archive.extractall(target)
    return target


def test_wheel_holds_only_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert wheel.name == f"kvarn_ops-{kvarn_ops.__version__}-py3-none-any.whl"
    dist_info = f"kvarn_ops-{kvarn_ops.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"kvarn_ops", dist_info}
    assert f"{dist_info}/licenses/LICENSE" in names


def test_wheel_holds_every_module(wheel):
    expected = {"kvarn_ops/py.typed"}
    for folder in ("kvarn_ops", *MAPPED):
        for path in (ROOT / folder).rglob("*.*"):
            if path.suffix in {".py", ".pyi", ".json"} and "__pycache__" not in path.parts:
                name = path.relative_to(ROOT).as_posix()
                expected.add(name if folder == "kvarn_ops" else f"kvarn_ops/{name}")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("kvarn_ops/")}
    assert expected - held == set(), "a folder is missing in [tool.setuptools] packages"
    assert {name for name in held if ".py" in name} <= expected, "stale modules"


def test_source_archive_holds_all_that_git_knows(source_archive):
    folder, names = source_archive
    held = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names - held == {".gitignore"}, "list it in MANIFEST.in"
    added = {name for name in held - names if ".egg-info/" not in name}
    assert added == {"PKG-INFO", "setup.cfg"}


def test_wheel_from_the_source_archive_is_the_same(source_archive, wheel, tmp_path):
    again = build_wheel(source_archive[0], tmp_path)
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        contents = [{name: a.read(name) for name in a.namelist()} for a in (one, other)]
    assert contents[0].keys() == contents[1].keys()
    assert [name for name in contents[0] if contents[0][name] != contents[1][name]] == []


def test_wheel_metadata_asks_for_no_triton(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    required = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    names = {re.split(r"[^\w.-]", requirement)[0] for requirement in required}
    assert names == {"torch", "typer"}
    assert not any("<" in r or "==" in r for r in required), "no upper pins"
    assert {"hf", "onnx", "tensorrt", "bench", "dev"} <= set(metadata.get_all("Provides-Extra", []))


def test_folders_that_must_not_be_packages():
    for folder in (*MAPPED, "tests", "benchmarks", "examples"):
        assert not (ROOT / folder / "__init__.py").exists(), folder
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_all_is_what_is_public():
    assert sorted(kvarn_ops.__all__) == list(kvarn_ops.__all__)
    assert set(kvarn_ops._LAZY["kvarn_ops"]) <= set(kvarn_ops.__all__)
    assert set(kvarn_ops.__all__) <= set(dir(kvarn_ops))


@pytest.mark.parametrize("package", NAMESPACES)
def test_no_public_name_is_a_submodule_name(package):
    folder = ROOT / ("kvarn_ops" if package == "kvarn_ops" else package.partition(".")[2])
    submodules = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not submodules & set(kvarn_ops._LAZY[package])


@pytest.mark.parametrize("folder", MAPPED)
def test_stub_lists_the_same_names(folder):
    stub = (ROOT / folder / "__init__.pyi").read_text()
    found = re.findall(r"from kvarn_ops\.\w+\.(\S+) import (\w+) as \2\n", stub)
    listed = {name: module for module, name in found}
    assert listed == kvarn_ops._LAZY[f"kvarn_ops.{folder}"]


@pytest.mark.parametrize("current", ["root", "elsewhere"])
def test_every_public_name_from_a_checkout(current, tmp_path):
    code = IMPORT_ALL.format(packages=NAMESPACES)
    cwd, path = (ROOT, None) if current == "root" else (tmp_path, ROOT)
    answer = run_python(code, cwd=cwd, path=path)
    assert Path(answer.split(" ", 1)[1]) == ROOT / "kvarn_ops" / "__init__.py"


def test_every_public_name_from_a_wheel(wheel_site, tmp_path):
    code = IMPORT_ALL.format(packages=NAMESPACES)
    answer = run_python(code, cwd=tmp_path, path=wheel_site)
    assert Path(answer.split(" ", 1)[1]).is_relative_to(wheel_site)


def test_every_public_name_from_an_editable_install(editable_site, sources, tmp_path):
    # This environment may hold an editable install too, with a finder of the same name: forget it.
    code = f"""
import site, sys
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
for name in [name for name in sys.modules if name.startswith("__editable__")]:
    del sys.modules[name]
sys.path.insert(0, {str(editable_site)!r})
site.addsitedir({str(editable_site)!r})
"""
    code += IMPORT_ALL.format(packages=NAMESPACES)
    answer = run_python(code, cwd=tmp_path)
    assert Path(answer.split(" ", 1)[1]) == sources / "kvarn_ops" / "__init__.py"


@pytest.mark.parametrize("where", ["checkout", "wheel"])
def test_import_needs_torch_only(where, request, tmp_path):
    site = ROOT if where == "checkout" else request.getfixturevalue("wheel_site")
    code = (
        BLOCKER.format(blocked=set(BLOCKED))
        + "import kvarn_ops, kvarn_ops.lowering, kvarn_ops.export, kvarn_ops.kernels, torch\n"
        + "kvarn_ops.KVarNConfig(); kvarn_ops.fake_quantize; kvarn_ops.ConfigError\n"
        + "assert any(str(s.name).startswith('kvarn::') for s in torch._C._jit_get_all_schemas())\n"
        + "print('imported')"
    )
    assert run_python(code, cwd=tmp_path, path=site) == "imported"


def test_import_loads_nothing_optional():
    code = (
        "import sys, torch; before = set(sys.modules); import kvarn_ops\n"
        f"print(sorted((set(sys.modules) - before) & set({BLOCKED!r})))"
    )
    assert run_python(code, cwd=ROOT) == "[]"
