"""A vocabulary shared by 2 and 4 processes gives what one process gives: values, gradients, errors."""

import functools
import itertools
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import needs_ranks, within

import fused_losses
from fused_losses import LinearLogits, VocabParallel, settings
from fused_losses.bench.memory import peak_bytes
from fused_losses.bench.ranks import TIMEOUT, collectives, run
from fused_losses.chunked.softmax_rows import row_statistics
from fused_losses.planning import MiB, plan
from fused_losses.reference.tolerance import assert_accurate
from fused_losses.settings import workspace
from fused_losses.vocab_parallel import _whole

pytestmark = pytest.mark.xdist_group("vocab_parallel")  # its processes are started once
N, V, H, R = 67, 50, 24, 3  # R: rank of the low-rank update
SOFTCAP, SCALE = 6.0, 0.7
SPLITS = {  # where each rank's part of the vocabulary begins
    2: {"even": (0, 25), "uneven": (0, 7), "empty": (0, 50)},
    4: {"even": (0, 13, 26, 39), "uneven": (0, 1, 30, 33), "empty": (0, 0, 20, 50)},
}


def inputs(dtype, vocab=V):
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    target = torch.randint(0, vocab, (N,), generator=g)
    target[::9] = -100
    weight = randn(vocab, H)
    tensors = {
        "hidden": randn(N, H).add(weight[target.clamp(min=0)], alpha=0.1),  # some confident tokens
        "weight": weight,
        "bias": randn(vocab),
        "u": randn(N, R),
        "B": randn(vocab, R),
    }
    others = {
        "target": target,
        "ids": torch.stack([target, torch.randint(0, vocab, (N,), generator=g)], 1),
        "class_weight": torch.rand(vocab, generator=g, dtype=torch.float64) + 0.5,
        "probabilities": randn(N, vocab).softmax(-1),
        "temperature": torch.rand(N, generator=g, dtype=torch.float64) + 0.5,
        "upstream": randn(N, 2),
    }
    tensors = {name: t.to(dtype) for name, t in tensors.items()}
    return tensors, {n: t.to(dtype) if t.is_floating_point() else t for n, t in others.items()}


# Each loss is written once: ``z`` is whole logits, a LinearLogits, or a shard of logits with its group in ``of``.


def statistic(name):
    def loss(z, x, **of):
        found = fused_losses.token_statistics(z, x["target"], ("log_probs", name), temperature=x["temperature"], **of)
        return getattr(found, name)

    return loss


def several_ids(z, x, **of):
    return fused_losses.selective_log_softmax(z, x["ids"], **of)


def ce(z, x, weight=False, probabilities=False, **options):
    target = x["probabilities"] if probabilities else x["target"]
    return fused_losses.cross_entropy(z, target, x["class_weight"] if weight else None, **options)


def of_token(s, upstream):
    return s.log_probs.exp() * upstream[:, 0] + s.entropy * upstream[:, 1] - s.logsumexp.square() / 10


def token_loss(z, x, **of):
    return fused_losses.token_loss(
        of_token, z, x["target"], x["upstream"], statistics=("log_probs", "entropy", "logsumexp"), **of
    )[0]


SUMMED = {
    "mean": ce,
    "weighted": functools.partial(ce, weight=True, label_smoothing=0.2, z_loss=1e-2),
    "sum": functools.partial(ce, reduction="sum", label_smoothing=0.1),
    "token_loss": token_loss,
}
PER_TOKEN = {
    "none": functools.partial(ce, reduction="none", weight=True, label_smoothing=0.2, z_loss=1e-2),
    "probabilities": functools.partial(ce, probabilities=True, weight=True, label_smoothing=0.2),
    "several_ids": several_ids,
    **{name: statistic(name) for name in ("entropy", "logsumexp", "log_sum_sq_probs", "mean_logits", "max_logit")},
}
LOSSES = SUMMED | PER_TOKEN
CONSTANT = ("mean_logits", "max_logit")


