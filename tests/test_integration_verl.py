"""verl's fused head and ours give the same numbers, and ours those of the model's own logits: verl 0.9 where installed."""

import contextlib
import functools
import importlib.metadata

import pytest
import torch
import torch.distributed as dist
from ranks import needs_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, ShardingStrategy

pytest.importorskip("verl")
transformers = pytest.importorskip("transformers")
heads = pytest.importorskip("verl.utils.experimental.torch_functional")
dense_common = pytest.importorskip("verl.models.transformers.dense_common")

from fused_losses import strict, workspace  # noqa: E402
from fused_losses.bench.memory import peak_bytes  # noqa: E402
from fused_losses.bench.ranks import run  # noqa: E402
from fused_losses.integrations import verl as integration  # noqa: E402

Theirs, unpatched = heads.FusedLinearForPPO, dense_common.forward_with_torch_backend
T, V, H = 12, 41, 8
IDS = (torch.arange(T) * 5) % V


@pytest.fixture(autouse=True)
def _unapplied():
    yield
    integration.unapply()


def normal(*shape):
    return torch.randn(*shape, requires_grad=True)


def trained(head, *leaves, batch=False, **options):
    """Both outputs and the gradients of a loss that needs both."""
    hidden, weight, *rest = leaves
    view = (3, 4) if batch else (T,)
    names = dict(zip(("bias",), rest, strict=False))
    log_probs, entropy = head(hidden.view(*view, H), weight, IDS.view(view), **names, **options)
    loss = (log_probs * torch.linspace(-1, 2, T).view(view) + entropy * torch.linspace(2, -1, T).view(view)).sum()
    return log_probs, entropy, *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_same_as_verl(temperature, batch):
    leaves = (normal(T, H), normal(V, H))
    ours, theirs = (
        trained(c(), *leaves, batch=batch, temperature=temperature) for c in (integration.FusedLinearForPPO, Theirs)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    cold = trained(Theirs(chunk_size=5), *leaves, batch=batch, temperature=0.3)
    assert not torch.allclose(ours[0], cold[0])


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_side_and_one_output(frozen):
    leaves = [normal(T, H), normal(V, H)]
    leaves[frozen].requires_grad_(False)
    for output in (0, 1):
        results = []
        for head in (integration.FusedLinearForPPO(), Theirs()):
            loss = head(*leaves, IDS, 0.7)[output].sum()
            results.append((loss, torch.autograd.grad(loss, leaves[1 - frozen])[0]))
        torch.testing.assert_close(*results, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}, {"scale": 0.3}, {"softcap": 1.5, "scale": 2.0}], ids=str)
