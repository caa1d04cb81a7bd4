"""Each row of docs/trainers.md, "Coming from another fused loss": our call gives the value and the gradients of theirs.

Their call runs as in the row, on the plain PyTorch below with their names and argument orders, and on Liger where installed.
"""

import ast
import functools
import importlib
import inspect
import pathlib
import re
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

import fused_losses
from fused_losses.settings import strict

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "trainers.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("\n## Coming from another fused loss\n")[2].partition("\n## ")[0]
ROWS = [row.split("|")[1:4] for row in SECTION.splitlines() if row.startswith("|") and "`" in row]
SPAN = re.compile(r"`([^`]+)`")
NAMES = [re.search(r"(\w+)(\.apply)?\(", row[0])[1] for row in ROWS]
PAIRED = re.compile("(DPO|SimPO|CPO|ORPO|KTO)Loss")
BLOCKS = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)


def counted(loss, y, ignore_index=-100):
    return loss.sum() / (y != ignore_index).sum()


def plain_cross_entropy(x, y, weight=None, z=0.0, smoothing=0.0, softcap=None, ignore_index=-100):
    """The loss of each row, its z-loss, and whether the label's logit is the largest."""
    x = x if softcap is None else softcap * (x / softcap).tanh()
    loss = F.cross_entropy(x, y, weight, ignore_index=ignore_index, reduction="none", label_smoothing=smoothing)
    kept = y != ignore_index
    return loss, (z * x.logsumexp(-1) ** 2).where(kept, 0), (x.argmax(-1) == y).where(kept, 0)


class LigerFusedLinearCrossEntropyLoss:
    def __init__(
        self,
        ce_weight=None,
        lse_square_scale=0.0,
        label_smoothing=0.0,
        softcap=None,
        return_z_loss=False,
        use_token_scaling=False,
        return_token_accuracy=False,
    ):
        self.args = ce_weight, lse_square_scale, label_smoothing, softcap
        self.returns, self.scaled = return_z_loss or return_token_accuracy, use_token_scaling

    def __call__(self, W, h, y, b=None):
        x, weight = F.linear(h, W, b), self.args[0]
        loss, z, top = plain_cross_entropy(x, y, *self.args)
        if self.scaled:
            p = x.detach().softmax(-1).gather(-1, y.clamp(min=0)[..., None]).squeeze(-1)
            return counted(loss * p, y)
        total = (y != -100).sum() if weight is None else weight[y[y != -100]].sum()
        loss = loss.sum() / total + counted(z, y)
        return (loss, counted(z, y), counted(top, y)) if self.returns else loss


def LigerCrossEntropyLoss(lse_square_scale):
    head = LigerFusedLinearCrossEntropyLoss(lse_square_scale=lse_square_scale)
    return lambda x, y: head(torch.eye(x.shape[-1], dtype=x.dtype), x, y)


def VocabParallelOptions(start, stop, group):
    assert (start, stop, dist.get_world_size(group)) == (0, V, 1)


def cut(h, W, y, bias=None, softcap=None, reduction="mean", shift=0, return_lse=False, vocab_parallel_options=None):
    if shift:
        h, y = h[:, :-shift], y[:, shift:]
    x = F.linear(h, W, bias).flatten(0, -2)
    loss = plain_cross_entropy(x, y.flatten(), softcap=softcap)[0]
    if return_lse:
        return loss, x.logsumexp(-1).where(y != -100, 0)
    return counted(loss, y)


def liger_fused_linear_scaled_cross_entropy_tp(h, W, y, group, temperature, return_entropy):
    x = h @ W.T / temperature
    entropy = x.logsumexp(-1) - (x.softmax(-1) * x).sum(-1)
    return plain_cross_entropy(x, y)[0], entropy.where(y != -100, 0)


def CrossEntropyLoss(lse_square_scale, label_smoothing, logit_scale, process_group):
    def loss(x, y):
        nll, z, _ = plain_cross_entropy(x * logit_scale, y, z=lse_square_scale, smoothing=label_smoothing)
        return counted(nll + z, y)

    return loss


