"""``cross_entropy`` against float64, against PyTorch's own samples, and against everything its contract promises."""

import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import INTERPRETED
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import fused_losses.settings
from fused_losses import LinearLogits
from fused_losses.cross_entropy import CrossEntropyLoss, cross_entropy
from fused_losses.reference import cross_entropy as reference
from fused_losses.reference.tolerance import assert_accurate
from fused_losses.token_statistics import rows_statistics, softmax_rows, target_ids

OP = next(op for op in op_db if op.name == "nn.functional.cross_entropy")
MODULE = next(m for m in module_db if m.module_cls is torch.nn.CrossEntropyLoss)


def dtypes(backend, device):
    """The interpreter is wrong about bfloat16, and float64 always runs in PyTorch."""
    if backend == "triton":
        return [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)
    return [torch.float32, torch.float16, torch.bfloat16]


def gradients(fn, input, target, upstream=1.0, **kwargs):
    """``(loss, d_input)`` of ``fn`` on fresh leaves."""
    x = input.detach().clone().requires_grad_()
    loss = fn(x, target, **kwargs)
    (upstream * loss.sum()).backward()
    return loss.detach(), x.grad


def eager(x, target, z_loss=0.0, softcap=None, **kwargs):
    """The same maths as plain PyTorch runs it in the dtype of ``x``."""
    if z_loss == 0 and softcap is None:
        return F.cross_entropy(x, target, **kwargs)
    return reference.cross_entropy(x, target, z_loss=z_loss, softcap=softcap, **kwargs)


def check(input, target, backend, upstream=1.0, **kwargs):
    got = gradients(cross_entropy, input, target, upstream, backend=backend, **kwargs)
    eager_result = gradients(eager, input, target, upstream, **kwargs)
    kwargs = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    target = target.double() if target.is_floating_point() else target
    exact = gradients(reference.cross_entropy, input.double(), target, upstream, **kwargs)
    for name, *tensors in zip(("loss", "d_input"), got, eager_result, exact, strict=True):
        assert_accurate(*tensors, name)


OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"weight": True},
    {"weight": True, "label_smoothing": 0.3},
    {"z_loss": 1e-2},
    {"softcap": 5.0},
    {"weight": True, "label_smoothing": 0.1, "z_loss": 1e-1, "softcap": 3.0},
]
# Enough rows that eager PyTorch is not exact by luck: its error is what ours is measured against.
SHAPES = [((40, 131), (40,)), ((8, 33, 6), (8, 6)), ((4, 17, 2, 5), (4, 2, 5))]


def draw(shape, positions, dtype, device, soft, weight):
    x = (torch.randn(shape, device=device) * 3).to(dtype)
    C = shape[0 if len(shape) == 1 else 1]
    if soft:
        target = (5 * torch.randn(shape, device=device)).softmax(0 if len(shape) == 1 else 1).to(dtype)
    else:
        target = torch.randint(0, C, positions, device=device)
        if target.numel() > 1:
            target.view(-1)[1] = -100
    return x, target, {"weight": (torch.rand(C, device=device) + 0.1).to(dtype)} if weight else {}


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize(
    ("options", "reduction"),
    [(o, "mean") for o in OPTIONS] + [(o, r) for o in (OPTIONS[0], OPTIONS[-1]) for r in ("sum", "none")],
    ids=lambda x: x if isinstance(x, str) else "+".join(x) or "plain",
)
def test_value_and_gradient(options, reduction, soft, backend, device):
    for dtype, (shape, positions) in itertools.product(dtypes(backend, device), SHAPES):
        x, target, weight = draw(shape, positions, dtype, device, soft, "weight" in options)
        check(x, target, backend, 3.0, reduction=reduction, **(options | weight))


@pytest.mark.parametrize("options", OPTIONS[1:], ids=lambda o: "+".join(o))
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_each_option_changes_the_number(options, soft, backend, device):
    x, target, weight = draw((6, 40), (6,), torch.float32, device, soft, "weight" in options)
    plain, d_plain = gradients(cross_entropy, x, target, backend=backend)
    other, d_other = gradients(cross_entropy, x, target, backend=backend, **(options | weight))
    assert abs(plain - other) > 1e-3
    assert (d_plain - d_other).abs().max() > 1e-4


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_no_batch_is_a_batch_of_one(soft, backend, device):
    x, target, _ = draw((1, 50), (1,), torch.float32, device, soft, False)
    for reduction in ("mean", "none"):
        loss, grad = gradients(cross_entropy, x[0], target[0], reduction=reduction, backend=backend)
        batch_loss, batch_grad = gradients(cross_entropy, x, target, reduction=reduction, backend=backend)
        assert loss.shape == ()
        assert torch.equal(loss, batch_loss.squeeze())
        assert torch.equal(grad, batch_grad[0])


