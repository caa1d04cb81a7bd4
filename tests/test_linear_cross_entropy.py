"""linear_cross_entropy against whole logits in float64: both routes, both backends, every option."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import INTERPRETED
from torch.testing._internal.common_methods_invocations import op_db

from fused_losses import gradients_in_forward, planning, products
from fused_losses.chunked import softmax_rows
from fused_losses.cross_entropy import cross_entropy
from fused_losses.linear_cross_entropy import LinearCrossEntropyLoss, linear_cross_entropy
from fused_losses.linear_logits import LinearLogits
from fused_losses.reference import linear_cross_entropy as reference
from fused_losses.reference.tolerance import assert_accurate
from fused_losses.settings import drop_ignored

N, C, H = 13, 37, 9  # nothing a multiple of anything
ROUTES = ["gradients_in_forward", "recompute"]
NAN = float("nan")
pytestmark = pytest.mark.usefixtures("small_pieces")


def problem(dtype=torch.float32, device="cpu", tokens=N, classes=C, size=2.0):
    hidden = (torch.randn(tokens, H) * size).to(device, dtype)
    weight = torch.randn(classes, H).to(device, dtype)
    bias = torch.randn(classes).to(device, dtype)
    target = torch.randint(0, classes, (tokens,), device=device)
    target[2::5] = -100
    return hidden, weight, bias, target


def with_gradients(call, *inputs, upstream=3.0):
    """``call(*inputs)`` on leaves of its own, and their gradients under an upstream gradient that is not 1."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    loss = call(*leaves)
    generator = torch.Generator().manual_seed(1)
    g = torch.rand(loss.shape, generator=generator).to(loss.device, loss.dtype) + upstream
    return loss.detach(), *torch.autograd.grad(loss, leaves, g)


def check(ours, plain, inputs):
    """``ours`` is as accurate as ``plain`` in the same dtype, where ``plain`` in float64 is the truth."""
    results = with_gradients(ours, *inputs)
    eager = with_gradients(plain, *inputs)
    exact = with_gradients(plain, *(x.double() for x in inputs))
    names = ["loss", *(f"gradient {i}" for i in range(len(inputs)))]
    for name, a, b, c in zip(names, results, eager, exact, strict=True):
        if a.dtype == torch.float64:
            torch.testing.assert_close(a, b)
        else:
            assert_accurate(a, b, c, name)
    return results


GENERATOR = torch.Generator().manual_seed(0)  # the same options whatever was imported before
OPTIONS = {
    "plain": {},
    "weight": {"weight": torch.rand(C, generator=GENERATOR) + 0.5},
    "smoothing": {"label_smoothing": 0.2},
    "weight and smoothing": {"weight": torch.rand(C, generator=GENERATOR) + 0.5, "label_smoothing": 0.2},
    "z_loss": {"z_loss": 0.1},
    "z_loss and weight": {"z_loss": 0.1, "weight": torch.rand(C, generator=GENERATOR) + 0.5},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 3.0},
    "temperature": {"temperature": torch.rand(N, generator=GENERATOR) + 0.5},
    "ignore_index": {"ignore_index": 5},
    "token_weights": {"token_weights": torch.randn(N, generator=GENERATOR)},
    "everything": {
        "weight": torch.rand(C, generator=GENERATOR) + 0.5,
        "label_smoothing": 0.1,
        "z_loss": 0.05,
        "scale": 0.5,
        "softcap": 5.0,
        "temperature": torch.rand(N, generator=GENERATOR) + 0.5,
        "token_weights": torch.rand(N, generator=GENERATOR) + 0.5,
    },
}


def cast(options, like):
    return {k: v.to(like.device, like.dtype) if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def compare(options, reduction, route, backend, dtype, device):
    hidden, weight, bias, target = problem(dtype, device)
    options = cast(options, hidden)  # rounded as the inputs are
    if "ignore_index" in options:
        target[target == -100] = options["ignore_index"]

    def ours(h, w, b):
        how = {"route": route if reduction != "none" else None, "backend": backend, "workspace": 8 * C * 4}
        return linear_cross_entropy(h, w, target, linear_bias=b, reduction=reduction, **how, **cast(options, h))

    def plain(h, w, b):
        return reference.linear_cross_entropy(h, w, target, linear_bias=b, reduction=reduction, **cast(options, h))

    return check(ours, plain, (hidden, weight, bias))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reduced(options, reduction, route, backend, device):
    compare(options, reduction, route, backend, torch.float32, device)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_per_token(options, backend, device):
    loss = compare(options, "none", None, backend, torch.float32, device)[0]
    assert loss.shape == (N,)
    assert not loss[2::5].any()  # ignored
    assert loss.count_nonzero() >= N - len(loss[2::5]) - 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_other_dtypes(name, dtype, route, backend, device):
    if backend == "triton" and (dtype == torch.float64 or (dtype == torch.bfloat16 and INTERPRETED)):
        pytest.skip("Triton computes in fp32, and its interpreter gets bfloat16 wrong")
    torch.manual_seed(3)
    compare(OPTIONS[name], "mean", route, backend, dtype, device)


@pytest.mark.parametrize("accumulate", [None, "fp32"])
def test_sums_over_chunks_in_sixteen_bits(accumulate, device, monkeypatch):
    for what in ("row_temporaries", "upcast"):  # all of the workspace is for logits
        monkeypatch.setattr(planning._Sizes, what, lambda *sizes: 0)
    tokens, classes, workspace = 40, 3000, 100_000
    hidden, weight, _, target = problem(torch.bfloat16, device, tokens, classes)
    target.clamp_(min=0)
    how = {"workspace": workspace, "accumulate": accumulate, "backend": "torch", "route": "gradients_in_forward"}
    planned = planning.plan(tokens, classes, H, torch.bfloat16, **how)
    assert 3 <= planned.chunks <= 8
    assert planned.accumulate == (torch.float32 if accumulate else torch.bfloat16)

    def ours(h, w):
        return linear_cross_entropy(h, w, target, reduction="sum", **how)

    check(ours, lambda h, w: F.cross_entropy(h @ w.T, target, reduction="sum"), (hidden, weight))


def test_the_bias_sums_over_many_chunks_in_fp32(device):
    tokens, how = 1200, {"route": "gradients_in_forward", "backend": "torch", "workspace": 1}
    hidden, weight, bias, target = problem(torch.bfloat16, device, tokens)
    assert planning.plan(tokens, C, H, torch.bfloat16, **how).chunks == tokens // 4

    def ours(h, w, b):
        return linear_cross_entropy(h, w, target, linear_bias=b, reduction="sum", **how)

    def plain(h, w, b):
        h, w, b = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (h, w, b))
        return F.cross_entropy(F.linear(h, w, b), target, reduction="sum")

    results = [with_gradients(fn, *(t.to(dtype) for t in (hidden, weight, bias)))[3]
               for fn, dtype in ((ours, torch.bfloat16), (plain, torch.bfloat16), (plain, torch.float64))]  # fmt: skip
    assert_accurate(*results, "d_bias")


