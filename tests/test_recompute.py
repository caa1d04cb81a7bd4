"""Statistics of the tokens of a head and their gradients, against whole logits."""

import dataclasses

import pytest
import torch
from conftest import INTERPRETED
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from fused_losses import library_tiles, linear_cross_entropy, planning, recompute
from fused_losses.head import Head, kept_tokens
from fused_losses.recompute import linear_rows, linear_rows_grad, linear_statistics
from fused_losses.reference.tolerance import assert_accurate
from fused_losses.row_statistics import Coefficients
from fused_losses.settings import workspace

N, V, H, R, K = 19, 41, 7, 3, 2
DIFFERENTIABLE = ("log_probs", "logsumexp", "entropy", "log_sum_sq_probs", "sum_log_probs")
OUTPUTS = (*DIFFERENTIABLE, "max_logit", "is_top1")
pytestmark = pytest.mark.usefixtures("small_pieces")


def head(dtype=torch.float32, device="cpu", **options):
    def random(*shape):
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    temperature = torch.rand(N, device=device) + 0.5
    return Head(random(N, H), random(V, H), random(V), random(N, R), random(V, R), temperature, **options)


def some_ids(device="cpu"):
    ids = torch.randint(0, V, (N, K), device=device)
    ids[1::4] = -100
    ids[0, 1] = -100  # one ignored id beside another id
    ids[2] = 5  # the same id twice
    return ids


def some_top1(h, ids):
    """Every third token asks for its largest logit."""
    z = h.hidden.detach().double() @ h.weight.detach().double().T + h.u.detach().double() @ h.B.detach().double().T
    best = (z + h.bias.detach().double()).argmax(-1)
    ids[3::3, 0] = torch.where(ids[3::3, 0] == -100, -100, best[3::3])
    return ids


def plain_statistics(h, ids, u):
    """Statistics from whole logits, in the precision of the head and at least fp32."""
    dtype = torch.promote_types(h.hidden.dtype, torch.float32)
    x = (h.hidden @ h.weight.T + h.u @ h.B.T + h.bias).to(dtype) * h.scale
    if h.softcap is not None:
        x = h.softcap * torch.tanh(x / h.softcap)
    z = x / h.temperature.to(dtype)[:, None]
    logp = torch.log_softmax(z, -1)
    p = logp.exp()
    counted = (ids != -100).any(-1)
    found = {
        "log_probs": torch.where(ids == -100, 0, logp.gather(1, ids.clamp(min=0))),
        "logsumexp": z.logsumexp(-1),
        "entropy": -(p * logp).sum(-1),
        "log_sum_sq_probs": (2 * logp).logsumexp(-1),
        "sum_log_probs": (u.to(dtype) * logp).sum(-1),
        "max_logit": z.amax(-1),
    }
    return {name: torch.where(counted if v.ndim == 1 else counted[:, None], v, 0) for name, v in found.items()}


def differentiated(statistics, h):
    """Gradients of the head's inputs from a sum of all differentiable statistics, with weights of both signs."""
    generator = torch.Generator().manual_seed(2)
    total = 0
    for name in DIFFERENTIABLE:
        value = statistics[name]
        g = torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
        total = total + (g * value).sum()
    return torch.autograd.grad(total, h.inputs)


def at(h, dtype):
    return h.with_inputs(t.detach().to(dtype).requires_grad_() for t in h.inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"scale": 0.5, "softcap": 3.0}], ids=["plain", "capped"])