def test_bias_softcap_scale_and_temperature(options):
    leaves = (normal(T, H), normal(V, H), normal(V))

    def plain(hidden, weight, ids, temperature, bias, softcap=None, scale=1.0):
        z = scale * (hidden @ weight.T + bias)
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        logp = (z / temperature).log_softmax(-1)
        return logp.gather(-1, ids[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)

    ours = trained(integration.FusedLinearForPPO(), *leaves, temperature=0.7, **options)
    torch.testing.assert_close(ours, trained(plain, *leaves, temperature=0.7, **options), rtol=1e-4, atol=1e-5)
    assert ours[4].abs().max() > 0.01
    if options:
        assert not torch.allclose(ours[0], trained(plain, *leaves, temperature=0.7)[0])


def test_a_temperature_per_sequence():
    hidden, weight, temperature = normal(3, 4, H), normal(V, H), torch.tensor([[0.5], [1.0], [2.0]])
    log_probs, entropy = integration.FusedLinearForPPO()(hidden, weight, IDS.view(3, 4), temperature)
    for i in range(3):
        expected = Theirs()(hidden[i], weight, IDS.view(3, 4)[i], temperature[i].item())
        torch.testing.assert_close((log_probs[i], entropy[i]), expected, rtol=1e-4, atol=1e-5)


def model(kind, **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.5,
        pad_token_id=0,
        **settings,
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config)


MODELS = {
    "Llama": {},
    "Gemma2": {"final_logit_softcapping": 0.7},
    "Granite": {"logits_scaling": 3.0},
    "Cohere": {"logit_scale": 0.4},
}


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_log_probs_are_those_of_the_models_logits(kind, with_bias):
    policy = model(kind, **MODELS[kind])
    if with_bias:
        policy.lm_head.bias = torch.nn.Parameter(torch.linspace(-2, 2, V))
    ids, rolled = IDS.view(3, 4), IDS.view(3, 4).roll(-1, -1)
    logp = (policy(ids).logits / 0.7).log_softmax(-1)
    expected = logp.gather(-1, rolled[..., None]).squeeze(-1), -(logp.exp() * logp).sum(-1)
    integration.apply()
    found = dense_common.forward_with_torch_backend(policy, input_ids=ids, temperature=0.7, return_dict=True)
    torch.testing.assert_close((found.log_probs, found.entropy), expected, rtol=1e-4, atol=1e-5)
    wanted = [p for p in policy.parameters() if p.requires_grad]
    gradients = (
        torch.autograd.grad((a + 0.3 * b).sin().sum(), wanted) for a, b in (expected, (found.log_probs, found.entropy))
    )
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
    theirs = unpatched(policy, input_ids=ids, temperature=0.7, return_dict=True).log_probs
    assert torch.allclose(theirs, found.log_probs, atol=1e-4) is (kind == "Llama" and not with_bias)


def with_lora(policy, target):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(policy, peft.LoraConfig(target_modules=target, init_lora_weights=False))


def test_lora_on_the_head():
    policy = with_lora(model("Gemma2", **MODELS["Gemma2"]), ["lm_head"]).model
    ids = IDS.view(3, 4)
    integration.apply()
    with pytest.warns(UserWarning, match="the logits are made: the head of Gemma2ForCausalLM"):
        found = dense_common.forward_with_torch_backend(policy, input_ids=ids, temperature=0.7, return_dict=True)
    torch.testing.assert_close((found.log_probs, found.entropy), of_logits(policy, ids), rtol=1e-4, atol=1e-5)


@contextlib.contextmanager
def patched(policy, backend="torch"):
    """Patch the model as verl does, for the length of a ``with``."""
    from verl.models.transformers.monkey_patch import patch_forward_with_backends

    owner = type(policy)
    original = owner.forward
    patch_forward_with_backends(policy, use_fused_kernels=True, fused_kernels_backend=backend)
    try:
        yield
    finally:
        owner.forward = original


@pytest.mark.parametrize("backend", ["torch", "liger"])
def test_verls_own_patch_takes_ours(backend):
    if backend == "liger" and importlib.metadata.version("verl") == "0.9.0":
        pytest.skip("verl 0.9.0 has no such backend")
    integration.apply()
    policy = model("Gemma2", **MODELS["Gemma2"])
    with patched(policy, backend):
        found = policy(input_ids=IDS[None], temperature=1.0, return_dict=True).log_probs
    logp = policy(IDS[None]).logits.log_softmax(-1)
    torch.testing.assert_close(found, logp.gather(-1, IDS.roll(-1)[None, :, None]).squeeze(-1), rtol=1e-4, atol=1e-5)


RANKS, STEPS, B, S = 2, 3, 2, 6
ENGINES = [f"{engine}, {freed}" for engine in ("fsdp", "fsdp2") for freed in ("resharded", "kept")]
TRAINED = {  # a model, and whether its embeddings are tied: FSDP2 shards an untied head by itself
    "Llama": ("Llama", False),
    "Llama, tied": ("Llama", True),
    "Llama, LoRA": ("Llama", False),
    "Gemma2, tied": ("Gemma2", True),
    "Cohere": ("Cohere", False),
}


def prepared(name, engine):
    """A model sharded as verl's engine does it, in fp32."""
    from verl.utils import fsdp_utils

    kind, tied = TRAINED[name]
    policy = model(kind, tie_word_embeddings=tied, **MODELS[kind])
    policy = with_lora(policy, "all-linear") if name.endswith("LoRA") else policy
    if engine is None:
        return policy
    resharded, mesh = engine.endswith("resharded"), init_device_mesh("cpu", (RANKS,))
    if engine.startswith("fsdp2"):
        options = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(torch.float32, torch.float32)}
        fsdp_utils.apply_fsdp2(policy, options | {"reshard_after_forward": resharded}, {})
        return policy
    return FullyShardedDataParallel(
        policy,
        auto_wrap_policy=fsdp_utils.get_fsdp_wrap_policy(policy, is_lora=name.endswith("LoRA")),
        sharding_strategy=ShardingStrategy.FULL_SHARD if resharded else ShardingStrategy.SHARD_GRAD_OP,
        device_id=torch.device("cpu"),
        device_mesh=mesh,
        mixed_precision=MixedPrecision(torch.float32, torch.float32, torch.float32),
    )