def logits_of(t):
    x = F.linear(t["hidden"], t["weight"], t["bias"]) + t["u"] @ t["B"].T
    return SOFTCAP * torch.tanh(SCALE * x / SOFTCAP)


def lazy(t, group=None):
    low_rank = (t["u"], t["B"])
    return LinearLogits(
        t["hidden"], t["weight"], t["bias"], low_rank=low_rank, scale=SCALE, softcap=SOFTCAP, group=group
    )


def gradients(loss, z_of, tensors, x, **of):
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    value = loss(z_of(leaves), x, **of)
    if value.requires_grad:
        upstream = x["upstream"][: value.numel()].reshape(-1)[: value.numel()].view(value.shape).to(value.dtype)
        (value * upstream).sum().backward()
    return {"loss": value.detach()} | {name: t.grad for name, t in leaves.items() if t.grad is not None}


# (losses, dtype, head or logits, settings)
FORWARD = "gradients_in_forward"
CASES = [
    *((name, torch.float64, "head", {}) for name in LOSSES),
    *((name, torch.float64, "logits", {}) for name in LOSSES),
    *((name, torch.float64, "head", {"route": FORWARD, "workspace": 1}) for name in SUMMED),  # several chunks
    *((name, torch.float64, "head", {"route": "recompute", "workspace": 1}) for name in SUMMED),
    *((name, torch.float64, "head", {"route": FORWARD, "workspace": 1, "drop_ignored": False}) for name in SUMMED),
    *((name, torch.float32, "head", {}) for name in LOSSES),
    *((name, torch.bfloat16, "head", {"backend": "torch"}) for name in LOSSES),
    *((name, torch.float16, "head", {"route": FORWARD, "workspace": 1, "backend": "torch"}) for name in SUMMED),
    *((name, torch.float32, "logits", {"backend": "triton"}) for name in ("weighted", "none", "entropy")),
    *((name, torch.float32, "head", {"backend": "triton"}) for name in ("weighted", "none", "log_sum_sq_probs")),
    *((name, torch.float16, "head", {"backend": "triton"}) for name in ("token_loss", "none", "several_ids")),
]


def of_shard(tensors, x, part):
    mine = {name: t[part] if name in ("weight", "bias", "B") else t for name, t in tensors.items()}
    return mine, x | {"probabilities": x["probabilities"][:, part]}


def runs(ranks, split, number):
    """Not every case: the interpreter is slow, and 4 processes are many for 2 cores."""
    _, dtype, kind, options = CASES[number]
    if options.get("backend") == "triton":
        return (ranks, split) == (2, "uneven")
    if ranks == 2:
        return split != "even" or dtype == torch.float64
    return split != "even" and dtype == torch.float64 and (kind == "head" or split == "uneven")


def found_on_a_rank(device, ranks):
    rank = dist.get_rank()
    found = {}
    for split, starts in SPLITS[ranks].items():
        start, stop = (*starts, V)[rank : rank + 2]
        group = VocabParallel(dist.group.WORLD, (start, stop), V)
        for number, (name, dtype, kind, options) in enumerate(CASES):
            if not runs(ranks, split, number):
                continue
            tensors, x = ({n: t.to(device) for n, t in of.items()} for of in inputs(dtype))
            mine, x = of_shard(tensors, x, slice(start, stop))
            with within(options):
                if kind == "head":
                    z_of, of = functools.partial(lazy, group=group), {}
                else:
                    z_of, of = logits_of, {"group": group}
                try:
                    found[split, number] = gradients(LOSSES[name], z_of, mine, x, **of)
                except Exception as error:
                    raise AssertionError(f"{split}, {CASES[number]}") from error
    return found


@functools.cache
def on_ranks(count):
    return run(found_on_a_rank, count, count)


@functools.cache
def on_one_process(number):
    """What eager PyTorch finds in the case's dtype, and in float64 from the same inputs."""
    name, dtype, _, _ = CASES[number]
    loss = functools.partial(LOSSES[name])
    tensors, x = inputs(dtype)

    def of(dtype):
        def to(values):
            return {n: t.to(dtype) if t.is_floating_point() else t for n, t in values.items()}

        with settings.backend("torch"):
            return gradients(loss, logits_of, to(tensors), to(x))

    return of(dtype), of(torch.float64)


