"""token_loss: the user's function at the price of a cross entropy, equal to the same loss on token statistics."""

import importlib
from contextlib import nullcontext

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fused_losses import gradients_in_forward, products, settings
from fused_losses.linear_logits import LinearLogits
from fused_losses.reference import token_loss as reference
from fused_losses.reference.tolerance import assert_accurate
from fused_losses.token_loss import token_loss
from fused_losses.token_statistics import token_statistics

module = importlib.import_module("fused_losses.token_loss")  # the package's attribute of that name is the function
N, V, H = 23, 37, 9
ALL = ("log_probs", "entropy", "logsumexp", "log_sum_sq_probs", "mean_logits", "max_logit", "is_top1")


@pytest.fixture(autouse=True)
def _in_forward(small_pieces):
    with settings.route("gradients_in_forward"):  # whatever the workspace
        yield


def problem(dtype=torch.float32, device="cpu", K=None):
    hidden, weight = torch.randn(N, H, device=device, dtype=dtype), torch.randn(V, H, device=device, dtype=dtype)
    bias = torch.randn(V, device=device, dtype=dtype)
    index = torch.randint(0, V, (N,) if K is None else (N, K), device=device)
    index[1::4] = -100
    return hidden, weight, bias, index


def advantages(device="cpu"):
    return torch.linspace(-1, 1, N, device=device)  # of both signs


def old_log_probs(logits, index):
    """Log-probs of a nearby policy, whose ratios leave the clip on both sides."""
    chosen = torch.log_softmax(logits.detach(), -1).gather(1, index.clamp(min=0)[:, None])[:, 0]
    return chosen + torch.linspace(-0.8, 0.8, N, device=logits.device).roll(7)


def capped(h, w, b):
    """The logits of ``LinearLogits(h, w, b, scale=0.5, softcap=4.0)``, their last steps in fp32 or wider."""
    return 4 * torch.tanh((h @ w.T + b).to(torch.promote_types(h.dtype, torch.float32)) * 0.5 / 4)


def grpo(s, a, old, mean):
    ratio = torch.exp(s.log_probs - old)
    clipped = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
    return -clipped * mean, {"ratio": ratio, "clipped": (clipped != ratio * a).float()}


def cispo(s, a, old, mean):
    return -torch.exp(s.log_probs - old).clamp(max=1.3).detach() * a * s.log_probs * mean


def dft(s):
    return -s.log_probs.exp().detach() * s.log_probs


def entropy_bonus(s, a):
    return -a * s.log_probs - 0.1 * s.entropy


def everything(s, a):
    detached = s.mean_logits + s.max_logit * s.is_top1
    return a * s.log_probs.exp() + s.entropy * s.logsumexp + (s.log_sum_sq_probs - detached).square()


