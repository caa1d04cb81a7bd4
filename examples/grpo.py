"""GRPO: sample answers in groups, compare each with its siblings, take two clipped steps with a KL to the reference."""

from __future__ import annotations

import copy

import torch
from tiny_transformer import TinyTransformer
from torch import Tensor

from fused_losses.policy import grpo_loss
from fused_losses.rollouts import group_advantages
from fused_losses.token_statistics import selective_log_softmax

PROMPT, GENERATIONS, END = 4, 4, 1


def rollout(policy: TinyTransformer, prompts: Tensor, tokens: int = 8) -> dict[str, Tensor]:
    """Sampled answers, masked after their first ``END``, and the advantage of each over its siblings."""
    ids = policy.sample(prompts.repeat_interleave(GENERATIONS, 0), tokens)
    answers = ids[:, PROMPT:]
    ended = (answers == END).cumsum(1)
    mask = ended - (answers == END).long() == 0  # up to the first END, itself included
    rewards = ((answers % 2 == 0) & mask).sum(1) / mask.sum(1)  # the reward prefers even tokens
    return {"ids": ids, "mask": mask, "advantages": group_advantages(rewards, GENERATIONS)}


def log_probs(model: TinyTransformer, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["ids"])[:, PROMPT - 1 : -1]  # at each position, the logits of the next token
    return selective_log_softmax(logits, batch["ids"][:, PROMPT:], row_mask=batch["mask"])


def step(
    policy: TinyTransformer,
    reference: TinyTransformer,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    updates: int = 2,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The losses of the updates on one rollout, and the last update's metrics."""
    with torch.no_grad():
        old, ref = log_probs(policy, batch), log_probs(reference, batch)
    losses = []
    for _ in range(updates):
        loss, metrics = grpo_loss(
            log_probs(policy, batch), old, batch["advantages"], batch["mask"], ref_log_probs=ref, beta=0.04
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, metrics


if __name__ == "__main__":
    torch.manual_seed(0)
    policy = TinyTransformer()
    reference = copy.deepcopy(policy)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
    prompts = torch.randint(2, 64, (4, PROMPT))
    for i in range(5):
        losses, metrics = step(policy, reference, optimizer, rollout(policy, prompts))
        print(f"step {i}: loss {losses[-1]:.4f}, clipped {metrics['clip_ratio/region_mean']:.2f}")
