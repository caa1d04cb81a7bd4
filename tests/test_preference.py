"""Every preference loss and modifier, value and gradient, against the float64 reference that loops over pairs."""

import copy
import itertools
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.common_distributed import spawn_threads_and_init_comms

from fused_losses import LinearLogits, preference
from fused_losses.numerics import log1mexp
from fused_losses.reference import preference as reference
from fused_losses.reference.tolerance import assert_accurate
from fused_losses.sequences import masked_mean, packed_sum
from fused_losses.token_statistics import TokenStatistics

B, S_W, S_L = 6, 7, 5
NAMES = ("policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps", "reference_rejected_logps")
# Ragged from both ends; in some pairs the chosen is longer, in some the rejected.
CHOSEN_LENGTHS = torch.tensor([7, 3, 5, 1, 6, 2])
REJECTED_LENGTHS = torch.tensor([2, 5, 5, 4, 1, 3])
CHOSEN_MASK = (torch.arange(S_W) >= S_W - CHOSEN_LENGTHS[:, None]).long()
REJECTED_MASK = (torch.arange(S_L) < REJECTED_LENGTHS[:, None]).long()
MASKS = {"chosen_mask": CHOSEN_MASK, "rejected_mask": REJECTED_MASK}
LENGTHS = {"chosen_lengths": CHOSEN_LENGTHS, "rejected_lengths": REJECTED_LENGTHS}
PAIR_WEIGHT = torch.tensor([0.5, 1.5, 0.25, 1.0, 2.0, 0.75], dtype=torch.float64)


def token_logps(seed=7, rows=B):
    """Policy and reference log-probs per token, (rows, S_W) or (rows, S_L): float64; they and their sums are exact in fp32."""
    generator = torch.Generator().manual_seed(seed)
    policy = [-torch.rand(rows, s, generator=generator) * 4 for s in (S_W, S_L)]
    moved = [p + torch.randn(p.shape, generator=generator) * 1.5 for p in policy]
    return [(x * 64).round().double() / 64 for x in (*policy, *(m.clamp(max=-0.01) for m in moved))]


def sums(rows=None):
    if rows is not None:
        return [x.sum(-1) for x in token_logps(rows=rows)]
    return [(x * m).sum(-1) for x, m in zip(token_logps(), (CHOSEN_MASK, REJECTED_MASK) * 2, strict=True)]


def cast(options, dtype):
    return {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in options.items()}


def run(module, name, inputs, dtype, options, upstream=3.0):
    """The loss, its gradients, then whatever else the function returns."""
    options = cast(options, dtype)
    if options.pop("remember", False):
        options["running_mean"] = module.RunningMean()
        call = getattr(module, name)
        call(*(x.to(dtype) + 1 for x in inputs[:2]), *(x.to(dtype) for x in inputs[2:]), **options)  # an earlier batch
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    loss, *rest = getattr(module, name)(*leaves, **options)
    root = (loss * upstream).sum() + sum(0 * leaf.sum() for leaf in leaves)  # some losses depend on no leaf
    grads = torch.autograd.grad(root, leaves)
    return [loss, *grads, *rest]


def assert_matches(name, inputs, options):
    exact = run(reference, name, inputs, torch.float64, options)
    ours = run(preference, name, inputs, torch.float64, options)
    torch.testing.assert_close(ours, exact)
    assert all(not extra.requires_grad for extra in ours[1 + len(inputs) :])
    return exact


def assert_accurate_in_fp32(name, inputs, options):
    outputs = [
        run(module, name, inputs, dtype, options)
        for module, dtype in ((preference, torch.float32), (reference, torch.float32), (reference, torch.float64))
    ]
    for i, triple in enumerate(zip(*outputs, strict=True)):
        assert_accurate(*triple, f"output {i} of {name}")


LOSS_TYPES = {
    "sigmoid": {},
    "sigmoid, e": {"label_smoothing": 0.2},
    "hinge": {},
    "ipo": {},
    "ipo_norm": {},
    "exo_pair": {"label_smoothing": 0.1},
    "exo_pair, e": {"label_smoothing": 0.01},
    "nca_pair": {},
    "robust": {},
    "robust, e": {"label_smoothing": 0.2},
    "bco_pair": {},
    "bco_pair, δ": {"remember": True},
    "sppo_hard": {},
    "aot": {},
    "aot, e": {"label_smoothing": 0.2},
    "aot_unpaired": {},
    "aot_unpaired, e": {"label_smoothing": 0.2},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {},
    "discopop, τ": {"discopop_tau": 0.7},
    "sigmoid_norm": {},
    "sft": {},
}
LOSS_TYPES = {key: {"loss_type": key.split(",")[0], "beta": 0.5, **value} for key, value in LOSS_TYPES.items()}
EQUAL_BY_DEFINITION = {frozenset({"sigmoid", "robust"})}  # robust without smoothing is sigmoid
F_DIVERGENCES = {
    "reverse": {},
    "forward": {"f_divergence_type": "forward_kl"},
    "js": {"f_divergence_type": "js_divergence"},
    "alpha": {"f_divergence_type": "alpha_divergence"},
    "alpha 1.4": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.4},
}
MODIFIERS = {
    "plain": {},
    "ld": {"ld_alpha": 0.3},
    "rpo": {"rpo_alpha": 0.7},
    "rpo, given": {"rpo_alpha": 0.7, "nll_loss": torch.tensor(1.25, dtype=torch.float64)},
    "weight": {"weight": PAIR_WEIGHT},
    "rpo, weight": {"rpo_alpha": 0.7, "weight": PAIR_WEIGHT},
    "aux": {"aux_loss": torch.tensor(2.5, dtype=torch.float64), "aux_loss_coef": 0.1},
    "aux, weight": {"aux_loss": torch.tensor(2.5, dtype=torch.float64), "weight": PAIR_WEIGHT},
    "reference free": {"reference_free": True},
    "ld, reference free": {"ld_alpha": 0.3, "reference_free": True},
}


def test_fixture_exercises_every_branch():
    policy_w, policy_l, ref_w, ref_l = sums()
    lr_w, lr_l = policy_w - ref_w, policy_l - ref_l
    d = 0.5 * (lr_w - lr_l)
    assert (d < 1).any()
    assert (d > 1).any(), "hinge is active on some pairs and not on others"
    orders = [x.argsort().tolist() for x in (policy_w - policy_l, ref_w - ref_l, lr_w, lr_l)]
    assert orders[0] != orders[1]
    assert orders[2] != orders[3], "sorting must change the pairing"
    assert (lr_w > 0).any()
    assert (lr_w < 0).any()
    assert (CHOSEN_LENGTHS > REJECTED_LENGTHS).any()
    assert (CHOSEN_LENGTHS < REJECTED_LENGTHS).any()


@pytest.mark.parametrize("reduction", ["mean", "none", "sum"])
@pytest.mark.parametrize("case", LOSS_TYPES)
def test_loss_types_on_tokens(case, reduction):
    assert_matches("dpo_loss", token_logps(), {**LOSS_TYPES[case], **MASKS, "reduction": reduction})


