"""Where LinearLogits are infinite, nan or above a number, and what losses do there."""

import pytest
import torch
import torch.nn.functional as F
from lazy_logits import IDS, MASK, PROBS, B, H, S, V, make

from fused_losses import settings
from fused_losses.linear_logits import LinearLogits


@pytest.mark.filterwarnings("ignore:.*materialises")
@pytest.mark.parametrize(
    "count",
    [
        lambda z, ids: (z > z.gather(-1, ids)).sum(-1),
        lambda z, ids: torch.lt(z.gather(-1, ids), z).sum(-1),
        lambda z, ids: (z.log_softmax(-1) > z.log_softmax(-1).gather(-1, ids)).sum(-1),
        lambda z, ids: (z >= z.amax(-1, keepdim=True)).sum(-1),
        lambda z, ids: (z < z.topk(5).values[..., -1:]).sum(-1),
        lambda z, ids: (z.view(8, 8, -1) >= z.view(8, 8, -1).topk(5).values[..., -1:]).sum(-1),
        lambda z, ids: (z == z.max()).sum(),
        lambda z, ids: (z.softmax(-1) > z.softmax(-1).amax(-1, keepdim=True)).sum(-1),
    ],
)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_ranks_count_no_entry_above_itself(count, mode):
    """The gathered entry and the compared logits come from different products, which round differently."""
    hidden, weight, bias = torch.randn(64, 96, requires_grad=True), torch.randn(4000, 96) / 10, torch.randn(4000)
    with mode():
        eager = F.linear(hidden, weight, bias)
        ids = torch.where(torch.rand(64) < 0.5, eager.argmax(-1), torch.randint(9, 4000, (64,)))[:, None]
        assert torch.equal(count(LinearLogits(hidden, weight, bias), ids), count(eager, ids))


@pytest.mark.filterwarnings("ignore:.*materialises")
@pytest.mark.parametrize(
    "made",
    [
        lambda z, t: z - t,
        lambda z, t: z.softmax(-1) + t.softmax(-1),
        lambda z, t: z.log_softmax(-1) - t.log_softmax(-1),
        lambda z, t: (z.softmax(-1) + 1e-9).log(),
        lambda z, t: 2 * z.log_softmax(-1),
    ],
)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_what_is_made_of_logits_equals_itself_at_ids(made, mode):
    hidden, ids = torch.randn(64, 96), torch.randint(4000, (64, 1))
    with mode():
        d = made(*(LinearLogits(hidden, torch.randn(4000, 96) / 10) for _ in range(2)))
        at = d.gather(-1, ids)
        assert (d == at).gather(-1, ids).all()
        d.mul_(2)
        assert not (d == at).gather(-1, ids).any()


@pytest.mark.filterwarnings("ignore:.*materialises")
@torch.inference_mode()
def test_what_was_read_and_changed_under_inference_mode_is_compared_as_it_is():
    lazy, eager, _ = make()
    counts = []
    for z in (lazy, eager):
        at = z.gather(-1, IDS[..., None])
        at[0] -= 0.5
        counts.append((z > at).sum(-1))
    assert torch.equal(*counts)


@pytest.mark.filterwarnings("ignore:.*materialises")
@torch.inference_mode()
def test_what_was_made_of_what_was_read_under_inference_mode_is_compared_as_it_is():
    lazy, eager, _ = make()
    below = [z >= z.gather(-1, IDS[..., None]) - 0.5 for z in (lazy, eager)]
    assert torch.equal(*below)


@pytest.mark.filterwarnings("ignore:.*materialises")
def test_ids_that_changed_since_are_not_compared():
    lazy, eager, _ = make()
    counts = []
    for z in (lazy, eager):
        values, ids = z.topk(3)
        ids %= 2
        labels = IDS.clone()
        at = z.gather(-1, labels[..., None])
        labels.zero_()
        counts.append(((z >= values[..., -1:]).sum(-1), (z > at).sum(-1)))
    assert all(map(torch.equal, *counts))


@pytest.mark.filterwarnings("ignore:.*materialises")
def test_other_numbers_are_compared_as_they_are():
    """In 16 bits and beside a large entry, they could be taken for entries."""
    weight = torch.tensor([[20.0], [19.5], [18.0], [1.0], [0.25], [-1e4], [-20.0]]).bfloat16()
    z = LinearLogits(torch.ones(1, 1).bfloat16(), weight)
    assert (z > torch.tensor([[0.0]]).bfloat16()).sum() == 5
    assert not (z == torch.tensor([[19.0]]).bfloat16()).any()
    assert (z > z.amax(-1, keepdim=True) - 0.75).sum() == 2
    read = z.amax(-1, keepdim=True)
    read -= 1
    assert (z > read).sum() == 2
    found = torch.zeros(1, 7, dtype=torch.bool)
    torch.gt(z, 0.0, out=found)
    assert found.sum() == 5
    assert (z.isnan() == torch.zeros(1, 1)).all()


