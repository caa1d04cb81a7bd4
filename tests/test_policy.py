"""Every policy loss, modifier and aggregation against loops in float64; and every option must change the result."""

import functools
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_batch import AGGREGATIONS, DATA, batch, pack
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_losses.reference.policy as reference
from fused_losses import LinearLogits, policy
from fused_losses.aggregation import aggregate
from fused_losses.kl import kl_estimate
from fused_losses.policy import LOSS_TYPES, LossType, Surrogate, a2po_loss, grpo_loss, ppo_loss, value_loss
from fused_losses.reference.kl import kl_estimate as reference_kl_estimate
from fused_losses.reference.tolerance import assert_accurate
from fused_losses.rollouts import entropy_mask, group_advantages, mismatch_weight, off_policy_mask

NAN = float("nan")
CLIPPED = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "ppo"]  # one equation; only their aggregation differs
# Arguments by modifier; a string that names a tensor of the batch stands for that tensor.
MODIFIERS = {
    "plain": {},
    "token_advantages": {"advantages": "token_advantages"},
    "some_zero_advantages": {"advantages": "some_zero_advantages"},
    "sequence_level": {"importance_sampling_level": "sequence"},
    "no_old": {"old_log_probs": None},
    "clamp": {"log_ratio_clamp": (-0.35, 0.35)},
    "off_policy": {"off_policy_mask_threshold": 0.05},
    "off_policy_rollout": {"off_policy_mask_threshold": 0.05, "rollout_log_probs": "rollout_log_probs"},
    "entropy_mask": {"entropy": "entropy", "top_entropy_quantile": 0.4},
    "token_weight": {"mismatch_weight": "token_weight"},
    "sequence_weight": {"mismatch_weight": "sequence_weight"},
    "kl": {"beta": 0.3, "ref_log_probs": "ref_log_probs"},
    "kl_uncorrected": {"beta": 0.3, "ref_log_probs": "ref_log_probs", "use_bias_correction_kl": False},
    "kl_token_mean": {"beta": 0.3, "ref_log_probs": "ref_log_probs", "kl_aggregation": "token_mean"},
    "kl_token_sum": {"beta": 0.3, "ref_log_probs": "ref_log_probs", "kl_aggregation": "token_sum"},
    "kl_k2": {"beta": 0.3, "ref_log_probs": "ref_log_probs", "kl_estimator": {"kind": "k2", "clamp": 0.2}},
    "bonus": {"entropy": "entropy", "entropy_coef": 0.2},
    "bonus_sum": {"entropy": "entropy", "entropy_coef": 1.0, "entropy_aggregation": "seq_mean_token_sum"},
    "bonus_mask": {"entropy": "entropy", "entropy_coef": 0.2, "top_entropy_quantile": 0.4},
    "bonus_mask_sum": {
        "entropy": "entropy",
        "entropy_coef": 0.2,
        "top_entropy_quantile": 0.4,
        "entropy_aggregation": "token_mean",
    },
    "all": {
        "advantages": "token_advantages",
        "off_policy_mask_threshold": 0.05,
        "rollout_log_probs": "rollout_log_probs",
        "entropy": "entropy",
        "top_entropy_quantile": 0.6,
        "entropy_coef": 0.2,
        "mismatch_weight": "token_weight",
        "ref_log_probs": "ref_log_probs",
        "beta": 0.3,
    },
}
CLIPS = {
    "eps_low": {"eps_low": 0.3},
    "eps_high": {"eps_high": 0.3},
    "delta": {"delta": 1.1},
    "dual_clip": {"dual_clip": 1.1},
}
SPECIFIC = {
    "ppo": CLIPS,
    "gspo": CLIPS,
    "gspo-token": CLIPS,
    "rloo": CLIPS,
    "gmpo": {"eps_low": {"eps_low": 0.3}, "eps_high": {"eps_high": 0.3}},
    "cispo": {
        "max": {"cispo_max": 1.5},
        "two_sided": {"cispo_max": None},
        "two_sided_low": {"cispo_max": None, "eps_low": 0.3},
        "two_sided_high": {"cispo_max": None, "eps_high": 0.3},
    },
    "dppo_tv": {"eps_low": {"eps_low": 0.1}, "eps_high": {"eps_high": 0.1}, "delta": {"delta": 1.1}},
    "dppo_kl": {"eps_low": {"eps_low": 0.02}, "eps_high": {"eps_high": 0.02}, "delta": {"delta": 1.1}},
    "dro": {"dro_beta": {"dro_beta": 0.3}},
    "kl_cov": {"ratio": {"kl_cov_ratio": 0.4}, "coef": {"kl_cov_coef": 0.7}},
    "clip_cov": CLIPS
    | {
        "ratio": {"clip_cov_ratio": 0.08},
        "ratio_of_all": {"clip_cov_ratio": 1.0},
        "lb": {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.1},
        "ub": {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.1, "clip_cov_ub": 1.4},
        "seed": {"seed": 1},
    },
    "sapo": {"pos": {"sapo_temperature_pos": 1.5}, "neg": {"sapo_temperature_neg": 1.5}},
    "vespo": {
        "k_pos": {"vespo_pos": (2.5, 3.0)},
        "lambda_pos": {"vespo_pos": (2.0, 3.5)},
        "k_neg": {"vespo_neg": (3.5, 2.0)},
        "lambda_neg": {"vespo_neg": (3.0, 2.5)},
        "lambda_0": {"vespo_pos": (2.0, 0.0), "vespo_neg": (3.0, -1.0)},
    },
}


def options_of(loss_type):
    modifiers = {k: v for k, v in MODIFIERS.items() if (loss_type, k) != ("gmpo", "sequence_level")}
    return modifiers | SPECIFIC.get(loss_type, {})


CASES = [(t, name, options) for t in LOSS_TYPES for name, options in options_of(t).items()]


def run(loss_fn, data, **options):
    """Loss, metrics and the gradients in log_probs and, where it is given, entropy."""
    tensors = {"advantages": "advantages", "old_log_probs": "old_log_probs", "mask": "mask"}
    options = {k: data[v] if isinstance(v, str) and v in data else v for k, v in (tensors | options).items()}
    if isinstance(options.get("kl_estimator"), dict):
        estimator = kl_estimate if loss_fn is grpo_loss else reference_kl_estimate
        options["kl_estimator"] = functools.partial(estimator, **options["kl_estimator"])
    torch.manual_seed(options.pop("seed", 0))
    leaves = {"log_probs": data["log_probs"].detach().clone().requires_grad_()}
    if options.get("entropy") is not None:
        leaves["entropy"] = options["entropy"] = options["entropy"].detach().clone().requires_grad_()
    loss, metrics = loss_fn(leaves["log_probs"], options.pop("old_log_probs"), **options)
    gradients = [None] * len(leaves)
    if loss.requires_grad:  # if a clip holds every token, the reference is a constant
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return loss.detach(), metrics, dict(zip(leaves, gradients, strict=True))