@pytest.mark.parametrize("route", ROUTES)
def test_each_option_changes_the_number(route):
    hidden, weight, bias, target = problem()
    losses = [
        linear_cross_entropy(hidden, weight, target, linear_bias=b, reduction=r, route=route, **options).item()
        for options in OPTIONS.values()
        if "ignore_index" not in options
        for r in ("mean", "sum")
        for b in (bias, None)
    ]
    assert len(set(losses)) == len(losses)


@pytest.mark.parametrize("variant", ["", "chunked", "chunked_none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_pytorchs_own_samples(variant, dtype):
    name = "nn.functional.linear_cross_entropy"
    found = [op for op in op_db if op.name == name and op.variant_test_name == variant]
    if not found:
        pytest.skip("this PyTorch has no linear_cross_entropy")
    for sample in found[0].sample_inputs("cpu", dtype, requires_grad=True):
        plain = {k: v for k, v in sample.kwargs.items() if k != "options"}
        expected = F.linear_cross_entropy(sample.input, *sample.args, **plain)
        ours = linear_cross_entropy(sample.input, *sample.args, **sample.kwargs)
        torch.testing.assert_close(ours, expected)
        tensors = (sample.input, *sample.args, *sample.kwargs.values())
        leaves = [t for t in tensors if isinstance(t, torch.Tensor) and t.requires_grad]
        g = torch.randn_like(expected)
        torch.testing.assert_close(
            torch.autograd.grad(ours, leaves, g, allow_unused=True),
            torch.autograd.grad(expected, leaves, g, allow_unused=True),
        )


def test_pytorchs_own_errors():
    found = [op for op in op_db if op.name == "nn.functional.linear_cross_entropy" and not op.variant_test_name]
    if not found:
        pytest.skip("this PyTorch has no linear_cross_entropy")
    for error in found[0].error_inputs("cpu"):
        if "dimensionality 1 or 2" in error.error_regex:
            continue  # (…, H) is accepted here
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex):
            linear_cross_entropy(sample.input, *sample.args, **sample.kwargs)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(("reduction", "route"), [("none", None), *itertools.product(["mean", "sum"], ROUTES)])
def test_class_probabilities_in_chunks(reduction, route, softcap, backend, device):
    hidden, weight, bias, _ = problem(device=device)
    target = torch.rand(N, C, device=device).softmax(-1)
    class_weight = torch.rand(C, device=device) + 0.5
    shared = {"reduction": reduction, "label_smoothing": 0.1, "softcap": softcap, "z_loss": 0.1, "scale": 0.7}

    def ours(h, w, b):
        how = {"backend": backend, "workspace": 3 * 2 * C * 4, "route": route}
        return linear_cross_entropy(h, w, target, linear_bias=b, weight=class_weight, **shared, **how)

    def plain(h, w, b):
        t, u = target.to(h.dtype), class_weight.to(h.dtype)
        return reference.linear_cross_entropy(h, w, t, linear_bias=b, weight=u, **shared)

    check(ours, plain, (hidden, weight, bias))


@pytest.mark.parametrize("workspace", [None, 3 * 2 * C * 4])
def test_class_weights_of_class_probabilities_train(workspace, device):
    hidden, weight, _, _ = problem(device=device)
    target = torch.rand(N, C, device=device).softmax(-1)
    class_weight = torch.rand(C, device=device) + 0.5

    def ours(h, w, u):
        return linear_cross_entropy(h, w, target, weight=u, label_smoothing=0.1, workspace=workspace)

    def plain(h, w, u):
        return reference.linear_cross_entropy(h, w, target.to(h.dtype), weight=u, label_smoothing=0.1)

    check(ours, plain, (hidden, weight, class_weight))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("route", ROUTES)
def test_without_hidden_features_the_bias_is_the_logits(route, reduction):
    hidden, weight = torch.empty(N, 0), torch.empty(C, 0)
    bias, target = torch.randn(C), torch.randint(C, (N,))

    def ours(h, w, b):
        return linear_cross_entropy(
            h, w, target, linear_bias=b, reduction=reduction, route=None if reduction == "none" else route
        )

    def plain(h, w, b):
        return F.cross_entropy(F.linear(h, w, b), target, reduction=reduction)

    check(ours, plain, (hidden, weight, bias))
    of_logits = F.cross_entropy(LinearLogits(hidden, weight, bias), target)
    torch.testing.assert_close(of_logits, F.cross_entropy(bias.expand(N, C), target))


@pytest.mark.parametrize("route", ROUTES)
def test_three_dimensional_input(route):
    hidden, weight, bias, target = problem(tokens=12)
    ours = linear_cross_entropy(hidden.view(3, 4, H), weight, target.view(3, 4), linear_bias=bias, route=route)
    assert torch.equal(ours, linear_cross_entropy(hidden, weight, target, linear_bias=bias, route=route))
    rows = linear_cross_entropy(hidden.view(3, 4, H), weight, target.view(3, 4), reduction="none")
    assert rows.shape == (3, 4)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_k_dimensional_with_options(route, reduction):
    hidden = torch.randn(5, H, dtype=torch.float64)
    weight, bias = torch.randn(C, 2, 3, H, dtype=torch.float64), torch.randn(C, 2, 3, dtype=torch.float64)
    target = torch.randint(0, C, (5, 2, 3))
    target[1, 0] = -100
    options = {"weight": torch.rand(C, dtype=torch.float64), "label_smoothing": 0.1, "reduction": reduction}

    def ours(h, w, b):
        how = {} if reduction == "none" else {"route": route}
        return linear_cross_entropy(h, w, target, linear_bias=b, z_loss=0.2, **options, **how)

    def plain(h, w, b):
        z = torch.einsum("nh,cdeh->ncde", h, w) + b
        loss, lse = F.cross_entropy(z, target, **options), z.logsumexp(1)
        square = torch.where(target == -100, 0, 0.2 * lse.square())
        return loss + (square if reduction == "none" else square.sum() / (target != -100).sum())

    torch.testing.assert_close(with_gradients(ours, hidden, weight, bias), with_gradients(plain, hidden, weight, bias))


def test_low_rank_through_lazy_logits(backend, device):
    hidden, weight, bias, target = problem(torch.float16, device, size=1.0)
    u, B = torch.randn(N, 3, device=device).half(), torch.randn(C, 3, device=device).half()
    for reduction in ("sum", "none"):

        def ours(h, w, b, u, B, reduction=reduction):
            logits = LinearLogits(h, w, b, low_rank=(u, B), scale=0.5)
            return cross_entropy(logits, target, reduction=reduction, backend=backend)

        def plain(h, w, b, u, B, reduction=reduction):
            return reference.linear_cross_entropy(
                h, w, target, linear_bias=b, low_rank=(u, B), scale=0.5, reduction=reduction
            )

        check(ours, plain, (hidden, weight, bias, u, B))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_softcap_of_lazy_logits(reduction, backend, device):
    hidden, weight, bias, target = problem(device=device)

    def ours(h, w, b):
        logits = LinearLogits(h, w, b, scale=0.5)
        return cross_entropy(logits, target, reduction=reduction, softcap=3.0, backend=backend)

    def plain(h, w, b):
        return reference.linear_cross_entropy(h, w, target, linear_bias=b, scale=0.5, softcap=3.0, reduction=reduction)

    check(ours, plain, (hidden, weight, bias))


def test_a_second_bound_of_lazy_logits():
    hidden, weight, _, target = problem()
    with pytest.raises(ValueError, match=r"already have a softcap of 3\.0; got another, 2\.0"):
        cross_entropy(LinearLogits(hidden, weight, softcap=3.0), target, softcap=2.0)
    with pytest.raises(ValueError, match="a softcap after a temperature"):
        cross_entropy(LinearLogits(hidden, weight, temperature=torch.ones(N)), target, softcap=2.0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_target_that_does_not_fit_lazy_logits(reduction):
    hidden, weight, _, target = problem()
    for wrong in (target[:, None], target[1:]):
        with pytest.raises(ValueError, match=r"class indices \(13,\) or of class probabilities"):
            cross_entropy(LinearLogits(hidden, weight), wrong, reduction=reduction)


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", [{"z_loss": 0.1}, {"return_statistics": True}], ids="+".join)
def test_extras_of_lazy_logits(options, reduction, soft):
    hidden, weight, bias, target = problem()
    target = torch.rand(N, C).softmax(-1) if soft else target
    found, expected = (
        cross_entropy(z, target, reduction=reduction, **options)
        for z in (LinearLogits(hidden, weight, bias), F.linear(hidden, weight, bias))
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("route", ROUTES)
def test_lazy_logits_with_the_vocabulary_anywhere(route):
    hidden, weight, bias, target = problem(tokens=12, dtype=torch.float64)
    lazy = LinearLogits(hidden.view(3, 4, H), weight, bias).transpose(1, 2)
    ours = cross_entropy(lazy, target.view(3, 4), label_smoothing=0.1)
    expected = F.cross_entropy(hidden @ weight.T + bias, target, label_smoothing=0.1)
    torch.testing.assert_close(ours, expected)
    probabilities = torch.rand(3, C, 4, dtype=torch.float64)
    z = (hidden @ weight.T + bias).view(3, 4, C).transpose(1, 2)
    torch.testing.assert_close(cross_entropy(lazy, probabilities), F.cross_entropy(z, probabilities))


# The graph


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("route", ROUTES)
def test_a_second_backward_gives_the_same_gradients(route, dtype, backend, device):
    hidden, weight, _, target = problem(dtype, device)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    loss = linear_cross_entropy(hidden, weight, target, route=route, backend=backend)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    doubled = torch.autograd.grad(2 * loss, leaves, retain_graph=True)
    last = torch.autograd.grad(loss, leaves)
    for a, b, c, d in zip(first, kept, doubled, last, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, d)
        assert_accurate(c, (2 * b), 2 * b.double())
    with pytest.raises(RuntimeError, match=r"second time|freed"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("options", [{"scale": 100.0}, {"temperature": 0.01}], ids=str)
def test_fp16_heads_whose_scale_is_large(options, backend, device):
    """As with normalised hidden states and weights: the gradient of a logit is far larger than that of the loss."""
    hidden, weight, _, target = problem(torch.float16, device, tokens=33, size=1.0)
    hidden, weight = (F.normalize(x.detach().float(), dim=-1).half() for x in (hidden, weight))
    options = options | {"backend": backend, "route": "gradients_in_forward", "out_dtype": torch.float32}

    def plain(h, w):
        return F.cross_entropy((h @ w.T).to(torch.promote_types(h.dtype, torch.float32)) * 100, target)

    check(lambda h, w: linear_cross_entropy(h, w, target, **options), plain, (hidden, weight))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_fp16_under_a_loss_scale(route, reduction, backend, device):
    hidden, weight, _, target = problem(torch.float16, device, tokens=33, size=1.0)
    scale = 2.0**16 if reduction == "mean" else 2.0**8

    def ours(h, w):
        return scale * linear_cross_entropy(
            h,
            w,
            target,
            route=route,
            backend=backend,
            reduction=reduction,
            out_dtype=torch.float32,
            workspace=16 * C * 4,
        )

    def plain(h, w):
        return scale * F.cross_entropy(
            (h @ w.T).to(torch.promote_types(h.dtype, torch.float32)), target, reduction=reduction
        )

    check(ours, plain, (hidden, weight))


@pytest.mark.parametrize("route", ROUTES)
def test_fp16_under_small_token_weights(route, backend, device):
    """Such as those of a mean over many tokens, for which a loss scale makes up."""
    hidden, weight, _, target = problem(torch.float16, device, tokens=33, size=1.0)
    small = torch.full((33,), 2.0**-40, device=device)

    def ours(h, w):
        how = {"reduction": "sum", "out_dtype": torch.float32, "route": route, "backend": backend}
        return 2.0**40 * linear_cross_entropy(h, w, target, token_weights=small, workspace=16 * C * 4, **how)

    def plain(h, w):
        z = (h @ w.T).to(torch.promote_types(h.dtype, torch.float32))
        return F.cross_entropy(z, target, reduction="sum")

    check(ours, plain, (hidden, weight))


def test_fp16_sums_do_not_overflow_before_they_are_scaled(backend, device):
    hidden = torch.full((64, 2), 128.0, device=device).half().requires_grad_()  # a class's sum is 64·128·2^10
    weight = torch.zeros(3, 2, device=device).half().requires_grad_()
    target = torch.zeros(64, dtype=torch.int64, device=device)
    loss = linear_cross_entropy(
        hidden, weight, target, route="gradients_in_forward", backend=backend, out_dtype=torch.float32
    )
    (grad,) = torch.autograd.grad(loss, weight)
    expected = torch.tensor([-2 / 3, 1 / 3, 1 / 3])[:, None] * 128
    torch.testing.assert_close(grad.float().cpu(), expected.expand(3, 2), rtol=1e-3, atol=0)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_frozen_inputs_cost_nothing(route, trained, monkeypatch):
    hidden, weight, bias, target = problem()
    leaves = [hidden, weight, bias]
    full = linear_cross_entropy(
        *(t.clone().requires_grad_() for t in leaves[:2]), target, linear_bias=bias, route=route
    )
    made = []
    add_product = products.add_product
    monkeypatch.setattr(products, "add_product", lambda *a, **k: (made.append(a), add_product(*a, **k)))
    for i in trained:
        leaves[i].requires_grad_()
    loss = linear_cross_entropy(hidden, weight, target, linear_bias=bias, route=route)
    assert torch.equal(loss, full)
    got = torch.autograd.grad(loss, [leaves[i] for i in trained])
    assert len(made) == len({0, 1} & set(trained))
    z = F.cross_entropy(F.linear(hidden, weight, bias), target)
    torch.testing.assert_close(got, torch.autograd.grad(z, [leaves[i] for i in trained]))


def test_no_grad_makes_no_gradients(monkeypatch):
    hidden, weight, _, target = problem()
    monkeypatch.setattr(gradients_in_forward, "loss_and_gradients", None)
    hidden.requires_grad_()
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, target)
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T, target).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("route", ROUTES)
def test_main_grad(route, dtype):
    hidden, weight, _, target = problem(dtype, size=1.0)

    def plain(h, w):
        return 5 * F.cross_entropy(h @ w.T, target)

    eager = with_gradients(plain, hidden, weight, upstream=0)
    exact = with_gradients(plain, hidden.double(), weight.double(), upstream=0)
    hidden.requires_grad_()
    weight.requires_grad_()
    main_grad = torch.ones(C, H)
    g = torch.rand((), generator=torch.Generator().manual_seed(1))  # with_gradients' upstream
    extra = {"grad_scale": 5 * g} if route == "gradients_in_forward" else {}
    loss = linear_cross_entropy(
        hidden, weight, target, route=route, main_grad=main_grad, out_dtype=torch.float32, workspace=8 * C * 4, **extra
    )
    assert torch.equal(main_grad, torch.ones(C, H)) == (route == "recompute")
    (5 * g * loss).backward()
    assert weight.grad is None
    assert_accurate((5 * loss).to(dtype), eager[0], exact[0], "loss")
    assert_accurate(hidden.grad, eager[1], exact[1], "d_hidden")
    assert_accurate(main_grad, 1 + eager[2].float(), 1 + exact[2], "main_grad")


@pytest.mark.parametrize("route", ROUTES)
def test_main_grad_of_a_weight_that_trains_alone(route):
    hidden, weight, _, target = problem()
    main_grad, extra = torch.zeros(C, H), {"grad_scale": 1.0} if route == "gradients_in_forward" else {}
    linear_cross_entropy(hidden, weight.requires_grad_(), target, route=route, main_grad=main_grad, **extra).backward()
    torch.testing.assert_close(main_grad, torch.autograd.grad(F.cross_entropy(hidden @ weight.T, target), weight)[0])


def test_a_promised_number_is_added_in_forward(backend, device):
    hidden, weight, _, target = problem(device=device)
    leaves, main_grad = [x.requires_grad_() for x in (hidden, weight)], torch.zeros(C, H, device=device)
    how = {"route": "gradients_in_forward", "backend": backend}
    loss = linear_cross_entropy(hidden, weight, target, main_grad=main_grad, grad_scale=2.0, **how)
    d_hidden, d_weight = torch.autograd.grad(2 * F.cross_entropy(hidden @ weight.T, target), leaves)
    torch.testing.assert_close(main_grad, d_weight)
    (2 * loss).backward()
    torch.testing.assert_close(hidden.grad, d_hidden)
    torch.testing.assert_close(main_grad, d_weight)


def test_a_promise_of_0(backend, device):
    hidden, weight, _, target = problem(device=device)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    main_grad = torch.ones(C, H, device=device)
    loss = linear_cross_entropy(hidden, weight, target, main_grad=main_grad, grad_scale=0.0, backend=backend)
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T, target))
    (0 * loss).backward()
    assert (leaves[0].grad == 0).all()
    assert (main_grad == 1).all()


