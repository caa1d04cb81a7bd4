"""A shared vocabulary where something is missing, padded, copied, moved or cut twice: every rank gets what one process gets."""

import copy
import functools
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import needs_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import fused_losses
from fused_losses import LinearLogits, VocabParallel, linear_cross_entropy
from fused_losses.bench.ranks import run

pytestmark = pytest.mark.xdist_group("vocab_parallel_edges")  # its processes are started once
N, V, H = 14, 12, 6


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def targets(*shape, vocab=V):
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(7))


OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.2}

# Each case: (tensors that all ranks hold, tensors of which each holds its part of a dimension, loss).


def with_class_weights(whole, shared, **of):
    return linear_cross_entropy(
        whole["hidden"], shared["weight"], shared["target"], weight=whole["classes"], softcap=3.0, **OPTIONS, **of
    )


def of_tokens(whole, shared, **of):
    """With options that differ by token."""
    per_token = randn(N, seed=8).abs() + 0.5
    loss, found = linear_cross_entropy(
        whole["hidden"], shared["weight"], targets(N), linear_bias=shared["bias"], scale=0.7, temperature=per_token,
        token_weights=per_token, return_statistics=True, **OPTIONS, **of,
    )  # fmt: skip
    return loss + (found.logsumexp * found.is_top1 + found.log_probs).sum()


def of_logits(whole, shared, **of):
    """Logits that exist, with a softcap and all options, for probabilities and for classes."""
    logits, classes = shared["logits"], whole["classes"]
    soft = fused_losses.cross_entropy(logits, shared["target"], classes, softcap=3.0, **OPTIONS, **of)
    loss, found = fused_losses.cross_entropy(
        logits, targets(N), classes.detach(), softcap=2.0, return_statistics=True, **OPTIONS, **of
    )
    return soft + loss + (found.logsumexp * found.is_top1 + found.log_probs).sum()


def in_k_dimensions(whole, shared, **of):
    return linear_cross_entropy(whole["hidden"], shared["weight"], targets(N, 3), linear_bias=shared["bias"], **of)


def without_tokens(whole, shared, **of):
    return linear_cross_entropy(whole["hidden"][:0], shared["weight"], shared["target"][:0], reduction="sum", **of)


def all_ignored(whole, shared, **of):
    ids = targets(N) * 0 - 100
    return linear_cross_entropy(whole["hidden"], shared["weight"], ids, reduction="sum", workspace=1, **of)


def ignored_log_probs(whole, shared, **of):
    logits = LinearLogits(whole["hidden"], shared["weight"], **of)
    return fused_losses.selective_log_softmax(logits, targets(N) * 0 - 100).sum()


def below_zero(whole, shared, **of):
    logits = LinearLogits(whole["hidden"], shared["weight"], shared["bias"] - 50, **of)
    ids = targets(N)
    ids[::2] = logits.argmax(-1)[::2]
    found = fused_losses.token_statistics(logits, ids, ("log_probs", "max_logit", "is_top1"))
    return (found.log_probs * found.is_top1 + found.max_logit).sum()


HEAD = {"hidden": (N, H)}, {"weight": ((V, H), 0), "target": ((N, V), 1)}
CASES = {
    "class weights": ({"hidden": (N, H), "classes": (V,)}, HEAD[1], with_class_weights),
    "logits": ({"classes": (V,)}, {"logits": ((N, V), 1), "target": ((N, V), 1)}, of_logits),
    "tokens": ({"hidden": (N, H)}, {"weight": ((V, H), 0), "bias": ((V,), 0)}, of_tokens),
    "K dimensions": ({"hidden": (N, H)}, {"weight": ((V, 3, H), 0), "bias": ((V, 3), 0)}, in_k_dimensions),
    "logits below zero": ({"hidden": (N, H)}, {"weight": ((V, H), 0), "bias": ((V,), 0)}, below_zero),
    "no tokens": (*HEAD, without_tokens),
    "all ignored": (*HEAD, all_ignored),
    "log-probabilities, all ignored": (*HEAD, ignored_log_probs),
}
SPLITS = {"uneven": (0, 5, V), "empty": (0, V, V)}


