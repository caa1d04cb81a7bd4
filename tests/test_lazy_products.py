"""Losses of distillation written by hand, run unchanged on two heads that make no logits."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from fused_losses import LinearLogits, lazy_products, strict
from fused_losses.lazy_products import LazyProducts
from fused_losses.reference.tolerance import assert_accurate

B, S, V, H = 2, 6, 37, 8
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])


def forward_kl(s, t):
    """As torchtune, DistiLLM and MiniLLM write it."""
    product = F.softmax(t, dim=-1, dtype=torch.float64) * F.log_softmax(s, dim=-1, dtype=torch.float64)
    product = torch.masked_fill(product, torch.isinf(s), 0)
    per_token = torch.sum(product, dim=-1).view(-1)
    return -torch.sum(per_token * MASK.view(-1), dim=0) / torch.sum(MASK.view(-1), dim=0)


def reverse_kl(s, t):
    own, infinite = F.softmax(s, dim=-1), torch.isinf(s)
    product = torch.masked_fill(own * F.log_softmax(t, dim=-1), infinite, 0)
    product = product - torch.masked_fill(own * F.log_softmax(s, dim=-1), infinite, 0)
    return -(product.sum(-1) * MASK).sum() / MASK.sum()


def difference(s, t):
    return (s.softmax(-1) * (s.log_softmax(-1) - t.log_softmax(-1))).sum(-1).mean()


def difference_of_logs(s, t):
    p = t.softmax(-1)
    return (p * (p.log() - s.log_softmax(-1))).sum(-1).mean()


def elementwise(s, t):
    return (F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="none").sum(-1) * MASK).sum() / MASK.sum()


def elementwise_of_logs(s, t):
    found = F.kl_div(F.log_softmax(s, -1), F.log_softmax(t, -1), reduction="none", log_target=True)
    return (found * MASK.unsqueeze(-1)).sum() / MASK.sum()


def with_a_temperature(s, t):
    return -(F.log_softmax(s / 2.0, -1) * F.softmax(t / 2.0, -1)).sum(dim=-1).mean() * 4.0


def flattened(s, t):
    s, t = s[:, :-1].reshape(-1, V), t[:, :-1].reshape(-1, V)
    return -(t.softmax(-1) * s.log_softmax(-1)).view(B, S - 1, V).sum(-1).mean()


def viewed(s, t):
    """A product of one head alone is still one head's after a view."""
    p = s.softmax(-1)
    return (p * s.log_softmax(-1) - p * t.log_softmax(-1)).view(-1, V).sum(-1).mean()


def masked_and_viewed(s, t):
    product = (t.softmax(-1) * s.log_softmax(-1)).masked_fill(s.isinf(), 0)
    return -(product.view(-1, V).sum(-1) * MASK.view(-1)).mean()


def against_another(s, t):
    """Not a KL: neither log_softmax is that of the softmax's logits."""
    return (t.softmax(-1) * (s.log_softmax(-1) - (s / 2).log_softmax(-1))).sum(-1).mean()


def symmetric(s, t):
    d = s.log_softmax(-1) - t.log_softmax(-1)
    return (s.softmax(-1) * d).sum(-1).mean() - (t.softmax(-1) * d / 3).sum(-1).mean()


def several_terms(s, t):
    p = t.softmax(-1)
    return (p * s.log_softmax(-1) - 2 * (p * t.log_softmax(-1)) + s.log_softmax(-1) + p * t.log_softmax(-1)).mean()


def jensen_shannon(s, t):
    p, q = s.softmax(-1), t.softmax(-1)
    m = (0.5 * (p + q)).log()
    each = F.kl_div(m, q, reduction="none").sum(-1) + F.kl_div(m, q.log(), reduction="none", log_target=True).sum(-1)
    return (each * MASK).sum() / 3 + F.kl_div(m, p, reduction="batchmean")


def skewed(s, t):
    """As DistiLLM writes it."""
    p, q = F.softmax(t, dim=-1), F.softmax(s, dim=-1)
    m = torch.log(0.1 * p + (1 - 0.1) * q)
    forward, backward = p * m - p * t.log_softmax(-1), q * s.log_softmax(-1) - q * m
    return -(forward.sum(-1) * MASK).sum() / MASK.sum() + (backward.view(-1, V).sum(-1) * MASK.view(-1)).mean()


def entropy_of_a_mixture(s, t):
    p, q = s.softmax(-1), t.softmax(-1)
    m = (0.25 * p + q * 0.75).log()
    return -(p * m).sum(-1).mean() * 0.25 - (q * m).sum(-1).mean() * 0.75


def jensen_shannon_of_logs(s, t):
    """As TRL and ms-swift write it, with weights in tensors."""
    share = torch.tensor(0.1, dtype=s.dtype)
    log_s, log_t = F.log_softmax(s, -1), F.log_softmax(t, -1)
    m = torch.stack([log_s + torch.log1p(-share), log_t + torch.log(share)]).logsumexp(dim=0)
    from_t, from_s = (F.kl_div(m, x, reduction="none", log_target=True) for x in (log_t, log_s))
    return (share * from_t + (1 - share) * from_s)[MASK.bool()].sum() / MASK.sum()


def jensen_shannon_of_a_mean(s, t):
    p, q = s.softmax(-1), t.softmax(-1)
    m = torch.stack([p, q], dim=1).mean(1).log()
    return torch.lerp(p * (p.log() - m), q * (q.log() - m), 0.5).sum(-1).mean()


def jensen_shannon_with_a_share(s, t):
    share = torch.tensor(0.1, dtype=s.dtype)
    p, q = s.softmax(-1), t.softmax(-1)
    m = (share * q + (1 - share) * p).log()
    from_t, from_s = F.kl_div(m, q, reduction="none"), F.kl_div(m, p, reduction="none")
    return (share * from_t + (1 - share) * from_s).sum(-1).mean()


def a_sum_of_both(s, t):
    """A mixture whose weights do not sum to 1."""
    log_s, log_t = s.log_softmax(-1), t.log_softmax(-1)
    m = torch.logaddexp(log_s - 1, log_t - 0.3) + 1
    forward, backward = t.softmax(-1) * (log_t - m), s.softmax(-1) * (log_s - m)
    return (2 * forward + backward).sum(-1).mean() + 3 * backward.lerp(forward, 1 / (1 + math.exp(-0.7))).sum(-1).mean()


def total_variation(s, t):
    """As DistiLLM writes it."""
    distance = 0.5 * torch.abs(F.softmax(t, -1) - F.softmax(s, -1))
    return (distance.sum(-1).view(-1) * MASK.view(-1)).sum() / MASK.sum() + (s.softmax(-1) - t.softmax(-1)).abs().mean()


def total_variation_of_halves(s, t):
    return (0.5 * s.softmax(-1) - 0.5 * t.softmax(-1)).abs().sum(-1).square().mean()


def of_a_cap(s, t):
    """Logits and their capped ones are of one head, but not the same."""
    return ((2 * torch.tanh(s / 2)).softmax(-1) * s.log_softmax(-1)).sum(-1).mean() + t.logsumexp(-1).mean()


def acceptance(s, t):
    """As speculators write it."""
    p, q = s.softmax(-1), t.softmax(-1)
    rate = torch.minimum(p, q).sum(-1)
    return -(rate.log() * MASK).sum() / MASK.sum() + (torch.min(q / 3, p / 3) * MASK[..., None]).sum(-1).square().sum()


def gaps(s, t):
    return (s.log_softmax(-1) - t.log_softmax(-1)).sum(-1).square().mean()


LOSSES = [forward_kl, reverse_kl, difference, difference_of_logs, elementwise, elementwise_of_logs, with_a_temperature]
LOSSES += [flattened, viewed, masked_and_viewed, against_another, symmetric, several_terms, gaps]
LOSSES += [jensen_shannon, skewed, entropy_of_a_mixture, jensen_shannon_of_logs, jensen_shannon_of_a_mean]
LOSSES += [jensen_shannon_with_a_share, a_sum_of_both, total_variation, acceptance]
LOSSES += [total_variation_of_halves, of_a_cap]