@pytest.mark.parametrize("drop_ignored", [True, False])
def test_promised_gradient_of_a_batch_where_all_is_ignored(drop_ignored, backend, device):
    hidden, weight, bias, target = problem(device=device)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    main_grad = torch.ones(C, H, device=device)
    loss = linear_cross_entropy(
        hidden, weight, torch.full_like(target, -100), linear_bias=bias, main_grad=main_grad, grad_scale=2.0,
        drop_ignored=drop_ignored, backend=backend,
    )  # fmt: skip
    (2 * loss).backward()
    assert loss.isnan()
    assert all((x.grad == 0).all() for x in leaves if x is not weight)
    assert (main_grad == 1).all()


@pytest.mark.parametrize("route", ROUTES)
def test_batched_gradients(route):
    hidden, weight, bias, target = problem()
    leaves, upstream = [x.requires_grad_() for x in (hidden, weight, bias)], torch.randn(3)
    ours = linear_cross_entropy(hidden, weight, target, linear_bias=bias, route=route)
    plain = F.cross_entropy(F.linear(*leaves), target)
    results = (torch.autograd.grad(loss, leaves, upstream, is_grads_batched=True) for loss in (ours, plain))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


# Rows that do not count


@pytest.mark.parametrize("drop_ignored", [True, False])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nan_in_ignored_rows_reaches_nothing(drop_ignored, route, reduction, backend, device):
    hidden, weight, bias, target = problem(device=device)
    token_weights, ignored = torch.rand(N, device=device), target == -100
    how = {"backend": backend, "reduction": reduction, "drop_ignored": drop_ignored}
    if reduction == "mean":
        how["route"] = route

    def gradients(hidden, token_weights):
        def ours(h, w, b):
            return linear_cross_entropy(h, w, target, linear_bias=b, token_weights=token_weights, **how)

        return with_gradients(ours, hidden, weight, bias)

    clean = gradients(hidden, token_weights)
    poisoned = gradients(hidden.masked_fill(ignored[:, None], NAN), token_weights.masked_fill(ignored, NAN))
    assert ignored.any()
    for a, b in zip(clean, poisoned, strict=True):
        assert torch.equal(a, b)
    assert not poisoned[1][ignored].any()