def test_softmax_of_shifted_and_peaked_rows(backend, device):
    """An added constant costs no accuracy, and the loss of a certain label is 0 rather than a small negative number."""
    x = torch.randn(8, 300, device=device)
    target = torch.randint(0, 300, (8,), device=device)
    check(x + 1e4, target, backend, label_smoothing=0.1)
    peaked = x.clone()
    peaked[torch.arange(8), target] += 200
    check(peaked, target, backend)
    assert (cross_entropy(peaked, target, reduction="none", backend=backend) >= 0).all()


@pytest.mark.parametrize(
    "layout", ["shifted", "channels_last", "every_second", "transposed", "expanded", "two_strides"]
)
def test_any_strides(layout, backend, device):
    base = torch.randn(4, 6, 30, device=device)
    x = {
        "shifted": lambda: base[:, :-1].transpose(1, 2),  # what trainers do: (B, V, S − 1)
        "channels_last": lambda: base.unsqueeze(2).permute(0, 3, 1, 2),
        "every_second": lambda: base[:, 0, ::2],
        "transposed": lambda: base[0].t(),
        "expanded": lambda: base[:, :1].expand(4, 6, 30).transpose(1, 2),
        "two_strides": lambda: torch.randn(2, 9, 8, 8, device=device)[:, :, ::2, ::3],  # which do not collapse into one
    }[layout]()
    target = torch.randint(0, x.shape[1], x.shape[:1] + x.shape[2:], device=device)
    check(x, target, backend)
    check(x, x.softmax(1), backend, label_smoothing=0.1)


def test_no_copy_of_the_logits(backend, device, monkeypatch):
    """Views of logits reach the operator as views: the kernels read the caller's memory."""
    seen = []
    module = sys.modules["fused_losses.cross_entropy"]  # the package's attribute of that name is the function

    def spy(logits, *args, **kwargs):
        seen.append(logits)
        return rows_statistics(logits, *args, **kwargs)

    monkeypatch.setattr(module, "rows_statistics", spy)
    base = torch.randn(4, 6, 30, device=device)
    for x in (base[:, :-1].transpose(1, 2), base[:, 0], base[0, 0], base.unsqueeze(2).permute(0, 3, 1, 2)):
        target = torch.zeros(x.shape[:1] + x.shape[2:] if x.ndim > 1 else (), dtype=torch.long, device=device)
        cross_entropy(x, target, backend=backend)
        assert seen.pop().untyped_storage().data_ptr() == base.untyped_storage().data_ptr()


# PyTorch's own samples


def assert_like_pytorch(ours, theirs, tensors):
    """Both run, with the same value and gradients, or both raise the same type."""
    try:
        expected = theirs()
    except Exception as error:
        with pytest.raises(type(error)):
            ours()
        return
    actual = ours()
    torch.testing.assert_close(actual, expected, equal_nan=True)
    if expected.requires_grad:
        kept = [t for t in tensors if isinstance(t, torch.Tensor) and t.requires_grad]
        weights = torch.randn_like(expected)
        grads = [torch.autograd.grad(r, kept, weights, allow_unused=True) for r in (actual, expected)]
        torch.testing.assert_close(*grads, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_op_db_samples(dtype, backend, device):
    if backend == "triton" and dtype not in dtypes(backend, device):
        pytest.skip("runs in PyTorch" if dtype == torch.float64 else "the interpreter is wrong about bfloat16")
    for sample in OP.sample_inputs(device, dtype, requires_grad=True):
        if dtype in (torch.float64, torch.float32):
            assert_like_pytorch(
                lambda s=sample: cross_entropy(s.input, *s.args, **s.kwargs, backend=backend),
                lambda s=sample: F.cross_entropy(s.input, *s.args, **s.kwargs),
                (sample.input, *sample.args),
            )
        else:  # PyTorch rounds in between, so ours is compared with float64 instead
            check(sample.input, *(a.detach() for a in sample.args), backend, **sample.kwargs)


def test_op_db_errors(backend, device):
    for error in OP.error_inputs_func(OP, device) if OP.error_inputs_func else ():
        s = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex):
            cross_entropy(s.input, *s.args, **s.kwargs, backend=backend)