def assert_same(ours, expected, **tolerance):
    torch.testing.assert_close(ours[0], expected[0], check_dtype=False, **tolerance)
    assert ours[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        torch.testing.assert_close(
            ours[1][name], torch.as_tensor(value), check_dtype=False, **tolerance, msg=lambda m, name=name: name + m
        )
    for name, gradient in expected[2].items():
        zero = torch.zeros(())
        a, b = (g if g is not None else zero for g in (ours[2][name], gradient))
        a, b = torch.broadcast_tensors(a, b)
        torch.testing.assert_close(a, b, check_dtype=False, **tolerance)


def fingerprint(result):
    """What must differ between two configurations: the loss and its gradients."""
    loss, _, gradients = result
    return torch.cat([loss.reshape(1), *(g.flatten() for g in gradients.values() if g is not None)])


def coinciding(results):
    """The groups of names whose losses and gradients are the same numbers."""
    groups = []
    for name, result in results.items():
        print_ = fingerprint(result)
        for group in groups:
            other = fingerprint(results[group[0]])
            short = min(len(print_), len(other))
            if torch.allclose(print_[:short], other[:short], rtol=1e-9, atol=1e-12):
                group.append(name)
                break
        else:
            groups.append([name])
    return [set(g) for g in groups if len(g) > 1]


@pytest.mark.parametrize(("loss_type", "name", "options"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_loss_gradient_and_metrics(loss_type, name, options):
    expected = run(reference.grpo_loss, DATA, loss_type=loss_type, **options)
    ours = run(grpo_loss, DATA, loss_type=loss_type, **options)
    assert_same(ours, expected)
    assert ours[2]["log_probs"][DATA["mask"] != 0].abs().sum() > 0
    assert (ours[2]["log_probs"][DATA["mask"] == 0] == 0).all()


@pytest.mark.parametrize("name", MODIFIERS)
def test_a_new_loss_type_is_one_entry(name, monkeypatch):
    mine = LossType(lambda t, **_: Surrogate(-t.A * t.log_probs, {}), "token", "seq_mean_token_sum")
    monkeypatch.setitem(LOSS_TYPES, "mine", mine)
    ours, expected = (run(grpo_loss, DATA, loss_type=t, **MODIFIERS[name]) for t in ("mine", "reinforce"))
    assert_same(ours, expected, rtol=0, atol=0)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_under_every_aggregation(loss_type, aggregation):
    options = {"loss_type": loss_type, "aggregation": aggregation} | MODIFIERS["kl"] | MODIFIERS["bonus"]
    options |= {"loss_scale_factor": 11.0, "count_empty": False}
    assert_same(run(grpo_loss, DATA, **options), run(reference.grpo_loss, DATA, **options))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_option_changes_the_number(loss_type):
    options = options_of(loss_type)
    results = {name: run(grpo_loss, DATA, loss_type=loss_type, **o) for name, o in options.items()}
    same_as_plain = {
        "vespo": {"clamp", "sequence_level"},  # has its own clamp and its own sequence ratio
        "reinforce": {"clamp", "sequence_level", "no_old"},  # has no ratio
        "gpg": {"clamp", "sequence_level", "no_old"},
        "dro": {"sequence_level"},
        "gspo": {"sequence_level"},
        "gspo-token": {"sequence_level"},  # equals gspo for advantages per sequence
    }.get(loss_type, set())
    expected = [{"plain"} | same_as_plain] if same_as_plain else []
    same_kl = {"kl", "kl_token_mean"} if LOSS_TYPES[loss_type].aggregation == "token_mean" else set()
    same_kl |= {"kl", "kl_uncorrected"} if loss_type == "gmpo" else set()
    expected += [same_kl] if same_kl else []
    assert coinciding(results) == expected


@pytest.mark.parametrize("aggregation", [None, *AGGREGATIONS])
def test_no_two_loss_types_agree(aggregation):
    results = {t: run(grpo_loss, DATA, loss_type=t, aggregation=aggregation) for t in LOSS_TYPES}
    clipped = {"bnpo", "ppo", "dapo"} if aggregation is None else set(CLIPPED)
    plain = [] if aggregation is None else [{"reinforce", "gpg"}]
    expected = [clipped, {"gspo", "gspo-token"}, *plain]
    assert coinciding(results) == expected
    results = {
        t: run(grpo_loss, DATA, loss_type=t, aggregation=aggregation, advantages="token_advantages") for t in LOSS_TYPES
    }
    assert coinciding(results) == [clipped, *plain]  # with advantages per token, gspo-token differs from gspo


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_aggregations_differ(loss_type):
    counts = {"empty": {}, "not empty": {"count_empty": False}, "scale": {"loss_scale_factor": 3.0}}
    results = {
        (a, name): run(grpo_loss, DATA, loss_type=loss_type, aggregation=a, **options)
        for a in AGGREGATIONS
        for name, options in counts.items()
    }
    expected = [{("token_mean", name) for name in counts}, {("token_sum", "empty"), ("token_sum", "not empty")}]
    expected += [{(a, "empty"), (a, "scale")} for a in ("seq_mean_token_mean", "seq_mean_token_sum")]
    assert coinciding(results) == expected


@pytest.mark.parametrize(
    "loss_type", ["ppo", "gspo", "gspo-token", "rloo", "gmpo", "cispo", "dppo_tv", "dppo_kl", "clip_cov"]
)
def test_clip_gates_act(loss_type):
    """A token that a gate holds gets no gradient, on both sides; and each gate holds some tokens and not all."""
    options = {} if loss_type in ("gmpo", "cispo") else {"dual_clip": 1.3}
    if loss_type.startswith("dppo"):
        options = {"eps_low": 0.02, "eps_high": 0.02}
    _, metrics, gradients = run(grpo_loss, DATA, loss_type=loss_type, cispo_max=1.3, **options)
    assert 0 < metrics["clip_ratio/high_mean"] < 1
    assert 0 < metrics["clip_ratio/high_max"] <= 1
    if loss_type != "cispo":
        assert 0 < metrics["clip_ratio/low_mean"] < 1
    if "dual_clip" in options:
        assert 0 < metrics["clip_ratio/dual_mean"] < 1
    if loss_type.startswith("dppo"):
        shown = DATA["mask"] != 0
        dropped = (gradients["log_probs"][shown] == 0).float().mean()
        torch.testing.assert_close(dropped, metrics["clip_ratio/region_mean"], check_dtype=False)
    if loss_type == "ppo":
        r = (DATA["log_probs"] - DATA["old_log_probs"]).exp()
        A = DATA["advantages"][:, None].expand_as(r)
        shown = DATA["mask"] != 0
        held = ((r > 1.2) & (A > 0)) | ((r < 0.8) & (A < 0)) | ((r > 1.3) & (A < 0))
        assert torch.equal(gradients["log_probs"][shown] == 0, held[shown])


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_policy_and_its_entropy_alone_take_gradient(loss_type):
    data = {name: x.detach().requires_grad_() if x.is_floating_point() else x for name, x in DATA.items()}
    options = {k: data.get(x, x) if isinstance(x, str) else x for k, x in options_of(loss_type)["all"].items()}
    loss, _ = grpo_loss(data["log_probs"], data["old_log_probs"], mask=data["mask"], loss_type=loss_type, **options)
    loss.backward()
    assert {name for name, x in data.items() if x.grad is not None} == {"log_probs", "entropy"}


def drawn_by_clip_cov(seed, **options):
    """The tokens that train under ppo and not under clip_cov; and the latter's metrics."""
    options = {"advantages": "token_advantages"} | options
    _, _, ppo = run(grpo_loss, DATA, loss_type="ppo", **options)
    generator = torch.Generator().manual_seed(seed)
    _, metrics, ours = run(grpo_loss, DATA, loss_type="clip_cov", generator=generator, **options)
    left = ours["log_probs"] != 0
    torch.testing.assert_close(ours["log_probs"][left], ppo["log_probs"][left])
    return (ppo["log_probs"] != 0) & ~left, metrics


@pytest.mark.parametrize(("ratio", "number"), [(0.0002, 1), (0.12, 3), (0.25, 6), (1.0, 27)])
def test_clip_cov_draws_candidates_alone(ratio, number):
    shown = DATA["mask"] != 0
    A, logp, old = (DATA[name].where(shown, 0) for name in ("token_advantages", "log_probs", "old_log_probs"))
    covariance = (A - A.sum() / 27) * (logp - logp.sum() / 27)
    r = (logp - old).exp()
    inside = (covariance > 0.1) & (covariance < 2) & shown
    candidates = inside & ~((r > 1.2) & (A > 0)) & ~((r < 0.8) & (A < 0))
    assert 3 < candidates.sum() < inside.sum()
    bounds = {"clip_cov_ratio": ratio, "clip_cov_lb": 0.1, "clip_cov_ub": 2.0}
    times = torch.zeros_like(covariance)
    for seed in range(200):
        drawn, metrics = drawn_by_clip_cov(seed, **bounds)
        assert not (drawn & ~candidates).any()
        assert drawn.sum() == min(number, candidates.sum())
        torch.testing.assert_close(metrics["clip_ratio/cov_mean"], drawn.sum().double() / 27, check_dtype=False)
        times += drawn
    share = min(number / int(candidates.sum()), 1)
    assert ((times[candidates] / 200 - share).abs() < 0.12).all()


def test_clip_cov_repeats_with_its_generator():
    first, again, other = (drawn_by_clip_cov(seed, clip_cov_lb=0.1, clip_cov_ratio=0.1)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    x, generator = torch.zeros(2, 3), torch.Generator()
    before = torch.get_rng_state(), generator.get_state()
    grpo_loss(x, x, torch.ones(2), loss_type="ppo", generator=generator)
    assert torch.equal(before[1], generator.get_state())
    grpo_loss(x, x, torch.ones(2), loss_type="clip_cov", generator=generator)
    assert torch.equal(before[0], torch.get_rng_state())
    assert not torch.equal(before[1], generator.get_state())


def test_clip_cov_bounds_are_not_candidates():
    log_probs, advantages = torch.tensor([[-1.0, -3.0]]), torch.tensor([[1.0, -1.0]])  # both covariances are 1
    for low, high, drawn in ((0.5, 1.5, 1.0), (1.0, 1.5, 0.0), (0.5, 1.0, 0.0)):
        bounds = {"clip_cov_ratio": 1.0, "clip_cov_lb": low, "clip_cov_ub": high}
        _, metrics = grpo_loss(log_probs, log_probs, advantages, loss_type="clip_cov", **bounds)
        assert metrics["clip_ratio/cov_mean"] == drawn


def test_clip_ratios_of_one_sequence():
    _, metrics = grpo_loss(torch.full((1, 2), -1.0), torch.zeros(1, 2), -torch.ones(1), loss_type="rloo")
    assert metrics["clip_ratio/low_mean"] == metrics["clip_ratio/low_min"] == 1


@pytest.mark.parametrize("count_empty", [True, False])
@pytest.mark.parametrize("loss_type", ["ppo", "rloo"])
def test_clip_ratios_of_empty_sequences(loss_type, count_empty):
    """They have no token ratios. A ratio per sequence is 1 there: no clip holds it, and it counts if empty sequences count."""
    old = torch.zeros(3, 4)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]])
    sequences = 3 if count_empty else 2
    options = {"loss_type": loss_type, "count_empty": count_empty, "dual_clip": 1.1}
    _, metrics = grpo_loss(old - 1, old, -torch.ones(3), mask, **options)
    assert metrics["clip_ratio/low_min"] == (0 if loss_type == "rloo" and count_empty else 1)
    torch.testing.assert_close(
        metrics["clip_ratio/low_mean"].item(), 1.0 if loss_type == "ppo" else 2 / sequences, rtol=1e-6, atol=0
    )
    assert metrics["clip_ratio/region_mean"] == metrics["clip_ratio/low_mean"]
    _, metrics = grpo_loss(old + 1, old, torch.tensor([1.0, 1.0, -1.0]), mask, **options)
    assert metrics["clip_ratio/high_max"] == 1
    held = {"clip_ratio/high_mean": 4 / 6, "clip_ratio/dual_mean": 2 / 6}
    for name, share in held.items():
        expected = share if loss_type == "ppo" else 1 / sequences
        torch.testing.assert_close(metrics[name].item(), expected, rtol=1e-6, atol=0)


def test_masks_do_not_broadcast():
    x, one = torch.zeros(3, 4), torch.zeros(3, 1)
    for sampling, advantages in ((one, torch.ones(3)), (x, torch.ones(2)), (x, torch.ones(1, 4))):
        with pytest.raises(ValueError, match=r"must be .*one per token \(3, 4\), got"):
            off_policy_mask(x, sampling, advantages, 0.1)
    with pytest.raises(ValueError, match=r"entropy and mask must have one shape, got \(3, 4\) and \(3, 1\)"):
        entropy_mask(x, 0.5, one)


@pytest.mark.parametrize("f", [grpo_loss, ppo_loss, value_loss])
def test_a_misspelt_option_is_blamed_on_the_function_called(f):
    x = torch.zeros(1, 2)
    with pytest.raises(TypeError, match=r"(grpo|value)_loss\(\) got an unexpected keyword argument 'epsilon_high'"):
        f(x, x, x, epsilon_high=0.3)


def test_two_sided_and_dual_clip_are_the_same_bound():
    """TRL's ``delta``, when above the clip, and ``dual_clip``."""
    a, b, none = (run(grpo_loss, DATA, loss_type="ppo", **o) for o in ({"delta": 1.4}, {"dual_clip": 1.4}, {}))
    assert torch.equal(a[0], b[0])
    torch.testing.assert_close(a[2]["log_probs"], b[2]["log_probs"])
    assert a[0] != none[0]


def test_sequence_ratio_equals_its_token_form():
    """With an advantage per sequence, GSPO's gradient through the mean is that of the token form; otherwise it is not."""
    gspo, token = (run(grpo_loss, DATA, loss_type=t) for t in ("gspo", "gspo-token"))
    torch.testing.assert_close(gspo[2]["log_probs"], token[2]["log_probs"])
    gspo, token = (run(grpo_loss, DATA, loss_type=t, advantages="token_advantages") for t in ("gspo", "gspo-token"))
    torch.testing.assert_close(gspo[0], token[0])
    assert not torch.allclose(gspo[2]["log_probs"], token[2]["log_probs"])


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_advantages_per_sequence_are_advantages_per_token(loss_type):
    per_token = DATA["advantages"][:, None].expand(DATA["mask"].shape)
    expected = run(grpo_loss, DATA, loss_type=loss_type)
    for advantages in (per_token, DATA["advantages"][:, None]):
        ours = run(grpo_loss, DATA, loss_type=loss_type, advantages=advantages)
        torch.testing.assert_close(ours[0], expected[0])
        torch.testing.assert_close(ours[2]["log_probs"], expected[2]["log_probs"])


@pytest.mark.parametrize("garbage", [float("inf"), float("-inf"), 0.0])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_masked_places_reach_nothing(loss_type, garbage):
    ours = run(grpo_loss, batch(garbage=garbage), loss_type=loss_type, **MODIFIERS["all"])
    assert_same(ours, run(grpo_loss, DATA, loss_type=loss_type, **MODIFIERS["all"]), rtol=0, atol=0)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_nothing_to_train_on_is_zero(loss_type):
    data = DATA | {"mask": torch.zeros_like(DATA["mask"])}
    for name in ("all", "kl_token_mean", "bonus_sum", "sequence_weight"):
        for count_empty in (True, False):
            loss, metrics, gradients = run(
                grpo_loss, data, loss_type=loss_type, **MODIFIERS[name], count_empty=count_empty
            )
            assert loss == 0
            assert all((g == 0).all() for g in gradients.values() if g is not None)
            extremes = {"clip_ratio/low_min", "clip_ratio/high_max"}
            assert all(m.isfinite() for k, m in metrics.items() if k not in extremes)
    empty = {k: v[:0] for k, v in DATA.items()}
    loss, _, _ = run(grpo_loss, empty, loss_type=loss_type, **MODIFIERS["all"])
    assert loss == 0


@pytest.mark.parametrize("rows", [0, 6])
@pytest.mark.parametrize(
    ("loss_type", "count_empty"), [("grpo", True), ("gmpo", True), ("gspo", False), ("gspo", True)]
)
def test_no_token_has_no_extreme_clip_ratio(loss_type, count_empty, rows):
    data = {k: v[:rows] for k, v in DATA.items()} | {"mask": torch.zeros_like(DATA["mask"][:rows])}
    _, metrics, _ = run(grpo_loss, data, loss_type=loss_type, count_empty=count_empty)
    counted = loss_type == "gspo" and count_empty and rows > 0  # empty sequences count, and no clip holds them
    for name in ("clip_ratio/low_min", "clip_ratio/high_max"):
        assert metrics[name] == 0 if counted else metrics[name].isnan()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_no_mask_is_the_plain_mean(loss_type):
    data = {k: v[[0, 5]] for k, v in DATA.items()}
    ours = run(grpo_loss, data, loss_type=loss_type, **MODIFIERS["all"])
    without = run(grpo_loss, data, loss_type=loss_type, **MODIFIERS["all"], mask=None)
    torch.testing.assert_close(ours[0], without[0])
    torch.testing.assert_close(ours[2], without[2])


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computed_in_fp32(loss_type, dtype):
    data = batch(dtype)
    cases = {
        "gradient": (data, {**MODIFIERS["kl"], **MODIFIERS["bonus"]}),
        # Terms of one sign: if they cancelled, nothing but their rounding would be left.
        "loss": (data | {"advantages": data["advantages"].abs()}, {}),
    }
    for name, (inputs, options) in cases.items():
        ours, eager, exact = (
            run(fn, {k: cast(v) for k, v in inputs.items()}, loss_type=loss_type, **options)
            for fn, cast in (
                (grpo_loss, lambda x: x),
                (reference.grpo_loss, torch.Tensor.float),
                (reference.grpo_loss, torch.Tensor.double),
            )
        )
        assert ours[0].dtype == torch.float32
        if name == "loss":
            assert_accurate(ours[0], eager[0], exact[0], name)
        else:
            assert_accurate(ours[2]["log_probs"], eager[2]["log_probs"].to(dtype), exact[2]["log_probs"], name)


@pytest.mark.parametrize(
    ("loss_type", "level"),
    [(t, level) for t in LOSS_TYPES for level in (None, "sequence") if (t, level) != ("gmpo", "sequence")],
)
def test_huge_ratios_stay_finite(loss_type, level):
    log_probs = torch.tensor([[-300.0, -1.0], [-1.0, -300.0], [-0.1, -0.2], [-400.0, -400.0]])
    old = log_probs.flip(0)
    for advantages in (torch.tensor([1.0, -1.0, 0.0, 1.0]), torch.tensor([-1.0, 1.0, -1.0, 0.0])):
        data = {"log_probs": log_probs, "old_log_probs": old, "advantages": advantages, "mask": None}
        loss, metrics, gradients = run(grpo_loss, data, loss_type=loss_type, importance_sampling_level=level)
        assert loss.isfinite()
        assert gradients["log_probs"].isfinite().all()
        assert all(m.isfinite() for m in metrics.values())


@pytest.mark.parametrize("loss_type", ["ppo", "sapo", "rloo", "gspo-token"])
def test_log_ratio_clamp(loss_type):
    """At the bound the ratio is e^20 and gets no gradient; without a bound the ratio is larger."""
    log_probs = torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
    losses = []
    for bounds in ((-20.0, 20.0), (None, 10.0), None):
        loss, metrics = grpo_loss(
            log_probs, log_probs.detach() - 25, torch.tensor([-1.0]), loss_type=loss_type, log_ratio_clamp=bounds
        )
        (gradient,) = torch.autograd.grad(loss, log_probs)
        exponent = 25.0 if bounds is None else bounds[1]
        torch.testing.assert_close(metrics["ratio_mean"].item(), math.exp(exponent))
        assert (gradient == 0) == (bounds is not None or loss_type == "sapo")
        losses.append(loss.item())
    assert len(set(losses)) == (1 if loss_type == "sapo" else 3)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    loss_type=st.sampled_from(list(LOSS_TYPES)),
    name=st.sampled_from(list(MODIFIERS)),
    aggregation=st.sampled_from([None, *AGGREGATIONS]),
    rows=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    columns=st.lists(st.integers(0, 6), min_size=1, max_size=7),
    count_empty=st.booleans(),
)
def test_any_rows_and_columns(loss_type, name, aggregation, rows, columns, count_empty):
    data = {k: v[rows] if v.dim() == 1 else v[rows][:, columns] for k, v in DATA.items()}
    options = {"loss_type": loss_type, "aggregation": aggregation, "count_empty": count_empty} | MODIFIERS[name]
    if data["mask"].any():
        assert_same(run(grpo_loss, data, **options), run(reference.grpo_loss, data, **options))


