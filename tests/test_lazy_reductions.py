"""Largest entries and sums of LinearLogits."""

import pytest
import torch
import torch.nn.functional as F
from lazy_logits import FEW, IDS, H, V, leaves, make

from fused_losses import settings
from fused_losses.linear_logits import LinearLogits
from fused_losses.reference.linear_logits import linear_logits


@pytest.mark.parametrize(
    "fn", [lambda z: z.nansum(), lambda z: z.nansum(-1), lambda z: torch.nansum(z.mT[1:], (1, 2), True)]
)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_sums_without_tokens_of_nan(fn, softcap):
    """As KTO's trainers log their logits."""
    tensors = leaves()
    with torch.no_grad():
        tensors["hidden"][0, 1, 2] = tensors["hidden"][1, 3, 0] = torch.nan
    lazy = LinearLogits(tensors["hidden"], tensors["weight"], softcap=softcap)
    with settings.strict():
        found = fn(lazy)
    expected = fn(lazy.materialize())
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected)
    assert found.requires_grad
    with torch.no_grad():
        tensors["weight"][4] = torch.nan
    assert fn(LinearLogits(tensors["hidden"], tensors["weight"], softcap=softcap)).isnan().any()


@pytest.mark.parametrize("workspace", [0, 1, 200, "64KiB", None])
def test_argmax_holds_no_more_than_a_workspace_of_logits(workspace, monkeypatch):
    from fused_losses import linear_logits as module

    sizes = []
    real = module.logits_tile

    def tile(*args):
        sizes.append(real(*args).numel() * 4)
        return real(*args)

    monkeypatch.setattr(module, "logits_tile", tile)
    hidden, weight = torch.randn(300, H), torch.randn(50, H)
    lazy, eager = LinearLogits(hidden, weight, softcap=2.0), linear_logits(hidden, weight, softcap=2.0)
    with settings.workspace(workspace):
        assert torch.equal(lazy.argmax(-1), eager.argmax(-1))
        assert torch.equal(lazy.topk(3).indices, eager.topk(3).indices)
        assert torch.equal(lazy.topk(3, largest=False).indices, eager.topk(3, largest=False).indices)
    whole = hidden.shape[0] * weight.shape[0] * 4
    assert max(sizes) <= max(4, (settings.workspace.parse(workspace) or whole) / 4) or workspace is None
    assert (max(sizes) == whole) == (workspace is None)


@pytest.mark.filterwarnings("ignore:.*materialises")
@pytest.mark.parametrize(
    "fn",
    [
        lambda z: z.sum(-1, dtype=torch.int64),
        lambda z: torch.sum(z.log_softmax(-1), dtype=torch.int32),
        pytest.param(
            lambda z: z.nansum(dtype=torch.int64),
            marks=pytest.mark.skipif(
                torch.torch_version.TorchVersion(torch.__version__) < (2, 12),
                reason="PyTorch 2.11 has no nansum of integers",
            ),
        ),
        lambda z: (z.softmax(-1) + 1.5).sqrt().sum(-1, dtype=torch.int64),
    ],
)
@torch.no_grad()
def test_a_sum_of_integers_is_of_integers(fn):
    lazy, eager, _ = make(bias=True)
    assert torch.equal(fn(lazy), fn(eager))
    with pytest.raises(RuntimeError, match="dtype"):
        lazy.mean(-1, dtype=torch.int64)


@pytest.mark.parametrize("made", [lambda z: z, lambda z: z.log_softmax(-1)])
def test_a_number_as_an_index_gathers_from_one_token(made):
    lazy, eager, _ = make(bias=True)
    with settings.strict():
        found = made(lazy[0, 1]).gather(0, torch.tensor(3))
    torch.testing.assert_close(found, made(eager[0, 1]).gather(0, torch.tensor(3)))