@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nan_in_ignored_rows_of_a_low_rank_factor_reaches_nothing(drop, reduction, backend, device):
    hidden, weight, _, target = problem(torch.float16, device)
    u, B, ignored = torch.randn(N, 3, device=device).half(), torch.randn(C, 3, device=device).half(), target == -100

    def ours(h, w, u, B):
        return cross_entropy(LinearLogits(h, w, low_rank=(u, B)), target, reduction=reduction, backend=backend)

    with drop_ignored(drop):
        clean = with_gradients(ours, hidden, weight, u, B)
        poisoned = with_gradients(ours, hidden, weight, u.masked_fill(ignored[:, None], NAN), B)
    for a, b in zip(clean, poisoned, strict=True):
        assert torch.equal(a, b)
    assert not poisoned[3][ignored].any()


@pytest.mark.parametrize(
    ("route", "workspace", "dtype"),
    [
        ("gradients_in_forward", None, torch.float32),
        ("recompute", None, torch.float32),  # from saved logits
        ("recompute", 1, torch.float16),
    ],
)
def test_a_class_weight_without_end_reaches_no_ignored_token(route, workspace, dtype, backend, device):
    hidden, weight, _, target = problem(dtype, device)
    class_weight = torch.ones(C, device=device)
    class_weight[5] = torch.inf
    how = {"label_smoothing": 0.1, "drop_ignored": False, "route": route, "workspace": workspace, "backend": backend}
    (d_hidden,) = torch.autograd.grad(
        linear_cross_entropy(hidden.requires_grad_(), weight, target, weight=class_weight, **how), hidden
    )
    assert not d_hidden[target == -100].any()
    assert d_hidden[target != -100].isnan().any()


