"""PPO's actor: rewards with a KL penalty per token, advantages from a critic's values, two clipped steps."""

from __future__ import annotations

import copy

import torch
from tiny_transformer import TinyTransformer
from torch import Tensor

from fused_losses.policy import ppo_loss
from fused_losses.token_statistics import selective_log_softmax

PROMPT = 4


def log_probs(model: TinyTransformer, ids: Tensor) -> Tensor:
    return selective_log_softmax(model(ids)[:, PROMPT - 1 : -1], ids[:, PROMPT:])


def advantages(rewards: Tensor, values: Tensor, gamma: float = 1.0, lam: float = 0.95) -> Tensor:
    """Generalised advantage estimation over ``(B, S)``, from the last token to the first."""
    advantage, found = torch.zeros_like(rewards[:, 0]), []
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    for t in reversed(range(rewards.shape[1])):
        advantage = rewards[:, t] + gamma * following[:, t] - values[:, t] + gamma * lam * advantage
        found.append(advantage)
    return torch.stack(found[::-1], 1)


@torch.no_grad()
def rollout(
    policy: TinyTransformer, reference: TinyTransformer, critic: TinyTransformer, prompts: Tensor, tokens: int = 8
) -> dict[str, Tensor]:
    ids = policy.sample(prompts, tokens)
    old, ref = log_probs(policy, ids), log_probs(reference, ids)
    rewards = -0.1 * (old - ref)
    rewards[:, -1] += (ids[:, PROMPT:] % 2 == 0).to(rewards.dtype).mean(1)  # the reward prefers even tokens
    values = critic(ids)[:, PROMPT - 1 : -1].materialize().squeeze(-1)
    found = advantages(rewards, values)
    return {"ids": ids, "old": old, "advantages": (found - found.mean()) / found.std()}


def step(
    policy: TinyTransformer, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], updates: int = 2
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The losses of the updates on one rollout, and the last update's metrics."""
    losses = []
    for _ in range(updates):
        loss, metrics = ppo_loss(log_probs(policy, batch["ids"]), batch["old"], batch["advantages"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, metrics


if __name__ == "__main__":
    torch.manual_seed(0)
    policy, critic = TinyTransformer(), TinyTransformer(outputs=1)
    reference = copy.deepcopy(policy)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
    prompts = torch.randint(2, 64, (8, PROMPT))
    for i in range(5):
        losses, metrics = step(policy, optimizer, rollout(policy, reference, critic, prompts))
        print(f"step {i}: loss {losses[-1]:.4f}, clipped {metrics['clip_ratio/region_mean']:.2f}")
