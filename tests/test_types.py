"""Code that is typed for tensors takes lazy logits unchanged: ``make types`` checks this file as a user's, pytest runs it."""

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import assert_type

from fused_losses import (
    LinearHead,
    LinearLogits,
    TokenStatistics,
    divergence,
    selective_log_softmax,
    token_loss,
    token_statistics,
)


def causal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def entropies(logits: Tensor) -> Tensor:
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def test_a_loss_typed_for_tensors_takes_lazy_logits() -> None:
    hidden, weight = torch.randn(2, 3, 4), torch.randn(7, 4)
    labels = torch.randint(7, (2, 3))
    logits = LinearLogits(hidden, weight)
    assert_type(logits, LinearLogits)
    assert_type(logits[:, :-1] / 2, Tensor)
    assert_type(logits.argmax(-1), Tensor)
    assert_type(logits.T, Tensor)
    assert_type(logits.data, Tensor)
    assert_type(next(iter(logits)), Tensor)
    eager = assert_type(logits.materialize(), Tensor)
    losses = assert_type([fn(logits) for fn in (entropies, lambda z: causal_loss(z, labels))], list[Tensor])
    torch.testing.assert_close(losses, [entropies(eager), causal_loss(eager, labels)])
    z: Tensor = logits
    z = z[:, :-1].float() - 1
    z /= 2
    torch.testing.assert_close(z.sum(-1), ((eager[:, :-1] - 1) / 2).sum(-1))
    torch.testing.assert_close(divergence(logits, eager), torch.zeros(2, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(selective_log_softmax(logits, labels), selective_log_softmax(eager, labels))


def focal(s: TokenStatistics, weight: Tensor) -> Tensor:
    return -weight * (1 - s.log_probs.exp()) ** 2 * s.log_probs


def test_statistics_that_were_asked_for_are_tensors() -> None:
    logits = assert_type(LinearHead(4, 7)(torch.randn(2, 3, 4)), LinearLogits)
    labels, weight = torch.randint(7, (2, 3)), torch.rand(2, 3)
    found = token_statistics(logits, labels, ("log_probs", "is_top1"))
    assert found.is_top1[labels > 2].float().sum() <= 6
    loss, _ = token_loss(focal, logits, labels, weight)
    torch.testing.assert_close(loss, focal(found, weight).sum())
