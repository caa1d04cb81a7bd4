"""How often a head is multiplied for the numbers read from its LinearLogits."""

import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from lazy_logits import IDS, IGNORED, NUMBERS, B, H, S, V, make, smoothed
from torch.utils._python_dispatch import TorchDispatchMode

from fused_losses import settings
from fused_losses.linear_logits import LinearLogits


class CountPasses(TorchDispatchMode):
    """Counts how often a head was multiplied, forward and backward."""

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
    watched.zero_()  # must not change the numbers already known
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
    """Log-probabilities are read from one view, logsumexp from another."""
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


def test_a_view_made_without_gradient_takes_none_from_the_next():
    lazy, eager, tensors = make()
    found = []
    for z in (lazy, eager):
        loss = z.logsumexp(-1).sum()
        with torch.no_grad():
            assert not z[:, :-1].logsumexp(-1).requires_grad
        loss = loss + z[:, :-1].logsumexp(-1).square().sum()
        found.append([loss, *torch.autograd.grad(loss, (tensors["hidden"], tensors["weight"]))])
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