def with_gradients(call, *inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    loss, aux = call(*leaves)
    return (loss.detach(), *torch.autograd.grad(3 * loss, leaves)), aux


def check(ours, plain, problems):
    """Accurate over several problems together: on one small one, luck decides by how much eager errs."""
    found = [[], [], []]
    for inputs in problems:
        found[0].append(with_gradients(ours, *inputs)[0])
        found[1].append(with_gradients(plain, *inputs)[0])
        found[2].append(with_gradients(plain, *(x.double() for x in inputs))[0])
    joined = ([torch.cat([t.flatten() for t in same]) for same in zip(*runs, strict=True)] for runs in found)
    for i, (a, b, c) in enumerate(zip(*joined, strict=True)):
        if a.dtype == torch.float64:
            torch.testing.assert_close(a, b)
        else:
            assert_accurate(a, b, c, "loss" if i == 0 else f"gradient {i - 1}")


LOSSES = {
    "grpo": (grpo, ("log_probs",)),
    "cispo": (cispo, ("log_probs",)),
    "dft": (dft, ("log_probs",)),
    "entropy bonus": (entropy_bonus, ("log_probs", "entropy")),
    "entropy alone": (lambda s: s.entropy.square(), ("entropy",)),
    "everything": (everything, ALL),
}


def per_token_of(name, logits, index):
    a = advantages(logits.device)
    if name in ("grpo", "cispo"):
        return a, old_log_probs(logits, index), torch.full_like(a, 1 / 17)
    return () if name in ("dft", "entropy alone") else (a,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_lazy_logits(name, dtype, backend, device):
    if backend == "triton" and (dtype == torch.float64 or name in ("cispo", "dft")):
        pytest.skip("Triton computes in fp32, and reads what grpo reads")
    fn, statistics = LOSSES[name]
    problems = [problem(dtype, device)[:3] for _ in range(6 if backend == "triton" and device == "cpu" else 12)]
    index = problem(dtype, device)[3]
    per_token = {id(p[0]): per_token_of(name, capped(*p), index) for p in problems}
    current = iter([p for p in problems for _ in range(3)])  # each problem for ours, plain, and plain in float64

    def extra():
        return per_token[id(next(current)[0])]

    def ours(h, w, b):
        logits = LinearLogits(h, w, b, scale=0.5, softcap=4.0)
        return token_loss(fn, logits, index, *extra(), statistics=statistics, backend=backend, workspace=9 * V * 4)

    def plain(h, w, b):
        z = capped(h, w, b)
        return reference.token_loss(fn, z, index, *(x.to(z.dtype) for x in extra()))

    check(ours, plain, problems)


@pytest.mark.parametrize("drop_ignored", [True, False])
def test_aux_is_per_token_and_detached(drop_ignored, backend, device):
    hidden, weight, bias, index = problem(device=device)
    logits = LinearLogits(hidden.requires_grad_(), weight, bias)
    z = hidden @ weight.T + bias
    per_token = per_token_of("grpo", z, index)
    how = {"backend": backend, "workspace": 5 * V * 4, "drop_ignored": drop_ignored}
    _, aux = token_loss(grpo, logits, index, *per_token, **how)
    _, expected = reference.token_loss(grpo, z, index, *per_token)
    counted = index != -100
    for key, values in expected.items():
        assert not aux[key].requires_grad
        assert not aux[key][~counted].any()
        torch.testing.assert_close(aux[key][counted], torch.cat(values))
    assert 0.1 < aux["clipped"][counted].mean() < 0.9
    ratios = aux["ratio"][counted]
    assert ratios.min() < 0.8  # both sides of the clip
    assert ratios.max() > 1.2


@pytest.mark.parametrize("name", LOSSES)
def test_logits_that_exist(name, backend, device):
    fn, statistics = LOSSES[name]
    problems = [(h @ w.T + b,) for h, w, b, _ in (problem(device=device) for _ in range(3))]
    index = problem(device=device)[3]
    per_token = per_token_of(name, problems[0][0], index)

    def ours(z):
        return token_loss(fn, z, index, *per_token, statistics=statistics, backend=backend)

    def plain(z):
        return reference.token_loss(fn, z, index, *(x.to(z.dtype) for x in per_token))

    check(ours, plain, problems)
    (_, gradient), aux = with_gradients(ours, *problems[0])
    assert not gradient[index == -100].any()
    assert not any(x.requires_grad for x in aux.values())


def test_losses_are_told_apart():
    hidden, weight, bias, index = problem()
    logits = LinearLogits(hidden.requires_grad_(), weight, bias)
    z = (hidden @ weight.T + bias).detach()
    numbers = [
        token_loss(fn, logits, index, *per_token_of(name, z, index), statistics=statistics)[0].item()
        for name, (fn, statistics) in LOSSES.items()
    ]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("drop_ignored", [True, False])
@pytest.mark.parametrize("K", [1, 3])
def test_several_ids_per_token(K, drop_ignored, backend, device):
    hidden, weight, bias, index = problem(K=K, device=device)
    index[0, -1] = -100  # beside other ids where K > 1
    targets = torch.rand(N, K, device=device)

    def fn(s, t):
        return -(t * s.log_probs).sum(-1) + s.log_probs[:, 0].exp()

    how = {"backend": backend, "workspace": 5 * V * 4, "drop_ignored": drop_ignored}

    def ours(h, w, b):
        return token_loss(fn, LinearLogits(h, w, b), index, targets, **how)

    def on_logits(h, w, b):
        return token_loss(fn, h @ w.T + b, index, targets, **how)

    def plain(h, w, b):
        return reference.token_loss(fn, h @ w.T + b, index, targets.to(h.dtype))

    check(ours, plain, [(hidden, weight, bias)])
    check(on_logits, plain, [(hidden, weight, bias)])


@pytest.mark.parametrize("workspace", [1, 60_000, 17_000_000, None])
def test_equal_to_the_same_loss_on_token_statistics_for_any_chunks(workspace):
    hidden, weight, bias, index = problem(torch.float64)
    a = advantages().double()

    def ours(h, w, b):
        logits = LinearLogits(h, w, b)
        return token_loss(entropy_bonus, logits, index, a, statistics=("log_probs", "entropy"), workspace=workspace)

    def on_statistics(h, w, b):
        found = token_statistics(LinearLogits(h, w, b), index, ("log_probs", "entropy"))
        return entropy_bonus(found, a)[index != -100].sum(), {}

    one, other = with_gradients(ours, hidden, weight, bias)[0], with_gradients(on_statistics, hidden, weight, bias)[0]
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_low_rank_temperature_and_shapes(backend, device):
    hidden, weight, _, index = problem(torch.float16, device)
    u, B = torch.randn(N, 2, device=device).half(), torch.randn(V, 2, device=device).half()
    temperature, a = torch.rand(N, device=device) + 0.5, advantages(device)
    three = (index[:22].view(2, 11), a[:22].view(2, 11), temperature[:22].view(2, 11))

    def ours(h, w, u, B):
        low_rank = (u[:22].view(2, 11, 2), B)
        logits = LinearLogits(h[:22].view(2, 11, H), w, temperature=three[2], low_rank=low_rank)
        return token_loss(
            entropy_bonus, logits, three[0], three[1], statistics=("log_probs", "entropy"), backend=backend
        )

    def plain(h, w, u, B):
        z = (h @ w.T + u @ B.T).to(torch.promote_types(h.dtype, torch.float32))[:22] / temperature[:22, None]
        return reference.token_loss(entropy_bonus, z, index[:22], a[:22])

    check(ours, plain, [(hidden, weight, u, B)])


@pytest.mark.parametrize("drop_ignored", [True, False])
def test_ignored_rows_reach_nothing(drop_ignored, backend, device):
    hidden, weight, bias, index = problem(device=device)
    a = advantages(device)
    bad = (index == -100)[:, None]
    sizes = []

    def fn(s, a):
        sizes.append(len(a))
        return -a / s.log_probs  # 1/0 where a row is ignored

    def ours(h, w, b, a=a):
        return token_loss(fn, LinearLogits(h, w, b), index, a, backend=backend, drop_ignored=drop_ignored)

    clean = with_gradients(ours, hidden, weight, bias)[0]
    poison = a.masked_fill(bad[:, 0], float("nan"))
    poisoned = with_gradients(lambda *t: ours(*t, a=poison), hidden.masked_fill(bad, float("nan")), weight, bias)[0]
    for x, y in zip(clean, poisoned, strict=True):
        assert x.isfinite().all()
        assert torch.equal(x, y)
    assert set(sizes) == {int((index != -100).sum()) if drop_ignored else N}


def test_an_ignored_row_does_not_scale_float16_gradients(backend, device):
    hidden, weight, bias, index = problem(torch.float16, device=device)

    def gradients(drop_ignored):
        logits = LinearLogits(hidden.requires_grad_(), weight, bias)
        loss, _ = token_loss(
            lambda s: 1 / (1e-15 - s.log_probs), logits, index, backend=backend, drop_ignored=drop_ignored
        )  # its derivative is 1e30 where a row is ignored
        return torch.autograd.grad(loss, hidden)[0]

    torch.testing.assert_close(gradients(False), gradients(True))
    assert gradients(True).any()


def test_all_ignored_and_empty(backend, device):
    for n in (N, 0):
        hidden, weight, bias, index = problem(device=device)
        index = index[:n].fill_(-100)
        leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
        logits = LinearLogits(hidden[:n], weight, bias)
        loss, aux = token_loss(lambda s: (dft(s), {"dft": dft(s)}), logits, index, backend=backend)
        assert loss == 0
        assert torch.equal(aux["dft"], torch.zeros(n, device=device))  # there for logging, though fn has seen no token
        for g in torch.autograd.grad(loss, leaves, retain_graph=True):
            assert not g.any()
        for g in torch.autograd.grad(loss / (index != -100).sum(), leaves):  # divides by a count of 0
            assert not g.any()


def test_no_gradient_asked_is_one_product(monkeypatch):
    hidden, weight, bias, index = problem()
    monkeypatch.setattr(module, "loss_and_gradients", None)
    loss, _ = token_loss(dft, LinearLogits(hidden, weight, bias), index)
    with torch.no_grad():
        again, _ = token_loss(dft, LinearLogits(hidden.requires_grad_(), weight, bias), index)
    assert torch.equal(loss, again)


def test_frozen_weight_costs_no_product(monkeypatch):
    hidden, weight, bias, index = problem()
    made = []
    add_product = products.add_product
    monkeypatch.setattr(products, "add_product", lambda *a, **k: (made.append(a), add_product(*a, **k)))
    loss, _ = token_loss(dft, LinearLogits(hidden.requires_grad_(), weight, bias), index)
    assert len(made) == 1
    loss.backward()
    assert hidden.grad.any()
    assert weight.grad is None


@pytest.mark.parametrize("how", ["checkpoint", "save_on_cpu"])
def test_under_saved_tensor_hooks(how):
    """Under such hooks, forward cannot take the gradient of fn."""
    hidden, weight, bias, index = problem()

    def of(hidden):
        return token_loss(dft, LinearLogits(hidden, weight, bias), index)[0]

    expected = torch.autograd.grad(of(hidden.requires_grad_()), hidden)
    with (
        settings.route("gradients_in_forward"),
        torch.autograd.graph.save_on_cpu() if how == "save_on_cpu" else nullcontext(),
    ):
        loss = of(hidden) if how == "save_on_cpu" else checkpoint(of, hidden, use_reentrant=False)
        torch.testing.assert_close(torch.autograd.grad(loss, hidden), expected)


def test_a_compiled_checkpoint():
    """The checkpoint's hooks are not installed yet while it is traced."""
    hidden, weight, bias, index = problem()

    def of(hidden):
        return token_loss(dft, LinearLogits(hidden, weight, bias), index)[0]

    expected = torch.autograd.grad(of(hidden.requires_grad_()), hidden)
    twice = torch.compile(lambda h: checkpoint(of, h, use_reentrant=False) + of(h), fullgraph=True, backend="aot_eager")
    try:
        found = torch.autograd.grad(twice(hidden), hidden)
    finally:
        torch._C._autograd._saved_tensors_hooks_enable()  # torch.func leaves the hooks disabled when it raises
    torch.testing.assert_close(found[0], 2 * expected[0])


def test_where_no_chunk_fits_it_is_token_statistics_after_all(monkeypatch):
    hidden, weight, bias, index = problem()
    monkeypatch.setattr(module, "loss_and_gradients", None)
    fn, statistics = LOSSES["everything"]
    with settings.route(None):
        logits = LinearLogits(hidden.requires_grad_(), weight, bias)
        loss, _ = token_loss(fn, logits, index, advantages(), statistics=statistics, workspace=1)
    expected, _ = reference.token_loss(fn, hidden @ weight.T + bias, index, advantages())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden), torch.autograd.grad(expected, hidden))


