"""Advantages, masks and weights of sampled sequences, against loops in float64."""

import pytest
import torch
from ranks import needs_ranks
from rollout_batch import DATA, pack
from torch.testing._internal.common_distributed import spawn_threads_and_init_comms

import fused_losses.reference.rollouts as reference
from fused_losses.bench import ranks
from fused_losses.policy import grpo_loss
from fused_losses.reference.policy import grpo_loss as reference_grpo_loss
from fused_losses.rollouts import entropy_mask, group_advantages, mismatch_weight, off_policy_mask, optimal_values
from fused_losses.sequences import masked_mean

NAN = float("nan")


def test_optimal_values():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 3.0, -2.0, 0.5, 0.5], dtype=torch.float64)
    for group, beta in ((2, 0.5), (4, 0.5), (2, 0.1), (8, 5.0), (1, 0.5)):
        values = optimal_values(rewards, group, beta=beta)
        torch.testing.assert_close(values, reference.optimal_values(rewards, group, beta=beta))
        largest, mean = rewards.view(-1, group).amax(1), rewards.view(-1, group).mean(1)
        assert ((mean <= values + 1e-12) & (values <= largest + 1e-12)).all()
    assert optimal_values(rewards.half() * 1000, 2, beta=1e-3).isfinite().all()
    for wrong, group in ((rewards, 3), (rewards[:, None], 2), (rewards, 0)):
        with pytest.raises(ValueError, match=f"in groups of {group}"):
            optimal_values(wrong, group)
    with pytest.raises(ValueError, match="beta must be positive, got 0"):
        optimal_values(rewards, 2, beta=0)


def test_off_policy_mask_drops_and_keeps():
    args = DATA["log_probs"], DATA["old_log_probs"], DATA["advantages"], 0.05, DATA["mask"]
    keep = off_policy_mask(*args)
    assert torch.equal(keep.expand(6, 7), reference.off_policy_mask(*args))
    assert not keep.all()
    assert (keep[DATA["advantages"] < 0]).any()
    assert off_policy_mask(args[0], args[0], -torch.ones(6), 0.0, DATA["mask"]).all()  # the bound itself is kept
    assert off_policy_mask(args[0], args[0] + 1, torch.zeros(6), 0.05, DATA["mask"]).all()  # no advantage is negative
    unscored = DATA["old_log_probs"].clone()
    near = (keep[:, 0] & (DATA["advantages"] < 0)).nonzero()[0, 0]
    unscored[near] = float("nan")
    torch.testing.assert_close(
        off_policy_mask(args[0], unscored, *args[2:]).expand(6, 7),
        reference.off_policy_mask(args[0], unscored, *args[2:]),
    )


@pytest.mark.parametrize("top", [0.05, 0.2, 0.5, 0.99])
def test_entropy_mask(top):
    keep = entropy_mask(DATA["entropy"], top, DATA["mask"])
    assert torch.equal(keep, reference.entropy_mask(DATA["entropy"], top, DATA["mask"]))
    assert 0 < keep.sum() < (DATA["mask"] != 0).sum()
    assert not keep[DATA["mask"] == 0].any()


def test_entropy_mask_of_16_bits_has_a_quantile_between_them():
    entropy = torch.tensor([[1.0, 1.0078125]], dtype=torch.bfloat16)
    assert entropy_mask(entropy, 0.7).tolist() == [[False, True]]


def _entropy_mask_of_a_rank(device, entropy, mask):
    first = torch.distributed.get_rank() == 0
    rows, columns = (slice(0, 2), slice(0, 7)) if first else (slice(2, 6), slice(0, 6))
    entropy, mask = entropy[rows, columns].to(device), mask[rows, columns].to(device)
    compiled = torch.compile(entropy_mask, backend="aot_eager")
    shorter = [fn(entropy[:, first:], 0.3, mask[:, first:]) for fn in (compiled, entropy_mask)]
    return entropy_mask(entropy, 0.3, mask), compiled(entropy, 0.3, mask), shorter


