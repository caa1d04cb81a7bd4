"""How gradients made in forward are scaled, and the operators that take them; test_linear_cross_entropy.py has their values."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import INTERPRETED

from fused_losses import (
    LinearLogits,
    distillation_loss,
    gradients_in_forward,
    kd_loss,
    linear_cross_entropy,
    planning,
    products,
    sft_loss,
    token_loss,
    two_heads,
)
from fused_losses.gradients_in_forward import Factors, _with_gradients, linear_loss, scaled
from fused_losses.head import Head
from fused_losses.products import add_product
from fused_losses.reference.tolerance import assert_accurate
from fused_losses.row_statistics import RowStatistics, coefficients
from fused_losses.token_statistics import rows_module


def runs(backend, dtype):
    """float64 always runs in PyTorch, and the interpreter is wrong about bfloat16."""
    return (
        backend == "torch" or dtype in (torch.float16, torch.float32) or (dtype == torch.bfloat16 and not INTERPRETED)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("wider", [False, True])
def test_scaled_rounds_once(dtype, wider, backend, device):
    if not runs(backend, dtype):
        pytest.skip("runs in PyTorch" if dtype == torch.float64 else "the interpreter is wrong about bfloat16")
    stored = torch.promote_types(dtype, torch.float32) if wider else dtype
    gradient = torch.randn(21000, 3, device=device).to(stored)  # several blocks and a partial one for each program
    scale = torch.tensor(1 / 3, dtype=torch.promote_types(dtype, torch.float32), device=device)
    expected = (gradient.double() * scale.double()).to(stored if wider and stored == dtype else dtype)
    out = scaled(gradient.clone(), scale, dtype, in_place=False, backend=backend)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected, rtol=torch.finfo(dtype).eps, atol=0)
    if dtype.itemsize == 2 and not wider:
        once = (gradient.float() * scale).to(dtype)
        assert torch.equal(out, once)
        assert not torch.equal(out, gradient * scale.to(dtype))  # the result of a 0-dim factor in the gradient's dtype


def test_scaled_needs_nothing_that_a_gpu_lacks(monkeypatch):
    """PyTorch's loss-scaling operator has no bfloat16 on CUDA, and a CPU cannot show that."""
    monkeypatch.delattr(torch, "_amp_foreach_non_finite_check_and_unscale_")
    gradient = torch.randn(2**20 + 7).to(torch.bfloat16)
    expected = (gradient.float() * torch.tensor(1 / 3)).bfloat16()
    assert torch.equal(scaled(gradient, torch.tensor(1 / 3), torch.bfloat16, in_place=True, backend="torch"), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("number", [0.5, 1.0, torch.nan])
def test_scaled_in_place_is_the_same_memory_and_out_of_place_is_not(dtype, number, backend, device):
    if not runs(backend, dtype):
        pytest.skip("the interpreter is wrong about bfloat16")
    gradient, scale = torch.randn(5, 3, device=device).to(dtype), torch.tensor(number, device=device)
    before = gradient.clone()
    out = scaled(gradient, scale, dtype, in_place=False, backend=backend)
    assert torch.equal(gradient, before)
    assert out.data_ptr() != gradient.data_ptr()
    assert scaled(gradient, scale, dtype, in_place=True, backend=backend).data_ptr() == gradient.data_ptr()
    torch.testing.assert_close(gradient, out, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(out, before * number, equal_nan=True)


def test_nothing_is_multiplied_by_1(backend, device, monkeypatch):
    gradient, stores = torch.full((9000,), 3.0, device=device), []
    if backend == "triton" and INTERPRETED:
        from triton.runtime.interpreter import InterpreterBuilder

        store = InterpreterBuilder.create_masked_store
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", lambda *a: stores.append(a) or store(*a))
    for number in (1.0, 2.0):
        version, many = gradient._version, len(stores)
        scale = torch.tensor(number, device=device)
        assert scaled(gradient, scale, torch.float32, in_place=True, backend=backend) is gradient
        assert (gradient == 3 * number).all()
        if device == "cpu" and (backend == "torch" or INTERPRETED):
            written = len(stores) > many if backend == "triton" else gradient._version > version
            assert written == (number == 2)


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter alone can be stopped at the first of 4 GiB")
def test_a_size_that_32_bits_just_hold_is_scaled(monkeypatch):
    """For example 524 287 tokens of hidden size 4096, which are 2**31 - 4096 entries."""
    from triton.runtime.interpreter import InterpreterBuilder

    from fused_losses.kernels.scale import _scale_kernel, scale_config

    def stop(*_):
        raise StopIteration("stored")

    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", stop)
    BLOCK, *_ = scale_config()
    gradient = torch.ones(BLOCK)
    with pytest.raises(Exception, match="stored"):
        _scale_kernel[(1,)](gradient, torch.tensor(2.0), gradient, 2**31 - 4096, IN_PLACE=True, BLOCK=BLOCK)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU it would be an illegal access")
def test_the_interpreter_refuses_what_lies_outside_the_tensors():
    from fused_losses.kernels.scale import _scale_kernel

    gradient = torch.ones(8)
    with pytest.raises(Exception, match="outside every tensor"):
        _scale_kernel[(1,)](gradient, torch.tensor(2.0), gradient, 9, IN_PLACE=True, BLOCK=16)


@pytest.fixture
def upstream(monkeypatch):
    """The factors by which backward multiplies the gradients that forward made."""
    seen, scale_gradients = [], gradients_in_forward.scale_gradients

    def spy(gradients, dtypes, g, backend):
        seen.append(g.item())
        return scale_gradients(gradients, dtypes, g, backend)

    for module in (gradients_in_forward, two_heads):
        monkeypatch.setattr(module, "scale_gradients", spy)
    return seen


@pytest.mark.parametrize("weighted", [False, True])
def test_a_mean_is_divided_in_forward(weighted, backend, device, upstream):
    """So that ``loss.backward()`` has nothing left to multiply."""
    hidden, weight = (torch.randn(n, 8, device=device).requires_grad_() for n in (5, 7))
    class_weight = torch.rand(7, device=device) if weighted else None
    ids = torch.arange(5, device=device)
    for target in (ids, ids.masked_fill(ids == 2, -100), torch.ones(5, 7, device=device).softmax(-1)):
        how = {"weight": class_weight, "label_smoothing": 0.1}
        ours = linear_cross_entropy(hidden, weight, target, **how, route="gradients_in_forward", backend=backend)
        found = torch.autograd.grad(3 * ours, (hidden, weight))
        expected = torch.autograd.grad(3 * F.cross_entropy(hidden @ weight.T, target, **how), (hidden, weight))
        torch.testing.assert_close(found, expected)
    assert upstream == [3.0] * 3


MEANS = {
    "sft": sft_loss,
    "sft_of_a_batch": lambda z, ids: sft_loss(z, ids, num_items_in_batch=torch.tensor(11, device=ids.device)),
    "distillation": lambda z, ids: distillation_loss(z, z.detach() * 2, ids, kind="jsd"),
    "distillation_of_a_batch": lambda z, ids: distillation_loss(z, z.detach() * 2, ids, num_items_in_batch=11),
    "distillation_from_tensors": lambda z, ids: distillation_loss(z, logits_of(z).detach() * 2, ids),
    "kd": lambda z, ids: kd_loss(z, z.detach() * 2, ids),
}


def logits_of(z):
    return z if isinstance(z, torch.Tensor) else z.materialize()


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("loss", [sft_loss, lambda z, ids, **how: distillation_loss(z, z.detach() * 2, ids, **how)])
def test_a_count_of_items_is_one_number(loss, lazy):
    """It weighs every token alike, as a tensor of any shape, and keeps a gradient of its own."""
    z, ids = LinearLogits(torch.randn(5, 8), torch.randn(7, 8)), torch.tensor([3, -100, 0, 6, 2])
    z = z if lazy else z.materialize()
    expected = loss(z, ids, num_items_in_batch=7)
    count = torch.tensor([7.0], requires_grad=True)
    found = loss(z, ids, num_items_in_batch=count)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, count)[0], -expected[None] / 7)
    with pytest.raises(RuntimeError, match="invalid for input of size 5"):
        loss(z, ids, num_items_in_batch=torch.arange(1, 6))


