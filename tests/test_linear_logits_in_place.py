"""Changes in place of LinearLogits, and of what was made from them before."""

import copy
import operator
import warnings

import pytest
import torch
import torch.nn.functional as F
from lazy_logits import FEW, IDS, TEMPERATURE, B, S, V, leaves, make

from fused_losses import settings
from fused_losses.linear_logits import LinearLogits
from fused_losses.reference.linear_logits import linear_logits
from fused_losses.token_statistics import token_statistics


def test_arithmetic_in_place_keeps_the_dtype():
    tensors = leaves(torch.bfloat16)
    lazy = LinearLogits(tensors["hidden"], tensors["weight"]).div_(TEMPERATURE[..., None])
    assert lazy.dtype == torch.bfloat16
    expected = F.linear(tensors["hidden"], tensors["weight"]).div_(TEMPERATURE[..., None])
    torch.testing.assert_close(lazy.materialize(), expected)


@pytest.mark.parametrize("of", [lambda z: z, lambda z: z.log_softmax(-1)])
def test_what_becomes_another_kind_in_place_keeps_the_dtype(of):
    tensors = leaves(torch.bfloat16)
    z = of(LinearLogits(tensors["hidden"], tensors["weight"]))
    assert z.add_(TEMPERATURE[..., None]).dtype == torch.bfloat16
    assert z.add_(torch.ones(B, S, V)).dtype == torch.bfloat16


def test_log_probs_changed_in_place_keep_the_dtype():
    tensors = leaves(torch.bfloat16)
    for z in (LinearLogits(tensors["hidden"], tensors["weight"]), F.linear(tensors["hidden"], tensors["weight"])):
        logp = z.log_softmax(-1)
        logp *= TEMPERATURE[..., None]
        assert logp.dtype == logp.gather(-1, FEW).dtype == torch.bfloat16


WRITTEN = {
    "setitem": lambda z: z.__setitem__((..., 0), -1e4),
    "add": lambda z: z.add_(FEW[..., :1]),
    "sub": lambda z: z.sub_(z.detach().logsumexp(-1, keepdim=True)),
    "clamp": lambda z: z.clamp_(max=0.1),
    "masked_fill": lambda z: z.masked_fill_(torch.arange(V) > 3, -torch.inf),
    "mul": lambda z: z.mul_(torch.linspace(1, 2, V)),
    "scatter": lambda z: z.scatter_(-1, IDS[..., None], 0.0),
    "leaky_relu": F.leaky_relu_,
    "selu": torch.selu_,
}


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize(
    "of", [lambda z: z, lambda z: z.clone(), lambda z: z / 2, lambda z: z[:, 1:], lambda z: z.detach()]
)
def test_other_changes_in_place_make_the_elements(name, of):
    outcomes = []
    write = WRITTEN[name] if of(torch.ones(2, 3, 1)).shape[1] == 3 else WRITTEN["setitem"]
    for which in (0, 1):
        *logits, tensors = make()
        z = of(logits[which] if which == 0 else logits[which].clone())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            write(z)
            values = z.log_softmax(-1)[..., 1:3].sum(-1).float()
        weight = tensors["weight"]
        outcomes.append((values, torch.autograd.grad(values.sum(), weight) if values.requires_grad else None))
    torch.testing.assert_close(*outcomes, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*materialises")
def test_masks_and_counts_that_were_written_into():
    found = []
    for z in make()[:2]:
        mask, count = z.softmax(-1) > 0.1, torch.where(z.softmax(-1) > 0.1, 1, 0)
        mask[0], count[0] = False, 3
        found.append(((mask * 0.5).sum(-1), (count / 2).sum(-1), (mask * 3).sum(-1)))
    torch.testing.assert_close(*found)


@pytest.mark.filterwarnings("ignore:.*materialises")
def test_rows_written_one_by_one():
    """Each write reads views of logits that the write before has changed."""
    lazy, eager, tensors = make()
    gradients = []
    for z in (lazy, eager.clone()):
        for row in range(B):
            z[row] = torch.cat([z[row][1:], z[row][:1]])
        loss = (z.log_softmax(-1) * torch.linspace(0, 1, V)).sum()
        gradients.append(torch.autograd.grad(loss, (tensors["hidden"], tensors["weight"])))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("other", [None, [1.0], "1"])
def test_in_place_with_what_is_no_number(other):
    with pytest.raises(TypeError, match="unsupported operand"):
        operator.itruediv(make()[0], other)


def test_changes_in_place_that_raise():
    lazy, *_ = make()
    with settings.strict(), pytest.raises(RuntimeError, match="clamp_ materialises LinearLogits"):
        lazy.clamp_(max=1)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"clamp_ would change .* would lose its gradient"):
        lazy.clamp_(max=1)
    product = lazy.softmax(-1) * lazy.log_softmax(-1)
    for change in (lambda x: x.unsqueeze_(0), lambda x: x.transpose_(0, 1)):
        with (
            pytest.warns(UserWarning, match="materialises"),
            pytest.raises(RuntimeError, match="in place, which has no"),
        ):
            change(product)
    view = lazy[:, 1:]
    with pytest.warns(UserWarning, match="clamp_ materialises"):
        lazy.clamp_(max=1)
    with pytest.raises(RuntimeError, match="another view"):
        view.logsumexp(-1)


