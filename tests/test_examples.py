"""Each example is the step that it claims: the same loss and the same parameters as plain float64 PyTorch on whole logits."""

import copy
import importlib
import os
import pathlib
import runpy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from ranks import needs_ranks

from fused_losses.settings import strict

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
# The integrations' tests run the examples that need another library.
SCRIPTS = {"tiny_transformer", "distil", "demo", "gradient_filter"}
OTHERS = {*SCRIPTS, *(path.stem for path in EXAMPLES.glob("train_with_*.py"))}
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem not in OTHERS)


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.mark.parametrize("name", NAMES)
def test_runs(name, capsys):
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert not torch.distributed.is_initialized()
    assert len(lines) == 5
    assert "nan" not in "".join(lines)


def test_gradient_filter(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    size = ["--steps", "3", "--vocab", "8192", "--hidden", "32", "--batch", "2"]
    monkeypatch.setattr(sys, "argv", ["gradient_filter.py", *size])
    runpy.run_path(str(EXAMPLES / "gradient_filter.py"), run_name="__main__")
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if "filter 2^" in line]
    (_, loss, ratio), *filters = [[cell.strip() for cell in row] for row in rows]
    assert float(loss) > 1
    assert float(ratio) > 0
    assert float(filters[0][1]) < 0.75
    columns, of_hidden, dropped, of_weight = zip(*(map(float, row[1:]) for row in filters), strict=True)
    assert of_hidden[0] < dropped[0]
    for found in (columns, [-e for e in of_hidden], [-e for e in of_weight]):
        assert list(found) == sorted(found), "a smaller threshold multiplies more and errs less"


@needs_ranks
def test_tensor_parallel_is_what_one_process_does():
    """Under torchrun, on a mesh of 2 × 2."""
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    script = str(EXAMPLES / "tensor_parallel.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    alone, together = (
        subprocess.run(
            [*command, script], env=environment, capture_output=True, text=True, check=True, timeout=120
        ).stdout
        for command in ([sys.executable], torchrun)
    )
    assert len(set(alone.splitlines())) == 5
    assert together == alone


def load(name, **model):
    """The example, its model in float64, and a copy of that model with slightly different parameters."""
    example, tiny = importlib.import_module(name), importlib.import_module("tiny_transformer")
    policy = tiny.TinyTransformer(**model).double()
    other = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return example, policy, other


def sgd(model, lr):
    return torch.optim.SGD(model.parameters(), lr=lr)


def whole_logits(model, ids, mask=None):
    return F.linear(model.hidden(ids, mask), model.head.weight)


def next_log_probs(model, ids, mask=None):
    """The log-probability of each token after the first, ``(B, S − 1)``."""
    return whole_logits(model, ids, mask)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def assert_same_steps(model, lr, step, exact_loss, updates=1):
    """``step(model, optimizer)`` gives the same losses and the same parameters as descent on ``exact_loss(model)``."""
    ours, exact = copy.deepcopy(model), copy.deepcopy(model)
    with strict():
        losses = step(ours, sgd(ours, lr))
    optimizer = sgd(exact, lr)
    for i in range(updates):
        loss = exact_loss(exact)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(losses[i], loss.detach())
    for (name, parameter), start in zip(exact.named_parameters(), model.parameters(), strict=True):
        assert not torch.equal(parameter, start), name
        torch.testing.assert_close(ours.get_parameter(name), parameter, msg=lambda m, name=name: f"{name}: {m}")


def test_sft():
    example, model, _ = load("sft")
    batch = example.make_batch()
    labels, next_position = batch["labels"][0, 1:], batch["position_ids"][0, 1:]
    counted = (labels != -100) & (next_position != 0)
    assert counted.sum() < (labels != -100).sum()  # some label is at a document's start

    def exact_loss(model):
        return -next_log_probs(model, batch["ids"])[0][counted].mean()

    assert_same_steps(model, 0.1, lambda m, o: [example.step(m, o, batch)], exact_loss)


def test_dpo():
    example, policy, reference = load("dpo")
    batch = example.make_batch()
    with torch.no_grad():
        reference_logps = example.log_probs(reference, batch)
    answer = batch["labels"][:, 1:] != -100

    def sums(model):
        logps = next_log_probs(model, batch["ids"], batch["mask"])
        return logps.where(answer, 0).sum(1).split(3)

    def exact_loss(model):
        (chosen, rejected), (ref_chosen, ref_rejected) = sums(model), [x.detach() for x in sums(reference)]
        return -torch.log(torch.sigmoid(0.5 * (chosen - rejected - ref_chosen + ref_rejected))).mean()

    assert_same_steps(policy, 0.01, lambda m, o: [example.step(m, o, batch, reference_logps)[0]], exact_loss)