PROBS = torch.linspace(-3, 3, B * S * V, dtype=torch.float64).sin().mul(3).view(B, S, V).softmax(-1)
IDS = torch.arange(B * S).view(B, S) * 3


def dense_cross_entropy(s, t):
    return -(PROBS * F.log_softmax(s, -1)).sum(-1).mean() + 0 * t.sum()


def dense_difference(s, t):
    d = PROBS * (PROBS.log() - s.log_softmax(-1)) - PROBS * (t.log_softmax(-1) - PROBS.log())
    return (d.sum(-1) * MASK).sum() / MASK.sum()


def dense_elementwise(s, t):
    each = F.kl_div(F.log_softmax(s, -1), PROBS, reduction="none")
    each = each + F.kl_div(t.log_softmax(-1), PROBS.log(), reduction="none", log_target=True)
    return (each.transpose(1, 2)[:, :, 1:].sum(1) * MASK[:, 1:]).sum()


def dense_and_masked(s, t):
    """As DistiLLM writes it."""
    product = torch.masked_fill(PROBS * F.log_softmax(s, -1, dtype=torch.float64), torch.isinf(s), 0)
    return -(product.sum(-1).view(-1) * MASK.view(-1)).sum() + 0 * t.sum()


def smoothed_labels(s, t):
    """As the Annotated Transformer writes it."""
    smooth = torch.full_like(PROBS, 0.1 / (V - 1)).scatter_(-1, IDS[..., None], 0.9)
    return -(s.log_softmax(-1) * smooth).sum(-1).mean() + 0 * t.sum()


def one_hot(s, t):
    return -(F.one_hot(IDS, V) * s.log_softmax(-1)).sum() + 0 * t.sum()


def mixed_with_dense(s, t):
    return (PROBS * (0.5 * s.log_softmax(-1) + t.log_softmax(-1) - 3 * PROBS)).float().sum(-1).square().mean()


def r_drop(s, t):
    both = [F.kl_div(F.log_softmax(x, -1), F.softmax(y, -1), reduction="none") for x, y in ((s, t), (t, s))]
    for each in both:
        each.masked_fill_(MASK.unsqueeze(-1) == 0, 0.0)
    return (both[0].sum() + both[1].sum()) / 2


def scaled_in_place(s, t):
    each = F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="none")
    each *= MASK.unsqueeze(-1)
    each /= MASK.sum()
    shifted = s + 1
    shifted *= -0.1
    shifted += MASK.unsqueeze(-1)
    return each.sum() + shifted.gather(-1, IDS[..., None]).mean()


def reverse_against_dense(s, t):
    """As NeMo RL and speculators write it; the numbers need not be log-probabilities."""
    values = PROBS.log() + torch.linspace(-1, 1, V, device=s.device)
    p, log_p = s.softmax(-1), s.log_softmax(-1)
    each = (p * (log_p - values)).masked_fill(s.isinf(), 0).sum(-1) + F.kl_div(PROBS.log(), p, reduction="none").sum(-1)
    product = t.softmax(-1) * PROBS.log()
    product -= t.softmax(-1) * t.log_softmax(-1)
    return (each * MASK).sum() - product.mT.sum(1).square().sum()


def reverse_against_dense_at_once(s, t):
    found = F.kl_div(PROBS.log(), s.log_softmax(-1), reduction="batchmean", log_target=True)
    return found + 0.1 * F.kl_div(PROBS, t.softmax(-1), reduction="sum")


def soft_labels(s, t):
    found = F.cross_entropy(s.flatten(0, 1), t.softmax(-1).flatten(0, 1))
    smoothed = F.cross_entropy(s.mT, t.softmax(-1).mT, reduction="sum", label_smoothing=0.1)
    return found + smoothed / 7 + (F.cross_entropy(s.mT, t.softmax(-1).mT, reduction="none") * MASK).sum()


def tokens_where(s, t):
    """As verl writes it."""
    p, chosen = t.softmax(-1), MASK.bool()[..., None]
    each = torch.where(chosen, F.kl_div(s.log_softmax(-1), p, reduction="none"), 0.0)
    own = torch.where(~chosen, torch.zeros(()), s.softmax(-1) * s.log_softmax(-1))
    return each.sum() / 3 + F.kl_div(s.log_softmax(-1), p, reduction="none").where(~chosen, 0).sum() + own.sum()


def stabilised(s, t):
    """As Megatron, and as SpecForge with a share of the teacher's vocabulary, write it."""
    largest = s.max(-1, keepdim=True).values
    apart = s - largest
    log_p = apart.gather(-1, IDS[..., None]) - apart.exp().sum(-1, keepdim=True).log()
    target = (t[..., ::3] - t.logsumexp(-1, keepdim=True)).exp()
    cross = -(target * s[..., ::3].log_softmax(-1)).sum(-1)
    inverse = (2 * apart - 1).exp_().sum(-1) + (-2 * s.log_softmax(-1) + MASK[..., None]).exp().sum(-1) * 1e-4
    return log_p.mean() + (cross * MASK).sum() + inverse.log().sum() + (s.log_softmax(-1) - 1).exp()[..., 3].sum()


def read_at_ids(s, t):
    """An ensemble's likelihood, from probabilities and from their logarithms, and a log-ratio as in an implicit reward."""
    ids, log_s, log_t = IDS[..., None], s.log_softmax(-1), t.log_softmax(-1)
    mixed = (0.3 * s.softmax(-1) + 0.7 * t.softmax(-1)).gather(-1, ids).log() + log_s.logaddexp(log_t)[..., 3, None]
    ratio = (0.1 * (log_s - log_t) * MASK[..., None]).gather(-1, ids)
    each = F.kl_div(log_s, t.softmax(-1), reduction="none") + F.kl_div(log_s, PROBS, reduction="none")
    return mixed.mean() - ratio.sigmoid().log().mean() + each.mT.gather(1, IDS[:, None]).square().sum()


LOSSES += [reverse_against_dense, reverse_against_dense_at_once, soft_labels, tokens_where, stabilised, read_at_ids]
LOSSES += [dense_cross_entropy, dense_difference, dense_elementwise, smoothed_labels, one_hot, mixed_with_dense]
LOSSES += [r_drop, scaled_in_place]


def leaves(dtype=torch.float64, teacher_trains=False, bias=True):
    shapes = [(B, S, H), (V, H), (V,), (B, S, 5), (V, 5), (V,)]
    made = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    made[2], made[5] = (made[2], made[5]) if bias else (None, None)
    return [t if t is None else t.requires_grad_(teacher_trains or at < 3) for at, t in enumerate(made)]


def outcome(loss, inputs, lazy):
    """The loss, and its gradients."""
    inputs = [t if t is None else t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
    head = LinearLogits if lazy else F.linear
    with strict(lazy):
        found = loss(head(*inputs[:3]), head(*inputs[3:]))
    found.backward()
    return [found, *(t.grad for t in inputs if t is not None and t.requires_grad)]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("teacher_trains", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_unchanged_loss(loss, teacher_trains, bias, no_entries):
    inputs = leaves(teacher_trains=teacher_trains, bias=bias)
    torch.testing.assert_close(outcome(loss, inputs, True), outcome(loss, inputs, False))


@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0.0), torch.tensor(0)])
def test_a_0_of_any_kind_is_filled_in(zero, no_entries):
    def loss(s, t):
        return (t.softmax(-1) * s.log_softmax(-1)).masked_fill(s.isinf() | t.isinf(), zero).sum()

    inputs = leaves()
    torch.testing.assert_close(outcome(loss, inputs, True), outcome(loss, inputs, False))


