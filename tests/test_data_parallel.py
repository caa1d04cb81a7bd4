"""Batches spread unevenly over ranks, and sequences split over them, train as one process with the whole batch does."""

import contextlib
import functools
import itertools

import pytest
import torch
import torch.distributed as dist
from ranks import needs_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fused_losses import data_parallel, distillation, policy, preference, reward, sequences, sft
from fused_losses.aggregation import aggregate
from fused_losses.bench.ranks import run
from fused_losses.linear_head import LinearHead
from fused_losses.sequences import sequence_log_probs
from fused_losses.token_loss import token_loss
from fused_losses.token_statistics import selective_log_softmax

count_per_rank = data_parallel.count_per_rank
pytestmark = [needs_ranks, pytest.mark.xdist_group("data_parallel")]  # so that its processes are started once

STEPS, V, H, S = 3, 11, 6, 7
# The number of sequences in each rank's micro-batches: uneven, and the last rank of four has nothing to train on.
SHARES = {2: [(3, 1), (2, 2)], 4: [(1, 2), (2, 1), (1, 1), (0, 0)]}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(V, H, dtype=torch.float64)
        self.head = LinearHead(H, V, dtype=torch.float64, softcap=5.0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=g)

    def forward(self, ids):
        return self.head(torch.tanh(self.embed(ids)))


def batch(step):
    """Eight sequences of uneven lengths, one of them without a token that counts."""
    g = torch.Generator().manual_seed(100 + step)
    lengths = torch.tensor([6, 1, 3, 2, 5, 0, 4, 6])
    mask = torch.arange(1, S + 1) <= lengths.unsqueeze(1)
    ids = torch.randint(0, V, (8, S), generator=g)
    return {
        "ids": ids,
        "labels": ids.masked_fill(~torch.cat([torch.zeros(8, 1, dtype=torch.bool), mask[:, :-1]], 1), -100),
        "mask": mask,
        "old": torch.randn(8, S, dtype=torch.float64, generator=g) - 2.4,
        "ref": torch.randn(8, S, dtype=torch.float64, generator=g) / 3 - 2.4,
        "advantages": torch.randn(8, generator=g, dtype=torch.float64),
        "teacher": torch.randn(8, S, V, generator=g, dtype=torch.float64),
    }


def counts(data):
    """What the losses below are averaged over: labels, sequences with labels, tokens, sequences, sequences with tokens."""
    labels, mask = data["labels"][:, 1:] != -100, data["mask"]
    return torch.stack([labels.sum(), labels.any(1).sum(), mask.sum(), torch.tensor(len(mask)), mask.any(1).sum()])


def sft_tokens(logits, data, n):
    return sft.sft_loss(logits, data["labels"], num_items_in_batch=n[0])


def sft_dft(logits, data, n):
    return sft.sft_loss(logits, data["labels"], num_items_in_batch=n[0], loss_type="dft")


def sft_sequences(logits, data, n):
    return sft.sft_loss(logits, data["labels"], num_items_in_batch=n[1], average="sequence")


def any_cross_entropy(logits, data, n):
    shifted = sequences.shift_labels(data["labels"])
    return nn.functional.cross_entropy(logits.transpose(1, 2), shifted, reduction="sum") / n[0]


def any_token_loss(logits, data, n):
    index = data["ids"].masked_fill(~data["mask"], -100)
    return token_loss(lambda s: -s.log_probs.exp() * s.log_probs, logits, index)[0] / n[2]


def distilled(logits, data, n):
    labels = sequences.shift_labels(data["labels"])
    return distillation.distillation_loss(logits, data["teacher"], labels, num_items_in_batch=n[0])


def grpo(**options):
    """With KL and entropy, which are aggregated too."""

    def loss(logits, data, n):
        log_probs = selective_log_softmax(logits, data["ids"])
        logp = logits.log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        empty = options.get("count_empty", True)
        value, _ = policy.grpo_loss(
            log_probs, data["old"], data["advantages"], data["mask"], ref_log_probs=data["ref"], beta=0.1, entropy=entropy,
            entropy_coef=0.05, entropy_aggregation="token_mean", batch_num_tokens=n[2],
            global_batch_size=n[3] if empty else n[4], loss_scale_factor=S, **options,
        )  # fmt: skip
        return value

    return loss