def test_ignored_tokens_are_not_projected(monkeypatch):
    hidden, weight, _, target = problem()
    hidden.requires_grad_()
    seen = []
    in_one_pass = softmax_rows.softmax_rows_fwd_bwd
    monkeypatch.setattr(
        softmax_rows, "softmax_rows_fwd_bwd", lambda z, *a, **k: (seen.append(len(z)), in_one_pass(z, *a, **k))[1]
    )
    linear_cross_entropy(hidden, weight, target)
    linear_cross_entropy(hidden, weight, target, drop_ignored=False)
    assert seen == [int((target != -100).sum()), N]


@pytest.mark.parametrize("drop_ignored", [True, False])
@pytest.mark.parametrize("route", ROUTES)
def test_nothing_left(drop_ignored, route, backend, device):
    for tokens in (N, 0):
        hidden, weight, bias, target = problem(device=device, tokens=tokens)
        target.fill_(-100)
        leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
        how = {"linear_bias": bias, "backend": backend, "route": route, "drop_ignored": drop_ignored}
        total = linear_cross_entropy(hidden, weight, target, reduction="sum", **how)
        assert total == 0
        assert all(not g.any() for g in torch.autograd.grad(total, leaves, retain_graph=True))
        # As PyTorch's, where the loss is divided by a count of 0.
        assert all(not g.any() for g in torch.autograd.grad(total / (target != -100).sum(), leaves))
        mean = linear_cross_entropy(hidden, weight, target, **how)
        assert mean.isnan()
        expected = torch.autograd.grad(
            F.cross_entropy(F.linear(hidden, weight, bias), target), leaves, allow_unused=True
        )
        for g, e in zip(torch.autograd.grad(mean, leaves), expected, strict=True):
            assert torch.equal(g, e)
        rows = linear_cross_entropy(hidden, weight, target, reduction="none", linear_bias=bias, backend=backend)
        assert rows.shape == (tokens,)
        assert not rows.any()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("route", ROUTES)
def test_class_probabilities_of_no_token(route, reduction, backend, device):
    hidden, weight, bias, _ = problem(device=device, tokens=0)
    leaves, target = [t.requires_grad_() for t in (hidden, weight, bias)], hidden.new_zeros(0, len(weight))
    how = {"linear_bias": bias, "reduction": reduction, "backend": backend, "route": route}
    loss = linear_cross_entropy(hidden, weight, target, **how)
    expected = F.cross_entropy(F.linear(hidden, weight, bias), target, reduction=reduction)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    for factor in (1, math.inf):  # inf: a caller divides by a count of 0
        found = torch.autograd.grad(loss * factor, leaves, retain_graph=True)
        for g, e in zip(found, torch.autograd.grad(expected, leaves, retain_graph=True), strict=True):
            assert torch.equal(g, e)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_class_probabilities_that_are_all_0(reduction, route, backend, device):
    hidden, weight, _, _ = problem(device=device)
    how = {"reduction": reduction, "route": route, "backend": backend}
    assert linear_cross_entropy(hidden.requires_grad_(), weight, torch.zeros(N, C, device=device), **how) == 0


