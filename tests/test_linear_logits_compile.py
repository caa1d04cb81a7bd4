"""LinearLogits in compiled functions."""

import functools
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from lazy_logits import FEW, IDS, PICK, TEMPERATURE, B, H, S, V, leaves, make, smoothed
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from fused_losses import (
    distillation_loss,
    divergence,
    masked_mean,
    selective_log_softmax,
    settings,
    sft_loss,
    sparse_distillation_loss,
    token_loss,
    token_statistics,
)
from fused_losses.linear_head import LinearHead
from fused_losses.linear_logits import _HELD, LinearLogits


def shifted_loss(h, w, b):
    return nn.functional.cross_entropy(LinearLogits(h, w, b)[:, :-1].reshape(-1, V).float(), IDS[:, 1:].reshape(-1))


def smoothed_loss(h, w, b):
    return smoothed(LinearLogits(h, w, b, softcap=2.0) / 0.7)


def entropy_loss(h, w, b):
    logits = LinearLogits(h, w, b)
    logits = torch.tanh(logits / 3.0) * 3.0
    logp = F.log_softmax(logits, -1)
    correct = (logits.argmax(-1) == IDS).float()
    return -(logp.exp() * logp).sum(-1).mean() + (correct * logp.gather(-1, IDS.unsqueeze(-1)).squeeze(-1)).sum()


def indexed_loss(h, w, b):
    logits = LinearLogits(h, w, b).transpose(0, 1)[1:, :, PICK]
    return torch.cat([logits, logits[:1]]).logsumexp(-1).mean() + torch.stack([row.mean() for row in logits]).sum()


def target_loss(h, w, b):
    logits = LinearLogits(h, w, b)
    with torch.no_grad():
        entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(dim=-1)
        target = logits[..., PICK].softmax(-1)
    logp = logits.log_softmax(axis=-1)
    return (target.gather(-1, FEW[..., :1] % 2) * logp.gather(-1, FEW[..., :1])).sum() + (entropy * logp[..., 3]).sum()


def scaled_loss(h, w, b):
    logits = LinearLogits(h, w) * b[0].exp()
    return F.cross_entropy((logits / b.square().sum()).flatten(0, 1), IDS.flatten()) + b.sum()


@pytest.mark.parametrize("fn", [shifted_loss, smoothed_loss, entropy_loss, indexed_loss, target_loss, scaled_loss])
def test_compiles_without_a_break(fn):
    tensors, same = leaves(torch.float32), leaves(torch.float32)
    expected = fn(*list(tensors.values())[:3])
    expected.backward()
    torch._dynamo.reset()
    with settings.strict():
        found = torch.compile(fn, fullgraph=True, backend="aot_eager")(*list(same.values())[:3])
    found.backward()
    torch.testing.assert_close(found, expected)
    for name in ("hidden", "weight", "bias"):
        torch.testing.assert_close(same[name].grad, tensors[name].grad)


def test_compiled_model_returns_it_and_compiled_loss_takes_it():
    torch._dynamo.reset()
    head = LinearHead(H, V)
    hidden = torch.randn(B, S, H, requires_grad=True)
    logits = torch.compile(lambda h: head(h)[:, 1:], fullgraph=True, backend="aot_eager")(hidden)
    assert isinstance(logits, LinearLogits)
    loss = torch.compile(lambda z: F.cross_entropy(z.transpose(1, 2), IDS[:, 1:]), fullgraph=True, backend="aot_eager")
    loss(logits).backward()
    found = head.weight.grad.clone(), hidden.grad.clone()
    head.weight.grad = hidden.grad = None
    F.cross_entropy(F.linear(hidden, head.weight, head.bias)[:, 1:].transpose(1, 2), IDS[:, 1:]).backward()
    torch.testing.assert_close(found, (head.weight.grad, hidden.grad))


