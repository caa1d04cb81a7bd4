"""TRL's trainers on fused losses: :func:`apply` once before training, :func:`unapply` to go back.

SFT, DPO, KTO, GRPO and RLOO get their log-probs, entropies and the rest from one function of TRL's, distillation its divergence
from another: those two are replaced. CPO, SimPO, ORPO, TPO, GKD, SDFT, SDPO, online DPO and A2PO hold whole logits: while one
of them computes its loss, the model's head returns :class:`~fused_losses.linear_logits.LinearLogits` instead. Everything else,
options and metrics included, stays TRL's.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..divergence import divergence
from ..linear_logits import LinearLogits
from ..token_statistics import selective_log_softmax, token_statistics
from .patching import Patches, check_version, entropy_from_logits, lazy_logits, trainer_drops_logits

TESTED = "1.16"

_patches = Patches()


def apply() -> None:
    """Run TRL's trainers, including those made before, on fused losses.

    Raises:
        ImportError: TRL is not installed.
        AttributeError: this version of TRL has no such function; nothing is changed then.

    Warns:
        UserWarning: a version of TRL that this was not tested with.
    """
    if _patches:
        return
    check_version("trl", TESTED)
    utils = importlib.import_module("trl.trainer.utils")
    distillation = importlib.import_module("trl.trainer.distillation_trainer")
    with _patches:
        _patches.replace(utils, "_ChunkedLogProbFunction", ChunkedLogProbFunction)
        _patches.replace(distillation, "ChunkedDivergenceFunction", ChunkedDivergenceFunction)
        for name, trainer, method in (
            ("cpo", "CPOTrainer", "concatenated_forward"),
            ("orpo", "ORPOTrainer", "concatenated_forward"),
            ("online_dpo", "OnlineDPOTrainer", "_forward"),
            ("a2po", "A2POTrainer", "_get_sequence_logps"),
            ("tpo", "TPOTrainer", "compute_loss"),
            ("gkd", "GKDTrainer", "compute_loss"),
            ("sdft", "SDFTTrainer", "_forward_logits"),
            ("sdpo", "SDPOTrainer", "_forward_logits"),
        ):
            owner = getattr(_experimental(name, f"{name}_trainer"), trainer)
            wrap = _with_lazy_models if method == "compute_loss" else _with_lazy_model
            _patches.replace(owner, method, wrap(getattr(owner, method)))
        for name in ("cpo", "orpo", "a2po", "sdft", "sdpo"):
            _patches.replace(_experimental(name, f"{name}_trainer"), "selective_log_softmax", selective_log_softmax)
        for name in ("sdft", "sdpo"):
            _patches.replace(_experimental(name, "loss_utils"), "selective_log_softmax", selective_log_softmax)
        tpo, gkd = _experimental("tpo", "tpo_trainer"), _experimental("gkd", "gkd_trainer").GKDTrainer
        _patches.replace(tpo, "selective_log_softmax_and_entropy", _log_probs_and_entropy)
        _patches.replace(gkd, "generalized_jsd_loss", _generalized_jsd_loss(gkd.generalized_jsd_loss))


def _experimental(name: str, module: str) -> Any:
    return importlib.import_module(f"trl.experimental.{name}.{module}")


def unapply() -> None:
    """Give TRL its own functions back."""
    _patches.undo()


class ChunkedLogProbFunction:
    """Replaces TRL's autograd function of this name."""

    @staticmethod
    def apply(
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,)
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor | None, ...]:
        """``log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1``, ``(N,)``; None where not in ``outputs``."""
        logits = _logits(hidden, weight, bias, logit_scale, final_logit_softcapping, temperature)
        found = token_statistics(logits, targets, {"log_probs", *outputs})
        log_sum_sq_probs = None if found.log_sum_sq_probs is None else found.log_sum_sq_probs.detach()
        return found.log_probs, found.entropy, log_sum_sq_probs, found.mean_logits, found.is_top1


