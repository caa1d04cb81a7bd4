"""Tensors whose offsets 32 bits do not hold, in memory of which hardly a page is touched."""

import mmap

import numpy as np
import pytest
import torch
from conftest import INTERPRETED

from fused_losses.kernels.divergence_rows import divergence_rows
from fused_losses.kernels.linear_softmax import linear_softmax_d_logits, linear_softmax_fwd
from fused_losses.kernels.softmax_rows import softmax_rows_bwd, softmax_rows_fwd

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the interpreter alone leaves the 4 GiB untouched")
N, V, H = 17, 40, 25
NO_RESERVE = 0x4000  # of Linux's mmap: a page takes memory when it is written to
STATISTICS = ("entropy", "log_sum_sq_probs", "sum_log_probs", "max_logit", "is_top1")


def far_apart(x, dim):
    """``x``, the last of whose entries along ``dim`` is 2³¹ elements behind the first."""
    entries = x.movedim(dim, 0).contiguous()
    apart = 2**31 // (len(entries) - 1) + 1  # which 32 bits hold
    size = ((len(entries) - 1) * apart + entries[0].numel()) * x.element_size()
    room = torch.from_numpy(np.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | NO_RESERVE), x.numpy().dtype))
    return room.as_strided(entries.shape, (apart, *entries.stride()[1:])).copy_(entries).movedim(0, dim)


def assert_close(far, near):
    for x, y in zip(far, near, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_softmax_rows(dim):
    x, t = torch.randn(3, V, 5).half(), torch.randn(3, V, 5).softmax(1).half()
    ids, terms = torch.randint(V, (15, 1)), [torch.randn(15) for _ in "abe"]

    def both(x, t, out):
        found = softmax_rows_fwd(x, ids, None, None, probabilities=t, outputs=(*STATISTICS, "weight_sum"))
        of_ids = (torch.ones(15, 1), torch.ones(15))
        softmax_rows_bwd(x, ids, None, None, found.logsumexp, *terms, *of_ids, probabilities=t, out=out)
        return *(s for s in found if s is not None), out

    near = both(x, t, torch.empty_like(x))
    far = far_apart(x, dim)
    assert_close(both(far, far_apart(t, dim), far), near)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_divergence_rows(dim):
    student, teacher = torch.randn(2, 3, V, 5).half()
    ids, soft, hard = torch.randint(V, (15,)), *torch.rand(2, 15)

    def both(student, teacher, *out):
        how = {"kind": "jsd", "with_nll": True, "soft": soft, "hard": hard}
        found = divergence_rows(student, teacher, ids, None, None, **how, d_student=out[0], d_teacher=out[1])
        return *found, *out

    near = both(student, teacher, torch.empty_like(student), torch.empty_like(teacher))
    far = [far_apart(x, dim) for x in (student, teacher)]
    assert_close(both(*far, *far), near)


@pytest.mark.parametrize("side", [0, 1], ids=["hidden", "weight"])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_head(side, dim):
    matrices, ids = [torch.randn(N, H).half(), torch.randn(V, H).half()], torch.randint(V, (N, 1))

    def both(hidden, weight, saved_logits, out):
        found = linear_softmax_fwd(
            hidden, weight, None, None, ids, None, None, outputs=STATISTICS, saved_logits=saved_logits
        )
        terms = (torch.ones(N), None, None, torch.ones(N, 1), None)
        linear_softmax_d_logits(hidden, weight, None, None, ids, None, None, found.logsumexp, *terms, out=out)
        return *(s for s in found if s is not None), saved_logits, out

    room = torch.zeros(N, V), torch.zeros(N, V).half()
    near = both(*matrices, *room)
    matrices[side] = far_apart(matrices[side], dim)
    assert_close(both(*matrices, far_apart(torch.zeros(N, V), 0), far_apart(torch.zeros(N, V).half(), dim)), near)
