"""What the README says runs."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import fused_losses

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_before_and_after_are_equal():
    """The code at the top, as it stands: one of its first two lines, then the rest."""
    block = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    before, after, *rest = (line for line in block.splitlines() if line)
    results = []
    for first in (before, after):
        torch.manual_seed(0)
        hidden, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
        names = {"F": F, "fused_losses": fused_losses, "hidden": hidden, "weight": weight}
        names |= {"labels": torch.randint(0, 50, (2, 5)), "ids": torch.randint(0, 50, (2, 5))}
        with fused_losses.strict():
            exec("\n".join([first, *rest]), names)
        total = names["loss"] + names["logp"].sum()
        results.append((total.detach(), *torch.autograd.grad(total, (hidden, weight))))
    torch.testing.assert_close(*results)


def test_every_make_target_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in (README, (ROOT / "CONTRIBUTING.md").read_text()):
        for command in re.findall(r"(?:^    |`)make ((?:[\w-]+ ?)+)", document, re.MULTILINE):
            assert {word for word in command.split() if word != "PY"} <= targets, command


def test_every_name_exists():
    names = re.findall(r"`(\w+)(?:\(.*?\))?`", README.partition("## What is in it")[2].partition("## In a trainer")[0])
    missing = [n for n in names if not hasattr(fused_losses, n) and n not in ("num_items_in_batch", "print")]
    assert not missing, missing


def test_every_integration_it_names_exists():
    block = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[1]
    names = re.findall(r"from (fused_losses\.integrations\.\w+) import apply", block)
    assert len(names) == 4
    assert all(callable(importlib.import_module(name).apply) for name in names)


def test_every_file_it_links_to_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r"`(?:python )?(examples/\w+\.py)`", README):
        assert (ROOT / target).exists(), target


def test_the_demo(tmp_path):
    """``make demo``, at a fraction of its size."""
    size = ["--steps", "3", "--vocab", "20000", "--hidden", "16", "--batch", "2", "--length", "64"]
    done = subprocess.run(
        [sys.executable, "examples/demo.py", *size, "--out", str(tmp_path)],
        cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "COLUMNS": "120"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    largest = float(re.search(r"Largest difference along the curve: (\S+)", done.stdout)[1])
    eager, ours = (float(x) for x in re.findall(r"([\d.]+) MiB", done.stdout))
    assert largest < 1e-5
    assert ours < eager / 1.5