def with_dp_size(aggregation):
    """As verl does it: counts summed over ranks, and the number of ranks."""

    def loss(logits, data, n):
        log_probs, ranks = selective_log_softmax(logits, data["ids"]), count_ranks()
        return aggregate(
            -log_probs * data["advantages"].unsqueeze(1), data["mask"], aggregation, batch_num_tokens=n[2] * ranks,
            global_batch_size=n[3] * ranks, dp_size=ranks, loss_scale_factor=S,
        )  # fmt: skip

    return loss


def values(logits, data, n):
    estimate = selective_log_softmax(logits, data["ids"])
    return policy.value_loss(estimate, data["old"], data["ref"], data["mask"], clip_eps=0.5, batch_num_tokens=n[2])[0]


def pairs(logits, data):
    """The tokens at even places of each sequence are its chosen answer, those at odd places its rejected one."""
    token_logps = selective_log_softmax(logits, data["ids"])
    places = torch.arange(S) % 2 == 0
    sides = data["mask"] & places, data["mask"] & ~places
    return [sequence_log_probs(x, side) for x in (token_logps, data["ref"]) for side in sides]


def dpo(logits, data, n):
    return preference.dpo_loss(*pairs(logits, data), reduction="sum")[0] / n[3]


def reward_model(logits, data, n):
    chosen, rejected, *_ = pairs(logits, data)
    if len(chosen) == 0:  # a mean over nothing is nan
        return logits.logsumexp(-1).sum()
    return reward.pairwise_reward_loss(chosen, rejected) * (len(chosen) / n[3])


def count_ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


LOSSES = {
    "sft": sft_tokens,
    "sft_dft": sft_dft,
    "sft_sequences": sft_sequences,
    "cross_entropy": any_cross_entropy,
    "token_loss": any_token_loss,
    "distillation": distilled,
    "value": values,
    "dpo": dpo,
    "reward": reward_model,
    **{
        loss_type: grpo(loss_type=loss_type)
        for loss_type in ("grpo", "dapo", "dr_grpo", "luspo", "gspo", "gmpo", "cispo")
    },
    "grpo_nonempty": grpo(loss_type="grpo", count_empty=False),
    **{
        f"verl {a}": with_dp_size(a)
        for a in ("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
    },
}


def micro_batches(data, shares):
    begin = 0
    for rank, share in enumerate(shares):
        for size in share:
            yield rank, {name: x[begin : begin + size] for name, x in data.items()}
            begin += size
    assert begin == len(data["ids"])


def parameters_of(model):
    return [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for p in model.parameters()]


def train(loss, wrap=None, device=None):
    """Two micro-batches a step on each rank, or the whole batch at once in a single process."""
    model = Model().to(device)
    wrapped = model if wrap is None else wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(STEPS):
        data = batch(step)
        if wrap is None:
            LOSSES[loss](model(data["ids"]), data, counts(data)).backward()
        else:
            mine = [x for rank, x in micro_batches(data, SHARES[count_ranks()]) if rank == dist.get_rank()]
            mine = [{name: x.to(device) for name, x in part.items()} for part in mine]
            n = count_per_rank(sum(counts({k: x.cpu() for k, x in part.items()}) for part in mine).to(device))
            for at, part in enumerate(mine):
                with synchronised(wrapped, at == len(mine) - 1):
                    LOSSES[loss](wrapped(part["ids"]), part, n).backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters_of(model)


def synchronised(model, last):
    if isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext() if last else model.no_sync()
    model.set_requires_gradient_sync(last)
    return contextlib.nullcontext()


def fsdp(model):
    fully_shard(model.head)
    return fully_shard(model)


WRAPS = {"ddp": DistributedDataParallel, "fsdp": fsdp}
TRAINED = [("ddp", loss) for loss in LOSSES] + [
    ("fsdp", loss) for loss in ("sft", "sft_dft", "token_loss", "distillation", "grpo")
]


# Sequences split over ranks


def split(x, rank, ranks, zigzag):
    """This rank's part of ``(B, S)``."""
    chunks = x.chunk(2 * ranks if zigzag else ranks, -1)
    return torch.cat([chunks[rank], chunks[-1 - rank]], -1) if zigzag else chunks[rank]


LENGTHS = [5, 1, 10, 3, 4, 9]  # of packed documents, 32 tokens in all: they end on and beside the borders of chunks


def layouts():
    whole = torch.arange(3 * 32).view(3, 32)
    documents = torch.arange(32).unsqueeze(0)
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).unsqueeze(0)
    rows = torch.cat([positions, positions.roll(4, 1), torch.arange(32).unsqueeze(0)])
    borders = torch.tensor([0, *LENGTHS]).cumsum(0)
    return {
        "rows": (whole, {}),
        "position_ids": (documents, {"position_ids": positions}),
        "rows of position_ids": (whole, {"position_ids": rows}),
        "cu_seqlens": (documents, {"cu_seqlens": borders.int()}),
        "cu_seqlens and a tail": (documents, {"cu_seqlens": borders[:-1]}),
        "cu_seqlens with an empty document": (documents, {"cu_seqlens": borders[[0, 1, 1, 2, 3, 4, 5, 6]]}),
        "one dimension": (documents[0], {"position_ids": positions[0]}),
    }


