"""The operator behind the cross entropy of a head with class probabilities; each of its tensors may train."""

import pytest
import torch
import torch.nn.functional as F

from fused_losses import class_probabilities, linear_cross_entropy, products
from fused_losses.class_probabilities import label_statistics, linear_probabilities
from fused_losses.head import Head
from fused_losses.reference.linear_cross_entropy import linear_cross_entropy as specification
from fused_losses.reference.tolerance import assert_accurate
from fused_losses.settings import gradient_filter

N, C, H, R = 75, 29, 7, 3
CHUNKS = 2**12  # bytes of workspace, which make several chunks
TOKEN = torch.linspace(-1, 2, N)
TEMPERATURE = torch.linspace(0.5, 1.5, N)


def problem(dtype=torch.float64):
    sizes = {"hidden": (N, H), "weight": (C, H), "bias": (C,), "u": (N, R), "B": (C, R)}
    tensors = {name: torch.randn(size).to(dtype) for name, size in sizes.items()}
    tensors |= {"class_weight": torch.rand(C).to(dtype) + 0.5, "target": torch.randn(N, C).softmax(-1).to(dtype)}
    return {name: t.requires_grad_() for name, t in tensors.items()}


def ours(hidden, weight, bias, u, B, class_weight, target, backend="torch"):
    head = Head(hidden, weight, bias, u, B, TEMPERATURE.to(hidden), 0.9, 3.0)
    found = label_statistics(head, target, class_weight, 0.1, workspace=CHUNKS, backend=backend)
    return (TOKEN.to(hidden.device) * (0.1 * found.logsumexp.square() - found.sum_log_probs)).sum()


def plain(hidden, weight, bias, u, B, class_weight, target):
    how = {"linear_bias": bias, "weight": class_weight, "scale": 0.9, "softcap": 3.0, "low_rank": (u, B), "z_loss": 0.1}
    how |= {"temperature": TEMPERATURE.to(hidden), "label_smoothing": 0.1, "token_weights": TOKEN.to(hidden)}
    return specification(hidden, weight, target, reduction="sum", **how)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_everything_trains_in_chunks(backend, dtype, device, monkeypatch):
    chunks = []
    grad = class_probabilities.softmax_rows_grad
    monkeypatch.setattr(class_probabilities, "softmax_rows_grad", lambda *a: chunks.append(a[0].shape[0]) or grad(*a))
    tensors = {name: t.detach().to(device).requires_grad_() for name, t in problem(dtype).items()}
    exact = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    losses = ours(**tensors, backend=backend), plain(**tensors), plain(**exact)
    found = [torch.autograd.grad(x, of.values()) for x, of in zip(losses, (tensors, tensors, exact), strict=True)]
    assert len(chunks) > 1
    for name, mine, eager, wanted in zip(tensors, *found, strict=True):
        assert_accurate(mine, eager, wanted, name)


@pytest.mark.parametrize("name", [*problem()])
def test_each_trains_alone(name):
    tensors = {other: t.detach().requires_grad_(other == name) for other, t in problem().items()}
    torch.testing.assert_close(*(torch.autograd.grad(f(**tensors), tensors[name]) for f in (ours, plain)))


@pytest.mark.parametrize("route", ["gradients_in_forward", "recompute"])
def test_class_weights_of_any_stride(route, backend, device):
    hidden, weight = torch.randn(N, H, device=device, requires_grad=True), torch.randn(C, H, device=device)
    target, class_weight = torch.randn(N, C, device=device).softmax(-1), torch.rand(2 * C, device=device)[::2]
    found = linear_cross_entropy(hidden, weight, target, weight=class_weight, route=route, backend=backend)
    torch.testing.assert_close(found, F.cross_entropy(hidden @ weight.T, target, class_weight))


def test_the_statistics_may_be_written_into():
    tensors = problem()
    head = Head(tensors["hidden"], tensors["weight"])
    found = label_statistics(head, tensors["target"], None, 0.0)
    expected = torch.autograd.grad(found.sum_log_probs.sum(), tensors["weight"], retain_graph=True)
    found.logsumexp.detach().zero_()
    torch.testing.assert_close(torch.autograd.grad(found.sum_log_probs.sum(), tensors["weight"]), expected)