@pytest.mark.parametrize(
    "loss",
    [forward_kl, difference, elementwise, symmetric, dense_difference, jensen_shannon_of_a_mean, total_variation]
    + [reverse_against_dense_at_once, soft_labels, stabilised, acceptance],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accuracy(loss, dtype):
    inputs = leaves(dtype)
    exact = [t if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    found, eager, expected = outcome(loss, inputs, True), outcome(loss, inputs, False), outcome(loss, exact, False)
    for a, b, c in zip(found[1:], eager[1:], expected[1:], strict=True):
        assert_accurate(a, b, c)


@pytest.mark.parametrize(
    ("loss", "kinds"),
    [
        (jensen_shannon_of_logs, ["jsd"]),
        (jensen_shannon_of_a_mean, ["jsd"]),
        (jensen_shannon_with_a_share, ["jsd"]),
        (entropy_of_a_mixture, ["skewed_kl", "skewed_kl"]),  # the two products are summed separately
        (a_sum_of_both, ["skewed_kl", "skewed_kl", "jsd"]),  # only the second sum has the mixture's shares
        (total_variation, ["tvd", "tvd"]),
        (symmetric, ["forward_kl", "forward_kl"]),
        (reverse_against_dense, ["reverse_kl"] * 3),
    ],
)
def test_passes_over_both_heads(loss, kinds, monkeypatch):
    original, found = lazy_products.token_divergence, []

    def token_divergence(*args):
        found.append(args[4].kind)
        return original(*args)

    monkeypatch.setattr(lazy_products, "token_divergence", token_divergence)
    outcome(loss, leaves(), True)
    assert sorted(found) == sorted(kinds)


def test_what_has_no_sum_makes_none_of_a_part(monkeypatch):
    inputs = leaves(bias=False)
    monkeypatch.setattr(lazy_products, "token_divergence", lambda *_: pytest.fail("thrown away"))
    found, expected = (
        (s.softmax(-1) * PROBS + t.softmax(-1) * s.log_softmax(-1)).sum(-1)
        for s, t in ((head(*inputs[:3]), head(*inputs[3:])) for head in (LinearLogits, F.linear))
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "share",
    [torch.linspace(0.1, 0.8, S, dtype=torch.float64).unsqueeze(-1), torch.tensor(0.3, dtype=torch.float64), 0.0],
    ids=["per_token", "trained", "none"],
)
@pytest.mark.filterwarnings("ignore:.*materialises")
def test_weights_of_a_mixture_that_no_host_can_read(share, request):
    if "trained" in request.node.name:
        share.requires_grad_()
    inputs, results = leaves(), []
    for head in (LinearLogits, F.linear):
        s, t = head(*inputs[:3]), head(*inputs[3:])
        log_share = torch.as_tensor(share, dtype=s.dtype).log()
        m = torch.logaddexp(s.log_softmax(-1), t.log_softmax(-1) + log_share)
        n = ((1 - share) * s.softmax(-1) + share * t.softmax(-1)).log()
        loss = (s.softmax(-1) * (s.log_softmax(-1) - m)).sum() + (s.softmax(-1) * n).sum()
        wanted = [*inputs[:3], *([share] if torch.is_tensor(share) and share.requires_grad else [])]
        results.append([loss, *torch.autograd.grad(loss, wanted)])
    torch.testing.assert_close(*results)


def test_numbers_per_token_may_change_afterwards():
    z, mask = LinearLogits(*leaves()[:3]), MASK.double().unsqueeze(-1)
    lazies = [z.log_softmax(-1) * mask, z.log_softmax(-1) + mask, z.softmax(-1) * z.log_softmax(-1) * mask]
    expected = [x.sum(-1) for x in lazies]
    mask.zero_()
    torch.testing.assert_close([x.sum(-1) for x in lazies], expected)


@pytest.mark.parametrize("first", [False, True])
def test_a_stack_with_what_exists(first):
    """As distillation losses make a mixture where the teacher's logits are a tensor."""
    inputs = leaves()

    def mixtures(z):
        log_p, p = z.log_softmax(-1) + math.log(0.3), z.softmax(-1)
        logs = [PROBS.log() + math.log(0.7), log_p] if first else [log_p, PROBS.log() + math.log(0.7)]
        m = torch.stack(logs, dim=1).logsumexp(1)
        halves = torch.stack([PROBS, p] if first else [p, PROBS]).mean(0)
        return (
            torch.stack(logs).dtype,
            (PROBS * m).sum(-1),
            F.kl_div(m, p, reduction="none").sum(-1),
            halves.log().mean(-1),
        )

    with strict():
        dtype, *found = mixtures(LinearLogits(*inputs[:3]))
    eager, *expected = mixtures(F.linear(*inputs[:3]))
    assert dtype == eager
    torch.testing.assert_close(found, expected)
    loss = [sum((t * torch.arange(1.0, t.numel() + 1).view(t.shape)).sum() for t in some) for some in (found, expected)]
    torch.testing.assert_close(*(torch.autograd.grad(t, inputs[:3]) for t in loss))
    z, p = LinearLogits(*inputs[:3]), PROBS.clone()
    stack = torch.stack([p, z.softmax(-1)] if first else [z.softmax(-1), p])
    torch.testing.assert_close(stack.materialize()[1 - first], p)
    p += 1  # eager's stack would hold a copy of its numbers
    with pytest.raises(RuntimeError, match="modified in place"):
        stack.sum(0)


def test_a_stack_of_both():
    inputs = leaves()
    s, t = LinearLogits(*inputs[:3]), LinearLogits(*inputs[3:])
    log_s = s.log_softmax(-1)
    stack = torch.stack([log_s, t.log_softmax(-1).float()], dim=-1)
    log_s *= 0  # the stack holds a copy of it
    assert (stack.shape, stack.dtype, stack.requires_grad) == ((B, S, V, 2), torch.float64, True)
    assert (stack.size(-1), stack.dim(), stack.numel(), len(repr(stack)) < 500) == (2, 4, B * S * V * 2, True)
    assert (stack.device, stack.is_cuda, stack.is_meta) == (s.device, False, False)
    eager = torch.stack([s.materialize().log_softmax(-1), t.materialize().log_softmax(-1).float()], dim=-1)
    with strict():
        assert stack.logsumexp(-1).dtype == torch.float64
        assert stack.mean(-1, dtype=torch.float32).dtype == torch.float32
    for fn in (
        lambda x: x[0],
        lambda x: x.logsumexp(2),
        lambda x: x.sum(-1, keepdim=True),
        lambda x: x.amax(-1),
        lambda x: x.mT * 2,
        lambda x: 1 - x,
        lambda x: torch.stack([*x.unbind(-1), *x.unbind(-1)]).logsumexp(0),
        lambda x: F.kl_div(s.log_softmax(-1)[..., None], x[..., :1], log_target=True),
    ):
        with pytest.warns(UserWarning, match="materialises a tensor made of LinearLogits"):
            torch.testing.assert_close(fn(stack), fn(eager))
    with pytest.warns(UserWarning, match="logsumexp materialises a tensor made of LinearLogits"):
        three = torch.stack([s.log_softmax(-1)] * 3).logsumexp(0)
    torch.testing.assert_close(three, s.materialize().log_softmax(-1) + math.log(3))


@pytest.mark.parametrize("of", [torch.log, torch.abs, lambda m: m.log() * 2])
def test_a_mixture_may_change_afterwards(of):
    s, t = (LinearLogits(*(x.detach() for x in side)) for side in (leaves()[:3], leaves()[3:]))
    m = s.softmax(-1) - t.softmax(-1) if of is torch.abs else s.softmax(-1) + t.softmax(-1)
    found = of(m)
    expected = found.materialize()
    m *= 3
    torch.testing.assert_close(found.materialize(), expected)


@pytest.mark.parametrize("offset", [79.0, -79.0])
@pytest.mark.filterwarnings("ignore:.*materialises")
def test_a_mixture_shifted_beyond_what_its_weights_hold(offset):
    inputs, results = leaves(), []
    for head in (LinearLogits, F.linear):
        s, t = head(*inputs[:3]), head(*inputs[3:])
        m = torch.logaddexp(s.log_softmax(-1), t.log_softmax(-1))
        for _ in range(10):
            m = m + offset
        results.append((s.softmax(-1) * m).sum(-1))
    torch.testing.assert_close(*results)


@pytest.mark.filterwarnings("ignore:.*materialises")
def test_a_distance_weighed_by_infinity():
    p, q = LinearLogits(*leaves()[:3]).softmax(-1), LinearLogits(*leaves()[3:]).softmax(-1)
    assert (math.inf * p - math.inf * q).abs().sum(-1).isnan().all()
    assert ((p - q) * math.inf).abs().sum(-1).isposinf().all()


@pytest.mark.parametrize(
    "stopped",
    [
        lambda p, q: p + q,
        lambda p, q: (p + q).log(),
        lambda p, q: (p - q).abs(),
        lambda p, q: torch.stack([p, q]).mean(0),
        lambda p, q: p.log() - q.log(),
        lambda p, q: q * (p.log() - q.log()),
        lambda p, q: F.kl_div(p.log(), q, reduction="none").masked_fill(MASK[..., None] == 0, 0),
        lambda p, q: torch.logaddexp(p.log(), q.log()) + 0.5,
    ],
)
def test_what_is_made_without_gradient_of_what_has_one_gets_none(stopped):
    s, t = LinearLogits(*leaves()[:3]), LinearLogits(*leaves()[3:])
    p, q = s.softmax(-1), t.softmax(-1)
    with_one = stopped(p, q)
    with torch.no_grad():
        found = stopped(p, q)
    assert (with_one.requires_grad, found.requires_grad) == (True, False)
    torch.testing.assert_close(found.materialize(), with_one.materialize().detach())


@pytest.mark.parametrize(
    "stopped",
    [
        lambda q, log_p, log_q: q * log_p,
        lambda q, log_p, log_q: log_p - log_q,
        lambda q, log_p, log_q: F.kl_div(log_p, q, reduction="none"),
    ],
)
def test_products_made_without_gradient_of_what_was_made_with_it_get_none(stopped):
    s, t = LinearLogits(*leaves()[:3]), LinearLogits(*leaves()[3:])
    operands = t.softmax(-1), s.log_softmax(-1), t.log_softmax(-1)
    with torch.no_grad():
        found = stopped(*operands)
    with_one = stopped(*operands)
    for each, has_one in ((with_one, True), (found, False)):
        assert (each.requires_grad, each.sum(-1).requires_grad) == (has_one, has_one)
    torch.testing.assert_close(found.sum(-1), with_one.sum(-1).detach())


def test_metrics_without_gradient_make_no_logits():
    s, t = LinearLogits(*leaves()[:3]), LinearLogits(*leaves()[3:])
    q, log_p, log_q = t.softmax(-1), s.log_softmax(-1), t.log_softmax(-1)
    with torch.no_grad(), strict():
        m = torch.logaddexp(log_p, log_q) - math.log(2)
        kls = F.kl_div(m, q, reduction="none"), F.kl_div(m, log_p, reduction="none", log_target=True)
        found = (0.5 * kls[0] + 0.5 * kls[1]).sum(-1)
    torch.testing.assert_close(found.mean(), jensen_shannon_of_a_mean(s, t).detach())


def test_a_mixture_where_both_underflow():
    inputs = leaves(torch.float32)
    with torch.no_grad():
        inputs[2][3] = inputs[5][3] = -200.0
    lazy, eager = (
        torch.logaddexp(*(head(*side).log_softmax(-1) - math.log(2) for side in (inputs[:3], inputs[3:])))
        for head in (LinearLogits, F.linear)
    )
    assert eager.isfinite().all()
    torch.testing.assert_close(lazy.materialize(), eager)


def test_the_teacher_may_be_read_under_no_grad():
    def loss(s, t):
        with torch.no_grad():
            p, log_p = t.softmax(-1), t.log_softmax(-1)
        return (p * (log_p - s.log_softmax(-1))).sum(-1).mean()

    inputs = leaves(teacher_trains=True)
    lazy, eager = outcome(loss, inputs, True), outcome(loss, inputs, False)
    torch.testing.assert_close(lazy, eager)
    assert [gradient is None for gradient in lazy[1:]] == [False] * 3 + [True] * 3


@pytest.mark.parametrize("banned", ["student", "teacher"])
def test_entries_that_a_bias_bans(banned):
    """−inf in one head: counted as 0 where the loss says so, else infinite where the other has mass."""
    inputs = leaves()
    with torch.no_grad():
        inputs[2 if banned == "student" else 5][3] = -torch.inf
    masked = outcome(forward_kl, inputs, True)
    torch.testing.assert_close(masked, outcome(forward_kl, inputs, False))
    assert masked[0].isfinite()

    def per_token(s, t):
        return -(t.softmax(-1) * s.log_softmax(-1)).sum(-1)

    heads = [(LinearLogits(*inputs[:3]), LinearLogits(*inputs[3:])), (F.linear(*inputs[:3]), F.linear(*inputs[3:]))]
    lazy, eager = (per_token(*pair) for pair in heads)
    torch.testing.assert_close(lazy, eager)
    assert bool(eager.isinf().all()) == (banned == "student")


def test_a_kl_with_masked_entries():
    def loss(s, t):
        p, infinite = t.softmax(-1), torch.isinf(s)
        parts = ((p * x.log_softmax(-1)).masked_fill(infinite, 0) for x in (t, s))
        return (next(parts) - next(parts)).sum(-1).mean()

    inputs = leaves()
    with torch.no_grad():
        inputs[2][3] = -torch.inf
    with strict():
        found = loss(LinearLogits(*inputs[:3]), LinearLogits(*inputs[3:]))
    torch.testing.assert_close(found, loss(F.linear(*inputs[:3]), F.linear(*inputs[3:])))


def reverse_kl_in_place(s, t):
    """As torchtune and DistiLLM write it."""
    own, infinite = F.softmax(s, dim=-1), torch.isinf(s) | torch.isinf(t)
    product = torch.masked_fill(own * F.log_softmax(t, dim=-1), infinite, 0)
    alias = product
    product -= torch.masked_fill(own * F.log_softmax(s, dim=-1), infinite, 0)
    return -(alias.sum(-1) * MASK).sum() / MASK.sum()


def entropy_of_masked_logs(s, t):
    """As MiniLLM writes it."""
    return -torch.sum(s.softmax(-1) * s.log_softmax(-1).masked_fill(torch.isinf(s), 0), dim=-1).mean() + 0 * t.sum()


@pytest.mark.parametrize("loss", [reverse_kl_in_place, entropy_of_masked_logs, dense_and_masked])
def test_in_place_and_masked_by_both(loss):
    inputs = leaves(bias=False)
    torch.testing.assert_close(outcome(loss, inputs, True), outcome(loss, inputs, False))


@pytest.mark.parametrize("banned", [2, 5])
def test_both_masks_where_a_bias_bans(banned):
    inputs = leaves()
    with torch.no_grad():
        inputs[banned][3] = -torch.inf
    heads = LinearLogits(*inputs[:3]), LinearLogits(*inputs[3:])
    with strict():
        found = reverse_kl_in_place(*heads)
    expected = reverse_kl_in_place(F.linear(*inputs[:3]), F.linear(*inputs[3:]))
    torch.testing.assert_close(found, expected)


def test_elements_where_a_teacher_has_no_mass():
    inputs = leaves()
    with torch.no_grad():
        inputs[5][3] = -torch.inf
    lazy, eager = (
        F.kl_div(head(*inputs[:3]).log_softmax(-1), head(*inputs[3:]).softmax(-1), reduction="none")
        for head in (LinearLogits, F.linear)
    )
    torch.testing.assert_close(lazy.materialize(), eager)
    torch.testing.assert_close(lazy.sum(-1), eager.sum(-1))


@pytest.mark.parametrize("of", [lambda x: x.view(-1, V), torch.detach, lambda x: x[:, 1:]])
@pytest.mark.parametrize(
    "make",
    [
        lambda s, t: t.softmax(-1) * s.log_softmax(-1),
        lambda s, t: s.log_softmax(-1),
        lambda s, t: s.softmax(-1) + t.softmax(-1),
    ],
    ids=["products", "expression", "mixture"],
)
def test_in_place_beside_a_view_is_refused(make, of):
    """The view would have to change with it."""
    inputs = leaves()
    s, t = LinearLogits(*inputs[:3]), LinearLogits(*inputs[3:])
    viewed = make(s, t)
    view = of(viewed)
    for x in (viewed, view):
        with pytest.raises(RuntimeError, match=r"__imul__ would change a tensor made of LinearLogits .*view"):
            x *= 2
    copy = viewed[torch.arange(B)]
    copy *= 2
    torch.testing.assert_close(copy.materialize(), viewed.materialize() * 2)


def test_in_place_without_gradient_is_refused_where_there_is_one():
    log_p = LinearLogits(*leaves()[:3]).log_softmax(-1)
    with torch.no_grad(), pytest.raises(RuntimeError, match="out-of-place"):
        log_p *= 2


def test_a_tensor_among_them_may_not_change():
    log_p, probs = LinearLogits(*leaves()[:3]).log_softmax(-1), PROBS.clone()
    product, total = probs * log_p, log_p + probs
    view = product.view(-1, V)
    probs.zero_()
    for x in (product, view, total):
        with pytest.raises(RuntimeError, match=r"tensor \(.*37\) was modified in place"):
            x.sum(-1)


@pytest.mark.parametrize("target", [PROBS.to("meta"), PROBS.long(), PROBS[:, :1]])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.filterwarnings("ignore:.*materialises")
def test_targets_that_do_not_fit(target, reduction):
    """PyTorch's result, or an error that says what to do."""
    lazy = LinearLogits(*leaves()[:3])
    try:
        expected = F.kl_div(lazy.materialize().log_softmax(-1), target, reduction=reduction)
    except RuntimeError:
        with pytest.raises(RuntimeError, match=r"device|Integral|move one"):
            F.kl_div(lazy.log_softmax(-1), target, reduction=reduction)
    else:
        found = F.kl_div(lazy.log_softmax(-1), target, reduction=reduction)
        torch.testing.assert_close(found if torch.is_tensor(found) else found.materialize(), expected)


def test_probabilities_that_train():
    inputs = leaves()
    results = []
    for head in (LinearLogits, F.linear):
        start = PROBS.log().requires_grad_()
        with strict():
            loss = (start.softmax(-1) * (start.log_softmax(-1) - head(*inputs[:3]).log_softmax(-1))).sum(-1).mean()
        results.append([loss, *torch.autograd.grad(loss, [start, *inputs[:3]])])
    torch.testing.assert_close(*results)


def test_what_is_added_to_masked_entries_stays():
    inputs = leaves()
    with torch.no_grad():
        inputs[2][3] = -torch.inf

    def total(s, t):
        return ((t.softmax(-1) * s.log_softmax(-1)).masked_fill(s.isinf(), 0) + PROBS).sum(-1)

    with strict():
        found = total(LinearLogits(*inputs[:3]), LinearLogits(*inputs[3:]))
    torch.testing.assert_close(found, total(F.linear(*inputs[:3]), F.linear(*inputs[3:])))


def test_a_tensor_taken_without_gradient_gets_none():
    s, probs = LinearLogits(*(t.detach() for t in leaves()[:3])), PROBS.clone().requires_grad_()
    with torch.no_grad():
        product = probs * s.log_softmax(-1)
    assert not product.requires_grad
    assert not product.sum(-1).requires_grad
    assert (probs * s.log_softmax(-1)).requires_grad


def test_masked_tokens_count_as_0_whatever_they_are():
    inputs = leaves(bias=False)
    with torch.no_grad():
        inputs[0][0, 1] = torch.nan
    s, t = LinearLogits(*inputs[:3]), LinearLogits(*inputs[3:])
    product = (t.softmax(-1) * s.log_softmax(-1)).masked_fill(~MASK.bool().unsqueeze(-1), 0)
    with strict():
        found, flat, rest = product.sum(-1), product.view(-1, V)[MASK.view(-1) == 0], product.detach().mT[..., 1:]
        assert found.isfinite().all()
        assert found.requires_grad
        assert not found[MASK == 0].any()
        assert flat.sum() == 0
        torch.testing.assert_close(rest.sum(1), found.detach()[:, 1:])
    elements = product.materialize()
    torch.testing.assert_close(found, elements.sum(-1))
    emptied = product.masked_fill(MASK.unsqueeze(-1) == 1, 0)
    torch.testing.assert_close(emptied.materialize(), torch.zeros_like(elements))
    other = product - t.log_softmax(-1).masked_fill(MASK.unsqueeze(-1) == 1, 0)
    torch.testing.assert_close(
        other[1].materialize(), elements[1] - t[1].materialize().log_softmax(-1) * (MASK[1, :, None] == 0)
    )


def test_what_it_is_and_its_elements():
    inputs = leaves()
    s, t = LinearLogits(*inputs[:3]), LinearLogits(*inputs[3:])
    eager_s, eager_t = s.materialize(), t.materialize()
    made = {
        "products": (
            t.softmax(-1) * s.log_softmax(-1) * MASK.unsqueeze(-1),
            lambda s, t: t.softmax(-1) * s.log_softmax(-1) * MASK[..., None],
        ),
        "difference": (
            (s.log_softmax(-1) - t.log_softmax(-1)).transpose(1, 2),
            lambda s, t: (s.log_softmax(-1) - t.log_softmax(-1)).mT,
        ),
        "masked": (
            (t.softmax(-1) * s.log_softmax(-1)).masked_fill(s.isinf(), 0) / 3,
            lambda s, t: t.softmax(-1) * s.log_softmax(-1) / 3,
        ),
    }
    for lazy, eager in made.values():
        assert isinstance(lazy, LazyProducts)
        assert lazy.requires_grad
        assert not lazy.detach().requires_grad
        expected = eager(eager_s, eager_t)
        assert (lazy.shape, lazy.dtype) == (expected.shape, expected.dtype)
        torch.testing.assert_close(lazy.materialize(), expected)
        assert lazy.float().dtype == torch.float32
    with pytest.warns(UserWarning, match="sort materialises a tensor made of LinearLogits"):
        torch.testing.assert_close(made["products"][0].sort(), made["products"][1](eager_s, eager_t).sort())
    infinite = s.isinf()
    assert infinite.to("cpu") is infinite
    with pytest.warns(UserWarning, match="__getitem__ materialises"):
        assert s[infinite].numel() == 0
    assert (infinite.dtype, infinite.requires_grad, infinite.is_floating_point()) == (torch.bool, False, False)
    with pytest.warns(UserWarning, match="materialises"):
        assert not infinite.any()
    with pytest.warns(UserWarning, match="materialises"):
        torch.testing.assert_close(infinite * 2, eager_s.isinf() * 2)


@pytest.mark.parametrize(
    "losses",
    [
        [forward_kl, difference, elementwise, jensen_shannon, dense_difference, r_drop, jensen_shannon_of_a_mean],
        [reverse_against_dense, reverse_against_dense_at_once, soft_labels, tokens_where, stabilised, acceptance],
    ],
    ids=["some", "others"],
)
def test_compiles_without_a_break(losses):
    inputs = leaves(torch.float32)

    def loss(*inputs):
        s, t = LinearLogits(*inputs[:3]), LinearLogits(*inputs[3:])
        return sum(loss(s, t).float() for loss in losses)

    expected = torch.autograd.grad(loss(*inputs), inputs[:3])
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), inputs[:3])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "fn",
    [
        lambda s, t: (0.5 * (s.softmax(-1) - t.softmax(-1)).abs()).sum(-1),
        lambda s, t: (s.softmax(-1) + t.softmax(-1)).log().sum(-1),
        lambda s, t: ((s.softmax(-1) + t.softmax(-1)) / 2).log().sum(-1),
        lambda s, t: (s.softmax(-1) * (s.softmax(-1) + t.softmax(-1)).log()).sum(-1),
        lambda s, t: (s.softmax(-1) * (0.5 * s.softmax(-1) + s.softmax(-1) / 2).log()).sum(-1),
        lambda s, t: (0.3 * s.softmax(-1) + 0.7 * t.softmax(-1)).transpose(1, 2).amax(1),
        lambda s, t: (s.softmax(-1) + t.softmax(-1)) * s.log_softmax(-1),
        lambda s, t: s.softmax(-1) - s.tanh(),
        lambda s, t: s.softmax(-1) + s.tanh(),
        lambda s, t: t.softmax(-1) - s.log_softmax(-1),
        lambda s, t: s.isinf() * s.softmax(-1),
        lambda s, t: s.softmax(-1) * s.isinf(),
        lambda s, t: ((s.softmax(-1) + t.softmax(-1)) / 2).log() * (s / 2).softmax(-1),
        lambda s, t: F.kl_div(s.log_softmax(-1) - t.log_softmax(-1), t.softmax(-1), reduction="sum"),
        lambda s, t: (s.softmax(-1) * (s.log_softmax(-1) - PROBS.log())).sum(-1),
        lambda s, t: (PROBS * (0.5 * (s.softmax(-1) + t.softmax(-1))).log()).sum(-1),
        lambda s, t: F.kl_div((0.5 * (s.softmax(-1) + t.softmax(-1))).log(), PROBS, reduction="sum"),
        lambda s, t: PROBS * (t.softmax(-1) * s.log_softmax(-1)),
        lambda s, t: (t.softmax(-1) * s.log_softmax(-1)) * MASK[..., None].double() + PROBS,
        lambda s, t: (s.log_softmax(-1) - t.log_softmax(-1)).masked_fill(MASK[..., None] == 0, 0) + PROBS,
        lambda s, t: PROBS * s.softmax(-1),
        lambda s, t: s.log_softmax(-1) * PROBS[:1],
        lambda s, t: torch.lerp(s.log_softmax(-1), t.log_softmax(-1), PROBS[:, :, :1]),
        lambda s, t: torch.lerp(s, t.log_softmax(-1), 0.3),
        lambda s, t: torch.lerp(s.log_softmax(-1), PROBS, 0.3),
        lambda s, t: torch.logaddexp(s.log_softmax(-1), t.log_softmax(-1)) * 2 + 1,
        lambda s, t: -torch.logaddexp(s.log_softmax(-1), t.log_softmax(-1)) - math.log(2),
        lambda s, t: torch.logaddexp(s.log_softmax(-1), t.log_softmax(-1)) + 100,
        lambda s, t: (s.softmax(-1) - t.softmax(-1)).abs() + 1,
        lambda s, t: (s.softmax(-1) - t.softmax(-1)).abs() * s.softmax(-1),
        lambda s, t: ((s.softmax(-1) - t.softmax(-1)).abs() * PROBS).sum(-1),
        lambda s, t: ((s.softmax(-1) - t.softmax(-1)).abs() + PROBS + s.log_softmax(-1)).sum(-1),
        lambda s, t: (0.3 * s.softmax(-1) - t.softmax(-1)).abs(),
        lambda s, t: torch.logaddexp(s.log_softmax(-1), PROBS.log()),
        lambda s, t: torch.stack([s.log_softmax(-1), PROBS.log()]).logsumexp(0),
        lambda s, t: s.log_softmax(-1) * PROBS.to(torch.complex128),
    ],
)
@pytest.mark.filterwarnings("ignore:.*materialises")
def test_what_else_is_done_with_them(fn):
    inputs = leaves()
    found = fn(LinearLogits(*inputs[:3]), LinearLogits(*inputs[3:]))
    found = found if isinstance(found, torch.Tensor) else found.materialize()
    torch.testing.assert_close(found, fn(F.linear(*inputs[:3]), F.linear(*inputs[3:])))


