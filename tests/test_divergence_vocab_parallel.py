"""Divergences over a vocabulary that 2 and 4 processes share give what one process gives: values, gradients, errors."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import needs_ranks, within

import fused_losses
from fused_losses import LinearLogits, VocabParallel, settings, two_heads
from fused_losses.bench.ranks import run
from fused_losses.divergence import KINDS
from fused_losses.reference.tolerance import assert_accurate

pytestmark = pytest.mark.xdist_group("divergence_vocab_parallel")  # so that its processes are started once
N, V, TEACHER_V, H, TEACHER_H, R = 45, 50, 61, 8, 11, 3
SPLITS = {  # where each rank's part of the vocabulary begins; the last rank also holds the rest of the teacher's
    2: {"even": (0, 25), "uneven": (0, 7), "empty": (0, 50)},
    4: {"uneven": (0, 1, 30, 33), "empty": (0, 0, 20, 50)},
}
OF_VOCAB = ("weight", "bias", "B")
OF_TOKENS = ("hidden", "u")


def inputs(dtype, vocab=V, teacher_vocab=TEACHER_V):
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    labels = torch.randint(0, vocab, (N,), generator=g)
    labels[::5] = -100
    tensors = {}
    for side, hidden, entries in (("student", H, vocab), ("teacher", TEACHER_H, teacher_vocab)):
        tensors |= {
            f"{side} hidden": randn(N, hidden),
            f"{side} weight": randn(entries, hidden),
            f"{side} bias": randn(entries),
            f"{side} u": randn(N, R),
            f"{side} B": randn(entries, R),
        }
    ids = torch.stack([torch.randperm(vocab, generator=g)[:4] for _ in range(N)])
    others = {
        "labels": labels,
        "ids": ids,
        "log_probs": randn(N, 5).log_softmax(-1)[:, :4],
        "temperature": torch.rand(2, N, generator=g, dtype=torch.float64) + 0.5,
        "upstream": randn(N),
    }
    return {name: t.to(dtype) for name, t in tensors.items()}, {
        n: t.to(dtype) if t.is_floating_point() else t for n, t in others.items()
    }


# Each loss is written once: ``s`` and ``t`` are whole logits, LinearLogits, or shards of logits with their group in ``of``.


def divergence(kind):
    def loss(s, t, x, **of):
        mask = x["labels"] != -100
        return fused_losses.divergence(s, t, kind=kind, beta=0.3, temperature=1.7, mask=mask, **of)

    return loss


def acceptance_rate(s, t, x, **of):
    return fused_losses.acceptance_rate(s, t, temperature=1.7, mask=x["labels"] != -100, **of)


def distillation(s, t, x, **options):
    return fused_losses.distillation_loss(s, t, x["labels"], hard_weight=0.3, soft_weight=0.8, **options)


def sparse(s, t, x, **options):
    return fused_losses.sparse_distillation_loss(s, x["ids"], x["log_probs"], x["labels"], temperature=1.3, **options)[
        0
    ]


SUMMED = {
    "mean": functools.partial(distillation, kind="jsd", temperature=2.0),
    "temperature 1": functools.partial(distillation, kind="reverse_kl", reduction="sum"),
    "kd": lambda s, t, x, **of: fused_losses.kd_loss(s, t, x["labels"], **of),
    "sparse": sparse,
}
PER_TOKEN = {
    **{kind: divergence(kind) for kind in KINDS},
    "acceptance rate": acceptance_rate,
    "none": functools.partial(distillation, kind="forward_kl", temperature=2.0, reduction="none"),
    "sparse none": functools.partial(sparse, reduction="none", kind="jsd"),
}
LOSSES = SUMMED | PER_TOKEN
SCALES, SOFTCAPS = (0.7, 1.2), (6.0, 5.0)


def logits_of(tensors, x, side):
    i = ("student", "teacher").index(side)
    hidden, weight, bias, u, B = (tensors[f"{side} {name}"] for name in ("hidden", "weight", "bias", "u", "B"))
    z = SOFTCAPS[i] * torch.tanh((F.linear(hidden, weight, bias) + u @ B.T) * SCALES[i] / SOFTCAPS[i])
    return z / x["temperature"][i, :, None]


def lazy(tensors, x, side, group=None):
    i = ("student", "teacher").index(side)
    hidden, weight, bias, u, B = (tensors[f"{side} {name}"] for name in ("hidden", "weight", "bias", "u", "B"))
    how = {"scale": SCALES[i], "softcap": SOFTCAPS[i], "temperature": x["temperature"][i]}
    return LinearLogits(hidden, weight, bias, low_rank=(u, B), group=group, **how)


def gradients(loss, sides_of, tensors, x, **of):
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    value = loss(*sides_of(leaves, x), x, **of)
    (value * x["upstream"][: value.numel()].view(value.shape).to(value.dtype)).sum().backward()
    return {"loss": value.detach()} | {name: t.grad for name, t in leaves.items() if t.grad is not None}


def both(of_side, *more):
    return lambda tensors, x: tuple(
        of_side(tensors, x, side, *of) for side, *of in zip(("student", "teacher"), *more, strict=bool(more))
    )


# (loss, dtype, head or logits, settings)
CHUNKS = {"workspace": 1}
CASES = [
    *((name, torch.float64, "head", {}) for name in LOSSES),
    *((name, torch.float64, "logits", {}) for name in LOSSES),
    *((name, torch.float64, "head", CHUNKS) for name in ("mean", "none")),
    *((name, torch.float64, "head", CHUNKS | {"drop_ignored": False}) for name in ("mean", "none")),
    ("mean", torch.float64, "head", {"route": "recompute"}),
    *((name, dtype, "head", CHUNKS) for name in LOSSES for dtype in (torch.float32, torch.bfloat16)),
    *((name, torch.float16, "head", CHUNKS) for name in ("mean", "none")),
    *((name, torch.float32, "logits", {"backend": "triton"}) for name in ("tvd", "none")),
    *((name, torch.float16, "head", {"backend": "triton"}) for name in ("mean", "skewed_kl")),
]


def runs(count, split, number):
    """Whether a case runs: the interpreter is slow, and 4 processes are many for 2 cores."""
    _, dtype, kind, options = CASES[number]
    if options.get("backend") == "triton":
        return (count, split) == (2, "empty" if dtype == torch.float16 else "uneven")
    return count == 2 or (dtype == torch.float64 and (kind == "head" or split == "uneven"))


def ranges(count, split, rank):
    """The ranges of the student's and of the teacher's vocabulary that a rank holds."""
    starts = SPLITS[count][split]
    last = rank == count - 1
    start = starts[rank]
    return (start, V if last else starts[rank + 1]), (start, TEACHER_V if last else starts[rank + 1])


def of_shard(tensors, parts):
    which = dict(zip(("student", "teacher"), parts, strict=True))
    return {
        name: t[slice(*which[name.split()[0]])] if name.split()[1] in OF_VOCAB else t for name, t in tensors.items()
    }


def found_on_a_rank(device, count):
    two_heads.FEWEST_TOKENS = 16  # so that a workspace of one byte makes several chunks
    rank = dist.get_rank()
    found = {}
    for split in SPLITS[count]:
        parts = ranges(count, split, rank)
        groups = [VocabParallel(dist.group.WORLD, part, size) for part, size in zip(parts, (V, TEACHER_V), strict=True)]
        for number, (name, dtype, kind, options) in enumerate(CASES):
            if not runs(count, split, number):
                continue
            tensors, x = ({n: t.to(device) for n, t in of.items()} for of in inputs(dtype))
            if kind == "logits":  # with one vocabulary for both sides, as there is one group=
                tensors, parts = (
                    {n: t[:V] if n.split()[1] in OF_VOCAB else t for n, t in tensors.items()},
                    parts[:1] * 2,
                )
            sides_of = both(logits_of) if kind == "logits" else both(lazy, groups)
            with within(options):
                try:
                    of = {"group": groups[0]} if kind == "logits" else {}
                    found[split, number] = gradients(LOSSES[name], sides_of, of_shard(tensors, parts), x, **of)
                except Exception as error:
                    raise AssertionError(f"{split}, {CASES[number]}") from error
            parts = ranges(count, split, rank)
    return found


@functools.cache
def on_ranks(count):
    return run(found_on_a_rank, count, count)


@functools.cache
def on_one_process(name, dtype, kind):
    """The results of plain logits in the case's dtype, and in float64 from the same inputs."""
    tensors, x = inputs(dtype)
    if kind == "logits":
        tensors = {n: t[:V] if n.split()[1] in OF_VOCAB else t for n, t in tensors.items()}

    def of(dtype):
        def to(values):
            return {n: t.to(dtype) if t.is_floating_point() else t for n, t in values.items()}

        with settings.backend("torch"):
            return gradients(LOSSES[name], both(logits_of), to(tensors), to(x))

    return of(dtype), of(torch.float64)


