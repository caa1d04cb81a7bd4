"""OpenRLHF's actor gives the same log-probs, entropies and gradients without logits: OpenRLHF 0.11 where it is installed.

flash-attn needs a GPU to be installed: stand-ins replace the few of its functions that move tokens about.
"""

import copy
import importlib
import importlib.machinery
import importlib.metadata
import sys
import types

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("openrlhf")
pytest.importorskip("deepspeed")
transformers = pytest.importorskip("transformers")

from fused_losses import modules, strict, workspace  # noqa: E402
from fused_losses.bench.memory import peak_bytes  # noqa: E402
from fused_losses.integrations import openrlhf as integration  # noqa: E402

B, S, V = 3, 9, 320
MASK = (torch.arange(S) < torch.tensor([9, 6, 4])[:, None]).long()
IDS = ((torch.arange(B * S).view(B, S) * 7) % (V - 1) + 1) * MASK
ACTIONS = MASK[:, -4:] * 1


def unpad_input(x, mask):
    lengths = mask.sum(-1, dtype=torch.int32)
    indices = mask.flatten().nonzero().flatten()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return x.flatten(0, 1)[indices], indices, cu_seqlens, int(lengths.max()), lengths


def pad_input(x, indices, batch, seqlen):
    return x.new_zeros(batch * seqlen, *x.shape[1:]).index_copy(0, indices, x).view(batch, seqlen, *x.shape[1:])


class AllGather(torch.autograd.Function):
    """Gather along the first dimension; the gradient includes every rank's use of the whole tensor."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group, ctx.rows = group, len(x)
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.rows * dist.get_rank(ctx.group) :][: ctx.rows], None


def stand_in_for_flash_attn():
    if importlib.util.find_spec("flash_attn") is None:
        for name in ("flash_attn", "flash_attn.bert_padding", "flash_attn.utils", "flash_attn.utils.distributed"):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
        padding = sys.modules["flash_attn.bert_padding"]
        padding.unpad_input, padding.pad_input = unpad_input, pad_input
        padding.index_first_axis, padding.rearrange = lambda x, at: x[at], lambda x, how: x.flatten(0, 1)
        sys.modules["flash_attn.utils.distributed"].all_gather = AllGather.apply


@pytest.fixture(scope="module", autouse=True)
def actors():
    """OpenRLHF's module of actors."""
    stand_in_for_flash_attn()
    try:
        yield pytest.importorskip("openrlhf.models.actor", exc_type=ImportError)
    finally:
        for name in [
            n for n in sys.modules if n.split(".")[0] == "flash_attn" and not hasattr(sys.modules[n], "__file__")
        ]:
            del sys.modules[name]


@pytest.fixture(autouse=True)
def _unapplied():
    with torch.compiler.set_stance("force_eager"):  # OpenRLHF compiles its entropy
        yield
    integration.unapply()