def test_heads_that_do_not_fit_materialise():
    inputs = leaves()
    s, t = LinearLogits(*inputs[:3]), LinearLogits(*inputs[3:])
    with pytest.warns(UserWarning, match="materialises"):
        found = s.softmax(-1) * t[:, :1].log_softmax(-1)
    torch.testing.assert_close(found, s.materialize().softmax(-1) * t[:, :1].materialize().log_softmax(-1))


def test_entries_that_a_mask_names():
    """They belong to terms with probabilities that exist, as ROLL and DistiLLM write them."""
    inputs, probs, entries = leaves(bias=False), PROBS.clone().requires_grad_(), PROBS.gt(PROBS.mean())
    results = []
    for head in (LinearLogits, F.linear):
        s = head(*inputs[:3])
        with strict():
            product = (probs * s.log_softmax(-1)).masked_fill(s.isinf() | entries, 0)
            kl = (probs * (probs.log() - s.log_softmax(-1))).masked_fill_(entries, 0.0)
        loss = product.sum() + kl.sum(-1).square().sum()
        results.append([loss, *torch.autograd.grad(loss, [*inputs[:2], probs])])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
    z = LinearLogits(*inputs[:3])
    product, mask = PROBS * z.log_softmax(-1), z.isinf() | entries
    entries.zero_()
    with pytest.raises(RuntimeError, match="modified in place"):
        product.masked_fill(mask, 0)


