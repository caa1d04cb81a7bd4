"""The modules compute what the references do, under OpenRLHF's names, and import as theirs do."""

import inspect

import pytest
import torch
import torch.distributed as dist
from ranks import needs_ranks

from fused_losses import modules
from fused_losses.bench.ranks import run
from fused_losses.reference import aggregation as reference_aggregation
from fused_losses.reference import policy as reference_policy
from fused_losses.reference import preference as reference_preference
from fused_losses.reference import reward as reference_reward
from fused_losses.reference import rollouts as reference_rollouts
from fused_losses.reference import sft as reference_sft

LOGPS = "policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps"
SIGNATURES = {
    "GPTLMLoss": ("(ring_attn_group=None)", "(logits, labels)"),
    "SFTLoss": (
        "(token_level_loss=True)",
        "(per_token_logps, loss_mask, dp_size=1, batch_num_tokens=None, global_batch_size=None)",
    ),
    "DPOLoss": ("(beta, label_smoothing=0.0, ipo=False)", f"({LOGPS})"),
    "VanillaKTOLoss": ("(beta)", f"({LOGPS})"),
    "KTOLoss": (
        "(beta, desirable_weight, undesirable_weight, world_size, device)",
        "(policy_chosen_logps, policy_rejected_logps, policy_KL_logps, reference_chosen_logps, "
        "reference_rejected_logps, reference_KL_logps)",
    ),
    "PairWiseLoss": ("(*args, **kwargs)", "(chosen_reward, reject_reward, margin=None)"),
    "LogExpLoss": ("(*args, **kwargs)", "(chosen_reward, reject_reward, margin=None)"),
    "PolicyLoss": (
        "(clip_eps_low=0.2, clip_eps_high=0.2, dual_clip=None, token_level_loss=True, policy_loss_type='ppo', "
        "is_correction_level='off', is_correction_mode='mask', is_correction_gating='ratio', "
        "is_correction_threshold=(0.5, 5.0), *, enable_vllm_is_correction=None, vllm_is_truncated_threshold=None, "
        "vllm_is_correction_type='tis')",
        "(log_probs, old_log_probs, advantages, action_mask=None, rollout_log_probs=None, dp_size=1, "
        "batch_num_tokens=None, global_batch_size=None)",
    ),
    "ValueLoss": (
        "(clip_eps=None, token_level_loss=True)",
        "(values, old_values, returns, action_mask=None, dp_size=1, batch_num_tokens=None, global_batch_size=None)",
    ),
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


def ring_rank(device):
    results = {}
    for name, labels in RING_LABELS.items():
        logits = ring_logits(dist.get_rank()).to(device).requires_grad_()
        loss = modules.GPTLMLoss(dist.group.WORLD)(logits, labels.to(device))
        loss.backward()
        results[name] = (loss.detach(), logits.grad)
    return results


@needs_ranks
def test_gpt_lm_loss_on_a_ring():
    results = run(ring_rank, 2)
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


def assert_module_equals(module, expected, inputs, name, **options):
    leaves = [x.clone().requires_grad_() for x in inputs]
    ours, exact = module(*leaves), getattr(reference_preference, name)(*leaves, **options)
    torch.testing.assert_close(ours, exact)
    grads = [torch.autograd.grad(x[0], leaves, allow_unused=True, materialize_grads=True) for x in (ours, exact)]
    torch.testing.assert_close(*grads)
    assert len(ours) == expected
    return ours[0].item()


def test_dpo_loss():
    inputs = -torch.rand(4, 5, dtype=torch.float64) * 9
    arguments = {(): {}, (0.2,): {"label_smoothing": 0.2}, (0.0, True): {"loss_type": "ipo"}}
    arguments[0.2, True] = arguments[0.0, True]  # IPO takes no smoothing
    results = {
        a: assert_module_equals(modules.DPOLoss(0.3, *a), 3, inputs, "dpo_loss", beta=0.3, **options)
        for a, options in arguments.items()
    }
    assert len(set(results.values())) == 3


@pytest.mark.parametrize("counts", [(3, 4), (0, 4), (3, 0)])
def test_kto_loss(counts):
    def logps(n):
        return -torch.rand(n, dtype=torch.float64) * 9

    inputs = [logps(counts[0]), logps(counts[1]), logps(5) + 3, logps(counts[0]), logps(counts[1]), logps(5)]
    options = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7}
    module = modules.KTOLoss(0.3, 1.2, 0.7, world_size=1, device=torch.device("cpu"))
    weighted = assert_module_equals(module, 4, inputs, "kto_loss", **options)
    assert module(*inputs)[3] > 0
    assert weighted != assert_module_equals(modules.KTOLoss(0.3, 1, 1, 1, "cpu"), 4, inputs, "kto_loss", beta=0.3)
    if all(counts):
        pairs = inputs[:2] + inputs[3:5]
        vanilla = assert_module_equals(modules.VanillaKTOLoss(0.3), 3, pairs, "vanilla_kto_loss", beta=0.3)
        assert vanilla not in (
            weighted,
            assert_module_equals(modules.VanillaKTOLoss(1), 3, pairs, "vanilla_kto_loss", beta=1),
        )


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


