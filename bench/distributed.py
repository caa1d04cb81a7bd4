"""What sharing a head's vocabulary costs each rank: memory, and bytes for each token.

python -m fused_losses.bench.distributed measures both in processes on this machine, beside the formulas, and evaluates the
formulas for a real head on up to 1024 ranks. It prints Markdown.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..cross_entropy import cross_entropy
from ..linear_logits import LinearLogits
from ..planning import plan
from ..token_statistics import token_statistics
from .environment import made_on
from .memory import peak_bytes
from .ranks import collectives, run
from .shapes import SHAPES, Shape

MiB = 2**20
NUMBER = 8  # bytes per number of a token: they are exchanged in float64
CALL = 64  # bytes that describe the call, once per chunk of tokens: here there is one
SUM = 4  # bytes per number of the gradient of hidden while it is summed


def mean(logits: LinearLogits, target: Tensor) -> Tensor:
    return cross_entropy(logits, target)


def smoothed(logits: LinearLogits, target: Tensor) -> Tensor:
    return cross_entropy(logits, target, label_smoothing=0.1)


def log_probs(logits: LinearLogits, target: Tensor) -> Tensor:
    found = token_statistics(logits, target).log_probs
    assert found is not None
    return found.mean()


def log_probs_and_entropy(logits: LinearLogits, target: Tensor) -> Tensor:
    found = token_statistics(logits, target, ("log_probs", "entropy"))
    assert found.log_probs is not None
    assert found.entropy is not None
    return (found.log_probs + found.entropy).mean()


LOSSES = {  # and how many numbers per token each rank sends
    "cross entropy": (mean, 2),
    "cross entropy, smoothed": (smoothed, 4),
    "log-probs": (log_probs, 2),
    "log-probs and entropy": (log_probs_and_entropy, 3),
}


def step(loss: Any, hidden: Tensor, weight: Tensor, target: Tensor, group: Any) -> tuple[Tensor | None, ...]:
    hidden.grad = weight.grad = None
    loss(LinearLogits(hidden, weight, group=group), target).backward()
    return hidden.grad, weight.grad


def measured(device: torch.device, tokens: int, vocab: int, hidden: int) -> dict[str, tuple[int, dict[str, int]]]:
    """By loss: peak bytes above the inputs, and the bytes that this rank hands to each collective in a step."""
    group, ranks = dist.group.WORLD, dist.get_world_size()
    torch.manual_seed(0)
    h = torch.randn(tokens, hidden, dtype=torch.bfloat16, device=device, requires_grad=True)
    w = torch.randn(vocab // ranks, hidden, dtype=torch.bfloat16, device=device, requires_grad=True)
    target = torch.randint(0, vocab, (tokens,), device=device)
    found = {}
    for name, (loss, _) in LOSSES.items():
        call = functools.partial(step, loss, h, w, target, group)
        call()
        with collectives() as calls:
            call()
        sent: dict[str, int] = {}
        for collective, size in calls:
            kind = "gather" if "gather" in collective else "reduce" if "reduce" in collective else collective
            sent[kind] = sent.get(kind, 0) + size
        found[name] = (peak_bytes(call, device.type), sent)
    return found


def of_both(device: torch.device, tokens: int, vocab: int, hidden: int) -> list[dict[str, tuple[int, dict[str, int]]]]:
    return [measured(device, tokens, size, hidden) for size in (vocab, 8 * vocab)]


def formulas(tokens: int, vocab: int, hidden: int, ranks: int) -> list[float]:
    """MiB of a rank's weight and its gradient, and of all else at the peak; bytes a token of gather and sum; GFLOP a token."""
    rows = -(-vocab // ranks)
    share = rows * hidden * 2
    rest = plan(tokens, rows, hidden, shared=ranks > 1).peak - share
    gather = (ranks - 1) * LOSSES["cross entropy"][1] * NUMBER
    reduce = 2 * (ranks - 1) / ranks * hidden * SUM
    return [2 * share / MiB, rest / MiB, gather, reduce, 6 * rows * hidden / 1e9]


def on_paper(shape: Shape) -> list[str]:
    """The formulas for a head on up to 1024 ranks, as a table."""
    lines = [
        f"{shape.name}: {shape.tokens} tokens, vocabulary {shape.vocab}, hidden {shape.hidden}, bf16, for each rank\n",
        "| ranks | weight and gradient, MiB | else at the peak, MiB | gather, B/token | sum, B/token | GFLOP/token |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for ranks in (1, 2, 4, 8, 16, 64, 256, 1024):
        weight, rest, gather, reduce, flops = formulas(shape.tokens, shape.vocab, shape.hidden, ranks)
        lines.append(f"| {ranks} | {weight:.1f} | {rest:.0f} | {gather:.0f} | {reduce:.0f} | {flops:.3f} |")
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("tokens", 512), ("vocab", 32768), ("hidden", 64)):
        parser.add_argument(f"--{name}", type=int, default=default, help="of the measured call")
    parser.add_argument("--shape", default="llama3-8b", choices=SHAPES, help="of the table computed by formula")
    options = parser.parse_args(argv)
    N, V, H = options.tokens, options.vocab, options.hidden
    print(made_on("cuda" if torch.cuda.device_count() > 1 else "cpu", "torch") + "\n")
    print(
        f"{N} tokens, vocabulary {V} and {8 * V}, hidden {H}, bf16: bytes that a rank hands to collectives, for a token"
    )
    print("\n| loss | ranks | gathered | expected | summed | expected | peak above inputs, MiB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for ranks in (2, 4):
        of_vocab = run(of_both, ranks, N, V, H)[0]
        for name, (_, numbers) in LOSSES.items():
            (peak, sent), (larger_peak, larger_sent) = (found[name] for found in of_vocab)
            if sent != larger_sent:
                raise AssertionError(f"{name}: traffic depends on the vocabulary, {sent} and {larger_sent}")
            cells = (sent["gather"] / N, NUMBER * numbers + CALL / N, sent["reduce"] / N, SUM * H)
            print(f"| {name} | {ranks} | " + " | ".join(f"{x:.1f}" for x in cells), end=" | ")
            print(f"{peak / MiB:.1f}, {larger_peak / MiB:.1f} |")
    print()
    print("\n".join(on_paper(SHAPES[options.shape])))


if __name__ == "__main__":
    main()