@pytest.mark.filterwarnings("ignore:.*materialises")
@pytest.mark.parametrize(
    ("take", "changed"),
    [
        (lambda z: z[:, :-1].contiguous(), lambda z, c: z),
        (lambda z: z.transpose(1, 2).contiguous(), lambda z, c: z),
        (copy.copy, lambda z, c: z),
        (lambda z: z[:, :2], lambda z, c: torch.utils._pytree.tree_map(lambda t: t, c)),
    ],
)
def test_what_may_share_numbers_with_what_was_changed_raises(take, changed):
    z = make()[0].detach()
    other = take(z)
    (z if take(z).shape[1] == 2 else other)[..., 0] = -1e4
    with pytest.raises(RuntimeError, match="another view"):
        changed(z, other).sum()
    part = make()[0].detach()[:, :-1]
    part.contiguous()[..., 0] = -1e4
    with pytest.raises(RuntimeError, match="another view"):
        part.sum()


@pytest.mark.filterwarnings("ignore:.*materialises")
def test_changes_in_place_by_other_names():
    lazy, eager, _ = make()
    z = lazy.clone()
    assert F.relu(z, inplace=True) is z
    torch.testing.assert_close(z.sum(-1), eager.relu().sum(-1))
    torch.testing.assert_close(torch.relu_(input=lazy.clone()).sum(-1), eager.relu().sum(-1))
    with pytest.raises(RuntimeError, match="_foreach_mul_ would change"):
        torch._foreach_mul_([lazy], 2)
    with pytest.raises(RuntimeError, match="gradient of their own"):
        lazy.detach().requires_grad_()
    mask = same = lazy.isnan()
    mask |= eager > 0
    assert same is mask
    torch.testing.assert_close(same.sum(-1), (eager > 0).sum(-1))


class Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return z.logsumexp(-1).sum()


@pytest.mark.filterwarnings("ignore:.*materialises")
def test_changed_logits_lose_no_gradient():
    lazy, *_ = make()
    lazy[..., 3] = -1e4
    with pytest.raises(RuntimeError, match=r"given to Loss.apply would get no gradient"):
        Loss.apply(lazy)
    with pytest.raises(RuntimeError, match=r"would get no gradient.*use_reentrant=False"):
        torch.utils.checkpoint.checkpoint(lambda z: z.logsumexp(-1).sum(), lazy, use_reentrant=True)
    (leaf,) = torch.utils._pytree.tree_leaves({"logits": lazy})  # DDP looks for such leaves
    assert leaf.requires_grad
    doubled = torch.utils._pytree.tree_map(lambda t: t * 2, lazy)
    torch.testing.assert_close(doubled.sum(-1), 2 * lazy.sum(-1))
    with pytest.raises(TypeError, match=r"got a LazyProducts \(2, 5, 11\), made of one: materialize"):
        token_statistics(lazy, IDS)


