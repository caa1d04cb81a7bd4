"""Supervised fine-tuning on packed documents: labels never cross a document's end, prompts are not trained on."""

from __future__ import annotations

import torch
from tiny_transformer import TinyTransformer
from torch import Tensor

from fused_losses.sft import sft_loss


def make_batch() -> dict[str, Tensor]:
    lengths, prompts = [7, 12, 5], [2, 4, 0]
    ids = torch.randint(1, 64, (1, sum(lengths)))
    shown = torch.cat([torch.arange(n) >= p for n, p in zip(lengths, prompts, strict=True)])
    positions = torch.cat([torch.arange(n) for n in lengths])
    return {"ids": ids, "labels": ids.masked_fill(~shown, -100), "position_ids": positions[None]}


def step(model: TinyTransformer, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> Tensor:
    loss = sft_loss(model(batch["ids"]), batch["labels"], position_ids=batch["position_ids"])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


if __name__ == "__main__":
    torch.manual_seed(0)
    model, batch = TinyTransformer(), make_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for i in range(5):
        print(f"step {i}: loss {step(model, optimizer, batch):.4f}")
