r"""How far a policy has moved from a reference, from the log-probabilities of the tokens that were sampled.

With :math:`d = \log\pi - \log\pi_{ref}` of a token drawn from the policy, KL(policy ‖ reference) is the mean of
:math:`d`. Without the whole distribution only :math:`d` is known. The estimators trade bias against variance:

========  ======================  ================================================================================
``k1``    :math:`d`               unbiased, but a single token can be negative
``k2``    :math:`d^2 / 2`         biased, low variance; its *gradient* is that of the true KL, in expectation
``k3``    :math:`e^{-d} - 1 + d`  unbiased, never negative but for rounding; gradient that of KL(reference ‖ policy)
``abs``   :math:`|d|`             a distance, not an estimate
========  ======================  ================================================================================

What the trainers call them:

=========================================================  ============================================================
elsewhere                                                  here
=========================================================  ============================================================
TRL GRPO's KL term                                         ``kl_estimate(..., kind="k3")``
verl ``kl``, ``mse``, ``abs``                              ``kind="k1"``, ``"k2"``, ``"abs"``
verl ``low_var_kl``                                        ``kind="k3", clamp=10``
verl ``k1+``, ``abs+``; ``k3+``, ``low_var_kl+``           ``gradient="k2"``; the last two with ``clamp=10``
OpenRLHF ``kl_estimator``                                  ``kind=..., clamp=10``
OpenRLHF ``unbiased_gradient``                             ``kind=..., clamp=10, gradient="k2", old_log_probs=...``
=========================================================  ============================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from .numerics import check_choice, upcast
from .sequences import masked_mean, same_shape


def k1(d: Tensor) -> Tensor:
    r""":math:`d`. Source: Schulman, "Approximating KL Divergence" (2020), as are k2 and k3."""
    return d


def k2(d: Tensor) -> Tensor:
    r""":math:`d^2 / 2`."""
    return 0.5 * d.square()


def k3(d: Tensor) -> Tensor:
    r""":math:`e^{-d} - 1 + d`; near 0, where the terms cancel, ``expm1`` keeps the digits."""
    return torch.expm1(-d) + d


ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3, "abs": torch.abs}


def kl_estimate(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    kind: str = "k3",
    *,
    mask: Tensor | None = None,
    clamp: float | None = None,
    gradient: Literal["own", "k2"] = "own",
    old_log_probs: Tensor | None = None,
) -> Tensor:
    r"""Per-token estimate of KL(policy ‖ reference).

    .. math:: k_1 = d, \quad k_2 = \tfrac{d^2}{2}, \quad k_3 = e^{-d} - 1 + d, \qquad d = \log\pi - \log\pi_{ref}

    Source: Schulman, "Approximating KL Divergence" (2020); the clamps and gradients of verl 0.9 and OpenRLHF 0.11. The
    module's docstring translates their names.

    Args:
        log_probs: log-probabilities of the sampled tokens under the policy, any shape, nats.
        ref_log_probs: the same under the reference, same shape.
        kind: ``"k1"``, ``"k2"``, ``"k3"`` or ``"abs"``.
        mask: tokens with mask 0 give 0 and take no gradient, whatever their values; default all tokens count.
        clamp: keep the value within ±clamp; where it saturates the gradient is 0; default no clamp, as TRL. verl (for
            ``k3``) and OpenRLHF (for all) use 10. Both also bound ``d`` first, but only where that clamp acts already.
        gradient: ``"own"``, that of the formula, or ``"k2"``, straight through: the value of ``kind`` with the gradient of
            ``k2`` of the unclamped ``d``, which in expectation is the gradient of the KL.
        old_log_probs: with ``gradient="k2"``, log-probabilities under the policy that sampled the tokens: the gradient
            is weighted by ``min(exp(log_probs − old_log_probs), 10)``, detached.

    Returns:
        Tensor of the same shape, fp32 (float64 for float64), differentiable in both log-probabilities.

    Raises:
        ValueError: an unknown ``kind`` or ``gradient``, ``old_log_probs`` without ``gradient="k2"``, or shapes that differ.

    Example:
        >>> policy, reference = torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -2.0])
        >>> kl_estimate(policy, reference, "k1")
        tensor([ 1., -1.])
        >>> kl_estimate(policy, reference, "k3")
        tensor([0.3679, 0.7183])
    """
    check_choice(ESTIMATORS, kind=kind)
    check_choice(("own", "k2"), gradient=gradient)
    if old_log_probs is not None and gradient == "own":
        raise ValueError("old_log_probs weights the gradient of k2: pass gradient='k2', or leave old_log_probs out")
    same_shape(log_probs=log_probs, ref_log_probs=ref_log_probs, mask=mask, old_log_probs=old_log_probs)
    d = upcast(log_probs) - upcast(ref_log_probs)
    if mask is not None:
        d = d.masked_fill(mask == 0, 0)
    if clamp is None:
        value = ESTIMATORS[kind](d)
    else:
        # Without the inner bound exp overflows and the clamp's zero gradient times inf is nan.
        value = ESTIMATORS[kind](d.clamp(min=-80) if kind == "k3" else d).clamp(-clamp, clamp)
    if gradient == "own":
        return value
    surrogate = k2(d)
    if old_log_probs is not None:
        log_weight = (upcast(log_probs) - upcast(old_log_probs)).detach()
        if mask is not None:
            log_weight = log_weight.masked_fill(mask == 0, 0)
        surrogate = surrogate * log_weight.exp().clamp(max=10)
    return value.detach() + (surrogate - surrogate.detach())


def kl_biased(log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""The mean log-ratio, the plainest KL penalty: ``kl_penalty(..., mode="biased")``.

    .. math:: \operatorname{mean}(d), \qquad d = \log\pi - \log\pi_{ref}

    Its value is right in expectation when the policy sampled the tokens; its gradient, whose expectation is 0, is not.

    Args:
        log_probs: log-probabilities of the sampled tokens under the policy, any shape, nats.
        ref_log_probs: the same under the reference, same shape.
        mask: tokens with mask 0 do not count; default all do.

    Returns:
        Scalar, fp32 (float64 for float64); 0 where nothing counts.

    Example:
        >>> kl_biased(torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -2.5]))
        tensor(0.2500)
    """
    return masked_mean(kl_estimate(log_probs, ref_log_probs, "k1", mask=mask), mask)