@pytest.mark.parametrize(
    "fn",
    [
        lambda s, t: (PROBS * s.log_softmax(-1)).masked_fill(PROBS > 0.04, 0),  # a bias may be −inf
        lambda s, t: (s.softmax(-1) * (s.log_softmax(-1) - PROBS)).masked_fill(PROBS > 0.04, 0),
        lambda s, t: (s.softmax(-1) * PROBS).sum(-1),
        lambda s, t: (s.softmax(-1) * (PROBS - t.log_softmax(-1))).sum(-1),
        lambda s, t: torch.where(PROBS > 0.04, s.softmax(-1), 0.0),
        lambda s, t: torch.where(MASK[..., None] > 0, s.softmax(-1) * t.log_softmax(-1), 1.0),
        lambda s, t: torch.where(MASK[..., None] > 0, s.log_softmax(-1), t.log_softmax(-1)),
        lambda s, t: torch.where(s.isinf(), 0.0, s.log_softmax(-1)),
        lambda s, t: F.cross_entropy(s.mT, t.softmax(-1).mT, weight=PROBS[0, 0]),
        lambda s, t: F.cross_entropy(s.mT, 0.5 * t.softmax(-1).mT),
        lambda s, t: torch.minimum(s.softmax(-1), 0.5 * t.softmax(-1)).sum(-1),
        lambda s, t: torch.minimum(-s.softmax(-1), -t.softmax(-1)).sum(-1),
        lambda s, t: torch.minimum(s.softmax(-1), PROBS).sum(-1),
        lambda s, t: torch.min(s, t),
        lambda s, t: torch.minimum(s.softmax(-1), t.softmax(-1)) * PROBS,
        lambda s, t: s.isinf() | (PROBS > 0.04),
        lambda s, t: s.isnan().any((1, 2)),
        lambda s, t: torch.stack(torch.where(s.softmax(-1))),
        lambda s, t: torch.where(MASK[..., None].byte() == 1, s.log_softmax(-1), 0).sum(1),
        lambda s, t: F.cross_entropy(s.mT, t.mT),
        lambda s, t: F.cross_entropy(s.mT, t.log_softmax(-1).mT),
        lambda s, t: F.cross_entropy(s.mT, t.softmax(-1).mT, size_average=False),
        lambda s, t: F.nll_loss(s.mT, IDS),
        lambda s, t: F.nll_loss(s.softmax(-1).mT, IDS),
        lambda s, t: F.nll_loss(s.log_softmax(-1), torch.arange(B * V).view(B, V) % S),
        lambda s, t: F.kl_div(s.softmax(-1), PROBS, reduction="sum"),
        lambda s, t: F.kl_div(2 * s.log_softmax(-1), PROBS, reduction="sum"),
        lambda s, t: F.kl_div(2 * s.log_softmax(-1), t.softmax(-1), reduction="sum"),
        lambda s, t: F.kl_div(s.log_softmax(-1), 0.5 * t.softmax(-1), reduction="sum"),
        lambda s, t: F.mse_loss(s, PROBS, weight=PROBS),
        lambda s, t: F.kl_div(s, t.softmax(-1), reduction="sum"),
        lambda s, t: F.kl_div(s.log_softmax(-1), -t.log_softmax(-1), reduction="sum"),
        lambda s, t: F.cross_entropy(s.mT, t[:, :, :1].softmax(-1).expand_as(PROBS).mT),
        lambda s, t: s.exp(),
        lambda s, t: (1000 * s - 5).exp(),
        lambda s, t: (s.log_softmax(-1) + 1000).exp(),
        lambda s, t: (s + 2).exp(),
        lambda s, t: (s.log_softmax(-1) - 100).exp(),
    ],
)
@pytest.mark.filterwarnings("ignore:.*materialises")
def test_what_is_like_those(fn):
    test_what_else_is_done_with_them(fn)


