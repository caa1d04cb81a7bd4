"""Reward-model losses against loops over pairs and tokens."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_losses import reward
from fused_losses.linear_logits import LinearLogits
from fused_losses.reference import reward as reference
from fused_losses.reference.tolerance import assert_accurate
from fused_losses.settings import strict

NAN = float("nan")


def value_and_grads(f, *inputs):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    loss = f(*inputs)
    (3 * loss).backward()
    return loss.detach(), [x.grad / 3 for x in inputs]


OPTIONS = [
    {},
    {"margin": 0.7},
    {"margin": torch.tensor([0.3, -0.2, 1.0, 0.0, 2.0], dtype=torch.float64)},
    {"center_rewards_coefficient": 0.1},
    {"margin": torch.tensor(0.5), "center_rewards_coefficient": 0.01},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_pairwise_reward_loss(options):
    chosen, rejected = torch.randn(2, 5, dtype=torch.float64) * 3
    ours = value_and_grads(lambda c, r: reward.pairwise_reward_loss(c, r, **options), chosen, rejected)
    expected = value_and_grads(lambda c, r: reference.pairwise_reward_loss(c, r, **options), chosen, rejected)
    torch.testing.assert_close(ours, expected)


def test_pairwise_options_change_the_number():
    chosen, rejected = torch.randn(2, 5, dtype=torch.float64)
    assert len({reward.pairwise_reward_loss(chosen, rejected, **options).item() for options in OPTIONS}) == len(OPTIONS)


def test_log_exp_loss_ignores_its_margin():
    chosen, rejected = torch.randn(2, 5, dtype=torch.float64) * 3
    expected = value_and_grads(reference.log_exp_loss, chosen, rejected)
    torch.testing.assert_close(value_and_grads(reward.log_exp_loss, chosen, rejected), expected)
    torch.testing.assert_close(value_and_grads(lambda c, r: reward.log_exp_loss(c, r, 5.0), chosen, rejected), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_pairwise_is_computed_in_fp32(dtype):
    chosen, rejected = ((torch.randn(2, 64) * 4).to(dtype)).unbind()
    margin = torch.rand(64).to(dtype)

    def loss(c, r, m, kind):
        c, r, m = c.to(kind), r.to(kind), m.to(kind)
        return -torch.nn.functional.logsigmoid(c - r - m).mean() + 0.1 * (c + r).square().mean()

    ours = value_and_grads(
        lambda c, r: reward.pairwise_reward_loss(c, r, margin, center_rewards_coefficient=0.1), chosen, rejected
    )
    eager = value_and_grads(lambda c, r: loss(c, r, margin, torch.float32), chosen, rejected)
    exact = value_and_grads(lambda c, r: loss(c, r, margin, torch.float64), chosen.double(), rejected.double())
    assert_accurate(ours[0], eager[0], exact[0])
    for g, e, x in zip(ours[1], eager[1], exact[1], strict=True):
        assert_accurate(g, e, x)


@pytest.mark.parametrize("loss", [reward.pairwise_reward_loss, reward.log_exp_loss])
def test_pairwise_far_apart_stays_finite(loss):
    value, (grad, _) = value_and_grads(loss, torch.tensor([-300.0, 300.0]), torch.tensor([300.0, -300.0]))
    assert value == 300.0
    assert grad.tolist() == [-0.5, 0.0]
    assert loss(torch.empty(0), torch.empty(0)).isnan()


def test_pairwise_refuses_what_would_broadcast():
    with pytest.raises(ValueError, match=r"\(3, 1\) and \(3,\)"):
        reward.pairwise_reward_loss(torch.zeros(3, 1), torch.zeros(3))
    with pytest.raises(ValueError, match=r"\(3, 1\) and \(3,\)"):
        reward.reward_metrics(torch.zeros(3, 1), torch.zeros(3))
    with pytest.raises(ValueError, match=r"margin .*\(3,\), got \(3, 1\)"):
        reward.pairwise_reward_loss(torch.zeros(3), torch.zeros(3), torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"margin .*\(3,\), got \(2,\)"):
        reward.pairwise_reward_loss(torch.zeros(3), torch.zeros(3), torch.zeros(2))


def test_reward_metrics():
    chosen = torch.tensor([1.0, 2.0, -1.0], requires_grad=True)
    metrics = reward.reward_metrics(chosen, torch.tensor([0.0, 2.0, 3.0], requires_grad=True))
    assert not any(m.requires_grad for m in metrics.values())
    assert {k: v.item() for k, v in metrics.items()} == pytest.approx(
        {"accuracy": 1 / 3, "margin": -1.0, "mean_reward": 7 / 6, "min_reward": -1.0, "max_reward": 3.0}
    )


PAD = 0


def row(left, prompt, answer, right):
    return [PAD] * left + prompt + answer + [PAD] * right


# A pair of (left pads, prompt, answer), padded on the right, and num_padding_at_beginning.
PAIRS = {
    "ragged": (((0, [5, 6], [1, 2, 3]), (0, [5, 6], [1, 4])), 0),
    "rejected longer": (((0, [5, 6], [1]), (0, [5, 6], [2, 4, 3, 3])), 0),
    "no pad": (((0, [5, 6], [1, 2, 3, 4, 1, 1]), (0, [5, 6], [1, 2, 3, 4, 1, 2])), 0),
    "one is the other's start": (((0, [5, 6], [1, 2]), (0, [5, 6], [1, 2, 3])), 0),
    "identical": (((0, [5, 6], [1, 2, 3]), (0, [5, 6], [1, 2, 3])), 0),
    "identical without pad": (((0, [5, 6], [1] * 6), (0, [5, 6], [1] * 6)), 0),
    "left padded by one": (((1, [5, 6], [1, 2]), (1, [5, 6], [3])), 1),
    "left padded by two": (((2, [5, 6], [1, 2]), (2, [5, 6], [3, 3, 3])), 2),
    "left padded, unequal": (((1, [6], [1, 2]), (2, [5, 6], [3, 3])), 1),
    "left padded, uncounted": (((1, [5, 6], [1, 2]), (1, [5, 6], [3])), 0),
    "left padded, identical": (((1, [5, 6], [1]), (1, [5, 6], [1])), 1),
}


def batch(names, S=8):
    sides = [[], []]
    for name in names:
        for side, (left, prompt, answer) in zip(sides, PAIRS[name][0], strict=True):
            side.append(row(left, prompt, answer, S - left - len(prompt) - len(answer)))
    return torch.tensor(sides[0] + sides[1])


def assert_equals_the_loop(ids, pads_in_front, rewards):
    kwargs = {"pad_id": PAD, "num_padding_at_beginning": pads_in_front}
    ours = value_and_grads(lambda r: reward.divergence_pairwise_loss(r, ids, **kwargs)["loss"], rewards)
    expected = value_and_grads(
        lambda r: reference.divergence_pairwise_loss(r, ids, **kwargs)["loss"] + 0 * r.sum(), rewards
    )
    torch.testing.assert_close(ours, expected, equal_nan=True)
    found = reward.divergence_pairwise_loss(rewards, ids, **kwargs)
    loop = reference.divergence_pairwise_loss(rewards, ids, **kwargs)
    assert found.keys() == loop.keys()
    for side in ("chosen_mean_scores", "rejected_mean_scores"):
        assert torch.equal(found[side], loop[side])
    return ours[1][0]


@pytest.mark.parametrize("name", PAIRS)
def test_divergence_pair(name):
    assert_equals_the_loop(batch([name]), PAIRS[name][1], torch.randn(2, 8, dtype=torch.float64))


@pytest.mark.parametrize("pads_in_front", [0, 1, 2])
def test_divergence_batch(pads_in_front):
    names = [name for name, (_, n) in PAIRS.items() if n == pads_in_front and name != "left padded, uncounted"]
    rewards = torch.randn(2 * len(names), 8, dtype=torch.float64)
    grad = assert_equals_the_loop(batch(names), pads_in_front, rewards)
    assert (grad != 0).any(-1).all()
    assert (grad == 0).any(-1).all()


@given(st.data())
@settings(deadline=None, max_examples=60, derandomize=True)
def test_divergence_of_any_ids(data):
    B, S = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 7))
    ids = torch.tensor(data.draw(st.lists(st.lists(st.integers(0, 2), min_size=S, max_size=S), min_size=B, max_size=B)))
    other = torch.tensor(
        data.draw(st.lists(st.lists(st.integers(0, 2), min_size=S, max_size=S), min_size=B, max_size=B))
    )
    other[:, 0] = ids[:, 0]
    rewards = torch.randn(2 * B, S, dtype=torch.float64)
    assert_equals_the_loop(torch.cat([ids, other]), data.draw(st.integers(0, 2)), rewards)


def test_divergence_a_pair_that_ends_before_it_diverges_is_nan_alone():
    ids = batch(["left padded, uncounted", "ragged"])
    ids[:, 0] = PAD
    rewards = torch.randn(4, 8, dtype=torch.float64)
    grad = assert_equals_the_loop(ids, 0, rewards)
    assert reward.divergence_pairwise_loss(rewards, ids, PAD)["loss"].isnan()
    assert not grad.isnan().any()


def test_divergence_hides_what_it_does_not_compare():
    ids = batch(["ragged", "identical"])
    rewards = torch.randn(4, 8)
    expected = value_and_grads(lambda r: reward.divergence_pairwise_loss(r, ids, PAD)["loss"], rewards)
    hidden = expected[1][0] == 0
    ours = value_and_grads(
        lambda r: reward.divergence_pairwise_loss(r, ids, PAD)["loss"], rewards.masked_fill(hidden, NAN)
    )
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1][0], expected[1][0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_divergence_in_fp32_or_as_deepspeed_without_it(dtype):
    ids = batch(["ragged", "rejected longer", "no pad"])
    rewards = (torch.randn(6, 8) * 3).to(dtype).requires_grad_()
    found = reward.divergence_pairwise_loss(rewards, ids, PAD)
    assert [name for name, x in found.items() if x.requires_grad] == ["loss"]
    eager = reference.divergence_pairwise_loss(rewards.float(), ids, PAD)
    exact = reference.divergence_pairwise_loss(rewards.double(), ids, PAD)
    assert_accurate(found["loss"], eager["loss"], exact["loss"])
    assert found["chosen_mean_scores"].dtype == dtype
    low = reward.divergence_pairwise_loss(rewards, ids, PAD, compute_fp32_loss=False)["loss"]
    assert low.dtype == dtype
    assert low.double() != found["loss"].double()
    torch.testing.assert_close(low.double(), exact["loss"], rtol=2e-2, atol=0)


def test_divergence_refuses():
    with pytest.raises(RuntimeError, match="column 0"):
        reward.divergence_pairwise_loss(torch.zeros(2, 3), torch.tensor([[1, 2, 3], [2, 2, 3]]), PAD)
    with pytest.raises(RuntimeError, match="column 0"):  # in the second pair
        reward.divergence_pairwise_loss(torch.zeros(4, 2), torch.tensor([[1, 2], [1, 2], [1, 3], [2, 2]]), PAD)
    with pytest.raises(ValueError, match=r"\(4,\) and \(4,\)"):
        reward.divergence_pairwise_loss(torch.zeros(4), torch.zeros(4), PAD)
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\)"):
        reward.divergence_pairwise_loss(torch.zeros(2, 3), torch.zeros(2, 4), PAD)
    with pytest.raises(ValueError, match=r"\(3, 3\)"):
        reward.divergence_pairwise_loss(torch.zeros(3, 3), torch.zeros(3, 3), PAD)


@pytest.mark.parametrize("prompt_length", [2, 3, 5, 7])
def test_end_scores(prompt_length):
    ids = torch.tensor([[0, 0, 1, 2, 0, 0, 3], [1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 0], [1, 0, 0, 0, 0, 0, 0]])
    values = torch.randn(4, 7, dtype=torch.float64)
    ours = value_and_grads(lambda v: (reward.end_scores(v, ids, PAD, prompt_length) ** 2).sum(), values)
    expected = value_and_grads(lambda v: (reference.end_scores(v, ids, PAD, prompt_length) ** 2).sum(), values)
    torch.testing.assert_close(ours, expected)


def test_end_scores_depend_on_the_prompt():
    ids, values = torch.tensor([[1, 2, 0, 4, 0, 6]]), torch.arange(6.0)[None]
    assert [reward.end_scores(values, ids, PAD, n).item() for n in (2, 3, 5)] == [1.0, 3.0, 5.0]
    assert reward.end_scores(values.bfloat16(), ids, PAD, 2).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="greater than 1, got 1"):
        reward.end_scores(values, ids, PAD, 1)
    with pytest.raises(ValueError, match=r"\(1, 6\) and \(1, 5\)"):
        reward.end_scores(values, ids[:, :5], PAD, 2)
    with pytest.raises(ValueError, match=r"\(6,\) and \(6,\)"):
        reward.end_scores(values[0], ids[0], PAD, 2)


PLACEHOLDER, V = 9, 12
INPUTS = torch.tensor([[9, 1, 9, 9, 2], [3, 9, 4, 5, 9], [9, 9, 6, 7, 8]])
KINDS = {
    "vocabulary": (None, torch.tensor([[3, 4, -100, 11, 1], [7, 0, 5, 5, 3], [2, -100, 1, 1, 1]])),
    "two ids": ([3, 7], torch.tensor([[3, 0, -100, 7, 0], [0, 7, 0, 0, 3], [3, -100, 0, 0, 0]])),
    "three ids": ([7, 3, 10], torch.tensor([[3, 0, 10, 7, 0], [0, 7, 0, 0, 10], [3, -100, 0, 0, 0]])),
    "soft": ([3, 7], torch.tensor([[0.9, 0.1, -100, 0.0, 0.3], [0.2, 0.75, 0.1, 0, 0.5], [1.0, -100, 0, 0, 0]])),
}


@pytest.mark.parametrize("kind", KINDS)
def test_prm_loss(kind):
    ids, labels = KINDS[kind]
    kwargs = {"placeholder_token_id": PLACEHOLDER, "reward_token_ids": ids}
    logits = torch.randn(3, 5, V, dtype=torch.float64)
    logits[0, 0, 3] += 9  # one of the predictions is right
    ours = value_and_grads(lambda z: reward.prm_loss(INPUTS, z, labels, **kwargs), logits)
    expected = value_and_grads(lambda z: reference.prm_loss(INPUTS, z, labels, **kwargs)[0], logits)
    torch.testing.assert_close(ours, expected)
    loss, accuracy = reward.prm_loss(INPUTS, logits, labels, **kwargs, return_acc=True)
    assert torch.equal(loss, ours[0])
    assert torch.equal(
        reward.prm_loss(INPUTS, logits, labels.masked_fill(labels == -100, -1), **kwargs, ignore_index=-1), loss
    )
    torch.testing.assert_close(accuracy, reference.prm_loss(INPUTS, logits, labels, **kwargs)[1])
    assert accuracy.item() not in (0.0, 1.0)
    # Only these columns of the placeholders that have a label are read.
    read = torch.zeros(3, 5, V, dtype=torch.bool)
    read[(INPUTS == PLACEHOLDER) & (labels != -100)] = True
    if ids is not None:
        read &= torch.isin(torch.arange(V), torch.tensor(ids))
    poisoned = value_and_grads(lambda z: reward.prm_loss(INPUTS, z, labels, **kwargs), logits.masked_fill(~read, NAN))
    assert torch.equal(poisoned[0], ours[0])
    assert torch.equal(poisoned[1][0], ours[1][0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_prm_projects_what_it_reads(kind, dtype):
    ids, labels = KINDS[kind]
    kwargs = {"placeholder_token_id": PLACEHOLDER, "reward_token_ids": ids}
    hidden, weight = torch.randn(3, 5, 16).to(dtype), torch.randn(V, 16).to(dtype)
    read = (INPUTS == PLACEHOLDER) & (labels != -100)
    rows = torch.ones(V, dtype=torch.bool) if ids is None else torch.isin(torch.arange(V), torch.tensor(ids))

    def losses(kind, logits, loss):
        h, w = hidden.to(kind), weight.to(kind)
        if logits is LinearLogits:  # parts that are not read may hold anything
            h, w = h.masked_fill(~read.unsqueeze(-1), NAN), w.masked_fill(~rows.unsqueeze(-1), NAN)
        h, w = h.requires_grad_(), w.requires_grad_()
        value, accuracy = loss(INPUTS, logits(h, w), labels, **kwargs)
        return value, *torch.autograd.grad(3 * value, [h, w]), accuracy

    with strict():
        ours = losses(dtype, LinearLogits, lambda *a, **k: reward.prm_loss(*a, **k, return_acc=True))
    exact = losses(torch.float64, lambda h, w: h @ w.T, reference.prm_loss)
    if dtype == torch.float64:
        torch.testing.assert_close(ours, exact)
        return
    eager = losses(dtype, lambda h, w: (h @ w.T).float(), reference.prm_loss)
    for name, a, b, c in zip(("loss", "d_hidden", "d_weight", "accuracy"), ours, eager, exact, strict=True):
        assert_accurate(a, b, c, name)


def test_prm_kinds_and_order_change_the_number():
    logits = torch.randn(3, 5, V, dtype=torch.float64)
    losses = [
        reward.prm_loss(INPUTS, logits, labels, placeholder_token_id=p, reward_token_ids=ids).item()
        for ids, labels, p in [(*kind, PLACEHOLDER) for kind in KINDS.values()]
        + [([7, 3], KINDS["soft"][1], PLACEHOLDER), (None, torch.where(INPUTS == 4, 5, -100), 4)]
    ]
    assert len(set(losses)) == len(losses)


def test_prm_takes_labels_of_any_width():
    logits, kwargs = torch.randn(3, 5, V), {"placeholder_token_id": PLACEHOLDER, "reward_token_ids": [3, 7]}
    for kind, dtype in (("soft", torch.float64), ("two ids", torch.int32), ("vocabulary", torch.int32)):
        ids, labels = KINDS[kind]
        losses = [
            reward.prm_loss(INPUTS, logits, x, **kwargs | {"reward_token_ids": ids}) for x in (labels, labels.to(dtype))
        ]
        assert losses[1].dtype == torch.float32
        torch.testing.assert_close(*losses)
    inputs, labels = torch.full((1, 2), PLACEHOLDER), torch.tensor([[156, 5]], dtype=torch.uint8)
    ours, wide = (
        reward.prm_loss(inputs, logits[:1, :1].repeat(1, 2, 20), x, placeholder_token_id=PLACEHOLDER)
        for x in (labels, labels.long())
    )
    assert torch.equal(ours, wide)  # in uint8 −100 would be 156


def test_prm_labels_are_mapped_at_once():
    # Mapped one id after the other, label 1 would become index 0, and index 0 then index 1.
    inputs, labels = torch.tensor([[PLACEHOLDER, PLACEHOLDER]]), torch.tensor([[1, 0]])
    logits = torch.randn(1, 2, V, dtype=torch.float64)
    loss = reward.prm_loss(inputs, logits, labels, placeholder_token_id=PLACEHOLDER, reward_token_ids=[1, 0])
    log_p = logits[0][:, [1, 0]].log_softmax(-1)
    torch.testing.assert_close(loss, -(log_p[0, 0] + log_p[1, 1]) / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_prm_low_precision(kind, dtype):
    ids, labels = KINDS[kind]
    labels = labels.to(dtype) if labels.is_floating_point() else labels
    kwargs = {"placeholder_token_id": PLACEHOLDER, "reward_token_ids": ids}
    logits = (torch.randn(3, 5, V) * 3).to(dtype)
    exact_labels = labels.double() if labels.is_floating_point() else labels
    ours = value_and_grads(lambda z: reward.prm_loss(INPUTS, z, labels, **kwargs), logits)
    assert ours[0].dtype == torch.float32
    eager = value_and_grads(lambda z: reference.prm_loss(INPUTS, z.float(), exact_labels, **kwargs)[0], logits)
    exact = value_and_grads(lambda z: reference.prm_loss(INPUTS, z, exact_labels, **kwargs)[0], logits.double())
    assert_accurate(ours[0], eager[0], exact[0])
    assert_accurate(ours[1][0], eager[1][0], exact[1][0])


@pytest.mark.parametrize("kind", KINDS)
def test_prm_of_nothing_is_nan(kind):
    ids, labels = KINDS[kind]
    logits = torch.randn(3, 5, V, requires_grad=True)
    kwargs = {"reward_token_ids": ids, "return_acc": True}
    loss, accuracy = reward.prm_loss(INPUTS, logits, labels, placeholder_token_id=11, **kwargs)
    assert loss.isnan()
    assert accuracy.isnan()
    nothing = torch.full_like(labels, -100)
    loss, accuracy = reward.prm_loss(INPUTS, logits, nothing, placeholder_token_id=PLACEHOLDER, **kwargs)
    assert loss.isnan()
    assert accuracy == 0
    loss.backward()
    assert not logits.grad.any()


def test_prm_refuses():
    logits, soft, hard = torch.zeros(3, 5, V), KINDS["soft"][1], KINDS["two ids"][1]
    for ids in (None, [1], [1, 2, 3]):
        with pytest.raises(ValueError, match="two reward_token_ids"):
            reward.prm_loss(INPUTS, logits, soft, placeholder_token_id=PLACEHOLDER, reward_token_ids=ids)
    with pytest.raises(ValueError, match=r"among reward_token_ids \[3, 8\]"):
        reward.prm_loss(INPUTS, logits, hard, placeholder_token_id=PLACEHOLDER, reward_token_ids=[3, 8])
    for inputs in (INPUTS[:1], INPUTS[:, :1]):
        with pytest.raises(ValueError, match="must have one shape"):
            reward.prm_loss(inputs, torch.zeros(3, 5, V), KINDS["vocabulary"][1], placeholder_token_id=PLACEHOLDER)


@pytest.mark.parametrize("options", OPTIONS)
def test_fullgraph_pairwise(options):
    chosen, rejected = torch.randn(2, 5)
    compiled = torch.compile(reward.pairwise_reward_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        value_and_grads(lambda c, r: compiled(c, r, **options), chosen, rejected),
        value_and_grads(lambda c, r: reward.pairwise_reward_loss(c, r, **options), chosen, rejected),
    )


def test_fullgraph_per_token():
    ids, rewards = batch(["ragged", "identical", "no pad"]), torch.randn(6, 8)

    def f(r):
        found = reward.divergence_pairwise_loss(r, ids, PAD)
        return found["loss"] + found["chosen_mean_scores"].sum() + reward.end_scores(r, ids, PAD, 2).square().sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_grads(compiled, rewards), value_and_grads(f, rewards))


def test_inputs_stay_as_they_were():
    ids, labels = KINDS["two ids"]
    logits, rewards, pairs = torch.randn(3, 5, V), torch.randn(2, 8), batch(["ragged"])
    before = [t.clone() for t in (logits, rewards, pairs, labels, INPUTS)]
    reward.prm_loss(INPUTS, logits, labels, placeholder_token_id=PLACEHOLDER, reward_token_ids=ids, return_acc=True)
    reward.divergence_pairwise_loss(rewards, pairs, PAD)
    reward.end_scores(rewards, pairs, PAD, 2)
    for now, then in zip((logits, rewards, pairs, labels, INPUTS), before, strict=True):
        assert torch.equal(now, then)


def test_reference_by_hand():
    assert reference.pairwise_reward_loss(torch.tensor([1.0]), torch.tensor([1.0])).item() == pytest.approx(math.log(2))