def gradients(case, part=slice(None), **of):
    whole, shared, loss = CASES[case]
    whole = {name: randn(*shape, seed=i).requires_grad_() for i, (name, shape) in enumerate(whole.items())}
    shared = {
        name: randn(*shape, seed=10 + i).movedim(dim, 0)[part].movedim(0, dim).clone().requires_grad_()
        for i, (name, (shape, dim)) in enumerate(shared.items())
    }
    value = loss(whole, shared, **of)
    value.backward()
    return value.detach(), {n: t.grad for n, t in whole.items()}, {n: t.grad for n, t in shared.items()}


def cases_on_a_rank(device):
    found = {}
    for split, cuts in SPLITS.items():
        start, stop = cuts[dist.get_rank() :][:2]
        for case in CASES:
            group = VocabParallel(dist.group.WORLD, (start, stop), V)
            found[split, case] = gradients(case, slice(start, stop), group=group)
    return found


@functools.cache
def cases_on_ranks():
    return run(cases_on_a_rank, 2)


@needs_ranks
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("case", CASES)
def test_equals_one_process(case, split):
    value, whole, shared = gradients(case)
    of_ranks = [found[split, case] for found in cases_on_ranks()]
    for name, (_, dim) in CASES[case][1].items():
        parts = [of_rank[2][name] for of_rank in of_ranks]
        if shared[name] is None:
            assert parts == [None, None]
        else:
            torch.testing.assert_close(torch.cat(parts, dim), shared[name], msg=lambda m, n=name: f"{n}: {m}")
    for of_rank in of_ranks:
        torch.testing.assert_close(of_rank[0], value)
        for name, expected in whole.items():
            torch.testing.assert_close(of_rank[1][name], expected, msg=lambda m, n=name: f"{n}: {m}")
    if "classes" in whole:
        assert whole["classes"].ne(0).all()


