"""Distillation losses, dense and sparse: values and gradients of every option on tensors and heads, on both backends."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import INTERPRETED

from fused_losses.bench.memory import peak_bytes
from fused_losses.distillation import (
    acceptance_rate,
    distillation_loss,
    kd_loss,
    sparse_distillation_loss,
    teacher_topk,
)
from fused_losses.divergence import KINDS, divergence
from fused_losses.head import Head
from fused_losses.linear_logits import LinearLogits
from fused_losses.modules import KDLoss
from fused_losses.reference import distillation as reference
from fused_losses.reference.tolerance import assert_accurate
from fused_losses.sft import sft_loss
from fused_losses.token_statistics import selective_log_softmax

OPTIONS = (
    {},
    {"hard_weight": 0.0},
    {"soft_weight": 0.0},
    {"hard_weight": 0.2, "soft_weight": 1.3},
    {"temperature": 2.0},
    {"temperature": 2.0, "scale_by_temperature_squared": True},
    {"kind": "reverse_kl"},
    {"kind": "jsd", "beta": 0.2},
    {"kind": "skewed_kl", "beta": 0.2, "temperature": 0.7},
    {"kind": "tvd"},
    {"ignore_index": 3},
    {"num_items_in_batch": 17},
    {"reduction": "sum"},
)


def heads(device, dtype=torch.float32, tokens=(2, 4), V=40, teacher_V=None):
    """Leaves, labels, and functions that make lazy or whole logits from the leaves."""
    torch.manual_seed(2)
    leaves = [
        torch.randn(*tokens, 6, device=device),
        torch.randn(V, 6, device=device),
        torch.randn(V, device=device),
        torch.randn(*tokens, 10, device=device),
        torch.randn(teacher_V or V, 10, device=device),
    ]
    leaves = [x.to(dtype).requires_grad_() for x in leaves]
    labels = torch.randint(0, V, tokens, device=device)
    labels[0, 1] = -100
    labels.view(-1)[-1] = 3

    def lazy(leaves):
        return LinearLogits(*leaves[:3], scale=0.8, softcap=5.0), LinearLogits(*leaves[3:])

    def whole(leaves):
        h, w, b, teacher_h, teacher_w = leaves
        return 5.0 * torch.tanh((h @ w.T + b) * 0.8 / 5.0), teacher_h @ teacher_w.T

    return leaves, labels, lazy, whole


def labels_for(labels, options):
    return labels if "ignore_index" not in options else labels.clamp(min=0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_dense(options, backend, device):
    leaves, labels, lazy, whole = heads(device)
    labels = labels_for(labels, options)
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    exact = reference.distillation_loss(*whole(doubles), labels, **options)
    exact_grads = torch.autograd.grad(exact * 3, doubles)
    how = {**options, "backend": backend}
    results = {
        "tensors": lambda: distillation_loss(*whole(leaves), labels, **how),
        "gradients in forward": lambda: distillation_loss(*lazy(leaves), labels, **how),
        "recompute": lambda: distillation_loss(*lazy(leaves), labels, route="recompute", **how),
    }
    for name, run in results.items():
        if backend == "triton" and device == "cpu" and name == "tensors" and options:
            continue  # the same kernel as below, and the interpreter is slow
        loss = run()
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6, msg=name)
        for a, b in zip(torch.autograd.grad(loss * 3, leaves), exact_grads, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5, msg=name)


def test_options_change_the_number(device):
    leaves, labels, lazy, _ = heads(device)
    numbers = [distillation_loss(*lazy(leaves), labels_for(labels, o), **o).item() for o in OPTIONS]
    assert len({round(x, 5) for x in numbers}) == len(OPTIONS)


@pytest.mark.parametrize("weights", [(0.3, 0.8), (0.0, 0.8), (0.3, 0.0)])
@pytest.mark.parametrize("learned", [("hard_weight", "soft_weight"), ("soft_weight",), ("hard_weight",)], ids="+".join)
def test_weights_that_are_learned(learned, weights, device):
    found, given = [], dict(zip(("hard_weight", "soft_weight"), weights, strict=True))
    for lazy in (True, False):
        how = given | {name: torch.tensor(given[name], device=device, requires_grad=True) for name in learned}
        torch.manual_seed(0)
        hidden, weight, other = (torch.randn(n, 4, device=device) for n in (5, 9, 9))
        student, teacher = (LinearLogits(hidden, w) if lazy else hidden @ w.T for w in (weight, other))
        loss = distillation_loss(student, teacher, torch.arange(5, device=device), **how)
        found.append(torch.stack([loss, *torch.autograd.grad(loss, [how[name] for name in learned])]))
    nll = F.cross_entropy(student, torch.arange(5, device=device))
    kl = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
    parts = {"hard_weight": nll, "soft_weight": kl}
    loss = sum(given[name] * part for name, part in parts.items())
    torch.testing.assert_close(found[1], torch.stack([loss, *(parts[name] for name in learned)]))
    torch.testing.assert_close(*found)


def test_per_token(backend, device):
    leaves, labels, lazy, whole = heads(device)
    upstream = torch.randn(2, 4, device=device)
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    options = {"kind": "jsd", "temperature": 1.5, "reduction": "none"}
    exact = reference.distillation_loss(*whole(doubles), labels, **options)
    exact_grads = torch.autograd.grad(exact, doubles, upstream.double())
    for logits in (lazy(leaves), whole(leaves)):
        loss = distillation_loss(*logits, labels, **options, backend=backend)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
        for a, b in zip(torch.autograd.grad(loss, leaves, upstream), exact_grads, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    assert loss[0, 1] == 0


def test_parts_are_what_they_say(device):
    leaves, labels, _, whole = heads(device)
    student, teacher = whole(leaves)
    hard = distillation_loss(student, teacher, labels, hard_weight=1.0, soft_weight=0.0)
    torch.testing.assert_close(hard, F.cross_entropy(student.flatten(0, 1), labels.flatten()))
    soft = distillation_loss(student, teacher, labels, hard_weight=0.0, soft_weight=1.0, kind="tvd")
    torch.testing.assert_close(soft, divergence(student, teacher, kind="tvd")[labels != -100].mean())


@pytest.mark.parametrize("route", [None, "recompute"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_statistics_for_metrics(reduction, route, backend, device):
    """Neither weighted nor multiplied by the temperature's square, and without a gradient; they do not change the loss."""
    leaves, labels, lazy, whole = heads(device)
    logits = whole(leaves)
    how = {"temperature": 2.0, "scale_by_temperature_squared": True, "reduction": reduction}
    soft = divergence(*logits, temperature=2.0, mask=labels != -100)
    hard = F.cross_entropy(logits[0].flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    for sides in (logits, lazy(leaves), (lazy(leaves)[0], logits[1])):
        for h, s in ((0.3, 0.8), (0.0, 0.8), (0.3, 0.0), (torch.tensor(0.3, requires_grad=True), 0.8)):
            options = {**how, "hard_weight": h, "soft_weight": s, "backend": backend, "route": route}
            loss, found = distillation_loss(*sides, labels, return_statistics=True, **options)
            torch.testing.assert_close(loss, distillation_loss(*sides, labels, **options), rtol=0, atol=0)
            for ours, expected, weight in zip(found, (soft, hard), (s, h), strict=True):
                if weight == 0:
                    assert ours is None
                    continue
                assert not ours.requires_grad
                torch.testing.assert_close(ours, expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_heads(dtype, backend, device):
    """As accurate as eager, under a GradScaler's factor too, with the teacher frozen as it is in training."""
    if backend == "triton" and INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter is wrong about bfloat16")
    leaves, labels, lazy, whole = heads(device, dtype)
    student_leaves = leaves[:3]

    def grads(loss, at):
        return torch.autograd.grad(loss * 2.0**10, at)

    teacher = [x.detach() for x in leaves[3:]]
    for route in (None, "recompute"):
        loss = distillation_loss(*lazy(student_leaves + teacher), labels, kind="jsd", backend=backend, route=route)
        assert loss.dtype == torch.float32
        eager = [x.float() for x in whole(student_leaves + teacher)]
        theirs = reference.distillation_loss(*eager, labels, kind="jsd")
        doubles = [x.detach().double().requires_grad_(x.requires_grad) for x in student_leaves + teacher]
        exact = reference.distillation_loss(*whole(doubles), labels, kind="jsd")
        assert_accurate(loss, theirs, exact, "loss")
        for name, a, b, c in zip(
            ("hidden", "weight", "bias"), grads(loss, student_leaves), grads(theirs, student_leaves),
            grads(exact, doubles[:3]), strict=True,
        ):  # fmt: skip
            assert_accurate(a, b, c, name)


@pytest.mark.parametrize("drop_ignored", [True, False])
def test_ignored_tokens(drop_ignored, backend, device):
    leaves, labels, lazy, _ = heads(device)
    want = distillation_loss(*lazy(leaves), labels, backend=backend, drop_ignored=drop_ignored)
    expected = torch.autograd.grad(want, leaves)
    with torch.no_grad():
        leaves[0][0, 1] = leaves[3][0, 1] = math.nan
    loss = distillation_loss(*lazy(leaves), labels, backend=backend, drop_ignored=drop_ignored)
    assert torch.equal(loss, want)
    for a, b in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        torch.testing.assert_close(a, b)
    leaves = [x.detach().nan_to_num().requires_grad_() for x in leaves]
    none = distillation_loss(*lazy(leaves), torch.full_like(labels, -100), backend=backend, drop_ignored=drop_ignored)
    assert none == 0
    assert all((g == 0).all() for g in torch.autograd.grad(none, leaves))


def test_ignored_tokens_are_not_projected(device, monkeypatch):
    seen = []

    def spy(head, out, real=Head.write_logits):
        seen.append(len(out))
        return real(head, out)

    monkeypatch.setattr(Head, "write_logits", spy)
    leaves, labels, lazy, _ = heads(device)
    distillation_loss(*lazy(leaves), labels)
    assert seen == [7, 7]  # 7 of 8 tokens, once for the student and once for the teacher, for both losses


def test_vocabularies_of_different_padded_size(backend, device):
    leaves, labels, lazy, whole = heads(device, V=40, teacher_V=48)
    with torch.no_grad():
        leaves[4][40:] *= 30
    for logits in (lazy(leaves), whole(leaves)):
        loss = distillation_loss(*logits, labels, kind="jsd", backend=backend)
        torch.testing.assert_close(loss, reference.distillation_loss(*whole(leaves), labels, kind="jsd"))
        assert (torch.autograd.grad(loss, leaves[4])[0][40:] == 0).all()


@pytest.mark.parametrize("trained", ["student", "teacher"])
def test_float16_logits_keep_gradients_that_a_scaled_loss_lifts(trained, backend, device):
    """Divided by the number of tokens alone, they would be too small for float16."""
    dense, lazy = torch.randn(4, 40, device=device).half(), [torch.randn(n, 8, device=device) for n in (4, 40)]
    labels = torch.arange(4, device=device)

    def gradient(logits, head):
        leaf = logits.detach().requires_grad_()
        sides = (leaf, head) if trained == "student" else (head, leaf)
        loss = distillation_loss(*sides, labels, kind="jsd", num_items_in_batch=10**6, backend=backend) * 2.0**16
        return torch.autograd.grad(loss, leaf)[0]

    found = gradient(dense, LinearLogits(*lazy))
    torch.testing.assert_close(found.float(), gradient(dense.float(), LinearLogits(*lazy)), rtol=1e-2, atol=1e-6)


def test_twice_and_kept(backend, device):
    """A second backward of a kept graph gives the same gradients: those made in forward are not scaled twice."""
    leaves, labels, lazy, _ = heads(device)
    loss = distillation_loss(*lazy(leaves), labels, backend=backend) * 3
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_float64_takes_any_derivative():
    leaves, labels, lazy, whole = heads("cpu", torch.float64, tokens=(1, 3), V=5)

    def of(make, **options):
        return lambda *leaves: distillation_loss(*make(leaves), labels, kind="jsd", temperature=1.5, **options)

    for fn in (of(lazy), of(lazy, route="recompute"), of(whole)):
        assert torch.autograd.gradcheck(fn, leaves)
        some = lambda h, w, fn=fn: fn(h, w, *leaves[2:])  # noqa: E731
        assert torch.autograd.gradgradcheck(some, leaves[:2], check_batched_grad=False)


@pytest.mark.parametrize("route", [None, "recompute"])
def test_compiles_without_a_break(route, device):
    leaves, labels, lazy, _ = heads(device)

    def loss(*leaves):
        how = {"kind": "jsd", "temperature": 1.5, "route": route, "return_statistics": True}
        value, statistics = distillation_loss(*lazy(leaves), labels, **how)
        return value * 3, statistics

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager" if route else "inductor")
    torch.testing.assert_close(compiled(*leaves), loss(*leaves))
    ours, expected = (torch.autograd.grad(of(*leaves)[0], leaves) for of in (compiled, loss))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_the_workspace(dtype):
    """Gradients, a stated workspace and the row primitive's fixed temporaries; eager holds both logits several times."""
    V, H, workspace = 4096, 16, 48 * 2**20

    def peak(N, lazy):
        torch.manual_seed(0)
        leaves = [torch.randn(N, H), torch.randn(V, H), torch.randn(N, 2 * H), torch.randn(V, 2 * H)]
        leaves = [x.to(dtype) for x in leaves]
        labels = torch.randint(0, V, (N,))
        trained = [x.requires_grad_() for x in leaves[:2]]

        def step():
            if lazy:
                loss = distillation_loss(
                    LinearLogits(*leaves[:2]), LinearLogits(*leaves[2:]), labels, workspace=workspace
                )
            else:
                student, teacher = (leaves[0] @ leaves[1].T).float(), (leaves[2] @ leaves[3].T).float()
                loss = F.cross_entropy(student, labels)
                loss = loss + F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True)
            return torch.autograd.grad(loss, trained)

        return peak_bytes(step) - sum(x.nbytes for x in trained)

    small, large = peak(2048, True), peak(4096, True)
    assert large < workspace, f"{large / 2**20:.1f} MiB"
    assert large < small * 1.1 + 2**20
    assert peak(4096, False) > 4 * large


# KDLoss


def openrlhf(logits, teacher_logits, label):
    """The formula in OpenRLHF's documentation, in fp32 as there."""
    teacher = F.softmax(teacher_logits.float(), -1)
    product = torch.masked_fill(teacher * F.log_softmax(logits.float(), -1), torch.isinf(logits), 0)
    shown = (label != -100).view(-1)
    return -(product.sum(-1).view(-1) * shown).sum() / shown.sum()


def test_kd_loss(backend, device):
    leaves, labels, lazy, whole = heads(device)
    student, teacher = (x.detach().requires_grad_() for x in whole(leaves))
    masked = student.detach().masked_fill(torch.rand_like(student) < 0.2, -math.inf).requires_grad_()
    for s in (student, masked):
        loss = KDLoss()(s, teacher, labels) if backend == "torch" else kd_loss(s, teacher, labels, backend=backend)
        torch.testing.assert_close(loss, openrlhf(s, teacher, labels))
        torch.testing.assert_close(loss, reference.kd_loss(s, teacher, labels))
        doubles = [x.detach().double().requires_grad_() for x in (s, teacher)]
        exact = torch.autograd.grad(reference.kd_loss(*doubles, labels), doubles)
        for a, b in zip(torch.autograd.grad(loss, (s, teacher)), exact, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)
    loss = kd_loss(*lazy(leaves), labels, backend=backend)
    torch.testing.assert_close(loss, openrlhf(*whole(leaves), labels))
    expected = torch.autograd.grad(openrlhf(*whole(leaves), labels), leaves[:3])
    for a, b in zip(torch.autograd.grad(loss, leaves[:3]), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert kd_loss(student, teacher, labels, ignore_index=3).isfinite()
    assert not torch.equal(
        kd_loss(student, teacher, labels.clamp(min=0), ignore_index=3), kd_loss(student, teacher, labels)
    )
    for sides, trained in (((student, teacher), (student, teacher)), (lazy(leaves), leaves[:3])):
        loss = kd_loss(*sides, torch.full_like(labels, -100), backend=backend)
        assert loss.isnan()
        assert all((g == 0).all() for g in torch.autograd.grad(loss, trained))


# A sparse teacher


@pytest.mark.parametrize("k", [1, 5, 40])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_teacher_topk(k, temperature, device):
    leaves, _, lazy, whole = heads(device)
    _, teacher = lazy(leaves)
    found = teacher_topk(teacher, k, temperature=temperature, workspace=3 * 4 * 40 * 3)  # three tokens at a time
    expected = (whole(leaves)[1] / temperature).log_softmax(-1).topk(k)
    assert torch.equal(found.ids, expected.indices)
    torch.testing.assert_close(found.log_probs, expected.values)
    of_tensor = teacher_topk(whole(leaves)[1], k, temperature=temperature)
    assert torch.equal(of_tensor.ids, expected.indices)
    torch.testing.assert_close(of_tensor.log_probs, expected.values)
    assert not found.log_probs.requires_grad
    assert (found.log_probs <= 0).all()


def test_teacher_topk_is_not_rounded_to_16_bits(device):
    leaves, _, lazy, whole = heads(device, torch.bfloat16)
    found = teacher_topk(lazy(leaves)[1], 5)
    exact = whole([x.double() for x in leaves])[1].log_softmax(-1).topk(5)
    assert found.log_probs.dtype == torch.float32
    torch.testing.assert_close(found.log_probs.double(), exact.values, rtol=1e-5, atol=1e-5)


def test_teacher_topk_holds_a_workspace():
    hidden, weight, workspace = torch.randn(2048, 16), torch.randn(4096, 16), 6 * 2**20
    peak = peak_bytes(lambda: teacher_topk(LinearLogits(hidden, weight), 8, workspace=workspace))
    assert peak < workspace * 1.1 + 2048 * 8 * 12
    with pytest.raises(ValueError, match=r"\(2048, 4096\), got 5000"):
        teacher_topk(LinearLogits(hidden, weight), 5000)


SPARSE = [
    {"kind": kind, "tail": tail} for kind in ("forward_kl", "reverse_kl", "jsd") for tail in ("bucket", "renormalize")
]
SPARSE += [{"tail": "ignore"}, {"temperature": 2.0}, {"kind": "jsd", "beta": 0.2}, {"ignore_index": 3}]


@pytest.mark.parametrize("options", SPARSE, ids=str)
def test_sparse(options, backend, device):
    leaves, labels, lazy, whole = heads(device)
    labels = labels_for(labels, options)
    top = teacher_topk(lazy(leaves)[1], 5)
    doubles = [x.detach().double().requires_grad_() for x in leaves[:3]]
    student = whole([*doubles, *leaves[3:]])[0]
    exact, student_mass, teacher_mass = reference.sparse_distillation_loss(
        student, top.ids, top.log_probs.double(), labels, **options
    )
    count = (labels != options.get("ignore_index", -100)).sum()
    exact_grads = torch.autograd.grad(exact.sum() / count * 3, doubles)
    for logits in (lazy(leaves)[0], whole(leaves)[0]):
        found = sparse_distillation_loss(logits, *top, labels, **options, backend=backend)
        torch.testing.assert_close(found.loss.double(), exact.sum() / count, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.student_mass.double(), student_mass, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.teacher_mass.double(), teacher_mass, rtol=1e-5, atol=1e-6)
        assert not found.student_mass.requires_grad
        for a, b in zip(torch.autograd.grad(found.loss * 3, leaves[:3]), exact_grads, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
        each = sparse_distillation_loss(logits, *top, labels, reduction="none", **options, backend=backend)
        torch.testing.assert_close(each.loss.double(), exact, rtol=1e-5, atol=1e-6)


def test_sparse_options_change_the_number(device):
    leaves, labels, lazy, _ = heads(device)
    student, teacher = lazy(leaves)
    top = teacher_topk(teacher, 5)
    options = [*SPARSE, {"num_items_in_batch": 3}, {"reduction": "sum"}]
    numbers = [sparse_distillation_loss(student, *top, labels_for(labels, o), **o).loss.item() for o in options]
    assert len({round(x, 5) for x in numbers}) == len(options)
    assert (
        len({sparse_distillation_loss(student, *teacher_topk(teacher, k), labels).loss.item() for k in (1, 5, 40)}) == 3
    )


def test_sparse_makes_a_head_its_gradients_in_forward(device, monkeypatch):
    leaves, labels, lazy, _ = heads(device)
    student, teacher = lazy(leaves)
    top = teacher_topk(teacher, 5)
    expected = sparse_distillation_loss(student, *top, labels, reduction="none").loss.sum()
    monkeypatch.setattr("fused_losses.distillation.selective_log_softmax", None)
    torch.testing.assert_close(sparse_distillation_loss(student, *top, labels, reduction="sum").loss, expected)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "ignore"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_sparse_is_dense_when_all_ids_are_there(kind, tail, device):
    leaves, labels, lazy, _ = heads(device)
    student, teacher = lazy(leaves)
    dense = distillation_loss(student, teacher, labels, kind=kind, hard_weight=0.0, soft_weight=1.0)
    sparse = sparse_distillation_loss(student, *teacher_topk(teacher, 40), labels, kind=kind, tail=tail)
    torch.testing.assert_close(sparse.loss, dense, rtol=1e-5, atol=3e-6)
    for a, b in zip(torch.autograd.grad(sparse.loss, leaves[:3]), torch.autograd.grad(dense, leaves[:3]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    shown = labels != -100
    torch.testing.assert_close(sparse.student_mass[shown], torch.ones_like(sparse.student_mass[shown]))
    assert (sparse.student_mass[~shown] == 0).all()


def test_sparse_bucket_of_a_peaked_teacher(device):
    """The mass left to the tail is small and is not rounded away."""
    student, teacher = torch.randn(2, 6, 30, device=device) * 12
    student.requires_grad_()
    top = teacher_topk(teacher, 6)
    exact, *_ = reference.sparse_distillation_loss(student.double(), top.ids, top.log_probs.double())
    found = sparse_distillation_loss(student, *top, reduction="none").loss
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-6)
    assert (sparse_distillation_loss(student, *top).teacher_mass > 0.99).all()


def test_sparse_bucket_of_a_teacher_without_a_rest(device):
    """1e-7 is left to it."""
    student, ids = torch.randn(2, 9, device=device), torch.tensor([[0, 3], [1, 2]], device=device)
    log_t = torch.tensor([[0.5, 0.5], [1.0, 0.0]], device=device).log()
    exact, *_ = reference.sparse_distillation_loss(student.double(), ids, log_t.double(), kind="reverse_kl")
    found = sparse_distillation_loss(student, ids, log_t, kind="reverse_kl", reduction="none").loss
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


def test_sparse_support_of_the_student(device):
    leaves, labels, lazy, whole = heads(device)
    student, teacher = lazy(leaves)
    ids = teacher_topk(student, 5).ids
    assert not torch.equal(ids, teacher_topk(teacher, 5).ids)
    log_t = selective_log_softmax(teacher, ids)
    found = sparse_distillation_loss(student, ids, log_t, labels)
    exact, *_ = reference.sparse_distillation_loss(whole(leaves)[0].double(), ids, log_t.double(), labels)
    torch.testing.assert_close(found.loss.double(), exact.sum() / 7)
    assert (torch.autograd.grad(found.loss, leaves[4])[0] != 0).any()  # the teacher requires a gradient too


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("whole", [False, True])
def test_sparse_entries_that_are_not_there(whole, tail, device):
    leaves, labels, lazy, _ = heads(device)
    top = teacher_topk(lazy(leaves)[1], 3)
    padded = [torch.cat([top.ids, torch.full_like(top.ids, -100)], -1)]
    padded.append(torch.cat([top.log_probs, torch.full_like(top.log_probs, math.nan)], -1))
    results = []
    for sparse in (top, padded):
        student = lazy(leaves)[0]
        found = sparse_distillation_loss(student.materialize() if whole else student, *sparse, labels, tail=tail)
        results.append((*found, *torch.autograd.grad(found.loss, leaves[:3])))
    torch.testing.assert_close(*results)


def test_sparse_minus_infinity(device):
    student = torch.randn(3, 9, requires_grad=True)
    with torch.no_grad():
        student[0, 4] = -math.inf
    ids = torch.tensor([[4, 1], [0, 2], [5, 6]])
    log_t = torch.tensor([[-math.inf, -0.5], [-math.inf, 0.0], [-0.1, -3.0]])
    for tail in ("bucket", "renormalize"):
        for kind in ("forward_kl", "jsd"):
            found = sparse_distillation_loss(student, ids, log_t, kind=kind, tail=tail, reduction="none")
            assert found.loss.isfinite().all()
            assert (found.loss >= 0).all()
            assert torch.autograd.grad(found.loss.sum(), student)[0].isfinite().all()


@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
def test_sparse_gradient_where_the_student_has_none_of_the_ids(kind, device):
    student = torch.randn(2, 9, device=device)
    student[0, :3] = -math.inf
    student.requires_grad_()
    ids, log_t = torch.tensor([[0, 1, 2], [3, 4, 5]], device=device), torch.full((2, 3), -2.0, device=device)
    found = sparse_distillation_loss(student, ids, log_t, kind=kind, reduction="none").loss
    assert found.isfinite().all()
    of_each = [torch.autograd.grad(x, student, retain_graph=True)[0] for x in found]
    assert (of_each[0] == 0).all()  # the tail has all of the student's mass
    assert of_each[1][1].any()
    assert of_each[1].isfinite().all()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "ignore"])
def test_sparse_is_not_negative_where_it_is_rounding(tail, kind, device):
    teacher = torch.randn(200, 50, device=device)
    student = teacher + 1e-4 * torch.randn_like(teacher)
    ids, log_t = teacher_topk(teacher, 8)
    found = sparse_distillation_loss(student, ids, log_t.double(), kind=kind, tail=tail, reduction="none")
    assert (found.loss >= 0).all()
    assert (found.loss > 0).any()
    assert found.loss.dtype == torch.float32


def test_weights_of_0_leave_their_term_out(device):
    student, teacher = torch.randn(2, 4, 9, device=device), torch.randn(2, 4, 9, device=device)
    student[..., 7] = -math.inf  # which makes the divergence infinite
    labels = torch.randint(0, 7, (2, 4), device=device)
    hard = distillation_loss(student, teacher, labels, hard_weight=1.0, soft_weight=0.0, kind="forward_kl")
    torch.testing.assert_close(hard, F.cross_entropy(student.flatten(0, 1), labels.flatten()))
    soft = distillation_loss(student, teacher, labels, hard_weight=0.0, soft_weight=2.0, kind="tvd", reduction="none")
    torch.testing.assert_close(soft, (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1))


def test_sparse_without_tokens(backend, device):
    leaves, labels, lazy, _ = heads(device)
    student, teacher = lazy(leaves)
    top = teacher_topk(teacher, 3)
    for logits in (student, student.materialize()):
        found = sparse_distillation_loss(logits, *top, torch.full_like(labels, -100), backend=backend)
        assert found.loss == 0
        assert (found.student_mass == 0).all()
        assert all((g == 0).all() for g in torch.autograd.grad(found.loss, leaves[:3]))


def test_sparse_compiles_without_a_break(device):
    leaves, labels, lazy, _ = heads(device)
    top = teacher_topk(lazy(leaves)[1], 5)

    def loss(*leaves):
        return sparse_distillation_loss(lazy(leaves)[0], *top, labels, kind="jsd").loss * 3

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), loss(*leaves))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*leaves), leaves[:3]), torch.autograd.grad(loss(*leaves), leaves[:3])
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "tvd"}, "'tvd'"),
        ({"tail": "drop"}, "'drop'"),
        ({"reduction": "avg"}, "avg"),
        ({"teacher_ids": torch.zeros(2, 4, 2, dtype=torch.long)}, r"\(2, 4, 2\) and \(2, 4, 3\)"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"\(3,\)"),
        ({"temperature": 0}, "temperature must be positive, got 0"),
    ],
)
def test_wrong_sparse_input(change, message, device):
    leaves, _, lazy, _ = heads(device)
    student, teacher = lazy(leaves)
    top = teacher_topk(teacher, 3)
    arguments = {"teacher_ids": top.ids, "teacher_log_probs": top.log_probs, **change}
    with pytest.raises(ValueError, match=message):
        sparse_distillation_loss(student, **arguments)


