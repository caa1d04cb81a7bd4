"""Token statistics of logits that exist: values, gradients, masks and what the caller may do with the results."""

import dataclasses
import functools
import math
import re

import pytest
import torch
from conftest import INTERPRETED

from fused_losses.cross_entropy import cross_entropy
from fused_losses.distillation import distillation_loss, sparse_distillation_loss
from fused_losses.divergence import divergence
from fused_losses.linear_logits import LinearLogits
from fused_losses.reference import token_statistics as reference
from fused_losses.reference.tolerance import assert_accurate
from fused_losses.token_loss import token_loss
from fused_losses.token_statistics import TokenStatistics, selective_log_softmax, token_statistics

NAMES = TokenStatistics._fields
DIFFERENTIABLE = ("log_probs", "entropy", "logsumexp", "log_sum_sq_probs")


def logits_and_ids(device, dtype=torch.float32, tokens=(2, 5), V=77, K=None, scale=4.0):
    x = (torch.randn(*tokens, V, device=device) * scale).to(dtype)
    ids = torch.randint(0, V, tokens if K is None else (*tokens, K), device=device)
    ids[0, 1] = -100
    return x, ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("K", [None, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.7, "per token"])
def test_values_and_gradients(temperature, K, dtype, backend, device):
    if backend == "triton" and INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter is wrong about bfloat16")
    # Enough rows that eager PyTorch is not exact by luck: its error is what ours is measured against.
    tokens = (2, 30 if backend == "triton" and device == "cpu" else 400)
    x, ids = logits_and_ids(device, dtype, tokens=tokens, K=K)
    if K:
        ids[1, 2, 1] = -100  # one of several ids
        ids[1, 3] = ids[1, 3, 0]  # the same id three times
    T = torch.rand(tokens, device=device) + 0.5 if temperature == "per token" else temperature

    def run(fn, x, T, **kwargs):
        leaf = x.detach().clone().requires_grad_()
        return leaf, fn(leaf, ids, temperature=T, **kwargs)

    leaf, found = run(token_statistics, x, T, outputs=NAMES, backend=backend)
    # The rounded logits are the input: the exact result is float64 maths on them, and eager's is fp32 maths on them.
    eager_leaf, eager = run(reference.token_statistics, x.float(), T)
    exact_leaf, exact = run(reference.token_statistics, x.double(), T.double() if isinstance(T, torch.Tensor) else T)
    upstream = {}
    for name in NAMES:
        value = getattr(found, name)
        if name == "is_top1":
            assert torch.equal(value, exact[name])
            continue
        assert value.dtype == torch.float32
        assert value.requires_grad == (name in DIFFERENTIABLE)
        assert_accurate(value, eager[name], exact[name], name)
        upstream[name] = torch.randn_like(value)
    assert (found.log_probs <= 0).all()

    for names in [(n,) for n in DIFFERENTIABLE] + [DIFFERENTIABLE]:
        grads = []
        for source, results in ((leaf, found._asdict()), (eager_leaf, eager), (exact_leaf, exact)):
            total = sum((results[n] * upstream[n].to(results[n].dtype)).sum() for n in names)
            grads.append(torch.autograd.grad(total, source, retain_graph=True)[0])
        assert_accurate(grads[0], grads[1].to(dtype), grads[2], "+".join(names))
        assert (grads[0][0, 1] == 0).all()