def policy_batch():
    generator = torch.Generator().manual_seed(0)
    log_probs, old, rollout, advantages = (
        torch.randn(4, 5, dtype=torch.float64, generator=generator) * scale - shift
        for scale, shift in ((0.4, 2), (0.4, 2), (0.4, 2), (1, 0))
    )
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]])
    return log_probs, old, advantages, mask, rollout


# PolicyLoss's arguments, and the reference's: (loss, weight).
PPO = {"loss_type": "ppo", "count_empty": False}
POLICY = {
    "default": ({}, PPO, None),
    "clips": (
        {"clip_eps_low": 0.1, "clip_eps_high": 0.3, "dual_clip": 1.2},
        PPO | {"eps_low": 0.1, "eps_high": 0.3, "dual_clip": 1.2},
        None,
    ),
    "sequences": ({"token_level_loss": False}, PPO | {"aggregation": "seq_mean_token_mean"}, None),
    "gspo": ({"policy_loss_type": "gspo"}, PPO | {"loss_type": "gspo"}, None),
    "token mask": (
        {"is_correction_level": "token", "is_correction_threshold": (0.8, 1.4)},
        PPO,
        {"mode": "mask", "low": 0.8, "high": 1.4},
    ),
    "token clip": (
        {"is_correction_level": "token", "is_correction_mode": "clip", "is_correction_threshold": (0.8, 1.4)},
        PPO,
        {"mode": "truncate", "low": 0.8, "high": 1.4},
    ),
    "sequence mask": (
        {"is_correction_level": "seq", "is_correction_threshold": (0.8, 1.1)},
        PPO,
        {"level": "sequence_mean", "mode": "mask", "low": 0.8, "high": 1.1},
    ),
    "divergence": (
        {"is_correction_level": "token", "is_correction_gating": "tv", "is_correction_threshold": (0.0, 0.05)},
        PPO,
        {"mode": "mask", "gate": "tv", "high": 0.05},
    ),
    "older, off": ({"enable_vllm_is_correction": False}, PPO, None),
    "older, one bound": (
        {"enable_vllm_is_correction": True, "vllm_is_truncated_threshold": 1.2},
        PPO,
        {"high": 1.2},
    ),
    "older, icepop": (
        {
            "enable_vllm_is_correction": True,
            "vllm_is_truncated_threshold": [0.7, 1.2],
            "vllm_is_correction_type": "icepop",
        },
        PPO,
        {"mode": "mask", "low": 0.7, "high": 1.2},
    ),
}


@pytest.mark.parametrize("name", POLICY)
def test_policy_loss(name):
    arguments, options, correction = POLICY[name]
    log_probs, old, advantages, mask, rollout = policy_batch()
    log_probs.requires_grad_()
    results = modules.PolicyLoss(**arguments)(log_probs, old, advantages, mask, rollout)
    assert len(results) == (4 if name.startswith("older") else 5)
    weight = metrics = None
    if correction:
        weight, metrics = reference_rollouts.mismatch_weight(old, rollout, mask, **correction)
        assert 0 < metrics["filter_fraction"] < 1
        torch.testing.assert_close(results[3].item(), float(metrics["mismatch_kl"]))
        if len(results) == 5:
            torch.testing.assert_close(results[4].item(), float(metrics["filter_fraction"]))
    else:
        assert all(x is None for x in results[3:])
    loss, metrics = reference_policy.grpo_loss(log_probs, old, advantages, mask, mismatch_weight=weight, **options)
    torch.testing.assert_close(results[0], loss)
    grads = [torch.autograd.grad(x, log_probs)[0] for x in (results[0], loss)]
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(results[1].item(), metrics["clip_ratio/region_mean"])
    torch.testing.assert_close(results[2].item(), metrics["ppo_kl"])


def test_only_the_loss_has_a_gradient():
    log_probs, old, advantages, mask, rollout = policy_batch()
    given = log_probs.requires_grad_(), old.requires_grad_(), advantages, mask, rollout
    loss, *metrics = modules.PolicyLoss(is_correction_level="token")(*given)
    assert loss.requires_grad
    assert not any(metric.requires_grad for metric in metrics)


def test_policy_losses_differ():
    batch = policy_batch()
    results = {name: modules.PolicyLoss(**arguments)(*batch)[0].item() for name, (arguments, *_) in POLICY.items()}
    assert results.pop("older, off") == results["default"]
    assert len(set(results.values())) == len(results)


