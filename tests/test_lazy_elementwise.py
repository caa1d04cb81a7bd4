"""Functions of probabilities that no other file has an answer for, summed over the vocabulary without whole logits."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from fused_losses import LinearLogits, linear_logits, settings
from fused_losses.bench.memory import peak_bytes
from fused_losses.head import Head
from fused_losses.reference.tolerance import assert_accurate

B, S, V, H = 2, 5, 67, 16
TOKEN = torch.linspace(0.5, 1.5, B * S).view(B, S, 1)
ENTRY = torch.arange(V) % 3
MASK = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 0, 1]])


def probabilities(dtype):
    return torch.linspace(-1, 1, B * S * V, dtype=dtype).mul(99).sin().mul(3).view(B, S, V).softmax(-1)


def jensen_shannon(z, t, p):
    s = z.softmax(-1)
    m = 0.3 * s + 0.7 * p
    return 0.3 * (s * (s.log() - m.log())).sum(-1) + 0.7 * (p * (p.log() - m.log())).sum(-1)


def in_place(z, t, p):
    """As DistiLLM writes it, with a teacher's probabilities as well."""
    s, infinite = z.softmax(-1), t.isinf() | (p > 0.03)
    product = (s * p.log()).masked_fill(infinite, 0)
    kept, alias = product + p.sqrt(), product
    product -= (s * z.log_softmax(-1)).masked_fill(infinite, 0)
    product.clamp_(min=-2.0).mul_(MASK[..., None])
    root = s + 0.5
    before = root + p
    root.sqrt_()
    teacher = p.log().masked_fill(t.isinf(), 0)
    return -alias.sum(-1) + root.sum(-1) + kept.sum(-1) + before.sum(-1) + (teacher * s).sum(-1)