def vocab_parallel_cross_entropy(x, y, label_smoothing=0.0, tp_group=None):
    nll = x.logsumexp(-1) - x.gather(-1, y.clamp(min=0)[..., None]).squeeze(-1)
    return nll.where(y != -100, 0)  # the caller's part: the mask


def fast_cross_entropy_loss(x, y, logit_softcapping=0, logit_scaling=0, n_items=None):
    x = x.flatten(0, 1) * (logit_scaling or 1)
    return plain_cross_entropy(x, y.flatten(), softcap=logit_softcapping or None)[0].sum() / n_items


def xentropy(x, labels, smoothing=0.0, padding_idx=0, half_to_float=False):
    return plain_cross_entropy(x, labels, smoothing=smoothing, ignore_index=padding_idx)[0]


def sums(h, W, y, b):
    """Summed log-probabilities and numbers of tokens, (2B,)."""
    mask = y != -100
    logp = F.linear(h, W, b).log_softmax(-1).gather(-1, y.clamp(min=0)[..., None]).squeeze(-1)
    return (logp * mask).sum(-1), mask.sum(-1)


def LigerFusedLinearDPOLoss(beta=0.1, compute_nll_loss=False, alpha=1.0):
    def loss(W, h, y, b, h_r, W_r, b_r):
        logps, n = sums(h, W, y, b)
        c, r = (beta * (logps - sums(h_r, W_r, y, b_r)[0].detach())).chunk(2)
        nll = -logps.chunk(2)[0].sum() / n.chunk(2)[0].sum()
        return -F.logsigmoid(c - r).mean() + alpha * compute_nll_loss * nll, c, r

    return loss


def preference(score, alpha, average):
    def loss(W, h, y, b):
        logps, n = sums(h, W, y, b)
        nll = -logps.chunk(2)[0].sum() / n.chunk(2)[0].sum()
        return score(*(logps / n if average else logps).chunk(2)).mean() + alpha * nll

    return loss


def LigerFusedLinearSimPOLoss(beta=0.1, alpha=1.0, gamma=0.5):
    return preference(lambda c, r: -F.logsigmoid(beta * (c - r) - gamma), alpha, average=True)


def LigerFusedLinearCPOLoss(beta=0.1, alpha=1.0):
    return preference(lambda c, r: -F.logsigmoid(beta * (c - r)), alpha, average=False)


def LigerFusedLinearORPOLoss(beta=0.1):
    def log_odds(logp):
        return logp - (1 - logp.exp()).log()

    return preference(lambda c, r: -beta * F.logsigmoid(log_odds(c) - log_odds(r)), 1.0, average=True)


def LigerFusedLinearKTOLoss(beta=0.1, use_ref_model=False):
    def loss(h, W, y, b, good, h_r, W_r, b_r, kl):
        ratio = sums(h, W, y, b)[0] - use_ref_model * sums(h_r, W_r, y, b_r)[0].detach()
        return (1 - torch.sigmoid(beta * (ratio - kl) * torch.where(good, 1, -1))).mean()

    return loss


def LigerFusedLinearGRPOLoss(beta=0.04, temperature=1.0):
    def loss(h, W, ids, mask, A, b, ref, old):
        logp = (F.linear(h, W, b) / temperature).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
        r, d = (logp - old).exp(), logp - ref
        surrogate = torch.min(r * A[:, None], r.clamp(0.8, 1.2) * A[:, None])
        return ((beta * ((-d).exp() - 1 + d) - surrogate) * mask).sum() / mask.sum()

    return loss


def jsd(s, t, beta):
    s, t = s.log_softmax(-1), t.log_softmax(-1)
    m = (beta * t.exp() + (1 - beta) * s.exp()).log()
    return (beta * t.exp() * (t - m) + (1 - beta) * s.exp() * (s - m)).sum(-1)


