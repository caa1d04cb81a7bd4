"""What LinearLogits refuse: when they are made, and when the tensors they are made of have changed since."""

import functools
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lazy_logits import IDS, B, H, S, V, make
from torch import nn

import fused_losses
from fused_losses import linear_logits_checks, settings
from fused_losses.linear_head import LinearHead
from fused_losses.linear_logits import LinearLogits


@pytest.mark.parametrize("name", ["hidden", "weight", "bias", "u", "B"])
@pytest.mark.parametrize("use", ["logsumexp", "view", "scale", "materialize", "pickle", "label"])
def test_a_change_of_what_it_stands_for_raises(name, use):
    lazy, _, tensors = make(bias=True, low_rank=True)
    view = lazy[:, 1:]
    with torch.no_grad():
        tensors[name].add_(1)
    uses = {
        "logsumexp": lambda z: z.logsumexp(-1),
        "view": lambda z: z.view(-1, V),
        "scale": lambda z: z * 2,
        "materialize": lambda z: z.materialize(),
        "pickle": pickle.dumps,
        "label": lambda z: z.double(),
    }
    for z in (lazy, view):
        with pytest.raises(RuntimeError, match=rf"{name} was modified in place"):
            uses[use](z)


def test_a_change_of_what_is_joined_raises():
    weight, hidden, other = torch.randn(V, H), torch.randn(B, S, H), torch.randn(B, S, H)
    parts = [LinearLogits(h, weight) for h in (hidden, other)]
    other.add_(1)
    with pytest.raises(RuntimeError, match="hidden was modified in place"):
        torch.cat(parts)


def test_a_temperature_that_changes_later_is_not_that_of_the_logits():
    temperature, hidden, weight = torch.full((B, S), 2.0), torch.randn(B, S, H), torch.randn(V, H)
    logits = LinearLogits(hidden, weight, temperature=temperature)
    temperature.zero_()
    torch.testing.assert_close(logits.materialize(), hidden @ weight.T / 2)


def test_a_change_of_hidden_before_a_head_of_inference_mode_raises():
    with torch.inference_mode():
        weight = torch.randn(V, H)
    hidden = torch.randn(B, S, H)
    logits = LinearLogits(hidden, weight)
    logits.argmax(-1)
    hidden.add_(1)
    with pytest.raises(RuntimeError, match="hidden was modified in place"):
        logits.argmax(-1)