@needs_ranks
@pytest.mark.parametrize(
    ("count", "split", "number"),
    [
        pytest.param(*which, id="-".join([str(which[0]), which[1], *map(str, CASES[which[2]])]))
        for which in itertools.product((2, 4), SPLITS[2], range(len(CASES)))
        if runs(*which)
    ],
)
def test_equals_one_process(count, split, number):
    name, dtype, kind, _ = CASES[number]
    eager, exact = on_one_process(number)
    found = [of_rank[split, number] for of_rank in on_ranks(count)]
    starts = (*SPLITS[len(found)][split], V)
    whole = dict(found[0])
    for rank, of_rank in enumerate(found):
        for shared in ("loss", *(() if kind == "logits" else ("hidden", "u"))):
            if shared in of_rank:
                assert torch.equal(of_rank[shared], found[0][shared]), f"{shared} differs between ranks 0 and {rank}"
    if kind == "logits":  # each rank's own autograd saw its columns only
        for partial in ("hidden", "u"):
            if partial in whole:
                whole[partial] = sum(of_rank[partial].double() for of_rank in found).to(dtype)
    for split_up in ("weight", "bias", "B"):
        if split_up in whole:
            sizes = [len(of_rank[split_up]) for of_rank in found]
            assert sizes == [b - a for a, b in itertools.pairwise(starts)]
            whole[split_up] = torch.cat([of_rank[split_up] for of_rank in found])
    assert (name in CONSTANT) == (set(whole) == {"loss"})
    for tensor, value in whole.items():
        yardstick = eager[tensor] if tensor != "loss" else eager[tensor].to(value.dtype)
        if dtype == torch.float64:
            torch.testing.assert_close(value, exact[tensor], msg=lambda m, tensor=tensor: f"{tensor}: {m}")
        else:
            assert_accurate(value, yardstick, exact[tensor], f"{name} {tensor}")