def kl_unbiased(log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""The textbook KL penalty that is never negative: ``kl_penalty(..., mode="unbiased")``.

    .. math:: \operatorname{mean}(e^d - 1 - d), \qquad d = \log\pi - \log\pi_{ref}

    This is k3 with the roles exchanged: unbiased, for KL(reference ‖ policy), when the *reference* sampled the tokens.
    For tokens that the policy sampled, TRL and others take :math:`e^{-d} - 1 + d`, our ``kl_estimate(..., kind="k3")``.

    Args:
        log_probs: log-probabilities of the sampled tokens under the policy, any shape, nats.
        ref_log_probs: the same under the reference, same shape.
        mask: tokens with mask 0 do not count; default all do.

    Returns:
        Scalar, fp32 (float64 for float64); 0 where nothing counts.

    Example:
        >>> kl_unbiased(torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -2.0]))
        tensor(0.5431)
    """
    return masked_mean(kl_estimate(ref_log_probs, log_probs, "k3", mask=mask), mask)


def kl_penalty(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    mode: Literal["unbiased", "biased"] = "unbiased",
    mask: Tensor | None = None,
) -> Tensor:
    """Mean KL penalty over the tokens, chosen by name: :func:`kl_unbiased` or :func:`kl_biased`.

    Args:
        log_probs: log-probabilities of the sampled tokens under the policy, any shape, nats.
        ref_log_probs: the same under the reference, same shape.
        mode: ``"unbiased"`` or ``"biased"``.
        mask: tokens with mask 0 do not count; default all do.

    Returns:
        Scalar, fp32 (float64 for float64); 0 where nothing counts.

    Raises:
        ValueError: an unknown ``mode``.

    Example:
        >>> kl_penalty(torch.tensor([-1.0]), torch.tensor([-2.0]), mode="biased")
        tensor(1.)
    """
    penalties = {"unbiased": kl_unbiased, "biased": kl_biased}
    check_choice(penalties, mode=mode)
    return penalties[mode](log_probs, ref_log_probs, mask)
