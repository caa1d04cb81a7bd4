"""LinearLogits against the logits it stands for: values, shapes, dtypes and gradients, without making them."""

import copy
import dataclasses
import functools
import io
import operator
import pickle
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fused_losses import settings
from fused_losses.cross_entropy import cross_entropy as fused_cross_entropy
from fused_losses.distillation import distillation_loss, teacher_topk
from fused_losses.divergence import divergence
from fused_losses.linear_logits import LinearHead, LinearLogits
from fused_losses.reference.linear_logits import linear_logits
from fused_losses.reference.tolerance import assert_accurate
from fused_losses.token_loss import token_loss
from fused_losses.token_statistics import token_statistics

B, S, V, H, R = 2, 5, 11, 6, 3
IDS = torch.tensor([[0, 3, 10, 3, 1], [5, 5, 2, 9, 7]])
FEW = torch.tensor([[0, 3, 10], [1, 5, 5]])[:, None].expand(B, S, 3)
MASK = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 1]], dtype=torch.bool)
PICK = torch.tensor([4, 0, 0])
PROBS = torch.linspace(-2, 2, B * S * V, dtype=torch.float64).sin().view(B, S, V).softmax(-1)
TEMPERATURE = torch.linspace(0.5, 2, B * S, dtype=torch.float64).view(B, S)
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.7, "temperature": 1.3},
    "softcap": {"softcap": 2.0, "bias": True, "temperature": 0.8},
    "per_token": {"temperature": TEMPERATURE},
    "low_rank": {"low_rank": True, "bias": True},
    "all": {"bias": True, "scale": 1.2, "softcap": 3.0, "temperature": TEMPERATURE, "low_rank": True},
}


def leaves(dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    return {
        "hidden": random(B, S, H),
        "weight": random(V, H),
        "bias": random(V),
        "u": random(B, S, R),
        "B": random(V, R),
    }


def arguments(tensors, bias=False, low_rank=False, **options):
    return (tensors["hidden"], tensors["weight"], tensors["bias"] if bias else None), {
        "low_rank": (tensors["u"], tensors["B"]) if low_rank else None,
        **options,
    }


def numbers(result):
    """What an operation returned, as a flat list of tensors."""
    if isinstance(result, torch.Tensor):
        return [result]
    if hasattr(result, "materialize"):
        return [result.materialize()]
    return [t for part in result for t in numbers(part)]


def gradients(results, tensors):
    if not results:
        return [None] * len(tensors)
    loss = sum((r * torch.linspace(1, 2, r.numel(), dtype=torch.float64).cos().view(r.shape)).sum() for r in results)
    return torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)


def check(fn, options, lazy=True):
    """``fn`` of a LinearLogits and of its reference: the same values and gradients, and nothing materialised."""
    tensors, same = leaves(), leaves()
    args, kwargs = arguments(tensors, **OPTIONS[options])
    with settings.strict():
        found = fn(LinearLogits(*args, **kwargs))
    assert not lazy or (not isinstance(found, torch.Tensor) and hasattr(found, "materialize")), type(found)
    args, kwargs = arguments(same, **OPTIONS[options])
    expected = numbers(fn(linear_logits(*args, **kwargs)))
    if lazy:
        assert found.shape == expected[0].shape
        assert found.ndim == found.dim() == expected[0].ndim
        assert found.numel() == expected[0].numel()
    found = numbers(found)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    if any(t.requires_grad for t in expected):
        pairs = zip(
            gradients([t for t in found if t.requires_grad], tensors),
            gradients([t for t in expected if t.requires_grad], same),
            tensors,
            strict=True,
        )
        for ours, theirs, name in pairs:
            ours, theirs = (torch.zeros((), dtype=torch.float64) if g is None else g for g in (ours, theirs))
            torch.testing.assert_close(ours.expand(theirs.shape), theirs, msg=lambda m, name=name: f"{name}: {m}")


VIEWS = {
    "int": lambda z: z[1],
    "negative_int": lambda z: z[:, -1],
    "slice": lambda z: z[:, :-1],
    "step": lambda z: z[:, ::2],
    "two_slices": lambda z: z[1:, 1:3],
    "ellipsis": lambda z: z[..., 1:, :],
    "only_ellipsis": lambda z: z[...],
    "none": lambda z: z[:, None],
    "none_last": lambda z: z[..., None],
    "none_first": lambda z: z[None, 0],
    "mask": lambda z: z[MASK],
    "mask_row": lambda z: z[torch.tensor([False, True])],
    "mask_second": lambda z: z[:, MASK[0]],
    "index": lambda z: z[:, PICK],
    "index_matrix": lambda z: z[:, PICK.view(1, 3)],
    "index_list": lambda z: z[[1, 0, 1]],
    "index_pair": lambda z: z[torch.tensor([0, 1, 1]), PICK],
    "index_and_int": lambda z: z[1, PICK],
    "index_numpy": lambda z: z[:, PICK.numpy()],
    "index_tensor_scalar": lambda z: z[torch.tensor(1)],
    "vocab_slice": lambda z: z[..., 2:7],
    "vocab_slice_negative": lambda z: z[..., :-3],
    "vocab_index": lambda z: z[..., PICK],
    "vocab_mask": lambda z: z[..., torch.arange(V) % 2 == 0],
    "vocab_and_tokens": lambda z: z[:, 1:, 3:],
    "vocab_in_the_middle": lambda z: z.transpose(1, 2)[:, :, 1:],
    "vocab_in_the_middle_index": lambda z: z.transpose(1, 2)[:, :, PICK],
    "vocab_in_the_middle_separate": lambda z: z.transpose(1, 2)[torch.tensor([0, 1, 1]), :, PICK],
    "vocab_in_the_middle_none": lambda z: z.transpose(1, 2)[:, None, :, 2],
    "vocab_first_index": lambda z: z.permute(2, 0, 1)[:, :, PICK],
    "vocab_first_separate": lambda z: z.permute(2, 0, 1)[:, torch.tensor([0, 1, 1]), None, PICK],
    "view": lambda z: z.view(-1, V),
    "view_size": lambda z: z.view(-1, z.size(-1)),
    "reshape_list": lambda z: z.reshape([S, B, -1]),
    "reshape_function": lambda z: torch.reshape(z, (B, 1, S, V)),
    "reshape_vocab_middle": lambda z: z.transpose(1, 2).reshape(1, B, V, S, 1),
    "view_as": lambda z: z.view_as(torch.empty(B * S, V)),
    "flatten": lambda z: z.flatten(0, 1),
    "flatten_function": lambda z: torch.flatten(z, 0, -2),
    "unflatten": lambda z: z.flatten(0, 1).unflatten(0, (-1, S)),
    "squeeze": lambda z: z[:1].squeeze(),
    "squeeze_dim": lambda z: z[:, :1].squeeze(1),
    "squeeze_nothing": lambda z: z.squeeze(0),
    "unsqueeze": lambda z: z.unsqueeze(1),
    "unsqueeze_last": lambda z: z.unsqueeze(-1),
    "transpose": lambda z: z.transpose(0, 1),
    "transpose_vocab": lambda z: z.transpose(1, 2),
    "mT": lambda z: z.mT,
    "T": lambda z: z[0].T,
    "t": lambda z: z[0].t(),
    "permute": lambda z: z.permute(2, 0, 1),
    "permute_function": lambda z: torch.permute(z, (1, 2, 0)),
    "movedim": lambda z: z.movedim(-1, 1),
    "swapaxes": lambda z: z.swapaxes(0, 2),
    "split_first": lambda z: z.split(2, dim=1)[1],
    "split_sections": lambda z: torch.split(z, [1, 4], dim=1)[1],
    "split_vocab": lambda z: z.split(4, dim=-1)[2],
    "chunk": lambda z: z.chunk(2, dim=1)[0],
    "chunk_vocab": lambda z: z.chunk(3, -1)[1],
    "tensor_split": lambda z: z.tensor_split(3, dim=1)[1],
    "tensor_split_indices": lambda z: torch.cat(torch.tensor_split(z, (1, -2, 2), dim=1), 1),
    "tensor_split_vocab": lambda z: z.tensor_split([4], -1)[1],
    "repeat": lambda z: z.repeat(3, 2, 1)[1:, 3:],
    "repeat_new_dimension": lambda z: z.repeat(2, 1, 1, 1),
    "repeat_interleave": lambda z: z.repeat_interleave(3, dim=0)[1:5],
    "repeat_interleave_counts": lambda z: torch.repeat_interleave(z, torch.arange(S), 1),
    "unbind": lambda z: z.unbind(1)[2],
    "iteration": lambda z: next(iter(z)),
    "cat": lambda z: torch.cat([z, z[:, 1:]], dim=1),
    "cat_rows": lambda z: torch.cat([z[1:], z, z[:0]]),
    "cat_temperatures": lambda z: torch.cat([z, z / torch.full((B, S, 1), 2.0)], dim=-2),
    "cat_vocab_middle": lambda z: torch.concat([z.transpose(1, 2), z.transpose(1, 2)], dim=2),
    "stack": lambda z: torch.stack([z[0], z[1], z[0]], dim=1),
    "stack_iteration": lambda z: torch.stack(list(z)),
    "roll": lambda z: z.roll(-1, dims=1),
    "roll_function": lambda z: torch.roll(z, (1, 2), (0, 1)),
    "flip": lambda z: z.flip(0, 1),
    "select": lambda z: z.select(1, 2),
    "narrow": lambda z: z.narrow(1, 1, 3),
    "index_select": lambda z: torch.index_select(z, 1, PICK),
    "index_select_vocab": lambda z: z.index_select(-1, PICK),
    "contiguous": lambda z: z[:, 1:].contiguous(),
    "clone": lambda z: z.clone(),
    "to_same": lambda z: z.to(z.device).to(torch.float64).double(),
    "label": lambda z: z.float().double(),
    "times": lambda z: z * 1.5,
    "times_left": lambda z: 1.5 * z,
    "times_negative": lambda z: -2 * z,
    "times_per_token": lambda z: z * TEMPERATURE[..., None],
    "times_per_token_left": lambda z: TEMPERATURE[..., None] * z,
    "times_per_sequence": lambda z: z * TEMPERATURE[:, :1, None],
    "times_scalar_tensor": lambda z: z * torch.tensor(0.3),
    "divided": lambda z: z / 0.7,
    "divided_per_token": lambda z: z / TEMPERATURE.unsqueeze(-1),
    "divided_vocab_middle": lambda z: z.transpose(1, 2) / TEMPERATURE.unsqueeze(1),
    "div_function": lambda z: torch.div(z, 3),
    "negated": lambda z: -z,
    "neg_function": lambda z: torch.neg(z),
    "plus_number": lambda z: z + 2,
    "number_minus": lambda z: 1 - z,
    "plus_per_token": lambda z: z + TEMPERATURE[..., None],
    "minus_per_token": lambda z: z - TEMPERATURE[..., None],
    "per_token_minus": lambda z: TEMPERATURE[..., None] - z,
    "rsub": lambda z: torch.rsub(z, 2),
    "shift_then_view": lambda z: (z - TEMPERATURE[..., None]).transpose(1, 2)[1:] * 2,
    "in_place_divided": lambda z: z.clone().div_(2.0),
    "in_place_times": lambda z: z.clone().mul_(TEMPERATURE[..., None]),
    "stable": lambda z: z - z.max(-1, keepdim=True).values,
    "log_softmax": lambda z: F.log_softmax(z, -1),
    "log_softmax_middle": lambda z: z.transpose(1, 2).log_softmax(1),
    "softmax": lambda z: torch.softmax(z, dim=-1),
    "log_softmax_of_shifted": lambda z: (z - TEMPERATURE[..., None]).log_softmax(-1),
    "log_softmax_twice": lambda z: z.log_softmax(-1).log_softmax(-1),
    "log_softmax_views": lambda z: -F.log_softmax(z, -1)[:, 1:].reshape(-1, V) * 0.5 + 1,
    "log_softmax_per_token": lambda z: z.log_softmax(-1) * TEMPERATURE[..., None],
    "log_softmax_mask": lambda z: z.log_softmax(-1)[MASK],
    "log_softmax_float": lambda z: z.log_softmax(-1, dtype=torch.float64),
    "exp_log_softmax": lambda z: z.log_softmax(-1).exp(),
    "log_of_softmax": lambda z: z.softmax(-1).log(),
    "p_log_p": lambda z: z.softmax(-1) * z.log_softmax(-1),
    "p_z": lambda z: z.softmax(-1) * z,
    "z_p": lambda z: z * z.softmax(-1),
    "clone_log_softmax": lambda z: z.log_softmax(-1).clone(),
}


@pytest.mark.parametrize("options", ["bias", "all"])
@pytest.mark.parametrize("name", VIEWS)
def test_stays_lazy(name, options):
    check(VIEWS[name], options)


UNCAPPED = {
    "plus_bias": lambda z: z + torch.linspace(-1, 1, V, dtype=torch.float64),
    "bias_plus": lambda z: torch.linspace(-1, 1, V, dtype=torch.float64) + z / 2,
    "minus_bias": lambda z: z - torch.linspace(-1, 1, V, dtype=torch.float64).view(1, 1, V),
    "plus_bias_middle": lambda z: z.transpose(1, 2) + torch.linspace(-1, 1, V, dtype=torch.float64)[:, None],
    "capped": lambda z: torch.tanh(z / 1.5) * 1.5,
    "capped_left": lambda z: 1.5 * torch.tanh(z / 1.5),
    "capped_method": lambda z: (z / 1.5).tanh() * 1.5,
    "capped_views": lambda z: torch.tanh(z[:, 1:] / 1.5).reshape(-1, V) * 1.5,
    "capped_then_cooled": lambda z: 1.5 * torch.tanh(z * 0.3 / 1.5) / TEMPERATURE[..., None],
    "capped_in_place": lambda z: (z.clone().div_(1.5)).tanh().mul(1.5),
}


@pytest.mark.parametrize("options", ["plain", "scale", "low_rank"])
@pytest.mark.parametrize("name", UNCAPPED)
def test_stays_lazy_without_a_softcap(name, options):
    check(UNCAPPED[name], options)


def smoothed(z, eps=0.1):
    logp = -F.log_softmax(z, dim=-1)
    return (1 - eps) * logp.gather(-1, IDS.unsqueeze(-1)).mean() + eps * logp.sum(-1, keepdim=True).mean() / V


