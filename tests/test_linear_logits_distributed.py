"""The head under FSDP2 and DDP with the loss outside the model: every parameter moves as in one process."""

import copy
import itertools
import pickle
from collections import Counter
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import needs_ranks
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor.debug import CommDebugMode

from fused_losses import distillation_loss, divergence, settings
from fused_losses.bench.ranks import run
from fused_losses.linear_head import LinearHead
from fused_losses.linear_logits import LinearLogits
from fused_losses.sharded_weight import is_whole
from fused_losses.token_loss import token_loss

pytestmark = [needs_ranks, pytest.mark.xdist_group("linear_logits_distributed")]  # its processes are started once
RANKS, STEPS = 2, 3
B, S, V, H = 2, 5, 13, 8


class Model(nn.Module):
    def __init__(self, tied=False, rank=0, softcap=4.0, changed=False):
        super().__init__()
        self.changed = changed
        g = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(V, H, dtype=torch.float64)
        self.layer = nn.Linear(H, H, dtype=torch.float64)
        self.unused = nn.Linear(H, H, dtype=torch.float64)
        self.head = LinearHead(H, V, dtype=torch.float64, softcap=softcap, rank=rank)
        if tied:
            self.head.weight = self.embed.weight
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=g) / 2

    def forward(self, ids):
        logits = self.head(torch.tanh(self.layer(self.embed(ids))))
        if self.changed:  # the write materialises them
            logits[..., 7:9] = -4.0
        return logits


def step_loss(name, logits, ids):
    logits, ids = logits[:, :-1], ids[:, 1:]
    if name == "mean":
        return F.cross_entropy(logits.reshape(-1, V), ids.reshape(-1))
    if name == "per_token":
        logp = F.log_softmax(logits / 0.8, -1)
        entropy = -(logp.exp() * logp).sum(-1)
        return (
            -(
                logp.gather(-1, ids.unsqueeze(-1)).squeeze(-1) * torch.linspace(0.5, 1.5, S - 1, device=ids.device)
            ).mean()
            - 0.1 * entropy.mean()
        )
    if name == "sum":
        offset = torch.linspace(-1, 1, V, dtype=torch.float64, device=ids.device)
        sums = logits.sum(-1) + logits.log_softmax(-1).sum(-1)
        return sums.mean() / V + (logits + offset).logsumexp(-1).mean()
    if name == "pointwise":  # a few rows at a time
        p = logits.softmax(-1)
        with settings.workspace(3000):
            return (p * (p + 1e-3).log()).sum(-1).mean() + (p.sqrt() * torch.arange(V, device=ids.device)).mean()
    # Several passes over the weight in one backward, one of them through materialised logits.
    return (
        F.cross_entropy(logits.transpose(1, 2), ids)
        + logits.logsumexp(-1).mean()
        + logits.materialize().square().mean()
    )


LOSSES = ["mean", "per_token", "pointwise", "several"]


def train(model, wrapped, loss, batches):
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    for ids in batches:
        logits = wrapped(ids)
        assert isinstance(logits, LinearLogits) is not model.changed
        with settings.strict(not model.changed):
            step_loss(loss, logits, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = isinstance(wrapped, FullyShardedDataParallel)
    with FullyShardedDataParallel.summon_full_params(wrapped) if whole else nullcontext():
        parameters = model.named_parameters()
        return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for n, p in parameters}


def fully_shard_head(model):
    fully_shard(model.head)
    fully_shard(model.layer)
    return fully_shard(model)


def fully_shard_output_dtype(model):
    """FSDP2 casts the model's output: the cast must change neither the weight nor the numbers."""
    return fully_shard(model, mp_policy=MixedPrecisionPolicy(output_dtype=torch.float32))


def reshard_root(model):
    return fully_shard(model, reshard_after_forward=True)


def shard_twice(model):
    """The FSDP2 unit that holds the head is not the root unit, which holds no parameters."""
    fully_shard(model, reshard_after_forward=True)
    return fully_shard(nn.Sequential(model))


def predecessor(model):
    """FSDP1, which keeps the root's parameters whole until backward."""
    return FullyShardedDataParallel(model, device_id=next(model.parameters()).device, use_orig_params=True)