def test_shifted_logits_are_read_in_place(backend, device):
    x, ids = logits_and_ids(device)
    shifted = x[:, :-1]
    expected = reference.token_statistics(shifted.double(), ids[:, 1:])
    for name in ("log_probs", "entropy"):
        found = token_statistics(shifted, ids[:, 1:], (name,), backend=backend)
        torch.testing.assert_close(getattr(found, name).double(), expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("V", [515, 1032])
def test_a_row_is_summed_alike_in_slices_and_alone(V, backend, device):
    """Rows may start at multiples of 16 bytes in a slice, and not in the tensor that it is taken from."""
    x, ids = torch.randn(3, 16, V, device=device) * 3, torch.randint(V, (3, 16), device=device)
    names = ("log_probs", "logsumexp", "entropy")

    def found(x, ids):
        return torch.stack([getattr(token_statistics(x, ids, names, backend=backend), name) for name in names])

    whole = found(x, ids)
    for part in (
        (slice(None), slice(0, 1)),
        (slice(0, 1), slice(0, 1)),
        (slice(None), slice(None, None, 2)),
        (1, slice(3, 4)),
    ):
        assert torch.equal(found(x[part], ids[part]), whole[(slice(None), *part)]), part
    assert torch.equal(found(x[0, :1].expand(5, V), ids[0, :1].expand(5)), whole[:, 0, :1].expand(3, 5))


def test_what_was_not_asked_for_is_none(backend, device):
    x, ids = logits_and_ids(device)
    found = token_statistics(x, ids, ("entropy", "max_logit"), backend=backend)
    assert [n for n in NAMES if getattr(found, n) is not None] == ["entropy", "max_logit"]
    found = token_statistics(x, None, ("entropy",), backend=backend)
    assert (found.entropy > 0).all()  # without an index no token is skipped


def test_ignored_tokens_are_not_read(backend, device):
    x, ids = logits_and_ids(device)
    x[0, 1] = math.nan
    leaf = x.requires_grad_()
    found = token_statistics(leaf, ids, NAMES, backend=backend)
    for name in NAMES:
        value = getattr(found, name)
        assert value[0, 1] == 0
        assert value.isfinite().all()
    sum(getattr(found, n).sum() for n in DIFFERENTIABLE).backward()
    assert leaf.grad.isfinite().all()
    assert (leaf.grad[0, 1] == 0).all()


@pytest.mark.parametrize("K", [None, 2])
def test_row_mask(K, backend, device):
    x, ids = logits_and_ids(device, K=K)
    mask = torch.ones(2, 5, device=device)
    mask[0], mask[1, 4] = 0.5, 0  # a weight that is not 0 masks nothing
    x[1, 4] = math.nan
    got = selective_log_softmax(x, ids, row_mask=mask, backend=backend)
    assert got.shape == ids.shape
    assert (got[1, 4] == 0).all()
    assert torch.equal(got[0], selective_log_softmax(x, ids, backend=backend)[0])
    assert (got[1, 3] < 0).all()
    assert (selective_log_softmax(x, ids, backend=backend)[1, 4]).isnan().all()


def test_ids_of_any_strides(backend, device):
    """Such as those of a transposed batch; the kernels read the ids row by row."""
    hidden, weight = torch.randn(6, 8, device=device), torch.randn(40, 8, device=device)
    ids = torch.randint(0, 40, (3, 6), device=device).T
    for x in (hidden @ weight.T, LinearLogits(hidden, weight)):
        found = selective_log_softmax(x, ids, backend=backend)
        torch.testing.assert_close(found, reference.selective_log_softmax(hidden @ weight.T, ids))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_special_logits(bad, backend, device):
    x, ids = logits_and_ids(device, tokens=(2, 3), V=40)
    ids[0, 1] = 5
    x[0, 0, 7] = bad
    x[1, 1, ids[1, 1]] = bad
    found = token_statistics(x, ids, NAMES, backend=backend)
    expected = reference.token_statistics(x.double(), ids)
    for name in NAMES:
        if name == "is_top1" or (bad == math.inf and name in ("logsumexp", "mean_logits")):
            continue  # argmax takes nan for the largest; beside +inf, every statistic of ours is nan, as in log_softmax
        torch.testing.assert_close(
            getattr(found, name).double(), expected[name], rtol=1e-5, atol=1e-5, equal_nan=True, msg=name
        )


@pytest.mark.parametrize("lazy", [None, torch.float16, torch.float32], ids=str)
def test_nothing_but_minus_infinity(lazy, backend, device):
    x, ids = torch.full((2, 50), -math.inf, device=device), torch.tensor([3, 49], device=device)
    if lazy is not None:
        hidden, weight = (torch.ones(n, 1, device=device, dtype=lazy) for n in x.shape)
        x = LinearLogits(hidden, weight, torch.full((50,), -math.inf, device=device, dtype=lazy))
    found = token_statistics(x, ids, ("log_probs", "logsumexp", "max_logit"), backend=backend)
    assert (found.logsumexp == -math.inf).all()
    assert (found.max_logit == -math.inf).all()
    assert found.log_probs.isnan().all()


def test_gradients_beside_logits_of_minus_infinity(backend, device):
    """They are those of the finite columns alone, and 0 in the other columns."""
    x, _ = logits_and_ids(device, tokens=(2, 60))
    x[..., ::3] = -math.inf
    left, upstream = x[0, 0] > -math.inf, torch.randn(2, 2, 60, device=device)

    def gradient(x, found):
        total = (torch.stack([found["entropy"], found["log_sum_sq_probs"]]) * upstream).sum()
        return torch.autograd.grad(total, x)[0]

    leaf, rest = x.requires_grad_(), x.detach()[..., left].requires_grad_()
    ours = gradient(leaf, token_statistics(leaf, None, ("entropy", "log_sum_sq_probs"), backend=backend)._asdict())
    exact = gradient(rest, reference.token_statistics(rest.double()))
    assert (ours[..., ~left] == 0).all()
    assert_accurate(ours[..., left], gradient(rest, reference.token_statistics(rest)), exact)


@pytest.mark.parametrize("V", [77, 5000])  # with and without lanes that see nothing
@pytest.mark.parametrize("value", [torch.finfo(torch.float32).min, -1e31, 1e38])
def test_rows_of_one_huge_value_are_uniform(value, V, backend, device):
    """Trainers mask with the least number of a dtype, sometimes a whole row."""
    x, ids = torch.full((2, V), value, device=device), torch.tensor([3, V - 1], device=device)
    found = token_statistics(x, ids, NAMES, backend=backend)
    uniform = torch.full((2,), math.log(V), device=device)
    torch.testing.assert_close(found.log_probs, -uniform)
    torch.testing.assert_close(found.entropy, uniform)
    torch.testing.assert_close(found.log_sum_sq_probs, -uniform)
    for name in ("logsumexp", "mean_logits", "max_logit"):
        torch.testing.assert_close(getattr(found, name), torch.full((2,), value, device=device))


def test_forward_mode_derivative_for_the_temperature():
    x, ids = torch.randn(3, 5), torch.tensor([0, 1, 2])
    with pytest.raises(RuntimeError, match="derivative for temperature"):
        torch.func.jvp(lambda t: selective_log_softmax(x, ids, temperature=t), (torch.ones(3),), (torch.ones(3),))


def test_peaked_rows(backend, device):
    """14 % of such rows have positive log-probs where logsumexp is subtracted after rounding."""
    x = torch.randn(64, 90, device=device) * 3
    ids = x.argmax(-1)
    x[torch.arange(64), ids] += 30
    logp = selective_log_softmax(x, ids, backend=backend)
    assert (logp <= 0).all()
    exact = reference.selective_log_softmax(x.double(), ids)
    assert_accurate(logp, reference.selective_log_softmax(x, ids), exact)


def test_first_of_equal_maxima(backend, device):
    x = torch.zeros(4, 9000, device=device)
    x[:, 4100] = x[:, 17] = x[:, 4000] = x[:, 17 + 8192] = 2.0  # in any tile, the last is at the first's place
    ids = torch.tensor([17, 4000, 4100, 17 + 8192], device=device)
    assert token_statistics(x, ids, ("is_top1",), backend=backend).is_top1.tolist() == [True, False, False, False]


def test_writing_into_results_changes_no_gradient(backend, device):
    x, ids = logits_and_ids(device)
    grads = []
    for write in (False, True):
        leaf = x.clone().requires_grad_()
        found = token_statistics(leaf, ids, DIFFERENTIABLE, backend=backend)
        parts = [getattr(found, n) for n in DIFFERENTIABLE]
        if write:
            mask = torch.zeros(2, 5, dtype=torch.bool, device=device)
            for part in parts:
                part.masked_fill_(mask, 3.0)
        grads.append(torch.autograd.grad(sum(p.sum() for p in parts), leaf)[0])
    assert torch.equal(*grads)


def test_float64_takes_any_derivative():
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[1, -100, 4], [0, 0, 2]])

    def fn(x):
        found = token_statistics(x, ids, DIFFERENTIABLE, temperature=1.3)
        return tuple(getattr(found, n) for n in DIFFERENTIABLE)

    assert torch.autograd.gradcheck(fn, x, check_forward_ad=True, check_batched_grad=False)
    assert torch.autograd.gradgradcheck(fn, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_transforms_of_16_bit_logits_compute_in_fp32(dtype):
    x, ids = logits_and_ids("cpu", dtype, tokens=(2, 200))

    def entropy(x):
        return token_statistics(x, ids, ("entropy",)).entropy

    (ours, d_x), (exact, d_exact) = (torch.func.vjp(entropy, z) for z in (x, x.double()))
    assert_accurate(ours, entropy(x.float()), exact)
    ones = torch.ones_like(exact)
    assert_accurate(d_x(ones.float())[0], d_exact(ones)[0].to(dtype), d_exact(ones)[0])


def test_compiles_without_a_break(backend, device):
    x, ids = logits_and_ids(device)
    T = torch.rand(2, 5, device=device) + 0.5
    x.requires_grad_()

    def loss(x):
        found = token_statistics(x, ids, ("log_probs", "entropy"), temperature=T, backend=backend)
        return (found.log_probs * 2 - found.entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="inductor" if backend == "torch" else "aot_eager")
    torch.testing.assert_close(compiled(x), loss(x))
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(loss(x), x))