def test_a_threshold_from_0_on_is_for_a_gate_that_acts():
    modules.PolicyLoss(is_correction_gating="tv")
    modules.PolicyLoss(is_correction_level="token", is_correction_gating="tv", is_correction_threshold=(None, 0.1))


@pytest.mark.parametrize(("loss_type", "exponent"), [("ppo", 20.0), ("gspo", 30.0)])
def test_ppo_bounds_its_exponents(loss_type, exponent):
    x, module = torch.zeros(1, 2, dtype=torch.float64), modules.PolicyLoss(policy_loss_type=loss_type)
    for sign in (1, -1):
        loss = module(x, x - sign * 30, x - sign)[0]
        torch.testing.assert_close((sign * loss).log().item(), sign * exponent)


def test_gspo_is_corrected_in_its_ratio():
    log_probs, old, advantages, mask, rollout = policy_batch()
    corrected = modules.PolicyLoss(policy_loss_type="gspo", is_correction_level="token")
    results = corrected(log_probs, old, advantages, mask, rollout)
    plain = modules.PolicyLoss(policy_loss_type="gspo")
    assert torch.equal(results[0], plain(log_probs, rollout, advantages, mask)[0])
    assert results[0] != plain(log_probs, old, advantages, mask)[0]
    assert torch.equal(results[2], plain(log_probs, old, advantages, mask)[2])


def test_sft_loss():
    logps, *_, mask, _ = policy_batch()
    logps.requires_grad_()
    losses = {}
    for level, aggregation in ((True, "token_mean"), (False, "seq_mean_token_mean")):
        losses[level] = modules.SFTLoss(level)(logps.masked_fill(mask == 0, float("nan")), mask)
        expected = reference_aggregation.aggregate(-logps, mask, aggregation, count_empty=False)
        torch.testing.assert_close(losses[level], expected)
        torch.testing.assert_close(*(torch.autograd.grad(x, logps)[0] for x in (losses[level], expected)))
    assert losses[True] != losses[False]


@pytest.mark.parametrize("token_level_loss", [True, False])
@pytest.mark.parametrize("clip_eps", [None, 0.2])
def test_value_loss(token_level_loss, clip_eps):
    values, old, returns, mask, _ = policy_batch()
    values.requires_grad_()
    loss = modules.ValueLoss(clip_eps, token_level_loss)(values, old, returns, mask)
    aggregation = "token_mean" if token_level_loss else "seq_mean_token_mean"
    expected = reference_policy.value_loss(
        values, old, returns, mask, clip_eps=clip_eps, aggregation=aggregation, count_empty=False
    )[0]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, values)[0] for x in (loss, expected)))


def test_policy_and_value_loss_take_global_counts():
    log_probs, old, advantages, mask, _ = policy_batch()
    for module in (
        modules.PolicyLoss(),
        modules.PolicyLoss(token_level_loss=False),
        modules.ValueLoss(0.2),
        modules.ValueLoss(0.2, token_level_loss=False),
        modules.SFTLoss(),
        modules.SFTLoss(False),
    ):
        args = (log_probs, mask) if isinstance(module, modules.SFTLoss) else (log_probs, old, advantages, mask)
        whole, parts = module(*args), []
        for rows in (slice(0, 1), slice(1, 4)):
            parts.append(module(*(x[rows] for x in args), dp_size=2, batch_num_tokens=11, global_batch_size=3))
        if isinstance(whole, tuple):
            whole, parts = whole[0], [part[0] for part in parts]
        torch.testing.assert_close(sum(parts) / 2, whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy_loss_type": "grpo"}, "policy_loss_type"),
        ({"is_correction_level": "word"}, "is_correction_level"),
        ({"is_correction_mode": "tis"}, "'tis'"),
        ({"enable_vllm_is_correction": True, "vllm_is_correction_type": "x"}, "vllm_is_correction_type"),
        ({"is_correction_gating": "kl"}, "'kl'"),
        ({"is_correction_level": "token", "is_correction_gating": "binary_kl"}, r"\(0, high\), got \(0.5, 5.0\)"),
        ({"is_correction_level": "seq", "is_correction_gating": "tv"}, r"\(0, high\), got \(0.5, 5.0\)"),
        ({"is_correction_level": "seq", "is_correction_mode": "clip"}, "clips the ratio of a token"),
        ({"is_correction_mode": "clip", "is_correction_gating": "tv"}, "clips the ratio of a token"),
        ({"dual_clip": 1.0}, "more than 1, got 1.0"),
    ],
)
def test_policy_loss_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        modules.PolicyLoss(**arguments)
    with pytest.raises(ValueError, match="rollout_log_probs"):
        modules.PolicyLoss(is_correction_level="token")(*policy_batch()[:4])
