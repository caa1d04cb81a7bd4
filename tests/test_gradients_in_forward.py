"""How gradients that forward made are scaled, and the operators that take them; their values: test_linear_cross_entropy.py."""

import pytest
import torch

from fused_losses import gradients_in_forward, products
from fused_losses.gradients_in_forward import linear_loss, scaled, scaled_gradient, with_gradients
from fused_losses.products import add_product


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("wider", [False, True])
def test_scaled_rounds_once(dtype, wider):
    stored = torch.promote_types(dtype, torch.float32) if wider else dtype
    gradient = torch.randn(2100, 3).to(stored)
    scale = torch.tensor(1 / 3, dtype=torch.promote_types(dtype, torch.float32))
    expected = (gradient.double() * scale.double()).to(stored if wider and stored == dtype else dtype)
    out = scaled(gradient.clone(), scale, dtype, in_place=False)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected, rtol=torch.finfo(dtype).eps, atol=0)
    if dtype.itemsize == 2 and not wider:
        once = (gradient.float() * scale).to(dtype)
        assert torch.equal(out, once)
        assert not torch.equal(out, gradient * scale.to(dtype))  # what a 0-dim factor would do


def test_scaled_needs_nothing_that_a_gpu_lacks(monkeypatch):
    """PyTorch's loss-scaling operator has no bfloat16 on CUDA, and a CPU cannot show that."""
    monkeypatch.delattr(torch, "_amp_foreach_non_finite_check_and_unscale_")
    gradient = torch.randn(2**20 + 7).to(torch.bfloat16)
    expected = (gradient.float() * torch.tensor(1 / 3)).bfloat16()
    assert torch.equal(scaled(gradient, torch.tensor(1 / 3), torch.bfloat16, in_place=True), expected)


def test_scaled_in_place_is_the_same_memory_and_out_of_place_is_not():
    for dtype in (torch.float32, torch.bfloat16):
        gradient = torch.randn(5, 3).to(dtype)
        before = gradient.clone()
        out = scaled(gradient, torch.tensor(0.5), dtype, in_place=False)
        assert torch.equal(gradient, before)
        assert scaled(gradient, torch.tensor(0.5), dtype, in_place=True).data_ptr() == gradient.data_ptr()
        assert torch.equal(gradient, out)


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


@pytest.mark.parametrize("keep", [None, torch.tensor([0, 2, 3])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck_linear_loss(keep, dtype, monkeypatch):
    # opcheck compares outputs after a backward, which writes over the gradients among them.
    monkeypatch.setattr(gradients_in_forward, "read_again", lambda saved: True)
    hidden, weight = torch.randn(4, 7).to(dtype).requires_grad_(), torch.randn(9, 7).to(dtype).requires_grad_()
    ids, factors = torch.tensor([[1], [-100], [3], [8]]), torch.tensor([-1.0, 0.0, -1.0, 2.0])
    rest = (None, None, None, ids, None, None, factors, factors, factors, keep, keep is None, 1.0, None, True)
    wanted = [True, True, False, False, False]
    torch.library.opcheck(linear_loss, (hidden, weight, *rest, wanted, 2**20, None, "torch"))


def test_opcheck_with_gradients():
    inputs = [torch.randn(3, 2).requires_grad_(), torch.randn(4).bfloat16().requires_grad_()]
    gradients = [torch.randn(3, 2), torch.randn(4)]
    torch.library.opcheck(with_gradients, (torch.tensor(2.0), gradients, inputs))
    torch.library.opcheck(scaled_gradient, (torch.randn(3, 2), torch.tensor(2.0), torch.bfloat16))
