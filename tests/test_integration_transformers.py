"""Models and trainers of transformers, with and without us, on tiny random models: the same numbers, and no logits."""

import copy
import importlib
import importlib.metadata
import pathlib
import pickle
import re
import runpy
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import needs_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard

from fused_losses import settings
from fused_losses.bench import ranks, trainers
from fused_losses.bench.memory import peak_bytes
from fused_losses.linear_logits import LinearLogits

transformers = pytest.importorskip("transformers", minversion="5")
pytest.importorskip("accelerate")
from fused_losses.integrations.transformers import TESTED, apply, unapply  # noqa: E402

V, B, S = 64, 2, 10
TINY = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "output_router_logits": True}
T5 = {
    "vocab_size": V,
    "d_model": 16,
    "d_ff": 32,
    "d_kv": 8,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}
GPT2_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
# The class, its config's settings beyond TINY, and the scale and softcap that the logits must then have.
MODELS = {
    "llama": ("Llama", {}, 1.0, None),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}, 1.0, None),
    "mistral": ("Mistral", {}, 1.0, None),
    "qwen2": ("Qwen2", {}, 1.0, None),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}, 1.0, None),
    "qwen3_moe": ("Qwen3Moe", EXPERTS, 1.0, None),
    "gemma2": ("Gemma2", {"final_logit_softcapping": 0.5}, 1.0, 0.5),
    "gemma2_uncapped": ("Gemma2", {"final_logit_softcapping": None}, 1.0, None),
    "gemma3": ("Gemma3", {"final_logit_softcapping": 0.7}, 1.0, 0.7),
    "granite": ("Granite", {"logits_scaling": 0.4}, 2.5, None),
    "cohere": ("Cohere", {"logit_scale": 3.0}, 3.0, None),
    "cohere2": ("Cohere2", {"logit_scale": 0.25}, 0.25, None),
    "phi_with_a_bias": ("Phi", {}, 1.0, None),
    "gpt2": ("GPT2", {"n_embd": 16, "n_head": 2, "n_layer": 2, **GPT2_DROPOUT}, 1.0, None),
    "t5": ("T5", {"tie_word_embeddings": False}, 1.0, None),
    "bert_with_a_bias": ("Bert", {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}, 1.0, None),
    "modernbert_with_a_bias": ("ModernBert", {"tie_word_embeddings": False}, 1.0, None),
}
CLASSES = {"Gemma3": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel", "T5": "T5ForConditionalGeneration"}
CLASSES |= {"Bert": "BertForMaskedLM", "ModernBert": "ModernBertForMaskedLM"}
IDS = torch.randint(3, V, (B, S), generator=torch.Generator().manual_seed(0))
LABELS = IDS.masked_fill(torch.arange(S) < 3, -100)


def tiny(name="llama", **options):
    family, extra, _, _ = MODELS[name]
    torch.manual_seed(1)
    config = getattr(transformers, "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config")
    model = getattr(transformers, CLASSES.get(family, f"{family}ForCausalLM"))(
        config(**((T5 if family == "T5" else TINY) | extra | options))
    )
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.normal_(std=0.5)
        if head.bias is not None:
            head.bias.normal_()
    return model


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same(eager, lazy):
    torch.testing.assert_close(lazy, eager, rtol=1e-4, atol=2e-5)


def assert_same_step(eager, lazy, step):
    """``step(model)`` gives the same loss and the same gradients for both models, and nothing is materialised."""
    expected = step(eager)
    expected.loss.backward()
    with settings.strict():
        found = step(lazy)
        found.loss.backward()
    assert type(expected.logits) is torch.Tensor
    assert isinstance(found.logits, LinearLogits)
    assert found.logits.shape == expected.logits.shape
    assert_same(expected.loss, found.loss)
    assert_same(expected.logits, found.logits.materialize())
    assert_same(gradients(eager), gradients(lazy))
    assert (
        eager.get_input_embeddings().weight.grad is None or eager.get_input_embeddings().weight.grad.abs().max() > 1e-4
    )
    return found


@pytest.mark.parametrize("name", MODELS)
def test_same_loss_and_gradients(name):
    _, _, scale, softcap = MODELS[name]
    eager = tiny(name)
    lazy = apply(copy.deepcopy(eager))
    found = assert_same_step(eager, lazy, lambda m: m(input_ids=IDS, labels=LABELS))
    assert (found.logits.scale, found.logits.softcap) == (pytest.approx(scale), softcap)
    head = lazy.get_output_embeddings()
    assert head.weight.grad.abs().max() > 1e-3
    assert (head.bias is not None) == ("bias" in name)
    assert (head.weight is lazy.get_input_embeddings().weight) == bool(lazy.config.tie_word_embeddings)


def tiny_of(config_class, model_class):
    """A tiny model of any class, and its loss after ``backward``; None where TINY and EXPERTS do not fit it."""
    latent = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    more = EXPERTS | latent | {"num_local_experts": 4, "n_routed_experts": 4, "is_decoder": True, "d_model": 16}
    few = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "pad_token_id")
    gpt2 = {"n_embd": 16, "n_head": 2, "n_layer": 2}
    few = {name: TINY[name] for name in few} | {"d_model": 16}
    layers = {"layers": 1, "attention_heads": 2, "ffn_dim": 32}
    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in layers.items()}
    for options in (TINY | more | gpt2, few | gpt2, few | T5 | sides):
        try:
            config = config_class(**options)
            with torch.device("meta"):
                size = sum(p.numel() for p in model_class(config).parameters())
            if size < 3e7:
                torch.manual_seed(0)
                model = model_class(config).eval()
                loss = model(input_ids=IDS, labels=LABELS).loss
                loss.backward()
                return model, loss.detach()
        except Exception:  # as many kinds of exception as there are models
            continue
    return None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "refuses", "at_least"),
    [
        ("CAUSAL", {"BertGenerationDecoder"}, 134),
        ("MASKED", set(), 41),
        (
            "SEQ_TO_SEQ_CAUSAL",
            {"FSMTForConditionalGeneration", "SeamlessM4TForTextToText", "SeamlessM4Tv2ForTextToText"},
            15,
        ),
    ],
)
def test_every_class_that_can_be_made_tiny(kind, refuses, at_least):
    from transformers.models.auto import modeling_auto

    ran, refused = set(), set()
    for config_class, model_classes in getattr(modeling_auto, f"MODEL_FOR_{kind}_LM_MAPPING").items():
        model_class = model_classes[0] if isinstance(model_classes, tuple) else model_classes
        made = None if model_class.__name__ in ran else tiny_of(config_class, model_class)
        if made is None:
            continue
        eager, loss = made
        lazy = copy.deepcopy(eager)
        lazy.zero_grad()
        try:
            apply(lazy)
        except TypeError:
            refused.add(model_class.__name__)
            continue
        with settings.strict():
            output = lazy(input_ids=IDS, labels=LABELS)
            output.loss.backward()
        ran.add(model_class.__name__)
        assert isinstance(output.logits, LinearLogits), model_class
        torch.testing.assert_close(output.loss, loss, rtol=1e-4, atol=1e-4, msg=model_class.__name__)
        torch.testing.assert_close(gradients(lazy), gradients(eager), rtol=1e-3, atol=1e-4, msg=model_class.__name__)
    assert refused == refuses
    assert len(ran) >= at_least, sorted(ran)


