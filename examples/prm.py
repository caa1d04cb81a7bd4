"""A process reward model: good or bad at each step's placeholder. Only those tokens and two rows of the head are multiplied."""

from __future__ import annotations

import torch
from tiny_transformer import TinyTransformer
from torch import Tensor

from fused_losses.reward import prm_loss

PLACEHOLDER, GOOD, BAD = 5, 6, 7


def make_batch() -> dict[str, Tensor]:
    """Three solutions of 12 tokens; every third token is a step's placeholder."""
    ids = torch.randint(8, 64, (3, 12))
    ids[:, 2::3] = PLACEHOLDER
    judged = torch.where(torch.rand(3, 12) < 0.5, GOOD, BAD)
    labels = torch.where(ids == PLACEHOLDER, judged, -100)
    labels[0, 11] = -100  # nobody judged this step
    return {"ids": ids, "labels": labels}


def step(model: TinyTransformer, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The loss and the accuracy."""
    loss, accuracy = prm_loss(
        batch["ids"],
        model(batch["ids"]),
        batch["labels"],
        placeholder_token_id=PLACEHOLDER,
        reward_token_ids=[GOOD, BAD],
        return_acc=True,
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach(), accuracy


if __name__ == "__main__":
    torch.manual_seed(0)
    model, batch = TinyTransformer(), make_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for i in range(5):
        loss, accuracy = step(model, optimizer, batch)
        print(f"step {i}: loss {loss:.4f}, accuracy {accuracy:.2f}")