WEIGHT = torch.linspace(0.5, 2, V, dtype=torch.float64)
IGNORED = IDS.masked_fill(~MASK, -100)
NUMBERS = {
    "cross_entropy": lambda z: F.cross_entropy(z.reshape(-1, V), IDS.reshape(-1)),
    "cross_entropy_module": lambda z: nn.CrossEntropyLoss()(z.view(-1, V), IDS.view(-1)),
    "cross_entropy_transposed": lambda z: F.cross_entropy(z.transpose(1, 2), IGNORED),
    "cross_entropy_permuted": lambda z: F.cross_entropy(z.permute(0, 2, 1), IGNORED, reduction="none"),
    "cross_entropy_sum": lambda z: F.cross_entropy(z.flatten(0, 1), IGNORED.flatten(), reduction="sum"),
    "cross_entropy_weight": lambda z: F.cross_entropy(z.flatten(0, 1), IGNORED.flatten(), WEIGHT),
    "cross_entropy_smoothing": lambda z: F.cross_entropy(z.flatten(0, 1), IGNORED.flatten(), label_smoothing=0.2),
    "cross_entropy_everything": lambda z: nn.CrossEntropyLoss(
        WEIGHT, ignore_index=3, reduction="none", label_smoothing=0.2
    )(z.transpose(1, 2), IDS),
    "cross_entropy_probs": lambda z: F.cross_entropy(z.flatten(0, 1), PROBS.flatten(0, 1)),
    "cross_entropy_probs_transposed": lambda z: F.cross_entropy(
        z.transpose(1, 2), PROBS.transpose(1, 2), WEIGHT, label_smoothing=0.1, reduction="none"
    ),
    "cross_entropy_one": lambda z: F.cross_entropy(z[0, 0], IDS[0, 0]),
    "cross_entropy_shifted": lambda z: F.cross_entropy((z + TEMPERATURE[..., None]).transpose(1, 2), IDS),
    "gather": lambda z: z.gather(-1, IDS.unsqueeze(-1)),
    "gather_function": lambda z: torch.gather(z, 2, FEW),
    "gather_keywords": lambda z: torch.gather(input=z, dim=-1, index=FEW),
    "gather_middle": lambda z: z.transpose(1, 2).gather(1, IDS.unsqueeze(1)),
    "take_along_dim": lambda z: torch.take_along_dim(z, FEW, dim=-1),
    "take_along_dim_from_the_end": lambda z: torch.take_along_dim(z.log_softmax(-1), FEW - V, dim=-1),
    "logsumexp": lambda z: z.logsumexp(-1),
    "logsumexp_keepdim": lambda z: torch.logsumexp(z, dim=-1, keepdim=True),
    "logsumexp_middle": lambda z: z.transpose(1, 2).logsumexp(1),
    "logsumexp_shifted": lambda z: (z + TEMPERATURE[..., None]).logsumexp(-1),
    "statistics_of_a_sum_scaled_per_token": lambda z: (
        ((z + 1) * TEMPERATURE[..., None]).log_softmax(-1).gather(-1, FEW)
    ),
    "log_prob_by_difference": lambda z: (z.gather(-1, IDS.unsqueeze(-1)) - z.logsumexp(-1, keepdim=True)).squeeze(-1),
    "log_prob_by_rows": lambda z: (
        z.gather(-1, IDS.unsqueeze(-1)).squeeze(-1) - torch.stack([torch.logsumexp(row, dim=-1) for row in z])
    ),
    "log_prob": lambda z: F.log_softmax(z, dim=-1).gather(dim=-1, index=IDS.unsqueeze(-1)).squeeze(-1),
    "log_prob_by_row": lambda z: torch.stack(
        [F.log_softmax(row, -1).gather(-1, ids.unsqueeze(-1)).squeeze(-1) for row, ids in zip(z, IDS, strict=True)]
    ),
    "log_prob_indexed": lambda z: z.log_softmax(-1)[torch.arange(B)[:, None], torch.arange(S), IDS],
    "logits_indexed": lambda z: z.view(-1, V)[torch.arange(B * S), IDS.view(-1)],
    "logits_indexed_mask": lambda z: z[MASK, IDS[MASK] - V],
    "one_entry": lambda z: z[..., 3],
    "one_entry_last": lambda z: z[:, 0, -1],
    "one_log_prob": lambda z: z.log_softmax(-1)[..., 3],
    "some_log_probs": lambda z: z.log_softmax(-1)[..., PICK],
    "probabilities": lambda z: z.softmax(-1).gather(-1, FEW),
    "unlikelihood": lambda z: torch.log1p(-z.softmax(-1).gather(-1, IDS[..., None])).sum(),
    "entropy": lambda z: -(F.log_softmax(z, -1).exp() * F.log_softmax(z, -1)).sum(-1),
    "entropy_function": lambda z: -torch.sum(torch.softmax(z, -1) * torch.log_softmax(z, -1), dim=-1),
    "entropy_by_difference": lambda z: torch.logsumexp(z, dim=-1) - torch.sum(F.softmax(z, dim=-1) * z, dim=-1),
    "collision": lambda z: (F.softmax(z, -1) ** 2).sum(-1),
    "collision_log": lambda z: -2 * (z.softmax(-1).square().sum(-1) + (z.softmax(-1) * z.softmax(-1)).mean()).log(),
    "softmax_squared": lambda z: z.transpose(1, 2).softmax(1).pow(2).gather(1, FEW.transpose(1, 2)),
    "entropy_mean": lambda z: -(F.log_softmax(z, -1).exp() * F.log_softmax(z, -1)).mean(),
    "sum": lambda z: z.sum(-1),
    "sum_keepdim": lambda z: torch.sum(z, dim=-1, keepdim=True),
    "sum_all": lambda z: z.sum(),
    "mean": lambda z: z.mean(-1),
    "mean_some": lambda z: z.mean((0, 2)),
    "mean_middle": lambda z: z.transpose(1, 2).mean(1, keepdim=True),
    "mean_shifted": lambda z: (2 * z - TEMPERATURE[..., None]).mean(-1),
    "log_softmax_sum": lambda z: (-F.log_softmax(z, -1)).sum(dim=-1, keepdim=True),
    "log_softmax_mean": lambda z: F.log_softmax(z, -1).mean(dim=-1),
    "log_softmax_mean_all": lambda z: F.log_softmax(z, -1).mean(),
    "softmax_sum": lambda z: (3 * z.softmax(-1)).sum(-1),
    "label_smoother": smoothed,
    "nll_loss": lambda z: F.nll_loss(F.log_softmax(z.view(-1, V), -1), IGNORED.view(-1), WEIGHT),
    "nll_loss_transposed": lambda z: nn.NLLLoss(reduction="none")(z.transpose(1, 2).log_softmax(1), IGNORED),
    "nll_loss_scaled": lambda z: F.nll_loss(F.log_softmax(z.view(-1, V), -1) * 0.3, IDS.view(-1), reduction="sum"),
    "kl_div": lambda z: F.kl_div(F.log_softmax(z, -1), PROBS, reduction="batchmean"),
    "kl_div_sum": lambda z: nn.KLDivLoss(reduction="sum")(z.log_softmax(-1), PROBS),
    "kl_div_mean": lambda z: F.kl_div(F.log_softmax(z, -1), PROBS, reduction="mean"),
    "kl_div_log": lambda z: F.kl_div(z.log_softmax(-1), PROBS.log(), reduction="batchmean", log_target=True),
    "kl_div_middle": lambda z: F.kl_div(z.transpose(1, 2).log_softmax(1), PROBS.transpose(1, 2), reduction="sum"),
    "kl_div_zeros": lambda z: F.kl_div(z.log_softmax(-1), (PROBS > 0.1).double(), reduction="sum"),
    "kl_div_lazy_teacher": lambda z: F.kl_div(z[:, 1:].log_softmax(-1), z[:, :-1].softmax(-1), reduction="batchmean"),
    "kl_div_lazy_log_teacher": lambda z: F.kl_div(
        z.transpose(1, 2)[..., 1:].log_softmax(1),
        (z / 2).transpose(1, 2)[..., 1:].log_softmax(1),
        reduction="sum",
        log_target=True,
    ),
    "argmax": lambda z: z.argmax(-1),
    "argmax_keepdim": lambda z: torch.argmax(z, dim=-1, keepdim=True),
    "argmax_middle": lambda z: z.transpose(1, 2).argmax(1),
    "argmax_softmax": lambda z: z.softmax(-1).argmax(dim=-1),
    "argmin": lambda z: z.argmin(-1),
    "accuracy": lambda z: (z.argmax(dim=-1) == IDS).double().mean(),
    "max": lambda z: z.max(dim=-1),
    "max_function": lambda z: torch.max(z, -1, keepdim=True),
    "min": lambda z: z.min(-1),
    "amax": lambda z: z.amax(-1, keepdim=True),
    "max_softmax": lambda z: z.softmax(-1).max(-1),
    "topk": lambda z: z.topk(4),
    "topk_smallest": lambda z: torch.topk(z, 2, dim=-1, largest=False),
    "topk_middle": lambda z: z.transpose(1, 2).topk(3, dim=1),
    "topk_log_softmax": lambda z: z.log_softmax(-1).topk(3, dim=-1),
    "scaled_by_a_trained_number": lambda z: (z.log_softmax(-1) * z.logsumexp(-1, keepdim=True)).gather(-1, FEW),
}


@pytest.mark.parametrize("options", ["plain", "softcap", "all"])
@pytest.mark.parametrize("name", NUMBERS)
def test_answers_without_logits(name, options):
    check(NUMBERS[name], options, lazy=False)


@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_counts(options):
    check(lambda z: z, options)
    args, kwargs = arguments(leaves(), **OPTIONS[options])
    plain, _ = arguments(leaves())
    assert options == "plain" or not torch.allclose(linear_logits(*args, **kwargs), linear_logits(*plain))