def test_compiled_code_that_materialises_is_right():
    torch._dynamo.reset()
    _, eager, tensors = make()

    def fn(h, w):
        logits = LinearLogits(h, w)
        return (logits**2).sum() + torch.cat([logits, logits], -1).mean() + torch.std(logits)

    with pytest.warns(UserWarning, match="materialises") as caught:
        found = torch.compile(fn, fullgraph=True, backend="aot_eager")(tensors["hidden"], tensors["weight"])
    torch.testing.assert_close(found, (eager**2).sum() + eager.mean() + eager.std())
    messages = [str(w.message) for w in caught if "materialises" in str(w.message)]
    assert [m.split()[0] for m in messages] == ["__pow__", "cat", "std"]


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    ("fn", "first_given"),
    [
        (lambda z: z.std(), False),
        (lambda z: z.softmax(-1).pow(3).sum(), True),
        (lambda z: z[:, :, 2].sum(), False),
        (lambda z: F.cross_entropy(z.transpose(1, 2), torch.zeros(z.shape[:2], dtype=torch.long)), True),
    ],
    ids=["std", "square", "one_entry", "cross_entropy"],
)
def test_compiled_for_any_length(fn, dynamic, first_given):
    torch._dynamo.reset()
    given = first_given != bool(dynamic)  # each two of fn, dynamic and given occur in every combination
    weight = torch.randn(V, H)
    compiled = torch.compile(
        fn if given else lambda h: fn(LinearLogits(h, weight)), fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for length in (4, 6, 9):
            h = torch.randn(B, length, H)
            torch.testing.assert_close(compiled(LinearLogits(h, weight) if given else h), fn(h @ weight.T))


def test_division_by_a_tensor_compiles_without_logits():
    lazy, eager, _ = make()

    def loss(z):
        return (z / TEMPERATURE[..., None]).logsumexp(-1).sum()

    with settings.strict():
        found = torch.compile(loss, fullgraph=True, backend="aot_eager")(lazy)
    torch.testing.assert_close(found, loss(eager))


def test_a_change_in_place_compiles_without_a_break():
    torch._dynamo.reset()
    lazy, eager, _ = make()

    def loss(z):
        return z.div_(2).logsumexp(-1).sum()

    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(lazy)
    torch.testing.assert_close(found, (eager / 2).logsumexp(-1).sum())
    torch.testing.assert_close(lazy.logsumexp(-1).sum(), found)
    assert vars(lazy).keys() == set(_HELD)


OF_ANY_LENGTH = {
    "cross_entropy": lambda z, ids: F.cross_entropy(z.flatten(0, 1), ids.flatten()),
    "log_probs": lambda z, ids: z.log_softmax(-1).gather(-1, ids[..., None]).sum(),
    "probabilities": lambda z, ids: F.cross_entropy(
        z.flatten(0, 1), z.materialize().detach().softmax(-1).flatten(0, 1)
    ),
    "token_loss": lambda z, ids: token_loss(lambda s, a: a * s.log_probs, z, ids, ids / V)[0],
    "distillation": lambda z, ids: distillation_loss(z, z.detach() / 2, ids),
    "divergence": lambda z, ids: divergence(z, z.detach() / 2).sum(),
    "topk": lambda z, ids: z.topk(2).values.sum(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", OF_ANY_LENGTH)
def test_compiled_once_for_any_length(name, dtype):
    torch._dynamo.reset()
    weight, counter, fn = torch.randn(V, H).to(dtype), CompileCounterWithBackend("aot_eager"), OF_ANY_LENGTH[name]
    compiled = torch.compile(lambda h, ids: fn(LinearLogits(h, weight), ids), fullgraph=True, backend=counter)
    for length in (4, 6, 9, 12):
        h, ids = torch.randn(B, length, H).to(dtype).requires_grad_(), torch.randint(V, (B, length))
        results = []
        for loss in (compiled(h, ids), fn(LinearLogits(h, weight), ids)):
            results.append((loss, *torch.autograd.grad(loss, h)))
        # Compiled products round differently.
        torch.testing.assert_close(*results, **{"rtol": 1e-2, "atol": 1e-2} if dtype == torch.float16 else {})
    assert counter.frame_count == 2  # one graph for the first length, one for any


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_seldom_for_any_number_of_chunks(dtype):
    torch._dynamo.reset()
    weight = torch.empty(32000, 512, device="meta", dtype=dtype, requires_grad=True)
    compiled = torch.compile(
        lambda h, ids: F.cross_entropy(LinearLogits(h, weight), ids), fullgraph=True, backend="eager"
    )
    numbers = random.Random(1)
    for _ in range(60):  # PyTorch raises where a ninth graph is needed
        h = torch.empty(int(2 ** numbers.uniform(3, 16)), 512, device="meta", dtype=dtype, requires_grad=True)
        compiled(h, torch.empty(len(h), dtype=torch.int64, device="meta"))


class Loss(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn, self.body, self.head = fn, nn.Linear(H, H), LinearHead(H, V)

    def forward(self, x, ids):
        return self.fn(self.head(self.body(x)), ids)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["cross_entropy", "token_loss"])
def test_an_exported_loss_trains_the_body(name, strict):
    given = torch.randn(B, 4, H), torch.randint(V, (B, 4))
    model = Loss(OF_ANY_LENGTH[name])
    exported = torch.export.export(model, given, strict=strict).module()
    found, expected = (
        torch.autograd.grad(m(*given), [m.get_parameter(name) for name, _ in model.named_parameters()])
        for m in (exported, model)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_topk_trains_the_head(strict):
    model, h = nn.Sequential(LinearHead(H, V)), torch.randn(B, S, H)
    model.register_forward_hook(lambda module, args, z: z.topk(2).values.sum())
    exported = torch.export.export(model, (h,), strict=strict).module()
    gradients = (torch.autograd.grad(m(h), m.get_parameter("0.weight")) for m in (exported, model))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("rank", [0, 2])
def test_compiles_what_compares_two_of_one_head(rank):
    torch._dynamo.reset()
    head, h = LinearHead(H, V, rank=rank), torch.randn(B, S, H)

    def fn(h):
        z = head(h)
        return F.kl_div(z.log_softmax(-1), (z.detach() / 2).softmax(-1), reduction="sum") + torch.cat([z, z]).mean()

    with settings.strict():  # dynamic=True: Dynamo does not know the value of the scale
        torch.testing.assert_close(torch.compile(fn, fullgraph=True, backend="aot_eager", dynamic=True)(h), fn(h))


def test_a_compiled_head_refuses_reentrant_checkpointing():
    torch._dynamo.reset()
    head, x = LinearHead(H, V), torch.randn(B, S, H, requires_grad=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        checkpoint(torch.compile(head, backend="aot_eager"), x, use_reentrant=True)
    logits = checkpoint(torch.compile(head, backend="aot_eager"), x, use_reentrant=False)
    assert torch.autograd.grad(F.cross_entropy(logits.transpose(1, 2), IDS), head.weight)[0].any()


def test_a_compiled_token_loss_is_checkpointed():
    torch._dynamo.reset()
    tensors, weights = leaves(torch.float32), TEMPERATURE.float()

    def loss(h):
        return token_loss(lambda s, a: a * s.log_probs.exp(), LinearLogits(h, tensors["weight"]), IDS, weights)[0]

    h = tensors["hidden"]
    found = checkpoint(torch.compile(loss, backend="aot_eager"), h, use_reentrant=False)
    gradients = (torch.autograd.grad(x, (h, tensors["weight"])) for x in (found, loss(h)))
    torch.testing.assert_close(*gradients)


def test_a_compiled_token_loss_under_anomaly_detection():
    torch._dynamo.reset()
    weight, fn = torch.randn(V, H), OF_ANY_LENGTH["token_loss"]
    compiled = torch.compile(lambda h: fn(LinearLogits(h, weight), IDS), fullgraph=True, backend="aot_eager")
    h = torch.randn(B, S, H, requires_grad=True)
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        found = torch.autograd.grad(compiled(h), h)
    torch.testing.assert_close(found, torch.autograd.grad(fn(LinearLogits(h, weight), IDS), h))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.hessian])
@pytest.mark.parametrize("name", ["cross_entropy", "log_probs", "token_loss", "divergence"])
def test_a_compiled_transform_is_right(name, transform):
    torch._dynamo.reset()
    h, weight = torch.randn(1, 2, H), torch.randn(V, H)

    def fn(h):
        return OF_ANY_LENGTH[name](LinearLogits(h, weight), IDS[:1, :2])

    transformed = transform(fn)
    found = torch.compile(transformed, fullgraph=True, backend="aot_eager")(h)
    assert found.any()
    torch.testing.assert_close(found, transformed(h))


OF_TOKENS = {
    "cross_entropy": lambda z, t, ids: F.cross_entropy(z, ids),
    "smoothed": lambda z, t, ids: F.cross_entropy(z, ids, reduction="sum", label_smoothing=0.1),
    "per_token": lambda z, t, ids: F.cross_entropy(z, ids, reduction="none").square().sum(),
    "class_probabilities": lambda z, t, ids: F.cross_entropy(z, F.one_hot(ids, V).to(z.dtype)),
    "log_probs": lambda z, t, ids: z.log_softmax(-1).gather(-1, ids[:, None]).exp().sum(),
    "selective_log_softmax": lambda z, t, ids: selective_log_softmax(z, ids).sum(),
    "temperature": lambda z, t, ids: F.cross_entropy(z / (1.0 + ids)[:, None], ids),
    "one_temperature": lambda z, t, ids: F.cross_entropy(z / torch.full((1, 1), 2.0), ids),
    "entropy": lambda z, t, ids: token_statistics(z, outputs=("entropy",)).entropy.sum(),
    "token_loss": lambda z, t, ids: token_loss(lambda s: s.log_probs.exp(), z, ids)[0],
    "kl_div": lambda z, t, ids: F.kl_div(z.log_softmax(-1), t.softmax(-1), reduction="batchmean"),
    "divergence": lambda z, t, ids: divergence(z, t, kind="jsd").sum(),
    "distillation_loss": lambda z, t, ids: distillation_loss(z, t, ids),
    "masked_mean": lambda z, t, ids: masked_mean(z.logsumexp(-1), ids % 2),
    "sparse": lambda z, t, ids: sparse_distillation_loss(z, *rivals(ids), ids).loss,
    "sparse_renormalized": lambda z, t, ids: sparse_distillation_loss(z, *rivals(ids), ids, tail="renormalize").loss,
    "sft_loss": lambda z, t, ids: sft_loss(z, ids),
    "sft_loss_dft": lambda z, t, ids: sft_loss(z, ids, loss_type="dft"),
}


def rivals(ids):
    """Two of a teacher's ids and their log-probabilities."""
    return torch.stack([ids.clamp(min=0), (ids + 5) % V], -1), -torch.stack([1 + ids % 2, 2 + ids % 3], -1).float()


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", OF_TOKENS)
def test_compiles_of_tokens_that_a_mask_takes(name, dynamic):
    """Their number is known only at run time: one graph serves all masks."""
    torch._dynamo.reset()
    tensors = leaves(torch.float32)
    inputs, teacher = (tensors["hidden"], tensors["weight"]), (torch.randn(B, S, 4), torch.randn(V, 4))
    fn, graphs, counts = OF_TOKENS[name], CompileCounterWithBackend("aot_eager"), set()

    def loss(head, hidden, weight, mask):
        return fn(head(hidden, weight)[mask], head(*teacher)[mask], IDS[mask])

    compiled = torch.compile(functools.partial(loss, LinearLogits), fullgraph=True, dynamic=dynamic, backend=graphs)
    for taken in ([0, 3, 4, 9], [1], range(B * S), [2, 5]):
        mask = torch.zeros(B * S, dtype=torch.bool).index_fill_(0, torch.tensor(taken), True).view(B, S)
        expected = loss(F.linear, *inputs, mask)
        with settings.strict():
            found = compiled(*inputs, mask)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs))
        counts.add(graphs.frame_count)
    assert len(counts) == 1


@pytest.mark.parametrize("name", [name for name in OF_TOKENS if name != "class_probabilities"])
def test_compiles_of_tokens_that_equal_masks_take(name):
    """``z[ids != -100], ids[ids != -100]``: the compiler sees two independent numbers of tokens, as it does for tensors."""
    torch._dynamo.reset()
    tensors = leaves(torch.float32)
    inputs, teacher = (tensors["hidden"], tensors["weight"]), (torch.randn(B, S, 4), torch.randn(V, 4))
    ids = IDS.masked_fill(IDS == 3, -100)

    def loss(head, hidden, weight, ids):
        taken = head(hidden, weight)[ids != -100], head(*teacher)[ids != -100]
        return OF_TOKENS[name](*taken, ids[ids != -100])

    expected = loss(F.linear, *inputs, ids)
    with settings.strict():
        found = torch.compile(functools.partial(loss, LinearLogits), fullgraph=True, backend="aot_eager")(*inputs, ids)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs))


