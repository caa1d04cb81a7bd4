"""A small head, losses of its logits, and the check that LinearLogits answer as the logits they stand for do."""

import torch
import torch.nn.functional as F
from torch import nn

from fused_losses import settings
from fused_losses.linear_logits import LinearLogits
from fused_losses.reference.linear_logits import linear_logits

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
    """An operation's result as a flat list of tensors."""
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
    """``fn`` gives the same values and gradients for LinearLogits and for its reference, and materialises nothing."""
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
    "gather_sequence_first": lambda z: z.transpose(0, 1).gather(-1, IDS.T[..., None]),
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
    "nll_loss_of_a_mixture": lambda z: F.nll_loss(
        ((z.softmax(-1) + (z / 2).softmax(-1)) / 2).log().view(-1, V), IGNORED.view(-1), WEIGHT
    ),
    "nll_loss_shifted": lambda z: F.nll_loss((z.log_softmax(-1) + TEMPERATURE[..., None]).mT, IDS),
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


def make(**options):
    tensors = leaves(torch.float32)
    args, kwargs = arguments(tensors, **options)
    return LinearLogits(*args, **kwargs), linear_logits(*args, **kwargs), tensors
