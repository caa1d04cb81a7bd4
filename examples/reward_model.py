"""A reward model: one number per answer, at its last token. Only those tokens are multiplied by the head."""

from __future__ import annotations

import torch
from tiny_transformer import TinyTransformer
from torch import Tensor

from fused_losses.reward import pairwise_reward_loss, reward_metrics
from fused_losses.sequences import concatenate_pairs, split_pairs


def make_batch() -> dict[str, Tensor]:
    """Four pairs of answers of unequal lengths, and by how much the chosen one should win; 0 pads."""
    chosen, rejected = torch.randint(1, 64, (4, 9)), torch.randint(1, 64, (4, 12))
    chosen[1, 6:], rejected[2, 8:] = 0, 0
    return {"ids": concatenate_pairs(chosen, rejected, pad_value=0), "margin": torch.tensor([0.0, 1.0, 0.5, 0.2])}


def rewards(model: TinyTransformer, ids: Tensor) -> tuple[Tensor, Tensor]:
    mask = ids != 0
    last_tokens = model(ids, mask)[torch.arange(len(ids)), mask.sum(1) - 1]  # (2B, 1), still lazy
    return split_pairs(last_tokens.materialize().squeeze(-1))


def step(
    model: TinyTransformer, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    chosen, rejected = rewards(model, batch["ids"])
    loss = pairwise_reward_loss(chosen, rejected, batch["margin"], center_rewards_coefficient=0.01)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach(), reward_metrics(chosen, rejected)


if __name__ == "__main__":
    torch.manual_seed(0)
    model, batch = TinyTransformer(outputs=1), make_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for i in range(5):
        loss, metrics = step(model, optimizer, batch)
        print(f"step {i}: loss {loss:.4f}, accuracy {metrics['accuracy']:.2f}")
