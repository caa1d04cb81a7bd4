"""The modules compute what the references do, under OpenRLHF's names, and import as theirs do."""

import inspect
import os
import pathlib
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fused_losses import modules
from fused_losses.reference import reward as reference_reward
from fused_losses.reference import sft as reference_sft

SIGNATURES = {
    "GPTLMLoss": ("(ring_attn_group=None)", "(logits, labels)"),
    "PairWiseLoss": ("(*args, **kwargs)", "(chosen_reward, reject_reward, margin=None)"),
    "LogExpLoss": ("(*args, **kwargs)", "(chosen_reward, reject_reward, margin=None)"),
    "PRMLoss": ("(placeholder_token_id, reward_token_ids=None)", "(inputs, logits, labels, *, return_acc=False)"),
}


def bare(signature):
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature([p for p in parameters if p.name != "self"]))


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    module = getattr(modules, name)
    assert (bare(inspect.signature(module)), bare(inspect.signature(module.forward))) == SIGNATURES[name]


def test_gpt_lm_loss():
    logits, labels = torch.randn(2, 5, 7, dtype=torch.float64), torch.randint(0, 7, (2, 5))
    labels[0, 2:4] = -100
    torch.testing.assert_close(modules.GPTLMLoss()(logits, labels), reference_sft.sft_loss(logits, labels))
    assert modules.GPTLMLoss()(logits, torch.full_like(labels, -100)).isnan()


RING_S, RING_V = 11, 7  # 11 tokens over 2 ranks: 5 each, and the last is nobody's
RING_LABELS = {
    "both": torch.tensor([[1, 2, -100, 4, 5, 6, 0, 1, 2, 3, 4]]),
    "one has nothing": torch.tensor([[1, 2, -100, 4, 5, 6, -100, -100, -100, -100, 4]]),
}


def ring_logits(rank):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(1, RING_S // 2, RING_V, dtype=torch.float64, generator=generator)


def ring_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for name, labels in RING_LABELS.items():
        logits = ring_logits(rank).requires_grad_()
        loss = modules.GPTLMLoss(dist.group.WORLD)(logits, labels)
        loss.backward()
        results[name] = (loss.detach(), logits.grad)
    torch.save(results, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def test_gpt_lm_loss_on_a_ring():
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(ring_rank, (folder,), nprocs=2)
        results = [torch.load(pathlib.Path(folder) / f"{rank}.pt") for rank in range(2)]
    for name, labels in RING_LABELS.items():
        local, grads = [], []
        for rank in range(2):
            logits = ring_logits(rank).requires_grad_()
            loss = reference_sft.sft_loss(logits, labels[:, 5 * rank : 5 * rank + 5])
            grads.append(torch.autograd.grad(loss / 2 + 0 * logits.sum(), logits)[0])
            local.append(loss.detach())
        assert (local[1] == 0) == (name == "one has nothing")
        for rank in range(2):
            torch.testing.assert_close(results[rank][name], (sum(local) / 2, grads[rank]))
        assert torch.equal(results[0][name][0], results[1][name][0])


@pytest.mark.parametrize("margin", [None, torch.tensor([0.5, 1.5, -1.0], dtype=torch.float64)])
def test_pairs(margin):
    chosen, rejected = torch.randn(2, 3, dtype=torch.float64)
    expected = reference_reward.pairwise_reward_loss(chosen, rejected, margin)
    torch.testing.assert_close(modules.PairWiseLoss()(chosen, rejected, margin), expected)
    expected = reference_reward.log_exp_loss(chosen, rejected)
    torch.testing.assert_close(modules.LogExpLoss()(chosen, rejected, margin), expected)


@pytest.mark.parametrize("ids", [None, [1, 2]])
def test_prm_loss(ids):
    inputs, labels = torch.tensor([[9, 1, 9], [9, 9, 3]]), torch.tensor([[1, -100, 2], [-100, 1, -100]])
    logits = torch.randn(2, 3, 10, dtype=torch.float64)
    expected = reference_reward.prm_loss(inputs, logits, labels, placeholder_token_id=9, reward_token_ids=ids)
    loss = modules.PRMLoss(9, ids)
    torch.testing.assert_close(loss(inputs, logits, labels), expected[0])
    torch.testing.assert_close(loss(inputs, logits, labels, return_acc=True), expected)