def ddp(**options):
    return lambda model: nn.parallel.DistributedDataParallel(model, **options)


WRAPPERS = {
    "fully_shard_model": fully_shard,
    "fully_shard_model_resharded": reshard_root,
    "fully_shard_head": fully_shard_head,
    "fully_shard_twice": shard_twice,
    "fully_shard_output_dtype": fully_shard_output_dtype,
    "fsdp1": predecessor,
    "ddp": ddp(),
    "ddp_static_graph": ddp(static_graph=True),
    "ddp_find_unused": ddp(find_unused_parameters=True),
}


def prepare(case, kind=Model, **options):
    """A model in which every trained parameter is used, unless DDP is asked to find unused ones."""
    model = kind(**options)
    for parameter in model.unused.parameters():
        parameter.requires_grad_(case == "ddp_find_unused")
    return model


VARIANTS = {
    "": {},
    "frozen": {},
    "tied": {"tied": True},
    "lora": {"rank": 2},
    "lora_alone": {"rank": 2},
    "lora_A_alone": {"rank": 2},
    "bias_alone": {},
    "linear": {"rank": 2, "softcap": None},
    "changed": {"changed": True},
}


def freeze(model, variant):
    head, alone = model.head, variant.endswith("alone")
    if variant == "frozen" or alone:
        for module in (model.embed, model.layer):
            module.requires_grad_(False)
    if variant == "lora" or alone:
        head.weight.requires_grad_(False)
    if variant in ("lora_alone", "lora_A_alone"):
        head.bias.requires_grad_(False)
        head.lora_B.requires_grad_(variant == "lora_alone")
    return model


# With output_dtype only the mean is tested: its gradient survives being rounded to fp32.
CASES = [(w, loss, "") for w in WRAPPERS for loss in LOSSES if loss == "mean" or w != "fully_shard_output_dtype"]
CASES += [
    (w, "mean", v)
    for w in WRAPPERS
    for v in VARIANTS
    if v not in ("", "linear") and (w, v) != ("fully_shard_head", "tied")
]
CASES += [(w, "sum", "linear") for w in WRAPPERS if w != "fully_shard_output_dtype"]  # reads more than the weight


def batches(rank):
    ids = torch.randint(0, V, (STEPS, RANKS * B, S), generator=torch.Generator().manual_seed(1))
    return ids if rank is None else ids[:, rank * B : (rank + 1) * B]


# What a step sends, and what it leaves whole


class Eager(Model):
    """With logits that exist."""

    def __init__(self):
        super().__init__()
        head = nn.Linear(H, V, dtype=torch.float64)
        head.weight, head.bias = self.head.weight, self.head.bias
        self.head = head

    def forward(self, ids):
        return 4 * torch.tanh(super().forward(ids) / 4)


# How often each loss reads the weight in forward. One that reads it twice gathers it twice: it does not stay whole.
PASSES = {"mean": 1, "per_token": 1, "token_loss": 1, "several": 3, "evaluation": 1}
TRAINED = [*(loss for loss in PASSES if loss != "evaluation"), "unlabelled", "probabilities", "twice"]


def shard_head(model, **options):
    fully_shard(model.head, **options)
    return fully_shard(model)


SHARDS = {
    "head": shard_head,
    "head, kept whole": lambda model: shard_head(model, reshard_after_forward=False),
    "model": fully_shard,
    "model, sharded again": reshard_root,
}


def reading(name, logits, ids):
    if name == "token_loss":
        return token_loss(lambda s: -s.log_probs * s.entropy.exp(), logits, ids, statistics=("log_probs", "entropy"))[0]
    if name == "several" and isinstance(logits, torch.Tensor):
        return F.cross_entropy(logits.transpose(1, 2), ids) + logits.logsumexp(-1).mean() + logits.square().mean()
    if name == "per_token" and isinstance(logits, LinearLogits):
        return -logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).mean()
    return step_loss(name if name == "several" else "mean", logits, ids)