def test_same_bits_whatever_stands_around(backend, device):
    """A row's numbers depend on the row alone."""
    x, ids = logits_and_ids(device, tokens=(3, 7), V=301)
    alone = token_statistics(x[1, 4], ids[1, 4], NAMES, backend=backend)
    among = token_statistics(x, ids, NAMES, backend=backend)
    moved = token_statistics(x.flatten(0, 1)[5:15], ids.flatten()[5:15], NAMES, backend=backend)
    for name in NAMES:
        assert torch.equal(getattr(alone, name), getattr(among, name)[1, 4]), name
        assert torch.equal(getattr(alone, name), getattr(moved, name)[11 - 5]), name


@pytest.mark.parametrize(
    ("index", "outputs", "error", "message"),
    [
        (torch.zeros(2, dtype=torch.long), ("log_probs",), ValueError, r"\(2, 5, 7\).*\(2, 5\).*\(2,\)"),
        (None, ("log_probs",), ValueError, r"need an index, \(2, 5\) or \(2, 5, K\)"),
        (torch.zeros(2, 5, dtype=torch.long), ("perplexity",), ValueError, "perplexity"),
        (torch.zeros(2, 5), ("log_probs",), TypeError, "float32"),
        (torch.zeros(2, 5, 0, dtype=torch.long), ("log_probs",), ValueError, r"\(2, 5, 0\) has no id"),
        (torch.full((2, 5), 7), ("log_probs",), IndexError, "out of bounds"),
        (
            torch.zeros(2, 5, dtype=torch.long),
            "entropy",
            TypeError,
            r"sequence of names, got 'entropy': .*\('entropy',\)",
        ),
    ],
)
def test_wrong_input(index, outputs, error, message, device):
    if device == "cuda" and error is IndexError:
        pytest.skip("a device-side assert ends the process")
    with pytest.raises(error, match=message):
        token_statistics(torch.randn(2, 5, 7, device=device), None if index is None else index.to(device), outputs)


