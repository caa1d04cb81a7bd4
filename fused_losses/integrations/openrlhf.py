"""OpenRLHF's actor without logits: :func:`apply` once before training, :func:`unapply` to go back.

OpenRLHF's ``Actor.forward`` makes the fp32 logits of whole sequences and reads log-probs, and entropies if asked, from
them. After :func:`apply` the actor's head returns :class:`~fused_losses.linear_logits.LinearLogits` there. The loss classes are
a change of import: ``from fused_losses import PolicyLoss`` in place of ``from openrlhf.models import PolicyLoss``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..linear_logits import LinearLogits
from ..token_statistics import selective_log_softmax
from .patching import Patches, check_version, entropy_from_logits, lazy_logits

TESTED = "0.11"

_patches = Patches()


def apply() -> None:
    """Let OpenRLHF's actors, including those made before, compute log-probs and entropies without logits.

    An actor called without ``action_mask`` and ``return_logprobs`` returns logits, and still makes them.

    Raises:
        ImportError: OpenRLHF is not installed, or flash-attn, which it needs, is not.
        AttributeError: this version of OpenRLHF has no such functions; nothing is changed then.

    Warns:
        UserWarning: a version of OpenRLHF that this was not tested with.
    """
    if _patches:
        return
    check_version("openrlhf", TESTED)
    actor = importlib.import_module("openrlhf.models.actor")
    with _patches:
        _patches.replace(actor, "log_probs_from_logits", log_probs_from_logits)
        _patches.replace(actor, "compute_entropy", entropy_from_logits)
        _patches.replace(actor.Actor, "forward", _without_logits(actor.Actor.forward))


def unapply() -> None:
    """Give OpenRLHF its own functions back."""
    _patches.undo()


def log_probs_from_logits(logits: Tensor | LinearLogits, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Replaces OpenRLHF's function of this name; leaves ``logits`` as they are."""
    return selective_log_softmax(logits, labels, temperature=temperature)


def _without_logits(forward: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(forward)

    @functools.wraps(forward)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        wanted = given.get("action_mask") is None and not given.get("return_logprobs")  # the logits themselves
        with contextlib.nullcontext() if wanted else lazy_logits(self.model):
            return forward(self, *args, **kwargs)

    return wrapped