@needs_ranks
@pytest.mark.parametrize(
    ("count", "split", "number"),
    [
        pytest.param(count, split, number, id="-".join([str(count), split, *map(str, CASES[number])]))
        for count in SPLITS
        for split in SPLITS[count]
        for number in range(len(CASES))
        if runs(count, split, number)
    ],
)
def test_equals_one_process(count, split, number):
    name, dtype, kind, _ = CASES[number]
    eager, exact = on_one_process(name, dtype, kind)
    found = [of_rank[split, number] for of_rank in on_ranks(count)]
    assert all(set(of_rank) == set(exact) for of_rank in found)
    whole = {}
    for tensor in exact:
        of_ranks = [of_rank[tensor] for of_rank in found]
        role = tensor.split()[-1]
        if role in OF_VOCAB:
            whole[tensor] = torch.cat(of_ranks)
        elif role in OF_TOKENS and kind == "logits":  # each rank's autograd saw only that rank's columns
            whole[tensor] = sum(g.double() for g in of_ranks).to(dtype)
        else:
            assert all(torch.equal(t, of_ranks[0]) for t in of_ranks), f"{tensor} differs between ranks"
            whole[tensor] = of_ranks[0]
    if name not in ("sparse", "sparse none") and kind == "head":
        assert whole["teacher weight"].shape == (TEACHER_V, TEACHER_H)
        assert whole["teacher weight"][V:].eq(0).all()
        assert whole["teacher weight"][:V].ne(0).any()
    for tensor, value in whole.items():
        if dtype == torch.float64:
            torch.testing.assert_close(value, exact[tensor], msg=lambda m, tensor=tensor: f"{tensor}: {m}")
        else:
            assert_accurate(value, eager[tensor].to(value.dtype), exact[tensor], f"{name} {tensor}")