@pytest.mark.parametrize(
    ("drop_ignored", "workspace"),
    [(True, N * 16 * 4), (False, N * 16 * 4), (True, "1MiB")],
    ids=["drop", "zero", "keep"],
)
def test_every_statistic_and_its_gradient(dtype, options, drop_ignored, workspace, backend, device):
    if backend == "triton" and (dtype == torch.float64 or (dtype == torch.bfloat16 and INTERPRETED)):
        pytest.skip("Triton computes in fp32, and its interpreter gets bfloat16 wrong")
    h, u = head(dtype, device, **options), torch.randn(V, device=device)
    ids = some_top1(h, some_ids(device))
    found = linear_statistics(
        h, ids, u, outputs=OUTPUTS, kept=kept_tokens(ids, drop_ignored), backend=backend, workspace=workspace
    )
    exact_head, eager_head = at(h, torch.float64), at(h, dtype)
    exact, eager = plain_statistics(exact_head, ids, u), plain_statistics(eager_head, ids, u)
    wide = torch.promote_types(dtype, torch.float32)
    counted = (ids != -100).any(-1)
    for name in exact:
        value = getattr(found, name).to(wide)
        if dtype == torch.float64:
            torch.testing.assert_close(value, exact[name])
        else:
            assert_accurate(value, eager[name], exact[name], name)
    top1 = torch.isclose(exact["max_logit"], exact["logsumexp"] + exact["log_probs"][:, 0])
    assert torch.equal(found.is_top1[counted], top1[counted])
    assert 0 < top1[counted].sum() < counted.sum()
    assert (found.log_probs <= 0).all()
    ours = differentiated(found._asdict(), h)
    theirs, truth = differentiated(eager, eager_head), differentiated(exact, exact_head)
    for name, a, b, c in zip(Head._fields, ours, theirs, truth, strict=False):
        if dtype == torch.float64:
            torch.testing.assert_close(a, c)
        else:
            assert_accurate(a, b, c, f"d_{name}")