def test_kto():
    example, policy, reference = load("kto")
    batch = example.make_batch()
    good = batch["good"]

    def ratios(model, ids):
        return (next_log_probs(model, ids) - next_log_probs(reference, ids).detach())[:, 3:].sum(1)

    # Choose the policy whose KL the clamp does not reach.
    if ratios(policy, batch["kl_ids"]).mean() < 0:
        policy, reference = reference, policy
    kl = ratios(policy, batch["kl_ids"]).mean().detach()
    assert kl > 0

    def exact_loss(model):
        lr = ratios(model, batch["ids"])
        chosen, rejected = 1 - torch.sigmoid(0.5 * (lr[good] - kl)), 1 - torch.sigmoid(0.5 * (kl - lr[~good]))
        return torch.cat([chosen, 1.5 * rejected]).mean()

    assert_same_steps(policy, 0.05, lambda m, o: [example.step(m, reference, o, batch)[0]], exact_loss)


def clipped(r, A):
    return -torch.minimum(r * A, r.clamp(0.8, 1.2) * A)


def test_grpo():
    example, policy, reference = load("grpo")
    prompts = torch.randint(2, 64, (4, example.PROMPT))
    batch = example.rollout(policy, prompts)
    batch["mask"][1, 3:] = False  # one answer that ended early
    assert (batch["advantages"] > 0).any()
    assert (batch["advantages"] < 0).any()
    ids, mask, A = batch["ids"], batch["mask"], batch["advantages"][:, None]

    def answer(model):
        return next_log_probs(model, ids)[:, example.PROMPT - 1 :]

    old, ref = answer(policy).detach(), answer(reference).detach()
    shares = []

    def exact_loss(model):
        logp = answer(model)
        r = torch.exp(logp - old)
        shares.append((((r > 1.2) & (A > 0)) | ((r < 0.8) & (A < 0)))[mask].double().mean())
        kl = torch.exp(ref - logp) - (ref - logp) - 1
        losses = (clipped(r, A) + 0.04 * kl * r).where(mask, 0)
        return (losses.sum(1) / mask.sum(1)).mean()

    found = {}

    def step(model, optimizer):
        losses, metrics = example.step(model, reference, optimizer, batch)
        found.update(metrics)
        return losses

    assert_same_steps(policy, 0.5, step, exact_loss, updates=2)
    assert shares[1] > 0
    torch.testing.assert_close(found["clip_ratio/region_mean"].double(), shares[1])


def test_ppo_actor():
    example, policy, reference = load("ppo_actor")
    critic = load("ppo_actor", outputs=1)[1]
    batch = example.rollout(policy, reference, critic, torch.randint(2, 64, (8, example.PROMPT)))
    ids, A, S = batch["ids"], batch["advantages"], batch["advantages"].shape[1]
    with torch.no_grad():
        old, ref = (next_log_probs(m, ids)[:, example.PROMPT - 1 :] for m in (policy, reference))
        values = whole_logits(critic, ids)[:, example.PROMPT - 1 : -1, 0]
        rewards = -0.1 * (old - ref)
        rewards[:, -1] += (ids[:, example.PROMPT :] % 2 == 0).double().mean(1)
        td = rewards + F.pad(values, (0, 1))[:, 1:] - values
        gae = torch.stack([sum(0.95 ** (u - t) * td[:, u] for u in range(t, S)) for t in range(S)], 1)
    torch.testing.assert_close(A, (gae - gae.mean()) / gae.std())

    def exact_loss(model):
        r = torch.exp(next_log_probs(model, ids)[:, example.PROMPT - 1 :] - old)
        shares.append((r - 1).abs().gt(0.2).double().mean())
        return clipped(r, A).mean()

    shares = []
    assert_same_steps(policy, 0.5, lambda m, o: example.step(m, o, batch)[0], exact_loss, updates=2)
    assert shares[1] > 0


def test_reward_model():
    example, model, _ = load("reward_model", outputs=1)
    batch = example.make_batch()
    ids, margin = batch["ids"], batch["margin"].double()

    def exact_loss(model):
        every = whole_logits(model, ids, ids != 0)[..., 0]
        last = torch.stack([row[n - 1] for row, n in zip(every, (ids != 0).sum(1).tolist(), strict=True)])
        chosen, rejected = last[:4], last[4:]
        return torch.log1p(torch.exp(rejected - chosen + margin)).mean() + 0.01 * ((chosen + rejected) ** 2).mean()

    assert_same_steps(model, 0.1, lambda m, o: [example.step(m, o, batch)[0]], exact_loss)


def test_prm():
    example, model, _ = load("prm")
    batch = example.make_batch()
    good, bad = batch["labels"] == example.GOOD, batch["labels"] == example.BAD
    assert good.any()
    assert bad.any()

    def exact_loss(model):
        logits = whole_logits(model, batch["ids"])
        advantage = logits[..., example.GOOD] - logits[..., example.BAD]
        return torch.log1p(torch.exp(torch.cat([-advantage[good], advantage[bad]]))).mean()

    assert_same_steps(model, 0.1, lambda m, o: [example.step(m, o, batch)[0]], exact_loss)