SPELLINGS = {
    "flip": lambda z: torch.flip(z, dims=(1,)),
    "permute": lambda z: torch.permute(input=z, dims=(0, 2, 1)),
    "sum": lambda z: torch.sum(z, axis=-1, keepdims=True),
    "mean": lambda z: z.mean(axis=-1),
    "max": lambda z: z.max(axis=-1).values,
    "amax": lambda z: z.amax(dim=-1, keepdims=True),
    "log_softmax": lambda z: z.log_softmax(axis=-1).gather(axis=-1, index=FEW),
    "logsumexp": lambda z: torch.logsumexp(input=z, axis=-1),
    "split": lambda z: z.split(split_size=2, dim=1)[1],
    "split_with_sizes": lambda z: z.split_with_sizes(split_sizes=[1, 4], dim=1)[1],
    "swapaxes": lambda z: z.swapaxes(axis0=0, axis1=1),
    "mul": lambda z: torch.mul(input=z, other=2),
    "mul_numpy": lambda z: torch.mul(x1=z, x2=2),
    "add": lambda z: z.add(other=TEMPERATURE[..., None]),
    "sub": lambda z: torch.sub(torch.ones(B, S, 1), other=z),
    "div": lambda z: torch.div(z, other=3),
    "div_not_rounding": lambda z: torch.div(z, 3, rounding_mode=None),
    "in_place": lambda z: (z * 1).mul_(other=2),
    "unsqueeze": lambda z: z.unsqueeze(axis=0),
    "topk": lambda z: z.topk(k=2, axis=-1).values,
    "reshape": lambda z: torch.reshape(input=z, shape=(B * S, V)),
    "view": lambda z: z.view(size=(B * S, V)),
    "to": lambda z: z.to(tensor=torch.ones(1, dtype=torch.float64)),
    "cat": lambda z: torch.cat([z, z], axis=1),
    "kl_div": lambda z: F.kl_div(input=z.log_softmax(-1), target=PROBS, reduction="sum"),
    "numpy_times": lambda z: np.float64(2.5) * z,
    "times_numpy": lambda z: z * np.float32(2.5),
    "numpy_plus": lambda z: np.float32(2.5) + z,
    "numpy_minus": lambda z: np.float64(2.5) - z,
    "over_numpy": lambda z: z / np.int64(3),
    "times_numpy_bool": lambda z: z * np.bool_(True),
    "numpy_dim": lambda z: z.log_softmax(np.int64(-1)).sum(np.int64(-1)),
    "in_place_numpy": lambda z: (z * 1).div_(np.sqrt(8)),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_other_spellings(name):
    fn = SPELLINGS[name]
    check(fn, "bias", lazy=False)


OUT_OF_RANGE = {
    "sum": lambda z: z.sum(5),
    "sum_several": lambda z: z.sum((-1, 4)),
    "mean": lambda z: z.mean(-4),
    "log_softmax": lambda z: z.log_softmax(5),
    "softmax": lambda z: torch.softmax(z, -4),
    "logsumexp": lambda z: z.logsumexp(5),
    "argmax": lambda z: z.argmax(5),
    "max": lambda z: z.max(5),
    "amax": lambda z: z.amax(5),
    "topk": lambda z: z.topk(2, 5),
    "gather": lambda z: z.gather(5, FEW),
    "cat": lambda z: torch.cat([z, z], 5),
    "stack": lambda z: torch.stack([z, z], 5),
    "nll_loss_of_probabilities": lambda z: F.nll_loss(z.log_softmax(-1).flatten(0, 1), PROBS.flatten(0, 1)),
    "column": lambda z: z[..., torch.tensor(V)],
    "column_negative": lambda z: z[..., torch.tensor(-V - 1)],
    "column_of_log_probs": lambda z: z.log_softmax(-1)[..., torch.tensor(V)],
    "columns_of_log_probs": lambda z: z.log_softmax(-1)[..., [0, -V - 1]],
    "t": lambda z: z.t(),
    "flatten": lambda z: z.flatten(1, 0),
    "index_lists": lambda z: z[[[0, 1]] * 31],
    "index_pair": lambda z: z[[0, 1, 1], [1, 2]],
    "index_everything": lambda z: z[[0, 1], [1, 2], [3, 4, 5]],
    "index_slice_in_a_tuple": lambda z: z[((0, slice(1)),)],
    "index_select_bool": lambda z: z.index_select(1, torch.ones(S, dtype=torch.bool)),
    "index_select": lambda z: z.index_select(0, torch.tensor([B])),
    "index_select_vocab": lambda z: z.index_select(-1, torch.tensor([V])),
    "narrow": lambda z: z.narrow(1, S + 1, 0),
    "chunk": lambda z: z.chunk(0),
    "permute_twice": lambda z: z.permute(0, 0, 1),
    "permute_few": lambda z: z.permute(0, 1),
    "movedim_twice": lambda z: z.movedim((0, 1), (1, 1)),
    "movedim_fewer": lambda z: z.movedim((0, 1), (1,)),
    "topk_many": lambda z: z.topk(-1),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_indices_and_dimensions_that_do_not_exist_raise_as_in_eager(name):
    lazy, eager, _ = make()
    with pytest.raises(Exception) as expected:
        OUT_OF_RANGE[name](eager)
    with pytest.raises(expected.type), settings.strict():
        OUT_OF_RANGE[name](lazy)


def test_index_select_takes_no_negative_index():
    lazy, *_ = make()
    for dim in (1, -1):
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            lazy.index_select(dim, torch.tensor([-1]))


EDGES = {
    "index_select_one": lambda z: z.index_select(0, torch.tensor(1)),
    "between_indices": lambda z: z.transpose(1, 2).unsqueeze(0)[:, [0, 1, 1], 3, [1, 2, 3]],
    "between_indices_first": lambda z: z.transpose(1, 2)[[0, 1, 1], torch.tensor(-2), PICK],
    "log_prob_from_the_end": lambda z: z.log_softmax(-1)[..., [-1, 2]],
    "no_entries": lambda z: z[..., 5:5],
    "no_entries_statistics": lambda z: z[:, 1:, 5:5].logsumexp(-1),
    "no_entries_by_list": lambda z: z[1, :, []],
    "no_log_probs": lambda z: z.log_softmax(-1)[..., []],
    "no_tokens_by_list": lambda z: z[[]],
    "no_tokens_statistics": lambda z: z[:, []].logsumexp(-1),
    "top_0": lambda z: z.topk(0),
    "top_0_log_probs": lambda z: z.log_softmax(-1).topk(0),
    "gather_none": lambda z: z.gather(-1, FEW[..., :0]),
    "gather_no_log_probs": lambda z: z.transpose(1, 2).log_softmax(1).gather(1, FEW[..., :0].transpose(1, 2)),
    "sum_of_probabilities": lambda z: z.softmax(-1).sum(),
    "mean_of_probabilities": lambda z: z.softmax(-1).mean(-1),
    "data": lambda z: z.data.logsumexp(-1),
    "real": lambda z: z.real.logsumexp(-1),
    "mH": lambda z: z.mH.logsumexp(-2),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges(name):
    check(EDGES[name], "all", lazy=False)
    lazy, eager, _ = make()
    assert [t.requires_grad for t in numbers(EDGES[name](lazy))] == [
        t.requires_grad for t in numbers(EDGES[name](eager))
    ]


PAIR = torch.tensor([1, 0]), torch.tensor([4, 2])
SEQUENCES = {
    "tuples": ((0, 1), (1, 2)),
    "tuples_of_everything": ((0, 1), (1, 2), (3, -4)),
    "tuples_apart": ((0, 1), None, (1, 2)),
    "tuple_and_tensor": ((0, 1, 1), torch.tensor([1, 2, 3])),
    "tensor_and_tuple": (PAIR[0], (1, 2)),
    "tuple_for_tokens": (slice(None), (0,)),
    "tuple_for_the_vocabulary": (..., (1, 2)),
    "tuple_in_a_tuple": (((0, 1), (1, 0)),),
    "mask_in_a_tuple": ((False, True),),
    "no_tuple": ((),),
    "sizes": torch.Size([1, 2]),
    "floats": ([1.0, 0.0],),
    "lists": [[0, 1], [1, 2]],
    "lists_of_everything": [[0, 1], [1, 2], [3, 4]],
    "lists_in_a_tuple": ([[0, 1], [1, 0]],),
    "list_of_tuples": [(0, 1), (1, 2)],
    "list_of_ranges": [range(2), range(1, 3)],
    "list_of_numbers": [torch.tensor(0), torch.tensor(1)],
    "list_of_tensors": [*PAIR],
    "list_of_one": [PAIR[0]],
    "list_of_arrays": [t.numpy() for t in PAIR],
    "list_of_numpy_numbers": [np.int64(1), np.int64(0)],
    "list_of_masks": [[False, True]],
    "list_of_a_mask": [MASK],
    "list_of_slices": [slice(0, 2), 1],
    "list_with_none": [None, 1],
    "list_with_an_ellipsis": [..., 1],
    "list_with_nothing": [[]],
    "mixed_list": [[0, 1], 2],
    "tensors_in_a_list_in_a_tuple": ([torch.tensor(0), torch.tensor(1)],),
    "range": range(2),
    "list_too_long_for_a_tuple": [[0, 1]] * 32,
    "tensors_too_many_for_a_tuple": [torch.tensor(1)] * 32,
}


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence", "ignore:Creating a tensor from a list")
def test_sequences_index_as_in_eager(name):
    check(lambda z: z[SEQUENCES[name]], "all", lazy=False)


def test_an_index_of_bytes_is_a_mask():
    lazy, eager, _ = make()
    mask = torch.tensor([0, 1], dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for key in (mask, mask[1]):
            torch.testing.assert_close(numbers(lazy[key])[0], eager[key])
        vocab = (torch.arange(V) % 3 == 0).to(torch.uint8)
        torch.testing.assert_close(numbers(lazy.log_softmax(-1)[..., vocab])[0], eager.log_softmax(-1)[..., vocab])


@pytest.mark.parametrize(
    "fn",
    [
        lambda z: torch.div(z, 2, rounding_mode="floor"),
        lambda z: z == np.float32(1),
        lambda z: np.float64(2) / z,
        lambda z: z.sum(axis=1),
        lambda z: z.max(other=torch.zeros(())),
        lambda z: torch.add(z, 1, alpha=2),
        lambda z: torch.sub(z, 1, alpha=2),
        lambda z: z.tanh() * -2,
        lambda z: z.max(0).values,
        lambda z: z.isfinite().all(0),
        lambda z: z.isinf().float(),
        lambda z: (z == z).float(),
        lambda z: z.isinf() | torch.arange(V).eq(1),
        lambda z: (z.softmax(-1) * z.log_softmax(-1)).gather(-1, IDS[..., None]),
        lambda z: z.roll(1, -1),
        lambda z: z.view(torch.int64 if z.dtype == torch.float64 else torch.int32),
    ],
)
def test_what_a_handler_does_not_know_materialises(fn):
    lazy, eager, _ = make()
    with pytest.warns(UserWarning, match="materialises"):
        found = fn(lazy)
    torch.testing.assert_close(found, fn(eager))


@pytest.mark.parametrize("shape", [(V, 3, V), (V * 3, V), (3, V, V), (3 * V, V, 1), (V, V, 3), (3, -1, V, 1)])
def test_views_keep_the_vocabulary_where_tokens_are_as_many(shape):
    hidden, weight = torch.randn(V, 3, H, dtype=torch.float64), torch.randn(V, H, dtype=torch.float64)
    lazy, eager = LinearLogits(hidden, weight), linear_logits(hidden, weight)
    if shape == (V, V, 3):
        lazy, eager = lazy.transpose(1, 2), eager.transpose(1, 2)
    with settings.strict():
        found = lazy.reshape(shape)
    torch.testing.assert_close(found.materialize(), eager.reshape(shape))


def make(**options):
    tensors = leaves(torch.float32)
    args, kwargs = arguments(tensors, **options)
    return LinearLogits(*args, **kwargs), linear_logits(*args, **kwargs), tensors


MATERIALISED = {
    "std": lambda z: z.std(),
    "square": lambda z: z**2,
    "equal": lambda z: z == z[0, 0, 0],
    "not_equal": lambda z: z != 0,
    "less": lambda z: z < 0.5,
    "times_vocabulary": lambda z: z * torch.linspace(0, 1, V),
    "where": lambda z: torch.where(z > 0, z, 0.0),
    "softmax_over_tokens": lambda z: z.softmax(1),
    "view_merging_the_vocabulary": lambda z: z.view(-1),
    "view_after_contiguous": lambda z: z.transpose(1, 2).contiguous().view(V * B, S),
    "view_after_a_contiguous_clone": lambda z: z.mT.clone(memory_format=torch.contiguous_format).view(size=(-1, S)),
    "view_as_after_contiguous": lambda z: z.permute(2, 0, 1).contiguous().view_as(torch.empty(V * B, S)),
    "view_of_log_probs": lambda z: z.log_softmax(-1).transpose(1, 2).contiguous().view([-1]),
    "sum_over_tokens": lambda z: z.sum(1),
    "unbind_vocabulary": lambda z: z.unbind(-1)[2],
    "cat_vocabulary": lambda z: torch.cat([z, z], -1),
    "gather_other_tokens_for_each_entry": lambda z: z.gather(1, IDS[:, :, None].expand(-1, -1, V).clone() % S),
    "gather_by_entry": lambda z: z.gather(1, torch.arange(B * S * V).view(B, S, V) % S),
    "cat_with_a_tensor": lambda z: torch.cat([z, torch.zeros(B, 1, V)], 1),
    "roll_vocabulary": lambda z: z.roll(1, -1),
    "cross_entropy_over_tokens": lambda z: F.cross_entropy(z, torch.ones(B, V, dtype=torch.long)),
    "kl_div_broadcast": lambda z: F.kl_div(z.log_softmax(-1), PROBS[0, 0].float(), reduction="sum"),
    "as_the_second": lambda z: F.mse_loss(torch.zeros(B, S, V), z),
    "tensor_plus": lambda z: torch.ones(B, S, V) + z,
    "tensor_in_place": lambda z: torch.ones(B, S, V).add_(z),
    "reciprocal": lambda z: 1 / z,
    "gather_some_tokens": lambda z: z.gather(-1, IDS[:, :2, None]),
    "mask_over_everything": lambda z: z[torch.ones(B, S, V, dtype=torch.bool)],
    "clamp": lambda z: z.clamp(-1, 1),
    "matmul": lambda z: z @ torch.ones(V, 2),
    "integer": lambda z: z.to(torch.int32),
    "trained_temperature": lambda z: z / torch.ones(1, requires_grad=True),
    "numpy": lambda z: torch.as_tensor(z.detach().numpy()),
    "slices_of_probabilities": lambda z: z.softmax(-1)[..., :3],
}


@pytest.mark.parametrize("name", MATERIALISED)
def test_the_rest_materialises_and_says_so(name):
    fn = MATERIALISED[name]
    lazy, eager, tensors = make(bias=True)
    with pytest.warns(UserWarning, match="materialises"):
        found = fn(lazy)
    expected = fn(eager)
    torch.testing.assert_close(found, expected)
    if expected.requires_grad:
        ours, theirs = (torch.autograd.grad(t.sum(), tensors["weight"]) for t in (found, expected))
        torch.testing.assert_close(ours, theirs)
    with settings.strict(), pytest.raises(RuntimeError, match="materialises"):
        fn(lazy)


@pytest.mark.parametrize("log_target", [False, True])
def test_kl_div_of_a_teacher_whose_vocabulary_stands_where_tokens_do(log_target):
    results = []
    for kind in (LinearLogits, linear_logits):
        x, y = (kind(*arguments(leaves(seed=seed))[0]).flatten(0, 1)[:7, :7] for seed in (0, 1))
        q = y.T.log_softmax(0) if log_target else y.T.softmax(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append(F.kl_div(x.log_softmax(-1), q, reduction="sum", log_target=log_target))
    torch.testing.assert_close(*results)


def test_a_warning_names_operation_bytes_and_line_once_per_call_site():
    lazy, *_ = make()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            lazy.std()
        lazy.std()
    assert len(caught) == 2
    assert "std materialises LinearLogits (2, 5, 11): 440 bytes" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert caught[0].lineno + 1 == caught[1].lineno


def test_comparison_is_never_identity():
    lazy, *_ = make()
    with pytest.warns(UserWarning, match="materialises"):
        assert (lazy == lazy.clone()).shape == (B, S, V)
    assert (lazy == lazy).shape == (B, S, V)
    assert (lazy == None) is False  # noqa: E711
    assert lazy != "logits"
    assert len({lazy, lazy}) == 1


def test_properties_are_those_of_the_logits():
    lazy, eager, _ = make(bias=True)
    names = "shape ndim dtype device is_cuda is_cpu is_meta requires_grad is_leaf grad nbytes itemsize layout"
    for name in [*names.split(), "is_sparse", "is_nested", "is_quantized"]:
        for ours, theirs in ((lazy, eager), (lazy.softmax(-1), eager.softmax(-1))):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # grad of what is no leaf
                assert getattr(ours, name) == getattr(theirs, name), name
    assert not lazy.data.requires_grad
    assert lazy.size() == eager.size()
    assert lazy.size(-1) == V
    assert (lazy.dim(), lazy.numel(), lazy.nelement(), len(lazy)) == (3, B * S * V, B * S * V, B)
    assert (lazy.element_size(), lazy.is_contiguous(), lazy.is_floating_point()) == (4, True, True)
    assert torch.is_floating_point(lazy)
    assert not lazy.transpose(1, 2).is_contiguous()
    with settings.strict():
        for ours in (lazy, lazy.transpose(1, 2), lazy.softmax(-1)):
            assert ours.stride() == (0, 0, 0)
            assert (ours.stride(0), ours.stride(-1), ours.stride(dim=1)) == (0, 0, 0)
            with pytest.raises(IndexError, match="out of range"):
                ours.stride(3)
    assert lazy.get_device() == eager.get_device()
    assert lazy.grad_fn is not None
    assert lazy.detach().grad_fn is None
    assert not lazy.detach().requires_grad
    assert not lazy.detach().logsumexp(-1).requires_grad
    assert lazy.contiguous() is lazy
    assert "LinearLogits((2, 5, 11), torch.float32" in repr(lazy)
    assert "440 bytes not held" in repr(lazy)
    with pytest.raises(AttributeError, match="materialize"):
        lazy.data_ptr  # noqa: B018
    assert not hasattr(lazy, "keys")


NEW = {
    "new_zeros": lambda z: z.new_zeros(2, 3),
    "new_ones": lambda z: z.new_ones((2, 3), dtype=torch.int64),
    "new_full": lambda z: z.new_full((2,), 0.5),
    "new_full_size": lambda z: z.new_full(size=(2,), fill_value=0.5),
    "new_tensor": lambda z: z.new_tensor([1, 2], requires_grad=True),
    "new_empty": lambda z: z.new_empty(2, 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NEW)
def test_new_tensors_are_like_the_logits(name, dtype):
    tensors = leaves(dtype)
    with settings.strict():
        lazy = LinearLogits(tensors["hidden"], tensors["weight"])
        for z in (lazy, lazy.softmax(-1)):
            found, expected = NEW[name](z), NEW[name](F.linear(tensors["hidden"], tensors["weight"]))
            assert found.requires_grad == expected.requires_grad
            torch.testing.assert_close(found, expected)
            assert (z.is_signed(), torch.is_conj(z)) == (True, False)


def test_a_label_changes_what_functions_return_and_not_the_numbers():
    tensors = leaves(torch.bfloat16)
    logits = LinearLogits(tensors["hidden"], tensors["weight"])
    assert logits.dtype == torch.bfloat16
    exact = linear_logits(tensors["hidden"].double(), tensors["weight"].double()).logsumexp(-1)
    assert logits.logsumexp(-1).dtype == torch.bfloat16
    for labelled in (logits.float(), logits.to(torch.float32), logits.to(torch.empty(1)), logits.double().float()):
        assert labelled.logsumexp(-1).dtype == torch.float32
        torch.testing.assert_close(labelled.logsumexp(-1).double(), exact, rtol=1e-6, atol=1e-6)
        assert labelled.materialize().dtype == torch.float32
    assert logits.half().log_softmax(-1).gather(-1, FEW).dtype == torch.float16
    assert F.log_softmax(logits, -1, dtype=torch.float32).gather(-1, FEW).dtype == torch.float32
    assert logits.float().hidden is logits.hidden


ARITHMETIC = {
    "times": lambda z, t: z * t,
    "times_left": lambda z, t: t * z,
    "divided": lambda z, t: z / t,
    "plus": lambda z, t: z + t,
    "minus": lambda z, t: z - t,
    "from": lambda z, t: t - z,
    "rsub": lambda z, t: torch.rsub(z, t),
    "log_probs_times": lambda z, t: z.log_softmax(-1) * t,
    "log_probs_divided": lambda z, t: z.log_softmax(-1) / t,
    "log_probs_times_twice": lambda z, t: -z.log_softmax(-1) / 3 * t,
    "log_probs_minus": lambda z, t: (z.log_softmax(-1) - t) / 3,
}
OPERANDS = {
    "per_token": (TEMPERATURE + 0.1)[..., None],
    "one": torch.tensor([1.7], dtype=torch.float64),
    "scalar": torch.tensor(1.7, dtype=torch.float64),
    "vector": torch.linspace(-1, 1, V, dtype=torch.float64),
}


@pytest.mark.parametrize("other", [torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_between_dtypes(name, operand, dtype, other):
    """The result has PyTorch's dtype, and the operand keeps its digits on the way there."""
    if operand == "vector" and (name not in ("plus", "minus", "from", "rsub") or not other.is_floating_point):
        return
    t = (OPERANDS[operand] * 3).to(other)
    tensors = leaves(dtype)
    ours = ARITHMETIC[name](LinearLogits(tensors["hidden"], tensors["weight"]), t)
    assert ours.dtype == ARITHMETIC[name](F.linear(tensors["hidden"], tensors["weight"]), t).dtype
    found = ours.gather(-1, FEW)
    assert found.dtype == ours.dtype
    h, w = (tensors[k].detach().double().requires_grad_() for k in ("hidden", "weight"))
    exact = ARITHMETIC[name](linear_logits(h, w), t.double()).gather(-1, FEW)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)
    for result in (found, exact):
        result.double().sum().backward()
    for leaf, true in ((tensors["hidden"], h), (tensors["weight"], w)):
        torch.testing.assert_close(leaf.grad.double(), true.grad, rtol=tolerance, atol=4 * tolerance)


BIASES = {
    "plus": lambda z, b: z + b,
    "halved": lambda z, b: z / 2 + b,
    "scaled": lambda z, b: z / 3 + b,
    "sharpened": lambda z, b: z * 4 - b,
    "tripled": lambda z, b: z * 3 + b,
    "label": lambda z, b: z.float() + b,
    "from_label": lambda z, b: b - z.float(),
    "scaled_label": lambda z, b: (z / 3).float() + b,
    "twice": lambda z, b: z + b + b.flip(0),
    "twice_label": lambda z, b: (z + b).float() - b.flip(0),
}
LAZY_BIASES = {
    torch.bfloat16: ["plus", "halved", "sharpened", "label", "from_label", "twice"],
    torch.float16: ["plus", "sharpened", "label", "from_label", "twice"],
}


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("other", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BIASES)
def test_a_bias_keeps_its_digits(name, dtype, other, mask):
    """A trainer's bias in the model's dtype stays lazy; one with more digits or more range than that is added to logits."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(64, 32, generator=g).to(dtype), torch.randn(100, 32, generator=g).to(dtype)
    bias = torch.randn(100, generator=g) * 5
    bias = bias.masked_fill(torch.arange(100) % 4 < 2, -3e4).to(other) if mask else bias.to(other)

    def loss(z):
        z = z if z.dtype == torch.float64 else z.float()
        return F.cross_entropy(z, torch.arange(64), label_smoothing=0.1, reduction="none")

    with settings.strict(other == dtype and name in LAZY_BIASES[dtype]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = BIASES[name](LinearLogits(hidden, weight), bias)
    assert isinstance(ours, LinearLogits) == (other == dtype and name in LAZY_BIASES[dtype])
    eager = BIASES[name](F.linear(hidden, weight), bias)
    true = BIASES[name](linear_logits(hidden.double(), weight.double()), bias.double())
    assert ours.dtype == eager.dtype
    assert_accurate(loss(ours), loss(eager), loss(true), name)


def test_arithmetic_in_place_keeps_the_dtype():
    tensors = leaves(torch.bfloat16)
    lazy = LinearLogits(tensors["hidden"], tensors["weight"]).div_(TEMPERATURE[..., None])
    assert lazy.dtype == torch.bfloat16
    expected = F.linear(tensors["hidden"], tensors["weight"]).div_(TEMPERATURE[..., None])
    torch.testing.assert_close(lazy.materialize(), expected)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["cross_entropy", "kl_div"])
@pytest.mark.parametrize("other", [torch.bfloat16, torch.float32])
def test_losses_between_dtypes(name, other, autocast):
    results = []
    for kind in (LinearLogits, F.linear):
        tensors = leaves(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            z = kind(tensors["hidden"], tensors["weight"]).flatten(0, 1)
            p = PROBS.flatten(0, 1).to(other)
            if name == "cross_entropy":
                loss = F.cross_entropy(z, p)
            else:
                loss = F.kl_div(z.log_softmax(-1), p, reduction="batchmean")
        results.append((loss.double(), torch.autograd.grad(loss, tensors["weight"])[0].double()))
        assert loss.dtype == (torch.float32 if autocast else other)
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


def test_class_weights_of_another_dtype():
    tensors = leaves(torch.bfloat16)
    weight = torch.linspace(0.5, 2, V)
    for kind in (LinearLogits, F.linear):
        z = kind(tensors["hidden"], tensors["weight"]).flatten(0, 1)
        for loss in (
            lambda z: F.cross_entropy(z, IDS.flatten(), weight),
            lambda z: F.nll_loss(z.log_softmax(-1), IDS.flatten(), weight),
        ):
            with pytest.raises(RuntimeError, match=r"expected scalar type|cast one"):
                loss(z)
            with torch.autocast("cpu", torch.bfloat16):
                assert loss(z).dtype == torch.float32
        assert F.cross_entropy(z, PROBS.flatten(0, 1).float(), weight).dtype == torch.float32


def test_a_cast_of_outputs_reaches_the_label_only():
    """As FSDP2 casts them, and as DDP replaces them."""
    from torch.distributed.utils import _apply_to_tensors

    head = LinearHead(H, V, dtype=torch.bfloat16)
    logits = head(torch.randn(B, S, H, dtype=torch.bfloat16, requires_grad=True))
    cast = _apply_to_tensors(lambda t: t.float(), logits)
    assert isinstance(cast, LinearLogits)
    assert cast.dtype == torch.float32
    assert cast.weight is head.weight
    assert torch.equal(cast.materialize(), logits.float().materialize())
    tensors = [getattr(cast, f.name) for f in dataclasses.fields(cast)]
    assert [t is cast.hidden for t in tensors if isinstance(t, torch.Tensor)] == [True]
    parts, spec = torch.utils._pytree.tree_flatten(logits)
    assert [part is logits.hidden for part in parts] == [True]
    assert torch.equal(torch.utils._pytree.tree_unflatten(parts, spec).materialize(), logits.materialize())
    for x in (logits, logits.log_softmax(-1)):  # as PyTorch 2.11's checkpoint maps what it gets
        assert torch.utils._pytree.tree_map(lambda leaf: None, x) is None


WRITTEN = {
    "setitem": lambda z: z.__setitem__((..., 0), -1e4),
    "add": lambda z: z.add_(FEW[..., :1]),
    "sub": lambda z: z.sub_(z.detach().logsumexp(-1, keepdim=True)),
    "clamp": lambda z: z.clamp_(max=0.1),
    "masked_fill": lambda z: z.masked_fill_(torch.arange(V) > 3, -torch.inf),
    "mul": lambda z: z.mul_(torch.linspace(1, 2, V)),
    "scatter": lambda z: z.scatter_(-1, IDS[..., None], 0.0),
    "leaky_relu": F.leaky_relu_,
    "selu": torch.selu_,
}


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize(
    "of", [lambda z: z, lambda z: z.clone(), lambda z: z / 2, lambda z: z[:, 1:], lambda z: z.detach()]
)
def test_other_changes_in_place_make_the_elements(name, of):
    outcomes = []
    write = WRITTEN[name] if of(torch.ones(2, 3, 1)).shape[1] == 3 else WRITTEN["setitem"]
    for which in (0, 1):
        *logits, tensors = make()
        z = of(logits[which] if which == 0 else logits[which].clone())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            write(z)
            values = z.log_softmax(-1)[..., 1:3].sum(-1).float()
        weight = tensors["weight"]
        outcomes.append((values, torch.autograd.grad(values.sum(), weight) if values.requires_grad else None))
    torch.testing.assert_close(*outcomes, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*materialises")
def test_rows_written_one_by_one():
    """Each from views of what the write before has changed."""
    lazy, eager, tensors = make()
    gradients = []
    for z in (lazy, eager.clone()):
        for row in range(B):
            z[row] = torch.cat([z[row][1:], z[row][:1]])
        loss = (z.log_softmax(-1) * torch.linspace(0, 1, V)).sum()
        gradients.append(torch.autograd.grad(loss, (tensors["hidden"], tensors["weight"])))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*materialises")
@pytest.mark.parametrize(
    "keep", [np.linspace(0, 1, V), np.linspace(0, 1, B * S).reshape(B, S, 1)], ids=["entry", "token"]
)
def test_arrays_of_numpy(keep):
    found = []
    for logits in make()[:2]:
        z = logits.detach().double()
        other = z * keep + keep
        z += keep
        kl = F.kl_div(z.log_softmax(-1), (2 * z).softmax(-1), reduction="none")
        kl *= keep
        found.append((other.logsumexp(-1), z.logsumexp(-1), kl.sum(-1), (z == np.zeros(V)).sum()))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("other", [None, [1.0], "1"])
def test_in_place_with_what_is_no_number(other):
    with pytest.raises(TypeError, match="unsupported operand"):
        operator.itruediv(make()[0], other)


def test_changes_in_place_that_raise():
    lazy, *_ = make()
    with settings.strict(), pytest.raises(RuntimeError, match="clamp_ materialises LinearLogits"):
        lazy.clamp_(max=1)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"clamp_ would change .* would lose its gradient"):
        lazy.clamp_(max=1)
    product = lazy.softmax(-1) * lazy.log_softmax(-1)
    for change in (lambda x: x.unsqueeze_(0), lambda x: x.transpose_(0, 1)):
        with (
            pytest.warns(UserWarning, match="materialises"),
            pytest.raises(RuntimeError, match="in place, which has no"),
        ):
            change(product)
    view = lazy[:, 1:]
    with pytest.warns(UserWarning, match="clamp_ materialises"):
        lazy.clamp_(max=1)
    with pytest.raises(RuntimeError, match="another view"):
        view.logsumexp(-1)


@pytest.mark.filterwarnings("ignore:.*materialises")
@pytest.mark.parametrize(
    "count",
    [
        lambda z, ids: (z > z.gather(-1, ids)).sum(-1),
        lambda z, ids: torch.lt(z.gather(-1, ids), z).sum(-1),
        lambda z, ids: (z.log_softmax(-1) > z.log_softmax(-1).gather(-1, ids)).sum(-1),
        lambda z, ids: (z >= z.amax(-1, keepdim=True)).sum(-1),
        lambda z, ids: (z < z.topk(5).values[..., -1:]).sum(-1),
        lambda z, ids: (z.view(8, 8, -1) >= z.view(8, 8, -1).topk(5).values[..., -1:]).sum(-1),
        lambda z, ids: (z == z.max()).sum(),
        lambda z, ids: (z.softmax(-1) > z.softmax(-1).amax(-1, keepdim=True)).sum(-1),
    ],
)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_ranks_count_no_entry_above_itself(count, mode):
    """What was gathered and what is compared come from other products, which round otherwise."""
    hidden, weight, bias = torch.randn(64, 96, requires_grad=True), torch.randn(4000, 96) / 10, torch.randn(4000)
    with mode():
        eager = F.linear(hidden, weight, bias)
        ids = torch.where(torch.rand(64) < 0.5, eager.argmax(-1), torch.randint(9, 4000, (64,)))[:, None]
        assert torch.equal(count(LinearLogits(hidden, weight, bias), ids), count(eager, ids))


@pytest.mark.filterwarnings("ignore:.*materialises")
@torch.inference_mode()
def test_what_was_read_and_changed_under_inference_mode_is_compared_as_it_is():
    lazy, eager, _ = make()
    counts = []
    for z in (lazy, eager):
        at = z.gather(-1, IDS[..., None])
        at[0] -= 0.5
        counts.append((z > at).sum(-1))
    assert torch.equal(*counts)


@pytest.mark.filterwarnings("ignore:.*materialises")
def test_other_numbers_are_compared_as_they_are():
    """Which 16 bits and a large entry would not tell from an entry."""
    weight = torch.tensor([[20.0], [19.5], [18.0], [1.0], [0.25], [-1e4], [-20.0]]).bfloat16()
    z = LinearLogits(torch.ones(1, 1).bfloat16(), weight)
    assert (z > torch.tensor([[0.0]]).bfloat16()).sum() == 5
    assert not (z == torch.tensor([[19.0]]).bfloat16()).any()
    assert (z > z.amax(-1, keepdim=True) - 0.75).sum() == 2
    read = z.amax(-1, keepdim=True)
    read -= 1
    assert (z > read).sum() == 2
    found = torch.zeros(1, 7, dtype=torch.bool)
    torch.gt(z, 0.0, out=found)
    assert found.sum() == 5
    assert (z.isnan() == torch.zeros(1, 1)).all()


def test_a_number_that_is_no_entry_is_compared_as_it_is():
    lazy, eager, _ = make()
    between = eager.detach().sort(-1).values[..., 3:5].mean(-1, keepdim=True)
    with pytest.warns(UserWarning, match="materialises"):
        assert ((lazy > between).sum(-1) == V - 4).all()


class CountPasses(TorchDispatchMode):
    """How often a head was multiplied, forward and backward."""

    def __init__(self):
        super().__init__()
        self.passes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.passes[func.name()] += func.namespace == "fused_losses" and "rows" in func.name()
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    "entropy",
    [
        lambda z: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1),
        lambda z: z.logsumexp(-1) - (z.softmax(-1) * z).sum(-1),
    ],
)
def test_log_probs_and_entropy_are_one_pass(entropy):
    lazy, eager, tensors = make()
    gradients = []
    for z in (lazy, eager):
        with CountPasses() as counted:
            loss = z.log_softmax(-1).gather(-1, IDS[..., None]).sum() + 0.1 * entropy(z).sum()
            gradients.append(torch.autograd.grad(loss, (tensors["hidden"], tensors["weight"])))
        if z is lazy:
            assert +counted.passes == {"fused_losses::linear_rows": 1, "fused_losses::linear_rows_grad": 1}
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_an_entropy_read_inside_a_filter_is_not_that_of_outside():
    hidden, weight = torch.randn(64, 32, requires_grad=True), torch.randn(500, 32)
    z, gradients = LinearLogits(hidden, weight), []
    with settings.gradient_filter(0.05):
        z.log_softmax(-1).gather(-1, torch.zeros(64, 1, dtype=torch.long))
        gradients += torch.autograd.grad(NUMBERS["entropy"](z).sum(), hidden, retain_graph=True)
    for logits in (z, hidden @ weight.T):
        gradients += torch.autograd.grad(NUMBERS["entropy"](logits).sum(), hidden)
    torch.testing.assert_close(*gradients[1:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(*gradients[:2], rtol=1e-2)


def under_no_grad(fn):
    return torch.no_grad()(fn)


@pytest.mark.parametrize(
    "monitor",
    [
        under_no_grad(NUMBERS["entropy"]),
        under_no_grad(NUMBERS["entropy_by_difference"]),
        under_no_grad(lambda z: NUMBERS["entropy"](z.view(-1, V))),
        lambda z: NUMBERS["entropy"](z.detach()),
        under_no_grad(lambda z: z[:, 1:].logsumexp(-1)),
    ],
    ids=["entropy", "entropy_by_difference", "view", "detached", "slice"],
)
@pytest.mark.parametrize("trained", [True, False])
def test_a_monitor_beside_log_probs_costs_no_pass(monitor, trained):
    lazy, eager, tensors = make()
    with torch.set_grad_enabled(trained), CountPasses() as counted:
        log_probs = NUMBERS["log_prob"](lazy)
        watched = monitor(lazy)
    assert +counted.passes == {"fused_losses::linear_rows": 1}
    assert not watched.requires_grad
    torch.testing.assert_close(watched, monitor(eager), rtol=1e-4, atol=1e-5)
    watched.zero_()  # which what is known must not notice
    torch.testing.assert_close(monitor(lazy), monitor(eager), rtol=1e-4, atol=1e-5)
    if trained:
        found, expected = (
            torch.autograd.grad(t.sum(), tensors["hidden"]) for t in (log_probs, NUMBERS["log_prob"](eager))
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("first", "second", "passes"),
    [
        (lambda z: z.view(-1, V), lambda z: z, 1),
        (lambda z: z, lambda z: z.view(-1, V).float(), 1),
        (lambda z: z[:, :-1], lambda z: z[:, :-1], 1),
        (lambda z: z[:, 1:].transpose(1, 2), lambda z: z.transpose(1, 2)[..., 1:], 1),
        (lambda z: z[None].squeeze(0)[1], lambda z: z.flatten(0, 1)[S:], 1),
        (lambda z: z[:, :-1], lambda z: z[:, 1:], 2),
        (lambda z: z.transpose(0, 1), lambda z: z, 2),
        (lambda z: z[:1].expand(B, S, V), lambda z: z, 2),
        (lambda z: z[[0, 1]], lambda z: z, 2),
    ],
)
def test_views_of_the_same_tokens_are_measured_once(first, second, passes, grad):
    """A sum of log-probabilities of one view, the squared logsumexp of another."""
    lazy, eager, tensors = make()
    found = []
    for z in (lazy, eager):
        with torch.set_grad_enabled(grad), CountPasses() as counted:
            x = first(z)
            dim = x.shape.index(V)
            ids = torch.full([1 if n == V else n for n in x.shape], 3)
            log_probs = x.log_softmax(dim).gather(dim, ids).squeeze(dim)
            y = second(z)
            lse = y.logsumexp(y.shape.index(V))
        if z is lazy:
            assert +counted.passes == {"fused_losses::linear_rows": passes}
        found.append([log_probs, lse])
        if grad:
            loss = (
                log_probs * torch.linspace(0, 1, log_probs[0].numel()).view_as(log_probs[0])
            ).sum() + lse.square().sum()
            found[-1] += torch.autograd.grad(loss, (tensors["hidden"], tensors["weight"]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_tokens_that_share_memory_and_not_a_temperature_are_measured_apart():
    hidden, weight = torch.randn(1, H).expand(2, H), torch.randn(V, H)
    z = LinearLogits(hidden, weight, temperature=torch.tensor([1.0, 2.0]))
    expected = torch.logsumexp(hidden @ weight.T / torch.tensor([[1.0], [2.0]]), -1)
    for at in (0, 1):
        torch.testing.assert_close(z[at].logsumexp(-1), expected[at])


@pytest.mark.parametrize(("target", "passes"), [(IDS, 1), (IGNORED, 2)], ids=["all", "ignored"])
def test_the_loss_of_each_token_and_the_entropy_are_one_pass_where_no_token_is_ignored(target, passes):
    lazy, eager, tensors = make()
    found = []
    for z in (lazy, eager):
        with CountPasses() as counted:
            loss = F.cross_entropy(z.view(-1, V), target.view(-1), reduction="none")
            entropy = NUMBERS["entropy"](z)
            weights = torch.linspace(0, 1, B * S)
            gradients = torch.autograd.grad(
                (weights * loss).sum() + 0.1 * (weights * entropy.view(-1).square()).sum(),
                (tensors["hidden"], tensors["weight"]),
            )
        found.append((loss, entropy, *gradients))
        if z is lazy:
            assert +counted.passes == {"fused_losses::linear_rows": passes, "fused_losses::linear_rows_grad": passes}
    assert not torch.signbit(found[0][0]).any()
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_elements_of_one_view_serve_another():
    lazy, eager, tensors = make()
    gradients = []
    for z in (lazy, eager):
        a, b = z.view(-1, V).softmax(-1), z.transpose(1, 2).log_softmax(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = a.std() + b[:, ::2].square().std()
        gradients.append(torch.autograd.grad(loss, (tensors["hidden"], tensors["weight"])))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def categorical(z, validate_args):
    policy = torch.distributions.Categorical(logits=z, validate_args=validate_args)
    return policy.log_prob(IDS).sum() + 0.3 * policy.entropy().sum()


def normalised(z):
    logp = z - z.logsumexp(-1, keepdim=True)
    return logp.gather(-1, IDS[..., None]).sum() - (logp.exp() * logp).sum()


def normalised_later(z):
    total = z.logsumexp(-1)
    logp = torch.sub(z, total[..., None])
    return logp[..., 3].sum() - (logp.exp() * logp).sum()


def by_a_constant(z):
    return (z - z.logsumexp(-1, keepdim=True).detach()).gather(-1, IDS[..., None]).sum()


def by_a_view_that_is_constant(z):
    total = z.logsumexp(-1)
    with torch.no_grad():
        constant = total[..., None]
    return (z - constant).gather(-1, IDS[..., None]).sum()


def by_a_normalizer_without_gradient(z):
    with torch.no_grad():
        total = z.logsumexp(-1, keepdim=True)
    return (z - total).gather(-1, IDS[..., None]).sum()


def by_a_normalizer_detached_in_place(z):
    total = z.logsumexp(-1)
    return (z - total.detach_()[..., None]).gather(-1, IDS[..., None]).sum()


def by_a_normalizer_with_a_hook(z):
    total = z.logsumexp(-1, keepdim=True)
    total.register_hook(lambda grad: 3 * grad)
    return (z - total).gather(-1, IDS[..., None]).sum()


def by_a_transposed_normalizer(z):
    square = z[:, :2]
    logp = (square - square.logsumexp(-1, keepdim=True).transpose(0, 1)).gather(-1, IDS[:, :2, None])
    return (logp.flatten() * torch.arange(4)).sum()


def by_the_normalizer_of_others(z):
    return (z - z.flip(1).logsumexp(-1, keepdim=True)).gather(-1, IDS[..., None]).sum()


def stabilised_in_place(z):
    z = z.clone()
    z -= z.detach().amax(-1, keepdim=True)
    return z.exp().sum(-1).log().sum()


def repeated(z):
    return (z[None].expand(3, -1, -1, -1) * torch.arange(1.0, 4)[:, None, None, None]).logsumexp(-1).sum()


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: categorical(z, True),
        lambda z: categorical(z, False),
        normalised,
        normalised_later,
        by_a_constant,
        by_a_view_that_is_constant,
        by_a_normalizer_without_gradient,
        by_a_normalizer_detached_in_place,
        by_a_normalizer_with_a_hook,
        by_a_transposed_normalizer,
        by_the_normalizer_of_others,
        stabilised_in_place,
        repeated,
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_normalised_by_hand(loss, bias):
    lazy, eager, tensors = make(bias=bias)
    wanted = [tensors[name] for name in ("hidden", "weight", *["bias"] * bias)]
    with settings.strict():
        found = loss(lazy)
    expected = loss(eager)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(x, wanted) for x in (found, expected))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_a_normalizer_that_was_written_into_is_a_number_per_token():
    lazy, eager, _ = make()
    results = []
    for z in (lazy, eager.detach()):
        total = z.logsumexp(-1, keepdim=True)
        with torch.no_grad():
            total += torch.arange(S)[:, None]
        results.append((z - total).gather(-1, IDS[..., None]).detach())
    torch.testing.assert_close(*results)


@pytest.mark.filterwarnings("ignore:.*materialises")  # for the message, which has the values
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_categorical_distribution_refuses_what_is_no_number(value):
    hidden, weight = torch.randn(3, H), torch.randn(V, H)
    hidden[1, 2] = value
    for logits in (LinearLogits(hidden, weight), hidden @ weight.T):
        with pytest.raises(ValueError, match="Expected parameter logits"):
            torch.distributions.Categorical(logits=logits, validate_args=True)


@pytest.mark.filterwarnings("ignore:logical_not materialises")
def test_where_logits_are_numbers_and_finite():
    hidden, weight = torch.randn(2, 3, H), torch.randn(V, H)
    hidden[1, 2, 0] = torch.nan
    z = LinearLogits(hidden, weight)
    eager = hidden @ weight.T
    infinite = LinearLogits(torch.cat([hidden[:, :2], -hidden[:, :1] * torch.inf], 1), weight)
    for condition, expected in (
        (z == z, ~eager.isnan()),
        ((logp := z.log_softmax(-1)) == logp, ~eager.log_softmax(-1).isnan()),
        (z.isfinite(), eager.isfinite()),
        (torch.isfinite(infinite), infinite.materialize().isfinite()),
    ):
        with settings.strict():
            assert torch.equal(condition.all(-1), expected.all(-1))
            assert torch.equal(condition.reshape(6, V)[2:].all(-1, keepdim=True), expected.view(6, V)[2:].all(-1, True))
            assert not condition.all()
        assert torch.equal(condition.materialize(), expected)
    finite = LinearLogits(hidden[:1], weight)
    assert finite.isfinite().all()
    assert (finite + torch.zeros(V).index_fill(0, torch.tensor([3]), -torch.inf)).isfinite().logical_not().any()
    assert not (finite + torch.zeros(V).index_fill(0, torch.tensor([3]), -torch.inf)).isfinite().all()


@pytest.mark.filterwarnings("ignore:.*materialises")
def test_log_probs_clamped_at_the_least_number():
    least, bias = torch.finfo(torch.float32).min, torch.zeros(V).masked_fill(torch.arange(V) > 7, -torch.inf)
    lazy, eager, _ = make()
    z, whole = lazy.detach() + bias, eager.detach() + bias
    clamped, expected = (x.log_softmax(-1).clamp(min=least) for x in (z, whole))
    with settings.strict():
        entropy = (clamped * z.softmax(-1)).sum(-1)
    torch.testing.assert_close(entropy, (expected * whole.softmax(-1)).sum(-1))
    torch.testing.assert_close(clamped.materialize(), expected)
    torch.testing.assert_close((clamped * 0.5).sum(-1), (expected * 0.5).sum(-1))
    half, eager_half = (x.bfloat16().log_softmax(-1).clamp(min=torch.finfo(torch.bfloat16).min) for x in (z, whole))
    assert torch.equal(half[..., 8:], eager_half[..., 8:])
    other = LinearLogits(torch.randn(B, S, 2), torch.randn(V, 2)).softmax(-1)
    torch.testing.assert_close((clamped * other).sum(-1), (expected * other.materialize()).sum(-1))


@pytest.mark.filterwarnings("ignore:.*materialises")
@pytest.mark.parametrize(
    ("take", "changed"),
    [
        (lambda z: z[:, :-1].contiguous(), lambda z, c: z),
        (lambda z: z.transpose(1, 2).contiguous(), lambda z, c: z),
        (copy.copy, lambda z, c: z),
        (lambda z: z[:, :2], lambda z, c: torch.utils._pytree.tree_map(lambda t: t, c)),
    ],
)
def test_what_may_share_numbers_with_what_was_changed_raises(take, changed):
    z = make()[0].detach()
    other = take(z)
    (z if take(z).shape[1] == 2 else other)[..., 0] = -1e4
    with pytest.raises(RuntimeError, match="another view"):
        changed(z, other).sum()
    part = make()[0].detach()[:, :-1]
    part.contiguous()[..., 0] = -1e4
    with pytest.raises(RuntimeError, match="another view"):
        part.sum()


@pytest.mark.filterwarnings("ignore:.*materialises")
def test_changes_in_place_by_other_names():
    lazy, eager, _ = make()
    z = lazy.clone()
    assert F.relu(z, inplace=True) is z
    torch.testing.assert_close(z.sum(-1), eager.relu().sum(-1))
    torch.testing.assert_close(torch.relu_(input=lazy.clone()).sum(-1), eager.relu().sum(-1))
    with pytest.raises(RuntimeError, match="_foreach_mul_ would change"):
        torch._foreach_mul_([lazy], 2)
    with pytest.raises(RuntimeError, match="gradient of their own"):
        lazy.detach().requires_grad_()
    mask = same = lazy.isnan()
    mask |= eager > 0
    assert same is mask
    torch.testing.assert_close(same.sum(-1), (eager > 0).sum(-1))


class Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return z.logsumexp(-1).sum()


@pytest.mark.filterwarnings("ignore:.*materialises")
def test_changed_logits_lose_no_gradient():
    lazy, *_ = make()
    lazy[..., 3] = -1e4
    with pytest.raises(RuntimeError, match=r"given to Loss.apply would get no gradient"):
        Loss.apply(lazy)
    with pytest.raises(RuntimeError, match=r"would get no gradient.*use_reentrant=False"):
        torch.utils.checkpoint.checkpoint(lambda z: z.logsumexp(-1).sum(), lazy, use_reentrant=True)
    (leaf,) = torch.utils._pytree.tree_leaves({"logits": lazy})  # which DDP looks for
    assert leaf.requires_grad
    doubled = torch.utils._pytree.tree_map(lambda t: t * 2, lazy)
    torch.testing.assert_close(doubled.sum(-1), 2 * lazy.sum(-1))
    with pytest.raises(TypeError, match=r"got a LazyProducts \(2, 5, 11\), made of one: materialize"):
        token_statistics(lazy, IDS)


def test_copies_of_the_same_dtype_are_copies():
    for copied in (lambda x: x.to(x.dtype, copy=True), lambda x: x.to(x.device, x.dtype, False, True)):
        lazy, eager, _ = make()
        copied(lazy).mul_(2)
        torch.testing.assert_close(lazy.logsumexp(-1), eager.logsumexp(-1))


def test_transforms_of_a_head():
    """Gradients per sample, as ``torch.func`` takes them of a module."""
    head, x, ids = LinearHead(H, V, bias=False), torch.randn(4, H), torch.tensor([1, 0, 4, 2])

    def loss(weight, x, y):
        logits = torch.func.functional_call(head, {"weight": weight}, (x[None],))
        return F.cross_entropy(logits, y[None])

    def eager(weight, x, y):
        return F.cross_entropy(x[None] @ weight.T, y[None])

    weight = head.weight.detach()
    of_each = (torch.vmap(torch.func.grad(fn), (None, 0, 0))(weight, x, ids) for fn in (loss, eager))
    torch.testing.assert_close(*of_each)


@pytest.mark.parametrize(
    "fn", [lambda z: z.nansum(), lambda z: z.nansum(-1), lambda z: torch.nansum(z.mT[1:], (1, 2), True)]
)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_sums_without_tokens_of_nan(fn, softcap):
    """As KTO's trainers log their logits."""
    tensors = leaves()
    with torch.no_grad():
        tensors["hidden"][0, 1, 2] = tensors["hidden"][1, 3, 0] = torch.nan
    lazy = LinearLogits(tensors["hidden"], tensors["weight"], softcap=softcap)
    with settings.strict():
        found = fn(lazy)
    expected = fn(lazy.materialize())
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected)
    assert found.requires_grad
    with torch.no_grad():
        tensors["weight"][4] = torch.nan
    assert fn(LinearLogits(tensors["hidden"], tensors["weight"], softcap=softcap)).isnan().any()


def test_out_raises():
    lazy, *_ = make()
    with pytest.raises(RuntimeError, match="cannot write"):
        torch.exp(torch.zeros(B, S, V), out=lazy)


def test_div_and_mul_in_place_change_the_object_and_not_the_tensors():
    lazy, eager, tensors = make()
    kept = tensors["hidden"].clone()
    same = lazy
    lazy /= 2.0
    lazy *= TEMPERATURE.float()[..., None]
    assert lazy is same
    lazy.div_(torch.tensor(0.5)).mul_(3)
    torch.testing.assert_close(lazy.materialize(), eager * 3 * TEMPERATURE.float()[..., None])
    assert torch.equal(tensors["hidden"], kept)
    other, eager, _ = make()
    other += torch.linspace(-1, 1, V)
    torch.testing.assert_close(other.materialize(), eager + torch.linspace(-1, 1, V))


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: z.log_softmax(-1).gather(-1, FEW).sum(),
        lambda z: F.cross_entropy(z.transpose(1, 2), IDS),
        lambda z: z.softmax(-1).pow(3).sum(),
    ],
)
def test_an_offset_of_detached_logits_gets_the_gradient_0(loss):
    lazy, eager, _ = make()
    results = []
    for z in (lazy, eager):
        offset = TEMPERATURE[..., None].float().requires_grad_()
        with torch.no_grad(), settings.strict(z is lazy):
            (z.detach() + offset).log_softmax(-1).gather(-1, FEW)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = loss(z.detach() + offset)
        found.backward()
        results.append((found, offset.grad))
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-5)


def test_views_of_logits_changed_in_place_raise():
    lazy, *_ = make()
    view, copied = lazy[:, 1:], lazy.clone()
    lazy.div_(2)
    lazy.logsumexp(-1)
    lazy[:, 1:].logsumexp(-1)
    copied.logsumexp(-1)
    with pytest.raises(RuntimeError, match="another view"):
        view.logsumexp(-1)
    other = lazy.view(-1, V)
    other.mul_(3)
    with pytest.raises(RuntimeError, match="another view"):
        lazy.logsumexp(-1)


EARLIER = {
    "log_softmax": lambda z: z.log_softmax(-1),
    "softmax": lambda z: z.softmax(-1),
    "shifted": lambda z: z + 1,
    "capped": lambda z: torch.tanh(z),
    "of_a_view": lambda z: z[:, :].log_softmax(-1),
    "view_of_it": lambda z: z.log_softmax(-1)[:, :],
    "times": lambda z: z * 2,
    "clone": lambda z: z.clone(),
    "p_log_p": lambda z: z.softmax(-1) * z.log_softmax(-1),
}


@pytest.mark.parametrize("name", EARLIER)
def test_what_was_made_before_a_change_in_place_keeps_its_value(name):
    results = []
    for kind in (LinearLogits, linear_logits):
        tensors = leaves()
        z = kind(tensors["hidden"], tensors["weight"])
        earlier = EARLIER[name](z)
        earlier, z = (earlier, z.div_(3)) if kind is LinearLogits else (earlier, z / 3)
        loss = (earlier * 1.5).sum(-1).square().sum() if name == "p_log_p" else None
        if loss is None:
            earlier = earlier * 2 if name == "capped" else earlier
            loss = earlier.gather(-1, FEW).square().sum()
        loss = loss + z.logsumexp(-1).sum()
        results.append((loss, torch.autograd.grad(loss, (tensors["hidden"], tensors["weight"]))))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["hidden", "weight", "bias", "u", "B"])
@pytest.mark.parametrize("use", ["logsumexp", "view", "scale", "materialize", "pickle", "label"])
def test_a_change_of_what_it_stands_for_raises(name, use):
    lazy, _, tensors = make(bias=True, low_rank=True)
    view = lazy[:, 1:]
    with torch.no_grad():
        tensors[name].add_(1)
    uses = {
        "logsumexp": lambda z: z.logsumexp(-1),
        "view": lambda z: z.view(-1, V),
        "scale": lambda z: z * 2,
        "materialize": lambda z: z.materialize(),
        "pickle": pickle.dumps,
        "label": lambda z: z.double(),
    }
    for z in (lazy, view):
        with pytest.raises(RuntimeError, match=rf"{name} was modified in place"):
            uses[use](z)


class WritingThroughData(torch.optim.SGD):
    """As optimizers with kernels of their own, which PyTorch does not see write."""

    def step(self):
        for p in self.param_groups[0]["params"]:
            p.data -= 0.1 * p.grad


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.AdamW,
        functools.partial(torch.optim.AdamW, fused=True),  # the default of transformers' Trainer
        functools.partial(torch.optim.SGD, foreach=True),
        WritingThroughData,
    ],
    ids=["plain", "fused", "foreach", "custom"],
)
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_logits_of_before_a_step_raise_where_it_changed_their_head(optimizer, frozen, compiled):
    head, other = LinearHead(H, V), nn.Linear(H, H)
    head.requires_grad_(not frozen)
    model = nn.Sequential(other, head)
    logits = (torch.compile(model, backend="eager") if compiled else model)(torch.randn(B, S, H))
    F.cross_entropy(logits.view(-1, V), IDS.view(-1)).backward()
    view = logits[:, 1:]
    trained = [p for m in (head, other) for p in m.parameters() if p.requires_grad]
    optimizer(trained, lr=0.1).step()
    for z in (logits, view):
        if frozen:
            assert z.argmax(-1).shape == z.shape[:-1]
        else:
            with pytest.raises(RuntimeError, match="weight was modified in place"):
                z.argmax(-1)