@pytest.mark.parametrize("drop_ignored", [True, False])
@pytest.mark.parametrize("route", ROUTES)
def test_targets_without_weight(drop_ignored, route, backend, device):
    hidden, weight, bias, target = problem(device=device)
    target[target != -100] = 0
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    kwargs = {"weight": torch.ones(len(weight), device=device), "label_smoothing": 0.1}
    kwargs["weight"][0] = 0
    how = {"linear_bias": bias, "backend": backend, "route": route, "drop_ignored": drop_ignored}
    ours = linear_cross_entropy(hidden, weight, target, **how, **kwargs)
    expected = F.cross_entropy(F.linear(hidden, weight, bias), target, **kwargs)
    assert ours.isnan()
    assert expected.isnan()
    found, wanted = (torch.autograd.grad(loss, leaves) for loss in (ours, expected))
    for g, e in zip(found, wanted, strict=True):
        assert e.isnan().any()
        assert g[e.isnan()].isnan().all()


def test_one_class(backend, device):
    hidden, weight, _, target = problem(classes=1, device=device)
    target.clamp_(max=0)
    for route in ROUTES:
        loss, d_hidden, d_weight = with_gradients(
            lambda h, w, route=route: linear_cross_entropy(h, w, target, route=route, backend=backend), hidden, weight
        )
        assert loss == 0
        assert not d_hidden.any()
        assert not d_weight.any()


# Bits


@pytest.mark.parametrize("route", ROUTES)
def test_same_bits_every_run(route, backend, device):
    hidden, weight, bias, target = problem(torch.float16, device, tokens=33)

    def run():
        return with_gradients(
            lambda h, w, b: linear_cross_entropy(
                h, w, target, linear_bias=b, route=route, backend=backend, workspace=16 * C * 4
            ),
            hidden,
            weight,
            bias,
        )

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("route", ROUTES)
def test_chunks_do_not_matter(route):
    hidden, weight, bias, target = problem(torch.float64, tokens=70)

    def run(workspace):
        return with_gradients(
            lambda h, w, b: linear_cross_entropy(h, w, target, linear_bias=b, route=route, workspace=workspace),
            hidden,
            weight,
            bias,
        )

    whole = run(None)
    for workspace in (1, 100_000, 17_000_000):
        torch.testing.assert_close(run(workspace), whole, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("layout", ["strided", "expanded", "transposed"])
def test_strides_and_unmutated_inputs(route, layout, backend, device):
    hidden, weight, bias, target = problem(device=device)
    if layout == "strided":
        hidden, weight = hidden.repeat(1, 2)[:, ::2], weight.repeat_interleave(2, 0)[::2]
        bias, target = bias.repeat_interleave(2)[::2], target.repeat_interleave(2)[::2]
    elif layout == "expanded":
        hidden, bias = hidden[:1].expand(N, H), bias[:1].expand(C)
    else:
        hidden, weight = hidden.T.contiguous().T, weight.T.contiguous().T
    inputs = (hidden, weight, bias, target)
    before = [t.clone() for t in inputs]
    versions = [t._version for t in inputs]
    leaves = [t.detach().requires_grad_() for t in (hidden, weight, bias)]
    loss = linear_cross_entropy(*leaves[:2], target, linear_bias=leaves[2], route=route, backend=backend)
    got = torch.autograd.grad(loss, leaves)
    plain = [t.contiguous().clone() for t in (hidden, weight, bias)]
    expected = with_gradients(
        lambda h, w, b: linear_cross_entropy(h, w, target, linear_bias=b, route=route, backend=backend),
        *plain,
        upstream=0,
    )
    assert torch.equal(loss, expected[0])
    for g, p in zip(got, plain, strict=True):
        assert g.shape == p.shape
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    assert [t._version for t in inputs] == versions


def test_results_may_be_written_into():
    hidden, weight, _, target = problem()
    hidden.requires_grad_()
    expected = torch.autograd.grad(linear_cross_entropy(hidden, weight, target, reduction="none").sum(), hidden)
    loss = linear_cross_entropy(hidden, weight, target, reduction="none")
    loss.mul_(1.0).clamp_(min=-1e9)
    assert torch.equal(torch.autograd.grad(loss.sum(), hidden)[0], expected[0])


# What surrounds it


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_fullgraph(route, dynamic):
    torch._dynamo.reset()
    hidden, weight, bias, target = problem()

    def loss(h, w, b):
        return linear_cross_entropy(h, w, target, linear_bias=b, route=route, label_smoothing=0.1, z_loss=0.1)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    torch.testing.assert_close(
        with_gradients(compiled, hidden, weight, bias), with_gradients(loss, hidden, weight, bias)
    )


def test_fullgraph_per_token():
    torch._dynamo.reset()
    hidden, weight, _, target = problem()

    def loss(h, w):
        return linear_cross_entropy(h, w, target, reduction="none")

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(with_gradients(compiled, hidden, weight), with_gradients(loss, hidden, weight))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives(reduction):
    hidden, weight, bias, target = problem(torch.float64, tokens=3, classes=5)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]

    def loss(h, w, b):
        return linear_cross_entropy(h, w, target, linear_bias=b, reduction=reduction, label_smoothing=0.1, z_loss=0.1)

    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


@pytest.mark.parametrize("route", ROUTES)
def test_a_gradient_to_differentiate_again_is_the_same_gradient(route):
    hidden, weight, bias, target = problem(torch.float64)
    leaves, options = [t.requires_grad_() for t in (hidden, weight, bias)], cast(OPTIONS["everything"], hidden)
    loss = linear_cross_entropy(hidden, weight, target, linear_bias=bias, route=route, **options)
    again = torch.autograd.grad(loss, leaves, create_graph=True)
    for a, b in zip(again, torch.autograd.grad(loss, leaves), strict=True):
        assert a.requires_grad
        torch.testing.assert_close(a, b)


def test_transforms_and_forward_mode():
    hidden, weight, _, target = problem(torch.float64)

    def ours(h):
        return linear_cross_entropy(h, weight, target)

    def plain(h):
        return F.cross_entropy(h @ weight.T, target)

    tangent = torch.randn_like(hidden)
    torch.testing.assert_close(torch.func.grad(ours)(hidden), torch.func.grad(plain)(hidden))
    torch.testing.assert_close(
        torch.func.jvp(ours, (hidden,), (tangent,)), torch.func.jvp(plain, (hidden,), (tangent,))
    )
    torch.testing.assert_close(torch.func.hessian(ours)(hidden), torch.func.hessian(plain)(hidden))


