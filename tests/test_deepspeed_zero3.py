"""The head under DeepSpeed's ZeRO-3 with the loss outside the model: every parameter moves as in one process."""

import contextlib
import os

import pytest
import torch
import torch.nn.functional as F
from ranks import needs_ranks
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode

from fused_losses import settings
from fused_losses.bench.ranks import run
from fused_losses.linear_head import LinearHead
from fused_losses.linear_logits import LinearLogits
from fused_losses.token_loss import token_loss

RANKS, STEPS = 2, 3
if torch.cuda.device_count() < RANKS:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
deepspeed = pytest.importorskip("deepspeed")
pytestmark = needs_ranks

B, S, V, H = 2, 5, 13, 8


class Model(nn.Module):
    def __init__(self, tied=False, rank=0, bias=True):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(V, H)
        self.layer = nn.Linear(H, H)
        self.head = LinearHead(H, V, bias=bias, softcap=4.0, rank=rank)
        if tied:
            self.head.weight = self.embed.weight
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=g) / 2

    def forward(self, ids):
        return self.head(torch.tanh(self.layer(self.embed(ids))))


class OutsideTheHead(Model):
    def forward(self, ids):
        hidden = torch.tanh(self.layer(self.embed(ids)))
        with deepspeed.zero.GatheredParameters(list(self.head.parameters())):
            return LinearLogits(hidden, self.head.weight, self.head.bias, softcap=4.0, module=self.head)


class Eager(Model):
    """The same model, but with a head that makes logits."""

    def __init__(self):
        super().__init__()
        head = nn.Linear(H, V)
        head.weight, head.bias = self.head.weight, self.head.bias
        self.head = head

    def forward(self, ids):
        return 4 * torch.tanh(self.head(torch.tanh(self.layer(self.embed(ids)))) / 4)


def step_loss(name, logits, ids):
    logits, ids = logits[:, :-1], ids[:, 1:]
    if name == "mean":
        return F.cross_entropy(logits.reshape(-1, V), ids.reshape(-1))
    if name == "token_loss":
        return token_loss(lambda s: -s.log_probs - 0.1 * s.entropy, logits, ids, statistics=("log_probs", "entropy"))[0]
    logp = F.log_softmax(logits, -1)
    per_token = logp.gather(-1, ids.unsqueeze(-1)).mean()
    if name == "per_token":
        return -per_token
    # Several passes over the weight in one backward, one of them through materialised logits.
    entropy = -(logp.exp() * logp).sum(-1)
    if isinstance(logits, LinearLogits):
        logits = logits.materialize()
    return -per_token - 0.1 * entropy.mean() + logits.square().mean()


VARIANTS = {
    "bias": {},
    "no_bias": {"bias": False},
    "tied": {"tied": True},
    "lora": {"rank": 2},
    "lora_and_weight": {"rank": 2},
    "frozen_body": {},
    "frozen_body_lora": {"rank": 2},
    "frozen_weight": {},
    "accumulation": {},
    "outside": {},
    "two_forwards": {},
    "then_evaluated": {},
    "eager": {},
}
# By default ZeRO-3 keeps the parameters that a step needs again soon; where they are as small as here, it keeps all.
ZERO3 = {
    "freed": {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 0,
        "stage3_prefetch_bucket_size": 0,
    },
    "reused": {"stage3_param_persistence_threshold": 0},
    "whole": {},
}
LOSSES = ["mean", "per_token", "token_loss", "several"]
CASES = [(loss, "bias", zero3) for loss in LOSSES for zero3 in ZERO3] + [("several", "eager", "freed")]
CASES += [(loss, v, "freed") for v in VARIANTS if v not in ("bias", "eager") for loss in ("mean", "per_token")]


def prepare(variant):
    if variant == "eager":
        return Eager()
    model = (OutsideTheHead if variant == "outside" else Model)(**VARIANTS[variant])
    if variant.startswith("frozen_body"):
        model.embed.requires_grad_(False)
        model.layer.requires_grad_(False)
    if variant in ("frozen_weight", "frozen_body_lora", "lora"):
        model.head.weight.requires_grad_(False)
    return model