def test_a_sparse_teacher_is_two_tensors_of_log_probs():
    leaves, labels, lazy, _ = heads("cpu")  # on a CPU, where masses are checked
    student, teacher = lazy(leaves)
    top = teacher_topk(teacher, 3)
    with pytest.raises(TypeError, match="teacher_ids must be a tensor, got TopK: unpack it"):
        sparse_distillation_loss(student, top, labels)
    for wrong in (top.log_probs.exp(), top.log_probs + 3, top.log_probs - top.log_probs[..., :1]):
        with pytest.raises(ValueError, match=r"log-probabilities.* of at most 1, got"):
            sparse_distillation_loss(student, top.ids, wrong, labels)
    unread = top.log_probs + 3 * (labels == -100)[..., None]
    assert torch.equal(
        sparse_distillation_loss(student, top.ids, unread, labels).loss,
        sparse_distillation_loss(student, *top, labels).loss,
    )


def test_an_ignored_row_that_diverges_without_bound_has_no_gradient_under_transforms():
    """A token that the teacher's bias bans has no probability in the rows that count, and some where hidden states are 0."""
    hidden, weight, labels = torch.rand(3, 4) + 0.5, torch.randn(5, 4), torch.tensor([1, -100, 3])
    weight[2] = -3000
    teacher = LinearLogits(torch.rand(3, 4), torch.randn(5, 4), torch.tensor([0, 0, -torch.inf, 0, 0]))

    def loss(h, w):
        return distillation_loss(LinearLogits(h, w), teacher, labels, hard_weight=0.0, kind="reverse_kl")

    leaves = hidden.requires_grad_(), weight.requires_grad_()
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(loss, (0, 1))(hidden.detach(), weight.detach()), expected)