def sent(model, loss, ids, steps=2):
    """Collectives of the last step, and how many bytes of the head were whole after the model, the loss and backward."""
    for _ in range(steps):
        left = []
        with CommDebugMode() as communication, torch.set_grad_enabled(loss != "evaluation"):
            logits = model(ids)
            lazy = isinstance(logits, LinearLogits)
            left += [logits.rest.weight.untyped_storage().size()] if lazy else []
            value = reading(loss, logits, ids)
            left += [logits.rest.weight.untyped_storage().size()] if lazy else []
            if loss != "evaluation":
                value.backward()
            left += [logits.rest.weight.untyped_storage().size()] if lazy else []
        counts = {str(op).split(".")[-1]: n for op, n in communication.get_comm_counts().items()}
    return counts, left


# A weight that is whole only while a loss reads it


def copies(ids):
    """Copies of logits whose weight is sharded between uses."""
    found = []
    for softcap in (4.0, None):
        model = Model(rank=2, softcap=softcap)
        expected = model(ids).logsumexp(-1)
        logits = shard_head(model)(ids)
        for copied in (copy.deepcopy(logits), copy.copy(logits[:, 1:]), pickle.loads(pickle.dumps(logits))):
            left = logits.rest.weight.untyped_storage().size()
            found.append((left, copied.logsumexp(-1), expected.detach()[:, -copied.shape[1] :]))
    return found


def beside_a_whole_weight(ids):
    """Gradients where the weight is computed from parameters, so whole, and the rest of the head is sharded between uses."""
    found = {}
    for name, wrap in {"whole": lambda model: model, "head": shard_head, "root": reshard_root}.items():
        model = prepare("", rank=2, softcap=None)
        nn.utils.parametrizations.weight_norm(model.head)
        model = wrap(model)
        logits = model(ids)
        left = [t.untyped_storage().size() > 0 for t in (logits.rest.weight, logits.rest.bias, logits.rest.low_rank[1])]
        try:
            (step_loss("mean", logits, ids) + logits.logsumexp(-1).mean()).backward()
        except RuntimeError as error:
            found[name] = left, repr(error)
            continue
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found[name] = left, {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in gradients.items()}
    return found


def not_gathered(ids):
    """How often backward gathers the head where FSDP2 leaves that to the losses, and gradients with and without FSDP2."""
    found = {}
    for loss, frozen, asked in itertools.product(TRAINED, (False, True), (False, True)):
        gradients = {}
        for wrap in (lambda model: model, shard_head):
            model = wrap(prepare(""))
            for module in (model.embed, model.layer):
                module.requires_grad_(not frozen)
            if wrap is shard_head:
                model.head.set_unshard_in_backward(False)
            with settings.route("gradients_in_forward" if asked else None):
                if loss == "twice":
                    value = reading("per_token", model(ids), ids) + reading("mean", model(ids) / 2, ids)
                elif loss == "unlabelled":  # one rank has no labels
                    value = reading("token_loss", model(ids), ids if dist.get_rank() else ids * 0 - 100)
                elif loss == "probabilities":  # one rank has no tokens
                    logits = model(ids[: 2 * dist.get_rank()]).flatten(0, 1)
                    value = F.cross_entropy(logits, logits.hidden.new_full(logits.shape, 1 / V), reduction="sum")
                else:
                    value = reading(loss, model(ids), ids)
                with gathers() as count:
                    value.backward()
            gradients[wrap] = [p.grad for p in model.parameters() if p.grad is not None]
        expected, sharded = gradients.values()
        sharded = [g.full_tensor() for g in sharded]
        with settings.route("gradients_in_forward"):
            value = reading("mean", model(ids), ids)
        with gathers() as later:
            value.backward()
        found[loss, frozen, asked] = count[0], sharded, expected, later[0]
    return found


@contextmanager
def gathers():
    """How often the FSDP2 unit that holds the head's weight is gathered inside."""
    count, gather = [0], _fsdp_param_group.foreach_all_gather

    def counted(*args):
        count[0] += any(p._param_fqn == "head.weight" for p in args[0])
        return gather(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fsdp_param_group, "foreach_all_gather", counted)
        yield count