def test_where_triton_has_no_matrix_instructions_the_library_multiplies(monkeypatch):
    from fused_losses.kernels import configurations

    def statistics(backend):
        torch.manual_seed(0)
        h, u, ids = head(torch.float16), torch.randn(V), some_ids()
        found = linear_statistics(h, ids, u, outputs=OUTPUTS, backend=backend)._asdict()
        return [*found.values(), *differentiated(found, h)]

    for capability, expected in (((7, 5), False), ((8, 6), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert configurations.multiplies_matrices(torch.device("cuda")) == expected
    if INTERPRETED:
        monkeypatch.setattr(configurations, "multiplies_matrices", lambda device: False)
        assert recompute.linear_module("triton", torch.empty(1).half()) is recompute.chunked_linear_softmax
        torch.testing.assert_close(statistics("triton"), statistics("torch"))


@torch.no_grad()
def test_a_32_bit_head_takes_its_tokens_a_tile_at_a_time(device, monkeypatch):
    pytest.importorskip("triton")
    h, ids, weights = head(device=device, softcap=3.0), some_ids(device), torch.rand(V, device=device)

    def statistics(columns):
        saved = torch.zeros(N, columns, device=device) if columns else None
        found = library_tiles.linear_softmax_fwd(
            h.hidden, h.weight, h.bias, h.low_rank, ids, weights, h.temperature, softcap=h.softcap, outputs=OUTPUTS,
            saved_logits=saved,
        )  # fmt: skip
        return [s for s in found if s is not None], saved

    whole, logits = statistics(V)
    monkeypatch.setattr(library_tiles, "tile_rows", lambda *_: 8)  # of 19
    for columns in (0, 16, V):
        found, saved = statistics(columns)
        torch.testing.assert_close(found, whole)
        if columns:
            torch.testing.assert_close(saved, logits[:, :columns])


@pytest.mark.parametrize(("saved", "made"), [(0, 41), (16, 25), (32, 9), (41, 0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_forward_saves_is_not_made_again(saved, made, dtype, backend, device, monkeypatch):
    """The values are the same bit for bit, and gradients of as many columns come from the saved logits."""
    h, u, ids = head(dtype, device, scale=0.5, softcap=3.0), torch.randn(V, device=device), some_ids(device)
    tile_of = recompute.linear_module(backend, h.hidden)
    d_logits, columns = tile_of.linear_softmax_d_logits, []

    def counted(hidden, weight, *rest, **options):
        columns.append(weight.shape[0])
        return d_logits(hidden, weight, *rest, **options)

    monkeypatch.setattr(tile_of, "linear_softmax_d_logits", counted)
    found, gradients = [], []
    for entries in (0, saved):
        small = planning.plan(N, V, H, dtype, route="recompute", workspace=1)
        plan = dataclasses.replace(small, saved=entries, chunk=max(16, entries) if dtype == torch.float32 else 16)
        monkeypatch.setattr(Head, "plan", lambda *_, plan=plan, **__: plan)
        columns.clear()
        found.append(linear_statistics(h, ids, u, outputs=OUTPUTS, backend=backend)._asdict())
        gradients.append(differentiated(found[-1], h))
    assert sum(columns) == made
    for name in OUTPUTS:
        assert torch.equal(found[0][name], found[1][name]), name
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if dtype == torch.float32 else 2e-3, atol=2e-6)


def test_saved_logits_outlive_a_backward_that_keeps_the_graph(backend, device):
    h, ids = head(device=device), some_ids(device)
    found = linear_statistics(h, ids, outputs=("entropy",), backend=backend)
    total = (found.log_probs.sum(-1) * found.entropy).sum()
    first = torch.autograd.grad(total, h.inputs, retain_graph=True)
    second = torch.autograd.grad(total, h.inputs)
    for a, b in zip(first, second, strict=True):
        assert a.abs().max() > 0.1
        assert torch.equal(a, b)


def test_checkpointing_under_a_workspace_that_has_ended(backend, device):
    """Forward runs again under another workspace, and must save the same shapes."""
    h, ids = head(device=device), some_ids(device)

    def total(*inputs):
        found = linear_statistics(h.with_inputs(inputs), ids, outputs=("entropy",), backend=backend)
        return (found.log_probs.sum(-1) * found.entropy).sum()

    with workspace(1):
        checkpointed = checkpoint(total, *h.inputs, use_reentrant=False)
    ours = torch.autograd.grad(checkpointed, h.inputs)
    for a, b in zip(ours, torch.autograd.grad(total(*h.inputs), h.inputs), strict=True):
        assert a.abs().max() > 0.1
        torch.testing.assert_close(a, b)


def test_where_saved_tensors_may_be_mutated(backend, device):
    h, ids = head(device=device), some_ids(device)

    def gradients():
        found = linear_statistics(h, ids, outputs=("entropy",), backend=backend)
        return torch.autograd.grad((found.log_probs.sum(-1) * found.entropy).sum(), h.inputs)

    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        ours = gradients()
    for a, b in zip(ours, gradients(), strict=True):
        torch.testing.assert_close(a, b)


def test_hooks_see_no_logits(backend, device):
    """Hooks could move logits to other memory and back."""
    h, ids = head(device=device), some_ids(device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        found = linear_statistics(h, ids, outputs=("entropy",), backend=backend)
    assert (V, H) in saved
    assert max(shape.numel() for shape in saved) == V * H
    assert found.entropy.requires_grad


def test_top1_is_the_first_maximum(backend, device):
    hidden = torch.ones(5, 8, device=device).half()
    weight = torch.zeros(20, 8, device=device).half()
    weight[2:5] = weight[17] = 1  # equal maxima, three in one tile and one in another
    ids = torch.tensor([[2], [3], [4], [0], [17]], device=device)
    found = linear_statistics(Head(hidden, weight), ids, outputs=("is_top1",), backend=backend)
    assert found.is_top1.tolist() == [True, False, False, False, False]


def test_sixteen_bit_logits_are_never_rounded(backend, device):
    torch.manual_seed(1)
    dtype = torch.float16 if backend == "triton" else torch.bfloat16
    hidden = (torch.randn(64, 64, device=device) * 3).to(dtype)
    weight = torch.randn(99, 64, device=device).to(dtype)
    ids = torch.randint(0, 99, (64, 1), device=device)
    z = hidden.double() @ weight.double().T
    assert z.abs().max() > 50
    exact = torch.log_softmax(z, -1).gather(1, ids)
    fp32 = torch.log_softmax((hidden.float() @ weight.float().T).double(), -1).gather(1, ids)
    ours = linear_statistics(Head(hidden, weight), ids, outputs=(), backend=backend).log_probs
    rounded = torch.log_softmax((hidden @ weight.T).double(), -1).gather(1, ids)
    error = (ours - exact).abs().max()
    assert error <= 2 * (fp32 - exact).abs().max() + 2e-7 * exact.abs().max()
    assert error < 1e-3 * (rounded - exact).abs().max()


@settings(deadline=None, max_examples=15, derandomize=True)
@given(
    tokens=st.integers(0, 9),
    vocab=st.integers(1, 9),
    hidden=st.integers(1, 5),
    budget=st.sampled_from([1, 200, 10**9]),
    seed=st.integers(0, 100),
)
def test_any_shape(tokens, vocab, hidden, budget, seed):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    h, w = random(tokens, hidden), random(vocab, hidden)
    ids = torch.randint(-1, vocab, (tokens, 1), generator=generator)
    ids[ids == -1] = -100
    found = linear_statistics(Head(h, w), ids, outputs=("entropy",), workspace=budget)
    logp = torch.log_softmax(h @ w.T, -1)
    counted = ids != -100
    chosen = torch.where(counted, logp.gather(1, ids.clamp(min=0)), 0)
    entropy = torch.where(counted[:, 0], -(logp.exp() * logp).sum(-1), 0)
    torch.testing.assert_close(found.log_probs, chosen)
    torch.testing.assert_close(found.entropy, entropy)
    ours = torch.autograd.grad((found.log_probs.sum() + 2 * found.entropy.sum()), (h, w))
    torch.testing.assert_close(ours, torch.autograd.grad(chosen.sum() + 2 * entropy.sum(), (h, w)))


def test_slices_of_the_vocabulary_do_not_matter():
    torch.manual_seed(0)
    big = torch.randn(2000, 4, dtype=torch.float64).requires_grad_()
    hidden = torch.randn(3, 4, dtype=torch.float64).requires_grad_()
    ids = torch.tensor([[0], [1999], [700]])
    gradients = []
    for room in (1, None):
        found = linear_statistics(Head(hidden, big), ids, outputs=("entropy",), workspace=room)
        gradients.append(torch.autograd.grad((found.log_probs[:, 0] * found.entropy).sum(), (hidden, big)))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_over_slices_of_the_vocabulary_are_wide(dtype, device):
    V = 2080  # 130 slices

    def random(*shape):
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    h, ids = Head(random(N, H), random(V, H), random(V), random(N, R), random(V, R)), some_ids(device)

    def ours(h):
        return linear_statistics(h, ids, outputs=(), backend="torch", workspace=1).log_probs

    def plain(h):
        hidden, weight, bias, u, B = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in h.inputs)
        logp = (hidden @ weight.T + u @ B.T + bias).log_softmax(-1)
        return torch.where(ids == -100, 0, logp.gather(1, ids.clamp(min=0)))

    results = [
        torch.autograd.grad(fn(of).sum(), (of.hidden, of.u))
        for fn, of in ((ours, h), (plain, at(h, dtype)), (plain, at(h, torch.float64)))
    ]
    for name, *tensors in zip(("d_hidden", "d_u"), *results, strict=True):
        assert_accurate(*tensors, name)


def test_entropy_of_huge_logits(backend, device):
    """Their distance from the least fp32 number is beyond fp32."""
    hidden, weight = torch.ones(3, 1, device=device), torch.full((V, 1), 1e35, device=device)
    found = linear_statistics(Head(hidden, weight), None, outputs=("entropy", "log_sum_sq_probs"), backend=backend)
    uniform = torch.full((3,), V, device=device).double().log()
    torch.testing.assert_close(found.entropy, uniform)
    torch.testing.assert_close(found.log_sum_sq_probs, -uniform)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_statistics_where_a_tile_moves_the_maximum_beyond_fp32(dtype, backend, device):
    hidden, weight = torch.ones(2, 1, device=device).to(dtype), torch.ones(200, 1, device=device).to(dtype)
    found = linear_statistics(Head(hidden, weight, scale=2e31), None, outputs=("entropy",), backend=backend)
    torch.testing.assert_close(found.entropy, torch.full((2,), 200.0, device=device).double().log())


@pytest.mark.parametrize("value", [torch.finfo(torch.float32).min, 1e38])
@pytest.mark.parametrize("u", [None, torch.full((V,), 4.0)])
def test_sums_of_huge_logits(value, u):
    """The sum over one tile is beyond fp32."""
    hidden, weight = torch.ones(3, 1), torch.full((V, 1), value)
    found = linear_statistics(Head(hidden, weight), None, u, outputs=("sum_log_probs",), backend="torch")
    mean = found.sum_log_probs / (V if u is None else u.sum()) + found.logsumexp
    torch.testing.assert_close(mean, torch.full_like(mean, value))


def test_true_minus_infinity_in_the_bias(backend, device):
    hidden, weight = torch.randn(5, 8, device=device).half(), torch.randn(6, 8, device=device).half()
    bias = torch.zeros(6, device=device).half()
    bias[2] = -torch.inf
    ids = torch.tensor([[0], [1], [2], [3], [4]], device=device)
    leaf = hidden.clone().requires_grad_()
    found = linear_statistics(Head(leaf, weight, bias), ids, outputs=("entropy",), backend=backend)
    kept = [0, 1, 3, 4, 5]
    logp = torch.log_softmax(hidden.double() @ weight[kept].double().T, -1)
    torch.testing.assert_close(found.entropy.double(), -(logp.exp() * logp).sum(-1), rtol=1e-5, atol=1e-5)
    assert found.log_probs[2] == -torch.inf
    (d_hidden,) = torch.autograd.grad(found.entropy.sum(), leaf)
    assert d_hidden.isfinite().all()


@pytest.mark.parametrize("outputs", [("entropy",), ("log_sum_sq_probs",), ()])
def test_only_what_was_asked_for(outputs, backend, device):
    h, ids = head(torch.float16, device), some_ids(device)
    found = linear_statistics(h, ids, outputs=outputs, backend=backend)._asdict()
    assert {name for name, value in found.items() if value is not None} == {"log_probs", "logsumexp", *outputs}


def test_results_may_be_overwritten(backend, device):
    h, ids = head(torch.float16, device), some_ids(device)

    def gradient(write):
        found = linear_statistics(h, ids, outputs=OUTPUTS, backend=backend)
        total = sum(getattr(found, name).sum() for name in ("log_probs", "entropy", "log_sum_sq_probs"))
        with torch.no_grad():
            for value in found:
                if write and value is not None:
                    value.fill_(7)
        return torch.autograd.grad(total, h.hidden)[0]

    assert torch.equal(gradient(True), gradient(False))


def test_the_weights_of_the_columns_and_temperature_are_constants():
    h, ids = head(), some_ids()
    with pytest.raises(RuntimeError, match=r"weight \(41,\).*detach"):
        linear_statistics(h, ids, torch.ones(V).requires_grad_(), outputs=("sum_log_probs",))
    warm = h._replace(temperature=torch.ones(N).requires_grad_())
    with pytest.raises(RuntimeError, match=r"temperature \(19,\).*detach"):
        linear_statistics(warm, ids, outputs=())


def test_second_derivatives():
    h, ids = at(head(softcap=3.0), torch.float64), some_ids()
    h = h._replace(temperature=h.temperature.double())

    def of(hidden, weight):
        found = linear_statistics(h._replace(hidden=hidden, weight=weight), ids, outputs=DIFFERENTIABLE)
        return found.log_probs, found.entropy, found.log_sum_sq_probs

    assert torch.autograd.gradgradcheck(of, (h.hidden, h.weight), atol=1e-4)


def test_a_gradient_to_differentiate_again_is_the_same_gradient():
    h, ids, u = at(head(scale=0.5, softcap=3.0), torch.float64), some_ids(), torch.rand(V)
    once, again = (
        torch.autograd.grad(
            sum((i + 1) * t.sum() for i, t in enumerate(linear_statistics(h, ids, u, outputs=DIFFERENTIABLE)[:5])),
            h.inputs,
            create_graph=create_graph,
        )
        for create_graph in (False, True)
    )
    for a, b in zip(once, again, strict=True):
        assert b.requires_grad
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("drop_ignored", "projected"), [(True, 3), (False, 5)])
def test_whether_ignored_tokens_are_projected(drop_ignored, projected, monkeypatch):
    seen, forward = [], recompute.chunked_linear_softmax.linear_softmax_fwd
    spy = lambda hidden, *a, **k: seen.append(len(hidden)) or forward(hidden, *a, **k)  # noqa: E731
    monkeypatch.setattr(recompute.chunked_linear_softmax, "linear_softmax_fwd", spy)
    target = torch.tensor([1, -100, 3, -100, 0])
    how = {"route": "recompute", "drop_ignored": drop_ignored, "backend": "torch"}
    linear_cross_entropy(torch.randn(5, 4), torch.randn(7, 4), target, reduction="none", **how)
    assert seen == [projected]


def test_kept_tokens():
    ids = torch.tensor([[1, -100], [-100, -100], [2, 3]])
    keep, zero = kept_tokens(ids, True)
    assert keep.tolist() == [0, 2]
    assert not zero
    assert kept_tokens(ids[::2], True) == (None, False)
    assert kept_tokens(ids, False) == (None, True)
    assert kept_tokens(None, True) == (None, False)


# The operators, checked by PyTorch's opcheck


@pytest.fixture
def out_of_place(monkeypatch):
    """opcheck compares outputs after a backward, which overwrites the gradients and logits among them."""
    monkeypatch.setattr(recompute, "read_again", lambda saved: True)


@pytest.mark.parametrize("keep", [None, torch.tensor([0, 2, 3])])
@pytest.mark.parametrize("columns", [0, 16])
def test_opcheck_linear_rows(keep, columns, out_of_place):
    hidden, weight = torch.randn(4, H).requires_grad_(), torch.randn(16, H).requires_grad_()
    ids = torch.tensor([[1], [-100], [3], [8]])
    of_tokens = {"ids": ids, "column_weight": None, "keep": keep, "zero_ignored": keep is None, "main_grad": None}
    how = {"outputs": "entropy", "columns": columns, "workspace": 2**20, "backend": "torch"}
    torch.library.opcheck(linear_rows, (), Head(hidden, weight).packed() | of_tokens | how)


@pytest.mark.parametrize("main_grad", [torch.zeros(()), torch.zeros(9, H)])
@pytest.mark.parametrize("saved_logits", [torch.zeros(()), torch.randn(4, 9)])
def test_opcheck_linear_rows_grad(main_grad, saved_logits):
    hidden, weight, ids = torch.randn(4, H), torch.randn(9, H), torch.tensor([[1], [2], [3], [8]])
    of_tokens = {"ids": ids, "column_weight": None, "keep": None, "zero_ignored": False}
    saved = {"main_grad": main_grad, "saved_logits": saved_logits, "logsumexp": torch.zeros(4, dtype=torch.float64)}
    terms = Coefficients(a=torch.ones(4), c=torch.ones(4, 1))._asdict()
    how = {"wanted": [True, main_grad.ndim == 0, False, False, False], "workspace": 2**20, "backend": "torch"}
    torch.library.opcheck(linear_rows_grad, (), Head(hidden, weight).packed() | of_tokens | saved | terms | how)