def LigerFusedLinearJSD(jsd_beta=0.5, temperature=1.0):
    hard_and_soft = LigerFusedLinearJSDLoss(0.0, 1.0, jsd_beta, temperature)
    return lambda h, W, h_t, W_t, y: hard_and_soft(h, W, h_t, W_t, y, None, None)


def LigerFusedLinearJSDLoss(weight_hard_loss=0.5, weight_soft_loss=0.5, beta=0.5, temperature=1.0):
    def loss(h, W, h_t, W_t, y, b, b_t):
        x, x_t = F.linear(h, W, b), F.linear(h_t, W_t, b_t).detach()
        soft = jsd(x / temperature, x_t / temperature, beta) * (y != -100)
        return weight_hard_loss * F.cross_entropy(x, y) + weight_soft_loss * counted(soft, y)

    return loss


def LigerFusedLinearCosineSimilarityLoss(weight_hard_loss=0.5, weight_soft_loss=0.5, beta=0.5):
    def loss(h, W, h_t, W_t, y, b, b_t):
        x, x_t = F.linear(h, W, b), F.linear(h_t, W_t, b_t)
        soft = beta * (1 - (F.normalize(x, dim=-1) * F.normalize(x_t, dim=-1)).sum(-1)) * (y != -100)
        return weight_hard_loss * F.cross_entropy(x, y) + weight_soft_loss * counted(soft, y)

    return loss


def LigerJSD(beta):
    return lambda log_q, log_p, y: counted(jsd(log_q, log_p, beta) * (y != -100), y)


def LigerFusedLinearKLDivLoss(temperature=1.0):
    def loss(h, W, p, y):
        kl = F.kl_div((h @ W.T / temperature).log_softmax(-1), p, reduction="none").sum(-1)
        return counted(kl * (y != -100), y)

    return loss


PLAIN = {
    name: thing
    for name, thing in globals().items()
    if name.startswith("Liger") or name in ("CrossEntropyLoss", "VocabParallelOptions")
} | {
    "F": F,
    "cut_cross_entropy": SimpleNamespace(linear_cross_entropy=cut),
    "liger_fused_linear_scaled_cross_entropy_tp": liger_fused_linear_scaled_cross_entropy_tp,
    "vocab_parallel_cross_entropy": vocab_parallel_cross_entropy,
    "fast_cross_entropy_loss": fast_cross_entropy_loss,
    "SoftmaxCrossEntropyLoss": SimpleNamespace(apply=xentropy),
    "LigerKLDIVLoss": lambda reduction: functools.partial(F.kl_div, reduction=reduction),
    "LigerTVDLoss": lambda: lambda q, p, y: counted(0.5 * (q - p).abs().sum(-1) * (y != -100), y),
}
OURS = {name: getattr(fused_losses, name) for name in fused_losses.__all__}
N, B, S, V, H = 12, 4, 3, 10, 8


def arguments(theirs, dtype):
    """The arguments by their names on the page, those with gradients and the others; (B, S, …) where the row has sequences."""
    torch.manual_seed(0)
    sequences = PAIRED.search(theirs) or re.search("GRPOLoss|vocab_parallel_cross|fast_cross|shift=", theirs)
    shape = (B, S) if sequences else (N,)

    def random(*size):
        return torch.randn(size, dtype=dtype)

    leaves = {"h": random(*shape, H), "W": random(V, H), "b": random(V), "x": 3 * random(*shape, V)}
    constants = {"h_t": random(*shape, 5), "W_t": random(V, 5), "b_t": random(V), "x_t": random(*shape, V)}
    constants |= {"h_r": random(*shape, 5), "W_r": random(V, 5), "b_r": random(V)}
    y = torch.arange(N).add(3).remainder(V).view(shape)
    y[..., 1] = y.view(-1)[-1] = -100
    ids, mask = y.clamp(min=0), (y != -100).long()
    constants |= {"y": ids if "apply" in theirs else y, "labels": y, "ids": ids, "mask": mask}
    constants |= {"c": torch.rand(V, dtype=dtype), "p": random(*shape, V).softmax(-1), "n": 7, "A": random(shape[0])}
    constants |= {"ref_logps": -random(*shape).abs(), "kl": torch.tensor(0.3, dtype=dtype)}
    constants |= {"good": torch.arange(shape[0]) % 3 == 0, "start": 0, "stop": V, "V": V, "g": dist.group.WORLD}
    logits = F.linear(leaves["h"], leaves["W"], leaves["b"])
    old = (logits / 0.7).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    constants["old_logps"] = old + 0.3 * random(*shape)
    for leaf in leaves.values():
        leaf.requires_grad_()
    return leaves, constants