PACKED = ("plain", "sequence_level", "off_policy_rollout", "sequence_weight", "all")


@pytest.mark.parametrize(
    ("loss_type", "name"), [(t, name) for t in LOSS_TYPES for name in PACKED if name in options_of(t)]
)
def test_packed_rows_are_padded_rows(loss_type, name):
    options = MODIFIERS[name] | {"loss_scale_factor": 7.0}
    if loss_type == "clip_cov":  # another shape would draw other tokens: draw all
        options["clip_cov_ratio"] = 1.0
    packed, borders, kept = pack(DATA)
    ours = run(grpo_loss, packed, loss_type=loss_type, cu_seqlens=borders, **options)
    padded = run(grpo_loss, DATA, loss_type=loss_type, count_empty=False, **options)
    assert_same(ours, (*padded[:2], {k: g[kept].unsqueeze(0) for k, g in padded[2].items()}))


@pytest.mark.parametrize("loss_type", ["grpo", "ppo", "rloo"])
def test_packed_tokens_behind_the_last_border_do_not_count(loss_type):
    packed, borders, _ = pack(DATA)
    longer = {k: v if v.dim() == 1 else torch.nn.functional.pad(v, (0, 3), value=1) for k, v in packed.items()}
    ours = run(grpo_loss, longer, loss_type=loss_type, cu_seqlens=borders.int())
    expected = run(grpo_loss, packed, loss_type=loss_type, cu_seqlens=borders)
    gradient = torch.nn.functional.pad(expected[2]["log_probs"], (0, 3))
    assert_same(ours, (*expected[:2], {"log_probs": gradient}))


