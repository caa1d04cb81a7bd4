"""The KL estimates are what verl 0.9 and OpenRLHF 0.11 compute, where those import: value and gradient."""

import pytest
import torch

from fused_losses.kl import kl_estimate

# Differences beyond every clamp on both sides, and one of 0.
D = torch.cat([torch.linspace(-4, 4, 33), torch.tensor([-300.0, -30.0, -15.0, 11.0, 30.0, 300.0])])
REF = -torch.linspace(0.1, 5, len(D))
OLD = REF + D.roll(7).clamp(-4, 4)
VERL = {
    "kl": ("k1", {}),
    "abs": ("abs", {}),
    "mse": ("k2", {}),
    "low_var_kl": ("k3", {"clamp": 10}),
    "k1+": ("k1", {"gradient": "k2"}),
    "abs+": ("abs", {"gradient": "k2"}),
    "k3+": ("k3", {"clamp": 10, "gradient": "k2"}),
}


def compare(ours, theirs):
    leaves = [(REF + D).requires_grad_() for _ in range(2)]
    values = ours(leaves[0]), theirs(leaves[1])
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), x)[0] for v, x in zip(values, leaves, strict=True)))


@pytest.mark.parametrize("name", VERL)
def test_verl(name):
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    kind, options = VERL[name]
    compare(lambda x: kl_estimate(x, REF, kind, **options), lambda x: core_algos.kl_penalty(x, REF, name))


@pytest.mark.parametrize("old", [None, OLD])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_openrlhf(kind, unbiased, old):
    utils = pytest.importorskip("openrlhf.models.utils")
    options = {"gradient": "k2", "old_log_probs": old} if unbiased else {}
    compare(
        lambda x: kl_estimate(x, REF, kind, clamp=10, **options),
        lambda x: utils.compute_approx_kl(x, REF, old, kind, unbiased),
    )