@pytest.mark.parametrize("probabilities", [False, True])
def test_a_tangent_of_the_temperature(probabilities):
    hidden, weight, _, target = problem(torch.float64)
    target = F.one_hot(target.clamp(min=0), len(weight)).double() if probabilities else target
    temperature = torch.rand(len(hidden), dtype=torch.float64) + 0.5

    def ours(t):
        return linear_cross_entropy(hidden, weight, target, temperature=t)

    def plain(t):
        return F.cross_entropy(hidden @ weight.T / t[:, None], target)

    found, expected = (torch.func.jvp(fn, (temperature,), (temperature.cos(),)) for fn in (ours, plain))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_meta_tensors(reduction):
    hidden, weight = (torch.empty(s, H, device="meta", requires_grad=True) for s in (9, C))
    target = torch.empty(9, dtype=torch.long, device="meta")
    loss = linear_cross_entropy(hidden, weight, target, reduction=reduction)
    assert loss.shape == (() if reduction == "mean" else (9,))
    assert [g.shape for g in torch.autograd.grad(loss.sum(), (hidden, weight))] == [(9, H), (C, H)]
    assert F.cross_entropy(LinearLogits(hidden, weight), target, reduction=reduction).shape == loss.shape
    assert LinearLogits(hidden, weight, softcap=3.0).log_softmax(-1)[:, 2].device.type == "meta"


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_of_large_heads_are_refused(reduction):
    hidden = torch.randn(70, 2).requires_grad_()
    loss = linear_cross_entropy(
        hidden, torch.randn(70_000, 2), torch.zeros(70, dtype=torch.int64), reduction=reduction
    ).sum()
    with pytest.raises(RuntimeError, match=r"\(70, 70000\)"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_autocast_casts_as_pytorch_does():
    hidden, weight, bias, target = problem()
    with torch.autocast("cpu", torch.bfloat16):
        loss, d_hidden, d_weight = with_gradients(
            lambda h, w: linear_cross_entropy(h, w, target, linear_bias=bias), hidden, weight, upstream=0
        )
    half = [t.bfloat16() for t in (hidden, weight)]
    expected = with_gradients(
        lambda h, w: linear_cross_entropy(h, w, target, linear_bias=bias.bfloat16(), out_dtype=torch.float32),
        *half,
        upstream=0,
    )
    assert loss.dtype == d_hidden.dtype == d_weight.dtype == torch.float32
    assert torch.equal(loss, expected[0])
    assert torch.equal(d_weight, expected[2].float())


@pytest.mark.parametrize("dims", [(), (3,)])
@pytest.mark.parametrize(("reduction", "route"), [("none", None), *itertools.product(["mean", "sum"], ROUTES)])
def test_token_weights_of_class_probabilities(reduction, route, dims):
    hidden, weight = torch.randn(N, 5, requires_grad=True), torch.randn(C, *dims, 5, requires_grad=True)
    target, token_weights = torch.rand(N, C, *dims).softmax(1), torch.rand(N, *dims)
    each = F.cross_entropy(torch.tensordot(hidden, weight, ([1], [-1])), target, reduction="none") * token_weights
    expected = {"none": each, "sum": each.sum(), "mean": each.mean()}[reduction]
    how = {"reduction": reduction, "route": route}
    found = linear_cross_entropy(hidden, weight, target, token_weights=token_weights, **how)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), (hidden, weight)) for x in (found, expected)))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_z_loss_under_token_weights_of_class_probabilities(reduction, route):
    hidden, weight, _, _ = problem()
    target, token_weights = torch.rand(N, C).softmax(1), torch.rand(N) + 0.5

    def ours(h, w):
        how = {"reduction": reduction, "route": route}
        return linear_cross_entropy(h, w, target, token_weights=token_weights, z_loss=0.1, **how)

    def plain(h, w):
        z, t = h @ w.T, target.to(h.dtype)
        each = F.cross_entropy(z, t, reduction="none") + 0.1 * z.logsumexp(-1).square()
        return getattr(each * token_weights.to(h.dtype), reduction)()

    check(ours, plain, (hidden, weight))


@pytest.mark.parametrize("route", ROUTES)
def test_a_bf16_mean_over_class_probabilities_is_divided_in_fp32(route):
    hidden, weight, _, _ = problem(torch.bfloat16)
    hidden.requires_grad_()
    target = torch.rand(N, C).softmax(-1).bfloat16()
    how = {"route": route, "out_dtype": torch.float32}
    mean, total = (linear_cross_entropy(hidden, weight, target, reduction=r, **how) for r in ("mean", "sum"))
    torch.testing.assert_close(mean, total / N)


def test_probabilities_leave_the_random_state_alone(monkeypatch):
    hidden, weight, _, _ = problem()
    monkeypatch.setattr(torch, "get_rng_state", lambda: pytest.fail("read the random state"))
    linear_cross_entropy(hidden.requires_grad_(), weight, torch.full((len(hidden), C), 1 / C), workspace=1).backward()


def test_probabilities_ignore_no_index():
    hidden, weight, _, _ = problem()
    with pytest.raises(RuntimeError, match="ignore_index is not supported for floating point target"):
        F.cross_entropy(LinearLogits(hidden, weight), torch.rand(len(hidden), C), ignore_index=2)


@pytest.mark.parametrize("route", ROUTES)
def test_statistics_come_along(route):
    hidden, weight, _, target = problem()
    hidden.requires_grad_()
    target[0] = (hidden @ weight.T)[0].argmax()
    loss, found = linear_cross_entropy(hidden, weight, target, route=route, return_statistics=True)
    z = hidden @ weight.T
    counted = target != -100
    torch.testing.assert_close(loss, F.cross_entropy(z, target))
    expected = z.log_softmax(-1).gather(1, target.clamp(min=0)[:, None])[:, 0]
    torch.testing.assert_close(found.log_probs, torch.where(counted, expected, 0).detach())
    torch.testing.assert_close(found.logsumexp, torch.where(counted, z.logsumexp(-1), 0).detach())
    assert torch.equal(found.is_top1[counted], (z.argmax(-1) == target)[counted])
    assert found.is_top1.any()
    assert not found.is_top1.all()
    assert not found.log_probs.requires_grad
    assert not found.logsumexp.requires_grad
    hidden.grad = None
    loss.backward()
    assert hidden.grad.any()