@pytest.mark.parametrize("loss", MEANS.values(), ids=MEANS)
def test_means_of_trainers_are_divided_in_forward(loss, device, upstream):
    hidden, weight = (torch.randn(n, 8, device=device).requires_grad_() for n in (5, 7))
    ids = torch.tensor([3, -100, 0, 6, 2], device=device)
    found = torch.autograd.grad(3 * loss(LinearLogits(hidden, weight), ids), (hidden, weight))
    expected = torch.autograd.grad(3 * loss(hidden @ weight.T, ids), (hidden, weight))
    torch.testing.assert_close(found, expected)
    assert upstream == [3.0]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_add_product(first, out_dtype, monkeypatch):
    monkeypatch.setattr(products, "BLOCK", 5)
    a, b = torch.randn(13, 11).bfloat16(), torch.randn(11, 3).bfloat16()
    out = torch.randn(13, 3).to(out_dtype)
    expected = a.double() @ b.double() + (0 if first else out.double())
    add_product(out, a, b, first=first)
    tolerance = 1e-6 if out_dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU has none of these products")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_that_cuda_does_not_give_in_fp32(dtype, monkeypatch):
    """Products of float16 where PyTorch may sum in float16, and of bfloat16 on a T4: there they raise, as on a CPU."""
    a, b = torch.randn(13, 11).to(dtype), torch.randn(11, 3).to(dtype)
    out, exact = torch.randn(13, 3), a.double() @ b.double()
    before = out.double()
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", property(lambda t: True))
        assert products.gives_fp32(a)
        if dtype == torch.float16:
            patch.setattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", True)
        else:
            patch.setattr(products, "multiplies_matrices", lambda device: False)
        add_product(out, a, b, first=False)
        found = products.product(a, b.t())
    torch.testing.assert_close(out.double(), before + exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keep", [None, torch.tensor([0, 2, 3])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck_linear_loss(keep, dtype, monkeypatch):
    # opcheck compares the outputs after a backward, which overwrites the gradients among them.
    monkeypatch.setattr(gradients_in_forward, "read_again", lambda saved: True)
    hidden, weight = torch.randn(4, 7).to(dtype).requires_grad_(), torch.randn(9, 7).to(dtype).requires_grad_()
    ids, factors = torch.tensor([[1], [-100], [3], [8]]), torch.tensor([-1.0, 0.0, -1.0, 2.0])
    of_tokens = {"ids": ids, "column_weight": None, **Factors(factors, factors, factors)._asdict(), "keep": keep}
    how = {"wanted": [True, True, False, False, False], "workspace": 2**20, "accumulate": None, "backend": "torch"}
    how |= {"zero_ignored": keep is None, "top1": True}
    torch.library.opcheck(linear_loss, (), Head(hidden, weight).packed() | of_tokens | how)


def test_float16_chunks_are_summed_at_one_factor(small_pieces):
    """Later chunks have larger gradients, and lower the factor of the chunks before them."""
    inputs, target = [torch.randn(n, 8).half() for n in (32, 40)], torch.randint(0, 40, (32,))
    token_weights, found = torch.ones(32), []
    token_weights[16:] = 8
    for dtype in (torch.float16, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        how = {"token_weights": token_weights, "reduction": "sum", "z_loss": 0.1}
        how |= {"route": "gradients_in_forward", "workspace": 1}
        found.append(torch.autograd.grad(linear_cross_entropy(*leaves, target, **how), leaves))
    for ours, exact in zip(*found, strict=True):
        assert (ours - exact).norm() < 2e-3 * exact.norm()


def test_the_loss_alone_has_a_gradient():
    """The other outputs are data: a gradient of theirs would be lost."""
    inputs = Head(*(torch.randn(n, 7).requires_grad_() for n in (4, 9)))
    ids, factors = torch.tensor([[1], [-100], [3], [8]]), torch.ones(4)
    of_tokens = {"ids": ids, "column_weight": None, **Factors(factors, factors, factors)._asdict(), "keep": None}
    how = {"wanted": [True, True, False, False, False], "workspace": 2**20, "accumulate": None, "backend": "torch"}
    found = linear_loss(**inputs.packed(), **of_tokens, **how, zero_ignored=True, top1=True)
    assert [t.requires_grad for t in found] == [True] + [False] * 8


def test_opcheck_with_gradients():
    inputs = [torch.randn(3, 2).requires_grad_(), torch.randn(4).bfloat16().requires_grad_()]
    gradients = [torch.randn(3, 2), torch.randn(4)]
    torch.library.opcheck(_with_gradients, (torch.tensor(2.0), gradients, inputs, "torch"))


TILES = 2 * 8192 + 5  # entries
OPTIONS = {"plain": {}, "capped": {"scale": 2.0, "softcap": 3.0}, "negative": {"scale": -1.5}}


@pytest.mark.parametrize(
    ("V", "weighted", "options"),
    [*itertools.product((35, 48), (False, True), OPTIONS), (TILES, True, "capped"), (TILES, False, "negative")],
)
def test_one_pass_is_statistics_then_gradient(V, weighted, options, backend, device):
    N, rows, options = 9, rows_module(backend), OPTIONS[options]
    room = torch.full((N, planning.padded(V)), torch.nan, device=device)  # the padding beyond a row reaches nothing
    logits = room[:, :V]
    logits.copy_(3 * torch.randn(N, V))
    ids = torch.randint(0, V, (N, 1), device=device)
    ids[2], logits[2] = -100, torch.nan
    logits[3, :5] = -torch.inf * options.get("scale", 1.0)
    whole, per_row = logits.clone(), torch.randn(4, N, device=device)
    column_weight = torch.rand(V, device=device) if weighted else None
    temperature, of_log_probs, of_sum, of_square = per_row[0].exp(), *per_row[1:]
    of_sum, names = (of_sum, ["log_probs", "sum_log_probs", "is_top1"]) if weighted else (None, ["log_probs"])

    def two_passes(z):
        wide = z.dtype
        seen = (z.unsqueeze(-1), ids, *(None if t is None else t.to(wide) for t in (column_weight, temperature)))
        module = rows_module("torch") if wide == torch.float64 else rows
        found = module.softmax_rows_fwd(*seen, outputs=names, **options)
        of = RowStatistics(of_log_probs[:, None], 2 * of_square * found.logsumexp)
        of = of._replace(sum_log_probs=of_sum) if weighted else of
        terms = coefficients(of, found, V, column_weight, wide)
        d = module.softmax_rows_bwd(*seen, found.logsumexp, *terms, **options)
        return found, d.squeeze(-1)

    (found, expected), (_, exact) = two_passes(whole), two_passes(whole.double())
    arguments = (ids, column_weight, temperature, of_log_probs, of_sum, of_square)
    ours = rows.softmax_rows_fwd_bwd(logits, *arguments, outputs=names, **options)
    for name, a, b in zip(RowStatistics._fields, ours, found, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=name)
    assert not logits[2].any()
    assert_accurate(logits, expected, exact, "d_logits")
    used = logits.clone()
    for i in (3, 4, 5) if weighted else (3, 5):  # each factor changes the gradient
        logits.copy_(whole)
        fewer = [torch.zeros_like(t) if k == i else t for k, t in enumerate(arguments)]
        rows.softmax_rows_fwd_bwd(logits, *fewer, outputs=names, **options)
        assert not torch.allclose(logits, used)


@pytest.mark.parametrize("V", [7, 48])
def test_rows_of_logits_start_at_whole_words(V, backend, device, monkeypatch):
    rows, seen = rows_module(backend), []
    one_pass = rows.softmax_rows_fwd_bwd
    spy = lambda z, *a, **k: (seen.append(z.stride(0) % 16), one_pass(z, *a, **k))[1]  # noqa: E731
    monkeypatch.setattr(rows, "softmax_rows_fwd_bwd", spy)
    hidden, weight = torch.randn(5, 8, device=device).requires_grad_(), torch.randn(V, 8, device=device)
    linear_cross_entropy(hidden, weight, torch.arange(5, device=device), backend=backend)
    assert seen == [0]


@pytest.mark.parametrize("loss", ["cross_entropy", "token_loss", "distillation_loss"])
def test_gradients_made_in_forward_times_a_batch_of_upstream_gradients(loss, monkeypatch):
    """``is_grads_batched=True`` differentiates once: each upstream gradient costs one product and no more."""
    monkeypatch.setattr("fused_losses.autodiff.SMALL", 0)
    torch.manual_seed(0)
    h, weight, ids = torch.randn(4, 6, requires_grad=True), torch.randn(9, 6, requires_grad=True), torch.arange(4)
    z = LinearLogits(h, weight)
    value = {
        "cross_entropy": lambda: F.cross_entropy(z, ids),
        "token_loss": lambda: token_loss(lambda s: s.log_probs.exp(), z, ids)[0],
        "distillation_loss": lambda: distillation_loss(z, z.detach() / 2, ids),
    }[loss]()
    upstream = torch.tensor([1.0, -3.0])
    found = torch.autograd.grad(value, (h, weight), upstream, is_grads_batched=True, retain_graph=True)
    for of, one in zip(found, torch.autograd.grad(value, (h, weight)), strict=True):
        torch.testing.assert_close(of, upstream[:, None, None] * one)
