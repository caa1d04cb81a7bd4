"""Values and gradients of every KL estimator, clamp and straight-through variant against the float64 reference."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_losses import kl
from fused_losses.reference import kl as reference
from fused_losses.reference.tolerance import assert_accurate

KINDS = ("k1", "k2", "k3", "abs")
# Every kind saturates at ±10 somewhere (k3 below d = −2.6), and exp(log_probs − old) passes 10 somewhere.
POLICY = torch.tensor([[-1.0, -3.25, -0.5, -9.0, -0.125], [-2.0, -16.0, -0.25, -30.0, -4.0]])
REFERENCE = torch.tensor([[-1.5, -2.0, -0.5001, -2.0, -15.0], [-2.25, -3.0, -5.0, -4.0, -3.5]])
OLD = torch.tensor([[-1.25, -3.0, -4.0, -9.5, -0.25], [-1.0, -15.0, -0.5, -31.0, -7.0]])
MASK = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 1, 1, 1]])
VARIANTS = {
    "plain": {},
    "clamped": {"clamp": 10.0},
    "masked": {"mask": MASK},
    "straight through": {"gradient": "k2"},
    "straight through, clamped": {"gradient": "k2", "clamp": 10.0},
    "weighted": {"gradient": "k2", "clamp": 10.0, "old_log_probs": OLD},
    "weighted, masked": {"gradient": "k2", "old_log_probs": OLD, "mask": MASK},
}


def run(function, dtype, kind, upstream=1.0, **options):
    options = {k: v.to(dtype) if k == "old_log_probs" else v for k, v in options.items()}
    policy, ref = (x.to(dtype).requires_grad_() for x in (POLICY, REFERENCE))
    value = function(policy, ref, kind, **options)
    return value, *torch.autograd.grad((value * upstream).sum(), (policy, ref))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_estimates_equal_the_reference(kind, variant):
    options = VARIANTS[variant]
    exact = run(reference.kl_estimate, torch.float64, kind, 3.0, **options)
    eager = run(reference.kl_estimate, torch.float32, kind, 3.0, **options)
    ours = run(kl.kl_estimate, torch.float32, kind, 3.0, **options)
    for name, *tensors in zip(("value", "d_log_probs", "d_ref"), ours, eager, exact, strict=True):
        assert_accurate(*tensors, name)
    torch.testing.assert_close(run(kl.kl_estimate, torch.float64, kind, 3.0, **options), exact)


def test_no_two_configurations_agree():
    results = {
        (kind, name): torch.stack(run(kl.kl_estimate, torch.float64, kind, **options))
        for kind, (name, options) in itertools.product(KINDS, VARIANTS.items())
    }
    same = {("k2", "plain"): ("k2", "straight through")}  # k2's straight-through gradient is its own
    for a, b in itertools.combinations(results, 2):
        if same.get(a) != b:
            assert not torch.allclose(results[a], results[b]), f"{a} and {b} give the same numbers"


@pytest.mark.parametrize("kind", KINDS)
def test_the_clamp_bounds_value_and_gradient_and_survives_overflow(kind):
    policy = torch.tensor([-2000.0, -1.0, -0.5], requires_grad=True)
    ref = torch.tensor([-0.5, -1.5, -2000.0])
    value = kl.kl_estimate(policy, ref, kind, clamp=10)
    (grad,) = torch.autograd.grad(value.sum(), policy)
    assert value.abs().max() == 10
    assert grad[0] == grad[2] == 0
    assert grad[1] != 0
    unclamped = kl.kl_estimate(policy, ref, kind)
    assert unclamped.abs().max() > 100
    assert kl.kl_estimate(policy, ref, kind, clamp=100)[0].abs() == 100


def test_straight_through_value_is_exactly_the_estimate():
    policy, ref = torch.randn(1000) * 4, torch.randn(1000) * 4
    assert torch.equal(kl.kl_estimate(policy, ref, gradient="k2"), kl.kl_estimate(policy, ref))


def test_importance_weight_is_capped_and_detached():
    policy = torch.zeros(2, requires_grad=True)
    ref = torch.full((2,), -1.0)
    old = torch.tensor([-1.0, -5.0])
    value = kl.kl_estimate(policy, ref, "k1", gradient="k2", old_log_probs=old)
    (grad,) = torch.autograd.grad(value.sum(), policy)
    torch.testing.assert_close(grad, torch.tensor([torch.e, 10.0]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e30])
@pytest.mark.parametrize("variant", ["masked", "weighted, masked"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_mask_hides_reaches_nothing(kind, variant, bad):
    clean = run(kl.kl_estimate, torch.float32, kind, **VARIANTS[variant])
    policy, ref = (x.masked_fill(MASK == 0, bad).requires_grad_() for x in (POLICY, REFERENCE))
    options = dict(VARIANTS[variant])
    if "old_log_probs" in options:
        options["old_log_probs"] = OLD.masked_fill(MASK == 0, bad)
    value = kl.kl_estimate(policy, ref, kind, **options)
    dirty = value, *torch.autograd.grad(value.sum(), (policy, ref))
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("mode", ["biased", "unbiased"])
def test_penalties_equal_the_reference(mode, mask):
    def penalty(module, dtype):
        policy, ref = (x.clamp(min=-4).to(dtype).requires_grad_() for x in (POLICY, REFERENCE))
        value = module.kl_penalty(policy, ref, mode, mask)
        return value, *torch.autograd.grad(value, (policy, ref))

    exact, eager, ours = (
        penalty(reference, torch.float64),
        penalty(reference, torch.float32),
        penalty(kl, torch.float32),
    )
    for name, *tensors in zip(("value", "d_log_probs", "d_ref"), ours, eager, exact, strict=True):
        assert_accurate(*tensors, name)
    by_name = {"biased": kl.kl_biased, "unbiased": kl.kl_unbiased}[mode]
    assert torch.equal(ours[0], by_name(POLICY.clamp(min=-4), REFERENCE.clamp(min=-4), mask))


def test_penalties_and_k3_differ_and_masks_matter():
    x, y = POLICY.clamp(min=-4), REFERENCE.clamp(min=-4)
    numbers = [kl.kl_penalty(x, y, m, mask) for m in ("biased", "unbiased") for mask in (None, MASK)]
    numbers += [kl.kl_estimate(x, y).mean(), kl.kl_penalty(y, x, "unbiased", MASK)]
    for a, b in itertools.combinations(numbers, 2):
        assert not torch.allclose(a, b)


def test_nothing_unmasked_is_zero_with_zero_gradient():
    policy = torch.full((2, 3), float("nan"), requires_grad=True)
    for mode in ("biased", "unbiased"):
        value = kl.kl_penalty(policy, torch.zeros(2, 3), mode, torch.zeros(2, 3))
        assert value == 0
        assert (torch.autograd.grad(value, policy)[0] == 0).all()


def test_estimates_are_unbiased_in_expectation():
    # Exact expectation over a small vocabulary in place of sampling.
    policy, ref = torch.randn(2, 7, dtype=torch.float64).log_softmax(-1)
    true_kl = (policy.exp() * (policy - ref)).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((policy.exp() * kl.kl_estimate(policy, ref, kind)).sum(), true_kl)
    assert (policy.exp() * kl.kl_estimate(policy, ref, "k2")).sum() != true_kl
    # The straight-through gradient's expectation is the gradient of the true KL.
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    logp = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)
    estimate = kl.kl_estimate(logp, ref, "k3", gradient="k2")
    (expected,) = torch.autograd.grad((logp.exp().detach() * estimate).sum(), logits, retain_graph=True)
    torch.testing.assert_close(expected, exact)
    (own,) = torch.autograd.grad((logp.exp().detach() * kl.kl_estimate(logp, ref, "k3")).sum(), logits)
    assert not torch.allclose(own, exact)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.floats(-20, 0), st.floats(-20, 0))
def test_k3_is_never_negative_and_keeps_its_digits(policy, ref):
    policy, ref = torch.tensor([policy]), torch.tensor([ref])
    value = kl.kl_estimate(policy, ref)
    assert value >= 0
    near = kl.kl_estimate(ref + 1e-3, ref)
    exact = torch.expm1(-((ref + 1e-3).double() - ref)) + ((ref + 1e-3).double() - ref)
    torch.testing.assert_close(near, exact.float(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_fp32(dtype):
    low = kl.kl_estimate(POLICY.to(dtype), REFERENCE.to(dtype))
    assert low.dtype == torch.float32
    assert torch.equal(low, kl.kl_estimate(POLICY.to(dtype).float(), REFERENCE.to(dtype).float()))


@pytest.mark.parametrize("variant", ["clamped", "weighted, masked"])
def test_compiles_without_a_graph_break(variant):
    def estimate(policy, ref):
        return kl.kl_estimate(policy, ref, "k3", **VARIANTS[variant])

    compiled = torch.compile(estimate, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(POLICY, REFERENCE), estimate(POLICY, REFERENCE))
    penalty = torch.compile(kl.kl_penalty, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(penalty(POLICY, REFERENCE, mask=MASK), kl.kl_penalty(POLICY, REFERENCE, mask=MASK))


def test_inputs_are_unmutated_and_strides_do_not_matter():
    policy, ref = POLICY.clone(), REFERENCE.clone()
    value = kl.kl_estimate(policy, ref, clamp=10, mask=MASK)
    assert torch.equal(policy, POLICY)
    assert torch.equal(ref, REFERENCE)
    strided = kl.kl_estimate(POLICY.t().contiguous().t(), REFERENCE, clamp=10, mask=MASK)
    assert torch.equal(strided, value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "k4"}, "k1, k2, k3, abs"),
        ({"gradient": "k3"}, "gradient must be one of own, k2, got 'k3'"),
        ({"old_log_probs": OLD}, "gradient='k2'"),
        ({"ref_log_probs": REFERENCE[:, :1]}, r"must have one shape, got \(2, 5\) and \(2, 1\)"),
        ({"ref_log_probs": REFERENCE[0]}, r"must have one shape, got \(2, 5\) and \(5,\)"),
        ({"mask": MASK[:, :1]}, r"and mask must have one shape, got .*\(2, 1\)"),
        ({"old_log_probs": OLD[:1], "gradient": "k2"}, r"and old_log_probs must have one shape, got .*\(1, 5\)"),
    ],
)
def test_errors_say_what_to_do(options, message):
    with pytest.raises(ValueError, match=message):
        kl.kl_estimate(POLICY, **{"ref_log_probs": REFERENCE, **options})
    for mean in (kl.kl_biased, kl.kl_unbiased, kl.kl_penalty):
        with pytest.raises(ValueError, match="must have one shape"):
            mean(POLICY, REFERENCE[:, :1])
        with pytest.raises(ValueError, match="must have one shape"):
            mean(POLICY, REFERENCE, mask=MASK[:1])
    with pytest.raises(ValueError, match="mode must be one of unbiased, biased, got 'k3'"):
        kl.kl_penalty(POLICY, REFERENCE, mode="k3")