def test_a_hidden_of_another_size(device):
    logits = LinearLogits(torch.zeros(5, 4, device=device), torch.zeros(7, 4, device=device))
    other = dataclasses.replace(logits, hidden=torch.zeros(5, 3, device=device))
    ids = torch.zeros(5, dtype=torch.long, device=device)
    for loss in (token_statistics, cross_entropy, functools.partial(token_loss, lambda s: s.log_probs)):
        with pytest.raises(RuntimeError, match=r"last dimensions .*\(5, 3\) and \(7, 4\)"):
            loss(other, ids)
    with pytest.raises(RuntimeError, match=r"last dimensions .*\(5, 3\) and \(7, 4\)"):
        divergence(other, logits)


def test_wrong_temperature(device):
    x, ids = logits_and_ids(device)
    with pytest.raises(ValueError, match=r"temperature \(2,\)"):
        selective_log_softmax(x, ids, temperature=torch.ones(2, device=device))
    with pytest.raises(RuntimeError, match="derivative for temperature"):
        selective_log_softmax(x.requires_grad_(), ids, temperature=torch.ones(2, 5, device=device, requires_grad=True))


@pytest.mark.parametrize("temperature", [0.7, "per token"])
def test_a_temperature_of_lazy_logits(temperature, backend, device):
    hidden, weight = torch.randn(2, 30, 8, device=device), torch.randn(77, 8, device=device)
    ids = torch.randint(0, 77, (2, 30), device=device)
    T = torch.rand(2, 30, device=device) + 0.5 if temperature == "per token" else temperature

    names = ("log_probs", "entropy", "max_logit")
    found = token_statistics(LinearLogits(hidden, weight), ids, names, temperature=T, backend=backend)._asdict()
    found["selected"] = selective_log_softmax(LinearLogits(hidden, weight), ids, temperature=T, backend=backend)
    eager = reference.token_statistics(hidden @ weight.T, ids, T)
    T = T.double() if isinstance(T, torch.Tensor) else T
    exact = reference.token_statistics(hidden.double() @ weight.double().T, ids, T)
    for ours, name in (*zip(names, names, strict=True), ("selected", "log_probs")):
        assert_accurate(found[ours], eager[name], exact[name], ours)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("number", [1.0, 0.7])
