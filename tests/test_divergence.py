"""Divergence between two sets of logits: every kind, both gradients, tensors and heads, on both backends."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import INTERPRETED
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from fused_losses import two_heads
from fused_losses.bench.memory import peak_bytes
from fused_losses.distillation import acceptance_rate, distillation_loss
from fused_losses.divergence import KINDS, divergence, shared_vocabulary
from fused_losses.head import Head
from fused_losses.linear_logits import LinearLogits
from fused_losses.reference import divergence as reference
from fused_losses.reference.distillation import acceptance_rate as reference_acceptance_rate
from fused_losses.reference.tolerance import assert_accurate
from fused_losses.row_divergence import Divergence, divergence_module, whole_normalizers
from fused_losses.settings import strict, workspace
from fused_losses.vocab_parallel import VocabShard

BETA = 0.3


def pair(device, dtype=torch.float32, tokens=(2, 3), V=77, teacher_V=None, apart=3.0):
    student = torch.randn(*tokens, V, device=device) * 3
    teacher = torch.randn(*tokens, teacher_V or V, device=device) * 3
    if apart < 3:
        teacher = student + torch.randn_like(student) * apart
    return student.to(dtype), teacher.to(dtype)


def eager(student, teacher, kind="forward_kl", beta=0.5, temperature=1.0):
    """What a trainer writes: log_softmax in fp32, mixtures in log space."""
    V = min(student.shape[-1], teacher.shape[-1])
    log_s, log_t = ((x[..., :V].to(torch.promote_types(x.dtype, torch.float32)) / temperature).log_softmax(-1)
                    for x in (student, teacher))  # fmt: skip

    def kl(p, q):
        return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)

    if kind == "tvd":
        return 0.5 * (log_t.exp() - log_s.exp()).abs().sum(-1)
    if kind == "overlap":
        return torch.minimum(log_t.exp(), log_s.exp()).sum(-1)
    if kind == "forward_kl":
        return kl(log_t, log_s)
    if kind == "reverse_kl":
        return kl(log_s, log_t)
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
    return kl(log_t, log_m) if kind == "skewed_kl" else beta * kl(log_t, log_m) + (1 - beta) * kl(log_s, log_m)


def value_and_gradients(fn, student, teacher, upstream, **options):
    leaves = [x.detach().clone().requires_grad_() for x in (student, teacher)]
    value = fn(*leaves, **options)
    return value, *torch.autograd.grad(value, leaves, upstream.to(value.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_both_gradients(kind, temperature, dtype, backend, device):
    if backend == "triton" and INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter is wrong about bfloat16")
    student, teacher = pair(device, dtype)
    upstream = torch.randn(2, 3, device=device)
    options = {"kind": kind, "beta": BETA, "temperature": temperature}
    found = value_and_gradients(divergence, student, teacher, upstream, **options, backend=backend)
    # The rounded logits are the input: the exact result is the float64 maths on them, and eager computes on them in fp32.
    theirs = value_and_gradients(eager, student.float(), teacher.float(), upstream, **options)
    exact = value_and_gradients(reference.divergence, student.double(), teacher.double(), upstream, **options)
    assert found[0].dtype == torch.float32
    assert_accurate(found[0], theirs[0], exact[0], "divergence")
    for name, a, b, c in zip(("student", "teacher"), found[1:], theirs[1:], exact[1:], strict=True):
        assert_accurate(a, b.to(dtype), c, f"d_{name}")


def test_kinds_and_options_change_the_number(backend, device):
    student, teacher = pair(device)
    options = [{"kind": kind} for kind in KINDS]
    options += [{"kind": kind, "beta": 0.8} for kind in ("jsd", "skewed_kl")]
    options += [{"kind": kind, "temperature": 3.0} for kind in KINDS]
    numbers = [divergence(student, teacher, **o, backend=backend).sum().item() for o in options]
    assert len({round(x, 5) for x in numbers}) == len(options)


def test_ends_of_the_mixture(backend, device):
    student, teacher = pair(device)

    def run(**options):
        return value_and_gradients(
            divergence, student, teacher, torch.ones(2, 3, device=device), **options, backend=backend
        )

    for ours, theirs in (
        ({"kind": "jsd", "beta": 0.0}, {"kind": "forward_kl"}),
        ({"kind": "jsd", "beta": 1.0}, {"kind": "reverse_kl"}),
        ({"kind": "skewed_kl", "beta": 0.0}, {"kind": "forward_kl"}),
    ):
        assert all(torch.equal(a, b) for a, b in zip(run(**ours), run(**theirs), strict=True))
    assert all((x.abs() < 1e-6).all() for x in run(kind="skewed_kl", beta=1.0))
    # With beta near an end, the skewed KL is near its value there, and the jsd divided by its small weight is near a KL.
    student, teacher = pair(device, apart=0.3)
    forward, reverse = (divergence(student, teacher, kind=k, backend=backend) for k in ("forward_kl", "reverse_kl"))
    near = divergence(student, teacher, kind="skewed_kl", beta=1e-4, backend=backend)
    torch.testing.assert_close(near, forward, rtol=1e-3, atol=0)
    near = divergence(student, teacher, kind="jsd", beta=1e-4, backend=backend)
    torch.testing.assert_close(near / 1e-4, forward, rtol=1e-3, atol=0)
    near = divergence(student, teacher, kind="jsd", beta=1 - 1e-4, backend=backend)
    torch.testing.assert_close(near / 1e-4, reverse, rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", ["jsd", "forward_kl", "reverse_kl", "skewed_kl", "tvd"])
def test_nearly_equal_distributions(kind, backend, device):
    """Where t ≈ s to one bf16 rounding, a sum of plain terms is noise: others give negative values and wrong gradients."""
    dtype = torch.float16 if backend == "triton" and INTERPRETED else torch.bfloat16
    student = (torch.randn(6, 900, device=device) * 3).to(dtype)
    step = torch.randint(-1, 2, student.shape, device=device) * torch.finfo(dtype).eps
    teacher = (student.float() * (1 + step)).to(dtype)
    assert 0 < (student != teacher).float().mean() < 1
    upstream = torch.ones(6, device=device)
    found = value_and_gradients(divergence, student.float(), teacher.float(), upstream, kind=kind, backend=backend)
    low = value_and_gradients(divergence, student, teacher, upstream, kind=kind, backend=backend)
    exact = value_and_gradients(reference.divergence, student.double(), teacher.double(), upstream, kind=kind)
    assert (low[0] > 0).all()
    assert ((low[0] - exact[0]).abs() < 1e-2 * exact[0]).all()
    for a, b, c in zip(found[1:], low[1:], exact[1:], strict=True):
        assert (a - c).norm() < 1e-3 * c.norm()
        assert (b - c).norm() < 1e-2 * c.norm()
    same = divergence(student, student.clone(), kind=kind, backend=backend)
    assert (same == 0).all()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.integers(1, 40),
    st.floats(1e-4, 40),
    st.floats(0.01, 0.99),
    st.sampled_from(KINDS),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_never_negative(V, spread, beta, kind, dtype):
    student = (torch.randn(5, V) * spread).to(dtype)
    teacher = (student + torch.randn(5, V) * spread * 1e-3).to(dtype)
    found = divergence(student, teacher, kind=kind, beta=beta)
    assert (found >= 0).all()
    assert found.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_minus_infinity(kind, backend, device):
    student, teacher = pair(device, tokens=(4,), V=33)
    student[0, 3] = teacher[0, 3] = -math.inf  # on both sides
    student[1, 5] = -math.inf
    teacher[2, 7] = -math.inf
    upstream = torch.ones(4, device=device)
    found = value_and_gradients(divergence, student, teacher, upstream, kind=kind, backend=backend)
    assert not any(x.isnan().any() for x in found)
    exact = reference.divergence(student.double(), teacher.double(), kind)
    infinite = {"forward_kl": 1, "reverse_kl": 2}.get(kind)
    assert exact.isinf().nonzero().flatten().tolist() == ([] if infinite is None else [infinite])
    torch.testing.assert_close(found[0].double(), exact, rtol=1e-5, atol=1e-6)
    assert found[1][0, 3] == found[2][0, 3] == 0
    # An entry without mass on both sides leaves the gradients that the row has without it.
    rest = [j for j in range(33) if j != 3]
    alone = value_and_gradients(reference.divergence, student[0, rest].double(), teacher[0, rest].double(),
                                torch.ones((), device=device), kind=kind)  # fmt: skip
    for ours, exact in zip(found[1:], alone[1:], strict=True):
        torch.testing.assert_close(ours[0, rest].double(), exact, rtol=1e-4, atol=1e-6)
    # Where the divergence is finite, the gradients are those of an entry with hardly any mass.
    hardly = (x.double().clamp(min=-700) for x in (student, teacher))
    limits = value_and_gradients(reference.divergence, *hardly, upstream, kind=kind)
    finite = [row for row in range(4) if row != infinite]
    for ours, limit in zip(found[1:], limits[1:], strict=True):
        torch.testing.assert_close(ours[finite].double(), limit[finite], rtol=1e-4, atol=1e-6)
    if kind == "forward_kl":  # infinite, and the student is still pulled to the teacher
        s, t = student[1].softmax(-1), teacher[1].softmax(-1)
        torch.testing.assert_close(found[1][1], s - t, rtol=1e-5, atol=1e-6)
        assert (found[2][1] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_minus_infinity_where_the_other_side_rounds_to_nothing(kind, backend, device):
    student, teacher = pair(device, tokens=(2,), V=33)
    for row, (a, b) in enumerate(((student, teacher), (teacher, student))):
        a[row, 3], b[row, 3] = -math.inf, -1e4
    upstream = torch.ones(2, device=device)
    found = value_and_gradients(divergence, student, teacher, upstream, kind=kind, backend=backend)
    rest = [j for j in range(33) if j != 3]
    exact = value_and_gradients(
        reference.divergence, student[:, rest].double(), teacher[:, rest].double(), upstream, kind=kind
    )
    for ours, theirs in zip((found[0], *(g[:, rest] for g in found[1:])), exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lowest", [-103.0, -103.4, -103.8, -104.5])
@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_at_the_least_number_have_finite_gradients(kind, lowest, backend, device):
    both = (torch.tensor([[0.0, lowest, -1.0, -2.0]], device=device),) * 2
    found = value_and_gradients(divergence, *both, torch.ones(1, device=device), kind=kind, backend=backend)
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [0, 1])
def test_a_nan_on_one_side_is_seen(side, kind, backend, device):
    both = pair(device, tokens=(2,), V=33)
    both[side][0, 7] = math.nan
    found = value_and_gradients(divergence, *both, torch.ones(2, device=device), kind=kind, backend=backend)
    for x in found:
        assert x[0].isnan().all()
        assert x[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["jsd", "skewed_kl"])
@pytest.mark.parametrize("beta", [0.0, 1e-17, 1e-9, 1e-4, 0.9999, 1 - 1e-9, 1 - 1e-16, 1.0])
def test_a_mixture_of_hardly_one_side(beta, kind, dtype, backend, device):
    """Entries where the side of hardly any weight has mass and the other side has little or none."""
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("float64 runs in PyTorch")
    student, teacher = pair(device, dtype, tokens=(2, 3), V=33)
    for row, far in enumerate((-60.0, -300.0, -math.inf)):
        student[0, row, row] = teacher[1, row, row] = far
    upstream = torch.ones(2, 3, device=device)
    options = {"kind": kind, "beta": beta}
    found = value_and_gradients(divergence, student, teacher, upstream, **options, backend=backend)
    exact = value_and_gradients(reference.divergence, student.double(), teacher.double(), upstream, **options)
    finite = exact[0].isfinite()
    assert finite.sum() == (5 if beta == 0 or (kind, beta) == ("jsd", 1) else 6)
    for ours, theirs in zip(found, exact, strict=True):
        assert not ours.isnan().any()
        torch.testing.assert_close(ours[finite].double(), theirs[finite], rtol=2e-5, atol=2e-6)
    assert torch.equal(found[0].isfinite(), finite)
    assert (found[0] >= 0).all()


def test_a_share_that_fp32_rounds_to_one(device):
    student, teacher = pair(device, tokens=(2,), V=33)
    teacher[:, 3] = -math.inf
    found, _ = divergence_module("triton").divergence_rows(
        student[..., None], teacher[..., None], None, None, None, kind="jsd", beta=1.0
    )
    assert ((found >= 0) & (found < 1e-5)).all()


def test_logits_masked_with_the_least_number(backend, device):
    """As trainers mask: a single masked logit has no mass, and a row of masked logits is uniform."""
    student, teacher = pair(device, tokens=(2,), V=33)
    student[0, 3] = teacher[0, 3] = torch.finfo(torch.float32).min
    student[1] = torch.finfo(torch.float32).min
    upstream = torch.ones(2, device=device)
    found = value_and_gradients(divergence, student, teacher, upstream, kind="jsd", backend=backend)
    exact = value_and_gradients(reference.divergence, student.double(), teacher.double(), upstream, kind="jsd")
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)


def test_masked_tokens_are_not_read(backend, device):
    student, teacher = pair(device)
    student[0, 1] = teacher[1, 2] = math.nan
    mask = torch.ones(2, 3, device=device)
    mask[0, 1] = mask[1, 2] = 0
    upstream = torch.ones(2, 3, device=device)
    found = value_and_gradients(divergence, student, teacher, upstream, mask=mask, backend=backend)
    for x in found:
        assert x.isfinite().all()
        assert (x[0, 1] == 0).all()
        assert (x[1, 2] == 0).all()
        assert (x[0, 0] != 0).any()
    assert divergence(student, teacher, backend=backend).isnan().sum() == 2
    assert (divergence(student, teacher, mask=torch.zeros_like(mask), backend=backend) == 0).all()


def test_vocabularies_of_different_padded_size(backend, device):
    student, teacher = pair(device, V=48, teacher_V=64)  # multiples of 16: the same kernel reads them whole and cut
    teacher[..., 48:] = 50.0  # where all the mass would be
    upstream = torch.randn(2, 3, device=device)
    for a, b in ((student, teacher), (teacher, student)):
        found = value_and_gradients(divergence, a, b, upstream, kind="jsd", backend=backend)
        exact = value_and_gradients(reference.divergence, a.double(), b.double(), upstream, kind="jsd")
        cut = value_and_gradients(divergence, a[..., :48], b[..., :48], upstream, kind="jsd", backend=backend)
        assert torch.equal(found[0], cut[0])
        for ours, theirs in zip(found, exact, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)
        assert all((g[..., 48:] == 0).all() for g in found[1:])


def test_a_rank_beyond_the_smaller_vocabulary_has_none_of_it():
    sides = (VocabShard("group", 49, 50, 50, 2), VocabShard("group", 48, 48, 48, 2))
    lazy = (LinearLogits(torch.ones(3, 4), torch.ones(shard.size, 4), group=shard) for shard in sides)
    assert shared_vocabulary(*lazy, None) == (sides[1],) * 2


@pytest.mark.parametrize("lazy", [False, True])
def test_vocabularies_that_no_padding_makes_different(lazy):
    student, teacher = ((torch.randn(1, 4), torch.randn(V, 4)) for V in (10, 1035))
    make = LinearLogits if lazy else F.linear
    with pytest.raises(
        ValueError, match=r"\(1, 10\) and teacher_logits \(1, 1035\) .* take \[\.\.\., :10\] of the larger"
    ):
        divergence(make(*student), make(*teacher))
    cut = divergence(make(*student), make(*teacher)[..., :10])
    torch.testing.assert_close(cut, divergence(F.linear(*student), F.linear(*teacher)[..., :10]))


def test_gradients_written_over_the_logits(backend, device):
    """As for a head's logits, among them the label's, which another warp may be about to overwrite."""
    (student, teacher), ids = pair(device, tokens=(9,), V=2500), torch.randint(0, 2500, (9,), device=device)
    soft, hard = torch.rand(2, 9, device=device)
    rows = divergence_module(backend).divergence_rows

    def run(student, teacher, d_student, d_teacher):
        logits = (t.unsqueeze(-1) for t in (student, teacher))
        gradients = {"d_student": d_student.unsqueeze(-1), "d_teacher": d_teacher.unsqueeze(-1)}
        return rows(*logits, ids, None, None, kind="jsd", with_nll=True, soft=soft, hard=hard, **gradients)

    beside = [torch.empty_like(student), torch.empty_like(teacher)]
    expected = run(student, teacher, *beside)
    exact = torch.nn.functional.cross_entropy(student.double(), ids, reduction="none")
    torch.testing.assert_close(expected[1].double(), exact, rtol=1e-6, atol=1e-6)
    assert all(map(torch.equal, run(student, teacher, student, teacher), expected))
    assert all(map(torch.equal, (student, teacher), beside))


@pytest.mark.parametrize("only", [0, 1])
def test_frozen_side(only, backend, device):
    both = pair(device)
    upstream = torch.randn(2, 3, device=device)
    wanted = value_and_gradients(divergence, *both, upstream, kind="jsd", backend=backend)[1 + only]
    leaves = [x.clone().requires_grad_(i == only) for i, x in enumerate(both)]
    value = divergence(*leaves, kind="jsd", backend=backend)
    assert torch.equal(torch.autograd.grad(value, leaves[only], upstream)[0], wanted)
    assert all(torch.equal(a, b) for a, b in zip(leaves, both, strict=True))  # inputs unmutated


def test_the_student_alone_over_several_tiles(backend, device):
    """Value and gradient of ``forward_kl`` take one pass, backwards."""
    student, teacher = pair(device, tokens=(9,), V=2500)
    upstream, leaf = torch.randn(9, device=device), student.clone().requires_grad_()
    value = divergence(leaf, teacher, kind="forward_kl", backend=backend)
    found = value.detach(), torch.autograd.grad(value, leaf, upstream)[0]
    theirs = value_and_gradients(eager, student, teacher, upstream, kind="forward_kl")
    exact = value_and_gradients(reference.divergence, student.double(), teacher.double(), upstream, kind="forward_kl")
    for name, ours, yardstick, true in zip(("value", "d_student"), found, theirs, exact, strict=False):
        assert_accurate(ours, yardstick, true, name)


def test_read_in_place_and_alone(backend, device):
    """Shifted views are read where they are, and a row's numbers depend on the row alone."""
    student, teacher = pair(device, tokens=(2, 5), V=1500)
    whole = divergence(student, teacher, kind="jsd", backend=backend)
    assert torch.equal(divergence(student[:, :-1], teacher[:, :-1], kind="jsd", backend=backend), whole[:, :-1])
    assert torch.equal(divergence(student[1, 3], teacher[1, 3], kind="jsd", backend=backend), whole[1, 3])
    flipped = student.transpose(0, 2).contiguous().transpose(0, 2)  # entries of the vocabulary far apart in memory
    assert torch.equal(divergence(flipped, teacher, kind="jsd", backend=backend), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_float64_takes_any_derivative(kind):
    student, teacher = (x.double().requires_grad_() for x in pair("cpu", tokens=(2,), V=5))
    mask = torch.tensor([1, 0]) if kind == "jsd" else None

    def fn(student, teacher):
        return divergence(student, teacher, kind=kind, beta=BETA, temperature=1.3, mask=mask)

    assert torch.autograd.gradcheck(fn, (student, teacher), check_forward_ad=True, check_batched_grad=False)
    assert torch.autograd.gradgradcheck(fn, (student, teacher))


def test_a_tangent_of_the_temperature_is_refused():
    """It would be dropped."""
    hidden, weight, temperature = torch.randn(3, 4), torch.randn(5, 4), torch.rand(3) + 0.5

    def fn(t):
        return divergence(LinearLogits(hidden, weight, temperature=t), torch.zeros(3, 5))

    with pytest.raises(RuntimeError, match=r"derivative for temperature \(3,\)"):
        torch.func.jvp(fn, (temperature,), (temperature,))


def rows_by_slices(rows, student, teacher, ids, cuts, *temperatures, soft=None, hard=None, gradients=(), **options):
    """The results of ``divergence_rows`` for whole rows, computed from slices of the vocabulary as ranks hold them."""
    slices = [slice(*ends) for ends in itertools.pairwise(cuts)]
    N = student.shape[0] * student.shape[2]
    with_nll = options.get("with_nll", False)
    T = options["temperature"]

    def step(name, i, part, **more):
        local = None if ids is None else torch.where((ids >= part.start) & (ids < part.stop), ids - part.start, 9999)
        local = None if ids is None else local.masked_fill(ids == -100, -100)
        given = {"step": name, "normalizers": normalizers[i], "sums": sums[i]} | options | more
        rows(student[:, part], teacher[:, part], local, *temperatures, **given)

    normalizers = student.new_full((len(slices), 6 if with_nll and T != 1 else 4, N), math.nan, dtype=torch.float64)
    sums = student.new_zeros(len(slices), 4, N, dtype=torch.float64)
    for i, part in enumerate(slices):
        step("normalizers", i, part)
    normalizers[:] = whole_normalizers(normalizers)
    for i, part in enumerate(slices):
        step("sums", i, part, slopes=("d_student" in gradients, "d_teacher" in gradients))
    sums[:] = sums.sum(0)
    written = {name: torch.full_like(student, math.nan) for name in gradients}
    for i, part in enumerate(slices):
        room = {name: x[:, part] for name, x in written.items()}
        step("gradients", i, part, soft=soft, hard=hard, **room)
    return sums[0, 0], sums[0, 1] if with_nll else None, *written.values()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "cross_entropy", "overlap"])