def trained(tensors, x, group_of, steps=4):
    """The student after some steps, learning from the teacher through a layer before its head."""
    g = torch.Generator().manual_seed(3)
    layer = torch.randn(H, H, generator=g, dtype=torch.float64) / 3
    parameters = {n: t.clone() for n, t in tensors.items() if n.startswith("student") and n != "student hidden"}
    parameters["layer"] = layer
    for p in parameters.values():
        p.requires_grad_()
    optimizer = torch.optim.AdamW(parameters.values(), lr=3e-2)
    losses = []
    for step in range(steps):
        hidden = torch.tanh(tensors["student hidden"].roll(step, 0) @ parameters["layer"])
        student = lazy(parameters | {"student hidden": hidden}, x, "student", group_of("student"))
        loss = distillation(student, lazy(tensors, x, "teacher", group_of("teacher")), x, kind="jsd", temperature=2.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses)} | {name: p.detach() for name, p in parameters.items()}


def counted(names, calls):
    """Record the bytes that each collective takes."""
    for name, of in names.items():
        original = getattr(dist, name)

        @functools.wraps(original)
        def call(*tensors, original=original, name=name, of=of, **options):
            calls.append((name, tensors[of].numel() * tensors[of].element_size()))
            return original(*tensors, **options)

        setattr(dist, name, call)


