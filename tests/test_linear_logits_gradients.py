"""Who gets a gradient through LinearLogits: no_grad, frozen inputs, checkpoints, transforms, second derivatives."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from lazy_logits import FEW, IDS, NUMBERS, OPTIONS, TEMPERATURE, B, H, S, V, arguments, leaves, make
from torch import nn

from fused_losses import settings
from fused_losses.cross_entropy import cross_entropy as fused_cross_entropy
from fused_losses.linear_head import LinearHead
from fused_losses.linear_logits import LinearLogits
from fused_losses.reference.linear_logits import linear_logits


def test_transforms_of_a_head():
    """Per-sample gradients, as ``torch.func`` computes them for a module."""
    head, x, ids = LinearHead(H, V, bias=False), torch.randn(4, H), torch.tensor([1, 0, 4, 2])

    def loss(weight, x, y):
        logits = torch.func.functional_call(head, {"weight": weight}, (x[None],))
        return F.cross_entropy(logits, y[None])

    def eager(weight, x, y):
        return F.cross_entropy(x[None] @ weight.T, y[None])

    weight = head.weight.detach()
    torch._C._functorch._set_vmap_fallback_enabled(False)  # it loops over the samples, and warns at every call
    try:
        of_each = [torch.vmap(torch.func.grad(fn), (None, 0, 0))(weight, x, ids) for fn in (loss, eager)]
    finally:
        torch._C._functorch._set_vmap_fallback_enabled(True)
    torch.testing.assert_close(*of_each)


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
    args, options = arguments(tensors, **OPTIONS["low_rank"])
    with torch.no_grad():
        torch.testing.assert_close(
            LinearLogits(*args, **options).logsumexp(-1), linear_logits(*args, **options).logsumexp(-1)
        )
    lazy = LinearLogits(tensors["hidden"], tensors["weight"])
    with settings.strict(), torch.inference_mode():
        assert torch.is_inference(logits)
        assert logits.log_softmax(-1).is_inference()
        log_probs = logits.log_softmax(-1)
        assert (log_probs == log_probs).is_inference()
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
        assert not made.requires_grad or kind is linear_logits  # eager's view says that it does
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


def test_tokens_that_train_joined_to_frozen_ones_get_their_gradient():
    tensors, found = leaves(), []
    h, w = tensors["hidden"], tensors["weight"]
    for kind in (LinearLogits, linear_logits):
        loss = torch.cat([kind(h.detach(), w), kind(h, w)]).logsumexp(-1).square().sum()
        found.append(torch.autograd.grad(loss, (h, w)))
    torch.testing.assert_close(*found)


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
    """The loss is recomputed whatever else is read from the logits, before or after."""
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
    """With tied embeddings, hidden states are made from the head's weight: no path to it may be counted twice."""
    embedding, ids = torch.randn(V, H, dtype=torch.float64), torch.randint(0, V, (S,))

    def derivatives(of):
        leaf = embedding.clone().requires_grad_()
        loss = TIED[name](of, leaf[ids].tanh(), leaf, ids.roll(1))
        (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
        return first.detach(), torch.autograd.grad(first.square().sum(), leaf)[0]

    torch.testing.assert_close(derivatives(LinearLogits), derivatives(linear_logits))


@pytest.mark.parametrize("fn", [lambda z: z.max(-1).values, lambda z: z.amax(-1), lambda z: z.topk(3).values])
def test_tangents_of_the_largest_entries(fn):
    h, w, tangent = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 8, 32), (50, 32), (2, 8, 32)))
    found = (torch.func.jvp(lambda h: fn(kind(h, w)), (h,), (tangent,)) for kind in (LinearLogits, linear_logits))  # noqa: B023
    torch.testing.assert_close(*found)


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


TRAINED_TEMPERATURES = {
    "divided": lambda z, t: F.cross_entropy((z / t).flatten(0, 1), IDS.flatten()),
    "per_token": lambda z, t: (z * (t + TEMPERATURE[..., None])).log_softmax(-1).gather(-1, FEW),
    "log_probs": lambda z, t: (z.log_softmax(-1) / t).logsumexp(-1),
    "standardised": lambda z, t: (t * (z - z.mean(-1, keepdim=True)) / z.std(-1, keepdim=True)).softmax(-1)[..., 2],
    "twice": lambda z, t: -((z * t).softmax(-1) * (z * t).log_softmax(-1)).sum(-1) + (z * t / t).logsumexp(-1),
    "to_nothing": lambda z, t: (z * (t - 1.7)).log_softmax(-1)[..., 3],
    "in_place": lambda z, t: (z.mul_(t) if isinstance(z, LinearLogits) else z * t).log_softmax(-1)[..., 3],
}