def test_slices_of_the_vocabulary_make_the_whole(kind, everything, dtype, backend, device):
    if backend == "triton" and (dtype == torch.float64 or (dtype == torch.float16 and kind != "jsd")):
        pytest.skip("the kernel computes in fp32, and reads float16 alike for every kind")
    copies = 32 if backend == "torch" else 1  # of each case
    student, teacher = (x.unsqueeze(-1) for x in pair(device, dtype, tokens=(7 * copies,), V=203))
    student[0::7, 3] = teacher[0::7, 3] = -math.inf
    student[1::7, :60] = teacher[1::7, :60] = -math.inf  # all that the first slices hold
    student[2::7, 120] = -math.inf
    teacher[3::7, 5] = -math.inf
    student[4::7] = teacher[4::7] = math.nan
    student[5::7, 140], teacher[5::7, 140] = 40.0, 39.0  # all the mass
    ids = torch.tensor([0, 202, 59, 60, -100, 140, 12], device=device).repeat(copies)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    T, teacher_T, soft, hard = (torch.rand(4, 7 * copies, device=device, dtype=wide) + 0.5).unbind()
    how = {"kind": kind, "beta": BETA, "with_nll": True, "temperature": 1.0}
    temperatures = (None, None)
    if everything:
        how |= {"temperature": 2.5, "student_softcap": 8.0, "student_scale": 0.7}
        temperatures = (T, teacher_T)
    rows = divergence_module(backend).divergence_rows
    found = rows_by_slices(
        rows, student, teacher, ids, (0, 0, 59, 128, 203), *temperatures, soft=soft, hard=hard,
        gradients=("d_student", "d_teacher"), **how,
    )  # fmt: skip

    def whole(*given):
        student, teacher, T, teacher_T, soft, hard = given
        gradients = {"d_student": torch.empty_like(student), "d_teacher": torch.empty_like(teacher)}
        module = divergence_module("torch" if student.dtype == torch.float64 else backend)
        values = module.divergence_rows(student, teacher, ids, T, teacher_T, soft=soft, hard=hard, **how, **gradients)
        return *values, *gradients.values()

    given = (student, teacher, *temperatures, soft, hard)
    exact = whole(*(None if t is None else t.double() for t in given))
    names = ("divergence", "nll", "d_student", "d_teacher")
    for name, ours, theirs, true in zip(names, found, whole(*given), exact, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(ours, true)
        elif copies == 1:  # on so few rows the accuracy is a matter of luck: see the next test
            torch.testing.assert_close(ours.to(theirs.dtype), true.to(theirs.dtype), rtol=2e-5, atol=2e-6)
        else:
            assert_accurate(ours.to(theirs.dtype), theirs, true, name)
    assert not (found[0] < 0).any()
    infinite = {"forward_kl": not everything, "reverse_kl": True}
    assert found[0].isinf().any() == infinite.get(kind, False)


@pytest.mark.parametrize("kind", [*KINDS, "cross_entropy", "overlap"])
def test_slices_are_as_accurate_as_eager_whole_rows(kind, backend, device):
    """Enough rows that the tolerance is not a matter of luck."""
    N, V, cuts = 32, 203, (0, 3, 71, 203)
    student, teacher = pair(device, tokens=(N,), V=V)
    student[:6, 3:71] = teacher[:6, 3:71] = -math.inf  # all of a slice
    student[6:10, 90] = teacher[6:10, 90] = -math.inf
    ids = torch.randint(0, V, (N,), device=device)
    ids[:6], ids[6:10] = ids[:6].clamp(min=71), torch.tensor([0, 2, 3, 202], device=device)
    soft, hard = (torch.rand(2, N, device=device) + 0.5).unbind()
    found = rows_by_slices(
        divergence_module(backend).divergence_rows, student.unsqueeze(-1), teacher.unsqueeze(-1), ids, cuts, None, None,
        soft=soft, hard=hard, gradients=("d_student", "d_teacher"), kind=kind, beta=BETA, temperature=3.0, with_nll=True,
    )  # fmt: skip

    def whole(of_logits, dtype):
        # e^−9999 is 0 in float64 too, and −9999 times 0 is 0, which −inf times 0 is not.
        leaves = [x.to(dtype).clamp(min=-9999).requires_grad_() for x in (student, teacher)]
        if kind == "cross_entropy":
            log_s, log_t = ((x / 3.0).log_softmax(-1) for x in leaves)
            value = -(log_t.exp() * log_s).sum(-1)
        else:
            value = of_logits(*leaves, kind=kind, beta=BETA, temperature=3.0)
        nll = -leaves[0].log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        return value, nll, *torch.autograd.grad((soft * value + hard * nll).sum(), leaves)

    names = ("divergence", "nll", "d_student", "d_teacher")
    theirs, exact = whole(eager, torch.float32), whole(reference.divergence, torch.float64)
    for name, ours, yardstick, true in zip(names, found, theirs, exact, strict=True):
        assert_accurate(ours.to(torch.float32).view(true.shape), yardstick, true, name)


def test_slices_of_rows_masked_with_the_least_number(backend, device):
    """Added to such a maximum, their log-sums are lost, in float64 too: slices pass on both."""
    rows = divergence_module(backend).divergence_rows
    student = torch.full((1, 40, 1), torch.finfo(torch.float32).min, device=device)
    soft = torch.ones(1, device=device)
    teacher = torch.randn(1, 40, 1, device=device)
    found = rows_by_slices(
        rows, student, teacher, None, (0, 7, 40), None, None, kind="jsd", temperature=1.0, soft=soft,
        gradients=("d_student", "d_teacher"),
    )  # fmt: skip
    exact = value_and_gradients(reference.divergence, torch.zeros(1, 40), teacher[..., 0].cpu().double(), torch.ones(1),
                                kind="jsd")  # fmt: skip
    for ours, true in zip((found[0], *found[2:]), exact, strict=True):
        torch.testing.assert_close(ours.double().cpu().view(true.shape), true.double(), rtol=1e-4, atol=1e-6)


def test_compiles_without_a_break(backend, device):
    student, teacher = (x.requires_grad_() for x in pair(device))
    mask = torch.tensor([[1, 0, 1], [1, 1, 1]], device=device)

    def loss(student, teacher):
        return divergence(student, teacher, kind="jsd", beta=BETA, mask=mask, backend=backend).sum() * 3

    compiled = torch.compile(loss, fullgraph=True, backend="inductor" if backend == "torch" else "aot_eager")
    torch.testing.assert_close(compiled(student, teacher), loss(student, teacher))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(student, teacher), (student, teacher)),
        torch.autograd.grad(loss(student, teacher), (student, teacher)),
    )