def test_a_temperature_of_one_number_in_a_tensor(number, lazy, device):
    hidden, weight = torch.randn(2, 5, 8, device=device), torch.randn(77, 8, device=device)
    x = LinearLogits(hidden, weight) if lazy else hidden @ weight.T
    ids = torch.ones(2, 5, dtype=torch.long, device=device)
    T = torch.tensor(number, device=device)
    expected = reference.selective_log_softmax(hidden @ weight.T, ids, number)
    torch.testing.assert_close(selective_log_softmax(x, ids, temperature=T), expected)
    with pytest.raises(RuntimeError, match="derivative for temperature"):  # at a temperature of 1 too
        selective_log_softmax(hidden @ weight.T, ids, temperature=T.requires_grad_())


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan])
@pytest.mark.parametrize("lazy", [False, True])
def test_a_temperature_is_positive(temperature, lazy):
    logits = LinearLogits(torch.randn(2, 5, 3), torch.randn(7, 3)) if lazy else torch.randn(2, 5, 7)
    with pytest.raises(ValueError, match=f"temperature must be positive, got {temperature}"):
        selective_log_softmax(logits, torch.zeros(2, 5, dtype=torch.long), temperature=temperature)


@pytest.mark.parametrize("call", ["log_softmax", "row_mask", "token_loss", "lazy token_loss", "distillation", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_ids_are_not_rounded(call, dtype):
    x, weight = torch.randn(2, 5), torch.randn(7, 5)
    z = x @ weight.T
    ids = (torch.tensor([1.9, 3.9]) if dtype.is_floating_point else torch.ones(2)).to(dtype)
    calls = {
        "log_softmax": lambda y: selective_log_softmax(z, y),
        "row_mask": lambda y: selective_log_softmax(z, y, row_mask=torch.tensor([1, 0])),
        "token_loss": lambda y: token_loss(lambda s: -s.log_probs, z, y),
        "lazy token_loss": lambda y: token_loss(lambda s: -s.log_probs, LinearLogits(x.requires_grad_(), weight), y),
        "distillation": lambda y: distillation_loss(z, z, y, hard_weight=0.5),
        "sparse": lambda y: sparse_distillation_loss(z, y[:, None], torch.tensor([[-1.0], [-2.0]])),
    }
    with pytest.raises(TypeError, match=f"token ids must be an integer tensor, got {dtype} \\(2"):
        calls[call](ids)
    for integer in (torch.uint8, torch.int32, torch.int64):
        calls[call](torch.tensor([1, 3], dtype=integer))


def test_rounded_ids_do_not_compile():
    compiled = torch.compile(selective_log_softmax, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"integer tensor, got torch\.float32 \(2, 1\)"):
        compiled(torch.randn(2, 7), torch.tensor([1.9, 3.9]))


@pytest.mark.parametrize("row_mask", [(2,), (5,), (2, 1), (2, 5, 3), ()])
def test_a_row_mask_does_not_broadcast(row_mask):
    x, ids = torch.randn(2, 5, 7), torch.zeros(2, 5, 3, dtype=torch.long)
    for index in (ids, ids[..., 0]):
        with pytest.raises(ValueError, match=rf"row_mask \(2, 5\), got .* and {re.escape(str(row_mask))}"):
            selective_log_softmax(x, index, row_mask=torch.ones(row_mask))
    with pytest.raises(ValueError, match=r"got \(5,\) and \(2, 5\)"):
        selective_log_softmax(x, ids[0, :, 0], row_mask=torch.ones(2, 5))


def test_a_wrong_workspace_is_named_where_logits_exist():
    with pytest.raises(ValueError, match="'garbage'"):
        selective_log_softmax(torch.randn(2, 7), torch.zeros(2, dtype=torch.long), workspace="garbage")


def test_temperature_is_not_rounded_to_the_default_dtype(device):
    x, ids = logits_and_ids(device)
    expected = reference.selective_log_softmax(x.double() / 0.7, ids)
    torch.testing.assert_close(selective_log_softmax(x.double(), ids, temperature=0.7), expected, rtol=1e-12, atol=0)
    once = selective_log_softmax(x, ids, temperature=0.7)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(selective_log_softmax(x, ids, temperature=0.7), once)
    finally:
        torch.set_default_dtype(torch.float32)


def test_no_tokens(backend, device):
    x = torch.randn(0, 7, device=device, requires_grad=True)
    found = token_statistics(x, torch.zeros(0, dtype=torch.long, device=device), NAMES, backend=backend)
    assert all(t.shape == (0,) for t in found)
    assert torch.autograd.grad(found.log_probs.sum(), x)[0].shape == (0, 7)


def grpo_by_hand(logp, entropy, old, advantages, mask):
    ratio = (logp - old).exp()
    clipped = ratio.clamp(0.8, 1.2)
    loss = -torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None]) - 0.01 * entropy
    return (loss * mask).sum() / mask.sum()