@pytest.mark.parametrize("case", LOSS_TYPES)
def test_loss_types_on_sums(case):
    options = {**LOSS_TYPES[case], **LENGTHS}
    exact = assert_matches("dpo_loss", sums(), options)
    if "remember" not in options:
        per_token = run(preference, "dpo_loss", token_logps(), torch.float64, {**LOSS_TYPES[case], **MASKS})
        torch.testing.assert_close(exact[0], per_token[0])


@pytest.mark.parametrize("modifier", MODIFIERS)
@pytest.mark.parametrize("case", LOSS_TYPES)
def test_loss_types_with_modifiers(case, modifier):
    options = {**LOSS_TYPES[case], **MODIFIERS[modifier], **MASKS, "reduction": "none"}
    if "aot" in case and "weight" in modifier:
        with pytest.raises(ValueError, match="sort over the batch"):
            run(preference, "dpo_loss", token_logps(), torch.float64, options)
    else:
        assert_matches("dpo_loss", token_logps(), options)


@pytest.mark.parametrize("divergence", F_DIVERGENCES)
@pytest.mark.parametrize("case", LOSS_TYPES)
def test_loss_types_with_f_divergences(case, divergence):
    options = {**LOSS_TYPES[case], **F_DIVERGENCES[divergence], **MASKS, "reduction": "none"}
    if divergence != "reverse" and options["loss_type"] not in preference._ALLOW_F_DIVERGENCE:
        with pytest.raises(ValueError, match="not defined for"):
            run(preference, "dpo_loss", token_logps(), torch.float64, options)
    else:
        assert_matches("dpo_loss", token_logps(), options)


def fingerprint(options):
    loss, *grads = run(preference, "dpo_loss", token_logps(), torch.float64, {**options, **MASKS})[:5]
    return torch.cat([loss.reshape(1), *(g.flatten() for g in grads)])


def assert_all_differ(fingerprints, same=frozenset(), same_gradient=frozenset()):
    for a, b in itertools.combinations(fingerprints, 2):
        x, y = fingerprints[a], fingerprints[b]
        values, gradients = (x[0] - y[0]).abs() > 1e-5 * x[0].abs(), (x[1:] - y[1:]).norm() > 1e-4 * x[1:].norm()
        pair = frozenset({a, b})
        assert values == (pair not in same), f"the values of {a} and {b}"
        assert gradients == (pair not in same | same_gradient), f"the gradients of {a} and {b}"


def test_no_two_loss_types_agree():
    assert_all_differ({case: fingerprint(options) for case, options in LOSS_TYPES.items()}, EQUAL_BY_DEFINITION)


@pytest.mark.parametrize("case", [c for c in LOSS_TYPES if c != "sft"])
def test_every_modifier_changes_the_number(case):
    results = {"plain": fingerprint(LOSS_TYPES[case])}
    for name, modifier in (MODIFIERS | F_DIVERGENCES).items():
        options = {**LOSS_TYPES[case], **modifier}
        if "f_divergence_type" in options and options["loss_type"] not in preference._ALLOW_F_DIVERGENCE:
            continue
        if name not in ("plain", "reverse") and not ("aot" in case and "weight" in options):
            results[name] = fingerprint(options)
    # A modifier that adds a constant changes the value, not the gradient.
    same_gradient = {frozenset(p) for p in itertools.combinations(("plain", "aux", "rpo, given"), 2)}
    assert_all_differ(results, same_gradient=same_gradient | {frozenset({"weight", "aux, weight"})})


ACCURACY = {
    **{
        f"{case}, {divergence}": ("dpo_loss", {**options, **F_DIVERGENCES[divergence]})
        for case, options in LOSS_TYPES.items()
        for divergence in F_DIVERGENCES
        if divergence == "reverse" or options["loss_type"] in preference._ALLOW_F_DIVERGENCE - {"sft"}
    },
    "bco": ("bco_loss", {"beta": 0.5}),
    "vanilla kto": ("vanilla_kto_loss", {"beta": 0.5}),
}


@pytest.mark.parametrize("case", ACCURACY)
def test_fp32_is_as_accurate_as_the_same_maths_in_plain_pytorch(case):
    name, options = ACCURACY[case]
    counts = {"chosen_lengths": torch.full((64,), S_W), "rejected_lengths": torch.full((64,), S_L)}
    counts = counts if name == "dpo_loss" else {}
    assert_accurate_in_fp32(name, sums(rows=64), {**options, **counts, "reduction": "none"})


def test_several_loss_types_are_a_weighted_sum():
    options = {
        "loss_type": ["sigmoid", "bco_pair", "sft"],
        "loss_weights": [0.8, 0.2, 1.5],
        **MASKS,
        "reduction": "none",
    }
    exact = assert_matches("dpo_loss", token_logps(), options)
    parts = [
        w * preference.dpo_loss(*token_logps(), loss_type=t, **MASKS)[0]
        for t, w in zip(options["loss_type"], options["loss_weights"], strict=True)
    ]
    torch.testing.assert_close(exact[0].mean(), sum(parts))
    unweighted = preference.dpo_loss(*token_logps(), **{**options, "loss_weights": None})[0]
    assert not torch.allclose(unweighted, exact[0])


def test_label_smoothing_per_loss_type():
    options = {"loss_type": ["sigmoid", "exo_pair"], "label_smoothing": [0.0, 0.1], **MASKS}
    exact = assert_matches("dpo_loss", token_logps(), options)[0]
    parts = [
        preference.dpo_loss(*token_logps(), loss_type=t, label_smoothing=e, **MASKS)[0]
        for t, e in (("sigmoid", 0.0), ("exo_pair", 0.1))
    ]
    torch.testing.assert_close(exact, sum(parts))
    assert not torch.allclose(exact, preference.dpo_loss(*token_logps(), **{**options, "label_smoothing": 0.1})[0])


def test_rewards():
    policy_w, policy_l, ref_w, ref_l = sums()
    both = {"loss_type": ["sigmoid", "hinge"], "loss_weights": [0.5, 0.25], "beta": 0.3}
    for extra, times in (({}, 1.0), ({"weighted_rewards": True}, 0.75)):
        _, chosen, rejected = preference.dpo_loss(policy_w, policy_l, ref_w, ref_l, **both, **extra)
        torch.testing.assert_close(chosen, 0.3 * times * (policy_w - ref_w))
        torch.testing.assert_close(rejected, 0.3 * times * (policy_l - ref_l))
    # Rewards subtract the reference if it is given, even where the loss does not use it.
    with_ref = preference.dpo_loss(policy_w, policy_l, ref_w, ref_l, reference_free=True)
    without = preference.dpo_loss(policy_w, policy_l, reference_free=True)
    assert torch.equal(with_ref[0], without[0])
    torch.testing.assert_close(with_ref[1], 0.1 * (policy_w - ref_w))
    torch.testing.assert_close(without[1], 0.1 * policy_w)
    torch.testing.assert_close(without[2], 0.1 * policy_l)
    # A divergence changes the loss, not the rewards.
    mapped = preference.dpo_loss(policy_w, policy_l, ref_w, ref_l, f_divergence_type="forward_kl")
    torch.testing.assert_close(mapped[1], 0.1 * (policy_w - ref_w))


