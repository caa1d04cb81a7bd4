"""What the README says runs."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import fused_losses

ROOT = Path(__file__).parent.parent
README_FILE = ROOT / "README.md"
README = README_FILE.read_text()


def test_before_and_after_are_equal():
    """Runs the code at the top as it is: one of its first two lines, then the rest."""
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


def test_a_head_is_replaced():
    block = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[1]
    model = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(8, 50)})
    before = list(model.parameters())
    exec(block, {"model": model, "fused_losses": fused_losses})
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
    assert isinstance(model.lm_head(torch.randn(2, 5, 8)), fused_losses.LinearLogits)


def test_what_a_filter_gives_is_what_was_measured():
    result = json.loads((ROOT / "bench" / "results" / "cpu" / "filter.json").read_text())
    row = next(line for line in README.splitlines() if "`gradient_filter" in line)
    for of in ("fused_losses filter", "fused_losses"):
        ours = next(r for r in result["rows"] if r["contender"] == of)
        assert f"{ours['to_eager']['median']:.2f}" in row
        for name in ("d_hidden", "d_weight"):
            assert f"{ours['errors'][name]:.1e}".replace("e-0", "e-") in row


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
    block = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[2]
    names = re.findall(r"from (fused_losses\.integrations\.\w+) import apply", block)
    assert len(names) == 4
    assert all(callable(importlib.import_module(name).apply) for name in names)


def test_every_file_it_links_to_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r"`(?:python )?(examples/\w+\.py)`", README):
        assert (ROOT / target).exists(), target


def test_every_heading_that_a_document_links_to_exists():
    links = [
        (file, *link)
        for file in (README_FILE, *sorted((ROOT / "docs").glob("*.md")))
        for link in re.findall(r"\]\(([^)#:]*)#([\w-]+)\)", file.read_text())
    ]
    assert len(links) > 2
    for file, target, heading in links:
        page = (file.parent / target if target else file).read_text()
        headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
        assert heading in {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}, (
            file,
            heading,
        )


def test_the_demo(tmp_path):
    """``make demo``, at a fraction of its size."""
    size = ["--steps", "3", "--vocab", "20000", "--hidden", "16", "--batch", "2", "--length", "64"]
    done = subprocess.run(
        [sys.executable, "examples/demo.py", *size, "--out", str(tmp_path)],
        cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "COLUMNS": "120",
                        "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    largest = float(re.search(r"Largest difference along the curve: (\S+)", done.stdout)[1])
    eager, ours = (float(x) for x in re.findall(r"([\d.]+) MiB", done.stdout))
    assert largest < 1e-5
    assert ours < eager / 1.5