EXTREMES = {
    "max": lambda z: z.max(-1),
    "min": lambda z: z.min(-1),
    "topk": lambda z: z.topk(3),
    "smallest": lambda z: z.topk(2, largest=False),
    "shifted": lambda z: (2 * z + 1).topk(3),
    "log_softmax": lambda z: z.log_softmax(-1).topk(3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_are_the_same_with_and_without_gradient(name, dtype):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 32, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(200, 32, generator=g).to(dtype).requires_grad_()
    with_gradient = EXTREMES[name](LinearLogits(hidden, weight)).values
    with torch.no_grad():
        assert torch.equal(with_gradient, EXTREMES[name](LinearLogits(hidden, weight)).values)
    if name in ("max", "topk", "min", "smallest"):
        lazy = LinearLogits(hidden, weight)
        assert torch.equal(with_gradient, EXTREMES[name](lazy.materialize()).values)
    found = torch.autograd.grad(with_gradient.square().sum(), (hidden, weight))
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    expected = torch.autograd.grad(EXTREMES[name](h @ w.T).values.square().sum(), (h, w))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=5e-2, atol=5e-2 * theirs.abs().max().item())


def test_extremes_of_rows_with_infinities():
    hidden = torch.randn(4, H, requires_grad=True)
    results = []
    for kind in (LinearLogits, F.linear):
        bias = torch.zeros(V)
        bias[3], bias[5] = torch.inf, -torch.inf
        bias.requires_grad_()
        z = kind(hidden, torch.ones(V, H), bias)
        values = z.max(-1).values, z.min(-1).values, z.topk(2).values
        kept = kind(hidden, torch.ones(V, H), bias.clamp(max=0)).min(-1).values
        results.append((*values, torch.autograd.grad(kept.sum(), bias)[0]))
    torch.testing.assert_close(*results)
    assert results[0][-1][5] == 4


def test_argmax_takes_the_first_of_equal_logits():
    logits = LinearLogits(torch.ones(3, 2), torch.tensor([[0.0, 0], [1, 1], [1, 1], [0, 2]]))
    assert logits.argmax(-1).tolist() == [1, 1, 1]


@pytest.mark.filterwarnings("ignore:.*materialises")
@pytest.mark.parametrize(
    "fn",
    [
        lambda z: z.norm(0),
        lambda z: torch.linalg.vector_norm(z, 2, 1),
        lambda z: torch.linalg.vector_norm(z, dtype=torch.float64),
        lambda z: z[0].norm("nuc"),
        lambda z: z.var(1),
        lambda z: z.std(0),
        lambda z: z.argmax(),
        lambda z: z.nansum(1),
        lambda z: z.log_softmax(-1).nansum(-1),
        lambda z: (-z.log_softmax(-1)).max(-1),
        lambda z: (-2 * z.softmax(-1)).topk(3),
        lambda z: F.cosine_similarity(z, z.softmax(-1)),
        lambda z: torch.take_along_dim(z, FEW.contiguous()),
        lambda z: torch.take_along_dim(z[:1], FEW, -1),
        lambda z: torch.take_along_dim(z[:1], IDS[:, :3, None] % 5, 1),
        lambda z: torch.take_along_dim(z, IDS[:, :3, None] % 5, 1),
        lambda z: torch.stack([z.double().log_softmax(-1)] * 2).sum(0, dtype=torch.float32).sum(-1),
    ],
)
def test_what_an_answer_may_leave_to_pytorch_is_as_eager_has_it(fn):
    lazy, eager, _ = make()
    found = fn(lazy)
    torch.testing.assert_close(found.materialize() if hasattr(found, "materialize") else found, fn(eager))


@pytest.mark.filterwarnings("ignore:.*materialises")
@pytest.mark.parametrize("mask", [lambda z: z.softmax(-1) > 0.1, lambda z: z.isinf()])
@pytest.mark.parametrize("fn", [lambda m: m.norm(), lambda m: m.var(-1), lambda m: m.std()])
def test_what_pytorch_refuses_of_a_mask(fn, mask):
    for z in make()[:2]:
        with pytest.raises(RuntimeError, match="floating point"):
            fn(mask(z))


@pytest.mark.parametrize("fn", [torch.var, torch.std, torch.mean])
def test_a_number_of_16_bits_stays_one(fn):
    assert fn(make()[0].bfloat16(), -1).dtype == torch.bfloat16


def test_tokens_that_were_gathered_are_a_copy():
    found = []
    for z in make()[:2]:
        x = z.log_softmax(-1)
        picked = x.gather(1, torch.tensor([1, 0, 3]).view(1, 3, 1).expand(2, 3, V))
        picked.mul_(2)
        found.append((picked.sum(-1), x.sum(-1)))
    torch.testing.assert_close(*found)