def test_a_number_that_is_no_entry_is_compared_as_it_is():
    lazy, eager, _ = make()
    between = eager.detach().sort(-1).values[..., 3:5].mean(-1, keepdim=True)
    with pytest.warns(UserWarning, match="materialises"):
        assert ((lazy > between).sum(-1) == V - 4).all()


@pytest.mark.filterwarnings("ignore:logical_not materialises")
def test_where_logits_are_numbers_and_finite():
    hidden, weight = torch.randn(2, 3, H), torch.randn(V, H)
    hidden[1, 2, 0] = torch.nan
    z = LinearLogits(hidden, weight)
    eager = hidden @ weight.T
    infinite = LinearLogits(torch.cat([hidden[:, :2], -hidden[:, :1] * torch.inf], 1), weight)
    for condition, expected in (
        (z == z, ~eager.isnan()),
        ((logp := z.log_softmax(-1)) == logp, ~eager.log_softmax(-1).isnan()),
        (infinite == infinite, ~infinite.materialize().isnan()),
        (z.isfinite(), eager.isfinite()),
        (torch.isfinite(infinite), infinite.materialize().isfinite()),
    ):
        with settings.strict():
            assert torch.equal(condition.all(-1), expected.all(-1))
            assert torch.equal(condition.reshape(6, V)[2:].all(-1, keepdim=True), expected.view(6, V)[2:].all(-1, True))
            assert not condition.all()
        assert torch.equal(condition.materialize(), expected)
    finite = LinearLogits(hidden[:1], weight)
    assert finite.isfinite().all()
    assert (finite + torch.zeros(V).index_fill(0, torch.tensor([3]), -torch.inf)).isfinite().logical_not().any()
    assert not (finite + torch.zeros(V).index_fill(0, torch.tensor([3]), -torch.inf)).isfinite().all()


def test_where_logits_were_finite_before_they_changed():
    z = make()[0].detach()
    finite = z.isfinite()
    z.mul_(torch.inf)
    assert finite.all()