def test_token_weights_that_train_take_recompute():
    hidden, weight, _, target = problem(torch.float64)
    factors = torch.rand(N, dtype=torch.float64)

    def ours(h, t):
        return linear_cross_entropy(h, weight, target, token_weights=t)

    def plain(h, t):
        return (F.cross_entropy(h @ weight.T, target, reduction="none") * t).sum() / (target != -100).sum()

    torch.testing.assert_close(with_gradients(ours, hidden, factors), with_gradients(plain, hidden, factors))


def test_result_dtypes():
    hidden, weight, _, target = problem(torch.bfloat16)
    assert linear_cross_entropy(hidden, weight, target).dtype == torch.bfloat16
    assert linear_cross_entropy(hidden, weight, target, out_dtype=torch.float32).dtype == torch.float32
    assert linear_cross_entropy(hidden, weight, target.clamp(min=0).to(torch.uint8)).dtype == torch.bfloat16
    probabilities, class_weights = torch.rand(len(hidden), C, dtype=torch.float64).softmax(-1), torch.rand(C)
    for reduction in ("mean", "none"):
        assert linear_cross_entropy(hidden, weight, probabilities, reduction=reduction).dtype == torch.float64
        halves = probabilities.to(torch.bfloat16)
        assert linear_cross_entropy(hidden, weight, halves, reduction=reduction).dtype == torch.bfloat16
        promoted = linear_cross_entropy(hidden, weight, halves, weight=class_weights, reduction=reduction)
        assert promoted.dtype == torch.float32


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_result_dtypes_of_lazy_logits(reduction):
    hidden, weight, _, target = problem(torch.bfloat16)
    target, probabilities, class_weights = target.clamp(min=0), torch.rand(N, C).softmax(-1), torch.rand(C)
    for t, u in ((target, None), (probabilities.double(), None), (probabilities.bfloat16(), class_weights)):
        found, expected = (
            cross_entropy(z, t, u, reduction=reduction) for z in (LinearLogits(hidden, weight), hidden @ weight.T)
        )
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    with pytest.raises(RuntimeError, match="cast one"):
        cross_entropy(LinearLogits(hidden, weight), target, class_weights)


def test_module_is_pytorchs():
    if not hasattr(torch.nn, "LinearCrossEntropyLoss"):
        pytest.skip("this PyTorch has no LinearCrossEntropyLoss")
    kwargs = {"out_features": (2, 3), "bias": True, "label_smoothing": 0.1, "weight": torch.rand(C)}
    theirs = torch.nn.LinearCrossEntropyLoss(H, C, **kwargs)
    ours = LinearCrossEntropyLoss(H, C, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    hidden, target = torch.randn(4, H), torch.randint(0, C, (4, 2, 3))
    torch.testing.assert_close(ours(hidden, target), theirs(hidden, target))
    capped = LinearCrossEntropyLoss(H, C, softcap=1.0, **kwargs)
    capped.load_state_dict(theirs.state_dict())
    assert capped(hidden, target) != ours(hidden, target)
    assert "softcap=1.0" in repr(capped)
    for wrong in ({"zloss": 1.0}, {"linear_bias": None}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            LinearCrossEntropyLoss(H, C, **wrong)


def test_module_on_a_device_in_a_dtype():
    head = LinearCrossEntropyLoss(H, C, device="meta", dtype=torch.float64).linear
    assert head.weight.is_meta
    assert head.weight.dtype == torch.float64
    assert head.bias is None


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"input": torch.zeros(N, 4)}, RuntimeError, "got 4 and 9"),
        ({"linear_weight": torch.zeros(C, H).double()}, RuntimeError, "float64"),
        ({"linear_weight": torch.zeros(C, H, device="meta")}, RuntimeError, "meta"),
        ({"target": torch.zeros(N - 1, dtype=torch.int64)}, ValueError, r"\(13,\).*got \(12,\)"),
        ({"target": torch.zeros(N)}, RuntimeError, "torch.float32"),
        ({"target": torch.zeros(N, C, dtype=torch.int64)}, RuntimeError, "class probabilities"),
        ({"target": torch.full((N,), C)}, IndexError, "Target 37 is out of bounds"),
        ({"target": torch.full((N,), -1)}, IndexError, "Target -1 is out of bounds"),
        ({"weight": torch.ones(C + 1)}, RuntimeError, r"all 37 classes.*\(38,\)"),
        ({"weight": torch.ones(C, requires_grad=True)}, RuntimeError, "derivative for weight"),
        ({"reduction": "average"}, ValueError, "average is not a valid value"),
        ({"label_smoothing": 1.5}, RuntimeError, "between 0.0 and 1.0"),
        ({"token_weights": torch.ones(N - 1)}, ValueError, r"token_weights \(13,\), got \(12,\)"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ({"route": "fast"}, ValueError, "route must be one of"),
        ({"route": "gradients_in_forward", "reduction": "none"}, ValueError, "per-token outputs"),
        ({"workspace": "lots"}, ValueError, "256MiB"),
        ({"accumulate": "bf16"}, ValueError, "fp32"),
        ({"main_grad": torch.zeros(C, H).half()}, ValueError, "main_grad"),
        ({"grad_scale": 2.0}, ValueError, "grad_scale"),
        ({"temperature": torch.ones(N).requires_grad_()}, RuntimeError, "temperature.*detach"),
        ({"temperature": 0}, ValueError, "temperature must be positive, got 0"),
        ({"temperature": -1.0}, ValueError, "temperature must be positive, got -1.0"),
        ({"softcap": 0}, ValueError, "softcap must be positive, or None for no bound, got 0"),
        ({"softcap": -5.0}, ValueError, "softcap must be positive, or None for no bound, got -5.0"),
    ],
)
def test_bad_input(change, error, match):
    hidden, weight, _, target = problem()
    arguments = {"input": hidden.requires_grad_(), "linear_weight": weight, "target": target, **change}
    with pytest.raises(error, match=match):
        linear_cross_entropy(**arguments)


@pytest.mark.parametrize("changed", [0, 1, 2])
@pytest.mark.parametrize("workspace", [None, 300])
def test_a_change_before_backward_is_noticed_with_class_probabilities(changed, workspace):
    inputs = [torch.randn(6, 5).requires_grad_(), torch.randn(9, 5).requires_grad_(), torch.rand(6, 9)]
    loss = linear_cross_entropy(*inputs, workspace=workspace)
    with torch.no_grad():
        inputs[changed].mul_(2)
    with pytest.raises(RuntimeError, match=r"modified (in place|by an inplace operation)"):
        loss.backward()
