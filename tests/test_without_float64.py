"""A device without float64 (Apple's): nothing asks for float64, and the numbers are those of other devices."""

import pytest
import torch
import torch.nn.functional as F
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fused_losses as fl
from fused_losses import numerics

B, S, V, H = 2, 5, 37, 8
IDS = torch.tensor([[0, -100, 36, 7, 7], [3, -100, -100, 21, 9]])
MASK = IDS != -100
PACKED = torch.tensor([0, 3, 7])
STATISTICS = ("log_probs", "logsumexp", "entropy", "log_sum_sq_probs", "mean_logits", "max_logit", "is_top1")


class NoFloat64(TorchDispatchMode):
    """Looks into the package's own operators too, which a dispatch mode does not see inside."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "fused_losses":
            with self:
                return OPDEFS[func.name().split(".")[0]]._init_fn(*args, **kwargs)
        out = func(*args, **kwargs)
        assert all(t.dtype != torch.float64 for t in tree_leaves(out) if isinstance(t, torch.Tensor)), func
        return out


LEAVES = []  # the tensors that a case made and trains


def leaf(*shape, make=torch.randn):
    LEAVES.append(make(*shape, requires_grad=True))
    return LEAVES[-1]


def lazy():
    return fl.LinearLogits(leaf(B, S, H), leaf(V, H), leaf(V))


def dense():
    return leaf(B, S, V)


def log_probs():
    return -leaf(B, S, make=torch.rand)


OF_LOGITS = {
    "mean": lambda z: fl.cross_entropy(z().transpose(1, 2), IDS),
    "none": lambda z: fl.cross_entropy(z().transpose(1, 2), IDS, reduction="none"),
    "smoothed": lambda z: fl.cross_entropy(z().mT, IDS, weight=torch.rand(V), label_smoothing=0.1, z_loss=1e-4),
    "probabilities": lambda z: fl.cross_entropy(z().transpose(1, 2), torch.rand(B, V, S).softmax(1)),
    "statistics": lambda z: [t for t in fl.token_statistics(z(), IDS, outputs=STATISTICS) if t is not None],
    "token_loss": lambda z: fl.token_loss(lambda s, a: -a * s.log_probs, z(), IDS, torch.rand(B, S)),
    "distillation": lambda z: fl.distillation_loss(z(), z(), IDS),
    "sparse": lambda z: fl.sparse_distillation_loss(z(), *fl.teacher_topk(z(), 3)),
    "kl_div": lambda z: F.kl_div(z().log_softmax(-1), torch.rand(B, S, V).softmax(-1), reduction="batchmean"),
    "by_hand": lambda z: (z().softmax(-1) * (z().log_softmax(-1) - z().log_softmax(-1))).sum(-1),
    "sft": lambda z: fl.sft_loss(z(), IDS, average="sequence"),
} | {
    kind: lambda z, kind=kind: fl.divergence(z(), z(), kind=kind) for kind in ("forward_kl", "reverse_kl", "jsd", "tvd")
}
OF_LOG_PROBS = {
    "packed": lambda: fl.sequence_log_probs(log_probs().view(1, -1)[:, :7], cu_seqlens=PACKED),
    "dpo": lambda: fl.dpo_loss(*(log_probs().sum(-1) for _ in range(4)))[0],
    "grpo": lambda: fl.grpo_loss(log_probs(), log_probs().detach(), torch.randn(B), MASK)[0],
    "kl_cov": lambda: fl.grpo_loss(log_probs(), log_probs().detach(), torch.randn(B), MASK, loss_type="kl_cov")[0],
    "ppo": lambda: fl.ppo_loss(log_probs(), log_probs().detach(), torch.randn(B, S), MASK)[0],
    "top_entropy": lambda: fl.entropy_mask(torch.rand(B, S), 0.5, MASK),
    "advantages": lambda: fl.group_advantages(torch.rand(4), 2),
    "count": lambda: fl.count_per_rank(MASK.sum()),
}
CASES = {f"{name}-{z.__name__}": (lambda fn=fn, z=z: fn(z)) for name, fn in OF_LOGITS.items() for z in (lazy, dense)}
CASES |= OF_LOG_PROBS


def outcome(fn):
    """The values that ``fn`` returns, and the gradients of their sum."""
    torch.manual_seed(0)
    LEAVES.clear()
    found = [t for t in tree_leaves(fn()) if isinstance(t, torch.Tensor)]
    for t in found:
        if t.requires_grad:
            t.sum().backward(retain_graph=True)
    gradients = [t.grad for t in LEAVES if t.grad is not None]
    assert gradients or not any(t.requires_grad for t in found)
    return [t.detach().float() for t in found] + gradients


@pytest.mark.parametrize("name", CASES)
def test_no_float64(name, monkeypatch):
    expected = outcome(CASES[name])
    monkeypatch.setattr(numerics.wide_dtype, "__code__", (lambda device: torch.float32).__code__)
    with NoFloat64():
        found = outcome(CASES[name])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


def test_it_would_be_seen():
    with pytest.raises(AssertionError, match="to_copy"), NoFloat64():
        torch.ones(2).double()
    with pytest.raises(AssertionError), NoFloat64():
        fl.token_statistics(lazy(), IDS)