@pytest.mark.filterwarnings("ignore:.*materialises")
def test_entries_that_a_mask_names_and_a_bias_bans():
    hidden, weight, bias, *_ = (t if t is None else t.detach() for t in leaves())
    bias[2] = -math.inf
    results = []
    for head in (LinearLogits, F.linear):
        product = PROBS * head(hidden, weight, bias).log_softmax(-1)
        results.append(product.masked_fill(torch.arange(V).eq(2).expand(B, S, V), 0).sum(-1))
    assert results[1].isfinite().all()
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "fn",
    [
        lambda s, t: F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean"),
        lambda s, t: s.softmax(-1) * t.log_softmax(-1),
        lambda s, t: s.log_softmax(-1) - t.log_softmax(-1),
        lambda s, t: (s.softmax(-1) + t.softmax(-1)) / 2,
        lambda s, t: torch.logaddexp(s.log_softmax(-1), t.log_softmax(-1)),
        lambda s, t: F.cross_entropy(s.flatten(0, 1), t.softmax(-1).flatten(0, 1)),
    ],
)
def test_vocabularies_of_different_sizes_are_named_before_either_is_made(fn):
    s, t = LinearLogits(*leaves()[:3]), LinearLogits(torch.randn(B, S, 5).double(), torch.randn(V + 3, 5).double())
    with pytest.raises(RuntimeError, match=rf"have \d+ and \d+ entries: take \[\.\.\., :{V}\] of the larger"):
        fn(s, t)
    fn(s, t[..., :V])