def test_a_batch_of_no_items_divides_by_nothing(device):
    leaves, labels, lazy, _ = heads(device)
    student, teacher = lazy(leaves)
    top = teacher_topk(teacher, 3)
    for n in (0, torch.tensor(0, device=device), torch.tensor(0.0, device=device)):
        how = {"num_items_in_batch": n}
        nothing = torch.full_like(labels, -100)
        assert distillation_loss(student, teacher, nothing, **how) == 0
        assert sparse_distillation_loss(student, *top, nothing, **how).loss == 0
        assert sft_loss(student, nothing, **how) == 0


def test_wrong_choices_are_named_where_logits_exist():
    inputs = torch.randn(3, 5), torch.randn(3, 5), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match="'fast'"):
        distillation_loss(*inputs, route="fast")
    for loss in (distillation_loss, kd_loss):
        with pytest.raises(ValueError, match="'garbage'"):
            loss(*inputs, workspace="garbage")
    for per_token in (divergence, acceptance_rate):
        with pytest.raises(ValueError, match="'garbage'"):
            per_token(*inputs[:2], workspace="garbage")


@pytest.mark.parametrize("lazy", [False, True])
def test_wrong_teachers(lazy):
    logits = LinearLogits(torch.randn(2, 3), torch.randn(7, 3)) if lazy else torch.randn(2, 7)
    with pytest.raises(ValueError, match="temperature must be positive, got -1"):
        teacher_topk(logits, 2, temperature=-1)
    with pytest.raises(ValueError, match="garbage"):
        teacher_topk(logits, 2, workspace="garbage")
    with pytest.raises(ValueError, match=r"^logits must be floating point"):
        teacher_topk(torch.zeros(3, 5, dtype=torch.long), 2)


