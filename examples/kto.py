"""KTO: unpaired answers, each good or bad, compared with how far the policy has moved on unrelated answers."""

from __future__ import annotations

import copy

import torch
from tiny_transformer import TinyTransformer
from torch import Tensor

from fused_losses.preference import kto_loss
from fused_losses.sequences import sequence_log_probs, shift_labels
from fused_losses.token_statistics import selective_log_softmax


def make_batch() -> dict[str, Tensor]:
    """Five answers to prompts of 4 tokens, three of them good; for the KL, each prompt with another prompt's answer."""
    prompts, answers = torch.randint(1, 64, (5, 4)), torch.randint(1, 64, (5, 6))
    return {
        "ids": torch.cat([prompts, answers], 1),
        "kl_ids": torch.cat([prompts, answers.roll(1, 0)], 1),
        "good": torch.tensor([True, False, True, True, False]),
    }


def log_probs(model: TinyTransformer, ids: Tensor) -> Tensor:
    target = shift_labels(ids.masked_fill(torch.arange(ids.shape[1]) < 4, -100))
    return sequence_log_probs(selective_log_softmax(model(ids), target), target != -100)


def step(
    policy: TinyTransformer, reference: TinyTransformer, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """The loss and the KL."""
    good, ids, kl_ids = batch["good"], batch["ids"], batch["kl_ids"]
    with torch.no_grad():
        policy_kl, reference_kl = log_probs(policy, kl_ids), log_probs(reference, kl_ids)
        reference_logps = log_probs(reference, ids)
    logps = log_probs(policy, ids)
    loss, _, _, kl = kto_loss(
        logps[good],
        logps[~good],
        policy_kl,
        reference_logps[good],
        reference_logps[~good],
        reference_kl,
        beta=0.5,
        undesirable_weight=1.5,
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach(), kl


if __name__ == "__main__":
    torch.manual_seed(0)
    policy, batch = TinyTransformer(), make_batch()
    reference = copy.deepcopy(policy)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
    for i in range(5):
        loss, kl = step(policy, reference, optimizer, batch)
        print(f"step {i}: loss {loss:.4f}, KL {kl:.4f}")
