"""The gradient filter: which columns are multiplied, by every route and loss, and what that holds."""

import pytest
import torch
import torch.nn.functional as F
from ranks import needs_ranks

from fused_losses import drop_ignored, gradient_filter, plan, products, route, workspace
from fused_losses.bench import ranks
from fused_losses.bench.memory import peak_bytes
from fused_losses.distillation import distillation_loss
from fused_losses.divergence import divergence
from fused_losses.gradients_in_forward import Factors, linear_loss
from fused_losses.head import Head
from fused_losses.linear_cross_entropy import linear_cross_entropy
from fused_losses.linear_logits import LinearLogits
from fused_losses.products import add_at_columns, add_over_columns, few_columns
from fused_losses.reference.tolerance import assert_accurate
from fused_losses.settings import backend as backend_setting
from fused_losses.token_loss import token_loss
from fused_losses.token_statistics import selective_log_softmax
from fused_losses.two_heads import chunks_of

N, V, H, R = 24, 128, 16, 3
FILTER = 0.05


def large(d, epsilon):
    """The columns that are multiplied, None where all are."""
    few = few_columns(d, epsilon)
    return None if few is None else few.columns.tolist()


def test_the_rule():
    d = torch.zeros(2, 9)
    d[0, 1:5] = torch.tensor([1e-3, -4.0, 0.1, 2e-3])
    d[1, 1], d[1, 4] = -0.2, 1e-3
    assert large(d, 0.05) == [1, 2]  # 0.2 is 0.05 of 4: the column is multiplied
    assert large(d.bfloat16(), 0.01) == [1, 2, 3]
    assert large(d, 1e-9) == [1, 2, 3, 4]
    assert large(d, 0.0) is None
    assert large(d[:, :7], 1e-9) is None, "more than half"
    for special in (torch.nan, torch.inf, -torch.inf):
        d[1, 0] = special
        assert large(d, 0.05) is None
    assert large(torch.zeros(3, 5), 0.5) is None
    assert large(torch.zeros(0, 5), 0.5) is None
    assert large(torch.zeros(5, 0), 0.5) is None


def approximated(d, epsilon):
    """What stands for ``d``, by the formula in the docstring."""
    largest = d.abs().amax(0)
    small = largest < epsilon * largest.max()
    if small.sum() < 0.5 * len(small):
        return d
    sizes = d.abs().sum(0) * small
    return d * ~small + torch.outer(d[:, small].sum(1), sizes / sizes.sum() if small.any() else sizes)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [True, False])
def test_products_of_few_columns(dtype, wide, first, device, monkeypatch):
    monkeypatch.setattr(products, "at_a_time", lambda *sizes: 10)
    out_dtype = torch.promote_types(dtype, torch.float32) if wide else dtype
    d, matrix, x = (torch.randn(s, device=device, dtype=dtype) for s in ((30, 50), (50, 20), (30, 20)))
    d[:, torch.randperm(50)[:27]] *= 0.01
    few = few_columns(d, 0.1)
    assert len(few.columns) == 23
    left = approximated(d.double(), 0.1)
    assert not torch.equal(left, d.double())
    for add, shape, a, b in ((add_over_columns, (30, 20), left, matrix), (add_at_columns, (50, 20), left.t(), x)):
        if add is add_over_columns and not (first or wide):
            continue  # a 16-bit sum over columns is written once
        out = torch.randn(shape, device=device, dtype=out_dtype)
        before = torch.zeros_like(out) if first else out.clone()
        exact = before.double() + a @ b.double()
        eager = (before.float() + a.to(dtype).float() @ b.float()).to(out_dtype)
        add(out, d, b, few, first)
        assert_accurate(out, eager, exact, add.__name__)


def test_what_is_small_in_all_rows_alike_is_exact():
    large, rows, shares = torch.randn(40, 8), torch.randn(40), torch.rand(90)
    d = torch.cat([large, 1e-3 * torch.outer(rows, shares)], 1)
    few = few_columns(d, 0.05)
    assert len(few.columns) <= 8
    weight, d_hidden = torch.randn(98, 16), torch.empty(40, 16)
    add_over_columns(d_hidden, d, weight, few, first=True)
    torch.testing.assert_close(d_hidden, d @ weight)