def test_copies_of_the_same_dtype_are_copies():
    for copied in (lambda x: x.to(x.dtype, copy=True), lambda x: x.to(x.device, x.dtype, False, True)):
        lazy, eager, _ = make()
        copied(lazy).mul_(2)
        torch.testing.assert_close(lazy.logsumexp(-1), eager.logsumexp(-1))


def test_out_raises():
    lazy, *_ = make()
    with pytest.raises(RuntimeError, match="cannot write"):
        torch.exp(torch.zeros(B, S, V), out=lazy)


def test_div_and_mul_in_place_change_the_object_and_not_the_tensors():
    lazy, eager, tensors = make()
    kept = tensors["hidden"].clone()
    same = lazy
    lazy /= 2.0
    lazy *= TEMPERATURE.float()[..., None]
    assert lazy is same
    lazy.div_(torch.tensor(0.5)).mul_(3)
    torch.testing.assert_close(lazy.materialize(), eager * 3 * TEMPERATURE.float()[..., None])
    assert torch.equal(tensors["hidden"], kept)
    other, eager, _ = make()
    other += torch.linspace(-1, 1, V)
    torch.testing.assert_close(other.materialize(), eager + torch.linspace(-1, 1, V))


def test_views_of_logits_changed_in_place_raise():
    lazy, *_ = make()
    view, copied = lazy[:, 1:], lazy.clone()
    lazy.div_(2)
    lazy.logsumexp(-1)
    lazy[:, 1:].logsumexp(-1)
    copied.logsumexp(-1)
    with pytest.raises(RuntimeError, match="another view"):
        view.logsumexp(-1)
    other = lazy.view(-1, V)
    other.mul_(3)
    with pytest.raises(RuntimeError, match="another view"):
        lazy.logsumexp(-1)


EARLIER = {
    "log_softmax": lambda z: z.log_softmax(-1),
    "softmax": lambda z: z.softmax(-1),
    "shifted": lambda z: z + 1,
    "capped": lambda z: torch.tanh(z),
    "of_a_view": lambda z: z[:, :].log_softmax(-1),
    "view_of_it": lambda z: z.log_softmax(-1)[:, :],
    "times": lambda z: z * 2,
    "clone": lambda z: z.clone(),
    "p_log_p": lambda z: z.softmax(-1) * z.log_softmax(-1),
}


@pytest.mark.parametrize("name", EARLIER)
def test_what_was_made_before_a_change_in_place_keeps_its_value(name):
    results = []
    for kind in (LinearLogits, linear_logits):
        tensors = leaves()
        z = kind(tensors["hidden"], tensors["weight"])
        earlier = EARLIER[name](z)
        earlier, z = (earlier, z.div_(3)) if kind is LinearLogits else (earlier, z / 3)
        loss = (earlier * 1.5).sum(-1).square().sum() if name == "p_log_p" else None
        if loss is None:
            earlier = earlier * 2 if name == "capped" else earlier
            loss = earlier.gather(-1, FEW).square().sum()
        loss = loss + z.logsumexp(-1).sum()
        results.append((loss, torch.autograd.grad(loss, (tensors["hidden"], tensors["weight"]))))
    torch.testing.assert_close(*results)


def test_in_place_without_gradient_raises_where_there_is_one():
    lazy, *_ = make()
    with torch.no_grad(), pytest.raises(RuntimeError, match="out-of-place"):
        lazy.div_(2)
    with torch.no_grad():
        lazy.detach().div_(2)


@pytest.mark.filterwarnings("ignore:.*materialises")
def test_changes_in_place_compile():
    def loss(z):
        kl = F.kl_div(z.log_softmax(-1), (2 * z).softmax(-1), reduction="none")
        kl[:, 0] = 0.5
        return kl.clamp_(min=0.01).sum()

    lazy, eager, _ = make()
    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(lazy)
    torch.testing.assert_close(found, loss(eager))


def test_a_view_of_what_was_changed_raises_compiled_too():
    def loss(z):
        y = z * 1
        view = y[:, 1:]
        y *= 2
        return view.logsumexp(-1).sum()

    for run in (loss, torch.compile(loss, backend="aot_eager")):
        with pytest.raises(RuntimeError, match="another view"):
            run(make()[0])
