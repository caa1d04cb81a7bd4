"""log_softmax of LinearLogits as hand-written losses call it, and what they compute from it."""

import pytest
import torch
from lazy_logits import IDS, PICK, B, H, S, V, make

from fused_losses import settings
from fused_losses.linear_logits import LinearLogits


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


def by_a_normalizer_that_keeps_its_gradient(z):
    total = z.logsumexp(-1, keepdim=True)
    total.retain_grad()
    loss = (z - total).gather(-1, IDS[..., None]).sum()
    torch.autograd.grad(loss, total, retain_graph=True)
    return loss


def by_the_normalizer_of_the_first(z):
    return (z - z.logsumexp(-1, keepdim=True)[:1]).gather(-1, IDS[..., None]).sum()


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
        by_a_normalizer_that_keeps_its_gradient,
        by_the_normalizer_of_the_first,
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


@pytest.mark.filterwarnings("ignore:.*materialises")  # the error message shows the values
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_categorical_distribution_refuses_what_is_no_number(value):
    hidden, weight = torch.randn(3, H), torch.randn(V, H)
    hidden[1, 2] = value
    for logits in (LinearLogits(hidden, weight), hidden @ weight.T):
        with pytest.raises(ValueError, match="Expected parameter logits"):
            torch.distributions.Categorical(logits=logits, validate_args=True)


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


def test_entropy_of_impossible_entries_is_finite():
    bias = torch.zeros(V).index_fill(0, PICK, -torch.inf)
    logits = LinearLogits(torch.randn(S, H), torch.randn(V, H), bias)
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    assert entropy.isfinite().all()
    torch.testing.assert_close((logp.exp() * logp).clamp(max=1).sum(-1), -entropy)
