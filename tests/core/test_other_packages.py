"""What imports do where an optional package is missing, or where one is named like our folder."""

from __future__ import annotations

import importlib.metadata
import json
import re
from pathlib import Path

import pytest

from fresh_process import BLOCKER, run_python

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("blocked", "statement", "error", "words"),
    [
        ("transformers", "from kvarn_ops import KVarNCache", "ImportError", "kvarn-ops[hf]"),
        (
            "triton",
            "import kvarn_ops; kvarn_ops._LAZY['kvarn_ops.kernels']['decode'] = 'decode'\n"
            "    from kvarn_ops.kernels import decode",
            "BackendError",
            "needs Triton",
        ),
    ],
)
def test_a_missing_package_is_one_sentence(blocked, statement, error, words):
    code = BLOCKER.format(blocked={blocked}) + (
        f"try:\n    {statement}\nexcept Exception as e:\n    print(type(e).__name__, e)"
    )
    answer = run_python(code, cwd=ROOT)
    assert answer.startswith(error) and words in answer  # noqa: PT018


def test_root_folders_answer_for_unknown_names_like_any_module():
    """Pickle asks all modules, in order of import, and stops at errors of other types."""
    code = BLOCKER.format(blocked={"triton"}) + (
        "import kvarn_ops\nprint(hasattr(kvarn_ops.kernels, 'anything'))"
    )
    assert run_python(code, cwd=ROOT) == "False"


@pytest.mark.parametrize("version", ["installed", "accepted"])
def test_transformers_imports_from_the_root_with_kernels_installed(version, tmp_path):
    """Transformers takes only some versions: "accepted" shows it the installed one as such."""
    pytest.importorskip("transformers")
    try:
        distribution = importlib.metadata.distribution("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the Hugging Face package `kernels` is not installed (extra 'dev')")
    package = Path(str(distribution.locate_file("kernels")))
    if version == "accepted":
        from transformers.dependency_versions_table import deps

        minimum = re.search(r">=([\d.]+)", deps["kernels"])
        assert minimum is not None
        (tmp_path / "kernels").symlink_to(package)
        info = tmp_path / f"kernels-{minimum[1]}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: kernels\nVersion: {minimum[1]}\n")
        package = tmp_path / "kernels"
    code = """
import json, sys
import transformers.models.llama.modeling_llama
from transformers.utils import is_kernels_available
import kernels, kvarn_ops, kvarn_ops.kernels
print(json.dumps([is_kernels_available(), kernels.__file__, sys.path[0]]))
"""
    path = tmp_path if version == "accepted" else None
    available, file, first = json.loads(run_python(code, cwd=ROOT, path=path))
    assert first == "", "the root of the checkout must come first for this test to mean anything"
    assert Path(file).parent == package
    if version == "accepted":
        assert available


def test_our_kernels_folder_does_not_pass_for_the_package():
    """Where `kernels` is not installed, transformers must not take our folder for it."""
    pytest.importorskip("transformers")
    code = """
import importlib.metadata, sys
from importlib.machinery import PathFinder

class OnlyTheFolder:  # as if the real package, if there is one, were not installed
    def find_spec(self, name, path=None, target=None):
        return PathFinder.find_spec(name, [""]) if name == "kernels" else None

sys.meta_path.insert(0, OnlyTheFolder())
real_version = importlib.metadata.version
def version(name):
    if name == "kernels":
        raise importlib.metadata.PackageNotFoundError(name)
    return real_version(name)
importlib.metadata.version = version

import transformers.models.llama.modeling_llama
from transformers.utils import is_kernels_available
print(is_kernels_available())
"""
    assert run_python(code, cwd=ROOT) == "False"