class ChunkedDivergenceFunction:
    """Replaces TRL's autograd function of this name."""

    @staticmethod
    def apply(
        student_hidden: Tensor,  # (N, H_s)
        student_weight: Tensor,  # (V, H_s)
        student_bias: Tensor | None,
        teacher_hidden: Tensor,  # (N, H_t)
        teacher_weight: Tensor,  # (V, H_t)
        teacher_bias: Tensor | None,
        beta: float,
        temperature: float = 1.0,
        student_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_logit_scale: float = 1.0,
        teacher_final_logit_softcapping: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The divergence, differentiable in the student, and the student's entropy, ``(N,)``."""
        from trl.trainer.utils import maybe_gather_lm_head_ctx  # type: ignore[import-not-found]

        with (
            maybe_gather_lm_head_ctx(student_weight, student_bias),
            maybe_gather_lm_head_ctx(teacher_weight, teacher_bias),
        ):
            student = _logits(
                student_hidden, student_weight, student_bias, student_logit_scale, student_final_logit_softcapping,
                temperature,
            )  # fmt: skip
            with torch.no_grad():
                teacher = _logits(
                    teacher_hidden, teacher_weight, teacher_bias, teacher_logit_scale, teacher_final_logit_softcapping,
                    temperature,
                )  # fmt: skip
                entropy = entropy_from_logits(student.detach())
            return divergence(student, teacher, kind="jsd", beta=beta), entropy


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None, temperature: float
) -> LinearLogits:
    head = None
    if hasattr(weight, "ds_id"):  # ZeRO-3 partitions it again after forward
        head = nn.ParameterList([weight] if bias is None else [weight, bias])
    if not torch.is_autocast_enabled(hidden.device.type):  # TRL's `cast_lm_head_to_fp32` casts the hidden states alone
        weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    return LinearLogits(hidden, weight, bias, scale=scale, softcap=softcap, temperature=temperature, module=head)


def _with_lazy_model(method: Callable[..., Any]) -> Callable[..., Any]:
    """A trainer's ``method(self, model, …)`` in which the model makes no logits."""

    @functools.wraps(method)
    def wrapped(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "is_encoder_decoder", False):
            return method(self, model, *args, **kwargs)
        with lazy_logits(model):
            return method(self, model, *args, **kwargs)

    return wrapped


def _with_lazy_models(compute_loss: Callable[..., Any]) -> Callable[..., Any]:
    """A trainer's ``compute_loss`` in which neither the model nor a teacher makes logits, unless its caller wants them."""

    @functools.wraps(compute_loss)
    def wrapped(
        self: Any, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if return_outputs and trainer_drops_logits() is False:
            return compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
        with lazy_logits(model, *([self.teacher_model] if hasattr(self, "teacher_model") else [])):
            return compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    return wrapped


def _log_probs_and_entropy(
    logits: Any, index: Tensor, entropy_requires_grad: bool = True, temperature: float = 1.0, row_mask: Any = None
) -> tuple[Any, Any]:
    index = index if row_mask is None else index.masked_fill(row_mask == 0, -100)
    found = token_statistics(logits, index, ("log_probs", "entropy"), temperature=temperature)
    return found.log_probs, found.entropy if entropy_requires_grad else found.entropy.detach()


def _generalized_jsd_loss(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def loss(
        student_logits: Any,
        teacher_logits: Any,
        labels: Tensor | None = None,
        beta: float = 0.5,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        if reduction not in ("batchmean", "sum", "mean"):  # one number per token and vocabulary entry
            return original(student_logits, teacher_logits, labels, beta, temperature, reduction, num_items_in_batch)
        mask = None if labels is None else labels != -100
        total = divergence(
            student_logits, teacher_logits, kind="jsd", beta=beta, temperature=temperature, mask=mask
        ).sum()
        if num_items_in_batch is not None:
            return total / (
                num_items_in_batch.to(total.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch
            )
        if reduction == "sum":
            return total
        if reduction == "mean":
            tokens = student_logits.shape[:-1].numel() if mask is None else mask.sum()
            return total / (tokens * student_logits.shape[-1])
        return total / (max(len(student_logits), 1) if mask is None else mask.sum().clamp_min(1))

    return staticmethod(loss)