def run(statements, scope, dtype, theirs, blocks=()):
    """The results of the last statement, which the page goes on to use, and the leaves of their gradients."""
    leaves, constants = arguments(theirs, dtype)
    scope = {"torch": torch, "F": F} | scope | leaves | constants
    torchtune = functools.partial(lambda W, h, y: F.cross_entropy(h @ W.T, y), leaves["W"])  # it was given the model
    scope.setdefault("LinearCrossEntropyLoss", lambda: torchtune)
    for code in (*blocks, *statements[:-1]):
        exec(code, scope)
    if "LinearLogits" in scope:
        scope["t"] = scope["LinearLogits"](*(scope[name] for name in ("h_t", "W_t", "b_t")))
    found = eval(statements[-1], scope)
    return tree_leaves(vars(found) if hasattr(found, "predicted_tokens") else found), list(leaves.values())


def compare(row, scope, dtype, **tolerance):
    theirs, ours, _ = row
    ours = SPAN.findall(ours)
    blocks = BLOCKS if PAIRED.search(theirs) else BLOCKS[:1]
    with strict():
        found, leaves = run(ours, OURS, dtype, theirs, blocks)
        found = found if isinstance(ast.parse(ours[-1]).body[0].value, ast.Tuple) else found[:1]
        gradients = torch.autograd.grad(total(found, found), leaves, allow_unused=True)
    expected, leaves = run(SPAN.findall(theirs)[:1], scope, dtype, theirs)
    expected = [x.to(y.dtype) for x, y in zip(expected, found, strict=False)]
    torch.testing.assert_close(found, expected, **tolerance)
    expected = torch.autograd.grad(total(expected, found), leaves, allow_unused=True)
    assert any(g is not None for g in gradients)
    for gradient, of_theirs in zip(gradients, expected, strict=True):
        assert (gradient is None) == (of_theirs is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, of_theirs, **tolerance)


def total(results, found):
    """A weighted sum, with a different weight for each entry, of the results whose counterpart in ``found`` has a gradient."""
    return sum(
        (1.7 * x * torch.arange(1, 1 + x.numel(), dtype=x.dtype).view_as(x)).sum()
        for x, y in zip(results, found, strict=True)
        if y.requires_grad
    )


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_row_gives_what_plain_pytorch_does(row):
    if "F.linear_cross_entropy" in row[0] and not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this PyTorch has none")
    compare(row, PLAIN, torch.float64)


LIGERS = [pytest.param(row, id=name) for row, name in zip(ROWS, NAMES, strict=True) if "Liger" in name]


@pytest.mark.parametrize("row", LIGERS)
def test_row_gives_what_liger_does(row, device):
    pytest.importorskip("liger_kernel")
    if device == "cpu" and re.search("softcap|KLDIV|TVD", row[0]):
        pytest.skip("its kernel casts a Python float, which Triton's interpreter has no cast of")
    scope = {}
    for module in ("liger_kernel.chunked_loss", "liger_kernel.transformers"):
        scope |= vars(importlib.import_module(module))
    name = re.search(r"Liger\w+", row[0])[0]
    if "compiled" in inspect.signature(scope[name]).parameters:
        scope[name] = functools.partial(scope[name], compiled=False)
    with torch.device(device):
        compare(row, scope, torch.float32, rtol=1e-4, atol=1e-5)


def test_the_page_has_all_rows():
    assert len(ROWS) == 29