def other_answers(device, count):
    rank, world = dist.get_rank(), dist.group.WORLD
    tensors, x = inputs(torch.float64)
    parts = ranges(count, "uneven", rank)
    groups = {
        side: VocabParallel(world, part, size)
        for side, part, size in zip(("student", "teacher"), parts, (V, TEACHER_V), strict=True)
    }
    found = {"trained": trained(of_shard(tensors, parts), x, groups.get)}

    # Top-k, also of shards smaller than k.
    mine = of_shard(tensors, parts)
    whole = logits_of(tensors, x, "student").detach()
    for k in (1, 9, V):
        top = fused_losses.teacher_topk(whole, k, temperature=1.5)
        for ours in (
            fused_losses.teacher_topk(lazy(mine, x, "student", groups["student"]), k, temperature=1.5, workspace=1),
            fused_losses.teacher_topk(whole[:, slice(*parts[0])], k, temperature=1.5, group=groups["student"]),
        ):
            assert torch.equal(ours.ids, top.ids)
            torch.testing.assert_close(ours.log_probs, top.log_probs)
    with pytest.raises(ValueError, match=f"vocabulary {V} of"):
        fused_losses.teacher_topk(lazy(mine, x, "student", groups["student"]), V + 1)

    # One side is a head, the other is logits, padded beyond their ids.
    teacher = logits_of(tensors, x, "teacher")[:, :V].detach()
    wanted = fused_losses.divergence(whole, teacher, kind="jsd")
    padded = F.pad(teacher[:, slice(*parts[0])], (0, 2), value=torch.nan).requires_grad_()
    student = lazy(mine, x, "student", groups["student"])
    value = fused_losses.divergence(student, padded, kind="jsd", group=groups["student"])
    torch.testing.assert_close(value.detach(), wanted)
    (d_padded,) = torch.autograd.grad(value.sum(), padded)
    assert d_padded[:, -2:].eq(0).all()
    both_padded = F.pad(whole[:, slice(*parts[0])], (0, 2), value=torch.nan).requires_grad_()
    value = fused_losses.divergence(both_padded, padded, kind="jsd", group=groups["student"])
    torch.testing.assert_close(value.detach(), wanted)
    assert torch.autograd.grad(value.sum(), both_padded)[0][:, -2:].eq(0).all()

    # A nan in a masked token reaches nothing.
    leaves = {n: t.clone() for n, t in mine.items()}
    for name in ("student hidden", "teacher hidden"):
        leaves[name][::5] = torch.nan
    for t in leaves.values():
        t.requires_grad_()
    for drop in (True, False):
        loss = SUMMED["mean"](
            *(lazy(leaves, x, side, groups[side]) for side in ("student", "teacher")), x, drop_ignored=drop
        )
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, list(leaves.values())))
    no_tokens = LinearLogits(tensors["student hidden"][:0], mine["student weight"], group=groups["student"])
    assert fused_losses.divergence(no_tokens, no_tokens).shape == (0,)
    logits = whole[:0, slice(*parts[0])]
    assert fused_losses.divergence(logits, logits, group=groups["student"]).shape == (0,)

    # Logits that are −inf in the whole shard of one rank, and an infinite divergence.
    s, t = whole[:2].clone(), teacher[:2].clone()
    s[0, slice(*ranges(count, "uneven", 1)[0])] = t[0, slice(*ranges(count, "uneven", 1)[0])] = -torch.inf
    s[1, 3] = -torch.inf
    s.requires_grad_()
    shard = s[:, slice(*parts[0])]
    ours = fused_losses.divergence(shard, t[:, slice(*parts[0])], group=groups["student"])
    theirs = fused_losses.divergence(s, t)
    assert theirs[1].isinf()
    torch.testing.assert_close(ours, theirs)
    (d_theirs,) = torch.autograd.grad(theirs.sum(), s)
    (d_ours,) = torch.autograd.grad(ours.sum(), shard)
    torch.testing.assert_close(d_ours, d_theirs[:, slice(*parts[0])])

    found["messages"] = errors(mine, x, groups, whole)
    if count == 2:
        compiled(mine, x, groups)
        found["sent"] = sent_of_a_step(world, count)
    return found


