"""Models of transformers whose logits are never made where only a loss reads them.

:func:`apply` changes two things of a model, and :func:`unapply` takes them back: the head returns
:class:`~fused_losses.linear_logits.LinearLogits` when it is told to, and a hook on the model tells it. The model's own
``forward``, its scale or softcap, its loss function, ``Trainer`` and custom losses work as before, on logits that are
never made.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..linear_logits import LinearLogits
from .patching import check_version, trainer_drops_logits

TESTED = "5.23"
_KINDS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "MarianMTModel")
_WRITES_INTO_LOGITS = {"ChameleonForConditionalGeneration"}


class _Applied(NamedTuple):
    head: nn.Module  # what the model calls
    hooks: list[Any]

    @property
    def linears(self) -> list[Any]:
        """The layers that make logits: several where PEFT keeps copies, and PEFT may add one later."""
        return [module for module in self.head.modules() if hasattr(module, "lazy")]


def apply(model: Any, *, always: bool = False) -> Any:
    """Let the head of ``model`` return :class:`LinearLogits` where only a loss will read its logits.

    That is in every forward with ``labels``, training or evaluation, and, for losses outside the model (``compute_loss_func``,
    label smoothing, your own loop), in every forward in training mode with gradients, and in every forward without gradients
    that a ``Trainer`` runs for a loss alone (a reference's or a teacher's, a loss-only evaluation). All others, among them
    generation, cached steps and predictions that a ``Trainer`` keeps for ``compute_metrics``, get real logits.

    Call it after PEFT and before DDP, FSDP or ``accelerator.prepare``; ``Trainer`` does the latter itself.

    Args:
        model: a causal, masked or encoder-decoder language model of transformers, or a PEFT model around one. LoRA on the
            head becomes a low-rank term of the logits, in the head's dtype.
        always: also without labels and without gradients, for an RL loop of your own that computes log-probs of the old and
            of the reference policy. ``generate``, cached steps and predictions that a ``Trainer`` keeps still get real logits.

    Returns:
        ``model`` itself, changed.

    Raises:
        ImportError: transformers is not installed.
        TypeError: this model, its head or the adapter on its head is of an unsupported kind; the message names it, and the
            model makes its own logits.

    Warns:
        UserWarning: a version of transformers that this was not tested with.

    Example:
        >>> from fused_losses.integrations.transformers import apply
        >>> apply(model)  # doctest: +SKIP
        >>> Trainer(model, arguments, train_dataset=data).train()  # doctest: +SKIP
    """
    check_version("transformers", TESTED)
    owner = _owner(model)
    unapply(owner)
    labels_at = _position_of_labels(owner)
    head = owner.get_output_embeddings()
    linears = _linears(owner, head)
    for linear in linears:
        linear.lazy = False
        linear.forward = functools.partial(_linear_forward, linear)  # a method would not survive pickling
    if head not in linears and hasattr(head, "lora_A"):
        head.forward = functools.partial(_lora_forward, head)
    hooks = []
    for called in {owner, model if model is owner else model.base_model}:  # peft < 0.21 calls owner.forward, no hooks
        before = functools.partial(_before, labels_at, always)
        hooks.append(called.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(called.register_forward_hook(_after, always_call=True))
    owner._fused_losses = _Applied(head, hooks)
    return model


def unapply(model: Any) -> Any:
    """Give ``model`` its own head back; without :func:`apply` before, nothing happens."""
    owner = _owner(model)
    applied = owner.__dict__.pop("_fused_losses", None)
    if applied is not None:
        for hook in applied.hooks:
            hook.remove()
        for module in [applied.head, *applied.linears]:
            module.__dict__.pop("forward", None)
            module.__dict__.pop("lazy", None)
    return model


# When the head is lazy


def _before(labels_at: int, always: bool, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    applied = model._fused_losses
    if model.get_output_embeddings() is not applied.head:
        raise RuntimeError(
            f"the head of {type(model).__name__} was replaced after fused_losses' apply(model), by PEFT or by "
            "resize_token_embeddings: call apply(model) again"
        )
    labels = kwargs.get("labels", args[labels_at] if len(args) > labels_at else None)
    trains = model.training and torch.is_grad_enabled()
    lazy = trainer_drops_logits()
    if lazy is None:
        lazy = labels is not None or ((trains or always) and kwargs.get("past_key_values") is None)
    for linear in applied.linears:
        linear.lazy = lazy


def _after(model: Any, args: Any, output: Any) -> None:
    for linear in model._fused_losses.linears:
        linear.lazy = False


# How the head makes lazy logits


def _linear_forward(self: Any, input: Tensor) -> Tensor | LinearLogits:
    return LinearLogits(input, self.weight, self.bias, module=self) if self.lazy else nn.Linear.forward(self, input)


def _lora_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | LinearLogits:
    linear = self.get_base_layer()
    names = [name for name in self.active_adapters if name in self.lora_A]
    if not linear.lazy or self.disable_adapters or self.merged or not names or kwargs.get("adapter_names") is not None:
        return type(self).forward(self, x, *args, **kwargs)
    us, Bs = [], []
    for name in names:
        _refuse_variant(self, name)
        A, B = self.lora_A[name], self.lora_B[name]
        dropped = self.lora_dropout[name](self._cast_input_dtype(x, A.weight.dtype))
        us.append((A(dropped) * self.scaling[name]).to(x.dtype))
        Bs.append(B.weight.to(x.dtype))
    low_rank = (torch.cat(us, -1), torch.cat(Bs, -1))
    return LinearLogits(x, linear.weight, linear.bias, low_rank=low_rank, module=_owner_of_weights(self, linear, names))


def _owner_of_weights(head: Any, linear: Any, adapters: list[str]) -> Any:
    """The module that gathers the weights that the logits read: ZeRO-3 partitions each of them, ``lora_B`` too."""
    if not hasattr(linear.weight, "ds_id"):
        return linear
    if getattr(head, "ds_grads_remaining", 0):  # DeepSpeed's hooks of ``head`` gather what its forward read
        return head
    read = [linear.weight, linear.bias, *(head.lora_B[name].weight for name in adapters)]
    return nn.ParameterList([p for p in read if p is not None])  # not lora_A, which its own hooks gather


# Which models are refused


def _owner(model: Any) -> Any:
    """The model of transformers, inside PEFT's wrapper or not."""
    PreTrainedModel = importlib.import_module("transformers").PreTrainedModel
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(
            f"{type(inner).__name__} is not a model of transformers, nor PEFT's wrapper around one: pass the model itself, "
            "before DDP, FSDP or torch.compile wrap it"
        )
    return inner


