"""Heads and logits that are DTensors, and a transformer trained on a 2 × 2 mesh, step for step as one process does."""

import functools
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import needs_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

import fused_losses
from fused_losses import LinearHead, LinearLogits, settings
from fused_losses.bench.ranks import collectives, run
from fused_losses.tensor_parallel import VocabParallelHead

B, S, V, H = 4, 6, 50, 8


def inputs():
    g = torch.Generator().manual_seed(0)
    shapes = {"hidden": (B, S, H), "weight": (V, H), "bias": (V,)}
    tensors = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    target = torch.randint(0, V, (B, S), generator=g)
    target[1, 2:] = -100
    return tensors, target


def loss_of(logits, target):
    """Sums over tokens, so that adding up data-parallel ranks gives the sum over the batch."""
    mean = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum", label_smoothing=0.1)
    found = fused_losses.token_statistics(logits, target, ("log_probs", "entropy"))
    return mean + (found.log_probs.exp() + found.entropy * torch.linspace(0, 1, S, device=target.device)).sum()


# The mesh's shape, and the placements of hidden, weight and bias.
PLACEMENTS = {
    "vocabulary": ((4,), [Replicate()], [Shard(0)], [Shard(0)]),
    "whole_bias": ((4,), [Replicate()], [Shard(0)], [Replicate()]),
    "sequence": ((4,), [Shard(1)], [Shard(0)], [Shard(0)]),
    "batch_gathered": ((4,), [Shard(0)], [Shard(0)], [Shard(0)]),
    "features": ((4,), [Shard(2)], [Shard(0)], [Shard(0)]),
    "columns": ((4,), [Replicate()], [Shard(1)], [Replicate()]),
    "columns_of_both": ((4,), [Shard(2)], [Shard(1)], [Shard(0)]),
    "replicated": ((4,), [Replicate()], [Replicate()], [Replicate()]),
    "data": ((4,), [Shard(0)], [Replicate()], [Replicate()]),
    "data_and_vocabulary": ((2, 2), [Shard(0), Replicate()], [Replicate(), Shard(0)], [Replicate(), Shard(0)]),
    "data_and_sequence": ((2, 2), [Shard(0), Shard(1)], [Replicate(), Shard(0)], [Replicate(), Shard(0)]),
    "features_and_vocabulary": ((2, 2), [Shard(2), Replicate()], [Replicate(), Shard(0)], [Replicate(), Shard(0)]),
    "two_replicas": ((2, 2), [Replicate(), Shard(1)], [Replicate(), Shard(0)], [Replicate(), Shard(0)]),
}