def changed_by_a_mask(s, t):
    """As ROLL writes it."""
    each = F.kl_div(PROBS.log(), s.log_softmax(-1), reduction="none", log_target=True)
    each.masked_fill_(PROBS > 0.04, 0.0)
    product = s.softmax(-1) * PROBS.log()
    product[~MASK.bool()] = 0.5
    product *= 2
    e = (s.detach() - s.detach().max(-1, keepdim=True).values).exp()
    e[:, :, 3:5] = 0
    e /= e.sum(-1, keepdim=True)
    logp, mixed = 2 * s.log_softmax(-1), (s.softmax(-1) + t.softmax(-1)) / 2
    logp.clamp_(min=-3.0)
    mixed.log_().mul_(MASK[..., None])
    product = product + e * PROBS.log() + logp - mixed.masked_fill(PROBS < 0.02, 1.0)
    return (each.sum(-1) * MASK).sum() + product.mT.sum(1).square().sum() + (product - each + PROBS).sum(-1).mean()


@pytest.mark.filterwarnings("ignore:.*materialises")
def test_changes_in_place_that_make_the_elements():
    inputs = leaves()
    results = []
    for head in (LinearLogits, F.linear):
        loss = changed_by_a_mask(head(*inputs[:3]), head(*inputs[3:]))
        results.append([loss, *torch.autograd.grad(loss, inputs[:3])])
    torch.testing.assert_close(*results)
    s = LinearLogits(*inputs[:3])
    with strict(), pytest.raises(RuntimeError, match="__setitem__ materialises a tensor made of LinearLogits"):
        changed_by_a_mask(s, s)
    product, softmax = s.softmax(-1) * PROBS, s.softmax(-1)
    for x in (product, product.view(-1, V), softmax, softmax.detach()):
        # Before any element is materialised.
        with strict(), pytest.raises(RuntimeError, match="its views would not follow"):
            x.masked_fill_(PROBS.view(x.shape) > 0.04, 0.0)
    product = s.softmax(-1) * PROBS
    with torch.no_grad(), pytest.raises(RuntimeError, match="would lose its gradient"):
        product.masked_fill_(PROBS > 0.04, 0.0)


EMPTY = torch.tensor([[False] * S, [True, True, False, True, True, True]])  # a sequence without tokens


def kl(s, t):
    return F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="none")


def per_sequence(s, t):
    """The loss of a sequence without tokens is nan; its rows, left out by hand, spoil no gradient."""
    each = (kl(s, t).masked_fill(~EMPTY[..., None], 0) / EMPTY.sum(-1)[:, None, None]).sum((-1, -2))
    return each[EMPTY.any(-1)].sum() + each.detach().isnan().sum()


def per_sequence_where(s, t):
    return (torch.where(EMPTY[..., None], kl(s, t), 0) / EMPTY.sum(-1)[:, None, None]).sum(-1)[EMPTY].sum()


def entries_of_whole_tokens(s, t):
    each = F.kl_div(s.log_softmax(-1), PROBS, reduction="none").masked_fill(~EMPTY[..., None].expand(B, S, V), 0)
    return each.sum()


@pytest.mark.parametrize("loss", [per_sequence, per_sequence_where, entries_of_whole_tokens])
def test_tokens_that_are_left_out(loss):
    inputs = leaves(bias=False)
    if loss is entries_of_whole_tokens:
        with torch.no_grad():
            inputs[0][0] = torch.nan  # padding
    with strict():
        found = outcome(loss, inputs, lazy=True)
    torch.testing.assert_close(found, outcome(loss, inputs, lazy=False), equal_nan=True)
    assert found[0].isfinite()


