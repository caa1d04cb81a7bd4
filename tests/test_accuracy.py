"""The table in docs/accuracy.md: what its command prints, at a smaller size, and what it must show."""

from pathlib import Path

from fused_losses.bench.accuracy import METHODS, main, measure

PAGE = Path(__file__).parent.parent / "docs" / "accuracy.md"


def test_ours_is_as_near_as_fp32_logits_in_float64(device):
    rows = measure(tokens=96, vocab=4000, hidden=128, largest=50.0, device=device)
    ours, bar = rows["fused_losses"], rows["fp32 logits, then float64"]
    assert all(a <= 2 * b + 1e-9 for a, b in zip(ours[:3], bar[:3], strict=True)), (ours, bar)
    assert ours[3] <= 0
    assert rows["eager, bf16 throughout"][1] > 1000 * ours[1]


def test_the_command_prints_the_page_s_table(capsys):
    main(["--tokens", "8", "--vocab", "64", "--hidden", "16"])
    printed, page = capsys.readouterr().out, PAGE.read_text()
    header = next(line for line in printed.splitlines() if line.startswith("| log-probs"))
    assert header in page
    for name in METHODS:
        assert f"| {name} |" in printed
        assert f"| {name} |" in page