class WritingThroughData(torch.optim.SGD):
    """Like optimizers with kernels of their own, whose writes PyTorch does not see."""

    def step(self):
        for p in self.param_groups[0]["params"]:
            p.data -= 0.1 * p.grad


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.AdamW,
        functools.partial(torch.optim.AdamW, fused=True),  # the default of transformers' Trainer
        functools.partial(torch.optim.SGD, foreach=True),
        WritingThroughData,
    ],
    ids=["plain", "fused", "foreach", "custom"],
)
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_logits_of_before_a_step_raise_where_it_changed_their_head(optimizer, frozen, compiled):
    head, other = LinearHead(H, V), nn.Linear(H, H)
    head.requires_grad_(not frozen)
    model = nn.Sequential(other, head)
    logits = (torch.compile(model, backend="eager") if compiled else model)(torch.randn(B, S, H))
    F.cross_entropy(logits.view(-1, V), IDS.view(-1)).backward()
    view = logits[:, 1:]
    trained = [p for m in (head, other) for p in m.parameters() if p.requires_grad]
    optimizer(trained, lr=0.1).step()
    for z in (logits, view):
        if frozen:
            assert z.argmax(-1).shape == z.shape[:-1]
        else:
            with pytest.raises(RuntimeError, match=r"weight was modified in place.*before optimizer.step\(\)"):
                z.argmax(-1)


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: fused_losses.cross_entropy(z, IDS),
        lambda z: fused_losses.token_statistics(z, IDS),
        lambda z: fused_losses.token_loss(lambda found: found.log_probs, z, IDS),
        lambda z: fused_losses.sft_loss(z, IDS),
        lambda z: fused_losses.divergence(z, torch.zeros(B, S, V)),
        lambda z: fused_losses.divergence(torch.zeros(B, S, V), z),
        lambda z: fused_losses.teacher_topk(z, 2),
        lambda z: fused_losses.sparse_distillation_loss(z, IDS[..., None], torch.zeros(B, S, 1)),
    ],
)
def test_losses_take_logits_alone(loss):
    """Not a model's output, a list, or log-probabilities that are lazy."""
    with pytest.raises(TypeError, match=r"(logits|input) must be a Tensor or a LinearLogits, got a SimpleNamespace$"):
        loss(SimpleNamespace(logits=torch.zeros(B, S, V)))
    with pytest.raises(TypeError, match=rf"got a LazyExpression \({B}, {S}, {V}\), made of one: materialize\(\) it"):
        loss(make()[0].log_softmax(-1))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: LinearLogits(torch.ones(2, 3), torch.ones(5, 4)), ValueError, r"\(2, 3\) and weight \(5, 4\)"),
        (lambda: LinearLogits(torch.ones(2, 3), torch.ones(5)), ValueError, r"weight \(5,\)"),
        (lambda: LinearLogits(torch.ones(()), torch.ones(5, 4)), ValueError, r"hidden \(\)"),
        (lambda: LinearLogits(torch.ones(2, 3), torch.ones(0, 3)), ValueError, r"weight \(0, 3\)"),
        (lambda: LinearLogits(torch.ones(2, 3), torch.ones(5, 3), torch.ones(4)), ValueError, r"\(5,\), got \(4,\)"),
        (lambda: LinearLogits(torch.ones(2, 3), torch.ones(5, 3, device="meta")), ValueError, "cpu, weight .* on meta"),
        (
            lambda: LinearLogits(torch.ones(2, 3), torch.ones(5, 3).half()),
            TypeError,
            "float32, weight .* is torch.float16",
        ),
        (lambda: LinearLogits(torch.ones(2, 3).long(), torch.ones(5, 3).long()), TypeError, "floating"),
        (lambda: LinearLogits(torch.ones(2, 3)), TypeError, "weight"),
        (lambda: LinearLogits(None, torch.ones(5, 3)), TypeError, r"hidden \(…, H\) must be a tensor, got a NoneType"),
        (lambda: LinearLogits(torch.ones(2, 3).numpy(), torch.ones(5, 3)), TypeError, "hidden .* got a ndarray"),
        (lambda: LinearLogits(torch.ones(2, 3), nn.Linear(3, 5)), TypeError, "got a Linear: pass its weight"),
        (lambda: LinearLogits(torch.ones(2, 3), torch.ones(5, 3), True), TypeError, "bias .* got a bool"),
        (lambda: LinearLogits(torch.ones(2, 3), torch.ones(5, 3), softcap=0.0), ValueError, "softcap"),
        (lambda: LinearLogits(torch.ones(2, 3), torch.ones(5, 3), temperature=0.0), ValueError, "temperature"),
        (
            lambda: LinearLogits(torch.ones(2, 3), torch.ones(5, 3), temperature=torch.ones(4)),
            ValueError,
            r"per token \(2,\), got \(4,\)",
        ),
        (
            lambda: LinearLogits(torch.ones(2, 3), torch.ones(5, 3), temperature=torch.ones(2, requires_grad=True)),
            ValueError,
            "detach",
        ),
        (
            lambda: LinearLogits(torch.ones(2, 3), torch.ones(5, 3), low_rank=(torch.ones(2, 2), torch.ones(4, 2))),
            ValueError,
            r"\(2, 2\) and \(4, 2\)",
        ),
    ],
)
def test_bad_construction(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (lambda z: z[5], IndexError, "out of bounds|out of range"),
        (lambda z: z[..., V], IndexError, "out of bounds"),
        (lambda z: z[0, 0, 0, 0], IndexError, "too many indices"),
        (lambda z: z.gather(-1, torch.full((B, S, 1), V)), IndexError, "out of bounds"),
        (lambda z: z.gather(-1, torch.full((B, S, 1), -100)), IndexError, "out of bounds"),
        (lambda z: z.log_softmax(-1)[0, 0, V], IndexError, "out of bounds"),
        (lambda z: z.view(3, -1), RuntimeError, r"invalid for LinearLogits \(2, 5, 11\)"),
        (lambda z: z.transpose(0, 3), IndexError, "Dimension out of range"),
        (lambda z: z.split([1, 2], 1), RuntimeError, "sum to 5"),
        (lambda z: z.narrow(1, 3, 4), RuntimeError, "exceeds"),
        (lambda z: z.topk(V + 1), RuntimeError, "out of range"),
        (lambda z: F.cross_entropy(z.view(-1, V), IDS.view(-1) + V), IndexError, "out of bounds"),
        (lambda z: F.cross_entropy(z.view(-1, V), IDS.view(-1)[1:]), ValueError, r"\(9,\)"),
        (lambda z: F.cross_entropy(z, IDS), ValueError, r"\(2, 5, 11\) are to stand at dimension 1"),
        (lambda z: F.nll_loss(z.log_softmax(-1), IDS), ValueError, r"\(2, 5, 11\) are to stand at dimension 1"),
        (lambda z: z.log_softmax(-1).gather(-1, IDS), RuntimeError, r"got \(2, 5\): write index.unsqueeze"),
        (lambda z: F.cross_entropy(z.view(-1, V), IDS.view(-1).int()), (TypeError, RuntimeError, ValueError), ""),
    ],
)
def test_bad_use_is_refused_before_logits_are_made(use, error, message):
    with settings.strict(), pytest.raises(error, match=message):
        use(make()[0])