@pytest.mark.parametrize("trained", [("hidden", "weight", "u", "B"), ("weight", "B"), (), "detached"])
@pytest.mark.parametrize("options", [{}, {"scale": 0.7}, {"temperature": TEMPERATURE}, {"low_rank": True}])
@pytest.mark.parametrize("name", TRAINED_TEMPERATURES)
def test_a_temperature_that_trains_gets_its_gradient(name, options, trained):
    results = []
    for kind in (LinearLogits, linear_logits):
        tensors, t = leaves(), torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
        for part, leaf in tensors.items():
            leaf.requires_grad_(part in trained or trained == "detached")
        args, kwargs = arguments(tensors, **options)
        z = kind(*args, **kwargs)
        with settings.strict():
            found = TRAINED_TEMPERATURES[name](z.detach() if trained == "detached" else z, t)
        wanted = [t, *(leaf for leaf in tensors.values() if leaf.requires_grad)]
        grads = torch.autograd.grad(found.cos().sum(), wanted, create_graph=True, allow_unused=True)
        assert grads[0] is not None
        grads = [g for g in grads if g is not None]
        results.append([found, *grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), [t])])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacfwd, torch.vmap])
def test_transforms_of_a_temperature(transform):
    tensors, t = leaves(), torch.tensor(1.7, dtype=torch.float64)
    t = t.expand(3) if transform is torch.vmap else t

    def loss(kind, t):
        return F.cross_entropy((kind(tensors["hidden"], tensors["weight"]) / t).flatten(0, 1), IDS.flatten())

    with settings.strict():
        found = transform(lambda t: loss(LinearLogits, t))(t)
    torch.testing.assert_close(found, transform(lambda t: loss(linear_logits, t))(t))


@pytest.mark.parametrize("fn", [lambda z, t: z * t, lambda z, t: z / t, lambda z, t: z.log_softmax(-1) / t])
def test_forward_mode_of_a_temperature_under_no_grad(fn):
    """``no_grad`` does not switch off tangents."""
    tensors, t = leaves(), torch.tensor(1.7, dtype=torch.float64)
    with torch.no_grad():
        found, expected = (
            torch.func.jvp(
                lambda t: F.cross_entropy(fn(kind(tensors["hidden"], tensors["weight"]), t).flatten(0, 1), IDS.flatten()),  # noqa: B023
                (t,), (torch.ones_like(t),),
            )
            for kind in (LinearLogits, linear_logits)
        )  # fmt: skip
    assert expected[1] != 0
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("asked", [lambda z: z.logsumexp(-1), lambda z: z[1:].logsumexp(-1)])
def test_what_is_known_keeps_its_tangent_under_no_grad(asked):
    tensors, results = leaves(), []

    def twice(kind, hidden):
        z = kind(hidden, tensors["weight"])
        z.logsumexp(-1)
        with torch.no_grad():
            return asked(z)

    for kind in (LinearLogits, linear_logits):
        h = tensors["hidden"].detach()
        results.append(torch.func.jvp(lambda h: twice(kind, h), (h,), (h.cos(),)))  # noqa: B023
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("u",), ("B",), ("hidden", "weight", "bias", "u", "B")])
@pytest.mark.parametrize("compiled", [False, True])
def test_what_was_frozen_when_made_gets_no_gradient(frozen, compiled):
    """As where a model, frozen for the moment, is its own teacher."""
    torch._dynamo.reset()
    of_each = []
    for make_logits in (LinearLogits, linear_logits):
        tensors = leaves()
        args, kwargs = arguments(tensors, bias=True, low_rank=True)
        for name in frozen:
            tensors[name].requires_grad_(False)
        teacher = make_logits(*args, **kwargs)
        for name in frozen:
            tensors[name].requires_grad_(True)
        student = make_logits(*args, **kwargs)

        def loss(z, t):
            return (
                F.kl_div(z.log_softmax(-1), (t[1:] / 2).softmax(-1), reduction="sum") + t[..., 1:3].logsumexp(-1).sum()
            )

        fn = torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss
        of_each.append(torch.autograd.grad(fn(student[1:], teacher), list(tensors.values())))
    torch.testing.assert_close(*of_each)
