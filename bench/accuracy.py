"""How far log-probabilities and entropy from bf16 hidden states and weights are from float64, by how they are computed.

python -m fused_losses.bench.accuracy [--tokens 512] [--vocab 32768] [--hidden 512] [--largest 50] prints a Markdown table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from ..linear_logits import LinearLogits
from ..token_statistics import token_statistics
from .environment import made_on

Statistics = tuple[Tensor, Tensor]  # log-probabilities and entropy, (N,)


def of_logits(z: Tensor, ids: Tensor) -> Statistics:
    logp = z.log_softmax(-1)
    return logp.gather(-1, ids[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def ours(h: Tensor, w: Tensor, ids: Tensor) -> Statistics:
    found = token_statistics(LinearLogits(h, w), ids, ("log_probs", "entropy"))
    assert found.log_probs is not None
    assert found.entropy is not None
    return found.log_probs, found.entropy


METHODS: dict[str, Callable[[Tensor, Tensor, Tensor], Statistics]] = {
    "fused_losses": ours,
    "fp32 logits, then float64": lambda h, w, ids: of_logits((h.float() @ w.float().T).double(), ids),
    "eager, fp32 head": lambda h, w, ids: of_logits(h.float() @ w.float().T, ids),
    "eager, bf16 logits cast to fp32 (trainers today)": lambda h, w, ids: of_logits((h @ w.T).float(), ids),
    "eager, bf16 throughout": lambda h, w, ids: of_logits(h @ w.T, ids),
}


def measure(tokens: int, vocab: int, hidden: int, largest: float, device: str) -> dict[str, list[float]]:
    """Mean and largest error of log-probabilities, largest error of entropy, and the largest log-probability, in nats."""
    torch.manual_seed(0)
    h = torch.randn(tokens, hidden, device=device)
    w = torch.randn(vocab, hidden, device=device)
    h *= largest / (h @ w.T).abs().max()
    h, w = h.bfloat16(), w.bfloat16()
    z = h.double() @ w.double().T
    ids = z.softmax(-1).multinomial(1).squeeze(-1)  # sampled, as in RL
    exact_logp, exact_entropy = of_logits(z, ids)
    rows = {}
    for name, method in METHODS.items():
        logp, entropy = method(h, w, ids)
        error = (logp.double() - exact_logp).abs()
        rows[name] = [
            x.item() for x in (error.mean(), error.max(), (entropy.double() - exact_entropy).abs().max(), logp.max())
        ]
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("tokens", 512), ("vocab", 32768), ("hidden", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--largest", type=float, default=50.0, help="largest logit in absolute value")
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(made_on(device, "torch", "triton"))
    print("\n| log-probs and entropy from bf16 inputs | mean error | largest | of entropy | largest log-prob |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, values in measure(**vars(options), device=device).items():
        print(f"| {name} | " + " | ".join(f"{v:.1e}" for v in values) + " |")


if __name__ == "__main__":
    main()