def test_data_parallel_replicas_raise():
    head = LinearHead(H, V, bias=False)
    replica = head._replicate_for_data_parallel()
    replica.weight, replica.bias = head.weight.detach(), None
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        replica(torch.randn(B, H))


def test_sharded_tensors_raise():
    weight = torch.ones(V, H)
    weight.device_mesh = "a DTensor has one"
    with pytest.raises(TypeError, match="LinearHead"):
        LinearLogits(torch.ones(S, H), weight)


@pytest.mark.parametrize("made_of", [lambda p: p.detach(), lambda p: p.data, lambda p: p])
def test_logits_of_what_was_detached_of_a_parameter_raise_after_a_step(made_of):
    parameter = nn.Parameter(torch.randn(V, H), requires_grad=False)
    logits = LinearLogits(torch.randn(B, S, H), made_of(parameter))
    logits.logsumexp(-1)
    parameter.requires_grad_()
    parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW([parameter], lr=0.1, fused=True).step()
    with pytest.raises(RuntimeError, match="weight was modified in place"):
        logits.argmax(-1)


def test_a_step_while_another_thread_makes_heads(monkeypatch):
    """Autocast makes a new tensor of the weight for each head, and each one joins the watched tensors."""
    head, memory, made = LinearHead(H, V), linear_logits_checks._memory, []

    def meanwhile(t):
        made.append(LinearLogits(torch.randn(1, H), torch.randn(V, H)))
        return memory(t)

    logits = head(torch.randn(1, H))
    logits.logsumexp(-1).sum().backward()
    monkeypatch.setattr(linear_logits_checks, "_memory", meanwhile)
    torch.optim.SGD(head.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="weight was modified in place"):
        logits.logsumexp(-1)


def test_a_head_of_no_features_is_whole():
    logits = LinearLogits(torch.empty(B, 0), torch.empty(V, 0))
    torch.testing.assert_close(logits.logsumexp(-1), torch.zeros(B, V).logsumexp(-1))
