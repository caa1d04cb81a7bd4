"""The code on docs/distributed.md runs, in a group of one."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fused_losses.bench.distributed import LOSSES, main, on_paper
from fused_losses.bench.shapes import SHAPES

PAGE = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_its_code_runs_from_top_to_bottom(one_rank):
    names = {"torch": torch, "dist": dist}
    assert len(BLOCKS) > 1
    for block in BLOCKS:
        exec(block, names)


def test_its_table_is_what_the_formulas_give():
    assert "\n".join(on_paper(SHAPES["llama3-8b"])) in PAGE


def test_what_it_links_to_exists():
    headings = {
        re.sub(r"[^\w\- ]", "", h.replace("`", "")).strip().lower().replace(" ", "-")
        for h in re.findall(r"^#+ (.*)", PAGE, re.M)
    }
    prose = re.sub(r"```.*?```|`[^`\n]*`", "code", PAGE, flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", prose):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("http"):
            assert (Path(__file__).parents[1] / "docs" / target).exists(), target


@pytest.mark.slow
def test_what_is_counted_is_what_the_formulas_give(capsys):
    main(["--tokens", "64", "--vocab", "512", "--hidden", "16"])
    rows = [
        line.split("|")[1:-1]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("| log") or "entropy" in line
    ]
    assert len(rows) == 2 * len(LOSSES)
    for _, _, gathered, expected_gather, summed, expected_sum, _ in rows:
        assert summed == expected_sum
        assert gathered == expected_gather