@pytest.mark.parametrize("loss_type", ["grpo", "gspo", "gspo-token", "rloo", "vespo", "gmpo"])
def test_a_packed_row_of_padding_alone_is_zero(loss_type):
    log_probs = torch.full((1, 4), -1.0, requires_grad=True)
    options = {"loss_type": loss_type, "cu_seqlens": torch.tensor([0]), "off_policy_mask_threshold": 0.1}
    loss, _ = grpo_loss(log_probs, torch.full((1, 4), -2.0), torch.ones(0), mismatch_weight=torch.ones(0), **options)
    loss.backward()
    assert loss == 0
    assert (log_probs.grad == 0).all()


@pytest.mark.parametrize(("aggregation", "count_empty"), [(a, e) for a in AGGREGATIONS for e in (True, False)])
@pytest.mark.parametrize("loss_type", ["grpo", "gspo", "rloo", "vespo", "gmpo"])
def test_two_ranks_are_one_process(loss_type, aggregation, count_empty):
    """The mean over ranks of gradients under global counts is the gradient of the whole batch."""
    options = {"loss_type": loss_type, "aggregation": aggregation, "loss_scale_factor": 7.0} | MODIFIERS["kl"]
    options |= {"entropy": "entropy", "entropy_coef": 0.2, "entropy_aggregation": aggregation}
    whole = run(grpo_loss, DATA, count_empty=count_empty, **options)
    halves = [{k: v[rows] for k, v in DATA.items()} for rows in (slice(0, 2), slice(2, 6))]
    counts = {
        "dp_size": 2,
        "batch_num_tokens": DATA["mask"].sum(),
        "global_batch_size": 6 if count_empty else 5,
        "count_empty": count_empty,
    }
    ranks = [run(grpo_loss, half, **options, **counts) for half in halves]
    torch.testing.assert_close((ranks[0][0] + ranks[1][0]) / 2, whole[0])
    for name, gradient in whole[2].items():
        torch.testing.assert_close(torch.cat([r[2][name] for r in ranks]) / 2, gradient)
    local = [run(grpo_loss, half, **options, count_empty=count_empty) for half in halves]
    assert aggregation == "token_sum" or not torch.allclose((local[0][0] + local[1][0]) / 2, whole[0])