@needs_ranks
def test_entropy_mask_over_all_ranks():
    """Ranks with different batch sizes and lengths share one quantile."""
    entropy, mask = DATA["entropy"].clone(), DATA["mask"].clone()
    entropy[:2] += 1
    mask[2:, 6] = 0
    found = ranks.run(_entropy_mask_of_a_rank, 2, entropy, mask)
    for whole, compiled, shorter in found:
        assert torch.equal(compiled, whole)
        assert torch.equal(*shorter)
    results = [whole for whole, _, _ in found]
    both = torch.cat([results[0], torch.nn.functional.pad(results[1], (0, 1))])
    assert torch.equal(both, entropy_mask(entropy, 0.3, mask))
    assert not torch.equal(both[:2], entropy_mask(entropy[:2], 0.3, mask[:2]))


@spawn_threads_and_init_comms(world_size=2)
def in_groups_of_ranks(_):
    rank = torch.distributed.get_rank()
    data = DATA | {"entropy": DATA["entropy"] + torch.tensor([1.0, 1, 1, 0, 0, 0])[:, None]}
    mine = {k: v[3 * rank :][:3] for k, v in data.items()}
    alone = [torch.distributed.new_group([i]) for i in range(2)][rank]
    expected = reference.entropy_mask(mine["entropy"], 0.3, mine["mask"])
    assert torch.equal(entropy_mask(mine["entropy"], 0.3, mine["mask"], group=alone), expected)
    whole = reference.entropy_mask(data["entropy"], 0.3, data["mask"])[3 * rank :][:3]
    assert torch.equal(entropy_mask(mine["entropy"], 0.3, mine["mask"]), whole)
    assert not torch.equal(whole, expected)
    tokens = [mine[k] for k in ("log_probs", "old_log_probs", "advantages", "mask")]
    options = {"entropy": mine["entropy"], "top_entropy_quantile": 0.3}
    loss, _ = grpo_loss(*tokens, **options, group=alone)
    torch.testing.assert_close(loss, reference_grpo_loss(*tokens, **options)[0], check_dtype=False)


def test_an_entropy_mask_over_a_group_of_ranks():
    in_groups_of_ranks(None)