def _position_of_labels(owner: Any) -> int:
    """Position of ``labels`` among the arguments; raises unless ``owner`` computes its loss from what its head returns."""
    name, forward = type(owner).__name__, inspect.unwrap(type(owner).forward)
    parameters = list(inspect.signature(forward).parameters)[1:]
    kinds = {c.__name__ for c in type(owner).__mro__}
    if not any(kind.endswith(_KINDS) for kind in kinds) or "labels" not in parameters:
        raise TypeError(
            f"{name} is no language model that takes labels: {', '.join('…' + kind for kind in _KINDS)} are"
        )
    if kinds & _WRITES_INTO_LOGITS:
        raise TypeError(f"{name} writes into its logits, which LinearLogits cannot follow")
    if (getattr(owner, "tp_size", None) or 1) > 1:
        raise TypeError(f"{name} is split by tensor parallelism: its head has a share of the vocabulary only")
    if "forward" in vars(owner) or forward.__module__ not in {c.__module__ for c in type(owner).__mro__}:
        raise TypeError(
            f"the forward of {name} was replaced by {inspect.unwrap(owner.forward).__module__}: undo that, or call "
            "fused_losses' apply first"
        )
    return parameters.index("labels")


def _linears(owner: Any, head: Any) -> list[Any]:
    """The layers whose outputs are the logits, or the adapted part of them."""
    name = f"the head of {type(owner).__name__}"
    found = [head]
    if _kind(head) == "peft.utils.other.ModulesToSaveWrapper":
        found = [head.original_module, *head.modules_to_save.values()]
    elif _kind(head) == "peft.tuners.lora.layer.Linear":
        for adapter in head.lora_A:
            _refuse_variant(head, adapter)
        found = [head.get_base_layer()]
    for linear in found:
        if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
            raise TypeError(
                f"{name} is {_kind(linear)}, not torch.nn.Linear: its logits are made as before; nothing changed"
            )
        if "forward" in vars(linear):
            raise TypeError(f"{name} has a forward of its own, as accelerate's device_map puts there: nothing changed")
        weight: Any = linear.weight
        plain = type(weight.data) is Tensor or hasattr(weight, "device_mesh")
        if not plain or not weight.is_floating_point() or weight.element_size() < 2:
            raise TypeError(
                f"{name} is quantised ({type(weight.data).__name__}, {weight.dtype}): nothing changed. Leave the head out of "
                "what is quantised"
            )
    return found


def _refuse_variant(head: Any, adapter: str) -> None:
    variant: Callable[..., Any] | None = head.lora_variant.get(adapter) if hasattr(head, "lora_variant") else None
    if variant is not None:
        kind = type(variant).__name__.removesuffix("LinearVariant")
        raise TypeError(
            f"the head's adapter {adapter!r} is {kind}: of LoRA and its kin only plain LoRA is a low-rank term. Make it "
            "that, or leave the head out of target_modules"
        )
    if head.lora_B[adapter].bias is not None:
        raise TypeError(f"the head's adapter {adapter!r} has lora_bias: train the head's own bias instead")


def _kind(module: Any) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"