def test_wrong_dense_input(device):
    leaves, labels, lazy, _ = heads(device)
    with pytest.raises(ValueError, match="kl2"):
        distillation_loss(*lazy(leaves), labels, kind="kl2")
    with pytest.raises(ValueError, match="avg"):
        distillation_loss(*lazy(leaves), labels, reduction="avg")
    with pytest.raises(ValueError, match=r"labels or mask \(4,\)"):
        distillation_loss(*lazy(leaves), labels[0])
    if device == "cpu":  # a GPU's device-side assert ends the process
        with pytest.raises(IndexError, match="out of bounds for 40"):
            distillation_loss(*lazy(leaves), labels.clamp(min=0) + 40)
    assert distillation_loss(*lazy(leaves), labels.clamp(min=0) + 40, hard_weight=0).isfinite()
    assert set(KINDS) >= {"forward_kl", "tvd"}


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_infinite_divergence_that_weighs_nothing(reduction, backend, device):
    student, labels = torch.randn(3, 5, device=device).requires_grad_(), torch.tensor([1, -100, 4], device=device)
    teacher = torch.randn(3, 5, device=device)
    teacher[:, 2] = -torch.inf
    how = {"kind": "reverse_kl", "hard_weight": 1.0, "reduction": reduction, "backend": backend}
    assert distillation_loss(student, teacher, labels, soft_weight=0.5, **how).isinf().any()
    ours = distillation_loss(student, teacher, labels, soft_weight=0.0, **how)
    plain = F.cross_entropy(student, labels, reduction=reduction)
    torch.testing.assert_close(ours, plain)
    gradients = (torch.autograd.grad(loss.sum(), student) for loss in (ours, plain))
    torch.testing.assert_close(*gradients)