def answers(device):
    rank, group = dist.get_rank(), dist.group.WORLD
    hidden, weight, ids = randn(3, 4, H), randn(V, H, seed=1), targets(3, 4)
    z, x = LinearLogits(hidden, weight.chunk(2)[rank], group=group), F.linear(hidden, weight)
    same = torch.testing.assert_close
    same(z[..., 9], x[..., 9])
    same(z[:, -1, 2], x[:, -1, 2])
    same(z.select(-1, -2), x[..., -2])
    for other in (copy.deepcopy(z), pickle.loads(pickle.dumps(z)), copy.copy(z[1:])):
        assert other.vocab_range == z.vocab_range
        same(other.logsumexp(-1), x[-len(other) :].logsumexp(-1))
        assert torch.equal(other.argmax(-1), x[-len(other) :].argmax(-1))
    # Entries of −inf still count as entries, and a shard has fewer entries than are asked for.
    bias = torch.zeros(V, dtype=torch.float64).index_fill_(0, torch.tensor([0, 7]), -torch.inf)
    holed = LinearLogits(hidden, weight.chunk(2)[rank], bias.chunk(2)[rank], group=group)
    for largest in (True, False):
        values, found = holed.topk(V, -1, largest)
        assert torch.equal(found.sort(-1).values, torch.arange(V).expand(3, 4, V))
        same(values, (x + bias).topk(V, -1, largest).values)
    found = fused_losses.teacher_topk((x + bias).chunk(2, -1)[rank], V, group=group).ids
    assert torch.equal(found.sort(-1).values, torch.arange(V).expand(3, 4, V))
    for backend in ("eager", "aot_eager"):
        leaf, shard = hidden.clone().requires_grad_(), weight.chunk(2)[rank].clone().requires_grad_()

        def loss(leaf, shard):
            z = LinearLogits(leaf, shard, group=group)
            entropy = fused_losses.token_statistics(z, outputs=("entropy",)).entropy.sum()
            return entropy + linear_cross_entropy(leaf, shard, ids, group=group)

        torch.compile(loss, backend=backend, fullgraph=True)(leaf, shard).backward()
        one, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        p = F.linear(one, head).log_softmax(-1)
        (F.nll_loss(p.mT, ids) - (p.exp() * p).sum()).backward()
        same(leaf.grad, one.grad)
        same(shard.grad, head.grad.chunk(2)[rank])

    loss = fused_losses.CrossEntropyLoss(label_smoothing=0.1, group=group)
    same(loss(x.flatten(0, 1).chunk(2, 1)[rank], ids.flatten()), F.cross_entropy(x.mT, ids, label_smoothing=0.1))

    mine = x.flatten(0, 1).chunk(2, 1)[rank].clone().requires_grad_()
    fused_losses.cross_entropy(mine, ids.flatten(), inplace_backward=True, group=group).backward()
    one = x.flatten(0, 1).requires_grad_()
    F.cross_entropy(one, ids.flatten()).backward()
    same(mine.grad, one.grad.chunk(2, 1)[rank])
    assert mine.grad.data_ptr() == mine.data_ptr()

    # main_grad and class probabilities are padded as the head is.
    padding = VocabParallel(group, vocab_size=V - 2)
    shard, main_grad = weight.chunk(2)[rank].requires_grad_(), torch.zeros(V // 2, H, dtype=torch.float64)
    probabilities = F.pad(randn(3, 4, V - 2, seed=2).softmax(-1), (0, 2), value=torch.nan)
    small, small_ids, bias = weight[:-2].detach().requires_grad_(), ids.clamp(max=V - 3), randn(V, seed=3)
    mine = bias.chunk(2)[rank].clone().requires_grad_()
    linear_cross_entropy(hidden, shard, small_ids, linear_bias=mine, group=padding, main_grad=main_grad).backward()
    bias.requires_grad_()
    F.cross_entropy(F.linear(hidden, small, bias[:-2]).mT, small_ids).backward()
    same(main_grad, F.pad(small.grad, (0, 0, 0, 2)).chunk(2)[rank])
    same(mine.grad, bias.grad.chunk(2)[rank])
    expected = F.cross_entropy(x[..., :-2].flatten(0, 1), probabilities[..., :-2].flatten(0, 1))
    mine = probabilities.chunk(2, -1)[rank]
    same(linear_cross_entropy(hidden, shard, mine, group=padding).detach(), expected)
    logits = F.pad(x[..., :-2], (0, 2), value=torch.nan).chunk(2, -1)[rank].flatten(0, 1)
    same(fused_losses.cross_entropy(logits, mine.flatten(0, 1), group=padding), expected)

    with pytest.raises(ValueError, match="cannot be the ids"):
        LinearLogits(hidden, weight[:0], group=group)
    return True


@needs_ranks
def test_answers_and_copies():
    assert run(answers, 2) == [True, True]


@needs_ranks
def test_a_teacher_sends_no_padding(one_rank):
    hidden, weight, group = randn(N, H), randn(V, H, seed=1), VocabParallel(dist.group.WORLD, vocab_size=V - 2)
    expected = fused_losses.teacher_topk(F.linear(hidden, weight[: V - 2]), 3)
    weight[V - 2 :] = torch.nan
    for sent in (
        fused_losses.teacher_topk(F.linear(hidden, weight), 3, group=group),
        fused_losses.teacher_topk(LinearLogits(hidden, weight, group=group), 3),
    ):
        torch.testing.assert_close(sent, expected)


def subgroup(device):
    """Ranks 1 and 3 share the vocabulary."""
    hidden, weight = randn(5, H), randn(V, H, seed=1)
    group = dist.new_group([1, 3])
    if dist.get_rank() not in (1, 3):
        for which in (group, VocabParallel(group, (0, 3), V)):
            with pytest.raises(ValueError, match=f"rank {dist.get_rank()}, is not in the group"):
                LinearLogits(hidden, weight[:3], group=which)
        return None
    at = dist.get_group_rank(group, dist.get_rank())
    leaf = hidden.clone().requires_grad_()
    F.cross_entropy(LinearLogits(leaf, weight.chunk(2)[at], group=group), targets(5)).backward()
    return leaf.grad


B, S, TOKENS = 4, 8, 32  # as many classes as tokens


def tokens_on_meshes(device):
    """The gradient of hidden states that are sharded by tokens, and of class weights, on meshes of one and two dimensions."""
    hidden, weight, ids = randn(B, S, H), randn(TOKENS, H, seed=1), targets(B, S, vocab=TOKENS)
    factors = torch.linspace(-1, 1, B * S, dtype=torch.float64).view(B, S)
    line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))  # cpu, as the tensors are

    def compare(use, mesh, of_hidden, of_weight, whole=hidden, part=lambda t: t):
        leaf = distribute_tensor(whole, mesh, of_hidden).requires_grad_()
        head = distribute_tensor(weight, mesh, of_weight).requires_grad_()
        use(lambda: LinearLogits(leaf, head), part).backward()
        one, one_head = whole.clone().requires_grad_(), weight.clone().requires_grad_()
        use(lambda: F.linear(one, one_head), lambda t: t).backward()
        torch.testing.assert_close(leaf.grad.full_tensor(), one.grad)
        torch.testing.assert_close(head.grad.full_tensor(), one_head.grad)

    def log_probs(make, part):
        return (fused_losses.selective_log_softmax(make(), part(ids)) * part(factors)).sum()

    def rolled(times):
        def use(make, part):
            z = make()
            for _ in range(times):  # each frees the one before, and may reuse hidden's memory
                z = z.roll(1, 1)
            return log_probs(lambda: z, part)

        return use

    compare(rolled(2), line, [Shard(1)], [Shard(0)])
    compare(rolled(3), line, [Shard(1)], [Shard(0)])
    for cut in (Shard(0), Shard(1)):
        compare(log_probs, square, [cut, Replicate()], [Shard(0), Replicate()])
        compare(log_probs, square, [cut, cut], [Replicate(), Shard(0)], part=lambda t, d=cut.dim: half(t, d, square, 0))
        compare(log_probs, square, [cut, cut], [Shard(0), Replicate()], part=lambda t, d=cut.dim: half(t, d, square, 1))

    # Tokens split unevenly, with as many labels as an even split would have.
    some = ids[:, :6].clone()
    some[:, :2] = -100
    compare(lambda make, part: F.cross_entropy(make().mT, part(some)), line, [Shard(1)], [Shard(0)], hidden[:, :6])

    # A low-rank update whose input has other placements than hidden.
    u, B_of = randn(B, S, 3, seed=5), randn(TOKENS, 3, seed=6)
    for of_hidden, of_u in ((Shard(1), Replicate()), (Replicate(), Shard(1)), (Shard(0), Shard(1))):
        leaf, mine = (distribute_tensor(t, line, [p]).requires_grad_() for t, p in ((hidden, of_hidden), (u, of_u)))
        rows = distribute_tensor(B_of, line, [Shard(0)])
        z = LinearLogits(leaf, distribute_tensor(weight, line, [Shard(0)]), low_rank=(mine, rows))
        log_probs(lambda z=z: z, lambda t: t).backward()
        one, one_u = hidden.clone().requires_grad_(), u.clone().requires_grad_()
        log_probs(lambda one=one, u=one_u: F.linear(one, weight) + u @ B_of.T, lambda t: t).backward()
        torch.testing.assert_close(leaf.grad.full_tensor(), one.grad)
        torch.testing.assert_close(mine.grad.full_tensor(), one_u.grad)

    classes = randn(TOKENS, seed=3).requires_grad_()
    probabilities = randn(B * S, TOKENS, seed=4).softmax(-1)
    flat = distribute_tensor(hidden.flatten(0, 1), line, [Shard(0)]).requires_grad_()
    head = distribute_tensor(weight, line, [Shard(0)])
    mine = probabilities.chunk(4, 1)[dist.get_rank()]
    loss = linear_cross_entropy(flat, head, mine, weight=classes)
    loss.backward()
    one, one_classes = hidden.flatten(0, 1).clone().requires_grad_(), classes.detach().clone().requires_grad_()
    expected = F.cross_entropy(F.linear(one, weight), probabilities, weight=one_classes)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(flat.grad.full_tensor(), one.grad)
    torch.testing.assert_close(classes.grad, one_classes.grad)
    nothing = distribute_tensor(hidden[:0], line, [Shard(1)]).requires_grad_()
    z = LinearLogits(nothing, head)
    F.cross_entropy(z.mT, probabilities.new_zeros(0, TOKENS // 4, S), reduction="sum").backward()
    assert nothing.grad.shape == (0, S, H)
    with pytest.raises(ValueError, match="leave group="):
        linear_cross_entropy(flat, head, ids.flatten(), group=dist.group.WORLD)
    with pytest.raises(TypeError, match="or none of them"):
        linear_cross_entropy(hidden, head, ids)
    return True


def half(t, dim, mesh, at):
    return t.chunk(2, dim)[mesh.get_local_rank(at)]


def four_ranks(device):
    return subgroup(device), tokens_on_meshes(device)


@needs_ranks
def test_a_group_of_some_ranks_and_tokens_on_meshes():
    found = run(four_ranks, 4)
    leaf = randn(5, H).requires_grad_()
    F.cross_entropy(F.linear(leaf, randn(V, H, seed=1)), targets(5)).backward()
    for rank in (1, 3):
        torch.testing.assert_close(found[rank][0], leaf.grad)
    assert all(of_meshes for _, of_meshes in found)