@pytest.mark.parametrize("case", ["fp32", "bf16", "autocast"])
def test_a_bias_of_the_model_beside_its_head(case):
    torch.manual_seed(1)
    few = {
        f"{side}_{name}": n
        for side in ("encoder", "decoder")
        for name, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
    }
    tokens = {name: value for name, value in TINY.items() if name.endswith("_token_id")} | {"decoder_start_token_id": 0}
    config = transformers.BartConfig(vocab_size=V, d_model=16, dropout=0.0, forced_eos_token_id=None, **few, **tokens)
    eager = transformers.BartForConditionalGeneration(config)
    eager.final_logits_bias.normal_()
    if case == "bf16":
        eager = eager.bfloat16()
    lazy = apply(copy.deepcopy(eager))
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        expected = eager(input_ids=IDS, labels=LABELS)
        if case == "autocast":  # docs/trainers.md, Not covered
            with settings.strict(), pytest.raises(RuntimeError, match="__add__ materialises LinearLogits"):
                lazy(input_ids=IDS, labels=LABELS)
            found = lazy(input_ids=IDS, labels=LABELS)
        else:
            with settings.strict():
                found = lazy(input_ids=IDS, labels=LABELS)
            assert torch.equal(found.logits.bias, eager.final_logits_bias[0])
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if case == "bf16" else {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(found.loss, expected.loss, **tolerance)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [("gemma2", "final_logit_softcapping", 2.0), ("granite", "logits_scaling", 2.0), ("cohere", "logit_scale", 0.5)],
)
def test_scale_and_softcap_change_the_loss(name, option, value):
    losses = [apply(tiny(name, **options))(IDS, labels=LABELS).loss for options in ({}, {option: value})]
    assert (losses[0] - losses[1]).abs() > 0.1


def half_and_entropy(logits, labels, vocab_size, **_):
    """A custom loss: every second token, and a bonus for entropy."""
    logp = F.log_softmax(logits.float(), -1)
    entropy = -(logp.exp() * logp).sum(-1).mean()
    return F.cross_entropy(logits[:, :-1:2].reshape(-1, vocab_size), labels[:, 1::2].reshape(-1)) - 0.1 * entropy