@pytest.mark.parametrize(("aggregation", "count_empty"), [(a, e) for a in AGGREGATIONS for e in (True, False)])
def test_the_bonus_of_kept_tokens_is_the_same_with_its_count_and_without(aggregation, count_empty):
    options = {"entropy_aggregation": aggregation, "count_empty": count_empty, "loss_type": "dapo"}
    options |= {"entropy": "entropy", "entropy_coef": 0.2, "top_entropy_quantile": 0.15}  # drops some whole sequences
    counts = {"batch_num_tokens": DATA["mask"].sum(), "global_batch_size": 6 if count_empty else 5}
    assert_same(run(grpo_loss, DATA, **options, **counts), run(grpo_loss, DATA, **options))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_upstream_gradient_layout_and_inputs(loss_type):
    """``loss * 3`` triples the gradients; strided inputs give the same ones; inputs are not changed."""
    options = {"loss_type": loss_type} | MODIFIERS["all"]
    data = batch(garbage=0.0)
    before = {k: v.clone() for k, v in data.items()}
    once = run(grpo_loss, data, **options)

    def thrice(*args, **kwargs):
        loss, metrics = grpo_loss(*args, **kwargs)
        return loss * 3, metrics

    strided = {k: v if v.dim() == 1 else v.t().contiguous().t() for k, v in data.items()}
    tripled = run(thrice, strided, **options)
    for name, gradient in once[2].items():
        torch.testing.assert_close(tripled[2][name], gradient * 3)
    assert all(torch.equal(data[k], v) for k, v in before.items())
    assert not any(m.requires_grad for m in once[1].values())


@pytest.mark.parametrize("loss_type", {tuple(row[:2]): name for name, row in LOSS_TYPES.items()}.values())
def test_compiles_to_one_graph(loss_type):
    torch._dynamo.reset()
    data = batch(torch.float32)
    options = MODIFIERS["all"] | {"kl_aggregation": "token_mean", "loss_type": loss_type}
    if LOSS_TYPES[loss_type].surrogate in policy._USE_DUAL_CLIP:
        options["dual_clip"] = 3.0
    compiled = torch.compile(grpo_loss, fullgraph=True, backend="eager")
    assert_same(run(compiled, data, **options), run(grpo_loss, data, **options))


@pytest.mark.parametrize("per_token", [False, True])
def test_compiles_once_for_any_batch(per_token):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(grpo_loss, fullgraph=True, backend=counter)
    for B in (2, 3, 4, 6):
        log_probs, advantages = -torch.rand(2, B, B + 3), torch.randn(B, B + 3)
        args = (*log_probs, advantages if per_token else advantages[:, 0])
        torch.testing.assert_close(compiled(*args), grpo_loss(*args))
    assert counter.frame_count == 2  # one graph for the first batch, one for any