def test_alpha_divergence_at_one_is_reverse_kl_and_its_exponent_is_capped():
    plain = preference.dpo_loss(*sums())[0]
    near = {"f_divergence_type": "alpha_divergence"}
    torch.testing.assert_close(preference.dpo_loss(*sums(), **near, f_alpha_divergence_coef=1.0)[0], plain)
    policy = torch.tensor([-1000.0], requires_grad=True)
    zero = torch.zeros(1)
    loss = preference.dpo_loss(policy, zero, zero, zero, **near, loss_type="hinge", beta=1e-30)[0]
    torch.testing.assert_close(loss, torch.tensor(1 + 1e-30 * 2 * math.expm1(80)))
    assert torch.autograd.grad(loss, policy)[0] == 0


def test_ld_alpha_weighs_tokens_beyond_the_shorter_answer():
    policy_w, policy_l, ref_w, ref_l = token_logps()
    kept = torch.minimum(CHOSEN_LENGTHS, REJECTED_LENGTHS)[:, None]
    expected = [
        (x * mask * torch.where(mask.cumsum(-1) <= kept, 1.0, 0.3)).sum(-1)
        for x, mask in (
            (policy_w, CHOSEN_MASK),
            (policy_l, REJECTED_MASK),
            (ref_w, CHOSEN_MASK),
            (ref_l, REJECTED_MASK),
        )
    ]
    ours = preference.dpo_loss(policy_w, policy_l, ref_w, ref_l, ld_alpha=0.3, **MASKS)
    torch.testing.assert_close(ours, preference.dpo_loss(*expected))
    # A reference given as sums stays as it is: TRL 0.25's form.
    plain_ref = [(ref_w * CHOSEN_MASK).sum(-1), (ref_l * REJECTED_MASK).sum(-1)]
    old = preference.dpo_loss(policy_w, policy_l, *plain_ref, ld_alpha=0.3, **MASKS)
    torch.testing.assert_close(old, preference.dpo_loss(*expected[:2], *plain_ref))
    assert not torch.allclose(old[0], ours[0])


@pytest.mark.parametrize("max_weight", [None, 0.5])
def test_wpo_weight(max_weight):
    generator = torch.Generator().manual_seed(1)
    policy_w, policy_l, *_ = token_logps()
    expected = [-torch.rand(x.shape, generator=generator).double() * 3 for x in (policy_w, policy_l)]
    inputs = [policy_w, policy_l, *expected]
    exact = reference.wpo_weight(*inputs, CHOSEN_MASK, REJECTED_MASK, max_weight=max_weight)
    eager = reference.wpo_weight(*(x.float() for x in inputs), CHOSEN_MASK, REJECTED_MASK, max_weight=max_weight)
    leaves = [x.float().requires_grad_() for x in inputs]
    ours = preference.wpo_weight(*leaves, CHOSEN_MASK, REJECTED_MASK, max_weight=max_weight)
    assert_accurate(ours, eager, exact)
    assert not ours.requires_grad
    assert (exact < 0.5).any()
    assert max_weight is not None or (exact > 0.5).any()
    loss = preference.dpo_loss(*token_logps(), **MASKS, weight=ours)[0]
    torch.testing.assert_close(
        loss, (exact * preference.dpo_loss(*token_logps(), **MASKS, reduction="none")[0]).mean(), rtol=1e-6, atol=0
    )


def test_packed_sums_give_the_padded_loss():
    policy, masks = token_logps(), (CHOSEN_MASK, REJECTED_MASK) * 2
    packed = [x[m != 0].unsqueeze(0) for x, m in zip(policy, masks, strict=True)]
    borders = [torch.nn.functional.pad(m.sum(-1).cumsum(0), (1, 0)) for m in masks]
    packed_sums = [packed_sum(x, cu_seqlens=b) for x, b in zip(packed, borders, strict=True)]
    for options in LOSS_TYPES.values():
        if "remember" not in options:
            padded = preference.dpo_loss(*policy, **MASKS, **options, rpo_alpha=0.5)
            torch.testing.assert_close(preference.dpo_loss(*packed_sums, **LENGTHS, **options, rpo_alpha=0.5), padded)


CPO = {
    "sigmoid": {},
    "sigmoid, e": {"label_smoothing": 0.2},
    "sigmoid, no nll": {"cpo_alpha": 0.0},
    "sigmoid, nll": {"cpo_alpha": 0.4, "nll_loss": torch.tensor(1.5, dtype=torch.float64)},
    "sigmoid, alpha": {"alpha": 0.05},
    "hinge": {},
    "hinge, alpha": {"alpha": -0.2},
    "ipo": {},
    "ipo, alpha": {"alpha": 0.3},
    "simpo": {},
    "simpo, e": {"label_smoothing": 0.2},
    "simpo, γ": {"simpo_gamma": 1.1},
    "simpo, alpha": {"alpha": 0.3},
}
CPO = {key: {"loss_type": key.split(",")[0], "beta": 0.4, **value} for key, value in CPO.items()}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("case", CPO)
def test_cpo(case, reduction):
    assert_matches("cpo_loss", token_logps()[:2], {**CPO[case], **MASKS, "reduction": reduction})
    assert_matches("cpo_loss", sums()[:2], {**CPO[case], **LENGTHS, "reduction": reduction})


def test_no_two_cpo_configurations_agree():
    results = {}
    for case, options in CPO.items():
        outputs = run(preference, "cpo_loss", token_logps()[:2], torch.float64, {**options, **MASKS})
        results[case] = torch.cat([x.reshape(-1) for x in outputs])
    for a, b in itertools.combinations(results, 2):
        assert not torch.allclose(results[a], results[b], rtol=1e-4), f"{a} and {b} agree"
    d = 0.4 * (sums()[0] - sums()[1])
    assert (d < 1).any()
    assert (d > 1).any(), "hinge must be active on some pairs and not on others"


@pytest.mark.parametrize(
    "options", [{}, {"simpo_gamma": 1.5}, {"cpo_alpha": 1.0}, {"alpha": 0.25, "label_smoothing": 0.1}]
)
def test_simpo(options):
    exact = assert_matches("simpo_loss", token_logps()[:2], {**MASKS, **options})
    as_cpo = preference.cpo_loss(
        *token_logps()[:2], loss_type="simpo", **{"beta": 2.0, "cpo_alpha": 0.0, **options}, **MASKS
    )
    torch.testing.assert_close(exact[0], as_cpo[0])
    if options:
        assert not torch.allclose(exact[0], preference.simpo_loss(*token_logps()[:2], **MASKS)[0])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_orpo(beta, reduction):
    options = {"nll_loss": torch.tensor(1.25, dtype=torch.float64), "beta": beta, "reduction": reduction}
    on_tokens = assert_matches("orpo_loss", token_logps()[:2], {**options, **MASKS})
    on_sums = assert_matches("orpo_loss", sums()[:2], {**options, **LENGTHS})
    torch.testing.assert_close(on_tokens[0], on_sums[0], rtol=1e-7, atol=0)