@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(9)},
        {"shift_labels": LABELS.flip(1)},
        {"attention_mask": (torch.arange(S) > 0).long().expand(B, S), "use_cache": False},
        {"logits_to_keep": 4, "labels": LABELS[:, -4:]},
        {"return_dict": False},
    ],
    ids=lambda a: next(iter(a)),
)
def test_arguments_of_the_loss(arguments, custom):
    eager = tiny()
    if custom:
        eager.loss_function = half_and_entropy
    lazy = apply(copy.deepcopy(eager))

    def step(model):
        output = model(**({"input_ids": IDS, "labels": LABELS} | arguments))
        return (
            output
            if arguments.get("return_dict", True)
            else transformers.utils.ModelOutput(loss=output[0], logits=output[1])
        )

    found = assert_same_step(eager, lazy, step)
    assert found.logits.shape[1] == arguments.get("logits_to_keep", S)


def test_a_loss_outside_the_model_trains_without_labels():
    eager = tiny("gemma2")
    lazy = apply(copy.deepcopy(eager))

    def step(model):
        output = model(IDS)
        output.loss = half_and_entropy(output.logits, LABELS, V)
        return output

    assert_same_step(eager.train(), lazy.train(), step)


def test_real_logits_where_no_loss_reads_them():
    eager = tiny("gemma2").eval()
    lazy = apply(copy.deepcopy(eager))
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with settings.strict():  # otherwise equal() would materialise lazy logits
        assert torch.equal(lazy(IDS).logits, eager(IDS).logits)
        for training in (False, True):
            made, expected = (model.train(training).generate(IDS, **options) for model in (lazy, eager))
            assert torch.equal(made.sequences, expected.sequences)
            assert all(map(torch.equal, made.logits, expected.logits))
        with torch.no_grad():
            assert torch.equal(lazy(IDS).logits, eager(IDS).logits)  # in training mode
        cache = lazy(IDS, use_cache=True, labels=LABELS).past_key_values
        assert type(lazy(IDS[:, :1], past_key_values=cache).logits) is torch.Tensor


def test_every_forward_of_a_loop_of_ones_own():
    """As RL loops compute old and reference log-probs."""
    eager = tiny("gemma2").eval()
    lazy = apply(copy.deepcopy(eager), always=True)
    for training in (False, True):
        with torch.no_grad(), settings.strict():
            logits = lazy.train(training)(IDS).logits
            found = logits.log_softmax(-1).gather(-1, IDS[..., None])
        assert isinstance(logits, LinearLogits)
        assert_same(eager(IDS).logits.log_softmax(-1).gather(-1, IDS[..., None]).detach(), found)
        made, expected = (
            model.generate(IDS, max_new_tokens=6, do_sample=True, top_k=5) for model in seeded(lazy, eager)
        )
        assert torch.equal(made, expected)
        made, expected = (model.generate(IDS, max_new_tokens=3, use_cache=False) for model in (lazy, eager))
        assert torch.equal(made, expected)
        cache = lazy(IDS, use_cache=True).past_key_values
        assert type(lazy(IDS[:, :1], past_key_values=cache).logits) is torch.Tensor
    assert type(apply(lazy).eval()(IDS).logits) is torch.Tensor


def seeded(*models):
    for model in models:
        torch.manual_seed(0)
        yield model


def test_labels_in_evaluation():
    eager = tiny("gemma2").eval()
    lazy = apply(copy.deepcopy(eager))
    with torch.no_grad(), settings.strict():
        found = lazy(IDS, labels=LABELS)
    assert isinstance(found.logits, LinearLogits)
    assert_same(eager(IDS, labels=LABELS).loss.detach(), found.loss)
    assert isinstance(lazy(IDS, None, None, None, None, LABELS).logits, LinearLogits)  # by position
    assert type(lazy(IDS, None, None, None, None).logits) is torch.Tensor


def test_the_head_itself_makes_logits():
    lazy, hidden = apply(tiny()), torch.randn(B, S, 16)
    assert type(lazy.lm_head(hidden)) is torch.Tensor
    lazy(IDS, labels=LABELS)
    assert type(lazy.lm_head(hidden)) is torch.Tensor
    with pytest.raises(ValueError, match="target"):
        lazy(IDS, labels=LABELS[:, 1:])
    assert type(lazy.lm_head(hidden)) is torch.Tensor


def test_gradient_checkpointing():
    for reentrant in (False, True):
        eager = tiny("qwen3").train()
        lazy = apply(copy.deepcopy(eager))
        for model in (eager, lazy):
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        assert_same_step(eager, lazy, lambda m: m(input_ids=IDS, labels=LABELS))


def test_compiles_without_a_break():
    eager = tiny("gemma2", num_hidden_layers=1)
    lazy = torch.compile(apply(copy.deepcopy(eager)), fullgraph=True, backend="aot_eager")
    expected, found = eager(input_ids=IDS, labels=LABELS), lazy(input_ids=IDS, labels=LABELS)
    assert isinstance(found.logits, LinearLogits)
    expected.loss.backward()
    found.loss.backward()
    assert_same(expected.loss, found.loss)
    assert_same(gradients(eager), gradients(lazy._orig_mod))


def wrapped_in_ddp(model):
    return nn.parallel.DistributedDataParallel(model)


