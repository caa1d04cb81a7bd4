"""LinearHead, and the weight it gathers."""

import pytest
import torch
import torch.nn.functional as F
from lazy_logits import FEW, IDS, NUMBERS, PICK, TEMPERATURE, B, H, S, V, numbers
from torch import nn

from fused_losses.distillation import distillation_loss, teacher_topk
from fused_losses.divergence import divergence
from fused_losses.linear_head import LinearHead
from fused_losses.linear_logits import LinearLogits
from fused_losses.reference.linear_logits import linear_logits
from fused_losses.token_loss import token_loss


def test_head_is_a_linear_layer():
    linear = nn.Linear(H, V)
    head = LinearHead.from_linear(linear, scale=0.5, softcap=2.0)
    assert head.weight is linear.weight
    assert head.bias is linear.bias
    assert isinstance(head, nn.Linear)
    hidden = torch.randn(B, S, H)
    logits = head(hidden, temperature=TEMPERATURE)
    assert logits.module is head
    expected = linear_logits(
        hidden, linear.weight, linear.bias, scale=0.5, softcap=2.0, temperature=TEMPERATURE.float()
    )
    torch.testing.assert_close(logits.materialize(), expected)
    other = LinearHead(H, V)
    other.load_state_dict(linear.state_dict())
    assert torch.equal(other.weight, linear.weight)
    assert LinearHead.from_linear(nn.Linear(H, V, bias=False)).bias is None


def test_head_with_a_lora_update():
    head = LinearHead(H, V, rank=2, alpha=4.0)
    head.weight.requires_grad_(False)
    hidden = torch.randn(B, S, H)
    torch.testing.assert_close(head(hidden).materialize(), F.linear(hidden, head.weight, head.bias))
    nn.init.normal_(head.lora_B)
    expected = F.linear(hidden, head.weight + 2.0 * head.lora_B @ head.lora_A, head.bias)
    torch.testing.assert_close(head(hidden).materialize(), expected)
    ours, theirs = (
        torch.autograd.grad(F.cross_entropy(z.view(-1, V), IDS.view(-1)), (head.lora_A, head.lora_B))
        for z in (head(hidden), expected)
    )
    torch.testing.assert_close(ours, theirs)
    dropping = LinearHead(H, V, rank=2, dropout=0.5)
    nn.init.normal_(dropping.lora_B)
    assert not torch.equal(dropping(hidden).materialize(), dropping(hidden).materialize())
    dropping.eval()
    assert torch.equal(dropping(hidden).materialize(), dropping(hidden).materialize())


def test_head_owns_its_options():
    hidden = torch.randn(B, S, H)
    linear = nn.Linear(H, V)
    plain = LinearHead.from_linear(linear)(hidden).logsumexp(-1)
    for option, value in {"scale": 0.5, "softcap": 1.0}.items():
        other = LinearHead.from_linear(linear, **{option: value})
        assert not torch.allclose(other(hidden).logsumexp(-1), plain)


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Adapter(nn.Module):
    """Like PEFT's: not an nn.Linear, but with the attributes of one."""

    in_features, out_features = H, V

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(V, H)), None


def hooked():
    linear = nn.Linear(H, V)
    linear.forward = lambda input: 2 * nn.Linear.forward(linear, input)
    return linear


@pytest.mark.parametrize("make", [lambda: Doubled(H, V), lambda: LinearHead(H, V, softcap=1.0), Adapter, hooked])
def test_a_head_is_made_from_nothing_but_a_linear_layer(make):
    adapter = r"the head itself, got test_linear_head\.Adapter: merge an adapter first, or put one beside .* add_update"
    with pytest.raises(TypeError, match=f"forward or weight is its own|{adapter}"):
        LinearHead.from_linear(make())


def test_a_head_loses_nothing_of_the_linear_layer():
    linear = nn.Linear(H, V).eval()
    assert not LinearHead.from_linear(linear).training
    linear.register_forward_hook(lambda module, args, output: torch.ones_like(output))
    with pytest.raises(TypeError, match="hooks of Linear"):
        LinearHead.from_linear(linear)
    with pytest.raises(TypeError, match="a parametrisation removed"):
        LinearHead.from_linear(nn.utils.parametrizations.weight_norm(nn.Linear(H, V)))


def test_a_head_shows_its_options():
    head = LinearHead(H, V, bias=False, softcap=30.0, rank=2)
    assert repr(head) == f"LinearHead(in_features={H}, out_features={V}, bias=False, softcap=30.0, rank=2)"
    head.add_update(0)
    assert "rank" not in repr(head)