def test_the_rest_compiles_to_one_graph():
    torch._dynamo.reset()

    def step(old_log_probs, rollout_log_probs, mask, rewards):
        weight, metrics = mismatch_weight(old_log_probs, rollout_log_probs, mask, level="sequence_sum", high=2.0)
        return weight, metrics, group_advantages(rewards, 2, scale="batch")

    args = DATA["old_log_probs"], DATA["rollout_log_probs"], DATA["mask"], DATA["advantages"]
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="eager")(*args), step(*args))
    packed, borders, _ = pack(DATA)
    options = {"loss_type": "gspo", "cu_seqlens": borders} | MODIFIERS["all"]
    compiled = torch.compile(grpo_loss, fullgraph=True, backend="eager")
    assert_same(run(compiled, packed, **options), run(grpo_loss, packed, **options))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_waits_for_no_device(loss_type):
    """A fake tensor has no value to branch on or to bring to the host."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        data = {k: mode.from_tensor(v) for k, v in DATA.items()}
        loss, _, gradients = run(grpo_loss, data, loss_type=loss_type, **MODIFIERS["all"])
        mismatch_weight(data["old_log_probs"], data["rollout_log_probs"], data["mask"], high=2.0)
        group_advantages(data["advantages"], 2, scale="normalize_then_sum")
        value_loss(data["log_probs"], data["old_log_probs"], data["ref_log_probs"], data["mask"], clip_eps=0.2)
    assert loss.shape == ()
    assert gradients["log_probs"].shape == data["log_probs"].shape


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_options_without_effect(loss_type):
    x, used = (
        torch.zeros(2, 3),
        options_of(loss_type) | (CLIPS if LOSS_TYPES[loss_type].surrogate is policy._clip else {}),
    )
    for name, option in {"delta": 1.1, "dual_clip": 1.1, "importance_sampling_level": "sequence"}.items():
        call = functools.partial(grpo_loss, x, x, torch.zeros(2), loss_type=loss_type, **{name: option})
        if name in used or (name == "importance_sampling_level" and loss_type != "gmpo"):
            call()
        else:
            with pytest.raises(ValueError, match=f"^{name} has no effect on {loss_type}: leave it out$"):
                call()
    with pytest.raises(ValueError, match="rollout_log_probs has no effect without off_policy_mask_threshold"):
        grpo_loss(x, x, torch.zeros(2), loss_type=loss_type, rollout_log_probs=x)


@pytest.mark.parametrize("bounds", [20.0, (20.0, -20.0), (-20.0,), (-20.0, 0.0, 20.0), (None, None), (NAN, 20.0), "20"])
def test_log_ratio_clamp_is_a_pair_of_bounds(bounds):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=rf"log_ratio_clamp must be \(low, high\) .*; got {re.escape(repr(bounds))}"):
        grpo_loss(x, x, torch.zeros(2), log_ratio_clamp=bounds)


def test_errors_say_what_to_do():
    x, a = torch.zeros(2, 3), torch.zeros(2)
    with pytest.raises(ValueError, match="loss_type must be one of grpo"):
        grpo_loss(x, x, a, loss_type="ppo2")
    with pytest.raises(ValueError, match="unknown aggregation 'mean'; choose from token_mean, token_sum"):
        grpo_loss(x, x, a, aggregation="mean")
    with pytest.raises(ValueError, match="beta needs ref_log_probs"):
        grpo_loss(x, x, a, beta=0.1)
    with pytest.raises(ValueError, match="ref_log_probs has no effect without beta"):
        grpo_loss(x, x, a, ref_log_probs=x)
    assert grpo_loss(x, x, a, ref_log_probs=x - 1, beta=0)[0] == grpo_loss(x, x, a)[0]
    with pytest.raises(ValueError, match="entropy_coef trains nothing, as entropy has no gradient"):
        grpo_loss(x.clone().requires_grad_(), x, a, entropy=x, entropy_coef=0.1)
    assert grpo_loss(x, x, a, entropy=x + 1, entropy_coef=0.1)[0] == grpo_loss(x, x, a)[0] - 0.1  # where nothing trains
    with pytest.raises(
        ValueError, match=r"log_probs must be .* got \(2, 3, 4\): of logits, pass selective_log_softmax"
    ):
        grpo_loss(torch.zeros(2, 3, 4), None, a)
    with pytest.raises(
        TypeError, match=r"log_probs must be a tensor, got lazy logits \(2, 3\): pass selective_log_softmax"
    ):
        grpo_loss(LinearLogits(torch.zeros(2, 4), torch.zeros(3, 4)), None, a)
    with pytest.raises(ValueError, match="need entropy"):
        grpo_loss(x, x, a, entropy_coef=0.1)
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        grpo_loss(x, x, a, torch.ones(3, 2))
    with pytest.raises(ValueError, match="loss_scale_factor"):
        aggregate(torch.zeros(1, 3), None, "seq_mean_token_sum_norm", cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="clip_eps needs old_values"):
        value_loss(x, None, x, clip_eps=0.1)
    with pytest.raises(ValueError, match="groups of 3"):
        group_advantages(torch.zeros(4), 3)
    with pytest.raises(ValueError, match="scale must be"):
        group_advantages(torch.zeros(4), 2, scale="std")


@pytest.mark.parametrize(
    ("loss_type", "option", "number"),
    [(t, name, -0.1) for t in ("ppo", "gmpo", "cispo", "dppo_tv", "clip_cov") for name in ("eps_low", "eps_high")]
    + [(t, "delta", -0.1) for t in ("ppo", "dppo_kl")]
    + [(t, f"{t}_ratio", x) for t in ("kl_cov", "clip_cov") for x in (-0.1, 1.5)]
    + [("cispo", "cispo_max", -1.0), ("kl_cov", "kl_cov_coef", -1.0), ("dro", "dro_beta", -1.0)]
    + [("sapo", f"sapo_temperature_{side}", x) for side in ("pos", "neg") for x in (0, -1.0)]
    + [("ppo", "dual_clip", 1.0), ("clip_cov", "clip_cov_lb", 6.0)]
    + [("ppo", "top_entropy_quantile", x) for x in (1.5, -1, NAN)],
)
def test_numbers_without_meaning(loss_type, option, number):
    x = torch.zeros(2, 4)
    for entropy in (x, None):
        with pytest.raises(ValueError, match=rf"{option}.* must be .*, got .*{number}"):
            grpo_loss(x, x, torch.ones(2), loss_type=loss_type, entropy=entropy, **{option: number})


def test_bounds_are_numbers_with_meaning():
    x, a = torch.randn(2, 4), torch.tensor([1.0, -1.0])
    for quantile in (0, 0.0, 1, 1.0):
        assert grpo_loss(x, x, a, eps_low=0, eps_high=0, entropy=x, top_entropy_quantile=quantile)[0].isfinite()
    assert entropy_mask(x, 0).sum() == 1
    assert entropy_mask(x, 1).all()
    assert grpo_loss(x, x, a, loss_type="kl_cov", kl_cov_ratio=1, kl_cov_coef=0)[0].isfinite()
    assert policy._count_of_share(torch.ones(100), 0.29) == 28  # int(100 * 0.29), in float64


@pytest.mark.parametrize("loss_type", ["ppo", "gspo-token", "gmpo", "cispo", "dppo_tv", "dppo_kl"])
def test_on_policy_a_clip_of_0_holds_nothing(loss_type):
    bound = torch.zeros((), requires_grad=True)
    if loss_type in ("ppo", "gspo-token", "gmpo") and not torch.autograd.grad(bound.clamp(0, 0), bound)[0]:
        pytest.skip(
            "clamp has no gradient at its bounds, from PyTorch 2.15 on: half of a token's is left, in any trainer"
        )
    log_probs, advantages = -torch.rand(2, 4), torch.tensor([1.0, -1.0])
    results = []
    for options in ({"loss_type": loss_type, "eps_low": 0, "eps_high": 0, "cispo_max": None}, {"loss_type": "gpg"}):
        log_probs.requires_grad_().grad = None
        loss, metrics = grpo_loss(log_probs, None, advantages, **options, aggregation="token_mean")
        loss.backward()
        results.append(log_probs.grad)
        assert metrics.get("clip_ratio/region_mean", 0) == 0
    torch.testing.assert_close(*results)


def test_dppo_kl_of_a_token_that_is_certain():
    """Its rounded log-probability is 0 or above. It has risen and its advantage is negative, so the gate lets it train."""
    log_probs, old = torch.tensor([[0.0, 1e-7]], requires_grad=True), torch.full((1, 2), 0.9).log()
    loss, metrics = grpo_loss(log_probs, old, -torch.ones(1), loss_type="dppo_kl")
    (gradient,) = torch.autograd.grad(loss, log_probs)
    torch.testing.assert_close(gradient, torch.full((1, 2), 0.5 / 0.9))
    assert metrics["clip_ratio/region_mean"] == 0


def test_no_advantage_is_held_by_no_dual_clip():
    x = torch.zeros(1, 2)
    assert grpo_loss(x + 1, x, torch.zeros(1), loss_type="ppo", dual_clip=1.1)[1]["clip_ratio/dual_mean"] == 0
    at_its_bound = {"loss_type": "ppo", "delta": 3.0, "dual_clip": 3.0}
    assert grpo_loss(x + 2, x, -torch.ones(1), **at_its_bound)[1]["clip_ratio/dual_mean"] == 0


def test_the_off_policy_mask_averages_over_the_tokens_that_count():
    log_probs, old = torch.full((1, 4), -1.0), torch.full((1, 4), -0.9)
    mask, options = torch.tensor([[1, 0, 0, 0]]), {"off_policy_mask_threshold": 0.05}
    assert grpo_loss(log_probs, old, -torch.ones(1), mask, **options)[0] == 0
    assert grpo_loss(log_probs, old, -torch.ones(1), mask)[0] > 0


def test_a_reference_that_weighs_nothing_is_not_read():
    options = {"loss_type": "ppo", "beta": 0.0}
    plain = run(grpo_loss, DATA, **options)
    assert_same(run(grpo_loss, DATA, ref_log_probs=DATA["ref_log_probs"] * NAN, **options), plain)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: entropy_mask(x, 2.0), "top_entropy_quantile must be between 0 and 1, got 2.0"),
        (lambda x: entropy_mask(x, -1), "top_entropy_quantile must be between 0 and 1, got -1"),
        (lambda x: value_loss(x, x, x, clip_eps=-0.2), "clip_eps must be between 0 and inf, got -0.2"),
        (lambda x: mismatch_weight(x, x, low=2.0, high=1.0), "low must be between -inf and 1.0, got 2.0"),
        (lambda x: mismatch_weight(x, x, high=-1.0), "high must be between 0 and inf, got -1.0"),
        (lambda x: value_loss(x, x, x[:, 0]), "returns must be one per token (2, 4), got (2,)"),
        (lambda x: value_loss(x, x[0], x, clip_eps=1), "old_values must be one per token (2, 4), got (4,)"),
        (lambda x: value_loss(x[0], x, x), "values must be (B, S), or (1, total) with cu_seqlens; got (4,)"),
        (lambda x: aggregate(x[0]), "loss must be (B, S), or (1, total) with cu_seqlens; got (4,)"),
        (lambda x: mismatch_weight(x, x[:1]), "rollout_log_probs must be one per token (2, 4), got (1, 4)"),
        (
            lambda x: group_advantages(x[0], 2, weights=[1, 2, 3]),
            "weights must be one per reward function (1,), got (3,)",
        ),
        (lambda x: group_advantages(x, 2, weights=[1, 2, 3]), "weights must be one per reward function (4,), got (3,)"),
        (lambda x: group_advantages(x, 2, weights=2.0), "weights must be one per reward function (4,), got ()"),
        (lambda x: group_advantages(x, 0), "in groups of 0"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"advantages": torch.ones(4)}, "advantages must be one per sequence (2,) or one per token (2, 4), got (4,)"),
        ({"old_log_probs": torch.ones(2, 3)}, "old_log_probs must be one per token (2, 4), got (2, 3)"),
        ({"log_probs": torch.ones(4)}, "log_probs must be (B, S), or (1, total) with cu_seqlens; got (4,)"),
        ({"mask": torch.ones(4)}, "log_probs and mask must have one shape, got (2, 4) and (4,)"),
        ({"ref_log_probs": torch.ones(2, 3), "beta": 1.0}, "ref_log_probs must be one per token (2, 4), got (2, 3)"),
        (
            {"rollout_log_probs": torch.ones(2, 3), "off_policy_mask_threshold": 1.0},
            "rollout_log_probs must be one per token (2, 4), got (2, 3)",
        ),
        ({"entropy": torch.ones(2)}, "entropy must be one per token (2, 4), got (2,)"),
        (
            {"mismatch_weight": torch.ones(4)},
            "mismatch_weight must be one per sequence (2,) or one per token (2, 4), got (4,)",
        ),
        (
            {"mismatch_weight": mismatch_weight(torch.zeros(2, 4), torch.zeros(2, 4))},
            "mismatch_weight must be a tensor: pass the first of the two that the function returns",
        ),
        (
            {"importance_sampling_level": "batch"},
            "importance_sampling_level must be one of token, sequence, sequence_token, sequence_sum, got 'batch'",
        ),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_arguments_are_named(options, message):
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        grpo_loss(**{"log_probs": x, "old_log_probs": x, "advantages": torch.ones(2)} | options)


def test_vespo_bounds_a_sequence_that_moved_far():
    log_probs = torch.full((1, 10), -0.1)
    for A, side in ((1.0, "vespo_pos"), (-1.0, "vespo_neg")):
        for old, k in ((-3.0, 2.0), (-0.6, 200.0)):  # where λe^s is large, and where e^{ks} overflows
            options = {"loss_type": "vespo", side: (k, 0.0)}
            loss, _ = grpo_loss(log_probs, torch.full((1, 10), old), torch.tensor([A]), **options)
            assert loss == 0
    tokens = (
        torch.tensor([[-31.0, -1.0]]),
        torch.tensor([[-1.0, -16.0]]),
        torch.tensor([1.0]),
    )  # log-ratios: −30, clamped to −20, and 15
    torch.testing.assert_close(
        grpo_loss(*tokens, loss_type="vespo")[0],
        reference.grpo_loss(*tokens, loss_type="vespo")[0],
        rtol=1e-5, atol=0, check_dtype=False,
    )  # fmt: skip


@pytest.mark.parametrize("weight", [None, [[1e-12, 1e12]], [0.0], [1e12]])
@pytest.mark.parametrize("moved", [(30.0, -19.0), (-30.0, 20.5), (-15.0, -15.0), (19.0, -19.5)])
def test_vespo_bounds_each_token_weight_and_sequence(moved, weight):
    """With k and λ so small that all these bounds show in the loss."""
    log_probs = torch.tensor([[-1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    tokens = log_probs, (log_probs - log_probs.new_tensor(moved)).detach(), torch.ones(1, dtype=torch.float64)
    options = {"loss_type": "vespo", "vespo_pos": (0.1, 0.0)}
    if weight is not None:
        options["mismatch_weight"] = torch.tensor(weight, dtype=torch.float64)
    ours, expected = (f(*tokens, **options)[0] for f in (grpo_loss, reference.grpo_loss))
    torch.testing.assert_close(ours, expected, check_dtype=False)
    torch.testing.assert_close(*(torch.autograd.grad(loss, log_probs) for loss in (ours, expected)))


def test_vespo_takes_no_step_on_a_weight_that_is_not_a_number():
    weight = DATA["sequence_weight"].clone()
    weight[0] = float("nan")
    loss, _, gradients = run(grpo_loss, DATA, loss_type="vespo", mismatch_weight=weight)
    assert loss.isfinite()
    assert (gradients["log_probs"][0] == 0).all()
    assert (gradients["log_probs"][1] != 0).any()


@pytest.mark.parametrize("loss_type", ["ppo", "gspo"])
def test_borders_that_are_not_of_these_tokens(loss_type):
    x = torch.zeros(1, 6)
    with pytest.raises(ValueError, match=r"number of tokens, 6, got \[0, 3, 7\]"):
        grpo_loss(x, x, torch.ones(2), loss_type=loss_type, cu_seqlens=torch.tensor([0, 3, 7]))


VALUES = {
    "plain": {},
    "clip": {"clip_eps": 0.3},
    "clip_tight": {"clip_eps": 0.1},
    "sequences": {"clip_eps": 0.3, "aggregation": "seq_mean_token_mean"},
    "sequences_left_out": {"clip_eps": 0.3, "aggregation": "seq_mean_token_mean", "count_empty": False},
    "global": {"clip_eps": 0.3, "batch_num_tokens": 50.0, "dp_size": 3},
    "global_sequences": {
        "clip_eps": 0.3,
        "aggregation": "seq_mean_token_mean",
        "global_batch_size": 20.0,
        "dp_size": 3,
    },
}


def value_case(loss_fn, dtype=torch.float64, **options):
    data = batch(dtype)
    values = data["log_probs"].requires_grad_()
    loss, metrics = loss_fn(values, data["old_log_probs"], data["token_advantages"] - 1, data["mask"], **options)
    return loss.detach(), metrics, {"values": torch.autograd.grad(loss, values)[0]}


@pytest.mark.parametrize("name", VALUES)
def test_value_loss(name):
    ours, expected = (value_case(f, **VALUES[name]) for f in (value_loss, reference.value_loss))
    assert_same(ours, expected)
    assert (0 < ours[1]["clip_ratio"] < 1) == (name != "plain")
    half = value_case(value_loss, torch.bfloat16, **VALUES[name])
    assert half[0].dtype == torch.float32
    compiled = torch.compile(value_loss, fullgraph=True, backend="eager")
    assert_same(value_case(compiled, **VALUES[name]), ours)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_value_loss_of_packed_rows(aggregation):
    packed, borders, _ = pack(DATA)
    args = ("log_probs", "old_log_probs", "token_advantages", "mask")
    options = {"clip_eps": 0.3, "aggregation": aggregation, "loss_scale_factor": 7.0}
    ours = value_loss(*(packed[k] for k in args), cu_seqlens=borders, **options)
    torch.testing.assert_close(ours, value_loss(*(DATA[k] for k in args), count_empty=False, **options))


def test_the_values_alone_take_gradient():
    values, old, returns = (torch.randn(2, 4, requires_grad=True) for _ in range(3))
    value_loss(values, old, returns, clip_eps=0.3)[0].backward()
    assert [x.grad is None for x in (values, old, returns)] == [False, True, True]


def test_value_losses_differ():
    results = {name: value_case(value_loss, **options) for name, options in VALUES.items()}
    assert coinciding(results) == []


def test_value_clip_holds_the_gradient():
    """Moved beyond the clip away from the return, the unclipped loss is larger and trains; towards it, no gradient."""
    values = torch.tensor([[1.0, 1.0]], requires_grad=True)
    loss, metrics = value_loss(values, torch.zeros(1, 2), torch.tensor([[-1.0, 2.0]]), clip_eps=0.2)
    (gradient,) = torch.autograd.grad(loss, values)
    torch.testing.assert_close(gradient, torch.tensor([[1.0, 0.0]]))
    assert metrics["clip_ratio"] == 0.5


def test_rounding_is_not_a_value_clip():
    values, old = torch.randn(64, 128), torch.randn(64, 128)
    _, metrics = value_loss(values, old, torch.randn(64, 128), clip_eps=20.0)
    assert metrics["clip_ratio"] == 0


def test_ppo_loss_is_the_textbook_formula():
    shown = DATA["mask"] != 0
    r = (DATA["log_probs"] - DATA["old_log_probs"])[shown].exp()
    a = DATA["token_advantages"][shown]
    expected = torch.maximum(-a * r, -a * r.clamp(0.8, 1.2)).sum() / shown.sum()
    loss, _ = ppo_loss(DATA["log_probs"], DATA["old_log_probs"], DATA["token_advantages"], DATA["mask"])
    torch.testing.assert_close(loss, expected)
    ours = run(lambda *a, **o: ppo_loss(*a, **o), DATA, eps_high=0.3, dual_clip=1.3)
    assert_same(ours, run(reference.ppo_loss, DATA, eps_high=0.3, dual_clip=1.3))


A2PO = {
    "plain": {},
    "beta": {"beta": 0.8},
    "masked": {"beta": 0.8, "mask": "mask"},
    "global": {"beta": 0.8, "mask": "mask", "global_batch_size": 20.0, "dp_size": 3},
}


def a2po_case(loss_fn, data=DATA, **options):
    """Without a mask, nan is replaced first: it is what the batch has where the mask is 0."""
    mask = data[options.pop("mask")] if "mask" in options else None
    log_probs, ref = (data[k] if mask is not None else data[k].nan_to_num() for k in ("log_probs", "ref_log_probs"))
    log_probs = log_probs.detach().clone().requires_grad_()
    loss, metrics = loss_fn(log_probs, ref, data["advantages"], mask, **options)
    return loss.detach(), metrics, {"log_probs": torch.autograd.grad(loss, log_probs)[0]}


def test_a2po_loss():
    results = {name: a2po_case(a2po_loss, **options) for name, options in A2PO.items()}
    for name, options in A2PO.items():
        assert_same(results[name], a2po_case(reference.a2po_loss, **options))
        compiled = torch.compile(a2po_loss, fullgraph=True, backend="eager")
        assert_same(a2po_case(compiled, **options), results[name])
        half, metrics, _ = a2po_case(a2po_loss, batch(torch.bfloat16), **options)
        assert {x.dtype for x in (half, *metrics.values())} == {torch.float32}
    log_probs, ref, advantages = (torch.randn(shape, requires_grad=True) for shape in ((2, 4), (2, 4), (2,)))
    loss, metrics = a2po_loss(log_probs, ref, advantages)
    loss.backward()
    assert [x.grad is None for x in (log_probs, ref, advantages)] == [False, True, True]
    assert not any(metric.requires_grad for metric in metrics.values())
    assert coinciding(results) == []
    packed, borders, kept = pack(DATA)
    in_one_row = a2po_case(
        a2po_loss, packed, mask="mask", beta=0.8, cu_seqlens=borders, global_batch_size=len(DATA["advantages"])
    )
    expected = results["masked"][2]["log_probs"][kept]
    torch.testing.assert_close(in_one_row[2]["log_probs"].squeeze(0), expected)  # the empty sequence changes nothing


def test_a2po_advantages_are_one_per_sequence():
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=re.escape("advantages must be one per sequence (2,), got (2, 4)")):
        a2po_loss(x, x, x)