def test_ids_of_eight_bits(backend, device):
    """uint8 cannot hold −100: the ids of a byte-level model, with an id 156."""
    student = torch.randn(1, 4, 256, device=device)
    ids = torch.tensor([[[156, 3], [200, 156], [0, 1], [5, 6]]], dtype=torch.uint8, device=device)
    log_probs, labels = torch.full((1, 4, 2), -1.0, device=device), torch.tensor([[1, 2, -100, -100]], device=device)
    ours, expected = (
        sparse_distillation_loss(student, i, log_probs, labels, backend=backend).loss for i in (ids, ids.long())
    )
    assert torch.equal(ours, expected)
    mask = torch.tensor([[1, 1, 0, 0]], device=device)
    ours, expected = (
        selective_log_softmax(student, i, row_mask=mask, backend=backend) for i in (ids[..., 0], ids[..., 0].long())
    )
    assert torch.equal(ours, expected)
    assert (ours[0, 2:] == 0).all()
    labels = torch.tensor([[156, 2, 3, 200]], dtype=torch.uint8, device=device)
    teacher = torch.randn_like(student)
    for loss in (
        lambda y: distillation_loss(student, teacher, y, hard_weight=0.0, backend=backend),
        lambda y: kd_loss(student, teacher, y, backend=backend),
        lambda y: sparse_distillation_loss(student, ids.long(), log_probs, y, backend=backend).loss,
    ):
        assert torch.equal(loss(labels), loss(labels.long()))