def dpo_by_hand(logp, entropy, reference_logp, _, mask):
    ratios = ((logp - reference_logp) * mask).sum(-1)
    chosen, rejected = ratios.chunk(2)
    return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("loss", [grpo_by_hand, dpo_by_hand])
def test_losses_written_by_hand_on_a_head(loss, dtype, backend, device):
    """Ten lines on log-probs and entropy, no logits anywhere, equal to float64 on whole logits through backward."""
    hidden, weight = torch.randn(4, 12, 32, device=device).to(dtype), torch.randn(97, 32, device=device).to(dtype)
    ids = torch.randint(0, 97, (4, 12), device=device)
    mask = (torch.rand(4, 12, device=device) < 0.8).float()
    advantages = torch.randn(4, device=device)

    def run(of, h, w):
        leaves = [t.detach().clone().requires_grad_() for t in (h, w)]
        logp, entropy = of(*leaves)
        noise = 0.5 * torch.randn(4, 12, generator=torch.Generator().manual_seed(1)).to(logp)
        value = loss(logp, entropy, exact_logp.to(logp) + noise, advantages.to(logp), mask.to(logp))
        return value, *torch.autograd.grad(value, leaves)

    def ours(h, w):
        found = token_statistics(LinearLogits(h, w), ids, ("log_probs", "entropy"), backend=backend)
        return found.log_probs, found.entropy

    def whole(h, w):
        found = reference.token_statistics(h @ w.T, ids)
        return found["log_probs"], found["entropy"]

    exact_logp = whole(hidden.double(), weight.double())[0].detach()
    results = run(ours, hidden, weight), run(whole, hidden, weight), run(whole, hidden.double(), weight.double())
    torch.testing.assert_close(results[0][0].double(), results[2][0], rtol=1e-5, atol=1e-5)
    for name, got, eager, exact in zip(("hidden", "weight"), *(r[1:] for r in results), strict=True):
        assert_accurate(got, eager, exact, name)


@pytest.mark.parametrize("value", [torch.finfo(torch.float32).min, -1e38, -1e31])
@pytest.mark.parametrize(  # in the second case some lanes see masked logits only
    ("V", "masked"), [(20000, slice(0, 9000)), (3008, slice(0, 1400)), (20000, slice(11000, 20000))]
)
def test_entropy_where_part_of_the_vocabulary_is_masked_with_a_number(V, masked, value, backend, device):
    x = torch.randn(12, V, device=device)
    x[:, masked] = value
    ids = torch.full((12,), V // 2, device=device)

    def entropy(fn, x, **how):
        leaf = x.clone().requires_grad_()
        found = fn(leaf, ids, outputs=("log_probs", "entropy"), **how).entropy
        return found, torch.autograd.grad(found.sum(), leaf)[0]

    ours = entropy(token_statistics, x, backend=backend)
    p = x.double().softmax(-1)
    exact = -torch.special.xlogy(p, p).sum(-1)
    torch.testing.assert_close(ours[0].double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        ours[1].double(), -p * (p.clamp(min=1e-300).log() + exact[:, None]), rtol=1e-4, atol=1e-9
    )


def test_scale_below_zero(backend, device):
    """``-logits`` is a head with the scale −1; the vocabulary is no multiple of a tile."""
    hidden, weight = torch.randn(30, 8, device=device), torch.randn(77, 8, device=device)
    ids = torch.randint(0, 77, (30,), device=device)
    found = token_statistics(-LinearLogits(hidden, weight), ids, outputs=NAMES, backend=backend)
    eager = reference.token_statistics(-hidden @ weight.T, ids)
    exact = reference.token_statistics(-hidden.double() @ weight.double().T, ids)
    for name in NAMES:
        if name == "is_top1":
            assert torch.equal(found.is_top1, exact[name])
        else:
            assert_accurate(getattr(found, name), eager[name], exact[name], name)