def shifted_parts(device, group):
    found = {}
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    with pytest.raises(ValueError, match=r"two chunks of equal length, got \(1, 3\)"):
        sequences.shift_labels(torch.zeros(1, 3, dtype=torch.long), context_group=group, zigzag=True)
    for (name, (labels, packing)), zigzag in itertools.product(layouts().items(), (False, True)):
        mine = {k: x if k == "cu_seqlens" else split(x, rank, ranks, zigzag) for k, x in packing.items()}
        labels = split(labels, rank, ranks, zigzag).to(device)
        mine = {k: x.to(device) for k, x in mine.items()}
        found[name, zigzag] = sequences.shift_labels(labels, -7, **mine, context_group=group, zigzag=zigzag)
    return found


CONTEXT = [
    {},
    {"loss_type": "dft"},
    {"average": "sequence"},
    {"position_ids": torch.cat([torch.arange(n) for n in (3, 9, 4)]).expand(4, -1)},
]


def context_batch(step):
    g = torch.Generator().manual_seed(step)
    ids = torch.randint(0, V, (4, 16), generator=g)
    kept = torch.rand(4, 16, generator=g) < torch.tensor([[0.9], [0.2], [0.5], [0.0]])
    return ids, ids.masked_fill(~kept, -100)


def context_loss(model, step, options, device, group=None, zigzag=False, replicas=1):
    """The loss of all sequences, or of the part of this replica's sequences that this rank holds."""
    ids, labels = context_batch(step)
    options = dict(options)
    if group is None:
        return sft.sft_loss(model(ids), labels, **options)
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    replica = dist.get_rank() // ranks

    def mine(x):
        return split(x.chunk(replicas)[replica], rank, ranks, zigzag).to(device)

    if "position_ids" in options:
        options["position_ids"] = mine(options["position_ids"])
    target = sequences.shift_labels(
        mine(labels), position_ids=options.get("position_ids"), context_group=group, zigzag=zigzag
    )
    if options.get("average") == "sequence":
        with_labels = (sequences.shift_labels(labels.chunk(replicas)[replica]) != -100).any(1).sum() / ranks
        n = count_per_rank(with_labels.to(device))
    else:
        n = count_per_rank((target != -100).sum())
    return sft.sft_loss(
        model(mine(ids)), mine(labels), num_items_in_batch=n, context_group=group, zigzag=zigzag, **options
    )


def train_context(options, device=None, **how):
    model = Model().to(device)
    wrapped = DistributedDataParallel(model) if how else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(STEPS):
        context_loss(wrapped, step, options, device, **how).backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters_of(model)


# Statistics over ranks


def answers(rank, ranks):
    """Uneven numbers of good and bad answers, and rows for the KL, of which every rank has the same number."""
    g = torch.Generator().manual_seed(7)
    chosen, rejected = torch.randn(2, ranks, 3, generator=g, dtype=torch.float64)
    kl = torch.rand(ranks, 2, generator=g, dtype=torch.float64)
    good, bad = [1, 3, 2, 0][:ranks], [2, 0, 1, 0][:ranks]
    which = range(ranks) if rank is None else [rank]
    return [torch.cat([x[r, :k] for r, k in zip(range(ranks), n, strict=True) if r in which]) for x, n in
            ((chosen, good), (rejected, bad), (kl, [2] * ranks))]  # fmt: skip


