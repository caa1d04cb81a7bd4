"""Code that is typed for tensors takes lazy logits unchanged: ``make types`` checks this file as a user's, pytest runs it."""

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import assert_type

from fused_losses import LinearLogits, divergence, selective_log_softmax


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
    eager = assert_type(logits.materialize(), Tensor)
    losses = assert_type([fn(logits) for fn in (entropies, lambda z: causal_loss(z, labels))], list[Tensor])
    torch.testing.assert_close(losses, [entropies(eager), causal_loss(eager, labels)])
    z: Tensor = logits
    z = z[:, :-1].float() - 1
    z /= 2
    torch.testing.assert_close(z.sum(-1), ((eager[:, :-1] - 1) / 2).sum(-1))
    torch.testing.assert_close(divergence(logits, eager), torch.zeros(2, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(selective_log_softmax(logits, labels), selective_log_softmax(eager, labels))