@pytest.mark.parametrize("route", ["gradients_in_forward", "recompute"])
def test_small_gradients_of_float16_do_not_vanish(route):
    hidden, weight = torch.randn(64, 32).half() * 1000, torch.randn(C, 32).half() * 1e-3
    target = torch.randn(64, C).softmax(-1)
    found, expected = [], []
    for dtype, to in ((torch.float16, found), (torch.float64, expected)):
        w = weight.to(dtype).requires_grad_()
        loss = linear_cross_entropy(hidden.to(dtype), w, target.to(dtype), reduction="sum", route=route)
        to.append(torch.autograd.grad(loss * 2.0**-23, w)[0].double())
    assert (found[0] - expected[0]).norm() < 1e-2 * expected[0].norm()


@pytest.mark.parametrize("route", ["gradients_in_forward", "recompute"])
def test_a_filter_leaves_small_columns_out_of_the_gradients(route):
    tensors = problem(torch.float32)
    spread = torch.linspace(0, 20, C)[:, None]  # some columns have a small probability, and a target of 0
    weight, hidden = (tensors["weight"] + spread).detach().requires_grad_(), torch.ones(N, H)
    target = (hidden @ weight.detach().T).softmax(-1).roll(1, 0)

    def gradient():
        return torch.autograd.grad(linear_cross_entropy(hidden, weight, target.roll(1, -1), route=route), weight)[0]

    exact = gradient()
    with gradient_filter(1e-3):
        filtered = gradient()
    assert not torch.equal(filtered, exact)
    torch.testing.assert_close(filtered, exact, atol=1e-2, rtol=0)


def test_differentiable_twice():
    tensors = tuple(problem().values())
    torch.testing.assert_close(*(torch.autograd.grad(ours(*tensors), tensors, create_graph=x) for x in (True, False)))
    torch.autograd.gradcheck(ours, tensors, fast_mode=True)
    torch.autograd.gradgradcheck(ours, tensors, fast_mode=True)


def test_gradients_made_in_forward_are_not_differentiated_again():
    hidden, weight, target = torch.randn(5, 3), torch.randn(7, 3).requires_grad_(), torch.rand(5, 7).softmax(-1)
    found = {}
    for route in (None, "recompute", "gradients_in_forward"):
        loss = linear_cross_entropy(hidden, weight, target, route=route)
        if route == "gradients_in_forward":
            with pytest.raises(RuntimeError, match=r"route\('recompute'\)"):
                torch.autograd.grad(loss, weight, create_graph=True)
        else:
            (d_weight,) = torch.autograd.grad(loss, weight, create_graph=True)
            found[route] = torch.autograd.grad(d_weight.square().sum(), weight)
    (d_weight,) = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, target), weight, create_graph=True)
    expected = torch.autograd.grad(d_weight.square().sum(), weight)
    torch.testing.assert_close(found, dict.fromkeys(found, expected))


@pytest.mark.parametrize(
    ("trains", "count"),
    [({"hidden", "weight"}, 3), ({"weight"}, 2), ({"hidden", "weight", "target"}, 4), (set(), 1)],
    ids=["both", "weight", "target too", "nothing"],
)
def test_a_mean_of_many_tokens_makes_its_gradients_in_forward(trains, count, monkeypatch):
    """Three products with the head, where recomputing takes four."""
    inputs = {"hidden": torch.randn(2048, 4), "weight": torch.randn(4096, 4), "target": torch.rand(2048, 4096)}
    inputs = {name: t.requires_grad_(name in trains) for name, t in inputs.items()}
    logits, write_logits, add_product = 2048 * 4096, Head.write_logits, products.add_product
    made = []
    monkeypatch.setattr(Head, "write_logits", lambda self, out: made.append(out.numel()) or write_logits(self, out))
    monkeypatch.setattr(
        products, "add_product", lambda out, x, *a, **k: made.append(x.numel()) or add_product(out, x, *a, **k)
    )
    loss = linear_cross_entropy(inputs["hidden"], inputs["weight"], inputs["target"])
    if trains:
        loss.backward()
    assert sum(made) / logits == count


def test_opcheck():
    x = {name: t.detach().requires_grad_() for name, t in problem(torch.float32).items()}
    head = Head(*(x[name] for name in ("hidden", "weight", "bias", "u", "B")), TEMPERATURE, softcap=3.0)
    labels = {"column_weight": x["class_weight"], "probabilities": x["target"], "label_smoothing": 0.1}
    how = {"workspace": CHUNKS, "backend": "torch"}
    torch.library.opcheck(linear_probabilities, (), head.packed() | labels | how)
