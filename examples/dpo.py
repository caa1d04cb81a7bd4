"""Direct preference optimisation: chosen and rejected in one forward, the reference's log-probs computed beforehand."""

from __future__ import annotations

import copy

import torch
from tiny_transformer import TinyTransformer
from torch import Tensor

from fused_losses.preference import dpo_loss
from fused_losses.sequences import concatenate_pairs, sequence_log_probs, shift_labels, split_pairs
from fused_losses.token_statistics import selective_log_softmax


def make_batch() -> dict[str, Tensor]:
    """Three prompts of 4 tokens, each with a chosen and a rejected answer; 0 pads."""
    prompts = torch.randint(1, 64, (3, 4))
    chosen = torch.cat([prompts, torch.randint(1, 64, (3, 6))], 1)
    rejected = torch.cat([prompts, torch.randint(1, 64, (3, 8))], 1)
    chosen[0, 7:], rejected[1, 9:] = 0, 0
    ids = concatenate_pairs(chosen, rejected, pad_value=0)
    answer = (ids != 0) & (torch.arange(ids.shape[1]) >= 4)
    return {"ids": ids, "mask": ids != 0, "labels": ids.masked_fill(~answer, -100)}


def log_probs(model: TinyTransformer, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    target = shift_labels(batch["labels"])
    token_logps = selective_log_softmax(model(batch["ids"], batch["mask"]), target)
    return split_pairs(sequence_log_probs(token_logps, target != -100))


def step(
    policy: TinyTransformer,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    reference_logps: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """The loss, and the share of pairs in which the policy moved towards the chosen answer."""
    loss, chosen_rewards, rejected_rewards = dpo_loss(*log_probs(policy, batch), *reference_logps, beta=0.5)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach(), (chosen_rewards > rejected_rewards).float().mean()


if __name__ == "__main__":
    torch.manual_seed(0)
    policy, batch = TinyTransformer(), make_batch()
    with torch.no_grad():
        reference_logps = log_probs(copy.deepcopy(policy), batch)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.01)
    for i in range(5):
        loss, accuracy = step(policy, optimizer, batch, reference_logps)
        print(f"step {i}: loss {loss:.4f}, accuracy {accuracy:.2f}")