def sharded(model):
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def head_sharded_by_itself(model):
    fully_shard(model.lm_head)
    return sharded(model)


WRAPPED = [wrapped_in_ddp, sharded, head_sharded_by_itself]


def whole_gradients(model):
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in gradients(model).items()}


@pytest.mark.parametrize("wrap", WRAPPED)
def test_wrapped_after_apply(wrap, one_rank):
    eager = tiny("gemma2", tie_word_embeddings=wrap is not head_sharded_by_itself)
    lazy = apply(copy.deepcopy(eager))
    wrapped = wrap(lazy)
    with settings.strict():
        found = wrapped(input_ids=IDS, labels=LABELS)
        found.loss.backward()
    assert isinstance(found.logits, LinearLogits)
    expected = eager(input_ids=IDS, labels=LABELS)
    expected.loss.backward()
    assert_same(expected.loss, found.loss)
    assert_same(gradients(eager), whole_gradients(lazy))


def of_two_ranks(device):
    rank, found = dist.get_rank(), {}
    for wrap in WRAPPED:
        model = apply(tiny("gemma2", tie_word_embeddings=wrap is not head_sharded_by_itself)).to(device)
        wrapped = wrap(model)
        with settings.strict():
            output = wrapped(input_ids=IDS[rank::2].to(device), labels=LABELS[rank::2].to(device))
            output.loss.backward()
        assert isinstance(output.logits, LinearLogits)
        found[wrap.__name__] = output.loss.detach(), whole_gradients(model)
    return found


@needs_ranks
def test_wrapped_on_two_ranks():
    """Both ranks have as many labels, so that the mean over ranks is that of one process with the whole batch."""
    first, second = ranks.run(of_two_ranks, 2)
    for wrap in WRAPPED:
        eager = tiny("gemma2", tie_word_embeddings=wrap is not head_sharded_by_itself)
        expected = eager(input_ids=IDS, labels=LABELS)
        expected.loss.backward()
        (loss, of_first), (other, of_second) = first[wrap.__name__], second[wrap.__name__]
        assert (loss - other).abs() > 1e-3
        assert_same(expected.loss.detach(), (loss + other) / 2)
        assert_same(gradients(eager), of_first)
        assert_same(gradients(eager), of_second)


# Back again


def test_unapply_restores():
    model, plain = tiny(), tiny()
    attributes = [set(vars(m)) for m in model.modules()]
    assert apply(model) is model
    assert apply(model) is model  # a second call changes nothing
    twin = copy.deepcopy(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert unapply(model) is model
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not model._forward_hooks_always_called
    assert not model._forward_pre_hooks_with_kwargs
    assert torch.equal(model(IDS, labels=LABELS).logits, plain(IDS, labels=LABELS).logits)
    found = twin(IDS, labels=LABELS)  # a copy uses its own head
    assert found.logits.weight.data_ptr() == twin.lm_head.weight.data_ptr() != model.lm_head.weight.data_ptr()
    assert type(unapply(twin)(IDS, labels=LABELS).logits) is torch.Tensor
    unapply(twin)


def test_saves_and_loads_as_before(tmp_path):
    model = apply(tiny())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    assert type(loaded(IDS, labels=LABELS).logits) is torch.Tensor
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())


def test_comes_back_from_a_pickle():
    model = apply(tiny())
    loaded = pickle.loads(pickle.dumps(model))
    found = assert_same_step(tiny(), loaded, lambda m: m(IDS, labels=LABELS))
    assert found.logits.weight.data_ptr() == loaded.lm_head.weight.data_ptr()
    assert type(unapply(loaded)(IDS, labels=LABELS).logits) is torch.Tensor


# Refused


class OwnForward(nn.Linear):
    """A layer with a ``forward`` of its own, as quantised layers have."""

    def forward(self, input):
        return super().forward(input)


def with_head(head):
    model = tiny()
    model.lm_head = head
    return model


def device_mapped():
    model = tiny()
    model.lm_head.forward = model.lm_head.forward
    return model


def tensor_parallel():
    model = tiny()
    model._tp_size = 2
    return model


def patched():
    model = tiny()
    model.forward = lambda **inputs: None
    return model


def quantised():
    weight = nn.Parameter(torch.zeros(V, 16, dtype=torch.float8_e4m3fn), requires_grad=False)
    model = tiny()
    model.lm_head.weight = weight
    return model


def forward_from_elsewhere(self, input_ids=None, labels=None):
    """A ``forward`` as other packages put into a class of transformers."""


forward_from_elsewhere.__module__ = "elsewhere"


class Patched(transformers.LlamaForCausalLM):
    forward = forward_from_elsewhere