def errors(mine, x, groups, whole):
    start, stop = groups["student"].vocab_range
    student, teacher = (lazy(mine, x, side, groups[side]) for side in ("student", "teacher"))
    shard = whole[:, start:stop]
    messages = []
    for sides, options in (
        ((student, whole), {}),
        ((whole, teacher), {}),
        ((student, shard), {"group": VocabParallel(dist.group.WORLD, (start + 1, stop + 1), V + 1)}),
    ):
        with pytest.raises(ValueError, match="share the vocabulary alike") as error:
            fused_losses.divergence(*sides, **options)
        messages.append(str(error.value))
    with pytest.raises(ValueError, match="knows the group"):
        fused_losses.divergence(student, teacher, group=dist.group.WORLD)
    wrong = VocabParallel(dist.group.WORLD, (0, stop - start), V)
    with pytest.raises(ValueError, match="consecutive parts"):
        fused_losses.divergence(shard, shard, group=wrong)
    with pytest.raises(IndexError, match=f"out of bounds for {V}"):
        distillation(student, teacher, x | {"labels": x["labels"] + V})
    for sides, of, leaf in (
        ((student, teacher), {}, None),
        ((shard.clone().requires_grad_(), shard), {"group": groups["student"]}, 0),
    ):
        leaves = mine["student hidden"].clone().requires_grad_()
        if leaf is None:
            sides = (lazy(mine | {"student hidden": leaves}, x, "student", groups["student"]), teacher)
        else:
            leaves = sides[leaf]
        for loss in (
            lambda sides=sides, of=of: fused_losses.divergence(*sides, **of).sum(),
            lambda sides=sides, of=of: distillation(*sides, x, **of),
        ):
            with pytest.raises(RuntimeError, match="gather the vocabulary"):
                torch.autograd.grad(loss(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="gather the vocabulary"):
        torch.func.grad(lambda s: fused_losses.divergence(s, shard, group=groups["student"]).sum())(shard)
    return messages


def compiled(mine, x, groups):
    leaf = mine["student hidden"].clone().requires_grad_()

    def loss(hidden):
        student = lazy(mine | {"student hidden": hidden}, x, "student", groups["student"])
        return SUMMED["mean"](student, lazy(mine, x, "teacher", groups["teacher"]), x)

    fused = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(fused(leaf), loss(leaf))
    torch.testing.assert_close(*(torch.autograd.grad(fn(leaf), leaf) for fn in (fused, loss)))


def sent_of_a_step(world, count):
    """The collectives of one step on a rank and their bytes, over vocabularies of different sizes."""
    calls = []
    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    others = ("broadcast", "all_gather", "reduce_scatter_tensor", "all_to_all_single")
    counted({gather: 1, "all_reduce": 0} | dict.fromkeys(others, 0), calls)
    sent = {}
    for vocab in (V, 8 * V):
        size = -(-vocab // count)
        for name in ("mean", "kd", "forward_kl"):
            for dtype in (torch.bfloat16, torch.float32):
                tensors, x = inputs(dtype, vocab, vocab)
                part = (min(dist.get_rank() * size, vocab), min((dist.get_rank() + 1) * size, vocab))
                calls.clear()
                group = VocabParallel(world, part, vocab)
                gradients(LOSSES[name], both(lazy, (group, group)), of_shard(tensors, (part, part)), x)
                sent[vocab, name, dtype] = list(calls)
    return sent


@functools.cache
def answers(count):
    return run(other_answers, count, count)


@needs_ranks
@pytest.mark.parametrize("count", [2, 4])
def test_trains_as_one_process_does(count):
    tensors, x = inputs(torch.float64)
    expected = trained(tensors, x, lambda side: None)
    found = [of_rank["trained"] for of_rank in answers(count)]
    assert expected["losses"].diff().abs().min() > 1e-3
    for name, value in expected.items():
        of_ranks = [of_rank[name] for of_rank in found]
        if name.split()[-1] in OF_VOCAB:
            torch.testing.assert_close(torch.cat(of_ranks), value)
        else:
            assert all(torch.equal(t, of_ranks[0]) for t in of_ranks)
            torch.testing.assert_close(of_ranks[0], value)


@needs_ranks
def test_bytes_on_the_wire_do_not_depend_on_the_vocabulary():
    header, counted_tokens = 8 * 8, N - len(range(0, N, 5))
    # float64 numbers per token: normalizers, then sums; the per-token loss makes neither again, as its gradient is saved
    gathered = {"mean": (6, 4), "kd": (4, 4), "forward_kl": (4, 4)}
    for of_rank in answers(2):
        for (vocab, name, dtype), calls in of_rank["sent"].items():
            assert calls == of_rank["sent"][V, name, dtype], f"{name} {dtype}: {vocab} entries"
            sizes = [size for what, size in calls if "gather" in what]
            assert sizes == [header, *(counted_tokens * 8 * n for n in gathered[name])], name
            reduced = [size for what, size in calls if what == "all_reduce"]
            assert sorted(reduced) == sorted(counted_tokens * n * 4 for n in (R, H, R, TEACHER_H)), name  # fp32
            assert len(calls) == len(sizes) + len(reduced)


@needs_ranks
def test_a_mismatch_is_an_error_that_prints_both():
    for of_rank in answers(2):
        first, second, third = of_rank["messages"]
        assert f"student_logits {(N, V)} ids" in first
        assert f"teacher_logits {(N, V)} whole" in first
        assert f"of {TEACHER_V} in group" in second
        assert f"of {V + 1} in group" in third


def test_slices_are_not_taken_for_wholes():
    """This needs no processes: a group of one holds the whole vocabulary."""
    student, teacher = torch.randn(2, 3, 7)
    with pytest.raises(ValueError, match="group is None"):
        fused_losses.divergence(student, teacher, group=VocabParallel(None))