def kto(chosen, rejected, kl, scale, n):
    losses, *_ = preference.kto_loss(
        scale * chosen, scale * rejected, kl + 0.3, torch.zeros_like(chosen), torch.zeros_like(rejected), kl / 2, beta=1.0,
        reduction="none",
    )  # fmt: skip
    return losses.sum() / n


def bco(chosen, rejected, kl, scale, n):
    mean = preference.RunningMean().to(chosen.device)
    zeros = torch.zeros_like(chosen), torch.zeros_like(rejected)
    losses = [
        preference.bco_loss(f * scale * chosen, f * scale * rejected, *zeros, running_mean=mean, reduction="sum")[0]
        for f in (1.0, 0.5)
    ]
    return sum(losses) / n


def gradient(fn, device, rank, ranks):
    chosen, rejected, kl = (x.to(device) for x in answers(rank, ranks))
    scale = torch.tensor(1.3, dtype=torch.float64, device=device, requires_grad=True)
    n = torch.tensor(len(chosen) + len(rejected), device=device)
    fn(chosen, rejected, kl, scale, n if rank is None else count_per_rank(n)).backward()
    if rank is not None:
        dist.all_reduce(scale.grad)
    return scale.grad / (1 if rank is None else ranks)


STATISTICS = {"kto": kto, "bco": bco}
AVERAGES = ("token", "sequence")
COUNTS = [  # whose sum over ranks does not fit their dtype, or whose dtype has no sum
    torch.tensor(200, dtype=torch.uint8),
    torch.tensor(20000, dtype=torch.int16),
    torch.tensor(2**30, dtype=torch.int32),
    torch.tensor(40000.0, dtype=torch.float16),
    torch.tensor(4097.0, requires_grad=True),
    torch.tensor(True),
]


def work(device):
    ranks = dist.get_world_size()
    halves = dist.new_subgroups(2)[0] if ranks == 4 else None
    count = torch.tensor([dist.get_rank(), 1], device=device)
    found = {("count", None): count_per_rank(count)}
    found["count", "dtypes"] = [count_per_rank(x.to(device)) for x in COUNTS]
    mixed = torch.tensor(3, dtype=(torch.int64, torch.float32)[dist.get_rank() % 2], device=device)
    found["count", "mixed"] = count_per_rank(mixed)
    wide = torch.tensor(3.0, dtype=torch.float64, device=device)
    count_per_rank(wide)
    assert wide == 3
    for wrap, loss in TRAINED:
        found[wrap, loss] = train(loss, WRAPS[wrap], device)
    for how, group in (("whole", dist.group.WORLD), ("halves", halves)):
        if group is None:
            continue
        found["count", how] = count_per_rank(count, group)
        found["shifted", how] = shifted_parts(device, group)
        parts = dist.get_world_size(group)
        replicas = ranks // parts
        for (at, options), zigzag in itertools.product(enumerate(CONTEXT), (False, True)):
            found["context", how, at, zigzag] = train_context(
                options, device, group=group, zigzag=zigzag, replicas=replicas
            )
        ids, labels = (split(x, dist.get_rank(group), parts, True).to(device) for x in context_batch(0))
        logits = Model().to(device)(ids)
        for average in AVERAGES:
            share = sft.sft_loss(logits, labels, context_group=group, zigzag=True, average=average)
            found["share", how, average] = share.detach()
    assert count.tolist() == [dist.get_rank(), 1]
    for name, fn in STATISTICS.items():
        found["statistics", name] = gradient(fn, device, dist.get_rank(), ranks)
    return found


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request):
    return request.param


@pytest.fixture(scope="module")
def found(ranks):
    return run(work, ranks)


