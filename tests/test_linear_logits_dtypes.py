"""LinearLogits' dtype labels, arithmetic between dtypes, autocast: the result has PyTorch's dtype and loses no digits."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lazy_logits import FEW, IDS, NUMBERS, PROBS, TEMPERATURE, B, H, S, V, leaves, make, numbers

from fused_losses import cross_entropy, settings
from fused_losses.linear_head import LinearHead
from fused_losses.linear_logits import LinearLogits
from fused_losses.reference.linear_logits import linear_logits
from fused_losses.reference.tolerance import assert_accurate


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
    assert (logits.softmax(-1) * logits.float().log_softmax(-1)).dtype == torch.float32


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
    """A trainer's bias in the model's dtype stays lazy; one with more digits or more range materialises the logits."""
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


@pytest.mark.filterwarnings("ignore:.*materialises")
def test_class_weights_of_another_dtype():
    tensors = leaves(torch.bfloat16)
    weight = torch.linspace(0.5, 2, V)
    for kind in (LinearLogits, F.linear):
        z = kind(tensors["hidden"], tensors["weight"]).flatten(0, 1)
        for loss in (
            lambda z: F.cross_entropy(z, IDS.flatten(), weight),
            lambda z: F.nll_loss(z.log_softmax(-1), IDS.flatten(), weight),
            lambda z: F.nll_loss((z.log_softmax(-1) - 1).bfloat16(), IDS.flatten(), weight),
        ):
            with pytest.raises(RuntimeError, match=r"expected scalar type|cast one"):
                loss(z)
            with torch.autocast("cpu", torch.bfloat16):
                assert loss(z).dtype == torch.float32
        assert F.cross_entropy(z, PROBS.flatten(0, 1).float(), weight).dtype == torch.float32
        for autocast in (False, True):
            with (
                torch.autocast("cpu", torch.bfloat16, enabled=autocast),
                pytest.raises(RuntimeError, match=r"expected scalar type|cast one"),
            ):
                cross_entropy(z, IDS.flatten(), weight.long())


@pytest.mark.filterwarnings("ignore:.*materialises")
@pytest.mark.parametrize(
    ("function", "target", "weight"),
    [
        (torch.softmax, IDS.int(), None),
        (torch.softmax, IDS.bool(), None),
        (torch.softmax, torch.full_like(IDS, 156, dtype=torch.uint8), None),  # −100 in uint8
        (torch.softmax, IDS, torch.ones(V + 1)),
        (torch.softmax, IDS, torch.ones(V, dtype=torch.long)),
        (torch.softmax, IDS, torch.ones(V, requires_grad=True)),
        (lambda z, dim: z.isinf(), IDS, None),
    ],
)
def test_nll_loss_of_what_else_refuses_what_pytorch_refuses(function, target, weight):
    tensors = leaves(torch.float32)
    for kind in (LinearLogits, F.linear):
        z = kind(tensors["hidden"], tensors["weight"])
        with pytest.raises((RuntimeError, IndexError, UnicodeDecodeError)):  # PyTorch takes 156 for a character
            F.nll_loss(function(z, -1).mT, target, weight)


def test_a_cast_of_outputs_reaches_the_label_only():
    """FSDP2 casts outputs in this way, and DDP replaces them in this way."""
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
    for x in (logits, logits.log_softmax(-1)):  # PyTorch 2.11's checkpoint maps its arguments like this
        assert torch.utils._pytree.tree_map(lambda leaf: None, x) is None


def test_temperatures_keep_their_digits_side_by_side():
    tensors, found = leaves(), []
    for kind in (LinearLogits, linear_logits):
        parts = [kind(tensors["hidden"], tensors["weight"], softcap=2.0, temperature=t) for t in (1.3, 0.7)]
        with settings.strict():
            found.append(torch.cat(parts).logsumexp(-1))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_a_temperature_of_capped_16_bit_logits_keeps_its_digits():
    h, w = (leaves(torch.bfloat16)[name].detach() for name in ("hidden", "weight"))
    found = LinearLogits(h, w, softcap=2.0, temperature=1.3).float().logsumexp(-1)
    expected = linear_logits(h.double(), w.double(), softcap=2.0, temperature=1.3).logsumexp(-1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_cross_entropy_of_log_probs_has_their_dtype():
    tensors = leaves(torch.bfloat16)
    logp = LinearLogits(tensors["hidden"], tensors["weight"]).log_softmax(-1, dtype=torch.float32)
    assert F.cross_entropy(logp.flatten(0, 1), IDS.flatten()).dtype == torch.float32


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


@pytest.mark.parametrize("transform", [False, True])
@pytest.mark.parametrize("target", [IDS.flatten(), PROBS.float().flatten(0, 1)], ids=["ids", "probabilities"])
def test_autocast_around_a_loss_does_not_round_logits_made_before(target, transform):
    def value_and_gradient(autocast):
        def fn(h):
            logits = LinearLogits(h, weight, low_rank=(h[..., :2], weight[:, :2])).flatten(0, 1)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return F.cross_entropy(logits, target)

        if transform:
            return torch.func.grad_and_value(fn)(hidden.detach())
        loss = fn(hidden)
        return torch.autograd.grad(loss, hidden)[0], loss

    hidden, weight = list(leaves(torch.float32).values())[:2]
    torch.testing.assert_close(value_and_gradient(True), value_and_gradient(False))


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


def test_the_sum_of_logits_is_as_accurate_as_eager():
    tensors = leaves(torch.bfloat16)
    h, w = tensors["hidden"].detach(), tensors["weight"].detach()
    ours = LinearLogits(h, w).float().sum(-1)
    assert_accurate(ours, linear_logits(h.float(), w.float()).sum(-1), linear_logits(h.double(), w.double()).sum(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_temperature_that_trains_rounds_no_more_than_a_tensor_does(dtype):
    """In 16 bits it multiplies the hidden states: logits already cast to fp32 would lose digits, so they are materialised."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=g, dtype=torch.float64).to(dtype) / 4 for n in (512, 1000))
    ids, results = torch.randint(1000, (512,), generator=g), []
    for kind, wide in ((LinearLogits, dtype), (linear_logits, dtype), (linear_logits, torch.float64)):
        h, w, t = (x.to(wide).detach().requires_grad_() for x in (hidden, weight, torch.tensor(1.7)))
        with settings.strict():
            found = F.cross_entropy(kind(h, w) / t, ids, reduction="none")
        results.append((found.detach(), *torch.autograd.grad(found.sum(), [h, w, t])))
    for parts in zip(*results, strict=True):
        assert_accurate(*parts)
    z, t = LinearLogits(hidden, weight).float(), torch.ones((), requires_grad=True)
    with settings.strict():
        if dtype == torch.float32:
            assert isinstance(z / t, LinearLogits)
        else:
            with pytest.raises(RuntimeError, match="materialises"):
                z / t


@pytest.mark.filterwarnings("ignore:.*materialises")
@pytest.mark.parametrize("t", [0.01, 100.0])
def test_a_factor_that_trains_keeps_float16_in_range(t):
    """Hidden states times 100 would overflow where the logits do not."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=g).half() / 50 for n in (8, 20))
    hidden[:, 0], weight[:, 0] = 700.0, weight[:, 0] / 100
    results = []
    for kind, wide in ((LinearLogits, torch.float16), (linear_logits, torch.float16), (linear_logits, torch.float64)):
        h, w = (x.to(wide).requires_grad_() for x in (hidden, weight))
        factor = torch.tensor(t, dtype=torch.promote_types(wide, torch.float32), requires_grad=True)
        z = kind(h, w) * factor if t > 1 else kind(h, w) / factor
        found = F.cross_entropy(z, torch.arange(8))
        results.append((found.detach(), *torch.autograd.grad(found, [h, factor])))
    for parts in zip(*results, strict=True):
        assert_accurate(*parts)