def local_gradients(device):
    tensors, target = inputs()
    tensors, target = {name: t.to(device) for name, t in tensors.items()}, target.to(device)
    found = {}
    for case, (shape, *placements) in PLACEMENTS.items():
        mesh = init_device_mesh(device.type, shape)
        leaves = {
            name: distribute_tensor(t, mesh, p).requires_grad_()
            for (name, t), p in zip(tensors.items(), placements, strict=True)
        }
        logits = LinearLogits(leaves["hidden"], leaves["weight"], leaves["bias"], softcap=8.0)
        start, stop = logits.vocab_range
        assert (stop - start < V) == any(p.is_shard() for p in placements[1]), f"{case}: {(start, stop)}"
        of_rank = target
        if shape == (4,) and logits.shape[0] == 1:
            of_rank = target[dist.get_rank() :][:1]
        elif logits.shape[0] == 2:
            of_rank = target.chunk(2)[mesh.get_local_rank(0)]
        loss = loss_of(logits, of_rank)
        loss.backward()
        found[case] = {name: t.grad.full_tensor() for name, t in leaves.items()} | {"loss": loss.detach()}
        found[case]["placements"] = {name: str(t.grad.placements) for name, t in leaves.items()}

    # Logits that exist, as DTensors: what PyTorch's loss_parallel takes.
    mesh = init_device_mesh(device.type, (4,))
    whole = F.linear(tensors["hidden"], tensors["weight"], tensors["bias"])
    for placement, classes in ((Shard(2), 2), (Shard(1), 1), (Replicate(), 1)):
        leaf = distribute_tensor(whole.movedim(2, classes), mesh, [placement]).requires_grad_()
        wrapped = distribute_tensor(target, mesh, [Replicate()])
        if classes == 1:
            loss = fused_losses.cross_entropy(leaf, wrapped, label_smoothing=0.1)
        else:
            loss = -fused_losses.selective_log_softmax(leaf, wrapped).sum()
        loss.backward()
        found[str(placement)] = {"logits": leaf.grad.full_tensor().movedim(classes, 2), "loss": loss.detach()}

    # Labels that are DTensors.
    logits, wrapped = LinearLogits(tensors["hidden"], tensors["weight"]), distribute_tensor(target, mesh, [Replicate()])
    for how in ({}, {"num_items_in_batch": 7}, {"average": "sequence"}):
        assert torch.equal(fused_losses.sft_loss(logits, wrapped, **how), fused_losses.sft_loss(logits, target, **how))

    for layout in (Replicate(), Shard(0)):
        head = parallelize_module(updated_head().to(device), mesh, VocabParallelHead(input_layouts=layout))
        assert head.lora_A.placements == (Replicate(),)
        leaf = tensors["hidden"].chunk(4 if layout.is_shard() else 1)[dist.get_rank() if layout.is_shard() else 0]
        gradients = gradients_of_head(head, leaf, target)
        found["head", str(layout)] = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()}

    # A parameter that is None, and one that is already a DTensor.
    head = LinearHead(H, V, bias=False, device=device)
    head.weight = nn.Parameter(distribute_tensor(head.weight, mesh, [Shard(1)]))
    parallelize_module(head, mesh, VocabParallelHead())
    assert head.bias is None
    assert head.weight.placements == (Shard(1),)
    return found


def updated_head():
    """A LoRA update beside a weight that is frozen."""
    head = LinearHead(H, V, dtype=torch.float64, rank=3, alpha=6.0)
    g = torch.Generator().manual_seed(5)
    for parameter in head.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=g)
    head.weight.requires_grad_(False)
    return head


def gradients_of_head(head, hidden, target):
    leaf = hidden.clone().requires_grad_()
    loss = loss_of(head(leaf), target)
    loss.backward()
    trained = {name: p.grad for name, p in head.named_parameters() if p.grad is not None}
    return trained | {"hidden": leaf.grad, "loss": loss.detach()}


@needs_ranks
def test_placements_equal_one_process():
    tensors, target = inputs()
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    z = 8 * torch.tanh(F.linear(leaves["hidden"], leaves["weight"], leaves["bias"]) / 8)
    loss = loss_of(z, target)
    loss.backward()
    found = run(local_gradients, 4)
    for case, (_, of_hidden, *_) in PLACEMENTS.items():
        assert found[0][case]["placements"]["weight"] == str(tuple(PLACEMENTS[case][2])), case
        for of_rank in found:
            for name, leaf in leaves.items():
                torch.testing.assert_close(of_rank[case][name], leaf.grad, msg=lambda m, c=(case, name): f"{c}: {m}")
        total = found[0][case]["loss"]
        if case == "data":
            total = sum(of_rank[case]["loss"] for of_rank in found)
        elif case in ("data_and_vocabulary", "data_and_sequence"):
            total = found[0][case]["loss"] + found[2][case]["loss"]
        torch.testing.assert_close(total, loss.detach())
        assert of_hidden
    expected = gradients_of_head(updated_head(), tensors["hidden"], target)
    assert set(expected) == {"bias", "lora_A", "lora_B", "hidden", "loss"}
    for rank, of_rank in enumerate(found):
        torch.testing.assert_close(of_rank["head", str(Replicate())], expected)
        expected_part = expected | {"hidden": expected["hidden"][rank : rank + 1]}
        torch.testing.assert_close(of_rank["head", str(Shard(0))], expected_part)
    whole = F.linear(tensors["hidden"], tensors["weight"], tensors["bias"]).requires_grad_()
    mean = F.cross_entropy(whole.movedim(2, 1), target, label_smoothing=0.1)
    nll = F.cross_entropy(whole.movedim(2, 1), target, reduction="sum")
    for case, loss in ((Shard(2), nll), (Shard(1), mean), (Replicate(), mean)):
        (expected,) = torch.autograd.grad(loss, whole, retain_graph=True)
        for of_rank in found:
            torch.testing.assert_close(of_rank[str(case)]["logits"], expected, msg=lambda m, c=case: f"{c}: {m}")
            torch.testing.assert_close(of_rank[str(case)]["loss"], loss.detach())