@pytest.mark.parametrize("with_nll", [False, True])
def test_operator_contract(with_nll, device):
    student, teacher = (x.requires_grad_() for x in pair(device, tokens=(2, 3), V=9))
    rows = [x.detach().transpose(1, 2).clone().requires_grad_() for x in (student, teacher)]
    ids = torch.tensor([1, -100, 3, 0, 8, 2], device=device)
    how = {"with_nll": with_nll, **Divergence("jsd", 0.3, 1.5)._asdict(), "backend": "torch", "shard": ""}
    torch.library.opcheck(torch.ops.fused_losses.divergence_rows, (*rows, ids), how)


# Heads


def heads(device, dtype=torch.float32, N=7, V=50, teacher_V=None, options=True):
    """Leaves and a function that makes ``(student, teacher)`` LinearLogits of them."""
    torch.manual_seed(1)
    sizes = ((6, V), (10, teacher_V or V))
    leaves = []
    for H, v in sizes:
        leaves += [torch.randn(N, H, device=device), torch.randn(v, H, device=device), torch.randn(v, device=device)]
        leaves += [torch.randn(N, 2, device=device), torch.randn(v, 2, device=device) * 0.3]
    leaves = [x.to(dtype).requires_grad_() for x in leaves]
    T, teacher_T = torch.rand(2, N, device=device) + 0.5

    def make(leaves):
        if not options:
            return LinearLogits(*leaves[:2]), LinearLogits(*leaves[5:7])
        dtype = leaves[0].dtype if leaves[0].dtype == torch.float64 else torch.float32
        t, teacher_t = T.to(dtype), teacher_T.to(dtype)
        return (
            LinearLogits(*leaves[:3], low_rank=tuple(leaves[3:5]), scale=0.7, softcap=4.0, temperature=t),
            LinearLogits(*leaves[5:8], low_rank=tuple(leaves[8:]), scale=1.2, softcap=6.0, temperature=teacher_t),
        )

    def whole(leaves):
        found = []
        for i, (scale, softcap, temperature) in enumerate(((0.7, 4.0, T), (1.2, 6.0, teacher_T))):
            hidden, weight, bias, u, B = leaves[5 * i : 5 * i + 5]
            if not options:
                found.append(hidden @ weight.T)
                continue
            z = softcap * torch.tanh((hidden @ weight.T + u @ B.T + bias) * scale / softcap)
            found.append(z / temperature[:, None].to(z.dtype))
        return found

    return leaves, make, whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_two_heads(kind, dtype, backend, device, monkeypatch):
    if backend == "triton" and INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter is wrong about bfloat16")
    leaves, make, whole = heads(device, dtype, N=11)
    upstream = torch.randn(11, device=device)
    monkeypatch.setattr("fused_losses.two_heads.FEWEST_TOKENS", 4)

    def run(leaves, logits, fn, **how):
        value = fn(*logits, kind=kind, temperature=1.5, **how)
        return value, torch.autograd.grad(value, leaves, upstream.to(value.dtype))

    # A workspace of one byte: three chunks.
    found = run(leaves, make(leaves), divergence, backend=backend, workspace=1)
    theirs = run(leaves, whole(leaves), eager)
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    exact = run(doubles, whole(doubles), reference.divergence)
    assert_accurate(found[0], theirs[0].float(), exact[0], "divergence")
    names = [f"{side} {name}" for side in ("student", "teacher") for name in ("hidden", "weight", "bias", "u", "B")]
    for name, a, b, c in zip(names, found[1], theirs[1], exact[1], strict=True):
        assert_accurate(a, b, c, name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", [slice(5), slice(5, 10)], ids=["student", "teacher"])
def test_two_heads_of_which_one_trains(kind, trained, backend, device):
    """The kernels then do less work, and give the same results as when both train. The vocabulary fills no tile."""
    leaves, make, _ = heads(device)

    def outcome(trains):
        inputs = [x.detach().requires_grad_(i in trains) for i, x in enumerate(leaves)]
        values = divergence(*make(inputs), kind=kind, backend=backend)
        return values, torch.autograd.grad(values.sum(), inputs[trained])

    torch.testing.assert_close(outcome(range(10)[trained]), outcome(range(10)))


@pytest.mark.parametrize("drop_ignored", [None, True, False])
def test_one_side_a_head(drop_ignored, backend, device):
    """``None``: there is no mask and nothing to drop."""
    leaves, make, _ = heads(device)
    student, teacher = make(leaves)
    upstream = torch.randn(7, device=device)
    mask = None if drop_ignored is None else torch.tensor([1, 0, 1, 1, 0, 1, 1], device=device)
    how = {"mask": mask, "drop_ignored": drop_ignored, "backend": backend}
    want = divergence(student, teacher, kind="reverse_kl", **how)
    grads = torch.autograd.grad(want, leaves, upstream)
    for i in (0, 1):
        sides = list(make(leaves))
        sides[i] = sides[i].materialize()
        with strict():
            value = divergence(*sides, kind="reverse_kl", **how)
        torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.autograd.grad(value, leaves, upstream), grads, rtol=1e-4, atol=1e-5)
    assert mask is None or (want[mask == 0] == 0).all()