def teachers(ids):
    """How many bytes of a frozen teacher's head stay whole, and the gradient of the student's head."""
    found = {}
    for loss in (divergence, distillation_loss):
        heads = {}
        for wrap in (lambda model: model, shard_head):
            torch.manual_seed(0)
            student, teacher = wrap(Model()), wrap(Model().requires_grad_(False))
            with torch.no_grad():
                of_teacher = teacher(ids) * 2
            options = {"kind": "reverse_kl", **({"labels": ids} if loss is distillation_loss else {})}
            loss(student(ids), of_teacher, **options).mean().backward()
            heads[wrap] = student.head.weight.grad, of_teacher.rest.weight.untyped_storage().size()
        (expected, _), (grad, left) = heads.values()
        found[loss.__name__] = left, grad.full_tensor(), expected
    return found


def by_rows(ids):
    """How often backward gathers two heads for a loss of their entries: made at once, in parts, or for no tokens."""
    found = []
    for tokens, room in ((ids, None), (ids, 3000), (ids[:0], None)):
        student, teacher = shard_head(prepare("")), shard_head(Model().requires_grad_(False))
        with torch.no_grad():
            of_teacher = teacher(tokens)
        with settings.workspace(room):
            value = F.mse_loss(student(tokens), of_teacher, reduction="sum")
        with gathers() as count:
            value.backward()
        found.append(count[0])
    return found


def of_views(ids):
    """How often a head is gathered for numbers of the same tokens: with labels, and through views that copy several rows."""
    found = []
    for part, ignored in ((ids, 0), (ids, 1), (ids[:1], 0), (ids[:0], 0)):
        logits = shard_head(prepare(""))(part)[:, :-1]
        rows, labels = logits.flatten(0, 1), part[:, 1:].flatten()
        labels = torch.where(torch.arange(len(labels), device=labels.device) < ignored, -100, labels)
        with gathers() as count:
            value = F.cross_entropy(rows, labels, reduction="none").sum()
            (value + rows.logsumexp(-1).sum() + logits.logsumexp(-1).sum()).backward()
        found.append(count[0])
    return found


def apart(ids):
    """Gradients of two losses of two forwards, with one backward after the other: FSDP2 shards the root again in between."""
    found = {}
    for name, wrap in {"whole": lambda model: model, "kept": fully_shard, "resharded": reshard_root}.items():
        model = wrap(prepare(""))
        losses = [reading("per_token", model(part), part) for part in (ids, ids.flip(0, 1))]
        for loss in losses:
            loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found[name] = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]
    return found


def after_a_step(ids):
    """The errors for logits that are read after an optimizer step has changed their head."""
    found = {}
    for (shards, wrap), variant in itertools.product(SHARDS.items(), ("", "bias_alone", "fused")):
        model = wrap(freeze(prepare(""), variant))
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=variant == "fused")
        logits, others = model(ids), model(ids)[..., 1:]
        step_loss("mean", logits, ids).backward()
        logits.argmax(-1)  # nothing has changed yet
        optimizer.step()
        found[shards, variant] = [said(lambda: logits.argmax(-1)), said(lambda: others.argmax(-1))]  # noqa: B023
    return found


def said(fn):
    try:
        fn()
    except RuntimeError as error:
        return str(error)


def message(ids):
    """The error where FSDP1 wraps the head by itself."""
    model = prepare("")
    model.head = predecessor(model.head)
    model = predecessor(model)
    return said(lambda: step_loss("mean", model(ids), ids))


def without_module(ids):
    """The errors of logits made without ``module=``, once their weight is sharded again."""
    model = shard_head(prepare(""))
    model.head.unshard()
    hidden = torch.randn(B, S, H, dtype=torch.float64, device=ids.device)
    logits = LinearLogits(hidden, model.head.weight, model.head.bias)
    value = logits.logsumexp(-1).sum()
    model.head.reshard()
    return [said(logits.materialize), said(value.backward)]