def test_a_second_backward_and_its_derivative():
    hidden, weight, bias, index = problem()
    loss, _ = token_loss(dft, LinearLogits(hidden.requires_grad_(), weight, bias), index)
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, hidden, retain_graph=True)[0])
    with pytest.raises(RuntimeError, match="token_statistics"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    assert torch.equal(first, torch.autograd.grad(loss, hidden)[0])


def test_transforms_go_through_plain_pytorch():
    hidden, weight, bias, index = problem(torch.float64)

    def ours(h):
        return token_loss(dft, LinearLogits(h, weight, bias), index, drop_ignored=False)[0]

    leaf = hidden.clone().requires_grad_()
    expected = torch.autograd.grad(ours(leaf), leaf)[0]
    torch.testing.assert_close(torch.func.grad(ours)(hidden), expected)


def test_gradients_per_sample():
    hidden, weight, _, index = problem()
    hidden, index = hidden[:22].view(2, 11, H), index[:22].view(2, 11)

    def loss(h, y):
        return token_loss(dft, LinearLogits(h, weight), y)[0]

    each = torch.func.vmap(torch.func.grad(loss))(hidden, index)
    for h, y, g in zip(hidden, index, each, strict=True):
        torch.testing.assert_close(g, torch.func.grad(loss)(h, y))
        assert (g[y == -100] == 0).all()


def test_fullgraph(monkeypatch):
    monkeypatch.setattr(gradients_in_forward, "CHUNK_ELEMENTS", 100)  # so that logits are made in slices
    monkeypatch.setattr(gradients_in_forward, "BLOCK", 16)
    torch._dynamo.reset()
    hidden, weight, bias, index = problem()
    a, old, mean = per_token_of("grpo", hidden @ weight.T + bias, index)

    def loss(h, w, b):
        return token_loss(grpo, LinearLogits(h, w, b), index, a, old, mean, workspace=18_000_000)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, expected = with_gradients(compiled, hidden, weight, bias), with_gradients(loss, hidden, weight, bias)
    torch.testing.assert_close(ours, expected)


def test_fullgraph_of_16_bit_heads_summed_in_fp32(device):
    """A GPU uses the library's product with another output dtype, which a compiled graph must be able to lower."""
    torch._dynamo.reset()
    hidden, weight, bias, index = problem(torch.bfloat16, device)

    def loss(h, w, b):
        logits = LinearLogits(h, w, b)
        how = {"accumulate": "fp32", "backend": "torch", "workspace": 1}
        return token_loss(lambda s: -s.log_probs, logits, index, **how)

    compiled = torch.compile(loss, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    ours, expected = with_gradients(compiled, hidden, weight, bias), with_gradients(loss, hidden, weight, bias)
    torch.testing.assert_close(ours, expected)


def test_under_a_loss_scale_in_fp16(backend, device):
    problems = [problem(torch.float16, device)[:3] for _ in range(12)]
    index = problem(device=device)[3]
    tiny = torch.full((N,), 2.0**-20, device=device)  # like the weights of a mean over a million tokens

    def ours(h, w, b):
        loss, aux = token_loss(
            lambda s, t: -t * s.log_probs, LinearLogits(h, w, b), index, tiny, backend=backend, workspace=8 * V * 4
        )
        return 2.0**16 * loss, aux

    def plain(h, w, b):
        z = (h @ w.T + b).to(torch.promote_types(h.dtype, torch.float32))
        loss, aux = reference.token_loss(lambda s, t: -t * s.log_probs, z, index, tiny)
        return 2.0**16 * loss, aux

    check(ours, plain, problems)


def test_coefficients_that_grow_from_chunk_to_chunk_in_fp16(backend, device):
    problems = [problem(torch.float16, device)[:3] for _ in range(12)]
    index = problem(device=device)[3]
    growing = torch.logspace(-6, 3, N, device=device)

    def ours(h, w, b):
        logits = LinearLogits(h, w, b)
        fn = lambda s, t: -t * s.log_probs  # noqa: E731
        return token_loss(fn, logits, index, growing, backend=backend, workspace=8 * V * 4)

    def plain(h, w, b):
        z = (h @ w.T + b).to(torch.promote_types(h.dtype, torch.float32))
        return reference.token_loss(lambda s, t: -t * s.log_probs, z, index, growing)

    check(ours, plain, problems)


@pytest.mark.parametrize("route", ["gradients_in_forward", "recompute"])
def test_many_tokens_are_summed_in_float64(route):
    hidden, weight, bias, index = problem()
    values = torch.ones(N)
    values[0], values[-1] = 2.0**25, -(2.0**25)  # in fp32 the ones added to it are lost
    index = index.clamp(min=0)
    with settings.route(route):
        loss, _ = token_loss(
            lambda s, t: t + 0 * s.log_probs, LinearLogits(hidden.requires_grad_(), weight, bias), index, values
        )
    assert loss.item() == N - 2


def test_a_tensor_of_fn_that_requires_grad_is_not_forgotten(backend, device):
    hidden, weight, bias, index = problem(device=device)
    scale = torch.tensor(2.0, device=device, requires_grad=True)

    def fn(s):
        return -s.log_probs * scale

    logits = LinearLogits(hidden.requires_grad_(), weight, bias)
    with pytest.raises(ValueError, match=r"fn reads a tensor that requires grad.*detach it, or use token_statistics"):
        token_loss(fn, logits, index, backend=backend)
    loss, _ = token_loss(fn, hidden @ weight.T + bias, index, backend=backend)
    torch.testing.assert_close(torch.autograd.grad(loss, scale)[0], loss.detach() / 2)
    scale = scale.detach()
    loss, aux = token_loss(lambda s: (fn(s), {"nll": fn(s)}), logits, index, backend=backend)
    assert not aux["nll"].requires_grad
    assert not torch.autograd.grad(loss, hidden)[0].requires_grad
    scale.requires_grad_()
    with torch.no_grad():
        again, _ = token_loss(fn, logits, index, backend=backend)
    torch.testing.assert_close(again, loss.detach())


def test_bad_input():
    hidden, weight, bias, index = problem()
    logits = LinearLogits(hidden.requires_grad_(), weight, bias)
    a = advantages()
    with pytest.raises(ValueError, match="requires it: detach it"):
        token_loss(entropy_bonus, logits, index, a.clone().requires_grad_(), statistics=("log_probs", "entropy"))
    with pytest.raises(ValueError, match=r"\(23,\).*got \(5,\)"):
        token_loss(entropy_bonus, logits, index, a[:5])
    with pytest.raises(ValueError, match=r"need an index \(23,\) or \(23, K\),"):
        token_loss(dft, logits, index[:5])
    for turned in (logits.T, logits.detach().T):
        with pytest.raises(ValueError, match=r"vocabulary of logits \(37, 23\) must stand last"):
            token_loss(dft, turned, index)
    with pytest.raises(TypeError, match=r"fn must return one number per token, a tensor.*got None"):
        token_loss(lambda s: None, logits, index)
    for z in (logits, LinearLogits(torch.randn(23, 4), torch.randn(37, 4))):
        with pytest.raises(TypeError, match=r"NoneType.*given the statistics \('log_probs',\), and None for others: "):
            token_loss(entropy_bonus, z, index, a, statistics=("log_probs",))
        with pytest.raises(ValueError, match=r"index \(23, 0\) has no id per token"):
            token_loss(dft, z, index[:, None][:, :0])
    with pytest.raises(TypeError, match=r"index is a tensor with a number for each token \(.*\), got None"):
        token_loss(lambda s: -s.log_probs, logits, None)
    with pytest.raises(TypeError, match=r"per_token is a tensor.*got 0.5"):
        token_loss(lambda s, a: -a * s.log_probs, logits, index, 0.5)
    with pytest.raises(ValueError, match="one number per token"):
        token_loss(lambda s: s.log_probs.sum(), logits, index)
    with pytest.raises(ValueError, match=r"'x'.*one number per token"):
        token_loss(lambda s: (s.log_probs, {"x": s.log_probs.sum()}), logits, index)
    with pytest.raises(ValueError, match="unknown statistics"):
        token_loss(dft, logits, index, statistics=("probs",))
    with pytest.raises(IndexError, match="out of bounds"):
        token_loss(dft, logits, index.clamp(min=0) + V)
