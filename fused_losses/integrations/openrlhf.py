"""OpenRLHF's actor without logits: :func:`apply` once before training, :func:`unapply` to go back.

OpenRLHF's ``Actor.forward`` makes the fp32 logits of whole sequences and reads log-probs, and entropies if asked, from
them. After :func:`apply` the actor's head returns :class:`~fused_losses.linear_logits.LinearLogits` there. The loss classes are
a change of import: ``from fused_losses import PolicyLoss`` in place of ``from openrlhf.models import PolicyLoss``.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..linear_logits import LinearLogits
from ..token_statistics import selective_log_softmax
from .patching import Patches, check_version, entropy_from_logits, lazy_logits

TESTED = "0.11"

_patches = Patches()


def apply() -> None:
    """Let OpenRLHF's actors, those made before included, compute log-probs and entropies without logits.

    Called without ``action_mask`` and ``return_logprobs``, an actor returns logits, and goes on making them.

    Raises:
        ImportError: OpenRLHF is not installed, or not flash-attn, which it needs.
        AttributeError: this version of OpenRLHF has no such functions; nothing is changed then.

    Warns:
        UserWarning: a version of OpenRLHF that this was not tested with.
    """
    if _patches:
        return
    check_version("openrlhf", TESTED)
    actor = importlib.import_module("openrlhf.models.actor")
    _patches.replace(actor, "log_probs_from_logits", log_probs_from_logits)
    _patches.replace(actor, "compute_entropy", entropy_from_logits)
    _patches.replace(actor.Actor, "forward", _without_logits(actor.Actor.forward))


def unapply() -> None:
    """Give OpenRLHF its own functions back."""
    _patches.undo()


def log_probs_from_logits(logits: Tensor | LinearLogits, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """In place of OpenRLHF's function of this name; leaves ``logits`` as they are."""
    return selective_log_softmax(logits, labels, temperature=temperature)


def _without_logits(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapped(
        self: Any,
        sequences: Tensor,
        action_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_output: bool = False,
        allgather_logits: bool = False,
        return_logprobs: bool = False,
        **options: Any,
    ) -> Any:
        call = functools.partial(
            forward,
            self,
            sequences,
            action_mask,
            attention_mask,
            return_output,
            allgather_logits,
            return_logprobs,
            **options,
        )
        if action_mask is None and not return_logprobs:
            return call()
        with lazy_logits(self.model):
            return call()

    return wrapped