LOSSES = [(divergence, reference.divergence), (acceptance_rate, reference_acceptance_rate)]


@pytest.mark.parametrize(("loss", "in_plain_pytorch"), LOSSES)
@pytest.mark.parametrize("drop_ignored", [True, False])
def test_masked_tokens_of_heads(drop_ignored, loss, in_plain_pytorch, backend, device, monkeypatch):
    seen = []

    def spy(head, out, real=Head.write_logits):
        seen.append(len(out))
        return real(head, out)

    monkeypatch.setattr(Head, "write_logits", spy)
    leaves, make, whole = heads(device)
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 1], device=device)
    with torch.no_grad():
        leaves[0][1] = leaves[5][4] = leaves[3][1] = math.nan  # hidden states and low-rank factors of masked tokens
    value = loss(*make(leaves), mask=mask, backend=backend, drop_ignored=drop_ignored)
    grads = torch.autograd.grad(value.sum() * 3, leaves)
    assert set(seen) == ({5} if drop_ignored else {7})
    assert (value[[1, 4]] == 0).all()
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    exact = in_plain_pytorch(*whole(doubles), mask=mask)
    torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-5)
    clean = [x.detach().nan_to_num().double().requires_grad_() for x in leaves]
    exact = torch.autograd.grad(in_plain_pytorch(*whole(clean), mask=mask).sum() * 3, clean)
    for a, b in zip(grads, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sizes", [(50, 64), (64, 50)])
def test_heads_of_different_padded_size(sizes, backend, device):
    leaves, make, whole = heads(device, N=3, V=sizes[0], teacher_V=sizes[1])
    value = divergence(*make(leaves), kind="jsd", backend=backend)
    torch.testing.assert_close(value, reference.divergence(*whole(leaves), kind="jsd"), rtol=1e-4, atol=1e-5)
    for d_weight in torch.autograd.grad(value.sum(), (leaves[1], leaves[6])):
        assert (d_weight[50:] == 0).all()
        assert (d_weight[:50] != 0).any()


def test_heads_take_any_derivative_in_float64():
    leaves, make, _ = heads("cpu", torch.float64, N=2, V=5)

    def fn(*leaves):
        return divergence(*make(leaves), kind="jsd", beta=BETA, mask=torch.tensor([1, 1]))

    assert torch.autograd.gradcheck(fn, leaves)
    some = (leaves[0], leaves[6])
    assert torch.autograd.gradgradcheck(
        lambda a, b: fn(a, *leaves[1:6], b, *leaves[7:]), some, check_batched_grad=False
    )


def test_heads_compile_without_a_break(backend, device):
    leaves, make, _ = heads(device)
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 1], device=device)

    def loss(*leaves):
        return divergence(*make(leaves), kind="jsd", mask=mask, backend=backend).sum() * 3

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), loss(*leaves))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves), rtol=1e-4, atol=1e-5
    )