def test_orpo_trains_on_its_nll_and_all_its_numbers_differ():
    tokens = [x.requires_grad_() for x in token_logps()[:2]]
    nll = -masked_mean(tokens[0], None)
    loss, chosen, rejected, log_odds_ratio, log_odds = preference.orpo_loss(*tokens, nll, **MASKS)
    (grad,) = torch.autograd.grad(loss, tokens[0])
    assert (grad[CHOSEN_MASK == 0] == -1 / grad.numel()).all()
    numbers = [loss.detach(), chosen.mean(), rejected.mean(), log_odds_ratio, log_odds]
    assert all(not torch.allclose(a, b) for a, b in itertools.combinations(numbers, 2))


def test_log_odds_stay_finite_as_the_mean_log_prob_reaches_zero():
    x = torch.tensor([-90.0, -5.0, -0.7, -0.69, -1e-3, -1e-7, -1e-12, -1e-30])
    leaf = x.requires_grad_()
    ours = log1mexp(leaf)
    (grad,) = torch.autograd.grad(ours.sum(), leaf)
    leaf64 = x.detach().double().requires_grad_()
    exact = reference.log1mexp(leaf64)
    (exact_grad,) = torch.autograd.grad(exact.sum(), leaf64)
    torch.testing.assert_close(ours, exact.float(), rtol=2e-7, atol=0)
    torch.testing.assert_close(grad, exact_grad.float(), rtol=3e-7, atol=0)
    for chosen, rejected in ([0.0, -1.0], [-1.0, 0.0], [0.0, 0.0], [-1e-8, -1.0]):
        leaves = [torch.full((1, 2), v, requires_grad=True) for v in (chosen, rejected)]
        loss, *_, log_odds = preference.orpo_loss(*leaves, torch.tensor(0.0))
        for value in (loss, log_odds, *torch.autograd.grad(loss, leaves)):
            assert value.isfinite().all()
    assert (log_odds > 15).all()


# Policy over reference, (2, rows).
KTO_CHOSEN = torch.tensor([[-9.0, -7.5, -12.0], [-10.0, -9.0, -11.5]]).double()
KTO_REJECTED = torch.tensor([[-8.0, -14.0], [-9.5, -13.0]]).double()
KTO_KL = torch.tensor([[-6.0, -7.0, -9.0, -10.0], [-7.5, -7.25, -9.5, -10.75]]).double()
EMPTY = torch.zeros(2, 0, dtype=torch.float64)
KTO = {
    "kto": {},
    "kto, weights": {"desirable_weight": 1.5, "undesirable_weight": 0.6},
    "kto, clamped": {},
    "apo_zero_unpaired": {},
    "apo_zero_unpaired, weights": {"desirable_weight": 1.5, "undesirable_weight": 0.6},
}
KTO = {key: {"loss_type": key.split(",")[0], "beta": 0.8, **value} for key, value in KTO.items()}


def kto_inputs(case="kto", chosen=KTO_CHOSEN, rejected=KTO_REJECTED):
    kl = KTO_KL.flip(0) if "clamped" in case else KTO_KL
    return [chosen[0], rejected[0], kl[0], chosen[1], rejected[1], kl[1]]


@pytest.mark.parametrize("reduction", ["mean", "none", "sum"])
@pytest.mark.parametrize("sides", ["both", "no rejected", "no chosen"])
@pytest.mark.parametrize("case", KTO)
def test_kto(case, sides, reduction):
    empty = {"no rejected": {"rejected": EMPTY}, "no chosen": {"chosen": EMPTY}}.get(sides, {})
    inputs = kto_inputs(case, **empty)
    outputs = assert_matches("kto_loss", inputs, {**KTO[case], "reduction": reduction})
    assert (outputs[-1] > 0) == (case in ("kto", "kto, weights"))
    assert (outputs[3] == 0).all(), "no gradient through the KL"
    assert (outputs[6] == 0).all()
    assert [len(r) for r in outputs[7:9]] == [len(inputs[0]), len(inputs[1])]


def test_no_two_kto_configurations_agree():
    results = {case: run(preference, "kto_loss", kto_inputs(case), torch.float64, KTO[case])[:2] for case in KTO}
    results["vanilla"] = run(preference, "vanilla_kto_loss", kto_pairs(), torch.float64, {"beta": 0.8})[:2]
    results["bco"] = run(preference, "bco_loss", kto_pairs(), torch.float64, {"beta": 0.8})[:2]
    results["bco, δ"] = run(preference, "bco_loss", kto_pairs(), torch.float64, {"beta": 0.8, "remember": True})[:2]
    same = {frozenset({"kto, clamped", "apo_zero_unpaired"})}  # a KL clamped to 0 is APO's baseline
    for a, b in itertools.combinations(results, 2):
        if frozenset({a, b}) not in same:
            assert not torch.allclose(results[a][0], results[b][0]), f"{a} and {b} have the same value"
            assert not torch.allclose(results[a][1], results[b][1]), f"{a} and {b} have the same gradient"


def test_kto_without_rows_is_nan():
    both_empty = preference.kto_loss(*(x.float() for x in kto_inputs(chosen=EMPTY, rejected=EMPTY)))
    assert both_empty[0].isnan()
    no_kl = kto_inputs()
    no_kl[2] = no_kl[5] = EMPTY[0]
    assert preference.kto_loss(*no_kl)[0].isnan()
    assert preference.kto_loss(*no_kl)[3].isnan()
    assert preference.kto_loss(*no_kl, loss_type="apo_zero_unpaired")[0].isfinite()


def kto_pairs():
    return [KTO_CHOSEN[0], KTO_REJECTED[0], KTO_CHOSEN[1], KTO_REJECTED[1]]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_vanilla_kto(reduction, flip):
    inputs = kto_pairs()
    if flip:
        inputs = inputs[2:] + inputs[:2]
    outputs = assert_matches("vanilla_kto_loss", inputs, {"beta": 0.8, "reduction": reduction})
    kl = [(inputs[i] - inputs[i + 2]).mean() for i in (0, 1)]
    assert all((k < 0) == flip for k in kl), "both KLs positive, or both clamped"
    # The KLs have gradients: through them, an answer's gradient depends on the other side.
    moved = [inputs[0], inputs[1] + 0.1, *inputs[2:]]
    other = run(preference, "vanilla_kto_loss", moved, torch.float64, {"beta": 0.8, "reduction": reduction})
    assert torch.allclose(outputs[1], other[1]) == flip


@pytest.mark.parametrize("sides", ["both", "no rejected", "no chosen"])
@pytest.mark.parametrize("remember", [False, True])
def test_bco(remember, sides):
    inputs = kto_pairs()
    for side in {"no rejected": (1, 3), "no chosen": (0, 2)}.get(sides, ()):
        inputs[side] = EMPTY[0]
    outputs = assert_matches("bco_loss", inputs, {"beta": 0.8, "remember": remember, "reduction": "none"})
    assert (outputs[-1] != 0) == remember