LOSSES = {
    "in_place": in_place,
    "guarded_entropy": lambda z, t, p: -(z.softmax(-1) * (z.softmax(-1) + 1e-9).log()).sum(-1),
    "clamped": lambda z, t, p: (z.softmax(-1) * z.softmax(-1).clamp(min=1e-3).log()).sum(-1),
    "clamped_logs": lambda z, t, p: (t.softmax(-1) * z.log_softmax(-1).clamp(min=-3)).sum(-1),
    "clamped_logs_at_both_ends": lambda z, t, p: z.log_softmax(-1).clamp(torch.finfo(z.dtype).min, -3.0).sum(-1),
    "hellinger": lambda z, t, p: (z.softmax(-1).sqrt() - t.softmax(-1).sqrt()).square().sum(-1),
    "expectation": lambda z, t, p: (p.log() * z.softmax(-1)).sum(-1),
    "total_variation": lambda z, t, p: 0.5 * (p - z.softmax(-1)).abs().sum(-1),
    "overlap": lambda z, t, p: torch.minimum(p, z.softmax(-1)).sum(-1),
    "jensen_shannon": jensen_shannon,
    "where": lambda z, t, p: torch.where(
        t.softmax(-1) > 0.05, t.softmax(-1) * (t.log_softmax(-1) - z.log_softmax(-1)), 0
    ).sum(-1),
    "zeros": lambda z, t, p: torch.where(p > 0.01, p * z.log_softmax(-1), torch.zeros_like(z.log_softmax(-1))).sum(-1),
    "per_token": lambda z, t, p: ((z.softmax(-1) * TOKEN).pow(3) * MASK[..., None]).sum(-1).mean(),
    "per_entry": lambda z, t, p: ((z.softmax(-1) + 1) * ENTRY).log1p().sum(-1),
    "scalar": lambda z, t, p: (z.softmax(-1) + torch.tensor(0.25)).log().sum(-1),
    "view": lambda z, t, p: (z.softmax(-1) + p).log().view(-1, V)[1:7].sum(-1),
    "transposed": lambda z, t, p: (z.transpose(1, 2).softmax(1) + p.mT).sqrt().sum(1),
    "keywords": lambda z, t, p: torch.where(condition=z.softmax(-1) > 0.02, input=z.softmax(-1), other=p)[1:].sum(-1),
    "masked_entries": lambda z, t, p: (z.log_softmax(-1) * t.softmax(-1)).masked_fill(ENTRY == 1, 0).sum(-1),
    "poly": lambda z, t, p: (1 - z.softmax(-1)).pow(2).mul(z.log_softmax(-1)).sum(),
    "shifted": lambda z, t, p: ((z - z.amax(-1, keepdim=True)).exp() + 0.1).log().sum(-1),
    "brier": lambda z, t, p: (z.softmax(-1) - p).pow(2).sum((-1, -2)),
    "mean": lambda z, t, p: (z.softmax(-1) - p).square().mean(-1),
    "temperatures": lambda z, t, p: ((z / TOKEN).softmax(-1) + 0.1).log().sum(-1),
    "detached": lambda z, t, p: (z.softmax(-1).detach() * (t.softmax(-1) + 0.1).log()).sum(-1),
    "kl_div": lambda z, t, p: F.kl_div((z.softmax(-1) + 1e-6).log(), p, reduction="none").sum(-1),
    "kl_div_batchmean": lambda z, t, p: F.kl_div((z.softmax(-1) + 1e-6).log(), p, reduction="batchmean"),
    "kl_div_sum": lambda z, t, p: F.kl_div(
        (p + z.softmax(-1)).log(), z.log_softmax(-1), reduction="sum", log_target=True
    ),
    "kl_div_mean": lambda z, t, p: F.kl_div(z.log_softmax(-1), t.softmax(-1).clamp(min=0.01), size_average=True),
    "kl_div_of_probabilities_as_logs": lambda z, t, p: F.kl_div(
        z.log_softmax(-1), t.softmax(-1), reduction="sum", log_target=True
    ),
    "kl_div_of_two_teachers": lambda z, t, p: F.kl_div(
        z.log_softmax(-1), 0.5 * (t.softmax(-1) + p), reduction="batchmean"
    ),
    "nll_loss": lambda z, t, p: F.nll_loss((z.softmax(-1) + p).log().mT, torch.where(MASK == 1, MASK + 3, -100)),
    "mixture": lambda z, t, p: (0.3 * z.softmax(-1) + 0.7 * t.softmax(-1) + 1e-9).sqrt().sum(-1),
    "mixture_with_one_share_per_token": lambda z, t, p: (z.softmax(-1) + TOKEN * t.softmax(-1)).log().sum(-1),
    "logaddexp": lambda z, t, p: torch.logaddexp(z.log_softmax(-1) - 1, p.log()).sum(-1),
    "mask_of_both": lambda z, t, p: (z.softmax(-1) * p).masked_fill(t.softmax(-1) > z.softmax(-1), 0).sum(-1),
    "logits_mse": lambda z, t, p: F.mse_loss(z, t),
    "logits_mse_sum": lambda z, t, p: F.mse_loss(p.log(), z, reduction="sum"),
    "logits_mse_masked": lambda z, t, p: F.mse_loss(z, t, reduction="none").masked_fill(ENTRY == 1, 0).sum(-1),
    "logits_l1": lambda z, t, p: F.l1_loss(z, t, reduce=True, size_average=False),
    "logits_smooth_l1": lambda z, t, p: F.smooth_l1_loss(input=z, target=p.log(), beta=2.0),
    "logits_huber": lambda z, t, p: F.huber_loss(z, t, delta=0.5),
    "logits_difference": lambda z, t, p: ((z - t) ** 2 * MASK[..., None]).sum(-1),
    "logits_centred": lambda z, t, p: ((z - z.mean(-1, keepdim=True)) - torch.sub(p.log(), t, alpha=2)).abs().sum(-1),
    "logits_square": lambda z, t, p: z.square().mean(-1) + z.pow(3).sum(-1),
    "probabilities_mse": lambda z, t, p: F.mse_loss(z.softmax(-1), t.softmax(-1), reduction="sum"),
    "norm": lambda z, t, p: (z - t).norm("fro", -1) + torch.norm(p - z.softmax(-1), 1, -1),
    "norm_of_all": lambda z, t, p: z.norm() + torch.linalg.vector_norm(z - t, 3, (0, 2), keepdim=True),
    "variance": lambda z, t, p: z.var((0, 2)) + z.std(-1, correction=0).sum(0) + z.softmax(-1).std(-1, False).sum(0),
    "cosine": lambda z, t, p: F.cosine_similarity(z, t, dim=-1),
    "cosine_transposed": lambda z, t, p: F.cosine_similarity(z.mT, (z - t).mT),
    "cosine_with_what_exists": lambda z, t, p: F.cosine_similarity(p, z.softmax(-1), dim=2, eps=1e-3),
    "distance_of_a_mixture": lambda z, t, p: ((z.softmax(-1) - t.softmax(-1)).abs() + p).sqrt().sum(-1),
}
HEADS = {
    "plain": {},
    "capped": {"softcap": 3.0, "scale": 0.7},
    "temperature": {"temperature": torch.linspace(0.5, 2, B * S).view(B, S)},
}


