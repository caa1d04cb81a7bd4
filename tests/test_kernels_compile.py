"""The compile gate passes: every shipped kernel configuration, on every target, spill-free and with matrix instructions."""

import json
import os
import subprocess
import sys
from pathlib import Path


GATE = Path(__file__).with_name("compile_gate.py")


def gate(tmp_path, *arguments):
    """The gate's exit status, output and reports. In a process of its own: here kernels may be the interpreter's."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(GATE.parent.parent), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(GATE), "--json", str(tmp_path / "gate.json"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (tmp_path / "gate.json").exists(), done.stderr
    return done.returncode, done.stdout, json.loads((tmp_path / "gate.json").read_text())


def test_every_shipped_configuration_compiles_well(tmp_path):
    status, output, reports = gate(tmp_path)
    assert status == 0, output
    assert {report["target"] for report in reports} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert 60 < len(reports) <= 120, "the gate's budget is 120 compiles"
    assert all(report["matrix_instruction"] for report in reports)