def differentiated_again(ids):
    """Gradients with ``create_graph``, which a loss computes anew, where FSDP2 leaves the gathers to the losses."""
    found = []
    for sharded in (False, True):
        model = Model().to(ids.device).requires_grad_(False)
        if sharded:
            shard_head(model, reshard_after_forward=True).head.set_unshard_in_backward(False)
        hidden = torch.linspace(-1, 1, ids.numel() * H, dtype=torch.float64, device=ids.device).requires_grad_()
        with settings.route("gradients_in_forward"):
            value = reading("mean", model.head(hidden.view(*ids.shape, H)), ids)
        found += torch.autograd.grad(value, hidden, create_graph=True)
    return [t.detach() for t in found]


# Gradients of several micro-batches, summed in fp32


def accumulate_in_fsdp(ids):
    """With bf16 parameters, FSDP2 sums gradients in its reduce_dtype."""
    model = Model().float()
    model.unused.requires_grad_(False)
    fully_shard(model.head, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    for at, part in enumerate(ids):
        model.head.set_requires_gradient_sync(at == len(ids) - 1)
        hidden = model.embed(part).bfloat16()
        step_loss("mean", model.head(hidden), part).backward()
    return model.head.weight.grad.full_tensor()


def main_grad_of(model, ids):
    """Megatron's way: a hook moves each bf16 gradient into an fp32 sum, which the ranks reduce themselves."""
    model = model.bfloat16()
    weight = model.head.weight
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)

    def move(parameter):
        parameter.main_grad += parameter.grad
        parameter.grad = None

    weight.register_post_accumulate_grad_hook(move)
    for part in ids:
        step_loss("mean", model.head(model.embed(part)), part).backward()
    assert weight.grad is None
    return weight.main_grad


def bf16_gradients(ids):
    for part in ids:
        model = Model().bfloat16()
        step_loss("mean", model.head(model.embed(part)), part).backward()
        yield model.head.weight.grad


def work(device):
    found = {}
    mine = batches(dist.get_rank()).to(device)
    for case, loss, variant in CASES:
        model = freeze(prepare(case, **VARIANTS[variant]), variant).to(device)
        try:
            found[case, loss, variant] = train(model, WRAPPERS[case](model), loss, mine)
        except Exception as error:
            found[case, loss, variant] = repr(error)
    for shards, wrap in SHARDS.items():
        for loss in PASSES:
            found["sent", shards, loss] = [
                sent(wrap(prepare("", kind=kind).to(device)), loss, mine[0]) for kind in (Model, Eager)
            ]
    found["copies"] = copies(mine[0])
    found["beside a whole weight"] = beside_a_whole_weight(mine[0])
    found["not gathered"] = not_gathered(mine[0])
    found["teachers"] = teachers(batches(0)[0].to(device))
    found["by rows"] = by_rows(mine[0])
    found["of views"] = of_views(mine[0])
    found["apart"] = apart(mine[0])
    found["after a step"] = after_a_step(mine[0])
    found["message"] = message(mine[0])
    found["differentiated again"] = differentiated_again(mine[0])
    found["without module"] = without_module(mine[0])
    found["fsdp sum"] = accumulate_in_fsdp(mine)
    found["main_grad"] = main_grad_of(Model(), mine)
    return found


@pytest.fixture(scope="module")
def trained():
    return run(work, RANKS)


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


@pytest.mark.parametrize("loss", PASSES)
@pytest.mark.parametrize("shards", SHARDS)
def test_gathers_once_for_each_pass_and_reduces_once(trained, shards, loss):
    for found in trained:
        (counts, left), (eager, _) = found["sent", shards, loss]
        groups = 1 if shards.startswith("model") else 2
        assert eager.get("_reduce_scatter_base_", 0) == (0 if loss == "evaluation" else groups)
        expected = Counter(eager)
        kept = shards not in ("head", "model, sharded again")  # the weight stays whole until the gradients are reduced
        expected["_allgather_base_"] += 0 if kept else PASSES[loss]
        assert Counter(counts) == expected
        assert [size > 0 for size in left] == [kept, kept, kept and loss == "evaluation"]


def test_a_copy_has_the_weight_that_is_sharded_again(trained):
    for found in trained:
        for left, logsumexp, expected in found["copies"]:
            assert left == 0
            torch.testing.assert_close(logsumexp, expected)


