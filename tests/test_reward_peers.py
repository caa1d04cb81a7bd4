"""The reward-model losses are what TRL 1.16 and OpenRLHF compute, where those are installed: value and gradient."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from fused_losses import modules, reward

pytestmark = pytest.mark.filterwarnings("ignore")

MARGIN = torch.tensor([0.3, 0.0, 1.2, -0.4])


def assert_same(ours, theirs, *leaves):
    losses = ours(*leaves), theirs(*leaves)
    torch.testing.assert_close(*losses)
    for a, b in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["PairWiseLoss", "LogExpLoss"])
@pytest.mark.parametrize("margin", [None, MARGIN])
def test_openrlhf(name, margin):
    theirs, ours = getattr(pytest.importorskip("openrlhf.models.loss"), name)(), getattr(modules, name)()
    leaves = [torch.randn(4, requires_grad=True) for _ in range(2)]
    assert_same(lambda c, r: ours(c, r, margin), lambda c, r: theirs(c, r, margin), *leaves)


@pytest.mark.parametrize("kind", ["hard", "hard, two ids", "soft"])
def test_openrlhf_prm(kind):
    losses = pytest.importorskip("openrlhf.models.loss")
    if not hasattr(losses, "PRMLoss"):
        pytest.skip("this version has no PRMLoss")
    inputs = torch.tensor([[9, 1, 9, 9], [3, 9, 4, 9]])
    labels = torch.tensor([[3, 0, -100, 7], [0, 7, 0, 3]])
    if kind == "soft":
        labels = torch.rand(2, 4)
    arguments = (9, None if kind == "hard" else [3, 7])
    logits = torch.randn(2, 4, 12, requires_grad=True)
    ours, theirs = modules.PRMLoss(*arguments), losses.PRMLoss(*arguments)
    assert_same(lambda z: ours(inputs, z, labels), lambda z: theirs(inputs, z, labels), logits)
    accuracies = [loss(inputs, logits, labels, return_acc=True)[1] for loss in (ours, theirs)]
    torch.testing.assert_close(*accuracies)


@pytest.mark.parametrize("margin", [None, MARGIN])
@pytest.mark.parametrize("coefficient", [None, 0.1])
def test_trl(margin, coefficient):
    """The trainer's own `compute_loss`, and what it logs."""
    trainer = pytest.importorskip("trl").RewardTrainer
    state = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        args=SimpleNamespace(center_rewards_coefficient=coefficient),
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    inputs = {} if margin is None else {"margin": margin}

    def theirs(chosen, rejected):
        logits = torch.cat([chosen, rejected]).unsqueeze(-1)
        return trainer.compute_loss(state, lambda **_: SimpleNamespace(logits=logits), dict(inputs))

    def ours(chosen, rejected):
        return reward.pairwise_reward_loss(chosen, rejected, margin, center_rewards_coefficient=coefficient)

    leaves = [torch.randn(4, requires_grad=True) for _ in range(2)]
    assert_same(ours, theirs, *leaves)
    for name, metric in reward.reward_metrics(*leaves).items():
        assert state._metrics["eval"][name] == [pytest.approx(metric.item())]