WEIGHTS = {
    "token_truncate": {"low": 0.7, "high": 1.5},
    "token_truncate_high": {"high": 1.5},
    "token_truncate_low": {"low": 0.7},
    "token_mask": {"mode": "mask", "low": 0.7, "high": 1.5},
    "token_mask_high": {"mode": "mask", "high": 1.5},
    "sequence_truncate": {"level": "sequence_sum", "low": 0.7, "high": 1.5},
    "sequence_mask": {"level": "sequence_sum", "mode": "mask", "low": 0.5, "high": 2.2},
    "mean_mask": {"level": "sequence_mean", "mode": "mask", "low": 0.9, "high": 1.3},
    "token_binary_kl": {"mode": "mask", "gate": "binary_kl", "high": 0.05},
    "mean_binary_kl": {"level": "sequence_mean", "mode": "mask", "gate": "binary_kl", "high": 0.05},
    "token_tv": {"mode": "mask", "gate": "tv", "high": 0.1},
    "mean_tv": {"level": "sequence_mean", "mode": "mask", "gate": "tv", "high": 0.15},
    "none": {},
    "sequence_none": {"level": "sequence_sum"},
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_mismatch_weight(name):
    rollout = DATA["rollout_log_probs"].clone()
    rollout[1, 0] = float("nan")
    args = DATA["old_log_probs"].clone().requires_grad_(), rollout, DATA["mask"]
    weight, metrics = mismatch_weight(*args, **WEIGHTS[name])
    expected, expected_metrics = reference.mismatch_weight(*args, **WEIGHTS[name])
    shown = DATA["mask"] != 0
    spread = weight if weight.dim() == 2 else weight[:, None].expand_as(expected)
    torch.testing.assert_close(spread[shown], expected[shown])
    for key, value in expected_metrics.items():
        torch.testing.assert_close(metrics[key].item(), float(value))
    assert not weight.requires_grad
    assert (0 < metrics["filter_fraction"] < 1) or name in ("none", "sequence_none")
    packed, borders, kept = pack(DATA | {"rollout": rollout})
    weight, metrics = mismatch_weight(
        packed["old_log_probs"], packed["rollout"], packed["mask"], cu_seqlens=borders, **WEIGHTS[name]
    )
    spread = weight if weight.dim() == 2 else weight.repeat_interleave(borders.diff())[None]
    torch.testing.assert_close(spread[packed["mask"] != 0], expected[kept & shown])
    torch.testing.assert_close(metrics["filter_fraction"].item(), float(expected_metrics["filter_fraction"]))


def test_mismatch_weights_differ():
    weights = {}
    for name, options in WEIGHTS.items():
        weight, _ = mismatch_weight(DATA["old_log_probs"], DATA["rollout_log_probs"], DATA["mask"], **options)
        tensors = (DATA[key] for key in ("log_probs", "old_log_probs", "advantages", "mask"))
        loss, _ = grpo_loss(*tensors, mismatch_weight=weight)
        weights[name] = round(loss.item(), 9)
    assert len(set(weights.values())) == len(weights)


@pytest.mark.parametrize(
    "options",
    [
        {"level": "sequence_mean", "mode": "truncate"},
        {"gate": "tv", "mode": "truncate"},
        {"gate": "binary_kl", "mode": "mask", "level": "sequence_sum"},
    ],
)
def test_mismatch_weight_rejects_what_has_no_meaning(options):
    with pytest.raises(ValueError, match="do not go together"):
        mismatch_weight(torch.zeros(1, 2), torch.zeros(1, 2), **options)


@pytest.mark.parametrize("options", [{"level": "sequence"}, {"mode": "clip"}, {"gate": "kl"}])
def test_mismatch_weight_names_what_it_does_not_know(options):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"{name} must be one of .*, got '{value}'"):
        mismatch_weight(torch.zeros(1, 2), torch.zeros(1, 2), **options)


def test_a_mismatch_at_its_bound_is_kept_and_has_no_gradient():
    x = torch.zeros(1, 3, requires_grad=True)
    weight, metrics = mismatch_weight(x, x, mode="mask", low=1.0, high=1.0)
    assert (weight == 1).all()
    assert not weight.requires_grad
    assert metrics["filter_fraction"] == 0


def test_mismatch_weight_of_a_huge_difference_is_finite():
    weight, metrics = mismatch_weight(torch.tensor([[-1.0, -500.0]]), torch.tensor([[-500.0, -1.0]]))
    torch.testing.assert_close(weight, torch.tensor([[20.0, -20.0]]).exp(), atol=0, rtol=1.3e-6)
    assert metrics["mismatch_kl"] == 0


@pytest.mark.parametrize("level", ["token", "sequence_sum"])
def test_weights_of_mean_one(level):
    """verl's ``rollout_is_batch_normalize``, as in mismatch_weight's table."""
    mask = DATA["mask"]
    weight, _ = mismatch_weight(DATA["old_log_probs"], DATA["rollout_log_probs"], mask, level=level, high=2.0)
    each = mask if level == "token" else mask.sum(-1)
    counted = weight[each != 0]
    assert len(counted) == (27 if level == "token" else 5)  # of six sequences one is empty
    torch.testing.assert_close(
        (weight / masked_mean(weight, each).clamp(min=1e-8))[each != 0], counted / counted.mean()
    )
    nothing = weight * 0  # as if every token were outside the bounds
    assert (nothing / masked_mean(nothing, each).clamp(min=1e-8) == 0).all()