def test_which_teachers_are_refused():
    student, ids = torch.randn(2, 9), torch.tensor([[1, 2], [0, 0]])
    logits = torch.tensor([[3.0, 2.0], [0.0, 0.0]])  # unnormalised, and a row of padding
    with pytest.raises(ValueError, match="a mass of at most 1"):
        sparse_distillation_loss(student, ids, logits)
    found = sparse_distillation_loss(student[:1], ids[:1], logits[:1], tail="renormalize")
    normalised = sparse_distillation_loss(student[:1], ids[:1], logits[:1].log_softmax(-1), tail="renormalize")
    torch.testing.assert_close(found.loss, normalised.loss)
    padded = torch.stack([logits[0].log_softmax(-1) - 0.1, logits[1]])
    each = sparse_distillation_loss(student, ids, padded, reduction="none").loss
    torch.testing.assert_close(
        each[:1], sparse_distillation_loss(student[:1], ids[:1], padded[:1], reduction="none").loss
    )


@pytest.mark.parametrize("apart", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_acceptance_rate(apart, temperature, backend, device):
    """Rates near 1, and rates that are lost when computed as a difference from 1."""
    tokens = 4, 20 if backend == "triton" and device == "cpu" else 100
    student = torch.randn(*tokens, 33, device=device)
    teacher = torch.randn_like(student) + apart * torch.linspace(-1, 1, 33, device=device)
    student = teacher if apart == 0 else student - apart * torch.linspace(-1, 1, 33, device=device)
    upstream = torch.randn(tokens, device=device)

    def run(fn, dtype, **options):
        leaves = [x.to(dtype).requires_grad_() for x in (student.detach(), teacher.detach())]
        value = fn(*leaves, temperature=temperature, **options)
        loss = value.log() if apart else value
        return value, *torch.autograd.grad((loss * upstream).sum(), leaves)

    def eager(student, teacher, temperature):
        return torch.minimum(*((x / temperature).softmax(-1) for x in (student, teacher))).sum(-1)

    found, theirs = run(acceptance_rate, torch.float32, backend=backend), run(eager, torch.float32)
    exact = run(reference.acceptance_rate, torch.float64)
    if apart == 10 and temperature == 1:
        assert exact[0].max() < 1e-3
    assert (found[0] <= 1 + 1e-6).all()
    for name, a, b, c in zip(("rate", "d_student", "d_teacher"), found, theirs, exact, strict=True):
        assert_accurate(a, b, c, name)


def test_acceptance_rate_of_heads(backend, device):
    leaves = [torch.randn(n, m, device=device).requires_grad_() for n, m in ((8, 6), (30, 6), (8, 10), (33, 10))]
    mask = torch.arange(8, device=device) % 3 > 0
    found = acceptance_rate(LinearLogits(*leaves[:2]), LinearLogits(*leaves[2:]), mask=mask, backend=backend)
    expected = reference.acceptance_rate(leaves[0] @ leaves[1].T, leaves[2] @ leaves[3].T, mask=mask)
    torch.testing.assert_close(found, expected)
    assert (found == 0).tolist() == (~mask).tolist()
    torch.testing.assert_close(*(torch.autograd.grad(x[mask].log().mean(), leaves) for x in (found, expected)))
    tvd = divergence(LinearLogits(*leaves[:2]), LinearLogits(*leaves[2:]), kind="tvd", mask=mask, backend=backend)
    torch.testing.assert_close(found + tvd, mask.float())
    with pytest.raises(ValueError, match=r"student_logits \(8, 30\) and teacher_logits \(7, 33\)"):
        acceptance_rate(LinearLogits(*leaves[:2]), LinearLogits(leaves[2][1:], leaves[3]))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("lazy", [True, False])
def test_a_teacher_without_weight_is_not_read(lazy, reduction):
    h, w = torch.randn(6, 4).requires_grad_(), torch.randn(9, 4).requires_grad_()
    labels = torch.tensor([0, 3, -100, 7, 1, 2])
    missing = torch.full((7, 4), torch.nan)  # the teacher's vocabulary is smaller, and the student's is cut to it
    labels = labels.clamp(max=6)
    teacher = LinearLogits(torch.randn(6, 4), missing) if lazy else torch.full((6, 7), torch.nan)
    student = LinearLogits(h, w) if lazy else h @ w.T
    how = {"hard_weight": 1.0, "soft_weight": 0.0, "reduction": reduction}
    loss = distillation_loss(student, teacher, labels, **how)
    expected = F.cross_entropy((h @ w.T)[:, :7], labels, reduction=reduction)
    torch.testing.assert_close(loss, expected)
    found, wanted = (torch.autograd.grad(x.sum(), (h, w), retain_graph=True) for x in (loss, expected))
    torch.testing.assert_close(found, wanted)