def test_bco_weighs_the_rejected():
    weight = torch.linspace(0.3, 1.7, len(KTO_REJECTED[0]), dtype=torch.float64)
    options = {"beta": 0.8, "remember": True, "rejected_weight": weight}
    weighted = assert_matches("bco_loss", kto_pairs(), options | {"reduction": "none"})
    plain = run(
        preference, "bco_loss", kto_pairs(), torch.float64, {"beta": 0.8, "remember": True, "reduction": "none"}
    )
    n = len(KTO_CHOSEN[0])
    torch.testing.assert_close(weighted[0], torch.cat([plain[0][:n], plain[0][n:] * weight]))
    outputs = preference.bco_loss(*kto_pairs(), rejected_weight=weight.clone().requires_grad_())
    assert not outputs[0].requires_grad
    with pytest.raises(ValueError, match="policy_rejected_logps and rejected_weight must have one shape"):
        preference.bco_loss(*kto_pairs(), rejected_weight=weight[:1])


def test_running_mean_takes_rewards_in_training_only_and_is_saved():
    delta = preference.RunningMean()
    seen = torch.randn(3, 5)
    for rewards in seen:
        value = delta(rewards.requires_grad_())
    torch.testing.assert_close(value, seen.mean())
    assert not value.requires_grad
    torch.testing.assert_close(delta(torch.ones(1)), (seen.sum() + 1) / 16)
    other = preference.RunningMean()
    other.load_state_dict(delta.state_dict())
    other.eval()
    assert torch.equal(other(torch.full((4,), 100.0)), delta.eval()(torch.zeros(2)))
    assert preference.RunningMean()(torch.zeros(0)) == 0
    third = preference.RunningMean()(torch.tensor([2.0**24, 1.0, -(2.0**24)]))
    assert third == torch.tensor(1 / 3)  # summed in float64, and kept in it
    assert preference.RunningMean()(torch.tensor([0.1], dtype=torch.float64)) == 0.1
    alone = preference.RunningMean()
    first = alone(torch.tensor([3.0]).double())
    assert first == 3
    alone(torch.tensor([5.0]).double())
    assert first == 3  # the result is a copy


@pytest.mark.parametrize(
    "cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.float().to("cpu", torch.float16)]
)
def test_a_model_that_is_cast_leaves_its_running_mean_exact(cast):
    model = torch.nn.ModuleDict({"head": torch.nn.Linear(2, 2), "delta": preference.RunningMean()})
    same = preference.RunningMean()
    seen = torch.randn(3000)
    for delta in (model["delta"], same):
        delta(seen)
    model = copy.deepcopy(cast(model))
    assert model["head"].weight.dtype in (torch.bfloat16, torch.float16)
    for rewards in torch.randn(8, 3):  # a bfloat16 count of 3000 or more would not grow
        assert torch.equal(model["delta"](rewards), same(rewards))
    other = cast(torch.nn.ModuleDict({"head": torch.nn.Linear(2, 2), "delta": preference.RunningMean()}))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other["delta"](seen), same(seen))
    assert other["delta"].to("meta").mean.is_meta
    assert preference.RunningMean().to("meta", torch.float16).mean.is_meta
    assert other["delta"].to_empty(device="cpu").count.dtype == torch.float64


@spawn_threads_and_init_comms(world_size=2)
def on_two_ranks(_):
    rank = torch.distributed.get_rank()
    chosen, rejected, _, *reference_logps = kto_inputs()
    moved = torch.tensor([1.0, -0.4])[rank]
    inputs = [chosen, rejected, reference_logps[-1] + moved, *reference_logps]
    everyone, alone = torch.distributed.group.WORLD, [torch.distributed.new_group([i]) for i in range(2)]
    kl = [preference.kto_loss(*inputs, group=group)[3] for group in (None, everyone, alone[rank])]
    # If each rank clamped first, the average would be 0.5.
    assert [k.item() for k in kl] == pytest.approx([0.3, 0.3, max(moved.item(), 0)])
    delta = preference.RunningMean()
    assert delta(torch.full((rank + 1,), float(rank))).item() == pytest.approx(2 / 3)


def test_ranks_average_their_kl_before_the_clamp_and_share_the_running_mean():
    on_two_ranks(None)


def statistics(shape, seed):
    torch.manual_seed(seed)
    return TokenStatistics(
        log_probs=-torch.rand(shape),
        entropy=torch.rand(shape),
        mean_logits=torch.randn(shape),
        is_top1=torch.rand(shape) > 0.4,
    )


def test_metrics():
    chosen, rejected = torch.tensor([1.0, 2.0, 3.0, -1.0, 0.0, 0.5]), torch.tensor([1.0, 1.0, 4.0, -2.0, 1.0, 0.0])
    policy_w, policy_l, *_ = (x.float().requires_grad_() for x in token_logps())
    w, l = statistics((B, S_W), 1), statistics((B, S_L), 2)  # noqa: E741
    metrics = preference.preference_metrics(
        *(chosen, rejected),
        chosen_logps=policy_w,
        rejected_logps=policy_l,
        chosen_statistics=w,
        rejected_statistics=l,
        **MASKS,
    )
    on_w, on_l = CHOSEN_MASK != 0, REJECTED_MASK != 0
    expected = {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "rewards/accuracies": torch.tensor(3 / 6),  # equal rewards are not a win
        "logps/chosen": (policy_w * CHOSEN_MASK).sum(-1).mean(),
        "logps/rejected": (policy_l * REJECTED_MASK).sum(-1).mean(),
        "logits/chosen": w.mean_logits[on_w].mean(),
        "logits/rejected": l.mean_logits[on_l].mean(),
        "entropy": torch.cat([w.entropy[on_w], l.entropy[on_l]]).mean(),
        "mean_token_accuracy": w.is_top1[on_w].float().mean(),
        "nll_loss": -w.log_probs[on_w].mean(),
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value.detach(), msg=name)
        assert not metrics[name].requires_grad
    entropies = TokenStatistics(entropy=w.entropy), TokenStatistics(entropy=l.entropy)
    bare = preference.preference_metrics(
        chosen[:1], rejected[:1], chosen_statistics=entropies[0], rejected_statistics=entropies[1]
    )
    assert bare.keys() == {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "entropy"}
    torch.testing.assert_close(bare["entropy"], torch.cat([w.entropy.flatten(), l.entropy.flatten()]).mean())
    unpaired = preference.preference_metrics(chosen, rejected[:2])
    assert unpaired.keys() == {"rewards/chosen", "rewards/rejected", "rewards/margins"}
    assert preference.preference_metrics(chosen, rejected[:0]).keys() == {"rewards/chosen"}
    assert preference.preference_metrics(chosen[:0], rejected).keys() == {"rewards/rejected"}
    assert preference.preference_metrics(chosen[:0], rejected[:0]) == {}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("modifier", ["plain", "ld", "rpo"])