def test_a_second_backward_gives_the_same_gradients(backend, device):
    leaves, make, _ = heads(device)
    total = (divergence(*make(leaves), kind="jsd", backend=backend) * torch.arange(1.0, 8.0, device=device)).sum()
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    second = torch.autograd.grad(total, leaves)
    for a, b in zip(first, second, strict=True):
        assert a.abs().max() > 1e-3
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lazy", ["neither", "student", "teacher", "both"])
def test_a_teacher_made_in_inference_mode(lazy, dtype, backend, device):
    backend = "torch" if dtype == torch.float64 else backend

    def gradients(mode):
        leaves, make, _ = heads(device, dtype)
        with mode():
            leaves[5:] = [x.detach() * 1 for x in leaves[5:]]
            _, teacher = make(leaves)
            teacher = teacher if lazy in ("teacher", "both") else teacher.materialize()
        student = make(leaves)[0]
        student = student if lazy in ("student", "both") else student.materialize()
        per_token = divergence(student, teacher, backend=backend).square().sum()
        loss = per_token + distillation_loss(student, teacher, torch.arange(7, device=device), backend=backend)
        return torch.autograd.grad(loss, leaves[:5])

    for a, b in zip(gradients(torch.inference_mode), gradients(torch.no_grad), strict=True):
        assert a.abs().max() > 1e-3
        assert torch.equal(a, b)