def test_module_db_samples(backend, device):
    count = 0
    for dtype in (torch.float64, torch.float32):
        if (backend, dtype) == ("triton", torch.float64):
            continue
        for sample in MODULE.module_inputs_func(MODULE, device=device, dtype=dtype, requires_grad=True, training=True):
            make, call = sample.constructor_input, sample.forward_input
            ours = CrossEntropyLoss(*make.args, **make.kwargs, backend=backend)
            theirs = torch.nn.CrossEntropyLoss(*make.args, **make.kwargs)
            assert_like_pytorch(
                lambda m=ours, c=call: m(*c.args, **c.kwargs),
                lambda m=theirs, c=call: m(*c.args, **c.kwargs),
                call.args,
            )
            count += 1
    assert count > 5


# The contract


@given(
    rows=st.integers(0, 5),
    classes=st.integers(1, 70),
    extra=st.lists(st.integers(1, 3), max_size=2),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    soft=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.2, 1.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    weighted=st.booleans(),
    ignored=st.sampled_from([-100, 0]),
    backend=st.sampled_from(["torch", "triton"]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_agrees_with_pytorch_anywhere(
    rows, classes, extra, dtype, soft, smoothing, reduction, weighted, ignored, backend, seed
):
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (rows, classes, *extra)
    x = (torch.randn(shape, device=device) * 4).to(dtype)
    target = (
        torch.rand(shape, device=device).to(dtype) if soft else torch.randint(0, classes, (rows, *extra), device=device)
    )
    kwargs = {"reduction": reduction, "label_smoothing": smoothing, "ignore_index": -100 if soft else ignored}
    if weighted:
        kwargs["weight"] = torch.rand(classes, device=device).to(dtype)
    ours = gradients(cross_entropy, x, target, backend=backend, **kwargs)
    theirs = gradients(F.cross_entropy, x, target, **kwargs)
    torch.testing.assert_close(
        ours, theirs, equal_nan=True, **({"rtol": 4e-3, "atol": 4e-3} if dtype == torch.float16 else {})
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_nothing_to_average(reduction, z_loss, backend, device):
    empty = cross_entropy(
        torch.randn(0, 5, device=device, requires_grad=True),
        torch.zeros(0, dtype=torch.long, device=device),
        reduction=reduction,
        z_loss=z_loss,
        backend=backend,
    )
    x = torch.randn(3, 5, device=device, requires_grad=True)
    ignored = cross_entropy(
        x, torch.full((3,), -100, device=device), reduction=reduction, z_loss=z_loss, backend=backend
    )
    for loss, n in ((empty, 0), (ignored, 3)):
        expected = torch.zeros(n) if reduction == "none" else torch.tensor(math.nan if reduction == "mean" else 0.0)
        torch.testing.assert_close(loss.detach().cpu(), expected, equal_nan=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_targets_without_weight(reduction, smoothing, backend, device):
    x, weight = torch.randn(3, 5, device=device), torch.tensor([0.0, 0.0, 2.0, 1.0, 1.0], device=device)
    kwargs = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
    for target in ([0, 1, 0], [1, -100, -100], [-100, -100, -100], [0, 2, -100]):
        target = torch.tensor(target, device=device)
        ours = gradients(cross_entropy, x, target, backend=backend, **kwargs)
        torch.testing.assert_close(ours, gradients(F.cross_entropy, x, target, **kwargs), equal_nan=True)
        exact = reference.cross_entropy(x, target, **kwargs)
        torch.testing.assert_close(ours[0], exact, equal_nan=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_special_logits(bad, backend, device):
    """Where the row counts, the results are PyTorch's; in an ignored row, a special logit reaches nothing."""
    x = torch.randn(4, 9, device=device)
    x[1, 2] = bad
    x[3] = bad
    target = torch.tensor([1, 4, 2, -100], device=device)
    loss, grad = gradients(cross_entropy, x, target, reduction="none", backend=backend)
    expected, expected_grad = gradients(F.cross_entropy, x, target, reduction="none")
    torch.testing.assert_close(loss, expected, equal_nan=True)
    torch.testing.assert_close(grad[:3], expected_grad[:3], equal_nan=True)
    assert (grad[3] == 0).all()
    everywhere = torch.full((2, 9), -math.inf, device=device)
    assert cross_entropy(everywhere, target[:2], backend=backend).isnan()


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_class_weight_without_end_reaches_no_ignored_row(bad, backend, device):
    x, target = torch.randn(4, 9, device=device), torch.tensor([1, -100, 3, 2], device=device)
    weight = torch.ones(9, device=device)
    weight[5] = bad
    _, d_input = gradients(cross_entropy, x, target, weight=weight, label_smoothing=0.1, backend=backend)
    assert not d_input[1].any()
    assert d_input[0].isnan().any()


def test_minus_infinity_at_the_target(backend, device):
    x = torch.zeros(2, 5, device=device)
    x[0, 3] = -math.inf
    loss, grad = gradients(cross_entropy, x, torch.tensor([3, 1], device=device), reduction="none", backend=backend)
    expected, expected_grad = gradients(F.cross_entropy, x, torch.tensor([3, 1], device=device), reduction="none")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("target", [[0, 5], [-1, 0], [0, 2**40]])
def test_target_out_of_range(target, backend, device):
    if device == "cuda":
        pytest.skip("a device-side assert ends the process")
    with pytest.raises(IndexError, match="out of bounds"):
        cross_entropy(torch.randn(2, 5), torch.tensor(target), backend=backend)


@pytest.mark.parametrize("softcap", [0, -5.0, math.inf, math.nan])
def test_a_softcap_is_positive(softcap):
    hidden, weight, target = torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3, dtype=torch.long)
    for logits in (hidden @ weight.T, fused_losses.LinearLogits(hidden, weight)):
        with pytest.raises(ValueError, match=f"softcap must be positive, or None for no bound, got {softcap}"):
            cross_entropy(logits, target, softcap=softcap)


@pytest.mark.parametrize(
    ("input", "target", "kwargs"),
    [
        ((3, 5), torch.zeros(4, dtype=torch.long), {}),
        ((3, 5), torch.zeros(3, 1, dtype=torch.long), {}),
        ((3, 5), torch.zeros(3, dtype=torch.int32), {}),
        ((3, 5), torch.zeros(3, 5, dtype=torch.long), {}),
        ((3, 5), torch.zeros(3), {}),
        ((), torch.zeros((), dtype=torch.long), {}),
        ((3, 5), torch.zeros(3, dtype=torch.long), {"weight": torch.ones(4)}),
        ((3, 5), torch.zeros(3, dtype=torch.long), {"weight": torch.ones(5).double()}),
        ((3, 5), torch.zeros(3, dtype=torch.long), {"label_smoothing": 1.5}),
        ((3, 5), torch.zeros(3, dtype=torch.long), {"reduction": "average"}),
        ((3, 5), torch.rand(3, 5), {"ignore_index": 2}),
        ((3, 5), torch.rand(3, 5), {"ignore_index": 0}),
        ((3, 5), torch.zeros(3, dtype=torch.long), {"weight": torch.ones(5).requires_grad_()}),
        ((2, 5, 3), torch.zeros(2, 4, dtype=torch.long), {}),
    ],
)
def test_wrong_input_raises_as_pytorch_does(input, target, kwargs, backend, device):
    kwargs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    x, target = torch.randn(input, device=device, requires_grad=True), target.to(device)
    with pytest.raises(Exception) as theirs:
        F.cross_entropy(x, target, **kwargs)
    with pytest.raises(theirs.type):
        cross_entropy(x, target, **kwargs, backend=backend)


def test_extras_on_what_only_pytorch_accepts(device):
    with pytest.raises((ValueError, RuntimeError)):
        cross_entropy(torch.randn(3, 5, device=device), torch.zeros(3, dtype=torch.int32, device=device), z_loss=0.1)


@pytest.mark.parametrize(
    "extra",
    [{"z_loss": 0.1}, {"softcap": 3.0}, {"out_dtype": torch.float64}, {"return_statistics": True}],
    ids="+".join,
)
def test_an_extra_without_classes(extra, device):
    """PyTorch takes such logits, and has no such option."""
    x = torch.zeros(3, 0, device=device)
    assert cross_entropy(x, x).isnan()
    with pytest.raises(ValueError, match=r"need logits .* got input \(3, 0\) torch.float32"):
        cross_entropy(x, x, **extra)


@pytest.mark.parametrize(
    ("option", "shown"),
    [({"weight": torch.ones(4, 1)}, r"weight \(4, 1\)"), ({"label_smoothing": math.nan}, "label_smoothing nan")],
)
def test_an_extra_where_an_option_does_not_fit(option, shown):
    """PyTorch takes both; the message shows which it is."""
    x, target = torch.zeros(2, 4, 3), torch.zeros(2, 3, dtype=torch.long)
    assert cross_entropy(x, target, **option).ndim == 0
    with pytest.raises(ValueError, match=shown):
        cross_entropy(x, target, **option, z_loss=0.1)


def test_legacy_reductions(backend, device):
    x, target = torch.randn(3, 5, device=device), torch.tensor([0, 1, 2], device=device)
    for size_average, reduce in itertools.product([None, True, False], repeat=2):
        if size_average is None and reduce is None:
            continue
        with pytest.warns(UserWarning, match="deprecated"):
            expected = F.cross_entropy(x, target, size_average=size_average, reduce=reduce)
        with pytest.warns(UserWarning, match="deprecated"):
            ours = cross_entropy(x, target, size_average=size_average, reduce=reduce, backend=backend)
        torch.testing.assert_close(ours, expected)


def test_uint8_targets(backend, device):
    x, target = torch.randn(3, 5, device=device), torch.tensor([0, 4, 2], device=device)
    assert torch.equal(
        cross_entropy(x, target.to(torch.uint8), backend=backend), cross_entropy(x, target, backend=backend)
    )


def test_mixed_dtypes_and_autocast(device):
    x = torch.randn(3, 5, device=device, dtype=torch.bfloat16)
    for target in (torch.tensor([0, 1, 2], device=device), torch.rand(3, 5, device=device), torch.rand(3, 5).double()):
        target = target.to(device)
        for enabled in (False, True):
            with torch.autocast(device, dtype=torch.bfloat16, enabled=enabled):
                ours, theirs = cross_entropy(x, target), F.cross_entropy(x, target)
            assert ours.dtype == theirs.dtype, (target.dtype, enabled)
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("options", [{}, {"out_dtype": torch.float32}, {"return_statistics": True}])
def test_an_fp32_weight_of_classes_under_autocast(backend, device, options):
    x = torch.randn(6, 13, device=device, dtype=torch.bfloat16, requires_grad=True)
    target, weight = torch.tensor([0, 3, -100, 5, 12, 1], device=device), torch.rand(13, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        expected = F.cross_entropy(x, target, weight)
        found = cross_entropy(x, target, weight, backend=backend, **options)
    found = found[0] if "return_statistics" in options else found
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, x) for loss in (found, expected)))


def test_probabilities_and_weights_get_gradients(backend, device):
    """With class probabilities PyTorch differentiates both, and so do we."""
    x = torch.randn(3, 7, 2, device=device)
    t = torch.rand(3, 7, 2, device=device)
    w = torch.rand(7, device=device)
    results = []
    for fn in (lambda *a, **k: cross_entropy(*a, **k, backend=backend), F.cross_entropy):
        leaves = [v.clone().requires_grad_() for v in (x, t, w)]
        results.append(torch.autograd.grad(fn(*leaves, label_smoothing=0.2), leaves))
    torch.testing.assert_close(*results)
    only = t.clone().requires_grad_()
    (d_t,) = torch.autograd.grad(cross_entropy(x, only, w, backend=backend), only)
    (expected,) = torch.autograd.grad(F.cross_entropy(x, only, w), only)
    torch.testing.assert_close(d_t, expected)


def test_inputs_are_left_alone_and_repeats_are_equal(backend, device):
    x = torch.randn(6, 33, device=device, requires_grad=True)
    target = torch.tensor([0, 1, 2, -100, 32, 5], device=device)
    weight = torch.rand(33, device=device)
    before = [t.detach().clone() for t in (x, target, weight)]
    runs = []
    for _ in range(2):
        loss = cross_entropy(x, target, weight, label_smoothing=0.1, z_loss=0.1, backend=backend)
        first = torch.autograd.grad(loss * 3, x, retain_graph=True)[0]
        second = torch.autograd.grad(loss * 3, x)[0]
        assert torch.equal(first, second)
        runs.append((loss.detach(), first))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)
    for t, b in zip((x, target, weight), before, strict=True):
        assert torch.equal(t.detach(), b)
        assert t._version == 0


def test_masked_fill_on_the_result(backend, device):
    """The caller gets no tensor that backward reads: writing into the losses changes only the losses."""
    x = torch.randn(4, 9, device=device, requires_grad=True)
    target = torch.tensor([1, 2, 3, 4], device=device)
    losses = cross_entropy(x, target, reduction="none", backend=backend)
    losses.masked_fill_(torch.tensor([True, False, False, False], device=device), 0)
    (grad,) = torch.autograd.grad(losses.sum(), x)
    assert (grad[0] == 0).all()
    expected = torch.autograd.grad(F.cross_entropy(x, target, reduction="none")[1:].sum(), x)[0]
    torch.testing.assert_close(grad, expected)


def test_inplace_backward(backend, device):
    x = torch.randn(4, 9, device=device, requires_grad=True)
    target = torch.tensor([1, 2, -100, 4], device=device)
    (expected,) = torch.autograd.grad(cross_entropy(x, target, backend=backend), x)

    logits = x * 1
    loss = cross_entropy(logits, target, inplace_backward=True, backend=backend)
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert grad.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(grad, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()

    logits = x * 1
    other = logits.square().sum()  # saves the logits
    loss = cross_entropy(logits, target, inplace_backward=True, backend=backend)
    torch.autograd.grad(loss, logits, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_inplace_backward_of_rows_that_share_memory(backend, device):
    x = torch.randn(1, 9, device=device, requires_grad=True)
    target = torch.tensor([1, 2, -100, 0], device=device)
    for options in ({}, {"inplace_backward": True}):
        for rows in (lambda x: x.expand(4, 9), lambda x: x[0].unfold(0, 6, 1), lambda x: x.as_strided((4, 3), (2, 1))):
            loss = cross_entropy(rows(x * 1), target, backend=backend, **options)
            (grad,) = torch.autograd.grad(loss, x)
            torch.testing.assert_close(grad, torch.autograd.grad(F.cross_entropy(rows(x), target), x)[0])


def test_batched_gradients():
    x, target = torch.randn(4, 5, requires_grad=True), torch.tensor([0, -100, 3, 4])
    ours, plain = (
        torch.autograd.functional.jacobian(lambda x, fn=fn: fn(x, target, reduction="none"), x, vectorize=True)
        for fn in (cross_entropy, F.cross_entropy)
    )
    torch.testing.assert_close(ours, plain)


def test_forward_mode_derivative_for_class_weights():
    """With class probabilities it is PyTorch's; with class indices it is an error, as in reverse mode, rather than 0."""
    x, t, u = (torch.randn(4, 5, dtype=torch.float64) for _ in range(3))
    weight, tangent = u[0].exp(), u[1]
    for options in ({}, {"label_smoothing": 0.2}):

        def of(fn, target, weight, options=options):
            return torch.func.jvp(lambda w: fn(x, target, w, **options), (weight,), (tangent,))

        torch.testing.assert_close(of(cross_entropy, t.softmax(-1), weight), of(F.cross_entropy, t.softmax(-1), weight))
        with pytest.raises(RuntimeError, match="derivative for column_weight"):
            of(cross_entropy, torch.tensor([0, 1, 2, 3]), weight)


def test_no_gradients_when_disabled(backend, device):
    x = torch.randn(4, 9, device=device, requires_grad=True)
    target = torch.tensor([1, 2, 3, 4], device=device)
    with torch.no_grad():
        assert cross_entropy(x, target, backend=backend).grad_fn is None
    with torch.inference_mode():
        torch.testing.assert_close(cross_entropy(x, target, backend=backend), F.cross_entropy(x, target))


def test_statistics_for_metrics(backend, device):
    x = torch.randn(2, 11, 3, device=device, requires_grad=True)
    target = x.argmax(1)
    target[0, 0] = (target[0, 0] + 1) % 11
    target[1, 1] = -100
    loss, statistics = cross_entropy(x, target, z_loss=0.1, return_statistics=True, backend=backend)
    torch.testing.assert_close(loss, cross_entropy(x, target, z_loss=0.1, backend=backend))
    expected = x.detach().logsumexp(1)
    expected[1, 1] = 0  # ignored
    torch.testing.assert_close(statistics.logsumexp, expected)
    torch.testing.assert_close(statistics.log_probs, -F.cross_entropy(x.detach(), target, reduction="none"))
    assert statistics.is_top1.tolist() == [[False, True, True], [True, False, True]]
    assert not statistics.logsumexp.requires_grad
    assert not statistics.log_probs.requires_grad


def test_a_sum_of_many_rows_is_rounded_once(device):
    x, target = torch.randn(5000, 7, device=device), torch.randint(0, 7, (5000,), device=device)
    rows, total = (cross_entropy(x, target, reduction=r) for r in ("none", "sum"))
    assert torch.equal(total, rows.double().sum().float())


def test_statistics_of_class_probabilities(backend, device):
    x = torch.randn(2, 11, 3, device=device)
    target = torch.rand(2, 11, 3, device=device).softmax(1)
    loss, statistics = cross_entropy(x, target, return_statistics=True, backend=backend)
    torch.testing.assert_close(loss, F.cross_entropy(x, target))
    torch.testing.assert_close(statistics, (None, x.logsumexp(1), None))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("lazy", [False, True])
def test_out_dtype(lazy, soft, reduction, backend, device):
    hidden, weight = (torch.randn(n, 16, device=device, dtype=torch.bfloat16) for n in (6, 21))
    x = LinearLogits(hidden.requires_grad_(), weight) if lazy else (hidden @ weight.T).detach().requires_grad_()
    inputs, z = ([hidden], hidden.double() @ weight.T.double()) if lazy else ([x], x.double())
    target = z.detach().roll(1, 0).softmax(-1).bfloat16() if soft else z.argmin(-1)
    how = {"reduction": reduction, "backend": backend}
    loss = CrossEntropyLoss(reduction=reduction, out_dtype=torch.float32, backend=backend)(x, target)
    assert loss.dtype == torch.float32
    exact = F.cross_entropy(z, target.double() if soft else target, reduction=reduction)
    logits = (hidden @ weight.T).float()
    eager = F.cross_entropy(logits, target.float() if soft else target, reduction=reduction)
    assert_accurate(loss, eager, exact)
    short = cross_entropy(x, target, **how)
    assert short.dtype == torch.bfloat16
    torch.testing.assert_close(short, loss.bfloat16(), rtol=0, atol=0)
    ours, rounded = (torch.autograd.grad(t.sum(), inputs) for t in (loss, short))
    torch.testing.assert_close(ours, rounded, rtol=0, atol=0)


def test_second_derivatives_and_forward_mode():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1, -100, 4])
    soft = torch.rand(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(5, dtype=torch.float64)

    def hard(x):
        return cross_entropy(x, target, weight, label_smoothing=0.1, z_loss=0.1, softcap=4.0)

    def probabilities(x, t):
        return cross_entropy(x, t, weight, label_smoothing=0.1, reduction="none")

    for fn, inputs in ((hard, (x,)), (probabilities, (x, soft))):
        assert torch.autograd.gradcheck(fn, inputs, check_forward_ad=True, check_batched_grad=False)
        assert torch.autograd.gradgradcheck(fn, inputs)
    torch.testing.assert_close(torch.func.grad(hard)(x), torch.autograd.grad(hard(x), x)[0].detach(), check_dtype=True)


def test_nan_in_an_ignored_row_reaches_no_derivative():
    x, target = torch.randn(3, 5, dtype=torch.float64), torch.tensor([1, -100, 2])
    expected = torch.func.grad(lambda x: F.cross_entropy(x, target))(x)
    x[1] = math.nan
    torch.testing.assert_close(torch.func.grad(lambda x: cross_entropy(x, target))(x), expected)
    leaf = x.requires_grad_()
    (once,) = torch.autograd.grad(cross_entropy(leaf, target), leaf, create_graph=True)
    (twice,) = torch.autograd.grad(once.square().sum(), leaf)
    torch.testing.assert_close(once, expected)
    assert twice.isfinite().all()


def test_second_derivatives_of_large_logits_are_refused(device):
    x = torch.randn(2, 2**21 + 1, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(cross_entropy(x, torch.tensor([0, 1], device=device)), x)
    with pytest.raises(RuntimeError, match=r"\(2, 2097153\)"):
        torch.autograd.grad(cross_entropy(x, torch.tensor([0, 1], device=device)), x, create_graph=True)
    assert grad.isfinite().all()


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_compiles_without_a_break(soft, backend, device):
    x = torch.randn(2, 3, 17, device=device, requires_grad=True)
    target = torch.rand(2, 17, 3, device=device) if soft else torch.randint(0, 17, (2, 3), device=device)
    weight = torch.rand(17, device=device)

    def loss(x):
        return cross_entropy(
            x.transpose(1, 2), target, weight, label_smoothing=0.1, z_loss=0.1, softcap=9.0, backend=backend
        )

    # Inductor sees the same operator for both backends and both kinds of target.
    compiler = "inductor" if backend == "torch" and not soft else "aot_eager"
    compiled = torch.compile(loss, fullgraph=True, backend=compiler)(x)
    torch.testing.assert_close(compiled, loss(x))
    torch.testing.assert_close(torch.autograd.grad(compiled, x), torch.autograd.grad(loss(x), x))


def test_module_compiles(backend, device):
    module = CrossEntropyLoss(label_smoothing=0.1, z_loss=0.2, backend=backend)
    x, target = torch.randn(3, 17, device=device), torch.tensor([1, 2, 3], device=device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, target), module(x, target))


def test_operators_pass_opcheck(backend, device):
    x = torch.randn(2, 9, 3, device=device, requires_grad=True)
    ids = torch.randint(0, 9, (6, 2), device=device)
    u, t = torch.rand(9, device=device), torch.rand(6, device=device) + 1
    outputs = "log_probs,entropy,log_sum_sq_probs,sum_log_probs,max_logit,is_top1"
    torch.library.opcheck(softmax_rows, (x, ids, u, t, None, 0.0, 2.0, 30.0, outputs, False, backend, ""))
    soft = torch.rand(2, 9, 3, device=device)
    torch.library.opcheck(
        softmax_rows, (x, None, u, t, soft, 0.1, 1.0, None, "sum_log_probs,weight_sum", False, backend, "")
    )
    torch.library.opcheck(target_ids, (ids, 9, -100))


def test_meta_and_fake_tensors():
    x = torch.empty(4, 7, 3, device="meta", requires_grad=True)
    loss = cross_entropy(x, torch.empty(4, 3, device="meta", dtype=torch.long), reduction="none")
    assert (loss.shape, loss.device.type) == ((4, 3), "meta")
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert grad.shape == x.shape


def test_backend_that_cannot_run(monkeypatch):
    x, target = torch.randn(2, 5, dtype=torch.float64), torch.tensor([0, 1])
    with pytest.raises(RuntimeError, match="float64 runs on backend='torch'"):
        cross_entropy(x, target, backend="triton")
    with pytest.raises(ValueError, match="backend must be one of triton, torch"):
        cross_entropy(x, target, backend="cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="needs tensors on a CUDA or ROCm device, got cpu"):
        cross_entropy(x.float(), target, backend="triton")


def test_backend_setting_reaches_the_operator(device):
    """The setting is read at the call, and an argument overrides it."""
    x, target = torch.randn(2, 5, device=device), torch.tensor([0, 1], device=device)
    with fused_losses.settings.backend("triton"), pytest.raises(RuntimeError, match="float64"):
        cross_entropy(x.double(), target)
    with fused_losses.settings.backend("triton"):
        cross_entropy(x.double(), target, backend="torch")
    cross_entropy(x.double(), target)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with 20 GiB")
def test_more_logits_than_int32_counts(backend):
    x = torch.randn(9000, 256000, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(0, 256000, (9000,), device="cuda")
    loss = cross_entropy(x, target, reduction="none", backend=backend)
    loss.sum().backward()
    tail = x[-8:].detach().double()
    torch.testing.assert_close(
        loss[-8:].double(), F.cross_entropy(tail, target[-8:], reduction="none"), rtol=1e-2, atol=1e-2
    )
    assert x.grad[-1].abs().sum() > 0


@pytest.mark.parametrize("target", [torch.rand(2, 8, 8).softmax(-1), torch.ones(2, 8, dtype=torch.long)])
def test_classes_of_lazy_logits_at_the_end_are_refused(target):
    """With 8 tokens and 8 classes, a tensor's tokens and classes would be taken for one another."""
    z = LinearLogits(torch.randn(2, 8, 4), torch.randn(8, 4))
    with pytest.raises(ValueError, match=r"of input \(2, 8, 8\) are to stand at dimension 1.*flatten\(0, -2\)"):
        cross_entropy(z, target)
    with pytest.raises(ValueError, match="stands at 2"):
        CrossEntropyLoss()(z, target)
    torch.testing.assert_close(cross_entropy(z.mT, target), F.cross_entropy(z.materialize().mT, target))