def test_pickle_and_deepcopy_are_detached_and_without_module():
    head = LinearHead(H, V, softcap=2.0, rank=2)
    nn.init.normal_(head.lora_B)
    logits = head(torch.randn(B, S, H), temperature=TEMPERATURE)[:, 1:].float()
    stored = io.BytesIO()
    torch.save(logits, stored)
    stored.seek(0)
    for copied in (
        pickle.loads(pickle.dumps(logits)),
        copy.deepcopy(logits),
        torch.load(stored, weights_only=False),
        copy.copy(logits),
    ):
        assert copied.module is None
        assert not copied.requires_grad
        assert torch.equal(copied.materialize(), logits.materialize())
    assert copy.deepcopy(logits).weight.data_ptr() != head.weight.data_ptr()


def test_no_grad_gives_logits_without_gradient():
    tensors = leaves(torch.float32)
    with torch.no_grad():
        logits = LinearLogits(tensors["hidden"], tensors["weight"], tensors["bias"])
    assert not logits.requires_grad
    for result in (logits.logsumexp(-1), logits.materialize(), logits[..., 2:].log_softmax(-1).gather(-1, FEW * 0)):
        assert not result.requires_grad
    with torch.inference_mode():
        logits = LinearLogits(torch.randn(B, H), tensors["weight"])
        assert logits.log_softmax(-1).gather(-1, IDS[:, :2]).shape == (B, 2)
    lazy = LinearLogits(tensors["hidden"], tensors["weight"])
    with settings.strict(), torch.inference_mode():
        assert torch.is_inference(logits)
        assert logits.log_softmax(-1).is_inference()
        assert not lazy.is_inference()
    with torch.no_grad():
        assert not lazy.logsumexp(-1).requires_grad
    assert lazy.logsumexp(-1).requires_grad