@pytest.mark.parametrize("drop_ignored", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_in_a_masked_tokens_upstream_gradient(kind, drop_ignored, backend, device):
    leaves, make, whole = heads(device)
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 1], device=device).bool()
    value = divergence(*make(leaves), kind=kind, mask=mask, backend=backend, drop_ignored=drop_ignored)
    ours = torch.autograd.grad(torch.where(mask, value.sqrt(), 0).sum(), leaves)  # of masked tokens it is 0/0
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    exact = torch.autograd.grad(reference.divergence(*whole(doubles), kind=kind)[mask].sqrt().sum(), doubles)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("drop_ignored", [True, False])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_float16_gradients_beside_one_that_is_not_finite(wrong, drop_ignored):
    hidden, weight, h, w = (torch.randn(s).half().requires_grad_() for s in ((7, 6), (50, 6), (7, 6), (50, 6)))
    mask, upstream = torch.tensor([1, 0, 1, 1, 0, 1, 1]), torch.ones(7)
    value = divergence(LinearLogits(hidden, weight), LinearLogits(h, w), mask=mask, drop_ignored=drop_ignored)
    expected = torch.autograd.grad(value, (hidden, weight, h, w), upstream, retain_graph=True)
    upstream[1] = wrong  # of a token that does not count
    torch.testing.assert_close(
        torch.autograd.grad(value, (hidden, weight, h, w), upstream, retain_graph=True), expected
    )
    upstream[2] = wrong
    for found, row in zip(torch.autograd.grad(value, (hidden, h), upstream), (expected[0], expected[2]), strict=True):
        assert not found[2].isfinite().any()
        torch.testing.assert_close(found[3:], row[3:])