def leaves(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, S, H), (V, H), (V,)] * 2
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def eager_head(hidden, weight, bias, softcap=None, scale=1.0, temperature=None):
    z = F.linear(hidden, weight, bias) * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return z if temperature is None else z / temperature[..., None].to(z.dtype)


def outcome(loss, head, inputs, p, wanted=None, options=None, workspace=20000):
    """The loss of each token, and the gradients of a weighted sum; to materialise lazy logits is an error."""
    with settings.workspace(workspace), settings.strict():
        found = loss(head(*inputs[:3], **options or {}), head(*inputs[3:], **options or {}), p)
        weighed = (found * torch.linspace(0.5, 1.5, found.numel()).view_as(found).to(found.dtype)).sum()
        wanted = [x for x in (*inputs, p) if x.requires_grad] if wanted is None else wanted
        if not found.requires_grad:
            return [found]
        return [found, *torch.autograd.grad(weighed, wanted, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("workspace", [20000, None])
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("trained", ["all", "weights", "student", "probabilities"])
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients(name, trained, options, workspace):
    inputs, p = leaves(), probabilities(torch.float64)
    for i, x in enumerate(inputs):
        x.requires_grad_({"all": True, "weights": i in (1, 4), "student": i < 3, "probabilities": False}[trained])
    p.requires_grad_(trained == "probabilities")
    if trained == "probabilities":
        inputs[0].requires_grad_()
    wanted = [x for x in (*inputs, p) if x.requires_grad]
    found = outcome(LOSSES[name], LinearLogits, inputs, p, wanted, options, workspace)
    torch.testing.assert_close(found, outcome(LOSSES[name], eager_head, inputs, p, wanted, options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_accuracy(name, dtype):
    """Over ten draws together, as one alone may round well or badly."""
    p, drawn = probabilities(torch.float64).to(dtype), []
    for seed in range(10):
        inputs = leaves(dtype, seed)
        exact = [x.detach().double().requires_grad_() for x in inputs]
        cases = (LinearLogits, inputs, p), (eager_head, inputs, p), (eager_head, exact, p.double())
        drawn.append([outcome(LOSSES[name], *case) for case in cases])
    for ours, eager, expected in zip(
        *(map(torch.stack, zip(*each, strict=True)) for each in zip(*drawn, strict=True)), strict=True
    ):
        assert_accurate(ours, eager, expected)


@pytest.mark.parametrize("name", ["jensen_shannon", "where", "temperatures"])
@pytest.mark.parametrize("how", ["twice", "double_backward", "checkpoint"])
def test_backward_again(name, how):
    inputs, p, found = leaves(), probabilities(torch.float64), []
    for head in (LinearLogits, eager_head):

        def loss(*inputs):
            return LOSSES[name](head(*inputs[:3]), head(*inputs[3:]), p).square().sum()  # noqa: B023

        value = checkpoint(loss, *inputs, use_reentrant=False) if how == "checkpoint" else loss(*inputs)
        grads = torch.autograd.grad(
            value, inputs, create_graph=how == "double_backward", retain_graph=how != "checkpoint", materialize_grads=True,
            allow_unused=True,
        )  # fmt: skip
        if how == "double_backward":
            grads = torch.autograd.grad(sum(g.square().sum() for g in grads), inputs, allow_unused=True)
        elif how == "twice":
            grads = torch.autograd.grad(2 * value, inputs, allow_unused=True)
        found.append(grads)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("workspace", [20000, None])
def test_batched_gradients(workspace):
    inputs, upstream, results = leaves(), torch.tensor([1.0, -2.0], dtype=torch.float64), []
    for head in (LinearLogits, eager_head):
        with settings.workspace(workspace):
            loss = F.mse_loss(head(*inputs[:3]), head(*inputs[3:]))
            results.append(torch.autograd.grad(loss, inputs, upstream, is_grads_batched=True))
    torch.testing.assert_close(*results)


def test_counts_masks_and_other_uses():
    inputs, p = [x.detach() for x in leaves()], probabilities(torch.float64)
    lazy, eager = (head(*inputs[:3]).softmax(-1) for head in (LinearLogits, eager_head))
    with settings.strict():
        assert torch.equal((lazy > 0.05).sum(-1), (eager > 0.05).sum(-1))
        assert torch.equal(((lazy > 0.05) & ~(lazy > 0.3)).sum(), ((eager > 0.05) & ~(eager > 0.3)).sum())
        x = (lazy + p).log()
        assert not x.requires_grad
        assert "log of LinearLogits" in repr(x)
    torch.testing.assert_close(copy.deepcopy(x).materialize(), (eager + p).log())
    assert x.float().dtype == torch.float32
    with pytest.warns(UserWarning, match="sort materialises a tensor made of LinearLogits"):
        torch.testing.assert_close(x.sort(-1).values, (eager + p).log().sort(-1).values)
    x.clamp_(max=-1)
    with pytest.warns(UserWarning, match="__setitem__ materialises a tensor made of LinearLogits"):
        x[:, 0] = -3.0
    expected = (eager + p).log().clamp(max=-1)
    expected[:, 0] = -3.0
    torch.testing.assert_close(x.sum(-1), expected.sum(-1))
    assert (LinearLogits(*inputs[:3])[:, :0].softmax(-1) + 1).log().sum(-1).shape == (B, 0)


@pytest.mark.parametrize(
    "fn",
    [
        lambda z, p: (z.softmax(-1) + 1e-12).log(),
        lambda z, p: (z.softmax(-1) * TOKEN + p).sqrt() * ENTRY,
        lambda z, p: torch.where(z.softmax(-1) > 0.02, z.softmax(-1), p),
        lambda z, p: torch.where(z.softmax(-1) > 0.02, z.softmax(-1), TOKEN.double()),
        lambda z, p: torch.where(z.softmax(-1) > 0.02, z.softmax(-1), torch.tensor(0.5)),
        lambda z, p: (z.mT.softmax(1) + p.mT).log().mT,
        lambda z, p: ((z / TOKEN).softmax(-1) ** 3).view(-1, V).view(B, S, V),
    ],
)
@pytest.mark.parametrize("K", [1, 3])
def test_values_at_ids(fn, K):
    inputs, p, found = leaves()[:3], probabilities(torch.float64), []
    ids = torch.randint(V, (B, S, K), generator=torch.Generator().manual_seed(0))
    for head in (LinearLogits, eager_head):
        with settings.strict():
            values = fn(head(*inputs), p).gather(-1, ids)
        found.append([values, *torch.autograd.grad(values.square().sum(), inputs)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    "fn",
    [
        lambda q, p: q.lerp(p, 0.3),
        lambda q, p: torch.lerp(p, q, torch.linspace(0, 1, B, dtype=p.dtype)[:, None, None]),
        lambda q, p: F.huber_loss(q, p, reduction="none"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_at_ids_beside_a_16_bit_tensor(fn, dtype):
    """These functions take one dtype, and the values of a 16-bit head are fp32."""
    inputs, p = leaves(dtype)[:2], probabilities(torch.float64).to(dtype)
    ids = torch.randint(V, (B, S, 2), generator=torch.Generator().manual_seed(0))
    with settings.strict():
        found = fn(LinearLogits(*inputs).softmax(-1), p).gather(-1, ids)
    assert found.dtype == dtype
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = fn(F.linear(*exact).softmax(-1), p.double()).gather(-1, ids)
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-3)
    pairs = zip(*(torch.autograd.grad(t.sum(), of) for t, of in ((found, inputs), (expected, exact))), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-2, atol=2e-2)


def test_tensors_of_its_size():
    z = LinearLogits(*leaves()[:3])
    with settings.strict():
        for made, value in (
            (torch.zeros_like(z), 0),
            (torch.full_like(z.softmax(-1), 3), 3),
            (torch.ones_like(z.mT), 1),
        ):
            assert made.is_contiguous()
            made.scatter_(-1, torch.zeros_like(made, dtype=torch.long), 7.0)
            assert torch.equal(made, torch.full_like(made, value).index_fill_(-1, torch.tensor([0]), 7))
        assert torch.ones_like(z.mT).shape == (B, V, S)
        assert torch.randn_like(z, dtype=torch.float32).dtype == torch.float32


def test_what_stands_beside_it_may_change_or_says_so():
    inputs, p, token, entry = leaves(), probabilities(torch.float64), TOKEN.clone(), torch.ones(V)
    z = LinearLogits(*inputs[:3]).softmax(-1)
    small, large = (z * entry + 1).log() * token, (z + p).log()
    expected = small.sum(-1)
    token.zero_()
    entry.zero_()
    torch.testing.assert_close(small.sum(-1), expected)
    p.zero_()
    with pytest.raises(RuntimeError, match=r"tensor \(2, 5, 67\) was modified in place"):
        large.sum(-1)


@pytest.mark.filterwarnings("ignore:.*materialises")
@pytest.mark.parametrize("steps", [15, 40])
def test_what_is_used_again_and_again_is_computed_once(steps):
    """Not 3 to the power of the steps times; the elements are materialised where recursion would exhaust Python's stack."""
    inputs, found = leaves()[:3], []
    for head in (LinearLogits, eager_head):
        x = head(*inputs).softmax(-1) + 0.5
        with settings.strict(steps == 15), settings.workspace(20000):
            for _ in range(steps):
                x = x * (1.5 - 0.5 * x * x)
            total = x.detach().view(-1, V).sum(-1), x.mT.sum(1)
        found.append([*total, *torch.autograd.grad(total[1].square().sum(), inputs)])
    torch.testing.assert_close(*found)


def test_a_change_in_place_beside_a_view_is_refused():
    z = LinearLogits(*leaves()[:3])
    x = (z.softmax(-1) + 0.1).log()
    view = x.view(-1, V)
    with pytest.raises(RuntimeError, match=r"__imul__ would change a tensor made of LinearLogits .*view"):
        x *= 2
    del view
    x *= 2
    torch.testing.assert_close(x.sum(-1), (2 * (z.materialize().softmax(-1) + 0.1).log()).sum(-1))
    with torch.no_grad(), pytest.raises(RuntimeError, match="would lose its gradient"):
        x += 1


def test_without_gradient_where_it_was_made_or_read_so():
    inputs, p = leaves(), probabilities(torch.float64)
    z = LinearLogits(*inputs[:3]).softmax(-1)
    with torch.no_grad():
        made = (z + p).log()
    assert not made.requires_grad
    assert not made.sum(-1).requires_grad
    trained = (z + p).log()
    with torch.no_grad():
        assert not trained.sum(-1).requires_grad
    assert trained.sum(-1).requires_grad
    assert not trained.detach().sum(-1).requires_grad


def test_a_head_that_changed_is_noticed():
    inputs = leaves()
    x = (LinearLogits(*inputs[:3]).softmax(-1) + 0.1).log()
    with torch.no_grad():
        inputs[1].mul_(2)
    with pytest.raises(RuntimeError, match="weight was modified in place"):
        x.sum(-1)


@pytest.mark.parametrize(
    "name", ["guarded_entropy", "hellinger", "total_variation", "overlap", "where", "brier", "cosine", "norm"]
)
def test_memory_is_the_workspace_and_the_gradients(name):
    tokens, vocab = 512, 8192
    heads = (
        [torch.randn(n, 8, requires_grad=True) for n in (tokens, vocab)],
        [torch.randn(n, 8) for n in (tokens, vocab)],
    )
    p = torch.randn(tokens, vocab).softmax(-1)

    def step(head):
        loss = LOSSES[name](head(*heads[0]), head(*heads[1]), p).sum()
        torch.autograd.grad(loss, heads[0])

    gradients = sum(t.nbytes for t in heads[0])
    with settings.workspace("8MiB"):
        ours = peak_bytes(lambda: step(LinearLogits))
    assert ours < 8 * 2**20 + gradients
    assert ours < 0.2 * peak_bytes(lambda: step(F.linear))


@pytest.mark.parametrize("made", [lambda z, t: z - t, lambda z, t: z.softmax(-1) - t.softmax(-1)])
def test_where_all_rows_fit_logits_are_made_once_for_all_sums(made, monkeypatch):
    count, real = [], linear_logits._project
    monkeypatch.setattr(linear_logits, "_project", lambda *args: count.append(1) or real(*args))
    inputs = leaves()
    d = made(LinearLogits(*inputs[:3]), LinearLogits(*inputs[3:])).abs()
    (d.square().sum() + d.sqrt().sum() + d.sum()).backward()
    assert len(count) == 2


def test_products_with_the_head(monkeypatch):
    """A few rows at a time: forward makes each head's logits once, backward makes both heads' for each head that trains."""
    made = []
    real = Head.write_logits
    monkeypatch.setattr(Head, "write_logits", lambda head, out: made.append(len(out)) or real(head, out))
    inputs, p = leaves(), probabilities(torch.float64)
    outcome(LOSSES["where"], LinearLogits, inputs, p, workspace=None)
    assert not made
    for student_alone, passes in ((False, 6), (True, 4)):
        others = [x.detach() for x in inputs[3:]] if student_alone else inputs[3:]
        outcome(LOSSES["where"], LinearLogits, inputs[:3] + others, p)
        assert sum(made) == passes * B * S
        assert max(made) < B * S
        made.clear()


@pytest.mark.parametrize("workspace", [20000, None])
@pytest.mark.parametrize(
    "fn",
    [
        lambda p, tau: ((p + 1e-9).log() * tau).sum(),
        lambda p, tau: ((p + 0.1) ** tau).sum(),
        lambda p, tau: (p + 0.1).sqrt().masked_fill(ENTRY == 1, tau).sum(-1).square().sum(),
    ],
)
def test_a_number_that_trains(fn, workspace):
    inputs, found = leaves()[:3], []
    for head in (LinearLogits, eager_head):
        tau = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
        with settings.strict(), settings.workspace(workspace):
            loss = fn(head(*inputs).softmax(-1), tau)
        found.append([loss, *torch.autograd.grad(loss, [*inputs, tau])])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("workspace", [20000, None])
def test_probabilities_that_train_beside_a_frozen_head(workspace):
    inputs, found = [x.detach() for x in leaves()[:3]], []
    for head in (LinearLogits, eager_head):
        p = probabilities(torch.float64).requires_grad_()
        found.append(outcome(LOSSES["distance_of_a_mixture"], head, inputs * 2, p, workspace=workspace))
    torch.testing.assert_close(*found)


def test_a_second_derivative_beside_a_frozen_head():
    inputs, p, found = leaves(), probabilities(torch.float64), []
    for head in (LinearLogits, eager_head):
        with settings.workspace(20000):
            loss = LOSSES["hellinger"](head(*inputs[:3]), head(*(x.detach() for x in inputs[3:])), p).square().sum()
        grads = torch.autograd.grad(loss, inputs[:2], create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), inputs[:2]))
    torch.testing.assert_close(*found)


def test_gradients_of_fp16_logits_beyond_their_range():
    """The gradients of the hidden states are within that range."""
    hidden, weight, found = torch.randn(2 * B, S, H) * 1e4, torch.randn(V, H) * 1e-4, []
    for head, dtype in ((LinearLogits, torch.float16), (F.linear, torch.float64)):
        h, w = hidden.half().to(dtype).requires_grad_(), weight.half().to(dtype)
        with settings.workspace(20000):
            numbers = head(h, w).square().sum(-1)
        found.append(torch.autograd.grad((numbers * 60000).sum(), h)[0].double())
    assert found[0].isfinite().all()
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-2 * found[1].abs().max().item())


@pytest.mark.filterwarnings("ignore:.*materialises")
@pytest.mark.parametrize(
    "fn",
    [
        lambda z, p: (z.softmax(-1).sqrt() + z.softmax(-1).mT.sqrt()).sum(-1),
        lambda z, p: (z[:1].softmax(-1) + p).log().sum(-1),
        lambda z, p: (z.softmax(-1) + p[None]).log().sum(-1),
    ],
)
def test_shapes_that_do_not_stand_entry_by_entry(fn):
    """As many tokens as entries, one token for all, and one dimension more."""
    hidden, weight = torch.randn(V, H), torch.randn(V, H)
    p = torch.rand(V, V)
    with settings.workspace(1000):
        torch.testing.assert_close(fn(LinearLogits(hidden, weight), p), fn(F.linear(hidden, weight), p))


@pytest.mark.parametrize("workspace", [20000, None])
def test_comparisons_that_are_cast(workspace):
    inputs, found = leaves()[:3], []
    for head in (LinearLogits, eager_head):
        p = head(*inputs).softmax(-1)
        with settings.strict(), settings.workspace(workspace):
            above, more = (p > 0.02).double(), torch.where(condition=p > 0.01, input=p, other=0.0)
            counts = (above + (p > 0.01).double()).sum(-1), (1 - above).sum(-1), above.mean(-1)
            weighed = (above * more).sum(-1)
        assert not any(x.requires_grad for x in counts)
        found.append([*counts, weighed, *torch.autograd.grad(weighed.square().sum(), inputs)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("workspace", [20000, None])
def test_a_teacher_made_under_inference_mode(workspace):
    inputs, found = leaves(), []
    with torch.inference_mode():
        p, given = probabilities(torch.float64), [x.clone() for x in inputs[3:]]
    for head in (LinearLogits, eager_head):
        with torch.inference_mode():
            t = head(*given)
        with settings.strict(), settings.workspace(workspace):
            z = head(*inputs[:3]).softmax(-1)
            loss = (z - p).abs().sum() + (z + t.softmax(-1)).sum(-1).square().sum()
        found.append([loss, *torch.autograd.grad(loss, inputs[:3])])
    torch.testing.assert_close(*found)


@pytest.mark.filterwarnings("ignore:.*materialises")
def test_changed_in_place_again_and_again():
    inputs, p = leaves()[:3], probabilities(torch.float64)
    x, step = LinearLogits(*inputs).softmax(-1) + p, p / 400
    for _ in range(400):
        x.add_(step)
    torch.testing.assert_close(x.sum(-1), torch.full((B, S), 3.0, dtype=torch.float64))
    x = torch.where(LinearLogits(*inputs).softmax(-1) > 0.02, 1.0, 0.0)
    assert not x.requires_grad
    x.add_(LinearLogits(*inputs).softmax(-1).sqrt())
    assert x.requires_grad
    with torch.no_grad():
        made = x.exp()
    assert not made.sum().requires_grad


@pytest.mark.filterwarnings("ignore:.*materialises")
@pytest.mark.parametrize("change", [lambda m, p: m.mul_(p), lambda m, p: m.add_(0.5)])
def test_a_mask_takes_no_fractions_in_place(change):
    inputs = leaves()[:3]
    for head in (LinearLogits, eager_head):
        p = head(*inputs).softmax(-1)
        with pytest.raises(RuntimeError, match="can't be cast to the desired output type Bool"):
            change(p > 0.02, p)


def test_a_checkpoint_frees_hidden_states():
    inputs, held = leaves(), []

    def loss(hidden, weight):
        hidden = hidden * 2
        held.append(StorageWeakRef(hidden.untyped_storage()))
        return (LinearLogits(hidden, weight).softmax(-1) + 0.1).log().sum()

    with settings.workspace(20000):
        value = checkpoint(loss, *inputs[:2], use_reentrant=False)
        assert held[0].expired()
        found = torch.autograd.grad(value, inputs[:2])
    torch.testing.assert_close(found, torch.autograd.grad(loss(*inputs[:2]), inputs[:2]))


@pytest.mark.parametrize("workspace", [20000, None])
@pytest.mark.parametrize("name", ["norm", "norm_of_all", "variance"])
def test_gradients_of_rows_of_equal_entries(name, workspace):
    """As of padding whose hidden states are 0: the gradient of a norm or a standard deviation of 0 is 0."""
    inputs, p, results = leaves(), probabilities(torch.float64), []
    with torch.no_grad():
        for x in inputs[0][:, 0], inputs[2], inputs[3][:, 0], inputs[5]:
            x.zero_()
    for head in (LinearLogits, eager_head):
        with settings.workspace(workspace):
            z, t = head(*inputs[:3]), head(*inputs[3:])
            results.append(
                torch.autograd.grad(LOSSES[name](z, t, p).sum() + z.std(-1).sum(), inputs, allow_unused=True)
            )
    assert all(g is None or g.isfinite().all() for g in results[1])
    torch.testing.assert_close(*results)


def test_what_is_detached_gives_a_tensor_in_it_no_gradient():
    p, z = probabilities(torch.float32).requires_grad_(), LinearLogits(torch.randn(B, S, H), torch.randn(V, H))
    assert not (z.softmax(-1) + p).sqrt().detach().sum(-1).requires_grad