REFUSED = {
    "no_language_model": (
        lambda: transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**TINY)),
        "LlamaForSequenceClassification is no language model",
    ),
    "no_labels": (
        lambda: transformers.BertGenerationDecoder(transformers.BertGenerationConfig(**TINY)),
        "BertGenerationDecoder is no language model",
    ),
    "not_of_transformers": (lambda: nn.Linear(2, 3), "Linear is not a model of transformers"),
    "wrapped": (lambda: nn.DataParallel(tiny()), "DataParallel is not a model of transformers"),
    "quantised_layer": (lambda: with_head(OwnForward(16, V)), "the head of LlamaForCausalLM is .*OwnForward"),
    "quantised_weight": (quantised, "the head of LlamaForCausalLM is quantised .*float8.*Leave the head out"),
    "two_layers": (lambda: with_head(nn.Sequential(nn.Linear(16, V))), "torch.nn.modules.container.Sequential"),
    "device_map": (device_mapped, "device_map"),
    "tensor_parallel": (tensor_parallel, "LlamaForCausalLM is split by tensor parallelism"),
    "patched": (patched, "the forward of LlamaForCausalLM was replaced by test_integration_transformers"),
    "patched_class": (
        lambda: Patched(transformers.LlamaConfig(**TINY)),
        "the forward of Patched was replaced by elsewhere",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_by_name(case):
    make, message = REFUSED[case]
    model = make()
    before = [set(vars(m)) for m in model.modules()]
    with pytest.raises(TypeError, match=message):
        apply(model)
    assert [set(vars(m)) for m in model.modules()] == before


def test_refuses_a_model_that_writes_into_its_logits():
    class ChameleonForConditionalGeneration(transformers.LlamaForCausalLM):
        pass

    with pytest.raises(TypeError, match="writes into its logits"):
        apply(ChameleonForConditionalGeneration(transformers.LlamaConfig(**TINY)))


def test_a_head_replaced_afterwards_is_noticed():
    model = apply(tiny())
    model.resize_token_embeddings(V + 8, mean_resizing=False)
    with pytest.raises(RuntimeError, match=r"call apply\(model\) again"):
        model(IDS, labels=LABELS)
    assert apply(model)(IDS, labels=LABELS).logits.shape == (B, S, V + 8)


def test_versions(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.99.1")
    with pytest.warns(UserWarning, match=r"transformers 5\.99\.1 is untested"):
        apply(tiny())

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match="transformers is not installed"):
        apply(tiny())


# PEFT


def adapted(**options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(2)
    model = peft.get_peft_model(tiny("gemma2"), peft.LoraConfig(r=4, lora_alpha=12, task_type="CAUSAL_LM", **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, None),
        ({"target_modules": ["q_proj", "lm_head"]}, 4),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, None),
    ],
    ids=["around", "on_the_head", "head_trained_whole"],
)
def test_lora(options, rank):
    eager = adapted(**options)
    lazy = apply(copy.deepcopy(eager))

    def step(model):
        return model(input_ids=IDS, labels=LABELS)

    found = assert_same_step(eager, lazy, step)
    low_rank = found.logits.low_rank
    assert (low_rank and low_rank[0].shape[-1]) == rank
    trained = [name for name, gradient in gradients(lazy).items() if gradient is not None and gradient.abs().max() > 0]
    assert any("lm_head" in name for name in trained) == ("lm_head" in str(options))
    with eager.disable_adapter(), lazy.disable_adapter(), settings.strict():
        assert_same(step(eager).loss, step(lazy).loss)
        assert (step(lazy).loss - found.loss).abs() > 1e-4
    for model in (eager, lazy):
        model.merge_adapter()
    with settings.strict():
        assert_same(step(eager).loss, step(lazy).loss)
    for model in (eager, lazy):
        model.unmerge_adapter()
        model.eval()
    assert torch.equal(eager(IDS).logits, lazy(IDS).logits)
    assert type(step(unapply(lazy)).logits) is torch.Tensor


def test_lora_of_a_peft_that_calls_forward_past_the_hooks(monkeypatch):
    utils = pytest.importorskip("peft.tuners.tuners_utils")  # as peft 0.18 and 0.20 do
    monkeypatch.setattr(utils.BaseTuner, "forward", lambda self, *args, **kwargs: self.model.forward(*args, **kwargs))
    eager = adapted(target_modules=["q_proj"])
    lazy = apply(copy.deepcopy(eager))
    assert_same_step(eager, lazy, lambda model: model(input_ids=IDS, labels=LABELS))
    lazy.eval()
    assert torch.equal(eager.eval()(IDS).logits, lazy(IDS).logits)
    assert type(unapply(lazy)(input_ids=IDS, labels=LABELS).logits) is torch.Tensor


@pytest.mark.parametrize(("target", "rank"), [("lm_head", 6), ("q_proj", 4)])
def test_several_adapters_of_which_one_is_on_the_head_or_both(target, rank):
    peft = pytest.importorskip("peft")
    eager = adapted(target_modules=["lm_head"])
    eager.add_adapter(
        "other", peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=[target], init_lora_weights=False)
    )
    eager.base_model.set_adapter(["default", "other"])
    found = assert_same_step(eager, apply(copy.deepcopy(eager)), lambda m: m(input_ids=IDS, labels=LABELS))
    assert found.logits.low_rank[0].shape[-1] == rank