def test_what_a_mask_hides_reaches_nothing(modifier, bad):
    masks = (CHOSEN_MASK, REJECTED_MASK) * 2
    clean, dirty = token_logps(), [x.masked_fill(m == 0, bad) for x, m in zip(token_logps(), masks, strict=True)]
    for case in ("sigmoid", "ipo_norm", "sigmoid_norm", "sft", "discopop"):
        options = {**LOSS_TYPES[case], **MODIFIERS[modifier], **MASKS}
        for a, b in zip(*(run(preference, "dpo_loss", x, torch.float32, options) for x in (clean, dirty)), strict=True):
            assert torch.equal(a, b)
    for name, options in (("cpo_loss", CPO["simpo"]), ("orpo_loss", {"nll_loss": torch.tensor(0.5)})):
        options = {**options, **MASKS}
        for a, b in zip(*(run(preference, name, x[:2], torch.float32, options) for x in (clean, dirty)), strict=True):
            assert torch.equal(a, b)


def test_answers_without_tokens_move_nothing_and_are_never_nan():
    masks = {"chosen_mask": CHOSEN_MASK.clone(), "rejected_mask": REJECTED_MASK.clone()}
    masks["chosen_mask"][1] = masks["rejected_mask"][1] = masks["chosen_mask"][2] = 0
    for case, options in LOSS_TYPES.items():
        outputs = run(preference, "dpo_loss", token_logps(), torch.float32, {**options, **masks, "rpo_alpha": 0.5})
        assert all(x.isfinite().all() for x in outputs), case
        assert (outputs[1][1:3] == 0).all(), case
        assert (outputs[2][1] == 0).all(), case
    for name, options in (("cpo_loss", CPO["simpo"]), ("orpo_loss", {"nll_loss": torch.tensor(0.5)})):
        outputs = run(preference, name, token_logps()[:2], torch.float32, {**options, **masks})
        assert all(x.isfinite().all() for x in outputs), name
    nothing = {name: torch.zeros_like(mask) for name, mask in MASKS.items()}
    assert preference.dpo_loss(*token_logps(), loss_type="sft", **nothing)[0] == 0
    nothing["chosen_mask"][0, 0] = 1
    assert preference.dpo_loss(*token_logps(), loss_type="sft", **nothing)[0] == -token_logps()[0][0, 0]
    assert preference.dpo_loss(*sums(), loss_type="sft", nll_loss=torch.tensor(0.75))[0] == 0.75


@pytest.mark.parametrize("tau", [0.05, 0.7, 1.0])
def test_discopop_of_large_margins(tau):
    policy = torch.tensor([-300.0, -100.0, -85.0, -10.0, 0.0, 10.0, 300.0])
    zero, results = torch.zeros_like(policy), []
    for module, dtype in ((preference, torch.float32), (reference, torch.float64)):
        x, y = policy.to(dtype).requires_grad_(), zero.to(dtype)
        options = {"loss_type": "discopop", "beta": 1.0, "discopop_tau": tau, "reduction": "none"}
        loss = module.dpo_loss(x, y, y, y, **options)[0]
        results.append((loss.detach().double(), torch.autograd.grad(loss.sum(), x)[0].double()))
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_type", ["sigmoid", "aot", "aot_unpaired"])
def test_an_impossible_rejected_answer_costs_nothing(loss_type):
    chosen, rejected = torch.tensor([-1.0], requires_grad=True), torch.tensor([-torch.inf], requires_grad=True)
    zero = torch.zeros(1)
    loss, *_ = preference.dpo_loss(chosen, rejected, zero, zero, loss_type=loss_type)
    gradients = torch.autograd.grad(loss, (chosen, rejected))
    assert loss == 0
    assert not torch.cat(gradients).any()
    assert preference.cpo_loss(chosen, rejected, cpo_alpha=0.0)[0] == 0


@pytest.mark.parametrize("case", LOSS_TYPES)
def test_large_ratios_stay_finite(case):
    policy = torch.tensor([-3000.0, -1.0, -0.5])
    leaves = [x.requires_grad_() for x in (policy, policy.flip(0).clone())]
    zero = torch.full((3,), -2.0)
    lengths = {"chosen_lengths": torch.tensor([3, 1, 2]), "rejected_lengths": torch.tensor([1, 2, 3])}
    options = {k: v for k, v in LOSS_TYPES[case].items() if k != "remember"}
    loss, *_ = preference.dpo_loss(*leaves, zero, zero, **options, **lengths, reduction="none")
    grads = torch.autograd.grad(loss.sum(), leaves, allow_unused=True, materialize_grads=True)
    assert all(x.isfinite().all() for x in (loss, *grads))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_fp32(dtype):
    low, low_sums = ([x.to(dtype) for x in logps] for logps in (token_logps(), sums()))
    for (case, options), (logps, counts) in itertools.product(LOSS_TYPES.items(), ((low, MASKS), (low_sums, LENGTHS))):
        options = {k: v for k, v in options.items() if k != "remember"} | counts
        ours, fp32 = preference.dpo_loss(*logps, **options), preference.dpo_loss(*(x.float() for x in logps), **options)
        assert all(torch.equal(a, b) for a, b in zip(ours, fp32, strict=True)), case
        assert all(x.dtype == torch.float32 for x in ours)
    weighted = preference.dpo_loss(*low, **MASKS, weight=PAIR_WEIGHT, **MODIFIERS["aux"], **MODIFIERS["ld"])
    assert weighted[0].dtype == torch.float32
    # Positions are counted exactly beyond the 256th token, and the default counts every token.
    long, short = torch.full((1, 600), -1 / 64, dtype=dtype), torch.full((1, 300), -1 / 64, dtype=dtype)
    _, chosen, _ = preference.dpo_loss(long, short, long * 0, short * 0, ld_alpha=0.5, beta=64)
    assert chosen == -(300 + 0.5 * 300)
    kto = [x.to(dtype) for x in kto_inputs()]
    assert torch.equal(preference.kto_loss(*kto)[0], preference.kto_loss(*(x.float() for x in kto))[0])


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.lists(st.tuples(*[st.floats(-50, 0)] * 4), min_size=1, max_size=6), st.floats(0.01, 2), st.floats(0, 0.45))
def test_properties(pairs, beta, e):
    logps = [torch.tensor(x, dtype=torch.float64) for x in zip(*pairs, strict=True)]
    swapped = [logps[1], logps[0], logps[3], logps[2]]
    options = {"beta": beta, "reduction": "none"}
    smoothed = preference.dpo_loss(*logps, **options, label_smoothing=e)[0]
    plain, flipped = preference.dpo_loss(*logps, **options)[0], preference.dpo_loss(*swapped, **options)[0]
    torch.testing.assert_close(smoothed, (1 - e) * plain + e * flipped)
    robust = [preference.dpo_loss(*x, **options, loss_type="robust", label_smoothing=e)[0] for x in (logps, swapped)]
    torch.testing.assert_close((1 - e) * robust[0] + e * robust[1], plain, rtol=1e-6, atol=1e-9)
    if e > 0:
        exo = preference.dpo_loss(*logps, **options, loss_type="exo_pair", label_smoothing=e)[0]
        assert (exo >= -1e-12).all(), "a KL divergence"
    order = torch.randperm(len(pairs))
    for name in ("aot", "aot_unpaired", "sigmoid"):
        shuffled = preference.dpo_loss(*(x[order] for x in logps), beta=beta, loss_type=name)[0]
        torch.testing.assert_close(shuffled, preference.dpo_loss(*logps, beta=beta, loss_type=name)[0])