def model(kind="Llama", vocab=V, **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.5,
        pad_token_id=0,
        **({"final_logit_softcapping": 0.7} if kind == "Gemma2" else {}),
        **settings,
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def make_actor(actors, packing=False, temperature=1.0, kind="Llama", vocab=V):
    actor = actors.Actor(model(kind, vocab), temperature=temperature)
    actor.packing_samples = packing
    return actor


def step(actor, **options):
    """The actor's results, and the gradients of a loss of them."""
    with torch.random.fork_rng():
        found = actor(IDS, attention_mask=MASK, **options)
    log_probs, output = found if isinstance(found, tuple) else (found, None)
    loss = (log_probs * torch.linspace(-1, 2, log_probs.numel()).view_as(log_probs)).sum()
    results = [log_probs]
    if options.get("return_entropy"):
        results.append(output.entropy * MASK[:, 1:])
        loss = loss + (results[-1] ** 2).sum()
    return results, torch.autograd.grad(loss, list(actor.parameters()))


CALLS = {
    "actions": {"action_mask": ACTIONS},
    "entropy": {"action_mask": ACTIONS, "return_output": True, "return_entropy": True},
    "log-probs": {"return_logprobs": True},
    "log-probs and output": {"return_logprobs": True, "return_output": True},
}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("kind", ["Llama", "Gemma2"])
@pytest.mark.parametrize("call", CALLS)
def test_same_log_probs_entropies_and_gradients(actors, call, kind, temperature, packing):
    actor = make_actor(actors, packing, temperature, kind)
    expected = step(actor, **CALLS[call])
    integration.apply()
    with strict():
        torch.testing.assert_close(step(actor, **CALLS[call]), expected, rtol=1e-3, atol=1e-4)
    integration.unapply()
    actor.temperature = 0.3
    assert not torch.allclose(step(actor, **CALLS[call])[0][0], expected[0][0])


def test_several_steps_of_training(actors):
    """PPO on the log-probs, with OpenRLHF's loss class and with ours."""
    start, trained = make_actor(actors, temperature=0.8), []
    for ours in (False, True):
        loss_class = modules.PolicyLoss if ours else importlib.import_module("openrlhf.models.loss").PolicyLoss
        actor = copy.deepcopy(start)
        optimizer = torch.optim.SGD(actor.parameters(), lr=0.05)
        if ours:
            integration.apply()
        with torch.no_grad():
            old = actor(IDS, ACTIONS, attention_mask=MASK) - 0.3 * torch.sin(torch.arange(4.0))
        losses = []
        for _ in range(4):
            log_probs = actor(IDS, ACTIONS, attention_mask=MASK)
            loss = loss_class()(log_probs, old, torch.linspace(-1, 2, 12).view(3, 4), ACTIONS)[0]
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(actor.parameters(), 1.0)
            optimizer.step()
            losses.append(torch.stack([loss.detach(), norm]))
        trained.append((torch.stack(losses), *(p.detach() for p in actor.parameters())))
    torch.testing.assert_close(*trained, rtol=1e-4, atol=1e-5)
    assert trained[0][0][0, 0] != trained[0][0][-1, 0]


def test_logits_that_are_asked_for_are_made(actors):
    actor = make_actor(actors, temperature=0.8)
    expected = actor(IDS, attention_mask=MASK, return_output=True, return_entropy=True)
    integration.apply()
    found = actor(IDS, attention_mask=MASK, return_output=True, return_entropy=True)
    assert isinstance(found.logits, torch.Tensor)
    torch.testing.assert_close((found.logits, found.entropy), (expected.logits, expected.entropy))


def test_no_logits_are_held(actors):
    actor, ids = make_actor(actors, vocab=16384), torch.arange(400).view(4, 100) + 1
    mask = torch.ones_like(ids)

    def call():
        actor(ids, mask[:, 50:], attention_mask=mask).sum().backward()

    call()
    theirs = peak_bytes(call)
    integration.apply()
    with strict(), workspace("1MiB"):
        ours = peak_bytes(call)
    logits = ids.numel() * 16384 * 4
    print(f"{ids.numel()} tokens, logits {logits:,} bytes; a step held {theirs:,}, now {ours:,}")
    assert ours < logits < theirs - ours


def test_apply_and_unapply(actors):
    places = [(actors, "log_probs_from_logits"), (actors, "compute_entropy"), (actors.Actor, "forward")]
    before = [getattr(owner, name) for owner, name in places]
    integration.apply()
    integration.apply()
    assert all(getattr(owner, name) is not old for (owner, name), old in zip(places, before, strict=True))
    integration.unapply()
    assert all(getattr(owner, name) is old for (owner, name), old in zip(places, before, strict=True))


def test_versions(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.8.11")
    with pytest.warns(UserWarning, match=r"openrlhf 0\.8\.11 is untested"):
        integration.apply()
    integration.unapply()

    def missing(name):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match="openrlhf is not installed"):
        integration.apply()