def history(name, engine, forward):
    """Gradient norms, log-probs and entropies of a few steps on all ranks' sequences."""
    policy = prepared(name, engine)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    ids = torch.randint(1, V, (STEPS, RANKS * B, S), generator=torch.Generator().manual_seed(1))
    found = []
    for batch in ids if engine is None else ids.chunk(RANKS, 1)[dist.get_rank()]:
        outputs = forward(policy, batch)
        sum(x.sin() * 0.7**i for i, x in enumerate(outputs)).mean().backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in policy.parameters() if p.grad is not None])
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()
        elif engine is not None:
            norm = policy.clip_grad_norm_(1e9)
        optimizer.step()
        optimizer.zero_grad()
        found.append((norm, *(x.detach() if engine is None else gathered(x.detach()) for x in outputs)))
    return found


def gathered(x):
    parts = [torch.empty_like(x) for _ in range(RANKS)]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def fused(policy, ids):
    output = policy(input_ids=ids, temperature=0.7, return_dict=True, use_cache=False)
    return output.log_probs, output.entropy


def of_logits(policy, ids):
    logp = (policy(input_ids=ids).logits / 0.7).log_softmax(-1)
    return logp.gather(-1, ids.roll(-1, -1)[..., None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def work(device):
    found = {}
    for name, (kind, _) in TRAINED.items():
        found[name, None] = history(name, None, of_logits)
        for ours in (True, False):
            if ours:
                integration.apply()
            with patched(model(kind)):
                for engine in ENGINES:
                    try:
                        with strict() if ours else contextlib.nullcontext():
                            found[name, engine, ours] = history(name, engine, fused)
                    except Exception as error:
                        found[name, engine, ours] = repr(error)
            integration.unapply()
    return found


@pytest.fixture(scope="module")
def sharded():
    return functools.cache(lambda: run(work, RANKS)[0])


@needs_ranks
@pytest.mark.xdist_group("integration_verl")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", TRAINED)
def test_trains_sharded_as_with_logits_in_one_process(sharded, name, engine):
    found = sharded()[name, engine, True]
    assert not isinstance(found, str), found
    torch.testing.assert_close(found, sharded()[name, None], rtol=1e-4, atol=1e-4)
    assert found[0][0] > 0
    if name.startswith("Llama"):  # whose head is its weight alone
        theirs = sharded()[name, engine, False]
        if engine.startswith("fsdp2") and "tied" not in name:
            assert "mixed torch.Tensor and DTensor" in theirs  # verl does not gather a head that is sharded by itself
        else:
            torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-4)


def test_no_logits_are_held():
    T, V = 2048, 4096
    hidden, weight, ids = normal(T, H), normal(V, H), torch.arange(T)

    def step(head):
        return lambda: sum(x.sum() for x in head(hidden, weight, ids)).backward()

    with workspace("1MiB"):
        ours = peak_bytes(step(integration.FusedLinearForPPO()))
    theirs = peak_bytes(step(Theirs()))
    print(f"{T} tokens, logits {T * V * 4:,} bytes; verl's own held {theirs:,}, ours {ours:,}")
    assert ours < T * V * 4 < theirs


def test_apply_and_unapply():
    integration.apply()
    integration.apply()
    assert heads.FusedLinearForPPO is integration.FusedLinearForPPO
    assert dense_common.forward_with_torch_backend is not unpatched
    integration.unapply()
    assert heads.FusedLinearForPPO is Theirs
    assert dense_common.forward_with_torch_backend is unpatched


def test_versions(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.10.0")
    with pytest.warns(UserWarning, match=r"verl 0\.10\.0 is untested"):
        integration.apply()
    integration.unapply()

    def missing(name):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match="verl is not installed"):
        integration.apply()