def other_answers(device, ranks):
    rank = dist.get_rank()
    tensors, x = ({n: t.to(device) for n, t in of.items()} for of in inputs(torch.float64))
    start, stop = (*SPLITS[ranks]["uneven"], V)[rank : rank + 2]
    mine, _ = of_shard(tensors, x, slice(start, stop))
    z = lazy(mine, VocabParallel(dist.group.WORLD, (start, stop), V))
    whole = logits_of(tensors)
    for ours, theirs in (
        (z.argmax(-1), whole.argmax(-1)),
        (z.argmin(-1), whole.argmin(-1)),
        (z.topk(30, -1).indices, whole.topk(30, -1).indices),
        (
            fused_losses.token_statistics(z, x["target"], ("is_top1",)).is_top1,
            whole.argmax(-1) == x["target"],
        ),
    ):
        assert torch.equal(ours, theirs)
    assert z.shape == (N, V)
    assert z.vocab_range == z[3:5].vocab_range == (start, stop)
    for ours, theirs in (
        (z.max(-1).values, whole.max(-1).values),
        (z[:, torch.tensor([3, 40], device=device)], whole[:, [3, 40]]),
        (z.gather(-1, x["ids"].clamp(min=0)), whole.gather(-1, x["ids"].clamp(min=0))),
        (z.log_softmax(-1).mean(-1), whole.log_softmax(-1).mean(-1)),
        (z.sum(-1), whole.sum(-1)),
        ((z + 2).sum(-1), (whole + 2).sum(-1)),
        (z.logsumexp(-1), whole.logsumexp(-1)),
    ):
        torch.testing.assert_close(ours, theirs)

    def by_mean(s):
        return s.log_probs * s.mean_logits + s.is_top1

    trained = mine | {"hidden": tensors["hidden"].clone().requires_grad_()}
    ours, theirs = (
        fused_losses.token_loss(by_mean, logits, x["target"], statistics=("log_probs", "mean_logits", "is_top1"))[0]
        for logits in (lazy(trained, VocabParallel(dist.group.WORLD, (start, stop), V)), whole)
    )
    torch.testing.assert_close(ours.detach(), theirs)

    # Padding: a shard may hold rows beyond its ids; they are never read.
    per_rank = 16 if ranks == 4 else 32
    padded = {name: F.pad(tensors[name].T, (0, per_rank * ranks - V), value=torch.nan).T for name in ("weight", "B")}
    padded["bias"] = F.pad(tensors["bias"], (0, per_rank * ranks - V), value=torch.nan)
    part = slice(rank * per_rank, (rank + 1) * per_rank)
    mine = tensors | {name: t[part].clone().requires_grad_() for name, t in padded.items()}
    z = lazy(mine, VocabParallel(dist.group.WORLD, vocab_size=V))
    torch.testing.assert_close(z.logsumexp(-1), whole.logsumexp(-1))
    z.logsumexp(-1).sum().backward()
    kept = max(0, min(V - rank * per_rank, per_rank))
    assert mine["weight"].grad[kept:].eq(0).all()
    assert kept == 0 or mine["weight"].grad[:kept].ne(0).all()
    shard = F.pad(whole, (0, per_rank * ranks - V), value=torch.nan)[:, part]
    padding = VocabParallel(dist.group.WORLD, vocab_size=V)
    torch.testing.assert_close(
        fused_losses.cross_entropy(shard, x["target"], group=padding), F.cross_entropy(whole, x["target"])
    )
    torch.testing.assert_close(
        fused_losses.selective_log_softmax(shard, x["target"], group=padding),
        fused_losses.selective_log_softmax(whole, x["target"]),
    )

    # Equal shards need no more than the group.
    even = VocabParallel(dist.group.WORLD).shard(rows=5)
    assert (even.start, even.stop, even.vocab) == (5 * rank, 5 * rank + 5, 5 * ranks)

    # A nan in an ignored token reaches nothing, also where ignored tokens are projected.
    for drop in (True, False):
        leaves = {name: t.clone() for name, t in of_shard(tensors, x, slice(start, stop))[0].items()}
        leaves["hidden"][::9] = torch.nan
        for t in leaves.values():
            t.requires_grad_()
        with settings.drop_ignored(drop):
            loss = F.cross_entropy(lazy(leaves, VocabParallel(dist.group.WORLD, (start, stop), V)), x["target"])
            loss.backward()
        assert loss.isfinite()
        assert all(t.grad.isfinite().all() for t in leaves.values())
        assert leaves["hidden"].grad[::9].eq(0).all()
    return True


@needs_ranks
@pytest.mark.parametrize("ranks", [2, 4])
def test_other_answers(ranks):
    assert all(run(other_answers, ranks, ranks))


def bytes_sent(device):
    """The bytes that a rank sends, by collective, for vocabularies of different sizes."""
    sent = {}
    for vocab in (V, 8 * V):
        for name in ("mean", "none", "token_loss"):
            for dtype in (torch.bfloat16, torch.float32):
                tensors, x = ({n: t.to(device) for n, t in of.items()} for of in inputs(dtype, vocab))
                half = vocab // 2
                mine, x = of_shard(tensors, x, slice(dist.get_rank() * half, (dist.get_rank() + 1) * half))
                with collectives() as sent[vocab, name, dtype]:
                    gradients(LOSSES[name], functools.partial(lazy, group=dist.group.WORLD), mine, x)
    return sent


@needs_ranks
def test_bytes_on_the_wire_do_not_depend_on_the_vocabulary():
    kept = N - len(range(0, N, 9))
    header = 8 * 8
    forward = {"mean": 2 * 8, "none": 4 * 8, "token_loss": 3 * 8}  # float64 numbers per token
    for sent in run(bytes_sent, 2):
        for (vocab, name, dtype), calls in sent.items():
            assert calls == sent[V, name, dtype], f"{name} {dtype}: {vocab} entries"
            gathered = [size for what, size in calls if "gather" in what]
            assert gathered == [header, kept * forward[name]], name
            reduced = [size for what, size in calls if what == "all_reduce"]
            assert sorted(reduced) == [kept * R * 4, kept * H * 4], name  # fp32, d_u and d_hidden
            assert len(calls) == 4, calls