def test_a_copy_of_the_head_that_peft_adds_later():
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model = apply(adapted(**options))
    model.add_adapter("reference", peft.LoraConfig(task_type="CAUSAL_LM", **options))  # as TRL does
    model.set_adapter("reference")
    assert type(model(input_ids=IDS, labels=LABELS).logits) is LinearLogits
    apply(model)
    assert type(model(input_ids=IDS, labels=LABELS).logits) is LinearLogits
    unapply(model)
    assert not [m for m in model.modules() if "forward" in vars(m) or "lazy" in vars(m)]


def test_lora_dropout_on_the_head():
    lazy = apply(adapted(target_modules=["lm_head"], lora_dropout=0.5)).train()
    first, second = (lazy(input_ids=IDS, labels=LABELS).loss for _ in range(2))
    assert (first - second).abs() > 1e-4


def test_a_16_bit_head_under_32_bit_adapters():
    eager = adapted(target_modules=["lm_head"])
    for name, parameter in eager.named_parameters():
        if "lora" not in name:
            parameter.data = parameter.data.bfloat16()
    lazy = apply(copy.deepcopy(eager))
    with settings.strict():
        found = lazy(input_ids=IDS, labels=LABELS)
        found.loss.backward()
    expected = eager(input_ids=IDS, labels=LABELS)
    expected.loss.backward()
    torch.testing.assert_close(found.loss.float(), expected.loss.float(), rtol=2e-2, atol=2e-2)
    assert lazy.get_submodule("base_model.model.lm_head.lora_B.default").weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [({"use_dora": True}, "'default' is Dora.*target_modules"), ({"lora_bias": True}, "'default' has lora_bias")],
)
@pytest.mark.filterwarnings("ignore:`lora_bias=True`")
def test_refuses_what_is_no_low_rank_term(options, message):
    with pytest.raises(TypeError, match=message):
        apply(adapted(target_modules=["lm_head"], **options))
    peft, model = pytest.importorskip("peft"), apply(adapted(target_modules=["lm_head"]))  # or added afterwards
    model.add_adapter("default2", peft.LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM", **options))
    model.set_adapter("default2")
    with pytest.raises(TypeError, match=message.replace("default", "default2")):
        model(input_ids=IDS, labels=LABELS)


def test_refuses_other_adapters_on_the_head():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny(), peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]))
    with pytest.raises(TypeError, match=r"peft\.tuners\.ia3\.layer\.Linear"):
        apply(model)


def test_adapters_put_on_the_head_afterwards_are_noticed():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(apply(tiny()), peft.LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"))
    with pytest.raises(RuntimeError, match=r"call apply\(model\) again"):
        model(input_ids=IDS, labels=LABELS)


# Trainer

DATA = [
    {"input_ids": ids, "labels": ids}
    for ids in torch.randint(3, V, (24, 12), generator=torch.Generator().manual_seed(1))
]


def weighted(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].reshape(-1, V)
    losses = F.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="none")
    return (losses * torch.linspace(0.5, 1.5, losses.numel())).sum() / (num_items_in_batch or losses.numel())


def accuracy(prediction):
    logits, labels = prediction.predictions, prediction.label_ids
    kept = logits.argmax(-1) if logits.ndim == 3 else logits
    return {"accuracy": (kept[:, :-1] == labels[:, 1:]).mean(), "sum": float(abs(logits).sum())}


def trainer_of(model, folder, options=None, **trainer):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        seed=1,
        disable_tqdm=True,
        **(options or {}),
    )
    return transformers.Trainer(model=model, args=arguments, train_dataset=DATA, eval_dataset=DATA[:5], **trainer)


def run(model, folder, options=None, **trainer):
    made = []
    hook = model.get_output_embeddings().register_forward_hook(lambda *a: made.append(type(a[-1])))
    trainer = trainer_of(model, folder, options, **trainer)
    trainer.train()
    in_training = len(made)
    metrics = trainer.evaluate()
    hook.remove()
    logs = [entry[key] for entry in trainer.state.log_history for key in ("loss", "grad_norm") if key in entry]
    logs += [metrics[key] for key in sorted(metrics) if key in ("eval_loss", "eval_accuracy", "eval_sum")]
    return torch.tensor(logs), set(made[:in_training]), set(made[in_training:]), trainer


TRAINERS = {
    "plain": {},
    "checkpointing": {"options": {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}},
    "smoothing": {"options": {"label_smoothing_factor": 0.2}},
    "compute_loss_func": {"compute_loss_func": weighted},
    "bf16": {"options": {"bf16": True}},
    "compute_metrics": {"compute_metrics": accuracy},
    "smoothing_with_metrics": {"options": {"label_smoothing_factor": 0.2}, "compute_metrics": accuracy},
    "argmax_before_metrics": {
        "compute_metrics": accuracy,
        "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
    },
}