MADE_WITHOUT_GRADIENT = {
    "itself": lambda z: z[:],
    "softmax": lambda z: z.softmax(-1),
    "log_softmax": lambda z: z.log_softmax(-1),
    "slice": lambda z: z[:, :],
    "vocab_slice": lambda z: z[..., 0:],
    "transpose": lambda z: z.transpose(0, 1).transpose(0, 1),
    "clone": lambda z: z.clone(),
    "cat": lambda z: torch.cat([z[:1], z[1:]]),
    "divided": lambda z: z / 2,
    "divided_per_token": lambda z: z / TEMPERATURE[..., None],
    "shifted": lambda z: z + 1,
    "plus_bias": lambda z: z + torch.linspace(-1, 1, V, dtype=torch.float64),
    "capped": lambda z: torch.tanh(z / 2) * 2,
    "cast": lambda z: z.float().double(),
    "type": lambda z: z.type(torch.float32).type(torch.float64),
    "product": lambda z: z.softmax(-1) * z.log_softmax(-1),
    "trained_offset": lambda z: z - z.logsumexp(-1, keepdim=True),
    "of_log_probs": lambda z, logp: logp * 0.5,
    "cast_of_scaled_log_probs": lambda z, logp: (logp * z.logsumexp(-1, keepdim=True)).float().double(),
}


