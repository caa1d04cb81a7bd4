"""Does every launch that the tests make compile? ``python tests/compile_launches.py [TARGET] [TEST …]``

Runs the tests of the kernels' backend on a pretended GPU (``compile_only.py``): whatever option, dtype or shape a test tries is
compiled as a launch on that GPU would, and checked against what it can launch. Nothing is computed, so how a test ends says
nothing. Prints the kernels that cannot be launched and those that spill, and exits with 1 where there is one of the former.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import compile_only
from compile_gate import table

ROOT = Path(__file__).parent.parent
FILES = """kernel_linear_softmax token_statistics cross_entropy divergence gradients_in_forward recompute linear_cross_entropy
two_heads linear_logits linear_logits_dtypes linear_logits_gradients lazy_views lazy_masks lazy_reductions log_softmax
other_devices token_loss distillation gradient_filter vocab_parallel_edges"""


def main(target: str = "sm_90", *tests: str) -> int:
    all_tests = [f"tests/test_{name}.py" for name in FILES.split()]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"TARGET": target, "REPORTS": folder, "OMP_NUM_THREADS": "1"}
        environment |= {"TRITON_CACHE_DIR": f"{folder}/cache", "PYTHONPATH": os.pathsep.join((str(ROOT), "tests"))}
        environment.pop("TRITON_INTERPRET", None)
        command = ["-m", "pytest", "-q", "-p", "launches_plugin", "-m", "not slow", "--tb=no", "-rN"]
        command += ["-n", "auto"] if not tests and importlib.util.find_spec("xdist") else []
        subprocess.run([sys.executable, *command, *(tests or all_tests)], cwd=ROOT, env=environment, check=False)
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