def bad_ranges(device):
    rank, group = dist.get_rank(), dist.group.WORLD
    hidden, weight, target = torch.randn(4, H), torch.randn(5, H), torch.tensor([0, 1, 2, 3])
    messages = []
    for ranges, size in (
        ([(0, 5), (4, 9)], 9),
        ([(0, 5), (6, 10)], 10),
        ([(0, 5), (5, 9)], 10),
        ([(5, 10), (0, 5)], 10),
    ):
        with pytest.raises(ValueError, match="consecutive parts") as error:
            F.cross_entropy(LinearLogits(hidden, weight, group=VocabParallel(group, ranges[rank], size)), target)
        messages.append(str(error.value))
    with pytest.raises(ValueError, match="holds 5 rows"):
        LinearLogits(hidden, weight, group=VocabParallel(group, (0, 7), 10))
    with pytest.raises(ValueError, match="holds 5 rows"):
        LinearLogits(hidden, weight, group=VocabParallel(group, (6, 4), 10))
    with pytest.raises(ValueError, match="vocab_size"):
        LinearLogits(hidden, weight, group=VocabParallel(group, (0, 5)))
    logits = LinearLogits(hidden, weight, group=group)
    with pytest.raises(NotImplementedError, match="gather the head"):
        logits.materialize()
    with pytest.raises(NotImplementedError, match="gather the head"), pytest.warns(UserWarning, match="materialis"):
        logits.cos()
    with pytest.raises(ValueError, match="knows the group"):
        fused_losses.token_statistics(logits, target, group=group)
    with pytest.raises(ValueError, match="class indices or probabilities"):
        fused_losses.cross_entropy(torch.randn(4, 5), target.float(), group=group)
    leaf = hidden.double().requires_grad_()
    loss = fused_losses.token_statistics(LinearLogits(leaf, weight.double(), group=group), target).log_probs.sum()
    (d_hidden,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert d_hidden.ne(0).all()
    with pytest.raises(RuntimeError, match="gather the vocabulary"):
        torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="gather the vocabulary"):
        torch.func.grad(lambda h: F.cross_entropy(LinearLogits(h, weight, group=group), target))(hidden)
    with pytest.raises(IndexError, match="out of bounds for 10"):
        F.cross_entropy(logits, target + 8)
    with pytest.raises(ValueError, match=r"got \(4, 10\) .* of a shared vocabulary, of this rank's 5"):
        F.cross_entropy(logits, torch.rand(4, 10))
    return messages


@needs_ranks
@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="device-side assertions end the process")
def test_a_bad_shard_is_an_error_on_every_rank():
    first, second = run(bad_ranges, 2)
    assert first == second
    assert "(0, 5), (4, 9)" in first[0]