@pytest.mark.parametrize("case", TRAINERS)
def test_trainer(case, tmp_path):
    options = TRAINERS[case]
    eager, lazy = tiny("gemma2"), apply(tiny("gemma2"))
    expected = run(eager, tmp_path, **options)
    with settings.strict():
        found = run(lazy, tmp_path, **options)
    assert expected[1] == {torch.Tensor}
    assert found[1] == {LinearLogits}
    assert found[2] == {torch.Tensor if "compute_metrics" in options else LinearLogits}
    # In bf16 the gradients of later steps differ as much from each other as each from those in fp32.
    kept, tolerance = ([0, 1, 2, 4, 6], 2e-2) if case == "bf16" else (range(len(expected[0])), 1e-3)
    torch.testing.assert_close(found[0][kept], expected[0][kept], rtol=tolerance, atol=tolerance)
    assert len(found[0]) == 3 * 2 + (3 if "compute_metrics" in options else 1)
    if case != "bf16":
        torch.testing.assert_close(lazy.state_dict(), eager.state_dict(), rtol=1e-3, atol=1e-4)
    assert not torch.equal(lazy.lm_head.weight, tiny("gemma2").lm_head.weight)
    if case == "compute_metrics":
        predicted = [r[3].predict(DATA[:5]).predictions for r in (expected, found)]
        assert predicted[1].shape == (5, 12, V)
        torch.testing.assert_close(*predicted, rtol=1e-2, atol=1e-3)


def test_a_compiled_model_that_was_not_trained(tmp_path):
    """After training, ``Trainer`` would evaluate the model that is not compiled."""
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    trainers = [trainer_of(m, tmp_path, options, compute_metrics=accuracy) for m in (tiny(), apply(tiny()))]
    for data in (DATA[:4], DATA[:5]):
        expected, found = (trainer.predict(data) for trainer in trainers)
        torch.testing.assert_close(found.predictions, expected.predictions, rtol=1e-4, atol=1e-5)
        assert found.metrics["test_sum"] == pytest.approx(expected.metrics["test_sum"], rel=1e-4)
    trainers[1].compute_metrics = None
    assert trainers[1].evaluate()["eval_loss"] == pytest.approx(trainers[0].evaluate()["eval_loss"], rel=1e-4)


class OnPolicy(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        options = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "repetition_penalty": 1.2}
        made = model.generate(inputs["input_ids"], output_logits=True, return_dict_in_generate=True, **options)
        self.kinds = {type(logits) for logits in made.logits}
        output = model(input_ids=made.sequences, labels=made.sequences)
        self.kind = type(output.logits)
        return (output.loss, output) if return_outputs else output.loss


def test_a_loss_that_generates_in_evaluation(tmp_path):
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    trainers = [OnPolicy(m, arguments, eval_dataset=DATA[:2]) for m in (tiny("gemma2"), apply(tiny("gemma2")))]
    with settings.strict():
        expected, found = (torch.tensor(trainer.evaluate()["eval_loss"]) for trainer in trainers)
    assert_same(expected, found)
    assert trainers[1].kinds == {torch.Tensor}
    assert trainers[1].kind is LinearLogits