def sums_of_gradients(device):
    """The collectives that sum the gradient of hidden states sharded by tokens, while the product for the weight runs."""
    mesh = init_device_mesh(device.type, (4,))
    tensors, _ = inputs()
    target = torch.randint(0, V, (B, 8), device=device, generator=torch.Generator(device).manual_seed(1))
    whole = torch.randn(B, 8, H, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(device)
    weight = tensors["weight"].to(device)
    uses = {
        "flattened": lambda z: F.cross_entropy(z.flatten(0, 1), target.flatten()),
        "classes first": lambda z: F.cross_entropy(z.transpose(1, 2), target),
        "per token": lambda z: fused_losses.selective_log_softmax(z, target).square().sum(),
        "sliced": lambda z: F.cross_entropy(z[:, :-1].flatten(0, 1), target[:, 1:].flatten()),
        "some ignored": lambda z: F.cross_entropy(z.transpose(1, 2), target.masked_fill(target < 9, -100)),
        "reordered": lambda z: fused_losses.selective_log_softmax(z.transpose(0, 1), target.T).square().sum(),
    }
    found = {}
    for dim in (0, 1):
        for name, use in uses.items():
            hidden = distribute_tensor(whole, mesh, [Shard(dim)]).requires_grad_()
            with collectives() as calls:
                use(LinearLogits(hidden, distribute_tensor(weight, mesh, [Shard(0)]))).backward()
            leaf = whole.clone().requires_grad_()
            use(F.linear(leaf, weight)).backward()
            torch.testing.assert_close(hidden.grad.full_tensor(), leaf.grad)
            found[dim, name] = [(what.split("_")[1], size) for what, size in calls if "gather" not in what]
    return found


@needs_ranks
def test_a_gradient_of_all_tokens_is_reduce_scattered():
    (found, *_) = run(sums_of_gradients, 4)
    for (dim, name), calls in found.items():
        if name in ("flattened", "classes first", "per token"):
            assert calls == [("scatter", B * 8 * H * 8)], (dim, name)
        else:
            assert [what for what, _ in calls] == ["reduce"], (dim, name)


def refusals(device):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    hidden, weight = torch.randn(3, H), distribute_tensor(torch.randn(V, H), mesh, [Shard(0)])
    with pytest.raises(TypeError, match="none of them"):  # FSDP2's weight outside its module looks the same
        LinearLogits(hidden, weight)
    wrapped = distribute_tensor(hidden, mesh, [Replicate()])
    with pytest.raises(TypeError, match="none of them"):
        LinearLogits(wrapped, weight.to_local())
    with pytest.raises(ValueError, match="leave group="):
        LinearLogits(wrapped, weight, group=mesh.get_group())
    with pytest.raises(ValueError, match="Replicate on each dimension"):
        LinearLogits(wrapped, DTensor.from_local(torch.randn(V, H), mesh, [Partial()]))
    with pytest.raises(ValueError, match="Replicate on each dimension"):
        fused_losses.cross_entropy(DTensor.from_local(torch.randn(3, V), mesh, [Partial()]), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="leave group="):
        fused_losses.token_statistics(
            distribute_tensor(torch.randn(3, V), mesh, [Shard(1)]), outputs=("entropy",), group=mesh.get_group()
        )
    with pytest.raises(TypeError, match="LinearHead"):
        parallelize_module(nn.Linear(H, V), mesh, VocabParallelHead())
    with pytest.raises(TypeError, match="first argument"):
        parallelize_module(LinearHead(H, V), mesh, VocabParallelHead())(input=hidden)
    with pytest.raises(AttributeError, match="parallelize_module with VocabParallelHead"):
        parallelize_module(LinearHead(H, V), mesh, ColwiseParallel())(hidden)
    return True


@needs_ranks
def test_what_cannot_be_is_refused():
    assert run(refusals, 2) == [True, True]


def read_after_a_step(device):
    """Reads logits after an optimizer changed their head of DTensors, with and without FSDP2 sharding these again."""
    mesh = init_device_mesh(device.type, (2, 1), mesh_dim_names=("dp", "tp"))
    for sharded, fused in itertools.product((False, True), repeat=2):
        head = parallelize_module(LinearHead(H, V, device=device), mesh["tp"], VocabParallelHead())
        if sharded:
            fully_shard(head, mesh=mesh["dp"])
        optimizer = torch.optim.AdamW(head.parameters(), fused=fused)
        logits = head(torch.randn(3, H, device=device))
        logits.logsumexp(-1).sum().backward()
        logits.argmax(-1)  # nothing has changed yet
        optimizer.step()
        with pytest.raises(RuntimeError, match="weight was modified in place"):
            logits.argmax(-1)
    return True


@needs_ranks
def test_logits_of_before_a_step_are_not_those_of_after():
    assert run(read_after_a_step, 2) == [True, True]


# A transformer, tensor parallel and data parallel

LAYERS, VOCAB, WIDTH, HEADS, STEPS = 2, 512, 32, 4, 3
BATCH, LENGTH = 4, 8
WHOLE = BATCH * LENGTH * VOCAB * 8  # bytes of the logits, and of the weight: there are as many tokens as features


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.o = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        h = self.norm_1(x)
        q, k, v = (f(h).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        x = x + self.o(h)
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class Transformer(nn.Module):
    def __init__(self, rank=0):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = LinearHead(WIDTH, VOCAB, softcap=20.0, rank=rank)
        self.to(torch.float64)
        g = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=g) / 4

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def tensor_parallel(model, mesh, sequence):
    """As PyTorch's tutorial does it; ``sequence``: activations between the matrices are sharded by tokens."""
    rest = Shard(1) if sequence else Replicate()
    # By columns: the backward of an embedding sharded by rows makes the gradient of all rows.
    plan = {"embed": ColwiseParallel(output_layouts=rest)}
    plan |= {"norm": SequenceParallel()} if sequence else {}
    plan["head"] = VocabParallelHead(input_layouts=rest)
    parallelize_module(model, mesh, plan)
    for block in model.blocks:
        columns = ColwiseParallel(input_layouts=rest)
        rows = RowwiseParallel(output_layouts=rest)
        plan = {"q": columns, "k": columns, "v": columns, "o": rows, "up": columns, "down": rows}
        plan |= {"norm_1": SequenceParallel(), "norm_2": SequenceParallel()} if sequence else {}
        parallelize_module(block, mesh, plan)
    return model


def text():
    ids = torch.randint(0, VOCAB, (STEPS, BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    target = ids[..., 1:].clone()
    target[:, 0, :3] = -100
    target[:, 3, 2:] = -100  # so that the halves of the batch have different numbers of labels
    return ids[..., :-1], target


def objective(name, logits, target, count):
    if name == "mean":
        return F.cross_entropy(logits.transpose(1, 2), target, reduction="sum") / count
    old = torch.linspace(-8, -4, LENGTH, dtype=torch.float64, device=target.device)

    def policy(s, old):
        ratio = (s.log_probs - old).exp()
        return -torch.min(ratio, ratio.clamp(0.8, 1.2)) - 0.01 * s.entropy

    return (
        fused_losses.token_loss(
            policy, logits, target, old.expand(logits.shape[:-1]), statistics=("log_probs", "entropy")
        )[0]
        / count
    )


def train(model, name, rank=0, ranks=1, trained=None):
    """Each of ``ranks`` has its part of the batch, and the losses add up to the batch's. Gradients are averaged afterwards."""
    optimizer = torch.optim.AdamW((trained or model).parameters(), lr=1e-2)
    losses = []
    device = next(model.parameters()).device
    for ids, target in zip(*(t.to(device) for t in text()), strict=True):
        count = (target != -100).sum()
        with settings.strict():
            logits = (trained or model)(ids.chunk(ranks)[rank])
            assert isinstance(logits, LinearLogits)
            loss = objective(name, logits, target.chunk(ranks)[rank], count)
        (loss * ranks).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def parameters_of(model):
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for n, p in model.named_parameters()}


SETTINGS = [
    (wrapper, sequence, name)
    for wrapper in ("plain", "fully_shard", "ddp")
    for sequence in (False, True)
    for name in ("mean", "policy")
]


def trained_on_a_mesh(device):
    mesh = init_device_mesh(device.type, (2, 2), mesh_dim_names=("dp", "tp"))
    at = mesh.get_local_rank("dp")
    found = {}
    for wrapper, sequence, name in SETTINGS:
        if wrapper == "ddp" and sequence:
            continue  # DDP ignores DTensor parameters, so its model is not sharded: one case is enough
        model = tensor_parallel(Transformer().to(device), mesh["tp"], sequence)
        ranks = 1 if wrapper == "plain" else 2
        if wrapper == "fully_shard":
            for part in (*model.blocks, model.head, model):
                fully_shard(part, mesh=mesh["dp"])
        elif wrapper == "ddp":
            model, ranks, at_rank = Transformer().to(device), 4, dist.get_rank()
            trained = DistributedDataParallel(model)
            found[wrapper, sequence, name] = train(model, name, at_rank, ranks, trained), parameters_of(model), 0
            continue
        step = functools.partial(train, model, name, at if ranks > 1 else 0, ranks)
        losses, largest = largest_allocation(step)
        found[wrapper, sequence, name] = losses, parameters_of(model), largest
    return found


def largest_allocation(call):
    """What ``call`` returns, and its largest single allocation in bytes, inside operators too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        found = call()
    events = profiler.profiler.kineto_results.events()
    return found, max(e.nbytes() for e in events if e.name() == "[memory]")


@needs_ranks
def test_a_transformer_trains_as_in_one_process(device):
    """No rank holds the whole logits or the whole weight: its largest allocation is smaller."""
    logits = functools.partial(
        F.linear, torch.randn(BATCH * LENGTH, WIDTH).double(), torch.randn(VOCAB, WIDTH).double()
    )
    assert largest_allocation(logits)[1] == WHOLE  # the instrument sees them
    found = run(trained_on_a_mesh, 4)
    for wrapper, sequence, name in SETTINGS:
        if (wrapper, sequence, name) not in found[0]:
            continue
        model = Transformer()
        losses, parameters = train(model, name), parameters_of(model)
        assert losses.unique().numel() == STEPS
        of_ranks = [of_rank[wrapper, sequence, name] for of_rank in found]
        total = {"plain": lambda ls: ls[0], "fully_shard": lambda ls: ls[0] + ls[2], "ddp": sum}[wrapper]
        torch.testing.assert_close(total([of_rank[0] for of_rank in of_ranks]), losses)
        for of_rank in of_ranks:
            for key, expected in parameters.items():
                case = wrapper, sequence, name, key
                torch.testing.assert_close(of_rank[1][key], expected, msg=lambda m, case=case: f"{case}: {m}")
            if device == "cpu":
                assert of_rank[2] < WHOLE, f"{wrapper}: {of_rank[2]} bytes at once hold the whole logits or weight"
