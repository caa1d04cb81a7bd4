"""verl's fused head on fused losses: :class:`FusedLinearForPPO`, and :func:`apply` to put it in the place of verl's.

verl's own head leaves out the bias, softcap and scale of a model's logits, and in bf16 it rounds the logits. After
:func:`apply` the model's bias, softcap and scale are used.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from ..linear_logits import LinearLogits
from ..token_statistics import token_statistics
from .patching import Patches, check_version, lazy_logits

TESTED = "0.9"

_patches = Patches()
_head: ContextVar[Callable[[Tensor], Tensor | LinearLogits]] = ContextVar("head")  # head of the running model


class FusedLinearForPPO(nn.Module):
    r"""Log-probs of given tokens and entropies from hidden states, as verl's module of this name computes them.

    .. math:: \log p_y, \quad H = -\sum_j p_j \log p_j, \qquad p = softmax(c \tanh(s\,(h W^\top + b)/c)/T)

    Source: verl 0.9's ``FusedLinearForPPO``, which is this for ``bias=None, softcap=None, scale=1``.

    Args:
        chunk_size, impl_backend: verl's, accepted and ignored: ``fused_losses.workspace`` bounds the memory.

    Example:
        >>> hidden, weight, ids = torch.ones(1, 3, 4), torch.eye(5, 4), torch.tensor([[0, 1, 4]])
        >>> log_probs, entropy = FusedLinearForPPO()(hidden, weight, ids, temperature=2.0)
        >>> log_probs
        tensor([[-1.5275, -1.5275, -2.0275]])
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()

    def forward(
        self,
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float | Tensor = 1.0,
        *,
        bias: Tensor | None = None,
        softcap: float | None = None,
        scale: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """``log_probs`` and ``entropy``, shaped like ``input_ids``, fp32, both differentiable.

        Args:
            hidden_states: ``(T, H)`` or ``(B, S, H)``.
            vocab_weights: ``(V, H)``.
            input_ids: ``(T)`` or ``(B, S)``: the ids to score, already shifted.
            temperature: a number, or one per token or sequence.
            bias: ``(V,)``.
            softcap, scale: of the logits, before the temperature.
        """
        given = functools.partial(LinearLogits, weight=vocab_weights, bias=bias, scale=scale, softcap=softcap)
        logits = _head.get(given)(hidden_states)
        if isinstance(temperature, Tensor):
            temperature = temperature.expand_as(input_ids)
        found = token_statistics(logits, input_ids, ("log_probs", "entropy"), temperature=temperature)
        assert found.log_probs is not None
        assert found.entropy is not None
        return found.log_probs, found.entropy


def apply() -> None:
    """Put :class:`FusedLinearForPPO` in the place of verl's, with the bias, softcap and scale of the model that calls it.

    Call it before verl builds its workers' models, from a module of yours that ``VERL_USE_EXTERNAL_MODULES`` names. Set
    ``actor_rollout_ref.model.use_fused_kernels=True`` and ``fused_kernel_options.impl_backend`` to ``torch`` or, from verl
    0.9.1, to ``liger``, which then runs ours too.

    Raises:
        ImportError: verl is not installed.
        AttributeError: this version of verl has no such class; nothing is changed then.

    Warns:
        UserWarning: a version of verl that this was not tested with.
    """
    if _patches:
        return
    check_version("verl", TESTED)
    heads = importlib.import_module("verl.utils.experimental.torch_functional")
    models = importlib.import_module("verl.models.transformers.dense_common")
    with _patches:
        _patches.replace(heads, "FusedLinearForPPO", FusedLinearForPPO)
        _patches.replace(models, "forward_with_torch_backend", _with_head(models.forward_with_torch_backend))


def unapply() -> None:
    """Give verl its own head back; a model that it has built since :func:`apply` keeps the wrapper of its forward."""
    _patches.undo()


def _with_head(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = self.config.get_text_config()
        softcap = getattr(config, "final_logit_softcapping", None)

        def head(hidden: Tensor) -> Tensor | LinearLogits:
            # Call the head, do not read its weight: where FSDP2 shards it by itself, only its own forward has it whole.
            with lazy_logits(self):
                logits = self.lm_head(hidden) * _scale(config)
            return logits if softcap is None else torch.tanh(logits / softcap) * softcap

        token = _head.set(head)
        try:
            return forward(self, *args, **kwargs)
        finally:
            _head.reset(token)

    return wrapped


def _scale(config: Any) -> float:
    """The factor by which a model multiplies its logits."""
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere; Falcon-H1
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    divisor = getattr(config, "logits_scaling", None)  # Granite
    return 1.0 if divisor is None else divisor if config.model_type == "hyperclovax" else 1 / divisor