class Sharded(nn.Module):
    """What FSDP2 does to a module, in one process: the weight's storage is empty except between unshard and reshard."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(V, H, generator=torch.Generator().manual_seed(1)))
        self.whole = self.weight.detach().clone()
        self.calls = []

    def unshard(self):
        self.calls.append("unshard")
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(self.weight):
            self.weight.untyped_storage().resize_(self.whole.nbytes)
            self.weight.copy_(self.whole)

    def reshard(self):
        self.calls.append("reshard")
        self.weight.untyped_storage().resize_(0)


GATHERED = [
    "cross_entropy",
    "log_prob",
    "gather",
    "label_smoother",
    "entropy",
    "one_entry",
    "topk",
    "argmax",
    "log_prob_by_rows",
]


@pytest.mark.parametrize("name", GATHERED)
def test_the_weight_is_gathered_in_forward_and_in_backward(name):
    module = Sharded()
    hidden = torch.randn(B, S, H, requires_grad=True)
    logits = LinearLogits(hidden, module.weight, module=module)
    module.reshard()
    found = numbers(NUMBERS[name](logits))[0]
    assert module.weight.untyped_storage().size() == 0
    assert module.calls.count("unshard") == module.calls.count("reshard") - 1 > 0
    if not found.requires_grad:
        return
    found.sum().backward()
    # In backward, FSDP2 itself reshards, after it has reduced the gradient. The weight's row for one entry is a copy.
    assert module.calls[-1] == ("reshard" if name == "one_entry" else "unshard")
    same, weight = hidden.detach().requires_grad_(), module.whole.clone().requires_grad_()
    numbers(NUMBERS[name](linear_logits(same, weight)))[0].sum().backward()
    torch.testing.assert_close(hidden.grad, same.grad)
    torch.testing.assert_close(module.weight.grad, weight.grad)


@pytest.mark.parametrize("fn", [lambda z: z[..., 2:], lambda z: z[..., PICK], lambda z: (z + 1).float()])
def test_gathered_rows_and_materialised_logits(fn):
    module = Sharded()
    hidden = torch.randn(B, S, H, requires_grad=True)
    logits = LinearLogits(hidden, module.weight, module=module)
    module.reshard()
    found = fn(logits).materialize()
    found.square().sum().backward()
    same, weight = hidden.detach().requires_grad_(), module.whole.clone().requires_grad_()
    fn(linear_logits(same, weight)).square().sum().backward()
    torch.testing.assert_close(hidden.grad, same.grad)
    torch.testing.assert_close(module.weight.grad, weight.grad)


def test_a_whole_weight_is_not_gathered():
    module = Sharded()
    logits = LinearLogits(torch.randn(B, S, H, requires_grad=True), module.weight, module=module)
    logits.logsumexp(-1).sum().backward()
    assert "reshard" not in module.calls


def test_an_empty_weight_without_module_raises():
    module = Sharded()
    logits = LinearLogits(torch.randn(B, S, H), module.weight)
    module.reshard()
    for use in (
        lambda: logits.logsumexp(-1),
        lambda: logits.materialize(),
        lambda: logits.argmax(-1),
        lambda: logits[..., 1:],
    ):
        with pytest.raises(RuntimeError, match="module="):
            use()


@pytest.mark.parametrize("frozen", [False, True])
def test_zero3_parameters_are_gathered(monkeypatch, frozen):
    """DeepSpeed swaps ``parameter.data`` for an empty tensor outside GatheredParameters."""
    import sys
    import types

    module = nn.Linear(H, V, bias=False)
    module.weight.ds_id = 0  # by which DeepSpeed knows it
    whole = module.weight.data.clone()
    log = []

    class GatheredParameters:
        def __init__(self, parameters):
            (self.parameter,) = parameters

        def __enter__(self):
            log.append("gather")
            self.parameter.data = whole.clone()

        def __exit__(self, *_):
            log.append("partition")
            self.parameter.data = torch.empty(0)

    fake = types.SimpleNamespace(zero=types.SimpleNamespace(GatheredParameters=GatheredParameters))
    monkeypatch.setitem(sys.modules, "deepspeed", fake)
    hidden = torch.randn(B, S, H, requires_grad=not frozen)
    if not frozen:
        hidden = hidden * 1.0
        hidden.retain_grad()
        hidden.grad_fn.register_prehook(lambda _: log.append("below"))
    logits = LinearLogits(hidden, module.weight, module=module)
    module.weight.data = torch.empty(0)
    assert logits.shape == (B, S, V)
    loss = F.log_softmax(logits, -1).gather(-1, FEW).sum()
    assert log == ["gather", "partition"]
    loss.backward()
    assert log == ["gather", "partition"] * 2 + ["below"] * (not frozen)  # partitioned as soon as its gradient stands
    weight, same = whole.requires_grad_(), hidden.detach().requires_grad_()
    F.log_softmax(same @ weight.T, -1).gather(-1, FEW).sum().backward()
    if not frozen:
        torch.testing.assert_close(hidden.grad, same.grad)
    torch.testing.assert_close(module.weight.grad, weight.grad)

    logits = LinearLogits(hidden.detach(), whole, module=module)  # what follows reads the weight's shape
    for use in (
        lambda z: F.log_softmax(z, -1).gather(-1, FEW),
        lambda z: z.logsumexp(-1),
        lambda z: token_loss(lambda s: -s.log_probs, z, FEW[..., 0])[0],
        lambda z: divergence(z, torch.zeros(B, S, V)),
        lambda z: divergence(torch.zeros(B, S, V), z),
        lambda z: teacher_topk(z, 2).log_probs,
    ):
        expected = use(logits)
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                module.weight.data = whole.detach().clone()
                again = LinearLogits(hidden.detach(), module.weight, module=module)
                module.weight.data = torch.empty(0)
                torch.testing.assert_close(use(again), expected)
    log.clear()
    distillation_loss(torch.zeros(B, S, V, requires_grad=True), again, FEW[..., 0]).backward()
    assert log == ["gather", "partition"]  # the gradients of a sum were made in forward, and a teacher has none