@pytest.mark.parametrize(
    "reshaped", [lambda z: z.view(-1, z.shape[-1]), lambda z: z[None].flatten(0, 1)], ids=["view", "flatten"]
)
def test_compiles_a_new_shape_of_tokens_that_a_mask_takes(reshaped):
    """There are more tokens than ids, so that as many may be taken as there are ids."""
    torch._dynamo.reset()
    h, weight = torch.randn(B, S, H, requires_grad=True), torch.randn(V - 4, H)

    def loss(head, h, mask):
        return F.cross_entropy(reshaped(head(h, weight)[mask]), IDS[mask] % len(weight))

    compiled = torch.compile(functools.partial(loss, LinearLogits), fullgraph=True, backend="aot_eager")
    for taken in (len(weight), 3):
        mask = (torch.arange(B * S) < taken).view(B, S)
        expected = loss(F.linear, h, mask)
        with settings.strict():
            found = compiled(h, mask)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, h), torch.autograd.grad(expected, h))


@pytest.mark.filterwarnings("ignore:.*materialises")
def test_a_compiled_product_has_its_operands_in_their_order():
    torch._dynamo.reset()
    h, w, square = torch.randn(V, H), torch.randn(V, H), torch.randn(V, V)
    compiled = torch.compile(lambda: torch.matmul(LinearLogits(h, w), square), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), h @ w.T @ square)
    operator = torch.compile(lambda: LinearLogits(h, w).softmax(-1) @ square, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"write torch\.matmul"):
        operator()


@pytest.mark.filterwarnings("ignore:.*materialises")
def test_an_exported_product_has_its_operands_in_their_order():
    h, w, square = torch.randn(V, H), torch.randn(V, H), torch.randn(V, V)
    for product in (torch.Tensor.matmul, lambda t, z: t @ z, lambda t, z: z @ t):
        module = nn.Module()
        module.forward = lambda h, product=product: product(square, LinearLogits(h, w))
        exported = torch.export.export(module, (h,), strict=False).module()
        torch.testing.assert_close(exported(h), product(square, h @ w.T))


@pytest.mark.filterwarnings("ignore:.*materialises")
def test_compiles_equality():
    torch._dynamo.reset()
    lazy, eager, _ = make()

    def fn(z):
        return z == 2, z != z.log_softmax(-1), z / 2 == z

    torch.testing.assert_close(torch.compile(fn, fullgraph=True, backend="aot_eager")(lazy), fn(eager))