@pytest.mark.parametrize("options", ["bias", "low_rank"])
@pytest.mark.parametrize("name", MADE_WITHOUT_GRADIENT)
def test_what_is_made_without_gradient_has_none_when_read_later(name, options):
    results = []
    for kind in (LinearLogits, linear_logits):
        tensors = leaves()
        args, kwargs = arguments(tensors, **OPTIONS[options])
        z = kind(*args, **kwargs)
        logp = z.log_softmax(-1)
        with torch.no_grad(), settings.strict():
            make = MADE_WITHOUT_GRADIENT[name]
            made = make(z, logp) if make.__code__.co_argcount == 2 else make(z)
        assert not made.requires_grad or kind is linear_logits  # where a view says that it does
        total = made.sum(-1) if name == "product" else made.gather(-1, FEW).sum(-1)
        loss = (total * logp.gather(-1, IDS[..., None]).squeeze(-1)).sum()
        results.append((loss, torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)))
    assert z.requires_grad
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert results[0][1][0].abs().max() > 0


def test_what_is_made_without_gradient_inside_a_transform_has_none():
    tensors = leaves()

    def loss(kind, h):
        z = kind(h, tensors["weight"].detach())
        with torch.no_grad():
            p = z.softmax(-1)
            total = z.logsumexp(-1)
        return (p.gather(-1, FEW) * z.log_softmax(-1).gather(-1, FEW)).sum() + total.sum()

    h = tensors["hidden"].detach()
    found, expected = (torch.func.grad(lambda h, k=kind: loss(k, h))(h) for kind in (LinearLogits, linear_logits))
    torch.testing.assert_close(found, expected)
    assert expected.abs().max() > 0
    with torch.no_grad():
        found, expected = (
            torch.func.jvp(lambda h, k=kind: loss(k, h), (h,), (h + 1,)) for kind in (LinearLogits, linear_logits)
        )
    torch.testing.assert_close(found, expected)


def test_a_statistic_read_without_gradient_gets_one_later():
    tensors = leaves()
    lazy = LinearLogits(tensors["hidden"], tensors["weight"])
    with torch.no_grad():
        detached = lazy.double()
        lazy.logsumexp(-1)
        view = lazy[:, 1:]
        assert not lazy[..., []].requires_grad
        assert lazy.flatten(1, 1) is lazy
    assert lazy.logsumexp(-1).requires_grad
    assert not lazy.detach().logsumexp(-1).requires_grad
    assert not view.logsumexp(-1).requires_grad
    assert detached is lazy


def test_in_place_without_gradient_raises_where_there_is_one():
    lazy, *_ = make()
    with torch.no_grad(), pytest.raises(RuntimeError, match="out-of-place"):
        lazy.div_(2)
    with torch.no_grad():
        lazy.detach().div_(2)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_inputs_get_no_gradient(frozen):
    tensors = leaves()
    tensors[frozen].requires_grad_(False)
    logits = LinearLogits(tensors["hidden"], tensors["weight"])
    assert logits.requires_grad
    assert logits.rows().hidden.requires_grad == (frozen != "hidden")
    loss = F.cross_entropy(logits[:, 1:].reshape(-1, V), IDS[:, 1:].reshape(-1))
    loss.backward()
    other = {"hidden": "weight", "weight": "hidden"}[frozen]
    expected = F.cross_entropy(
        linear_logits(tensors["hidden"], tensors["weight"])[:, 1:].reshape(-1, V), IDS[:, 1:].flatten()
    )
    torch.testing.assert_close(tensors[other].grad, torch.autograd.grad(expected, tensors[other])[0])
    assert tensors[frozen].grad is None