def test_tokens_of_nan_emptied():
    """As DSKD guards its logits."""
    hidden, weight = torch.randn(B, S, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    broken = torch.zeros(B, S, H).index_put(
        (torch.tensor([0, 1]), torch.tensor([2, 0])), torch.tensor([torch.nan, torch.inf])[:, None]
    )
    results = []
    for head in (LinearLogits, F.linear):
        z = head(hidden + broken, weight)
        with settings.strict():
            assert z.isnan().any()
            z.masked_fill_(z.isnan() | z.isinf(), 0.0)
            assert not z.isnan().any()
            loss = z.logsumexp(-1).sum() - z.log_softmax(-1)[..., 2].square().sum()
        results.append([loss, *torch.autograd.grad(loss, [hidden, weight])])
    torch.testing.assert_close(results[0][0], results[1][0])
    assert torch.isfinite(results[0][1]).all()
    assert (results[0][1][broken.isfinite().all(-1)] != 0).all()
    torch.testing.assert_close(results[0][1][broken.isfinite().all(-1)], results[1][1][broken.isfinite().all(-1)])


@pytest.mark.parametrize("options", [{"bias": True}, {"softcap": 2.0}, {"low_rank": True}])
def test_guards_that_take_elements_materialise(options):
    lazy, *_ = make(**options)
    with settings.strict():
        mask = lazy.isnan() | lazy.isinf()
        with pytest.raises(RuntimeError, match="masked_fill materialises"):
            lazy.masked_fill(mask, 0.0)
        with pytest.raises(RuntimeError, match="any materialises"):
            mask.any()
    assert torch.equal(mask.materialize(), torch.zeros(B, S, V) == 1)


@pytest.mark.filterwarnings("ignore:.*materialises")
@pytest.mark.parametrize(
    "infinite", [{3: torch.inf}, {3: torch.inf, 5: -torch.inf}, dict.fromkeys(range(V), -torch.inf)]
)
def test_infinite_logits_at_ids_where_the_logsumexp_is_infinite(infinite):
    """There every logit that is gathered is nan."""
    hidden, weight, bias = torch.randn(B, S, H), torch.randn(V, H), torch.zeros(V)
    bias[list(infinite)] = torch.tensor(list(infinite.values()))
    ids, z = torch.tensor([3, 5, 0]).expand(B, S, 3), F.linear(hidden, weight, bias)
    assert torch.equal(LinearLogits(hidden, weight, bias).isinf().gather(-1, ids), z.isinf().gather(-1, ids))
    assert torch.equal(LinearLogits(hidden, weight, bias).isinf()[..., 5], z.isinf()[..., 5])


@pytest.mark.parametrize("own", [lambda z: z.isinf(), lambda z: z.isinf() | (PROBS > 0.1)], ids=["own", "and_given"])
@pytest.mark.parametrize("transpose", [False, True])
def test_values_where_infinite_logits_are_masked(own, transpose):
    """As MiniLLM gathers its log-probabilities."""
    hidden, weight = torch.randn(B, S, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    bias = torch.zeros(V).index_fill(0, torch.tensor(3), -torch.inf)
    ids, results = torch.stack([IDS, IDS.roll(1)], -1), []
    for head in (LinearLogits, F.linear):
        z = head(hidden, weight, bias)
        with settings.strict():
            filled = z.log_softmax(-1).masked_fill(own(z), -9.0)
            found = filled.mT.gather(1, ids.mT).mT if transpose else filled.gather(-1, ids)
        results.append((found, *torch.autograd.grad(found.sum(), (hidden, weight))))
    assert (results[1][0] == -9).any()
    assert (results[1][0] > -9).any()
    torch.testing.assert_close(*results)


P = PROBS.float()


@pytest.mark.filterwarnings("ignore:.*materialises")
@pytest.mark.parametrize(
    "fn",
    [
        lambda z: z.log_softmax(-1).isnan().any(-1),
        lambda z: z.softmax(-1).isfinite().all(-1),
        lambda z: z.isinf().all(-1),
        lambda z: ((p := (z.softmax(-1) + P).log()) == p).all(-1),
        lambda z: (z == z).all(-1),
        lambda z: ((y := z + 1) == y).all(-1),
        lambda z: ((y := z.softmax(-1)) == y).sum(-1),
        lambda z: (~((y := z.log_softmax(-1)) == y) & (P > 0.1)).sum(),
        lambda z: ((y := z.log_softmax(-1) * torch.tensor([1.0, torch.nan] * 5).view(B, S, 1)) == y).all(-1),
        lambda z: z.masked_fill(z.flip(0).isinf() | z.flip(0).isnan(), 0.0),
        lambda z: z.masked_fill(z.isinf() | z.isnan() | (P > 0.1), 0.0),
        lambda z: z.masked_fill(z.isnan(), 0.0),
        lambda z: P.masked_fill(mask=z.isinf(), value=0.0),
        lambda z: (P * z.log_softmax(-1)).masked_fill(MASK[..., None], 1.0).sum(-1),
        lambda z: (P * z.log_softmax(-1)).masked_fill(z.isinf(), 1.0).sum(-1),
        lambda z: (P * z.log_softmax(-1)).masked_fill(z.isnan(), 0.0).sum(-1),
        lambda z: (P * z.log_softmax(-1)).masked_fill(z.isinf() | z.isnan(), 0.0).sum(-1),
        lambda z: (P * z.log_softmax(-1)).masked_fill(z.isinf(), 0.0).masked_fill(z.flip(0).isinf(), 0.0).sum(-1),
        lambda z: torch.where(z.isinf(), P * z.log_softmax(-1), 0.0).nansum(-1),
        lambda z: torch.where(z.isinf(), 0.0, P).sum(-1),
        lambda z: torch.where(MASK[..., None], z.log_softmax(-1), torch.zeros(1, 1, 1, 1)).exp().sum(-1),
    ],
)
@pytest.mark.parametrize("banned", [0.0, -torch.inf])
def test_masks_that_have_no_answer_are_as_eager_has_them(fn, banned):
    """With a token of nan, and with an entry that a bias bans."""
    hidden, weight = torch.randn(B, S, H), torch.randn(V, H)
    bias = torch.zeros(V).index_fill(0, torch.tensor(4), banned) if banned else None
    hidden[1, 2, 0] = torch.nan
    found, expected = fn(LinearLogits(hidden, weight, bias)), fn(F.linear(hidden, weight, bias))
    found = found if isinstance(found, torch.Tensor) else found.materialize()
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.filterwarnings("ignore:.*materialises")
@pytest.mark.parametrize("mask", [lambda z: z.isinf(), lambda z: z == z, lambda z: z.softmax(-1) > 0.1])
def test_a_mask_indexes_a_tensor_or_says_that_it_cannot(mask):
    """PyTorch takes a short sequence of tensors, such as the entries of a mask (V,), for a tuple of indices."""
    lazy, eager, _ = make(bias=True)
    assert torch.equal(P[mask(lazy)], P[mask(eager)])
    for one in (mask(lazy[0, 0]), mask(lazy)[0, 0]):
        with pytest.raises(TypeError, match="materialize"):
            P[0, 0][one]
        with pytest.raises(TypeError, match="iterated over"):
            any(one)
        assert torch.equal(P[0, 0][one.materialize()], P[0, 0][mask(eager)[0, 0]])


def test_a_condition_that_is_no_mask_is_refused():
    with pytest.raises(RuntimeError, match="condition to be a boolean"):
        torch.where(MASK.float()[..., None], make()[0].log_softmax(-1), 0.0)