COMPILED = {
    "every loss type": lambda *x: preference.dpo_loss(
        *x, loss_type=sorted(preference.LOSS_TYPES), label_smoothing=0.1, rpo_alpha=0.5, ld_alpha=0.5, **MASKS
    ),
    "mapped": lambda *x: preference.dpo_loss(*x, f_divergence_type="alpha_divergence", weight=PAIR_WEIGHT, **MASKS),
    "simpo": lambda *x: preference.simpo_loss(*x[:2], alpha=0.1, **MASKS),
    "orpo": lambda *x: preference.orpo_loss(*x[:2], -x[0].mean(), **MASKS),
    "kto": lambda *x: preference.kto_loss(*(y.sum(-1) for y in (*x[:2], x[0], *x[2:], x[2]))),
    "vanilla kto": lambda *x: preference.vanilla_kto_loss(*(y.sum(-1) for y in x)),
    "bco": lambda *x: preference.bco_loss(*(y.sum(-1) for y in x)),
    "wpo": lambda *x: preference.wpo_weight(*x, **MASKS),
    "metrics": lambda *x: preference.preference_metrics(*(y.sum(-1) for y in x[:2]), chosen_logps=x[0], **MASKS),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_without_a_graph_break(name):
    inputs = [x.requires_grad_() for x in token_logps()]
    compiled, plain = torch.compile(COMPILED[name], fullgraph=True, backend="aot_eager"), COMPILED[name]
    ours, expected = compiled(*inputs), plain(*inputs)
    torch.testing.assert_close(ours, expected)
    if isinstance(ours, tuple):
        gradients = [torch.autograd.grad(outputs[0], inputs[0])[0] for outputs in (ours, expected)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", COMPILED)
def test_waits_for_no_device(name):
    """A fake tensor has no value to branch on or to bring to the host; compiled code may bring one since torch 2.13."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        COMPILED[name](*map(mode.from_tensor, token_logps()))


def test_the_running_mean_compiles():
    delta, same = preference.RunningMean(), preference.RunningMean()
    compiled = torch.compile(preference.bco_loss, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        ours = compiled(*kto_pairs(), running_mean=delta)
        torch.testing.assert_close(ours, preference.bco_loss(*kto_pairs(), running_mean=same))
    assert ours[3] != 0


def test_inputs_are_unmutated_and_strides_do_not_matter():
    before = token_logps()
    inputs = [x.clone() for x in before]
    expected = preference.dpo_loss(*inputs, **MASKS, ld_alpha=0.5, rpo_alpha=1.0)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    strided = [x.t().contiguous().t() for x in inputs]
    assert torch.equal(preference.dpo_loss(*strided, **MASKS, ld_alpha=0.5, rpo_alpha=1.0)[0], expected[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "dpo"}, "sigmoid_norm"),
        ({"loss_type": ["sigmoid", "hinge"], "loss_weights": [1.0]}, "one number per loss type"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "no effect on hinge"),
        ({"loss_type": "exo_pair"}, r"\(0, 1\), got 0"),
        ({"loss_type": "exo_pair", "label_smoothing": 1.0}, r"\(0, 1\), got 1.0"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, r"\[0, 0.5\), got 0.5"),
        ({"loss_type": "ipo_norm"}, "chosen_lengths"),
        ({"loss_type": "sft"}, "chosen_lengths"),
        ({"rpo_alpha": 1.0}, "nll_loss"),
        ({"ld_alpha": 0.5}, r"\(6,\)"),
        ({"f_divergence_type": "kl"}, "'kl'"),
        ({"f_divergence_type": "forward_kl", "loss_type": ["sigmoid", "nca_pair"]}, "nca_pair"),
        ({"reduction": "avg"}, "avg is not a valid value for reduction"),
        ({"label_smoothing": 2.0}, "between 0 and 1, got 2.0"),
        ({"label_smoothing": [0.0, -1.0], "loss_type": ["hinge", "aot"]}, "between 0 and 1, got -1.0"),
        ({"loss_type": []}, r"one loss type or more, got \[\]"),
        *(({"beta": b, "loss_type": t}, f"divides by beta.* got {b}") for b in (0, -1) for t in ("ipo", "sppo_hard")),
        ({"beta": 0, "loss_type": "ipo_norm", **LENGTHS}, "divides by beta.* got 0"),
        ({"running_mean": preference.RunningMean()}, "running_mean has no effect on sigmoid"),
        ({"nll_loss": torch.tensor(1.0)}, "nll_loss has no effect on sigmoid without rpo_alpha"),
        ({"reference_rejected_logps": None}, "both sides"),
        ({"reference_rejected_logps": None, "reference_free": True}, "both sides"),
    ],
)
def test_errors_say_what_to_do(options, message):
    with pytest.raises(ValueError, match=message):
        preference.dpo_loss(**dict(zip(NAMES, sums(), strict=True)) | options)


def test_errors_of_the_others():
    policy_w, policy_l, *_ = sums()
    with pytest.raises(ValueError, match="reference_free"):
        preference.dpo_loss(policy_w, policy_l)
    with pytest.raises(ValueError, match=r"\(6,\) and \(5,\)"):
        preference.dpo_loss(policy_w, policy_l[1:], reference_free=True)
    with pytest.raises(ValueError, match="'sppo'"):
        preference.cpo_loss(policy_w, policy_l, loss_type="sppo")
    with pytest.raises(ValueError, match="no effect on ipo"):
        preference.cpo_loss(policy_w, policy_l, loss_type="ipo", label_smoothing=0.1)
    with pytest.raises(ValueError, match="between 0 and 1, got 5"):
        preference.cpo_loss(policy_w, policy_l, label_smoothing=5, cpo_alpha=0)
    with pytest.raises(ValueError, match="divides by beta"):
        preference.cpo_loss(policy_w, policy_l, beta=0, loss_type="ipo", **LENGTHS)
    with pytest.raises(ValueError, match="chosen_lengths"):
        preference.simpo_loss(policy_w, policy_l)
    for policy_kl, reference_kl in ((None, None), (policy_w, None), (None, policy_w)):
        with pytest.raises(ValueError, match="policy_KL_logps"):
            preference.kto_loss(policy_w, policy_l, policy_kl, policy_w, policy_l, reference_kl)
    with pytest.raises(ValueError, match="'bco'"):
        preference.kto_loss(policy_w, policy_l, None, policy_w, policy_l, None, loss_type="bco")


TOKENS = torch.zeros(3, 5)
SUMS = torch.zeros(3)
COUNTS = torch.tensor([5, 2, 3])
SHOWN = torch.arange(5) < COUNTS[:, None]
PAIR_LOSSES = {
    "dpo": lambda w, x, **o: preference.dpo_loss(w, x, SUMS, SUMS, loss_type="ipo_norm", **o),
    "cpo": preference.cpo_loss,
    "simpo": preference.simpo_loss,
    "orpo": lambda w, x, **o: preference.orpo_loss(w, x, torch.tensor(0.0), **o),
}


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_a_mask_goes_with_tokens_and_lengths_with_sums(name):
    loss = PAIR_LOSSES[name]
    both_counts, both_masks = (
        {f"{side}_{what}": x for side in ("chosen", "rejected")} for what, x in (("lengths", COUNTS), ("mask", SHOWN))
    )
    loss(SUMS, SUMS, **both_counts)
    loss(TOKENS, TOKENS, **both_masks)
    for side in ("chosen", "rejected"):
        with pytest.raises(ValueError, match=rf"{side}_lengths \(3,\) .* \(3, 5\): pass {side}_mask"):
            loss(TOKENS, TOKENS, **both_masks, **{f"{side}_lengths": COUNTS})
        with pytest.raises(ValueError, match=rf"{side}_mask \(3, 5\) .* \(3,\): pass them per token"):
            loss(SUMS, SUMS, **both_counts, **{f"{side}_mask": SHOWN})
        with pytest.raises(ValueError, match=rf"{side}_lengths must have one shape, got .*\(3, 1\)"):
            loss(SUMS, SUMS, **both_counts | {f"{side}_lengths": COUNTS[:, None]})
        with pytest.raises(ValueError, match=rf"{side}_mask must have one shape, got .*\(3, 4\)"):
            loss(TOKENS, TOKENS, **both_masks | {f"{side}_mask": SHOWN[:, 1:]})


def test_a_mask_serves_a_reference_per_token():
    masks = {"chosen_mask": SHOWN, "rejected_mask": SHOWN}
    reference_tokens = torch.randn(3, 5)
    ours = preference.dpo_loss(SUMS, SUMS, reference_tokens, TOKENS, **masks)
    summed = preference.dpo_loss(SUMS, SUMS, (reference_tokens * SHOWN).sum(1), SUMS)
    torch.testing.assert_close(ours, summed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"reference_chosen_logps": SUMS[:1]},
            r"policy_chosen_logps and reference_chosen_logps must have one shape, got \(3,\) and \(1,\)",
        ),
        (
            {"policy_rejected_logps": TOKENS, "reference_rejected_logps": SUMS[:, None]},
            r"policy_rejected_logps and reference_rejected_logps must have one shape, got \(3, 5\) and \(3, 1\)",
        ),
        ({"reference_chosen_logps": SUMS[0]}, r"got \(3,\) and \(\)"),
        ({"reference_chosen_logps": TOKENS[:2]}, r"\(B, S\) per token, got \(3,\) and \(2, 5\)"),
        ({"weight": COUNTS[:, None]}, r"losses and weight must have one shape, got \(3,\) and \(3, 1\)"),
        ({"weight": COUNTS[:1]}, r"losses and weight must have one shape, got \(3,\) and \(1,\)"),
        ({"aux_loss": SUMS[:, None]}, r"aux_loss must be a scalar, .* \(3, 1\)"),
        ({"nll_loss": SUMS[:, None], "rpo_alpha": 1.0}, r"nll_loss must be a scalar, .* \(3, 1\)"),
        ({"beta": SUMS[:, None]}, r"beta must be a scalar, .* \(3, 1\)"),
        ({"beta": SUMS[:1, None]}, r"beta must be a scalar, .* \(1, 1\)"),
    ],
)
def test_nothing_broadcasts(change, message):
    arguments = dict.fromkeys(NAMES, SUMS) | change
    with pytest.raises(ValueError, match=message):
        preference.dpo_loss(**arguments)


@pytest.mark.parametrize("name", ["cpo_loss", "simpo_loss", "orpo_loss", "kto_loss", "vanilla_kto_loss", "bco_loss"])
def test_scalars_do_not_broadcast(name):
    loss = getattr(preference, name)
    sums = {"cpo_loss": 2, "simpo_loss": 2, "orpo_loss": 2, "kto_loss": 6}.get(name, 4)
    options = {"chosen_lengths": COUNTS, "rejected_lengths": COUNTS} if sums == 2 else {}
    options |= {"nll_loss": torch.tensor(0.0)} if name == "orpo_loss" else {}
    loss(*[SUMS] * sums, beta=torch.tensor([0.1]), **options)
    for scalar in ("beta", "nll_loss") if sums == 2 else ("beta",):
        with pytest.raises(ValueError, match=rf"{scalar} must be a scalar, .* \(3, 1\)"):
            loss(*[SUMS] * sums, **options | {scalar: SUMS[:, None]})


def test_unpaired_answers_come_summed():
    losses = {
        "kto": lambda w, x, ref_w, ref_l: preference.kto_loss(w, x, SUMS, ref_w, ref_l, SUMS),
        "kl": lambda w, _, ref_w, ref_l: preference.kto_loss(SUMS, SUMS, w, SUMS, SUMS, ref_w),
        "vanilla": preference.vanilla_kto_loss,
        "bco": preference.bco_loss,
    }
    for loss in losses.values():
        loss(SUMS, SUMS[:2], SUMS, SUMS[:2])
        for policy, ref in ((TOKENS, TOKENS), (SUMS, SUMS[:, None]), (SUMS, SUMS[:1]), (SUMS[:, None], SUMS[:, None])):
            message = re.escape(f"token_logps, mask) makes, got {tuple(policy.shape)} and {tuple(ref.shape)}")
            with pytest.raises(ValueError, match=message):
                loss(policy, SUMS, ref, SUMS)
    del losses["kl"]
    for loss in losses.values():
        with pytest.raises(TypeError, match="reference must be a tensor, got None"):
            loss(SUMS, SUMS, None, SUMS)
        with pytest.raises(TypeError, match="policy must be a tensor, got tuple: unpack it"):
            loss((SUMS, SUMS), SUMS, SUMS, SUMS)


def test_what_is_no_log_probability_is_refused():
    for logits in (torch.zeros(3, 5, 7), LinearLogits(torch.zeros(3, 5, 2), torch.zeros(7, 2))):
        with pytest.raises((TypeError, ValueError), match=r"\(3, 5, 7\).*: (of logits, )?pass selective_log_softmax"):
            preference.dpo_loss(logits, logits, TOKENS, TOKENS)
    with pytest.raises(TypeError, match="chosen must be a tensor, got tuple: unpack it"):
        preference.dpo_loss((SUMS, SUMS), SUMS, SUMS, SUMS)


def test_wpo_weight_does_not_broadcast():
    with pytest.raises(ValueError, match=r"logps and log_sum_sq_probs must have one shape, got \(3, 5\) and \(3, 1\)"):
        preference.wpo_weight(TOKENS, TOKENS, TOKENS[:, :1], TOKENS)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_beta_may_be_a_tensor(loss_type):
    """Such as a schedule's: its value is not read on the host, under ``torch.compile`` either."""
    chosen, rejected = -torch.rand(2, 4)

    def loss(beta):
        return preference.dpo_loss(chosen, rejected, reference_free=True, beta=beta, loss_type=loss_type)[0].sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(torch.tensor(0.3)), loss(0.3))