class WithReference(transformers.Trainer):
    """Like the DPO trainers of other libraries: a reference model runs without labels and without gradients."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids = inputs["input_ids"]
        with torch.no_grad():
            reference = self.reference.eval()(ids).logits
            again = model(ids).logits if self.args.bf16 else None
            made = self.reference.generate(ids, max_new_tokens=2, output_logits=True, return_dict_in_generate=True)
        logits = model(input_ids=ids).logits
        self.kinds = [type(x) for x in (reference, again, logits, made.logits[0])]
        wanted, kept = (x.log_softmax(-1).gather(-1, ids[..., None]) for x in (logits, reference))
        if again is not None:
            self.same = bool((again.log_softmax(-1).gather(-1, ids[..., None]) == wanted).all())
        return -F.logsigmoid(wanted - kept).mean()


@pytest.mark.parametrize("bf16", [False, True])
def test_a_reference_that_answers_in_a_training_step(tmp_path, bf16):
    arguments = {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True, "disable_tqdm": True, "bf16": bf16}
    arguments |= {"max_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, "save_strategy": "no"}
    found = []
    for change in (lambda model: model, apply):
        trainer = WithReference(change(tiny()), transformers.TrainingArguments(**arguments), train_dataset=DATA)
        trainer.reference = change(tiny())
        with settings.strict():
            trainer.train()
        found.append(torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
    torch.testing.assert_close(*found, rtol=2e-2 if bf16 else 1e-4, atol=0)
    policy = LinearLogits if bf16 else type(None)
    assert trainer.kinds == [LinearLogits, policy, LinearLogits, torch.Tensor]
    assert not bf16 or trainer.same
    assert type(trainer.reference(IDS).logits) is torch.Tensor


def test_trainer_options_change_the_loss(tmp_path):
    losses = [
        run(apply(tiny()), tmp_path, **TRAINERS[case])[0][0] for case in ("plain", "smoothing", "compute_loss_func")
    ]
    assert len({round(float(loss), 3) for loss in losses}) == 3


# Memory


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite"])
def test_a_step_holds_at_least_the_logits_less(name):
    vocab, batch, length = 32768, 2, 128  # the logits hold many tiles
    ids = torch.randint(3, vocab, (batch, length))
    model = tiny(name, vocab_size=vocab, max_position_embeddings=length)

    def train():
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()

    def evaluate():
        with torch.no_grad():
            return model(input_ids=ids, labels=ids).loss

    for step in (train, evaluate):
        unapply(model)
        step()
        before = peak_bytes(step)
        apply(model)
        with settings.workspace("256KiB"):
            after = peak_bytes(step)
        assert before - after >= batch * length * vocab * 4


@pytest.mark.parametrize(
    ("rows", "packages"),
    [(6, ["transformers"]), (9, ["trl", "datasets"]), (1, ["verl"]), (1, ["openrlhf", "deepspeed", "pylatexenc"])],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_the_command_that_counts_before_and_after(rows, packages):
    for package in packages:
        pytest.importorskip(package)
    command = [sys.executable, "-m", "fused_losses.bench.trainers", packages[0]]
    small = ["--tokens", "256", "--vocab", "8192", "--workspace", "1MiB"]
    done = subprocess.run(command + small, capture_output=True, text=True, cwd=pathlib.Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    table = [[int(size) for size in re.findall(r"(\d+) MiB", line)] for line in done.stdout.splitlines()]
    counted = [sizes[len(sizes) % 2 :] for sizes in table if sizes]  # transformers' table has the logits first
    assert len(counted) == rows
    for sizes in counted:
        for before, after in zip(sizes[::2], sizes[1::2], strict=True):
            assert 0 < after < before


@pytest.mark.parametrize("library", ["transformers", "trl", "verl", "openrlhf"])
def test_the_command_names_a_missing_library(library, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", missing)
    tested = importlib.import_module(f"fused_losses.integrations.{library}").TESTED
    with pytest.raises(SystemExit, match=f"^{library} is not installed: .*{library}=={tested}"):
        trainers.main([library])


def test_the_example(capsys):
    example = pathlib.Path(__file__).parents[1] / "examples" / "train_with_transformers.py"
    with settings.strict():
        runpy.run_path(str(example), run_name="__main__")
    out = capsys.readouterr().out
    assert float(out.partition("evaluation loss ")[2].split()[0]) < 0.1
    assert "[48, 49, 50, 51]" in out


PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "trainers.md").read_text(encoding="utf-8")


def by_hand(model):
    """Replace the head as the page does."""
    section = PAGE.partition("\n## `LinearHead` or `apply`?\n")[2].partition("\n## ")[0]
    exec(section.partition("```python\n")[2].partition("```")[0], {"model": model})
    return model


def test_a_head_replaced_by_hand():
    model = tiny()
    parameters, state = list(model.parameters()), torch.random.get_rng_state()
    by_hand(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert_same_step(tiny(), model, lambda m: m(input_ids=IDS, labels=LABELS))
    model.resize_token_embeddings(V + 8, mean_resizing=False)
    assert type(model.lm_head) is nn.Linear
    assert isinstance(by_hand(model)(IDS, labels=LABELS).logits, LinearLogits)


def test_what_a_head_replaced_by_hand_cannot_do(tmp_path):
    message = re.search(r"raise `(Unsupported types) … (passed to _pad_across_processes)`", PAGE)
    message = f"{message[1]} .*LinearLogits.* {message[2].replace('_pad', '`_pad')}"
    with pytest.raises(TypeError, match=message):
        run(by_hand(tiny("gemma2")), tmp_path, compute_metrics=accuracy)
    with pytest.raises(TypeError, match=message):
        trainer_of(by_hand(tiny("gemma2")), tmp_path).predict(DATA[:5])
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["lm_head"])
    model = peft.get_peft_model(by_hand(tiny()), config)
    with settings.strict(), pytest.raises(RuntimeError, match="__add__ materialises"):
        model(input_ids=IDS, labels=LABELS)


def test_how_the_page_looks_at_it(capsys):
    section = PAGE.partition("\n## How do I know that it worked?\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 2
    exec(blocks[0], {"model": apply(tiny()), "ids": IDS})
    pytest.importorskip("trl")
    trl = importlib.import_module("fused_losses.integrations.trl")
    try:
        exec(blocks[1], {})
    finally:
        trl.unapply()
    assert capsys.readouterr().out.splitlines() == re.findall(r"^print\(.*\)  # (.*)$", section, re.MULTILINE)


def test_the_page_calls_what_exists():
    section = PAGE.partition("\n## transformers\n")[2].partition("\n## ")[0]
    names = {"model": tiny()}
    exec(section.partition("```python\n")[2].partition("```")[0], names)
    assert isinstance(names["model"](IDS, labels=LABELS).logits, LinearLogits)
    assert f"Tested with transformers {TESTED}" in section