@pytest.mark.parametrize("shards", ["head", "root"])
def test_what_is_beside_a_whole_weight_is_gathered(trained, shards):
    of_ranks = [found["beside a whole weight"]["whole"][1] for found in trained]
    assert {"head.bias", "head.lora_B", "head.parametrizations.weight.original1"} <= set(of_ranks[0])
    for found in trained:
        left, gradients = found["beside a whole weight"][shards]
        assert left == [True, False, False]
        assert not isinstance(gradients, str), gradients
        assert set(gradients) == set(of_ranks[0])
        for name, grad in gradients.items():
            torch.testing.assert_close(grad, sum(of_rank[name] for of_rank in of_ranks) / RANKS)


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("loss", TRAINED)
def test_gradients_made_in_forward_need_no_weight_in_backward(trained, loss, frozen, asked):
    """Where the route is asked for: left to choose, a rank with more tokens may take another route, and would gather alone."""
    of_ranks = [found["not gathered"][loss, frozen, asked] for found in trained]
    needed = 0 if asked and loss in ("mean", "token_loss", "unlabelled", "probabilities") else 1
    needed += loss == "twice" and not frozen and not asked  # the gradient of one forward is reduced before the other's
    for count, gradients, _, later in of_ranks:
        assert (count, later) == (needed, 0)
        for at, found in enumerate(gradients):
            torch.testing.assert_close(found, sum(expected[at] for _, _, expected, _ in of_ranks) / RANKS)


@pytest.mark.parametrize("loss", ["divergence", "distillation_loss"])
def test_the_head_of_a_teacher_is_sharded_again(trained, loss):
    """If it stayed whole, the next step would read these values, even if the teacher had changed in between."""
    for found in trained:
        left, grad, expected = found["teachers"][loss]
        assert left == 0
        torch.testing.assert_close(grad, expected)


def test_gathers_as_often_of_few_tokens_as_of_many(trained):
    for found in trained:
        assert found["by rows"] == [2, 2, 2]


def test_gathers_as_often_whatever_rows_and_labels(trained):
    for found in trained:
        assert found["of views"] == [4, 4, 4, 4]


@pytest.mark.parametrize("root", ["kept", "resharded"])
def test_losses_apart_gather_the_root_each_for_itself(trained, root):
    for found in trained:
        for at, grad in enumerate(found["apart"][root]):
            torch.testing.assert_close(grad, sum(f["apart"]["whole"][at] for f in trained) / RANKS)


def test_a_weight_that_no_unit_gathers_is_an_error_that_says_so(trained):
    for found in trained:
        assert "no FSDP2 unit around LinearHead" in found["message"]
        assert f"LinearLogits {(B * (S - 1), V)}" in found["message"]


def test_a_weight_that_was_sharded_again_asks_for_its_module(trained):
    for found in trained:
        assert all("pass module=" in message for message in found["without module"])


def test_gradients_to_be_differentiated_again_gather_the_weight(trained):
    for found in trained:
        expected, grad = found["differentiated again"]
        torch.testing.assert_close(grad, expected)


def test_what_zero3_leaves_of_a_weight_is_not_whole():
    assert not is_whole(torch.empty(0))


@pytest.mark.parametrize("variant", ["", "bias_alone", "fused"])
@pytest.mark.parametrize("shards", SHARDS)
def test_logits_of_before_a_step_are_not_those_of_after(trained, shards, variant):
    for found in trained:
        for message in found["after a step"][shards, variant]:
            assert f"shard of {'bias' if variant == 'bias_alone' else 'weight'} was modified in place" in message


def test_gradients_of_micro_batches_are_summed_in_fp32(trained):
    each = [list(bf16_gradients(batches(rank))) for rank in range(RANKS)]
    for rank, found in enumerate(trained):
        exact = sum(grad.float() for grad in each[rank])
        torch.testing.assert_close(found["main_grad"], exact, rtol=0, atol=0)
        assert not torch.equal(sum(each[rank]).float(), exact)  # a bf16 .grad would sum them like this
        mean = sum(grad.float() for grads in each for grad in grads) / RANKS
        torch.testing.assert_close(found["fsdp sum"], mean)