REWARDS = {
    "one": torch.tensor([1.0, 0.0, 0.5, 3.0, 2.0, 2.0, 2.0, 2.0, 0.0, 1.0, 0.0, 0.0]),
    "nan": torch.tensor([1.0, NAN, 0.5, 3.0, NAN, NAN, NAN, 2.0, NAN, NAN, NAN, NAN]),
    "three": torch.stack(
        [
            torch.tensor([1.0, NAN, 0.5, 3.0, NAN, 2.0, NAN, 2.0, 0.0, 1.0, 0.0, 0.0]),
            torch.tensor([0.2, NAN, 1.5, 0.3, NAN, 1.0, 1.5, 2.5, 1.0, 0.0, 5.0, 0.0]),
            torch.tensor([9.0, NAN, NAN, NAN, 0.0, 4.0, NAN, 2.0, 0.0, 0.1, 3.0, 0.5]),
        ],
        dim=1,
    ),
}


@pytest.mark.parametrize("scale", ["group", "batch", "none", "normalize_then_sum"])
@pytest.mark.parametrize("rewards", REWARDS)
@pytest.mark.parametrize("options", [{}, {"eps": 0.5}, {"leave_one_out": True}, {"weights": [0.5, 2.0, -1.0]}], ids=str)
def test_group_advantages(rewards, scale, options):
    if "weights" in options:
        options = {"weights": options["weights"][: 3 if rewards == "three" else 1]}
    rewards = REWARDS[rewards].double()
    if scale == "normalize_then_sum" and "leave_one_out" in options:
        with pytest.raises(ValueError, match="leave_one_out is about the mean of a group"):
            group_advantages(rewards, 4, scale=scale, **options)
        return
    for group in (4, 2, 1, 12):
        expected = reference.group_advantages(rewards, group, scale=scale, **options)
        ours = group_advantages(rewards, group, scale=scale, **options)
        torch.testing.assert_close(ours, expected)
        assert ours.isfinite().all()
    assert group_advantages(rewards.float(), 4, scale=scale, **options).dtype == torch.float32


def test_group_advantages_differ():
    rewards = REWARDS["three"]
    results = [
        group_advantages(rewards, 4, scale=scale, leave_one_out=loo, weights=weights, eps=eps)
        for scale in ("group", "batch", "none", "normalize_then_sum")
        for loo in ((False, True) if scale != "normalize_then_sum" else (False,))
        for weights in (None, [1.0, 2.0, 3.0])
        for eps in ((1e-4, 1e-1) if scale != "none" else (1e-4,))
    ]
    assert len({tuple(r.tolist()) for r in results}) == len(results)
    assert (group_advantages(REWARDS["one"], 1) == 0).all()
    assert (group_advantages(REWARDS["one"], 4)[4:8] == 0).all()  # a group of equal rewards


@pytest.mark.parametrize("scale", ["group", "batch", "none", "normalize_then_sum"])
@pytest.mark.parametrize("eps", [1e-4, 1e-6, 1e-9])  # those of TRL, verl and OpenRLHF
def test_equal_rewards_have_no_advantage(scale, eps):
    for reward in (0.1, 0.7, 1 / 3, -2.3):
        for group in (3, 6, 7, 12):
            rewards = torch.full((4 * group, 2), reward)
            advantages = group_advantages(rewards, group, scale=scale, weights=[0.5, 0.25], eps=eps)
            assert (advantages == 0).all()


@pytest.mark.parametrize("shape", [(), (6, 2, 1)])
def test_rewards_of_other_shapes_are_refused(shape):
    with pytest.raises((ValueError, TypeError), match=r"\(B,\) or \(B, K\)"):
        group_advantages(torch.ones(shape), 3)


def test_weights_of_float64_rewards_keep_their_digits():
    rewards = torch.tensor([[1.0, 2.0], [0.0, 5.0]], dtype=torch.float64)
    advantages = group_advantages(rewards, 2, scale="none", weights=[0.1, 0.3])
    torch.testing.assert_close(advantages.tolist(), [-0.4, 0.4], rtol=1e-14, atol=0)


@pytest.mark.parametrize("weights", [0.5, [1.0], torch.tensor(0.5), torch.ones(1, 2)])
def test_weights_that_are_not_one_per_reward_function(weights):
    with pytest.raises(ValueError, match="one per reward function"):
        group_advantages(torch.randn(6, 2), 3, weights=weights)
