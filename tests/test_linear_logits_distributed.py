"""The head under FSDP2 and DDP with the loss outside the model: every parameter moves as in one process."""

import datetime
import os
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from fused_losses import settings
from fused_losses.linear_logits import LinearHead, LinearLogits

RANKS, STEPS = 2, 3
B, S, V, H = 2, 5, 13, 8


class Model(nn.Module):
    def __init__(self, tied=False, rank=0):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(V, H, dtype=torch.float64)
        self.layer = nn.Linear(H, H, dtype=torch.float64)
        self.unused = nn.Linear(H, H, dtype=torch.float64)
        self.head = LinearHead(H, V, dtype=torch.float64, softcap=4.0, rank=rank)
        if tied:
            self.head.weight = self.embed.weight
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=g) / 2

    def forward(self, ids):
        return self.head(torch.tanh(self.layer(self.embed(ids))))


def step_loss(name, logits, ids):
    logits, ids = logits[:, :-1], ids[:, 1:]
    if name == "mean":
        return F.cross_entropy(logits.reshape(-1, V), ids.reshape(-1))
    if name == "per_token":
        logp = F.log_softmax(logits / 0.8, -1)
        entropy = -(logp.exp() * logp).sum(-1)
        return (
            -(logp.gather(-1, ids.unsqueeze(-1)).squeeze(-1) * torch.linspace(0.5, 1.5, S - 1)).mean()
            - 0.1 * entropy.mean()
        )
    # Several passes over the weight in one backward, one of them through materialised logits.
    return (
        F.cross_entropy(logits.transpose(1, 2), ids)
        + logits.logsumexp(-1).mean()
        + logits.materialize().square().mean()
    )


LOSSES = ["mean", "per_token", "several"]


def train(model, wrapped, loss, batches):
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    for ids in batches:
        logits = wrapped(ids)
        assert isinstance(logits, LinearLogits)
        with settings.strict():
            step_loss(loss, logits, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {
        n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for n, p in model.named_parameters()
    }


def fully_shard_model(model):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model)


def fully_shard_head(model):
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.head)
    fully_shard(model.layer)
    return fully_shard(model)


def fully_shard_output_dtype(model):
    """FSDP2 casts what the model returns: that must reach neither the weight nor the numbers."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    return fully_shard(model, mp_policy=MixedPrecisionPolicy(output_dtype=torch.float32))


def ddp(**options):
    return lambda model: nn.parallel.DistributedDataParallel(model, **options)


WRAPPERS = {
    "fully_shard_model": fully_shard_model,
    "fully_shard_head": fully_shard_head,
    "fully_shard_output_dtype": fully_shard_output_dtype,
    "ddp": ddp(),
    "ddp_static_graph": ddp(static_graph=True),
    "ddp_find_unused": ddp(find_unused_parameters=True),
}


def prepare(case, **options):
    """A model in which every trained parameter is used, unless DDP is asked to find those that are not."""
    model = Model(**options)
    for parameter in model.unused.parameters():
        parameter.requires_grad_(case == "ddp_find_unused")
    return model


VARIANTS = {"": {}, "frozen": {}, "tied": {"tied": True}, "lora": {"rank": 2}}


def freeze(model, variant):
    if variant == "frozen":
        for module in (model.embed, model.layer):
            module.requires_grad_(False)
    if variant == "lora":
        model.head.weight.requires_grad_(False)
    return model


# The gradient of a mean survives its rounding to fp32.
CASES = [(w, loss, "") for w in WRAPPERS for loss in LOSSES if loss == "mean" or w != "fully_shard_output_dtype"]
CASES += [(w, "mean", v) for w in WRAPPERS for v in VARIANTS if v and not (w == "fully_shard_head" and v == "tied")]


def batches(rank):
    ids = torch.randint(0, V, (STEPS, RANKS * B, S), generator=torch.Generator().manual_seed(1))
    return ids if rank is None else ids[:, rank * B : (rank + 1) * B]


def work(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, timeout=datetime.timedelta(seconds=60))
    found = {}
    for case, loss, variant in CASES:
        model = freeze(prepare(case, **VARIANTS[variant]), variant)
        try:
            found[case, loss, variant] = train(model, WRAPPERS[case](model), loss, batches(rank))
        except Exception as error:
            found[case, loss, variant] = repr(error)
    torch.save(found, f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained():
    with tempfile.TemporaryDirectory() as folder:
        with __import__("socket").socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mp.spawn(work, (port, folder), nprocs=RANKS)
        return [torch.load(f"{folder}/{rank}") for rank in range(RANKS)]


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
@pytest.mark.parametrize(("case", "loss", "variant"), CASES)
def test_trains_as_one_process_does(trained, case, loss, variant):
    model = freeze(prepare(case, **VARIANTS[variant]), variant)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = train(model, model, loss, batches(None))
    for rank in range(RANKS):
        found = trained[rank][case, loss, variant]
        assert not isinstance(found, str), found
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name], expected[name], msg=lambda m, name=name: f"{name}: {m}")
            moved = parameter.requires_grad and not name.startswith("unused")
            assert torch.equal(found[name], start[name]) != moved, name