def test_a_nan_in_an_infinite_rows_upstream_gradient(backend, device):
    """It is infinite as the student has mass where the teacher has none; the caller leaves such tokens out."""
    leaves, make, _ = heads(device)
    student, _ = make(leaves)
    bias = torch.zeros(student.shape[-1], device=device)
    bias[5] = -torch.inf
    teacher = LinearLogits(leaves[5].detach(), leaves[6].detach(), bias)
    for of in (student, student.materialize()):
        value = divergence(of, teacher, kind="reverse_kl", backend=backend)
        assert value.isposinf().all()
        for gradient in torch.autograd.grad(torch.where(value.isinf(), 0, value.square()).sum(), leaves[:5]):
            assert (gradient == 0).all()


def test_backward_of_what_forward_saved_makes_no_room_for_logits():
    hidden, weight = torch.randn(1024, 8).bfloat16().requires_grad_(), torch.randn(8000, 8).bfloat16().requires_grad_()
    value = divergence(LinearLogits(hidden, weight), LinearLogits(torch.randn(1024, 8).bfloat16(), weight.detach()))
    assert peak_bytes(lambda: torch.autograd.grad(value.sum(), (hidden, weight))) < 1024 * 8000


def test_checkpointing_under_a_workspace_that_has_ended(backend, device, monkeypatch):
    """Forward runs again under another workspace, and must save the same shapes."""
    monkeypatch.setattr(two_heads, "FEWEST_TOKENS", 2)
    leaves, make, _ = heads(device)

    def total(*leaves):
        return divergence(*make(leaves), kind="jsd", backend=backend).square().sum()

    with workspace(1):
        checkpointed = checkpoint(total, *leaves, use_reentrant=False)
    ours = torch.autograd.grad(checkpointed, leaves)
    for a, b in zip(ours, torch.autograd.grad(total(*leaves), leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_float16_gradients_of_heads_whose_scale_is_large(kind, backend, device):
    """As with normalised hidden states and weights."""
    hidden, weight = (torch.nn.functional.normalize(torch.randn(n, 16, device=device), dim=-1) for n in (6, 50))
    noise = torch.randn(6, 16, device=device) * 0.05

    def gradients(of_heads, dtype):
        leaves = [x.half().to(dtype).requires_grad_() for x in (hidden, weight)]
        teacher = (hidden + noise).half().to(dtype)
        return torch.autograd.grad(of_heads(leaves[0], leaves[1], teacher).mean(), leaves)

    def dense(student, weight, teacher):
        return eager(
            *((x @ weight.T).to(torch.promote_types(x.dtype, torch.float32)) * 100 for x in (student, teacher)), kind
        )

    def ours(student, weight, teacher):
        of = (LinearLogits(x, weight, scale=100.0) for x in (student, teacher))
        return divergence(*of, kind=kind, backend=backend)

    found, theirs, exact = (
        gradients(ours, torch.float16),
        gradients(dense, torch.float16),
        gradients(dense, torch.float64),
    )
    for name, a, b, c in zip(("d_hidden", "d_weight"), found, theirs, exact, strict=True):
        assert_accurate(a, b, c, name)


@pytest.mark.parametrize("upstream", [0.0, 0.01])
def test_float16_gradients_of_a_token_that_hardly_counts(upstream, backend, device):
    """They are accurate, however large the token's gradient is before the upstream gradient is known."""
    N, V, H = 8, 50, 16
    hidden, weight = (torch.randn(n, H, device=device).half() for n in (N, V))
    teacher = torch.randn(N, V, device=device).half()
    weight[1], hidden[3] = weight[0], weight[0]
    teacher[3, 0] = -400  # half of the student's probability is where the teacher has none
    factors = torch.ones(N, device=device).index_fill_(0, torch.tensor([3], device=device), upstream)

    def gradients(of_logits, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        return torch.autograd.grad((of_logits(*leaves) * factors).sum(), leaves)

    ours = gradients(
        lambda h, w: divergence(LinearLogits(h, w), teacher, kind="reverse_kl", backend=backend), torch.float16
    )
    theirs, exact = (
        gradients(lambda h, w, dtype=dtype: eager((h @ w.T).to(dtype), teacher.to(dtype), kind="reverse_kl"), of_head)
        for of_head, dtype in ((torch.float16, torch.float32), (torch.float64, torch.float64))
    )
    for name, a, b, c in zip(("d_hidden", "d_weight"), ours, theirs, exact, strict=True):
        assert_accurate(a, b, c, name)


def test_head_operator_contract(device, monkeypatch):
    leaves, _, _ = heads(device, N=4, V=16)  # rows are whole words: there is no padding between them
    ids = torch.tensor([1, -100, 0, 2], device=device)
    student = Head(*leaves[:5], None, 0.7, 4.0, None, 2.0**-12)
    teacher = Head(*leaves[5:], torch.ones(4, device=device))
    shared = two_heads.Problem(student, teacher, ids, None, True, Divergence("jsd", 0.5, 1.5)).packed()
    how = {"workspace": 2**20, "backend": "torch"}
    without = {"with_nll": True, "wanted": [False] * 10, "tokens": 0}
    torch.library.opcheck(torch.ops.fused_losses.two_heads_rows, shared, without | how)
    wanted = [True] * 5 + [False] * 5
    monkeypatch.setattr(two_heads, "read_again", lambda saved: True)  # opcheck compares the outputs after a backward
    saving = {"with_nll": False, "wanted": wanted, "tokens": 4}
    torch.library.opcheck(torch.ops.fused_losses.two_heads_rows, shared, saving | how)
    torch.library.opcheck(
        torch.ops.fused_losses.two_heads_loss, (*shared, torch.tensor(0.5), torch.tensor(2.0)), {"wanted": wanted} | how,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip


@pytest.mark.parametrize("loss", [divergence, acceptance_rate])
def test_memory_does_not_grow_with_tokens_and_vocabulary(loss):
    """The peak is a stated workspace and the fixed temporaries of the row primitive: eager holds N·V several times over."""
    V, H, workspace = 4096, 16, 48 * 2**20

    def peak(N, fn):
        torch.manual_seed(0)
        leaves = [torch.randn(N, H), torch.randn(V, H), torch.randn(N, 2 * H), torch.randn(V, 2 * H)]
        for leaf in leaves[:2]:
            leaf.requires_grad_()

        def step():
            return torch.autograd.grad(fn(*leaves).sum(), leaves[:2])

        inputs = sum(x.numel() * 4 for x in leaves[:2])  # the gradients, which are the result
        return peak_bytes(step) - inputs

    def ours(h, w, teacher_h, teacher_w):
        return loss(LinearLogits(h, w), LinearLogits(teacher_h, teacher_w), workspace=workspace)

    def plain(h, w, teacher_h, teacher_w):
        return eager(h @ w.T, teacher_h @ teacher_w.T)

    small, large = peak(2048, ours), peak(8192, ours)
    assert large < workspace, f"{large / 2**20:.1f} MiB"
    assert large < small * 1.1 + 2**20
    assert peak(2048, plain) > 3 * large


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kind": "kl"}, ValueError, "forward_kl.*got 'kl'"),
        ({"kind": "jsd", "beta": 1.5}, ValueError, r"\[0, 1\], got 1.5"),
        ({"temperature": 0.0}, ValueError, "positive"),
        ({"mask": torch.ones(3)}, ValueError, r"\(2, 3, 77\).*\(3,\)"),
    ],
)
def test_wrong_options(options, error, message, device):
    with pytest.raises(error, match=message):
        divergence(*pair(device), **options)


def test_wrong_shapes(device):
    student, teacher = pair(device)
    with pytest.raises(ValueError, match=r"\(2, 3, 77\).*\(2, 2, 77\)"):
        divergence(student, teacher[:, :2])
    with pytest.raises(ValueError, match="must stand last"):
        divergence(LinearLogits(torch.zeros(2, 3, 4), torch.zeros(5, 4)).transpose(1, 2), torch.zeros(2, 5, 3))


def test_no_tokens(backend, device):
    student = torch.randn(0, 7, device=device, requires_grad=True)
    found = divergence(student, torch.randn(0, 7, device=device), backend=backend)
    assert torch.autograd.grad(found.sum(), student)[0].shape == (0, 7)
    leaves, make, _ = heads(device, N=0)
    found = divergence(*make(leaves), backend=backend)
    assert all((g == 0).all() for g in torch.autograd.grad(found.sum(), leaves))