def test_autocast_casts_at_construction():
    tensors = leaves(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        lazy = LinearLogits(tensors["hidden"], tensors["weight"], tensors["bias"])
        eager = F.linear(tensors["hidden"], tensors["weight"], tensors["bias"])
        assert lazy.dtype == eager.dtype == torch.bfloat16
        assert lazy.weight.dtype == torch.bfloat16
        ours = F.cross_entropy(lazy.view(-1, V), IDS.view(-1))
        theirs = F.cross_entropy(eager.view(-1, V), IDS.view(-1))
        assert ours.dtype == theirs.dtype == torch.float32
        for fn in (torch.softmax, torch.log_softmax):
            assert fn(lazy, -1).dtype == fn(eager, -1).dtype
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    ours.backward()
    assert tensors["weight"].grad.dtype == tensors["hidden"].grad.dtype == torch.float32
    outside = LinearLogits(tensors["hidden"], tensors["weight"])
    with torch.autocast("cpu", torch.bfloat16):
        assert outside.logsumexp(-1).dtype == torch.float32
        assert outside.materialize().dtype == torch.float32


def shifted_loss(h, w, b):
    return nn.functional.cross_entropy(LinearLogits(h, w, b)[:, :-1].reshape(-1, V).float(), IDS[:, 1:].reshape(-1))


def smoothed_loss(h, w, b):
    return smoothed(LinearLogits(h, w, b, softcap=2.0) / 0.7)


def entropy_loss(h, w, b):
    logits = LinearLogits(h, w, b)
    logits = torch.tanh(logits / 3.0) * 3.0
    logp = F.log_softmax(logits, -1)
    correct = (logits.argmax(-1) == IDS).float()
    return -(logp.exp() * logp).sum(-1).mean() + (correct * logp.gather(-1, IDS.unsqueeze(-1)).squeeze(-1)).sum()


def indexed_loss(h, w, b):
    logits = LinearLogits(h, w, b).transpose(0, 1)[1:, :, PICK]
    return torch.cat([logits, logits[:1]]).logsumexp(-1).mean() + torch.stack([row.mean() for row in logits]).sum()


def target_loss(h, w, b):
    logits = LinearLogits(h, w, b)
    with torch.no_grad():
        entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(dim=-1)
        target = logits[..., PICK].softmax(-1)
    logp = logits.log_softmax(axis=-1)
    return (target.gather(-1, FEW[..., :1] % 2) * logp.gather(-1, FEW[..., :1])).sum() + (entropy * logp[..., 3]).sum()


@pytest.mark.parametrize("fn", [shifted_loss, smoothed_loss, entropy_loss, indexed_loss, target_loss])
def test_compiles_without_a_break(fn):
    tensors, same = leaves(torch.float32), leaves(torch.float32)
    expected = fn(*list(tensors.values())[:3])
    expected.backward()
    torch._dynamo.reset()
    with settings.strict():
        found = torch.compile(fn, fullgraph=True, backend="aot_eager")(*list(same.values())[:3])
    found.backward()
    torch.testing.assert_close(found, expected)
    for name in ("hidden", "weight", "bias"):
        torch.testing.assert_close(same[name].grad, tensors[name].grad)


def test_compiled_model_returns_it_and_compiled_loss_takes_it():
    torch._dynamo.reset()
    head = LinearHead(H, V)
    hidden = torch.randn(B, S, H, requires_grad=True)
    logits = torch.compile(lambda h: head(h)[:, 1:], fullgraph=True, backend="aot_eager")(hidden)
    assert isinstance(logits, LinearLogits)
    loss = torch.compile(lambda z: F.cross_entropy(z.transpose(1, 2), IDS[:, 1:]), fullgraph=True, backend="aot_eager")
    loss(logits).backward()
    found = head.weight.grad.clone(), hidden.grad.clone()
    head.weight.grad = hidden.grad = None
    F.cross_entropy(F.linear(hidden, head.weight, head.bias)[:, 1:].transpose(1, 2), IDS[:, 1:]).backward()
    torch.testing.assert_close(found, (head.weight.grad, hidden.grad))


def test_compiled_code_that_materialises_is_right():
    torch._dynamo.reset()
    _, eager, tensors = make()

    def fn(h, w):
        logits = LinearLogits(h, w)
        return (logits**2).sum() + torch.cat([logits, logits], -1).mean() + torch.std(logits)

    with pytest.warns(UserWarning, match="materialises") as caught:
        found = torch.compile(fn, fullgraph=True, backend="aot_eager")(tensors["hidden"], tensors["weight"])
    torch.testing.assert_close(found, (eager**2).sum() + eager.mean() + eager.std())
    messages = [str(w.message) for w in caught if "materialises" in str(w.message)]
    assert [m.split()[0] for m in messages] == ["__pow__", "cat", "std"]


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    ("fn", "first_given"),
    [
        (lambda z: z.std(), False),
        (lambda z: z.softmax(-1).pow(3).sum(), True),
        (lambda z: z[:, :, 2].sum(), False),
        (lambda z: F.cross_entropy(z.transpose(1, 2), torch.zeros(z.shape[:2], dtype=torch.long)), True),
    ],
    ids=["std", "square", "one_entry", "cross_entropy"],
)
def test_compiled_for_any_length(fn, dynamic, first_given):
    torch._dynamo.reset()
    given = first_given != bool(dynamic)  # every pair of function, dynamic and given occurs
    weight = torch.randn(V, H)
    compiled = torch.compile(
        fn if given else lambda h: fn(LinearLogits(h, weight)), fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for length in (4, 6, 9):
            h = torch.randn(B, length, H)
            torch.testing.assert_close(compiled(LinearLogits(h, weight) if given else h), fn(h @ weight.T))


def test_checkpointing_without_reentry_works_and_with_it_raises():
    from torch.utils.checkpoint import checkpoint

    tensors = leaves()
    head = LinearHead(H, V, dtype=torch.float64)
    hidden = tensors["hidden"]

    def block(h):
        return head(torch.tanh(h))

    loss = F.cross_entropy(checkpoint(block, hidden, use_reentrant=False).view(-1, V), IDS.view(-1))
    loss.backward()
    found = hidden.grad.clone(), head.weight.grad.clone(), head.bias.grad.clone()
    hidden.grad = head.weight.grad = head.bias.grad = None
    F.cross_entropy(nn.Linear.forward(head, torch.tanh(hidden)).view(-1, V), IDS.view(-1)).backward()
    torch.testing.assert_close(found, (hidden.grad, head.weight.grad, head.bias.grad))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        checkpoint(block, hidden, use_reentrant=True)


@pytest.mark.parametrize("name", ["cross_entropy", "log_prob", "label_smoother"])
def test_checkpointed_loss_is_recomputed(name):
    from torch.utils.checkpoint import checkpoint

    tensors, same = leaves(), leaves()

    def loss(h, w):
        return NUMBERS[name](LinearLogits(h, w)).sum()

    checkpoint(loss, tensors["hidden"], tensors["weight"], use_reentrant=False).backward()
    loss(same["hidden"], same["weight"]).backward()
    torch.testing.assert_close(tensors["weight"].grad, same["weight"].grad)


@pytest.mark.parametrize("name", ["log_prob", "label_smoother", "entropy", "logsumexp"])
@pytest.mark.parametrize("read", ["", "before", "after"])
def test_checkpointed_loss_of_logits_is_recomputed(name, read):
    """Whatever else was read of the logits, and when."""
    from torch.utils.checkpoint import checkpoint

    def loss(z):
        return NUMBERS[name](z).sum() + z[torch.arange(B)].logsumexp(-1).sum()

    lazy, _, tensors = make()
    same, _, expected = make()
    other = lazy.logsumexp(-1).sum() if read == "before" else 0
    value = checkpoint(loss, lazy, use_reentrant=False)
    other = lazy.logsumexp(-1).sum() if read == "after" else other
    (value + other).backward()
    (loss(same) + (same.logsumexp(-1).sum() if read else 0)).backward()
    for key, t in tensors.items():
        torch.testing.assert_close(t.grad, expected[key].grad)


def test_statistics_are_made_once_for_a_loss_that_reads_several(monkeypatch):
    from fused_losses import linear_logits as module

    made = []
    real = module.linear_logits_statistics
    monkeypatch.setattr(module, "linear_logits_statistics", lambda *a, **k: made.append(k["outputs"]) or real(*a, **k))
    lazy, *_ = make()
    smoothed(lazy)
    assert len(made) == 1
    NUMBERS["log_prob_by_rows"](lazy)
    assert len(made) == 2
    NUMBERS["entropy"](lazy)
    lazy.logsumexp(-1)
    assert len(made) == 2


@pytest.mark.parametrize("workspace", [0, 1, 200, "64KiB", None])
def test_argmax_holds_no_more_than_a_workspace_of_logits(workspace, monkeypatch):
    from fused_losses import linear_logits as module

    sizes = []
    real = module.logits_tile

    def tile(*args):
        sizes.append(real(*args).numel() * 4)
        return real(*args)

    monkeypatch.setattr(module, "logits_tile", tile)
    hidden, weight = torch.randn(300, H), torch.randn(50, H)
    lazy, eager = LinearLogits(hidden, weight, softcap=2.0), linear_logits(hidden, weight, softcap=2.0)
    with settings.workspace(workspace):
        assert torch.equal(lazy.argmax(-1), eager.argmax(-1))
        assert torch.equal(lazy.topk(3).indices, eager.topk(3).indices)
        assert torch.equal(lazy.topk(3, largest=False).indices, eager.topk(3, largest=False).indices)
    whole = hidden.shape[0] * weight.shape[0] * 4
    assert max(sizes) <= max(4, (settings.workspace.parse(workspace) or whole) / 4) or workspace is None
    assert (max(sizes) == whole) == (workspace is None)


EXTREMES = {
    "max": lambda z: z.max(-1),
    "min": lambda z: z.min(-1),
    "topk": lambda z: z.topk(3),
    "smallest": lambda z: z.topk(2, largest=False),
    "shifted": lambda z: (2 * z + 1).topk(3),
    "log_softmax": lambda z: z.log_softmax(-1).topk(3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_are_the_same_with_and_without_gradient(name, dtype):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 32, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(200, 32, generator=g).to(dtype).requires_grad_()
    with_gradient = EXTREMES[name](LinearLogits(hidden, weight)).values
    with torch.no_grad():
        assert torch.equal(with_gradient, EXTREMES[name](LinearLogits(hidden, weight)).values)
    if name in ("max", "topk", "min", "smallest"):
        lazy = LinearLogits(hidden, weight)
        assert torch.equal(with_gradient, EXTREMES[name](lazy.materialize()).values)
    found = torch.autograd.grad(with_gradient.square().sum(), (hidden, weight))
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    expected = torch.autograd.grad(EXTREMES[name](h @ w.T).values.square().sum(), (h, w))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=5e-2, atol=5e-2 * theirs.abs().max().item())


def test_extremes_of_rows_with_infinities():
    hidden = torch.randn(4, H, requires_grad=True)
    results = []
    for kind in (LinearLogits, F.linear):
        bias = torch.zeros(V)
        bias[3], bias[5] = torch.inf, -torch.inf
        bias.requires_grad_()
        z = kind(hidden, torch.ones(V, H), bias)
        values = z.max(-1).values, z.min(-1).values, z.topk(2).values
        kept = kind(hidden, torch.ones(V, H), bias.clamp(max=0)).min(-1).values
        results.append((*values, torch.autograd.grad(kept.sum(), bias)[0]))
    torch.testing.assert_close(*results)
    assert results[0][-1][5] == 4


def test_argmax_takes_the_first_of_equal_logits():
    logits = LinearLogits(torch.ones(3, 2), torch.tensor([[0.0, 0], [1, 1], [1, 1], [0, 2]]))
    assert logits.argmax(-1).tolist() == [1, 1, 1]


def test_entropy_of_impossible_entries_is_finite():
    bias = torch.zeros(V).index_fill(0, PICK, -torch.inf)
    logits = LinearLogits(torch.randn(S, H), torch.randn(V, H), bias)
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    assert entropy.isfinite().all()
    torch.testing.assert_close((logp.exp() * logp).clamp(max=1).sum(-1), -entropy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["gather", "logsumexp", "log_prob", "label_smoother", "entropy", "log_softmax_sum", "max", "one_entry"]
)
def test_as_accurate_as_eager(name, dtype):
    tensors, same, exact = leaves(dtype), leaves(dtype), leaves(dtype)
    fn = NUMBERS[name]
    ours = numbers(fn(LinearLogits(tensors["hidden"], tensors["weight"], softcap=5.0)))[0]
    z = F.linear(same["hidden"], same["weight"])
    eager = numbers(fn(5.0 * torch.tanh(z / 5.0)))[0]
    h, w = (exact[k].detach().double().requires_grad_() for k in ("hidden", "weight"))
    true = numbers(fn(linear_logits(h, w, softcap=5.0)))[0]
    assert_accurate(ours, eager, true, name)
    for result in (ours, eager, true):
        (result.double() ** 2).sum().backward()
    assert_accurate(tensors["hidden"].grad, same["hidden"].grad, h.grad, "d_hidden")
    assert_accurate(tensors["weight"].grad, same["weight"].grad, w.grad, "d_weight")


# The head


def test_the_sum_of_logits_is_as_accurate_as_eager():
    tensors = leaves(torch.bfloat16)
    h, w = tensors["hidden"].detach(), tensors["weight"].detach()
    ours = LinearLogits(h, w).float().sum(-1)
    assert_accurate(ours, linear_logits(h.float(), w.float()).sum(-1), linear_logits(h.double(), w.double()).sum(-1))


def test_head_is_a_linear_layer():
    linear = nn.Linear(H, V)
    head = LinearHead.from_linear(linear, scale=0.5, softcap=2.0)
    assert head.weight is linear.weight
    assert head.bias is linear.bias
    assert isinstance(head, nn.Linear)
    hidden = torch.randn(B, S, H)
    logits = head(hidden, temperature=TEMPERATURE)
    assert logits.module is head
    expected = linear_logits(
        hidden, linear.weight, linear.bias, scale=0.5, softcap=2.0, temperature=TEMPERATURE.float()
    )
    torch.testing.assert_close(logits.materialize(), expected)
    other = LinearHead(H, V)
    other.load_state_dict(linear.state_dict())
    assert torch.equal(other.weight, linear.weight)
    assert LinearHead.from_linear(nn.Linear(H, V, bias=False)).bias is None


def test_head_with_a_lora_update():
    head = LinearHead(H, V, rank=2, alpha=4.0)
    head.weight.requires_grad_(False)
    hidden = torch.randn(B, S, H)
    torch.testing.assert_close(head(hidden).materialize(), F.linear(hidden, head.weight, head.bias))
    nn.init.normal_(head.lora_B)
    expected = F.linear(hidden, head.weight + 2.0 * head.lora_B @ head.lora_A, head.bias)
    torch.testing.assert_close(head(hidden).materialize(), expected)
    ours, theirs = (
        torch.autograd.grad(F.cross_entropy(z.view(-1, V), IDS.view(-1)), (head.lora_A, head.lora_B))
        for z in (head(hidden), expected)
    )
    torch.testing.assert_close(ours, theirs)
    dropping = LinearHead(H, V, rank=2, dropout=0.5)
    nn.init.normal_(dropping.lora_B)
    assert not torch.equal(dropping(hidden).materialize(), dropping(hidden).materialize())
    dropping.eval()
    assert torch.equal(dropping(hidden).materialize(), dropping(hidden).materialize())


def test_head_owns_its_options():
    hidden = torch.randn(B, S, H)
    linear = nn.Linear(H, V)
    plain = LinearHead.from_linear(linear)(hidden).logsumexp(-1)
    for option, value in {"scale": 0.5, "softcap": 1.0}.items():
        other = LinearHead.from_linear(linear, **{option: value})
        assert not torch.allclose(other(hidden).logsumexp(-1), plain)


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Adapter(nn.Module):
    """As PEFT's: not an nn.Linear, with the attributes of one."""

    in_features, out_features = H, V

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(V, H)), None


def hooked():
    linear = nn.Linear(H, V)
    linear.forward = lambda input: 2 * nn.Linear.forward(linear, input)
    return linear


@pytest.mark.parametrize("make", [lambda: Doubled(H, V), lambda: LinearHead(H, V, softcap=1.0), Adapter, hooked])
def test_a_head_is_made_from_nothing_but_a_linear_layer(make):
    with pytest.raises(TypeError, match=r"forward or weight is its own|the head itself, got Adapter"):
        LinearHead.from_linear(make())


def test_a_head_loses_nothing_of_the_linear_layer():
    linear = nn.Linear(H, V).eval()
    assert not LinearHead.from_linear(linear).training
    linear.register_forward_hook(lambda module, args, output: torch.ones_like(output))
    with pytest.raises(TypeError, match="hooks of Linear"):
        LinearHead.from_linear(linear)
    with pytest.raises(TypeError, match="a parametrisation removed"):
        LinearHead.from_linear(nn.utils.parametrizations.weight_norm(nn.Linear(H, V)))


def test_a_head_shows_its_options():
    head = LinearHead(H, V, bias=False, softcap=30.0, rank=2)
    assert repr(head) == f"LinearHead(in_features={H}, out_features={V}, bias=False, softcap=30.0, rank=2)"
    head.add_update(0)
    assert "rank" not in repr(head)


# Gathering


class Sharded(nn.Module):
    """What FSDP2 does to a module, in one process: the weight's storage is empty but between unshard and reshard."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(V, H, generator=torch.Generator().manual_seed(1)))
        self.whole = self.weight.detach().clone()
        self.calls = []

    def unshard(self):
        self.calls.append("unshard")
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(self.weight):
            self.weight.untyped_storage().resize_(self.whole.nbytes)
            self.weight.copy_(self.whole)

    def reshard(self):
        self.calls.append("reshard")
        self.weight.untyped_storage().resize_(0)


GATHERED = [
    "cross_entropy",
    "log_prob",
    "gather",
    "label_smoother",
    "entropy",
    "one_entry",
    "topk",
    "argmax",
    "log_prob_by_rows",
]


@pytest.mark.parametrize("name", GATHERED)
def test_the_weight_is_gathered_in_forward_and_in_backward(name):
    module = Sharded()
    hidden = torch.randn(B, S, H, requires_grad=True)
    logits = LinearLogits(hidden, module.weight, module=module)
    module.reshard()
    found = numbers(NUMBERS[name](logits))[0]
    assert module.weight.untyped_storage().size() == 0
    assert module.calls.count("unshard") == module.calls.count("reshard") - 1 > 0
    if not found.requires_grad:
        return
    found.sum().backward()
    # In backward FSDP2 reshards, after it reduced the gradient. The row of one entry is a copy.
    assert module.calls[-1] == ("reshard" if name == "one_entry" else "unshard")
    same, weight = hidden.detach().requires_grad_(), module.whole.clone().requires_grad_()
    numbers(NUMBERS[name](linear_logits(same, weight)))[0].sum().backward()
    torch.testing.assert_close(hidden.grad, same.grad)
    torch.testing.assert_close(module.weight.grad, weight.grad)


@pytest.mark.parametrize("fn", [lambda z: z[..., 2:], lambda z: z[..., PICK], lambda z: (z + 1).float()])
def test_gathered_rows_and_materialised_logits(fn):
    module = Sharded()
    hidden = torch.randn(B, S, H, requires_grad=True)
    logits = LinearLogits(hidden, module.weight, module=module)
    module.reshard()
    found = fn(logits).materialize()
    found.square().sum().backward()
    same, weight = hidden.detach().requires_grad_(), module.whole.clone().requires_grad_()
    fn(linear_logits(same, weight)).square().sum().backward()
    torch.testing.assert_close(hidden.grad, same.grad)
    torch.testing.assert_close(module.weight.grad, weight.grad)


def test_a_whole_weight_is_not_gathered():
    module = Sharded()
    logits = LinearLogits(torch.randn(B, S, H, requires_grad=True), module.weight, module=module)
    logits.logsumexp(-1).sum().backward()
    assert "reshard" not in module.calls


def test_an_empty_weight_without_module_raises():
    module = Sharded()
    logits = LinearLogits(torch.randn(B, S, H), module.weight)
    module.reshard()
    for use in (
        lambda: logits.logsumexp(-1),
        lambda: logits.materialize(),
        lambda: logits.argmax(-1),
        lambda: logits[..., 1:],
    ):
        with pytest.raises(RuntimeError, match="module="):
            use()


@pytest.mark.parametrize("frozen", [False, True])
def test_zero3_parameters_are_gathered(monkeypatch, frozen):
    """DeepSpeed swaps ``parameter.data`` for an empty tensor outside GatheredParameters."""
    import sys
    import types

    module = nn.Linear(H, V, bias=False)
    module.weight.ds_id = 0  # by which DeepSpeed knows it
    whole = module.weight.data.clone()
    log = []

    class GatheredParameters:
        def __init__(self, parameters):
            (self.parameter,) = parameters

        def __enter__(self):
            log.append("gather")
            self.parameter.data = whole.clone()

        def __exit__(self, *_):
            log.append("partition")
            self.parameter.data = torch.empty(0)

    fake = types.SimpleNamespace(zero=types.SimpleNamespace(GatheredParameters=GatheredParameters))
    monkeypatch.setitem(sys.modules, "deepspeed", fake)
    hidden = torch.randn(B, S, H, requires_grad=not frozen)
    if not frozen:
        hidden = hidden * 1.0
        hidden.retain_grad()
        hidden.grad_fn.register_prehook(lambda _: log.append("below"))
    logits = LinearLogits(hidden, module.weight, module=module)
    module.weight.data = torch.empty(0)
    assert logits.shape == (B, S, V)
    loss = F.log_softmax(logits, -1).gather(-1, FEW).sum()
    assert log == ["gather", "partition"]
    loss.backward()
    assert log == ["gather", "partition"] * 2 + ["below"] * (not frozen)  # partitioned as soon as its gradient stands
    weight, same = whole.requires_grad_(), hidden.detach().requires_grad_()
    F.log_softmax(same @ weight.T, -1).gather(-1, FEW).sum().backward()
    if not frozen:
        torch.testing.assert_close(hidden.grad, same.grad)
    torch.testing.assert_close(module.weight.grad, weight.grad)

    logits = LinearLogits(hidden.detach(), whole, module=module)  # what follows reads the weight's shape
    for use in (
        lambda z: F.log_softmax(z, -1).gather(-1, FEW),
        lambda z: z.logsumexp(-1),
        lambda z: token_loss(lambda s: -s.log_probs, z, FEW[..., 0])[0],
        lambda z: divergence(z, torch.zeros(B, S, V)),
        lambda z: divergence(torch.zeros(B, S, V), z),
        lambda z: teacher_topk(z, 2).log_probs,
    ):
        expected = use(logits)
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                module.weight.data = whole.detach().clone()
                again = LinearLogits(hidden.detach(), module.weight, module=module)
                module.weight.data = torch.empty(0)
                torch.testing.assert_close(use(again), expected)
    log.clear()
    distillation_loss(torch.zeros(B, S, V, requires_grad=True), again, FEW[..., 0]).backward()
    assert log == ["gather", "partition"]  # the gradients of a sum were made in forward, and a teacher has none


# Bad input


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: LinearLogits(torch.ones(2, 3), torch.ones(5, 4)), ValueError, r"\(2, 3\) and weight \(5, 4\)"),
        (lambda: LinearLogits(torch.ones(2, 3), torch.ones(5)), ValueError, r"weight \(5,\)"),
        (lambda: LinearLogits(torch.ones(()), torch.ones(5, 4)), ValueError, r"hidden \(\)"),
        (lambda: LinearLogits(torch.ones(2, 3), torch.ones(0, 3)), ValueError, r"weight \(0, 3\)"),
        (lambda: LinearLogits(torch.ones(2, 3), torch.ones(5, 3), torch.ones(4)), ValueError, r"\(5,\), got \(4,\)"),
        (lambda: LinearLogits(torch.ones(2, 3), torch.ones(5, 3, device="meta")), ValueError, "cpu, weight .* on meta"),
        (
            lambda: LinearLogits(torch.ones(2, 3), torch.ones(5, 3).half()),
            TypeError,
            "float32, weight .* is torch.float16",
        ),
        (lambda: LinearLogits(torch.ones(2, 3).long(), torch.ones(5, 3).long()), TypeError, "floating"),
        (lambda: LinearLogits(torch.ones(2, 3)), TypeError, "weight"),
        (lambda: LinearLogits(torch.ones(2, 3), torch.ones(5, 3), softcap=0.0), ValueError, "softcap"),
        (lambda: LinearLogits(torch.ones(2, 3), torch.ones(5, 3), temperature=0.0), ValueError, "temperature"),
        (
            lambda: LinearLogits(torch.ones(2, 3), torch.ones(5, 3), temperature=torch.ones(4)),
            ValueError,
            r"per token \(2,\), got \(4,\)",
        ),
        (
            lambda: LinearLogits(torch.ones(2, 3), torch.ones(5, 3), temperature=torch.ones(2, requires_grad=True)),
            ValueError,
            "detach",
        ),
        (
            lambda: LinearLogits(torch.ones(2, 3), torch.ones(5, 3), low_rank=(torch.ones(2, 2), torch.ones(4, 2))),
            ValueError,
            r"\(2, 2\) and \(4, 2\)",
        ),
    ],
)
def test_bad_construction(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (lambda z: z[5], IndexError, "out of bounds|out of range"),
        (lambda z: z[..., V], IndexError, "out of bounds"),
        (lambda z: z[0, 0, 0, 0], IndexError, "too many indices"),
        (lambda z: z.gather(-1, torch.full((B, S, 1), V)), IndexError, "out of bounds"),
        (lambda z: z.gather(-1, torch.full((B, S, 1), -100)), IndexError, "out of bounds"),
        (lambda z: z.log_softmax(-1)[0, 0, V], IndexError, "out of bounds"),
        (lambda z: z.view(3, -1), RuntimeError, r"invalid for LinearLogits \(2, 5, 11\)"),
        (lambda z: z.transpose(0, 3), IndexError, "Dimension out of range"),
        (lambda z: z.split([1, 2], 1), RuntimeError, "sum to 5"),
        (lambda z: z.narrow(1, 3, 4), RuntimeError, "exceeds"),
        (lambda z: z.topk(V + 1), RuntimeError, "out of range"),
        (lambda z: F.cross_entropy(z.view(-1, V), IDS.view(-1) + V), IndexError, "out of bounds"),
        (lambda z: F.cross_entropy(z.view(-1, V), IDS.view(-1)[1:]), ValueError, r"\(9,\)"),
        (lambda z: F.cross_entropy(z, IDS), ValueError, r"\(2, 5, 11\) are to stand at dimension 1"),
        (lambda z: F.nll_loss(z.log_softmax(-1), IDS), ValueError, r"\(2, 5, 11\) are to stand at dimension 1"),
        (lambda z: z.log_softmax(-1).gather(-1, IDS), RuntimeError, r"got \(2, 5\): write index.unsqueeze"),
        (lambda z: F.cross_entropy(z.view(-1, V), IDS.view(-1).int()), (TypeError, RuntimeError, ValueError), ""),
    ],
)
def test_bad_use_is_refused_before_logits_are_made(use, error, message):
    with settings.strict(), pytest.raises(error, match=message):
        use(make()[0])


def test_no_tokens():
    logits = LinearLogits(torch.zeros(0, S, H, requires_grad=True), torch.randn(V, H, requires_grad=True))
    assert logits.view(-1, V).shape == (0, V)
    assert logits.logsumexp(-1).shape == (0, S)
    assert logits.argmax(-1).shape == (0, S)
    assert logits.materialize().shape == (0, S, V)
    assert [part.shape for part in logits.chunk(3)] == [(0, S, V)] * 3
    assert F.cross_entropy(logits.view(-1, V), torch.zeros(0, dtype=torch.long)).isnan()
    assert F.cross_entropy(logits.view(-1, V), torch.zeros(0, dtype=torch.long), reduction="sum") == 0


def test_more_than_two_to_the_31_logits():
    logits = LinearLogits(torch.ones(1, 1).expand(2**20, 1), torch.arange(4096.0).unsqueeze(1))
    assert logits.numel() == 2**32
    last = logits.view(2, -1, 4096)[-1, -2:]
    torch.testing.assert_close(last.logsumexp(-1), torch.full((2,), 4095.4587))
    assert last.argmax(-1).tolist() == [4095, 4095]


def test_a_vocabulary_of_one():
    hidden, weight = torch.randn(B, S, H), torch.randn(1, H)
    logits = LinearLogits(hidden, weight)
    torch.testing.assert_close(logits.view(1, -1, 1).squeeze(0).materialize(), (hidden @ weight.T).view(-1, 1))
    assert (logits.log_softmax(-1).gather(-1, IDS[..., None] * 0) == 0).all()


def test_data_parallel_replicas_raise():
    head = LinearHead(H, V, bias=False)
    replica = head._replicate_for_data_parallel()
    replica.weight, replica.bias = head.weight.detach(), None
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        replica(torch.randn(B, H))


def test_sharded_tensors_raise():
    weight = torch.ones(V, H)
    weight.device_mesh = "a DTensor has one"
    with pytest.raises(TypeError, match="LinearHead"):
        LinearLogits(torch.ones(S, H), weight)


TIED = {
    "cross_entropy": lambda of, h, w, ids: F.cross_entropy(of(h, w), ids),
    "per token": lambda of, h, w, ids: F.cross_entropy(of(h, w), ids, reduction="none").square().sum(),
    "dense logits": lambda of, h, w, ids: fused_cross_entropy((h @ w.T) * w.sum(), ids),
    "two heads": lambda of, h, w, ids: F.kl_div(
        of(h, w).log_softmax(-1), of(2 * h, w).softmax(-1), reduction="batchmean"
    ),
    "low rank": lambda of, h, w, ids: F.cross_entropy(of(h, w, low_rank=(h, w)), ids),
}


@pytest.mark.parametrize("name", TIED)
def test_gradients_to_differentiate_again_of_tensors_made_from_one_another(name):
    """As hidden states are, of a model whose embeddings are its head: no path may be counted twice."""
    embedding, ids = torch.randn(V, H, dtype=torch.float64), torch.randint(0, V, (S,))

    def derivatives(of):
        leaf = embedding.clone().requires_grad_()
        loss = TIED[name](of, leaf[ids].tanh(), leaf, ids.roll(1))
        (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
        return first.detach(), torch.autograd.grad(first.square().sum(), leaf)[0]

    torch.testing.assert_close(derivatives(LinearLogits), derivatives(linear_logits))


@pytest.mark.parametrize("name", ["cross_entropy", "log_prob", "label_smoother"])
def test_second_derivatives_and_transforms(name):
    tensors = leaves()
    h, w = (tensors[k].detach() for k in ("hidden", "weight"))

    def lazy(h, w):
        return NUMBERS[name](LinearLogits(h, w, softcap=2.0)).sum()

    def eager(h, w):
        return NUMBERS[name](linear_logits(h, w, softcap=2.0)).sum()

    torch.testing.assert_close(torch.func.grad(lazy, (0, 1))(h, w), torch.func.grad(eager, (0, 1))(h, w))
    torch.testing.assert_close(
        torch.func.jvp(lazy, (h, w), (w[:B, None] + h, w)), torch.func.jvp(eager, (h, w), (w[:B, None] + h, w))
    )
    twice = [
        torch.autograd.grad(torch.autograd.grad(fn(x, w), x, create_graph=True)[0].square().sum(), x)[0]
        for fn, x in ((fn, h.clone().requires_grad_()) for fn in (lazy, eager))
    ]
    torch.testing.assert_close(*twice)
    assert twice[0].abs().max() > 0


AT = torch.tensor([[[4], [0]], [[1], [1]]])


@pytest.mark.parametrize(
    "fn",
    [
        lambda z: z.gather(1, AT.expand(-1, -1, V)).logsumexp(-1),
        lambda z: z.mT.log_softmax(1).gather(-1, AT.mT[:1].expand(-1, V, -1))[:, 3],
        lambda z: torch.take_along_dim(z, AT[:1] - 2, 1).logsumexp(-1),
        lambda z: (3 * (z - z.mean(-1, keepdim=True))).logsumexp(-1, keepdim=True),
        lambda z: ((z + 1) * TEMPERATURE[..., None].float()).logsumexp(-1),
        lambda z: (0.5 * z.log_softmax(-1) - TEMPERATURE[..., None].float()).logsumexp(-1),
        lambda z: z.max(),
        lambda z: z.log_softmax(-1).min(),
        lambda z: z.softmax(-1).amax(),
        lambda z: TEMPERATURE.type_as(z) + TEMPERATURE.to(z),
        lambda z: torch.ones(B * S * V).view_as(z).sum() + torch.ones(V, B * S).T.reshape_as(z).sum(),
        lambda z: TEMPERATURE[..., None].expand_as(z).sum(),
        lambda z: torch.ones((), dtype=torch.result_type(z, TEMPERATURE)),
        lambda z: torch.isnan(z).any() | z.mT.isnan().any(1).any(),
        lambda z: z.isnan().any(-1, keepdim=True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_reads_numbers_per_token_or_none(fn, dtype):
    tensors = leaves(torch.float32)
    args, kwargs = arguments(tensors, bias=True)
    with settings.strict():
        found = fn(LinearLogits(*args, **kwargs).to(dtype))
    expected = fn(linear_logits(*args, **kwargs).to(dtype))
    assert found.dtype == expected.dtype
    exact = dtype == torch.float32
    torch.testing.assert_close(found, expected, **({} if exact else {"rtol": 2e-2, "atol": 2e-2}))
    if found.requires_grad and exact:
        torch.testing.assert_close(*(gradients([x], tensors)[:3] for x in (found, expected)))


def test_a_vocabulary_of_one_beside_numbers_per_token():
    hidden, weight = torch.randn(B, S, H, requires_grad=True), torch.randn(1, H)
    numbers, results = torch.randn(B, S, 1), []
    for head in (LinearLogits, F.linear):
        z = head(hidden, weight)
        with settings.strict():
            loss = (z + numbers).logsumexp(-1).square().sum() + (numbers - z)[..., 0].square().sum()
        results.append([loss, *torch.autograd.grad(loss, [hidden])])
    torch.testing.assert_close(*results)


def test_tokens_of_nan_emptied():
    """As DSKD guards its logits."""
    hidden, weight = torch.randn(B, S, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    broken = torch.zeros(B, S, H).index_put(
        (torch.tensor([0, 1]), torch.tensor([2, 0])), torch.tensor([torch.nan, torch.inf])[:, None]
    )
    results = []
    for head in (LinearLogits, F.linear):
        z = head(hidden + broken, weight)
        with settings.strict():
            assert z.isnan().any()
            z.masked_fill_(z.isnan() | z.isinf(), 0.0)
            assert not z.isnan().any()
            loss = z.logsumexp(-1).sum() - z.log_softmax(-1)[..., 2].square().sum()
        results.append([loss, *torch.autograd.grad(loss, [hidden, weight])])
    torch.testing.assert_close(results[0][0], results[1][0])
    assert torch.isfinite(results[0][1]).all()
    assert (results[0][1][broken.isfinite().all(-1)] != 0).all()
    torch.testing.assert_close(results[0][1][broken.isfinite().all(-1)], results[1][1][broken.isfinite().all(-1)])


@pytest.mark.parametrize("options", [{"bias": True}, {"softcap": 2.0}, {"low_rank": True}])
def test_guards_that_take_elements_materialise(options):
    lazy, *_ = make(**options)
    with settings.strict():
        mask = lazy.isnan() | lazy.isinf()
        with pytest.raises(RuntimeError, match="masked_fill materialises"):
            lazy.masked_fill(mask, 0.0)
        with pytest.raises(RuntimeError, match="any materialises"):
            mask.any()
    assert torch.equal(mask.materialize(), torch.zeros(B, S, V) == 1)


@pytest.mark.filterwarnings("ignore:.*materialises")
def test_the_gradient_of_what_is_never_made_is_refused():
    lazy, _, tensors = make()
    loss = lazy.logsumexp(-1).sum()
    for inputs in (lazy, [tensors["hidden"], lazy.softmax(-1)]):
        with pytest.raises(RuntimeError, match="ask for that of hidden and weight"):
            torch.autograd.grad(loss, inputs)
    assert lazy.grad is None
    assert torch.autograd.grad(lazy, tensors["hidden"], torch.ones(B, S, V))[0].shape == (B, S, H)


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize(
    "fn",
    [
        lambda z, t, b: z.amax(-1),
        lambda z, t, b: z.topk(2).values.sum(-1),
        lambda z, t, b: (z / t[:, None]).logsumexp(-1),
        lambda z, t, b: (z + b).logsumexp(-1),
    ],
    ids=["amax", "topk", "temperature", "bias"],
)
def test_backward_through_vmap(fn):
    found = []
    for head in (LinearLogits, F.linear):
        leaves = [torch.linspace(-1, 1, B * S * H).view(B, S, H), torch.linspace(0, 2, V * H).view(V, H).sin()]
        leaves += [torch.full((B, S), 2.0), torch.linspace(0, 1, B * V).view(B, V)]
        hidden, weight, temperature, bias = (t.double().requires_grad_() for t in leaves)
        out = torch.func.vmap(lambda h, t, b: fn(head(h, weight), t, b))(hidden, temperature, bias)  # noqa: B023
        found.append((out, *torch.autograd.grad(out.sum(), (hidden, weight, temperature, bias), allow_unused=True)))
    torch.testing.assert_close(*found)


@pytest.mark.filterwarnings("ignore:.*materialises")
def test_changes_in_place_compile():
    def loss(z):
        kl = F.kl_div(z.log_softmax(-1), (2 * z).softmax(-1), reduction="none")
        kl[:, 0] = 0.5
        return kl.clamp_(min=0.01).sum()

    lazy, eager, _ = make()
    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(lazy)
    torch.testing.assert_close(found, loss(eager))


def test_a_view_of_what_was_changed_raises_compiled_too():
    def loss(z):
        y = z * 1
        view = y[:, 1:]
        y *= 2
        return view.logsumexp(-1).sum()

    for run in (loss, torch.compile(loss, backend="aot_eager")):
        with pytest.raises(RuntimeError, match="another view"):
            run(make()[0])


def test_division_by_a_tensor_compiles_without_logits():
    lazy, eager, _ = make()

    def loss(z):
        return (z / TEMPERATURE[..., None]).logsumexp(-1).sum()

    with settings.strict():
        found = torch.compile(loss, fullgraph=True, backend="aot_eager")(lazy)
    torch.testing.assert_close(found, loss(eager))
