"""Does every launch that the tests make compile? ``python tests/compile_launches.py [TARGET] [TEST …]``

Runs the tests of the kernels' backend on a pretended GPU (``compile_only.py``): whatever option, dtype or shape a test tries is
compiled as a launch on that GPU would, and checked against what it can launch. Nothing is computed, so how a test ends says
nothing. Prints the kernels that cannot be launched and those that spill, and exits with 1 where there is one of the former.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).parent.parent
FILES = """kernel_linear_softmax token_statistics cross_entropy divergence gradients_in_forward recompute linear_cross_entropy
two_heads linear_logits token_loss distillation gradient_filter vocab_parallel_edges"""

if __name__ != "__main__":  # pytest's plugin
    os.environ.pop(
        "TRITON_INTERPRET", None
    )  # the tests' conftest.py sets it, too late for kernels that are here already
    import compile_only
    import pytest
    import torch

    import fused_losses  # noqa: F401
    from fused_losses.kernels import divergence_rows, linear_softmax, softmax_rows  # noqa: F401

    reports: list[tuple[compile_only.Report, str]] = []
    test = ""

    def product(exact):
        """A CPU has no products of 16-bit factors with an fp32 sum."""

        def multiply(*factors, out_dtype=None, **named):
            if out_dtype is not None:
                factors = [factor.to(out_dtype) for factor in factors]
            return exact(*factors, **named)

        return multiply

    @pytest.fixture(autouse=True, scope="session")
    def _pretended_gpu():
        with (
            compile_only.launches_compile(os.environ["TARGET"], lambda report: reports.append((report, test))),
            patch.object(torch.Tensor, "is_cuda", property(lambda tensor: True)),
            patch.multiple(torch, mm=product(torch.mm), addmm=product(torch.addmm)),
            patch.multiple(torch.cuda, is_current_stream_capturing=lambda: False, synchronize=lambda: None),
        ):
            yield

    def pytest_collection_modifyitems(items):
        options = ((item, getattr(item, "callspec", None)) for item in items)
        items[:] = [item for item, spec in options if spec is None or spec.params.get("backend") != "torch"]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(item):
        global test
        test = item.nodeid
        os.environ.pop("TRITON_INTERPRET", None)

    def pytest_sessionfinish():
        found = [(*report, name) for report, name in reports]
        Path(os.environ["REPORTS"], f"{os.getpid()}.json").write_text(json.dumps(found))


def main(target: str = "sm_90", *tests: str) -> int:
    import compile_only
    from compile_gate import table

    tests = tests or tuple(f"tests/test_{name}.py" for name in FILES.split())
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"TARGET": target, "REPORTS": folder, "OMP_NUM_THREADS": "1"}
        environment |= {"TRITON_CACHE_DIR": f"{folder}/cache", "PYTHONPATH": os.pathsep.join((str(ROOT), "tests"))}
        environment.pop("TRITON_INTERPRET", None)
        command = ["-m", "pytest", "-q", "-p", "compile_launches", "-n", "auto", "-m", "not slow", "--tb=no", "-rN"]
        subprocess.run([sys.executable, *command, *tests], cwd=ROOT, env=environment, check=False)
        found = [row for file in Path(folder).glob("*.json") for row in json.loads(file.read_text())]
    reports = {
        tuple(row[:-1]): compile_only.Report(*row[:-1])._replace(kernel=f"{row[0]} {row[2]} {row[-1]}") for row in found
    }
    notable = sorted(r for r in reports.values() if r.trouble or r.spilled_bytes)
    print(table(notable))
    troubled = [report for report in notable if report.trouble]
    print(f"{len(reports)} kernels, {len(notable) - len(troubled)} of them spill, {len(troubled)} cannot be launched")
    return 1 if troubled or not reports else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