@pytest.mark.parametrize("of", [lambda p: p, lambda p: 1 - p])
def test_probabilities_sum_to_1_but_for_a_nan(of):
    inputs = leaves()
    with torch.no_grad():
        inputs[0][0, 0] = torch.nan
    with strict():
        total = of(LinearLogits(*inputs[:3]).softmax(-1)).sum(-1)
    expected = of(F.linear(*inputs[:3]).softmax(-1)).sum(-1)
    torch.testing.assert_close(total, expected, equal_nan=True)
    for gradient in torch.autograd.grad(total[1].sum(), inputs[1:3]):
        assert (gradient.nan_to_num(0) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_smoothed_cross_entropy_with_a_teacher(dtype):
    def loss(s, t):
        return F.cross_entropy(s.flatten(0, 1), t.softmax(-1).flatten(0, 1), label_smoothing=0.1)

    inputs = leaves(dtype)
    with strict():
        found = outcome(loss, inputs, lazy=True)
    torch.testing.assert_close(found, outcome(loss, inputs, lazy=False))


@pytest.mark.filterwarnings("ignore:.*materialises")
@pytest.mark.parametrize(
    "kl",
    [
        lambda z, p: F.kl_div(z.log_softmax(-1), p, reduction="none").sum(-1),
        lambda z, p: torch.stack([F.kl_div(x.log_softmax(-1), t, reduction="sum") for x, t in zip(z, p, strict=True)]),
        lambda z, p: (p * (p.log() - z.log_softmax(-1))).sum(-1),
    ],
    ids=["none", "sum", "difference"],
)
def test_a_small_kl_from_probabilities_keeps_its_digits(kl):
    hidden, weight = torch.randn(64, 16), torch.randn(8000, 16)
    p = (hidden @ (weight + 1e-3 * torch.randn_like(weight)).T).softmax(-1)
    z = hidden.double() @ weight.double().T
    exact = (p.double() * (p.double().log() - z.log_softmax(-1))).sum(-1)
    lazy, eager = ((kl(x, p) - exact).abs().mean() for x in (LinearLogits(hidden, weight), hidden @ weight.T))
    assert lazy < eager / 3


def test_the_kl_div_of_aten_counts_its_reductions():
    s, t = (LinearLogits(*x) for x in (leaves()[:3], leaves()[3:]))
    for options in ({}, {"reduction": 1}):
        found = torch.kl_div(s.log_softmax(-1), t.softmax(-1), **options)
        found = found if torch.is_tensor(found) else found.materialize()
        expected = torch.kl_div(*(x.materialize() for x in (s.log_softmax(-1), t.softmax(-1))), **options)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("loss", [F.kl_div, F.cross_entropy, F.mse_loss])
def test_an_unknown_reduction(loss):
    s, t = (LinearLogits(*x) for x in (leaves()[:3], leaves()[3:]))
    with pytest.raises(ValueError, match="foo is not a valid value for reduction"):
        loss(s.log_softmax(-1).flatten(0, 1), t.softmax(-1).flatten(0, 1), reduction="foo")


@pytest.mark.filterwarnings("ignore:.*materialises")
def test_probabilities_have_no_class_to_ignore():
    s, t = (LinearLogits(*x).flatten(0, 1) for x in (leaves()[:3], leaves()[3:]))
    with pytest.raises(RuntimeError, match="ignore_index is not supported for floating point target"):
        F.cross_entropy(s, t.softmax(-1), ignore_index=0)


def test_losses_of_16_bit_heads_have_the_dtype_of_what_they_are_of():
    s = LinearLogits(*(x.bfloat16() for x in leaves()[:3]))
    eager = s.materialize()
    found, expected = (F.nll_loss(z.log_softmax(-1, dtype=torch.float32).mT, IDS) for z in (s, eager))
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
    found, expected = (F.kl_div(z.log_softmax(-1), PROBS.float(), reduction="none") for z in (s, eager))
    assert found.dtype == expected.dtype


def test_a_label_smoothing_beyond_1():
    s, t = (LinearLogits(*x).flatten(0, 1) for x in (leaves()[:3], leaves()[3:]))
    with pytest.raises(RuntimeError, match=r"label_smoothing must be between 0.0 and 1.0. Got: 2"):
        F.cross_entropy(s, t.softmax(-1), label_smoothing=2.0)


def test_what_was_only_looked_at_can_be_changed():
    s = LinearLogits(*leaves()[:3])
    for x in (s.log_softmax(-1), s - s.logsumexp(-1, keepdim=True)):
        kept = x.materialize()
        with strict():
            x.argmax(-1)
            x.mul_(0.5)
        torch.testing.assert_close(x.materialize(), kept / 2)


def test_copies_of_products_with_a_tensor():
    t = LinearLogits(*leaves()[3:])
    product, entropies = PROBS * t.detach().log_softmax(-1), t.detach().log_softmax(-1)
    for copied in (copy.deepcopy(product), pickle.loads(pickle.dumps(product))):
        torch.testing.assert_close(copied.sum(-1), product.sum(-1))
    view = entropies[:1]
    other = copy.deepcopy(entropies)
    other.mul_(2)
    torch.testing.assert_close(other.sum(-1)[:1], 2 * view.sum(-1))


def test_a_mask_changed_in_place():
    s = LinearLogits(*leaves(bias=False)[:2])
    mask = s.isinf()
    with pytest.warns(UserWarning, match="__setitem__ materialises a tensor made of LinearLogits"):
        mask[..., 3] = True
    mask.logical_or_(PROBS > 0.045)
    expected = PROBS > 0.045
    expected[..., 3] = True
    assert torch.equal(mask.materialize(), expected)
    assert torch.equal(mask[1:, :2].materialize(), expected[1:, :2])
    assert mask[1:, :2].shape == (1, 2, V)
    found = (PROBS * s.log_softmax(-1)).masked_fill(mask, 0).sum(-1)
    torch.testing.assert_close(found, (PROBS * s.log_softmax(-1)).materialize().masked_fill(expected, 0).sum(-1))
    mask = s.isinf()
    view = mask[:1]
    with pytest.raises(RuntimeError, match="its views would not follow"):
        mask[..., 3] = True
    assert not view.materialize().any()


@pytest.mark.parametrize("form", ["p_log_p", "log_softmax"])
def test_whole_tokens_emptied_in_place(form):
    s = LinearLogits(*leaves()[:3])
    x, same = (s.softmax(-1) * s.log_softmax(-1) if form == "p_log_p" else s.log_softmax(-1) for _ in range(2))
    with strict():
        x.masked_fill_(MASK[..., None] == 0, 0)
        torch.testing.assert_close(x.sum(-1), same.masked_fill(MASK[..., None] == 0, 0).sum(-1))
    assert (x.sum(-1) == 0).tolist() == (MASK == 0).tolist()


def test_names_of_arguments():
    s, t = (LinearLogits(*x) for x in (leaves()[:3], leaves()[3:]))
    z = s.materialize()
    with strict():
        torch.testing.assert_close(torch.min(input=s, dim=-1).values, z.min(-1).values)
        found = kl(s, t).where(condition=EMPTY[..., None], other=torch.zeros((), dtype=torch.float64)).sum(-1)
        torch.testing.assert_close(found, kl(s, t).sum(-1) * EMPTY)
        torch.testing.assert_close((+s).sum(-1), z.sum(-1))
        assert torch.result_type(tensor=s, other=PROBS) == torch.float64
        assert s.requires_grad_() is s
    stacked = torch.stack([s.log_softmax(-1), t.log_softmax(-1)])
    with pytest.warns(UserWarning, match="clone materialises"):
        assert torch.equal(torch.clone(input=stacked), stacked.materialize())


@pytest.mark.parametrize(
    "fn",
    [
        lambda s, t: (s.softmax(-1) - t.softmax(-1)).abs()[1:].sum(-1),
        lambda s, t: (s.softmax(-1) - t.softmax(-1)).abs().detach().sum(-1),
        lambda s, t: torch.minimum(s.softmax(-1), t.softmax(-1)).flatten(0, 1).sum(-1),
        lambda s, t: copy.copy(s.softmax(-1) * t.log_softmax(-1)).sum(-1),
    ],
)
def test_views_of_a_distance_and_copies_stay_lazy(fn):
    hidden, weight, other = torch.randn(B, S, H), torch.randn(V, H), torch.randn(V, H)
    with strict():
        found = fn(LinearLogits(hidden, weight), LinearLogits(hidden, other))
    torch.testing.assert_close(found, fn(hidden @ weight.T, hidden @ other.T))


def test_each_says_what_it_is():
    a, b = (LinearLogits(torch.randn(B, S, H), torch.randn(V, H)) for _ in range(2))
    for x in (a.softmax(-1) - b.softmax(-1), a.softmax(-1) * b.log_softmax(-1), a.isinf(), a.isfinite()):
        assert repr(x).startswith(f"{type(x).__name__}({(B, S, V)}")


@pytest.mark.parametrize(
    "fn",
    [
        lambda z: z.softmax(-1) * PROBS,
        lambda z: z.log_softmax(-1) * PROBS,
        lambda z: F.kl_div(z.log_softmax(-1), PROBS, reduction="none"),
    ],
)
def test_a_product_crosses_the_border_of_compiled_code(fn):
    h, w = torch.randn(B, S, H, dtype=torch.float64), torch.randn(V, H, dtype=torch.float64)
    expected = fn(F.linear(h, w)).sum(-1)
    torch._dynamo.reset()
    # Before 2.12, Dynamo cannot return an object made in compiled code.
    if torch.torch_version.TorchVersion(torch.__version__) >= (2, 12):
        made = torch.compile(fn, backend="eager")(LinearLogits(h, w))
        torch.testing.assert_close(made.sum(-1), expected)
    read = torch.compile(lambda x: x.sum(-1), backend="eager")(fn(LinearLogits(h, w)))
    torch.testing.assert_close(read, expected)


@pytest.mark.filterwarnings("ignore:.*materialises")
def test_means_of_what_is_no_float():
    h, w = torch.randn(B, S, H), torch.randn(V, H)
    for z in (LinearLogits(h, w), F.linear(h, w)):
        for x in (z.softmax(-1) > 0.03, torch.where(z.softmax(-1) > 0.03, 1, 0)):
            with pytest.raises(RuntimeError, match=r"mean\(\)"):
                x.mean(-1)
    shares = [(z.softmax(-1) > 0.03).mean(-1, dtype=torch.float64) for z in (LinearLogits(h, w), F.linear(h, w))]
    torch.testing.assert_close(*shares)