def batches(rank):
    ids = torch.randint(0, V, (STEPS, RANKS * B, S), generator=torch.Generator().manual_seed(1))
    return ids if rank is None else ids[:, rank * B : (rank + 1) * B]


def optimizer_of(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3, momentum=0.5)


def engine_of(model, zero3, steps=1):
    config = {
        "train_micro_batch_size_per_gpu": B // steps,
        "gradient_accumulation_steps": steps,
        "gradient_clipping": 0.0,  # by default it clips
        "zero_optimization": {"stage": 3, **ZERO3[zero3]},
        "zero_allow_untested_optimizer": True,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=config, dist_init_required=False)[0]


def sizes(model):
    return [p.numel() for p in model.parameters()]


def train_sharded(case, device):
    loss, variant, zero3 = case
    steps = 2 if variant == "accumulation" else 1
    model = prepare(variant).to(device)
    engine = engine_of(model, zero3, steps)
    left = []
    for ids in batches(torch.distributed.get_rank()):
        for part in ids.to(device).split(B // steps):
            # CommDebugMode does not support a second forward.
            counting = CommDebugMode() if variant in ("bias", "eager") else contextlib.nullcontext()
            with counting, settings.strict():
                parts = part.split(1) if variant == "two_forwards" else [part]
                logits = [engine(x) for x in parts]
                if variant == "then_evaluated":
                    with torch.no_grad():
                        engine(part)
                left += sizes(model)
                value = sum(step_loss(loss, z, x) for z, x in zip(logits, parts, strict=True)) / len(parts)
                left += sizes(model)
                engine.backward(value * (B * (S - 1)) ** -(loss == "token_loss"))
                left += sizes(model)
            gathers = 0 if variant not in ("bias", "eager") else counting.get_total_counts()
            engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine.destroy()
    return parameters, any(left), gathers


def not_gathered(device):
    model = Model().to(device)
    engine = engine_of(model, "freed")
    hidden = torch.randn(B, S, H, device=device)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        logits = LinearLogits(hidden, model.head.weight, model.head.bias)
        value = logits.logsumexp(-1).sum()
    with pytest.raises(ValueError, match="module="):
        LinearLogits(hidden, model.head.weight, model.head.bias)
    with pytest.raises(RuntimeError, match="module="):
        logits.materialize()
    with pytest.raises(RuntimeError, match="module="):
        value.backward()
    engine.destroy()
    return True


def work(device):
    found = {}
    for case in CASES:
        try:
            found[case] = train_sharded(case, device)
        except Exception as error:
            found[case] = repr(error)
    return found, not_gathered(device)


@pytest.fixture(scope="module")
def trained():
    return run(work, RANKS)


def train(model, loss):
    optimizer = optimizer_of(model)
    for ids in batches(None):
        (step_loss(loss, model(ids), ids) * (RANKS * B * (S - 1)) ** -(loss == "token_loss")).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(("loss", "variant", "zero3"), CASES)
def test_trains_as_one_process_does(trained, loss, variant, zero3):
    model = prepare("bias" if variant == "outside" else variant)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, loss)
    for found, _ in trained:
        found = found[loss, variant, zero3]
        assert not isinstance(found, str), found
        found, left, _ = found
        assert left == (zero3 != "freed")  # whole parameters after a forward, loss or backward
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name], parameter.detach(), msg=lambda m, name=name: f"{name}: {m}")
            assert torch.equal(found[name], start[name]) != parameter.requires_grad, name


def test_gathers_once_more_than_a_head_that_makes_logits_for_each_pass(trained):
    """The weight is gathered for the head's own forward, for each pass of the loss, and once for the backward of all passes."""
    for found, _ in trained:
        eager = found["several", "eager", "freed"][2]
        passes = {"mean": 1, "per_token": 1, "token_loss": 1, "several": 2}
        for loss, times in passes.items():
            assert found[loss, "bias", "freed"][2] - eager == 2 * times, loss  # the weight and the bias


def test_says_where_the_weight_was_not_gathered(trained):
    assert all(raised for _, raised in trained)