def test_counts_are_averaged(found, ranks):
    for rank, of_rank in enumerate(found):
        assert of_rank["count", None].tolist() == of_rank["count", "whole"].tolist() == [(ranks - 1) / 2, 1.0]
        if ranks == 4:
            assert of_rank["count", "halves"].tolist() == [rank // 2 * 2 + 0.5, 1.0]
        assert [x.item() for x in of_rank["count", "dtypes"]] == [x.item() for x in COUNTS]
        assert of_rank["count", "mixed"].item() == 3
        assert all(x.dtype == torch.float32 and not x.requires_grad for x in of_rank["count", "dtypes"])


@functools.cache
def expected(loss):
    return train(loss)


@pytest.mark.parametrize(("wrap", "loss"), TRAINED)
def test_uneven_ranks_train_as_one_process_does(found, wrap, loss):
    for of_rank in found:
        torch.testing.assert_close(of_rank[wrap, loss], expected(loss), rtol=1e-6, atol=1e-7)  # n is fp32


def test_the_losses_differ():
    """So that a loss that ignored its normaliser would be seen."""
    trained = {loss: torch.cat([p.flatten() for p in expected(loss)]) for loss in LOSSES}
    same = {
        frozenset(pair) for pair in itertools.combinations(LOSSES, 2) if torch.allclose(*(trained[x] for x in pair))
    }
    assert same == {frozenset(("sft", "cross_entropy"))}


def test_a_mean_on_each_rank_is_not_the_mean_of_the_batch():
    data = batch(0)
    parts = [sft.sft_loss(Model()(x["ids"]), x["labels"]) for _, x in micro_batches(data, SHARES[2])]
    whole = sft.sft_loss(Model()(data["ids"]), data["labels"])
    assert (sum(parts) / len(parts) - whole).abs() > 0.05


@pytest.mark.parametrize("zigzag", [False, True])
@pytest.mark.parametrize("name", layouts())
def test_labels_are_shifted_across_ranks(found, ranks, name, zigzag):
    labels, packing = layouts()[name]
    whole = sequences.shift_labels(labels, -7, **packing)
    for rank, of_rank in enumerate(found):
        assert torch.equal(of_rank["shifted", "whole"][name, zigzag], split(whole, rank, ranks, zigzag))
        if ranks == 4:
            assert torch.equal(of_rank["shifted", "halves"][name, zigzag], split(whole, rank % 2, 2, zigzag))


@pytest.mark.parametrize("zigzag", [False, True])
@pytest.mark.parametrize("at", range(len(CONTEXT)))
def test_split_sequences_train_as_one_process_does(found, ranks, at, zigzag):
    single = train_context(CONTEXT[at])
    for of_rank in found:
        for how in ("whole", "halves") if ranks == 4 else ("whole",):
            torch.testing.assert_close(of_rank["context", how, at, zigzag], single, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("average", AVERAGES)
def test_the_shares_of_a_split_sequence_sum_to_its_loss(found, ranks, average):
    ids, labels = context_batch(0)
    single = sft.sft_loss(Model()(ids), labels, average=average).detach()
    halves = [("halves", found[:2]), ("halves", found[2:])] if ranks == 4 else []
    for how, of_ranks in [("whole", found), *halves]:
        shares = [of_rank["share", how, average] for of_rank in of_ranks]
        torch.testing.assert_close(sum(shares), single)
        assert not torch.allclose(shares[0], single)


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_of_a_preference_loss_are_those_of_all_ranks(found, ranks, name):
    single = gradient(STATISTICS[name], None, None, ranks)
    for of_rank in found:
        torch.testing.assert_close(of_rank["statistics", name], single, rtol=1e-6, atol=1e-7)


def test_what_split_sequences_cannot_have():
    for packing in ({"cu_seqlens": torch.tensor([0, 4])}, {"position_ids": torch.arange(4)[None]}):
        with pytest.raises(ValueError, match="average='sequence'"):
            sft.sft_loss(
                torch.zeros(1, 4, V), torch.zeros(1, 4, dtype=torch.long), average="sequence", context_group=object(),
                **packing,
            )  # fmt: skip
    with pytest.raises(ValueError, match=r"holds a token of every row, got labels \(2, 0\)"):
        sequences.shift_labels(torch.zeros(2, 0, dtype=torch.long), context_group=object())


def test_a_rank_may_have_less_than_one_token_to_divide_by():
    logits, labels = torch.randn(1, 3, V), torch.tensor([[1, 2, -100]])
    whole = sft.sft_loss(logits, labels)
    torch.testing.assert_close(sft.sft_loss(logits, labels, num_items_in_batch=torch.tensor(0.25)), 4 * whole)
    assert sft.sft_loss(logits, torch.full((1, 3), -100), num_items_in_batch=0) == 0


def test_one_process_counts_for_itself():
    assert count_per_rank(torch.tensor([3, 4])).tolist() == [3.0, 4.0]
    with pytest.raises(TypeError, match="count must be a tensor, got 5"):
        count_per_rank(5)