def test_small_columns_of_nothing_and_of_no_size():
    """No division by zero, and no number that is too small for float16."""
    d = torch.zeros(4, 20, dtype=torch.float16)
    d[:, 0] = 1
    few = few_columns(d, 0.5)
    assert few.columns.tolist() == [0]
    assert not few.shares.any()
    assert few.size == 0
    d[:, 1:] = 6e-8  # the smallest that float16 has
    d_hidden, ones = torch.empty(4, 3), torch.ones(20, 3, dtype=torch.float16)
    add_over_columns(d_hidden, d, ones, few_columns(d, 0.5), first=True)
    torch.testing.assert_close(d_hidden, (d.double() @ ones.double()).float(), rtol=1e-7, atol=0)


def peaked(device="cpu", dtype=torch.float32):
    """A head whose logits differ much, as a trained model's do: most columns are small in every row."""
    scale = torch.linspace(0.1, 1.5, V, device=device)[:, None]
    hidden, weight = torch.randn(N, H, device=device), torch.randn(V, H, device=device) * scale
    u, B = torch.randn(N, R, device=device), 0.5 * torch.randn(V, R, device=device)
    bias = torch.randn(V, device=device)
    return [t.to(dtype).requires_grad_() for t in (hidden, weight, bias, u, B)]


def lazy(inputs):
    hidden, weight, bias, u, B = inputs
    return LinearLogits(hidden, weight, bias, low_rank=(u, B))


def teacher(device):
    return torch.randn(N, V, device=device)


def weighted(x):
    return (x * torch.linspace(0.5, 1.5, len(x), device=x.device)).sum()


def dft(s):
    return -s.log_probs.exp().detach() * s.log_probs


def dft_of_logits(z, y):
    log_probs = torch.log_softmax(z, -1).gather(-1, y[:, None])[:, 0]
    return (-log_probs.exp().detach() * log_probs).sum()


# name: (route, ours, the same on logits)
LOSSES = {
    "cross_entropy": ("gradients_in_forward", F.cross_entropy, F.cross_entropy),
    "cross_entropy, recomputed": ("recompute", F.cross_entropy, F.cross_entropy),
    "per token": (
        None,
        lambda z, y: weighted(F.cross_entropy(z, y, reduction="none")),
        lambda z, y: weighted(F.cross_entropy(z, y, reduction="none")),
    ),
    "log_probs": (
        None,
        lambda z, y: weighted(selective_log_softmax(z, y)),
        lambda z, y: -weighted(F.cross_entropy(z, y, reduction="none")),
    ),
    "token_loss": ("gradients_in_forward", lambda z, y: token_loss(dft, z, y)[0], dft_of_logits),
    "divergence": (
        None,
        lambda z, y: weighted(divergence(z, TEACHER[0], temperature=2.0)),
        lambda z, y: weighted(F.kl_div((z / 2).log_softmax(-1), (TEACHER[0] / 2).softmax(-1), reduction="none").sum(-1)),
    ),
    "a teacher that trains": (
        None,
        lambda z, y: weighted(divergence(TEACHER[0], z)),
        lambda z, y: weighted((z.softmax(-1) * (z.log_softmax(-1) - TEACHER[0].log_softmax(-1))).sum(-1)),
    ),
    "distillation": (
        None,
        lambda z, y: distillation_loss(z, TEACHER[0], y, hard_weight=1.0, soft_weight=1.0, reduction="sum"),
        lambda z, y: F.cross_entropy(z, y, reduction="sum")
        + F.kl_div(z.log_softmax(-1), TEACHER[0].log_softmax(-1), log_target=True, reduction="sum"),
    ),
}  # fmt: skip
TEACHER = [torch.empty(0)]