def different_calls(device):
    """The error that each rank raises where the ranks call differently."""
    rank = dist.get_rank()
    tensors, x = inputs(torch.float64)
    mine, _ = of_shard(tensors, x, slice(rank * V // 2, (rank + 1) * V // 2))
    leaves = {name: t.clone().requires_grad_() for name, t in mine.items()}
    frozen = leaves | {"hidden": mine["hidden"]}, leaves | {"u": mine["u"]}
    z, target = lazy(leaves, dist.group.WORLD), x["target"]
    masked, others = target.clone(), target.clone()
    masked[3], others[3] = -100, (target[3] + 1) % (V // 2)  # rank 0 holds both
    exists = logits_of(leaves)
    whole = functools.partial(fused_losses.cross_entropy, group=dist.group.WORLD)
    cases = {
        "route": [functools.partial(F.cross_entropy, z, target)] * 2,
        "workspace": [functools.partial(F.cross_entropy, z, target)] * 2,
        "tokens": [functools.partial(F.cross_entropy, z[: N - r], target[: N - r]) for r in range(2)],
        "mask": [functools.partial(F.cross_entropy, z, ids) for ids in (target, masked)],
        "ids": [functools.partial(F.cross_entropy, z, ids) for ids in (target, others)],
        "ids of logits": [functools.partial(whole, exists, ids) for ids in (target, others)],
        "statistics": [functools.partial(statistic(name), z, x) for name in ("entropy", "logsumexp")],
        "hidden": [functools.partial(F.cross_entropy, lazy(t, dist.group.WORLD), target) for t in (leaves, frozen[0])],
        "u": [functools.partial(F.cross_entropy, lazy(t, dist.group.WORLD), target) for t in (leaves, frozen[1])],
        "head": [functools.partial(F.cross_entropy, z, target), functools.partial(whole, exists, target)],
        "size": [functools.partial(fused_losses.divergence, z, z.detach())] * 2,
    }
    cases["teacher"] = [functools.partial(fused_losses.divergence, z, t) for t in (z / 2, z.detach() / 2)]
    # Here only one rank trains its rows, or its columns of logits that exist: the gradient needs numbers from all ranks.
    rows = [leaves | {"hidden": mine["hidden"], "u": mine["u"]}, mine]
    cases["weight"] = [functools.partial(fused_losses.divergence, lazy(t, dist.group.WORLD), z.detach()) for t in rows]
    columns, group = exists.detach(), {"group": dist.group.WORLD}
    cases["columns"] = [
        functools.partial(fused_losses.divergence, columns.clone().requires_grad_(r == 0), columns, **group)
        for r in range(2)
    ]
    cases["labels"] = [functools.partial(fused_losses.distillation_loss, z, z.detach(), x) for x in (target, others)]
    cases["size"][1] = functools.partial(fused_losses.divergence, z[1:], z[1:].detach())
    different = {
        "route": [{"route": FORWARD}, {"route": "recompute"}],
        "workspace": [{"route": FORWARD}, {"route": FORWARD, "workspace": 1}],
    }
    found = {}
    for name, calls in cases.items():
        with within(different.get(name, [{}, {}])[rank]), pytest.raises(ValueError, match="must call alike") as error:
            calls[rank]()
        found[name] = str(error.value).split("rank by rank, ")[1]
    found["topk"] = lazy(rows[rank], dist.group.WORLD).topk(2).values.detach()  # only rank 0 trains its rows
    # A different slice of the vocabulary in backward does not change what is sent.
    with within({"route": "recompute", "workspace": (None, 1)[rank]}):
        found["d_hidden"] = gradients(ce, functools.partial(lazy, group=dist.group.WORLD), mine, x)["hidden"]
    return found


@needs_ranks
@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="device-side assertions end the process")
def test_ranks_that_call_differently_are_told_so():
    first, second = run(different_calls, 2)
    assert torch.equal(first.pop("topk"), second.pop("topk"))
    d_hidden = first.pop("d_hidden"), second.pop("d_hidden")
    assert torch.equal(*d_hidden)
    torch.testing.assert_close(d_hidden[0], gradients(ce, logits_of, *inputs(torch.float64))["hidden"])
    assert first == second
    kept = N - len(range(0, N, 9))
    assert first["route"] == f"routes ['{FORWARD}', 'recompute']"
    assert f"tokens of a chunk [{kept}, " in first["workspace"]
    assert f"tokens of a chunk [{kept}, {kept - 1}]" in first["tokens"]
    assert f"tokens of a chunk [{kept}, {kept - 1}]" in first["mask"]
    assert first["ids"].startswith("sums of the ids [")
    assert first["ids of logits"].startswith("sums of the ids [")
    assert first["statistics"].startswith("numbers to exchange [")
    assert first["hidden"] == "what of hidden and u wants a gradient ['hidden, u', 'u']"
    assert first["u"] == "what of hidden and u wants a gradient ['hidden, u', 'hidden']"
    assert "of a head [True, False]" in first["head"]
    wanted = "['hidden, u, of the teacher hidden, of the teacher u', 'hidden, u']"
    assert first["teacher"].startswith(f"what of hidden and u wants a gradient {wanted}")
    assert first["weight"] == first["columns"] == "whether the student wants any [True, False]"
    assert first["size"].startswith(f"tokens of a chunk [{N}, {N - 1}]")
    assert first["labels"].startswith("sums of the ids [")


def one_rank_raises(device):
    hidden, weight, target = torch.randn(4, H), torch.randn(5, H), torch.tensor([0, 1, 2, 3])
    if dist.get_rank() == 1:
        target[0] = 99
    begin = time.monotonic()
    with pytest.raises(Exception) as error:
        F.cross_entropy(LinearLogits(hidden, weight, group=dist.group.WORLD), target)
    return repr(error.value), time.monotonic() - begin


@needs_ranks
@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="a GPU reports a bad id at its next synchronisation")
def test_a_rank_that_raises_ends_the_others():
    found = run(one_rank_raises, 4, together=False)
    assert "out of bounds for 20 classes" in found[1][0]
    for rank, (error, seconds) in enumerate(found):
        assert rank == 1 or "RuntimeError" in error, error
        assert seconds < TIMEOUT.total_seconds() / 2


@pytest.mark.parametrize("hole", [False, True], ids=["finite", "minus_infinity"])
def test_parts_of_a_row_make_the_whole(hole):
    """The merge itself, without processes."""
    z = torch.randn(9, 30, dtype=torch.float64) * 4
    if hole:
        z[:5, :10] = -torch.inf  # a whole part of some rows
        z[5:, 3] = -torch.inf
    ids = torch.randint(0, 30, (9, 2))
    z[7:, [4, 20]], ids[7:, 0] = 40.0, torch.tensor([4, 20])  # of equal maxima in two parts, the first is top1
    names = ["entropy", "log_sum_sq_probs", "max_logit", "is_top1", "sum_log_probs"]
    exact = row_statistics(z, ids, None, names)
    assert exact.is_top1[7:].tolist() == [True, False]
    parts = []
    for part in (slice(0, 10), slice(10, 11), slice(11, 30)):
        mine = (ids >= part.start) & (ids < part.stop)
        local = torch.where(mine, ids - part.start, part.stop - part.start)
        found = row_statistics(z[:, part], local, None, names)._asdict()
        found["log_probs"] = found["log_probs"].masked_fill(~mine, -torch.inf)
        found["weight_sum"] = torch.full((9,), part.stop - part.start, dtype=torch.float64)
        parts.append({name: t.double() for name, t in found.items() if t is not None})
    whole = _whole({name: torch.stack([p[name] for p in parts]) for name in parts[0]})
    for name, value in exact._asdict().items():
        if value is not None:
            torch.testing.assert_close(whole[name], value.double(), msg=lambda m, name=name: f"{name}: {m}")


def peaks_on_a_rank(device, dtype):
    """The planned peak, the measured one and the bound, for each number of ignored tokens."""
    N, rows, H, room = 4096, 2048, 512, 16 * MiB
    hidden, weight = (torch.randn(n, H, dtype=dtype, device=device).requires_grad_() for n in (N, rows))
    found = []
    for ignored in (0, 2048):
        target = torch.randint(0, rows * dist.get_world_size(), (N,), device=device)
        dist.broadcast(target, 0)
        target[:ignored] = -100

        def call(target=target):
            with workspace(room):
                loss = F.cross_entropy(LinearLogits(hidden, weight, group=dist.group.WORLD), target)
            return torch.autograd.grad(loss, (hidden, weight))

        backend = "triton" if device.type == "cuda" else "torch"
        planned = plan(N - ignored, rows, H, dtype, ignored=ignored, shared=True, workspace=room, backend=backend)
        found.append((planned.peak, peak_bytes(call, device.type), hidden.nbytes + weight.nbytes + room))
    return found


@needs_ranks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peaks_are_as_planned(dtype):
    for of_rank in run(peaks_on_a_rank, 2, dtype):
        for planned, peak, bound in of_rank:
            assert abs(peak - planned) <= 0.05 * planned, (peak / MiB, planned / MiB)
            assert peak <= bound, (peak / MiB, bound / MiB)
