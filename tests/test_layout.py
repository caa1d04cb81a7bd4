"""The tree has one obvious place for each thing, and nothing is missing from it."""

import ast
import importlib.util
import inspect
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import conftest
import pytest

ROOT = Path(__file__).parent.parent
# What a family of losses or a primitive needs: a module, a reference and a test of one name.
FAMILIES = (
    "aggregation", "cross_entropy", "distillation", "divergence", "kl", "linear_cross_entropy", "linear_logits", "policy",
    "preference", "reward", "rollouts", "sequences", "sft", "token_loss", "token_statistics",
)  # fmt: skip
PRIMITIVES = ("cross_entropy", "divergence", "linear_cross_entropy", "token_statistics")  # have cases in bench/ too
INFRASTRUCTURE = {
    "__init__", "autodiff", "class_probabilities", "data_parallel", "gradients_in_forward", "head", "lazy_elementwise",
    "lazy_losses", "lazy_masks", "lazy_products", "lazy_reductions", "lazy_rows", "lazy_tensor", "lazy_views",
    "library_tiles", "linear_head", "linear_logits_checks", "linear_logits_known", "log_softmax", "modules", "numerics",
    "planning", "products", "recompute", "row_divergence", "row_statistics", "settings", "sharded_weight", "tensor_parallel",
    "two_heads", "vocab_parallel",
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_its_partners(name):
    partners = [f"fused_losses/{name}.py", f"reference/{name}.py", f"tests/test_{name}.py"]
    partners += [f"bench/{name}.py"] if name in PRIMITIVES else []
    missing = [p for p in partners if not (ROOT / p).is_file()]
    assert not missing, f"{name} has no {', '.join(missing)}; see 'Add a loss' in CONTRIBUTING.md"


@pytest.mark.parametrize("name", FAMILIES)
def test_defaults_are_those_of_the_reference(name):
    """Except where a default has a meaning of its own here."""
    own = {("grpo_loss", "beta"), ("linear_cross_entropy", "ignore_index")}
    module, reference = (importlib.import_module(f"fused_losses.{prefix}{name}") for prefix in ("", "reference."))
    for function, plain in inspect.getmembers(reference, inspect.isfunction):
        if plain.__module__ == reference.__name__ and function in module.__dict__:
            ours, theirs = (inspect.signature(f).parameters for f in (getattr(module, function), plain))
            for option in (ours.keys() & theirs.keys()) - {o for f, o in own if f == function}:
                a, b = (getattr(p.default, "__name__", p.default) for p in (ours[option], theirs[option]))
                assert a == b, (function, option)


def test_every_module_is_a_family_or_infrastructure():
    modules = {p.stem for p in (ROOT / "fused_losses").glob("*.py")}
    unknown = modules - set(FAMILIES) - INFRASTRUCTURE
    assert not unknown, f"name {sorted(unknown)} in FAMILIES (with a reference and a test) or in INFRASTRUCTURE"
    references = {p.stem for p in (ROOT / "reference").glob("*.py")} - {"tolerance"}
    assert references <= set(FAMILIES), f"references without a module: {sorted(references - set(FAMILIES))}"


def test_every_kernel_has_a_twin_in_pytorch():
    kernels = {p.stem for p in (ROOT / "kernels").glob("*.py")} - {"configurations", "common"}
    twins = {p.stem for p in (ROOT / "fused_losses/chunked").glob("*.py")} - {"__init__"}
    assert kernels == twins


def test_the_tree_lists_every_file():
    tree = re.search(r"^## The tree\n+```\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)
    folders = dict(re.findall(r"^(\w+)/(.*(?:\n +.*)*)", tree[1], re.M))
    for folder in ("fused_losses", "kernels"):
        listed, files = set(re.findall(r"\w+\.py", folders[folder])), {p.name for p in (ROOT / folder).glob("*.py")}
        assert listed == files - {"__init__.py"}, (
            f"the tree of CONTRIBUTING.md and {folder}/ differ in {listed ^ files}"
        )
    for folder in ("chunked", "integrations"):
        assert f"\n  {folder}/" in folders["fused_losses"]
    # A reference has its module's name: test_every_module_is_a_family_or_infrastructure checks that.
    assert "tolerance.py" in folders["reference"]


def test_links_are_relative_and_folders_are_no_packages():
    for name in ("kernels", "reference", "bench"):
        link = ROOT / "fused_losses" / name
        assert link.is_symlink()
        assert str(link.readlink()) == f"../{name}"
    # With an __init__.py here, `import kernels` from the root would find ours instead of the package that transformers wants.
    for folder in ("kernels", "tests"):
        assert not (ROOT / folder / "__init__.py").exists()


STAND_IN = """
import sys, types, importlib.machinery
sys.path.insert(0, {root!r})   # as `python` from the repository's root does
sys.path.append({site!r})
import kernels
assert kernels.__version__ == "0.11.0", kernels
from kernels import get_kernel
import importlib.metadata
assert importlib.metadata.version("kernels") == "0.11.0"
try:
    import transformers
except ImportError as error:
    assert "transformers" in str(error), error
import fused_losses.kernels.configurations
"""


def test_a_package_named_kernels_is_still_found(tmp_path):
    """Hugging Face publishes one, and transformers imports it: our root folder of that name must not shadow it."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(
        "__version__ = '0.11.0'\ndef get_kernel(*a, **k): ...\n"
        "class Device: ...\nclass LayerRepository: ...\nclass Mode: ...\n"
    )
    metadata = tmp_path / "kernels-0.11.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.11.0\n")
    code = STAND_IN.format(root=str(ROOT), site=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_built_packages_hold_the_whole_tree(kind, tmp_path):
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("needs setuptools")
    code = f"from setuptools import build_meta as b; print(b.build_{kind}({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = tmp_path.iterdir()
    if kind == "wheel":
        names = set(zipfile.ZipFile(built).namelist())
        prefix = ""
    else:
        import tarfile

        with tarfile.open(built) as archive:
            names = set(archive.getnames())
        prefix = built.name.removesuffix(".tar.gz") + "/"
    for folder in ("", "chunked/", "integrations/", "kernels/", "reference/", "bench/"):
        for path in (ROOT / "fused_losses" / folder).glob("*.py"):
            assert f"{prefix}fused_losses/{folder}{path.name}" in names
    assert f"{prefix}fused_losses/py.typed" in names
    assert not any("/tests/" in name for name in names)


def test_what_runs_on_either_backend_says_where_its_tensors_are():
    """The Triton backend takes tensors on the GPU, where there is one."""
    for file in (ROOT / "tests").glob("test_*.py"):
        for test in ast.walk(ast.parse(file.read_text())):
            if isinstance(test, ast.FunctionDef) and "backend" in (names := [a.arg for a in test.args.args]):
                given = re.search("'backend'|backend=", " ".join(map(ast.unparse, test.decorator_list)))
                fixture = test.name.startswith("test_") and given is None
                assert not fixture or "device" in names or "'cuda'" in ast.unparse(test), test.name


def test_few_processes_share_a_gpu(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 192)
    monkeypatch.setattr(conftest, "DEVICE", "cpu")
    assert conftest.pytest_xdist_auto_num_workers() is None
    monkeypatch.setattr(conftest, "DEVICE", "cuda")
    assert conftest.pytest_xdist_auto_num_workers() == 8