def with_gradients(loss, inputs):
    return (loss.detach(), *torch.autograd.grad(3 * loss, inputs))


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_multiplies_the_same_columns(name, pieces, backend, device, monkeypatch):
    monkeypatch.setattr(products, "at_a_time", lambda *sizes: 16)
    way, ours, plain = LOSSES[name]
    inputs = peaked(device)
    hidden, weight, bias, u, B = inputs
    target = torch.randint(0, V, (N,), device=device)
    TEACHER[0] = teacher(device)
    seen = []

    def spy(d_logits, gradient_filter):
        seen.append(d_logits.clone())
        return few_columns(d_logits, gradient_filter)

    for module in ("gradients_in_forward", "recompute"):
        monkeypatch.setattr(f"fused_losses.{module}.few_columns", spy)
        monkeypatch.setattr("fused_losses.planning.FEWEST_TOKENS", 4)
        monkeypatch.setattr("fused_losses.two_heads.FEWEST_TOKENS", N // pieces)
        monkeypatch.setattr("fused_losses.planning.FEWEST_COLUMNS", V if pieces == 1 else 16)
    room = None if pieces == 1 else 0
    with backend_setting(backend), route(way), workspace(room):
        exact = with_gradients(ours(lazy(inputs), target), inputs)
        assert not seen or len(seen) == pieces or pieces > 1
        seen.clear()
        with gradient_filter(FILTER):
            loss = ours(lazy(inputs), target)
        found = with_gradients(loss, inputs)  # the setting in forward is what counts

    z = (hidden @ weight.T + u @ B.T + bias).detach().requires_grad_()
    (dz,) = torch.autograd.grad(3 * plain(z, target), z)
    assert len(seen) > 1 if pieces > 1 else len(seen) == 1
    by_tokens = seen[0].shape[1] == V
    left, at, multiplied = torch.zeros_like(dz), 0, 0
    for d in seen:  # pieces of the logits' gradient, in order
        part = (slice(at, at + d.shape[0]), slice(None)) if by_tokens else (slice(None), slice(at, at + d.shape[1]))
        left[part] = approximated(dz[part], FILTER)
        multiplied += len(large(dz[part], FILTER) or dz[part][0]) / (dz[part].shape[1] * len(seen))
        at += d.shape[0 if by_tokens else 1]
    assert 0.02 < multiplied < 0.75
    expected = (3 * plain(z, target), left @ weight, left.T @ hidden, dz.sum(0), left @ B, left.T @ u)
    assert torch.equal(found[0], exact[0]), "the loss is exact"
    torch.testing.assert_close(found[3], exact[3])  # the bias's gradient is exact, but for the order of chunks
    for i in (1, 2, 4, 5):
        torch.testing.assert_close(found[i], expected[i].detach(), rtol=2e-4, atol=2e-5)
        assert not torch.allclose(found[i], exact[i], rtol=1e-3, atol=1e-4), "the filter leaves something out"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("way", ["gradients_in_forward", "recompute"])
def test_columns_without_gradient_change_nothing(way, dtype, backend, device):
    """Where the gradient left out is 0, 16-bit gradients are as accurate as eager's."""
    hidden, weight, bias, *_ = peaked(device, dtype)
    with torch.no_grad():
        bias[: V // 2] = -200
    target = torch.randint(V // 2, V, (N,), device=device)
    inputs = (hidden, weight, bias)
    with backend_setting(backend), route(way), gradient_filter(2.0**-20):
        ours = with_gradients(F.cross_entropy(LinearLogits(*inputs), target), inputs)
    eager = with_gradients(F.cross_entropy(F.linear(*inputs), target), inputs)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    exact = with_gradients(F.cross_entropy(F.linear(*wide), target), wide)
    for i in (1, 2, 3):
        assert_accurate(ours[i], eager[i], exact[i], f"gradient {i}")


@pytest.mark.parametrize("way", ["gradients_in_forward", "recompute"])
def test_main_grad_receives_what_is_left(way, device):
    hidden, weight, *_ = peaked(device)
    target = torch.randint(0, V, (N,), device=device)
    before = torch.randn(V, H, device=device)
    with route(way), gradient_filter(FILTER):
        (expected,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, target), weight)
        main_grad = before.clone()
        loss = linear_cross_entropy(hidden, weight, target, main_grad=main_grad, grad_scale=1.0)
        loss.backward()
    torch.testing.assert_close(main_grad, before + expected)
    exact = torch.autograd.grad(linear_cross_entropy(hidden, weight, target), weight)[0]
    assert not torch.allclose(exact, expected, rtol=1e-2)


def test_the_products_shrink(monkeypatch):
    """Floating point operations of backward are those of the columns that are left."""
    hidden, weight, *_ = peaked()
    target = torch.randint(0, V, (N,))
    sizes = []

    def spy(out, a, b, first):
        sizes.append(a.shape[0] * a.shape[1] * b.shape[1])
        return add_product(out, a, b, first)

    add_product = products.add_product
    monkeypatch.setattr(products, "add_product", spy)
    for share in (0.0, FILTER):
        sizes.clear()
        with gradient_filter(share):
            F.cross_entropy(LinearLogits(hidden, weight), target).backward()
        if not share:
            assert sum(sizes) == 2 * N * V * H
    z = (hidden @ weight.T).detach().requires_grad_()
    (dz,) = torch.autograd.grad(F.cross_entropy(z, target), z)
    left = int((dz.abs().amax(0) >= FILTER * dz.abs().max()).sum())
    assert sum(sizes) == 2 * N * left * H + N * V + V * H + N * H  # and the term that stands for the other columns


@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("way", ["gradients_in_forward", "recompute"])
def test_ignored_tokens_are_none(way, drop, device):
    hidden, weight, *_ = peaked(device)
    target = torch.randint(0, V, (N,), device=device)
    ignored = target.clone()
    ignored[::3] = -100
    kept = ignored != -100
    with torch.no_grad():
        hidden[0] = torch.nan
    with route(way), gradient_filter(FILTER), drop_ignored(drop):
        found = torch.autograd.grad(F.cross_entropy(LinearLogits(hidden, weight), ignored), (hidden, weight))
        alone = hidden[kept].detach().requires_grad_()
        expected = torch.autograd.grad(F.cross_entropy(LinearLogits(alone, weight), target[kept]), (alone, weight))
    torch.testing.assert_close((found[0][kept], found[1]), expected)
    assert not found[0][~kept].any()


def _of_a_rank(device, hidden, weight, target):
    """With the filter, one rank multiplies its half of the columns whole, the other does not."""
    half = slice(0, V // 2) if torch.distributed.get_rank() == 0 else slice(V // 2, V)
    hidden, mine = (t.detach().to(device).requires_grad_() for t in (hidden, weight[half]))
    found = []
    for way in ("gradients_in_forward", "recompute"):
        with route(way), gradient_filter(FILTER):
            logits = LinearLogits(hidden, mine, group=torch.distributed.group.WORLD)
            found.append(with_gradients(F.cross_entropy(logits, target.to(device)), (hidden, mine)))
    return found


@needs_ranks
def test_each_rank_filters_its_part():
    hidden, weight, *_ = peaked()
    target = torch.randint(0, V, (N,))
    z = (hidden @ weight.T).detach().requires_grad_()
    (dz,) = torch.autograd.grad(3 * F.cross_entropy(z, target), z)
    halves = [approximated(d, FILTER) for d in dz.split(V // 2, 1)]
    assert [torch.equal(a, b) for a, b in zip(halves, dz.split(V // 2, 1), strict=True)] == [False, True]
    left = torch.cat(halves, 1)
    expected = (left @ weight, left.T @ hidden)
    for rank, found in enumerate(ranks.run(_of_a_rank, 2, hidden.detach(), weight.detach(), target)):
        for _, d_hidden, d_weight in found:
            torch.testing.assert_close(d_hidden, expected[0].detach(), rtol=2e-4, atol=2e-5)
            torch.testing.assert_close(d_weight, expected[1].detach().split(V // 2)[rank], rtol=2e-4, atol=2e-5)


def test_second_derivatives_are_of_the_exact_gradient():
    inputs = [t.detach().double().requires_grad_() for t in peaked()[:2]]
    target = torch.randint(0, V, (N,))
    with gradient_filter(FILTER):
        first = torch.autograd.grad(F.cross_entropy(LinearLogits(*inputs), target), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
    plain = torch.autograd.grad(F.cross_entropy(F.linear(*inputs), target), inputs, create_graph=True)
    torch.testing.assert_close(first, plain)
    torch.testing.assert_close(second, torch.autograd.grad(sum(g.square().sum() for g in plain), inputs))


def test_sizes_beyond_fp32_squared():
    """Neither inf nor 0 where the largest entry of a row times the largest of a column is beyond the range of fp32."""
    d = torch.rand(6, 40)
    d[:, 8:] *= 1e-3
    weight, x = torch.randn(40, 5), torch.randn(6, 5)
    for scale in (1e-30, 1e30):
        over, at = torch.empty(6, 5), torch.empty(40, 5)
        few = few_columns(d * scale, 0.05)
        add_over_columns(over, d * scale, weight, few, first=True)
        add_at_columns(at, d * scale, x, few, first=True)
        left = approximated(d.double(), 0.05)
        torch.testing.assert_close(over / scale, (left @ weight.double()).float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(at / scale, (left.t() @ x.double()).float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", ["gradients_in_forward", "recompute"])
@pytest.mark.parametrize(("dtype", "sizes"), [
    (torch.float32, (512, 16384, 64)), (torch.bfloat16, (512, 16384, 64)), (torch.float32, (8, 200_000, 4)),
    (torch.bfloat16, (2048, 8192, 512)), (torch.float32, (2, 400_000, 1)), (torch.bfloat16, (2048, 2048, 1024)),
])  # fmt: skip
def test_the_peak_is_as_planned(dtype, sizes, way, device):
    (n, v, h), room = sizes, 24 * 2**20
    hidden = torch.randn(n, h, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(v, h, device=device, dtype=dtype, requires_grad=True)
    bias = torch.zeros(v, device=device, dtype=dtype)
    bias[: v * 3 // 5] = -1e4
    target = torch.randint(v * 3 // 5, v, (n,), device=device)

    def step():
        with route(way), gradient_filter(2.0**-12), workspace(room):
            loss = F.cross_entropy(LinearLogits(hidden, weight, bias), target)
        return torch.autograd.grad(loss, (hidden, weight))

    backend = "triton" if device == "cuda" else "torch"
    how = {"route": way, "workspace": room, "backend": backend}
    planned = plan(n, v, h, dtype, gradient_filter=2.0**-12, **how)
    step()
    measured = peak_bytes(step, device)
    assert measured <= 1.05 * planned.peak
    assert measured >= 0.65 * planned.peak  # the plan counts half of the columns as large
    assert planned.peak <= (n + v) * h * hidden.itemsize + room


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("room", [2**27, 2**28, 2**30])
@pytest.mark.parametrize("way", [None, "recompute"])
def test_what_is_gathered_is_in_the_budget(way, room, dtype):
    for n, v, h in ((2048, 49152, 576), (8192, 128256, 2048), (16384, 151936, 1024)):
        how = {"route": way, "workspace": room, "backend": "triton"}
        exact, filters = (plan(n, v, h, dtype, gradient_filter=e, **how) for e in (0.0, 2.0**-12))
        gradients = (n + v) * h * dtype.itemsize
        assert filters.peak - gradients <= max(room, exact.peak - gradients)
        assert filters.route != exact.route or filters.chunk >= exact.chunk // 2
        with gradient_filter(2.0**-12):
            assert plan(n, v, h, dtype, **how) == filters


@pytest.mark.parametrize("wrong", [True, 2.0, -1, "a", float("nan")])
def test_no_plan_with_a_bad_value(wrong):
    with pytest.raises(ValueError, match="gradient_filter takes"):
        plan(8, 8, 8, gradient_filter=wrong)


def test_two_heads_stay_in_their_workspace(device):
    n, v, h, room = 1024, 8192, 128, 40 * 2**20
    hidden, teacher_hidden = torch.randn(n, h, device=device), torch.randn(n, h, device=device)
    weight, teacher_weight = torch.randn(v, h, device=device), torch.randn(v, h, device=device)
    hidden.requires_grad_(), weight.requires_grad_()

    def step():
        with gradient_filter(2.0**-6):
            found = divergence(
                LinearLogits(hidden, weight), LinearLogits(teacher_hidden, teacher_weight), workspace=room
            )
        return torch.autograd.grad(found.sum(), (hidden, weight))

    found = []

    def spy(d_logits, epsilon):
        few = few_columns(d_logits, epsilon)
        found.append(few is not None)
        return few

    step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "GATHERED", {"cpu": 2**24, "cuda": 2**24})
        patch.setattr("fused_losses.gradients_in_forward.few_columns", spy)
        assert peak_bytes(step, device) <= 1.05 * (room + hidden.nbytes + weight.nbytes)
    assert any(found)


def test_a_compiler_knows_what_the_filter_changes_in_the_plan():
    """With the filter there are so many chunks that they are summed in fp32; without it they are not."""
    n, v, h, room = 512, 4096, 64, 2**22
    hidden, weight = (torch.randn(k, h, dtype=torch.bfloat16, requires_grad=True) for k in (n, v))
    how = {"route": "gradients_in_forward", "workspace": room, "backend": "torch"}
    sums = [plan(n, v, h, torch.bfloat16, gradient_filter=e, **how).accumulate for e in (0.0, FILTER)]
    assert sums[0] != sums[1]
    of_tokens = {"ids": torch.randint(0, v, (n, 1)), "column_weight": None, "keep": None, "zero_ignored": True}
    of_tokens |= Factors(-torch.rand(n), None, None)._asdict()
    how = {"wanted": [True, True, False, False, False], "workspace": room, "accumulate": None, "backend": "torch"}
    arguments = Head(hidden, weight, gradient_filter=FILTER).packed() | of_tokens | how | {"top1": False}
    torch.library.opcheck(linear_loss, (), arguments, test_utils="test_faketensor")


def test_two_heads_count_what_is_gathered():
    n, v, h, room = 4096, 8192, 512, 2**26
    hidden, weight = torch.empty(n, h), torch.empty(v, h)
    wanted = [True, True, False, False, False] + [False] * 5

    def tokens(epsilon):
        heads = Head(hidden, weight, gradient_filter=epsilon), Head(hidden, weight)
        return chunks_of(heads, n, wanted, room, "triton").tokens

    gathered = products.gathered_bytes(1024, v, h, torch.float32, torch.float32, on_cpu=True)
    assert tokens(0.0) == room // (2 * v * 4)
    assert tokens(FILTER) * 2 * v * 4 + gathered <= room


@pytest.mark.parametrize("per_token", [False, True])
def test_compiles_whole(per_token):
    hidden, weight, *_ = peaked()
    target = torch.randint(0, V, (N,))

    def loss(hidden, weight):
        found = F.cross_entropy(LinearLogits(hidden, weight), target, reduction="none" if per_token else "mean")
        return weighted(found) if per_token else found

    with gradient_filter(FILTER):
        expected = with_gradients(loss(hidden, weight), (hidden, weight))
        found = with_gradients(
            torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden, weight), (hidden, weight)
        )
    exact = with_gradients(loss(hidden, weight), (hidden, weight))
    for a, b, c in zip(found[1:], expected[1:], exact[1:], strict=True):
        torch.testing.assert_close(a, b)
        assert not torch.allclose(b, c, rtol=1e-3)


def test_a_compiled_token_loss_multiplies_all():
    hidden, weight, *_ = peaked()
    target = torch.randint(0, V, (N,))

    def loss(hidden, weight):
        return token_loss(dft, LinearLogits(hidden, weight), target)[0]

    expected = with_gradients(loss(hidden, weight), (hidden, weight))
    with gradient_filter(FILTER):
        found = torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden, weight)
    torch.testing.assert_close(with_gradients(found, (hidden, weight)), expected)


@pytest.mark.parametrize("wrong", [-0.1, 1, 1.0, True, "2**-12", None, float("nan")])
def test_bad_values(wrong):
    with pytest.raises(ValueError, match="gradient_filter takes"):
        gradient_filter(wrong)
    assert gradient_filter.value == 0
