"""Train a small language model twice from one seed, once on its logits and once on logits that are never made, and compare.

    python examples/demo.py [--steps 40] [--out demo]

The text is the source code of Python's standard library, the vocabulary its words. Both runs call the same loss function, which
is written against logits; the second differs only in the model's last layer. The two runs alternate, step by step. On a CPU
that also runs other work, set ``OMP_NUM_THREADS=1`` for a fair ratio of their times.
"""

from __future__ import annotations

import argparse
import collections
import copy
import re
import sysconfig
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tiny_transformer import TinyTransformer
from torch import Tensor, nn

from fused_losses.bench.memory import peak_bytes
from fused_losses.linear_head import LinearHead
from fused_losses.linear_logits import LinearLogits

EAGER, OURS = "F.cross_entropy on logits", "the same on LinearLogits"


def read_text(vocab: int) -> Tensor:
    """The standard library as ids of its ``vocab`` most common words; 0 is any other word."""
    words: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" not in path.parts:
            words += re.findall(r"\w+|[^\w\s]|\n", path.read_text(encoding="utf-8", errors="ignore"))
        if len(words) > 8_000_000:
            break
    common = collections.Counter(words).most_common(vocab - 1)
    if len(common) < vocab - 1:
        raise SystemExit(f"the standard library has {len(common)} words, fewer than the {vocab} asked for: use --vocab")
    ids = {word: i for i, (word, _) in enumerate(common, start=1)}
    return torch.tensor([ids.get(word, 0) for word in words])


def next_token_loss(logits: Tensor | LinearLogits, labels: Tensor) -> Tensor:
    """The loss of any trainer; nothing in it knows about this package."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=100 if gpu else 30)
    parser.add_argument("--vocab", type=int, default=131072 if gpu else 32768)
    parser.add_argument("--hidden", type=int, default=1024 if gpu else 64)
    parser.add_argument("--batch", type=int, default=16 if gpu else 4, help="sequences per step")
    parser.add_argument("--length", type=int, default=512 if gpu else 128, help="tokens per sequence")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the picture")
    options = parser.parse_args()
    device = "cuda" if gpu else "cpu"
    console = Console()
    text = read_text(options.vocab)

    torch.manual_seed(0)
    model = TinyTransformer(options.vocab, hidden=options.hidden, positions=options.length).to(device)
    plain = copy.deepcopy(model)
    plain.head = nn.Linear(options.hidden, options.vocab, bias=False, device=device)
    plain.head.weight.data.copy_(model.head.weight)
    assert isinstance(model.head, LinearHead)
    models = {EAGER: plain, OURS: model}
    optimizers = {name: torch.optim.AdamW(m.parameters(), lr=3e-3) for name, m in models.items()}
    losses: dict[str, list[float]] = {EAGER: [], OURS: []}
    seconds: dict[str, list[float]] = {EAGER: [], OURS: []}

    def forward_backward(name: str, ids: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=gpu):
            loss = next_token_loss(models[name](ids), ids)
        loss.backward()
        return loss.detach()

    starts = torch.randint(0, len(text) - options.length, (options.steps, options.batch))
    for step in track(
        range(options.steps), f"{text.max() + 1} words, {options.batch} × {options.length} tokens a step"
    ):
        ids = torch.stack([text[s : s + options.length] for s in starts[step]]).to(device)
        for name in models:
            if gpu:
                torch.cuda.synchronize()
            begin = time.perf_counter()
            loss = forward_backward(name, ids)
            optimizers[name].step()
            optimizers[name].zero_grad()
            losses[name].append(loss.item())  # waits for the device
            seconds[name].append(time.perf_counter() - begin)
    peaks = {}
    for name in models:
        peaks[name] = peak_bytes(lambda n=name: forward_backward(n, ids), device)  # type: ignore[misc]

    largest = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    ratio = sorted(b / a for a, b in zip(*seconds.values(), strict=True))[options.steps // 2]
    table = Table(title=f"{options.vocab} words, hidden {options.hidden}, on {device}, torch {torch.__version__}")
    for column in ("", "loss at the end", "peak memory of a step", "time of a step"):
        table.add_column(column, justify="left" if not column else "right")
    for name, time_ratio in ((EAGER, 1.0), (OURS, ratio)):
        table.add_row(name, f"{losses[name][-1]:.5f}", f"{peaks[name] / 2**20:.1f} MiB", f"{time_ratio:.2f} × eager")
    console.print(table)
    console.print(f"Largest difference along the curve: {largest:.1e}")

    figure, (curve, memory) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=(2, 1), layout="constrained")
    curve.plot(losses[EAGER], linewidth=5, color="0.8", label=EAGER)
    curve.plot(losses[OURS], linewidth=1.5, color="C3", label=OURS)
    curve.set(xlabel="step", ylabel="loss, nats per token", title=f"Same curve: largest difference {largest:.0e}")
    curve.legend(frameon=False)
    bars = memory.bar(["logits", "LinearLogits"], [peaks[n] / 2**20 for n in models], color=["0.8", "C3"])
    memory.bar_label(bars, fmt="%.0f MiB")
    memory.set(ylabel="peak memory of forward + backward, MiB", title="A fraction of the memory")
    for axis in (curve, memory):
        axis.spines[["top", "right"]].set_visible(False)
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "demo.png", dpi=150)
    console.print(f"Picture: {options.out / 'demo.png'}")


if __name__ == "__main__":
    main()
