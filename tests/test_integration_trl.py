"""TRL's trainers give the same numbers with fused losses and without, and hold no logits: TRL 1.16 where it is installed."""

import gc
import importlib.metadata
import pathlib
import runpy
import warnings

import pytest
import torch

import fused_losses

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from fused_losses.bench.memory import peak_bytes  # noqa: E402
from fused_losses.integrations import patching  # noqa: E402
from fused_losses.integrations import trl as integration  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

TEXT = ["the cat sat on the mat", "a dog ran far away from home", "birds sing at dawn every day", "we read old books"]
ROWS = {
    "prompt": [f"{t} and" for t in TEXT],
    "chosen": [" then it slept well all night", " found a bone", " at noon too, quite loudly", " by the fire"],
    "rejected": [" no", " lost the way back home again", " never", " but not the new ones, we think"],
    "reference": [" fell asleep", " met a cat on the road", " while we listen", " aloud"],
}


@pytest.fixture(autouse=True)
def _unapplied(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "TRL_EXPERIMENTAL_SILENCE"):
        monkeypatch.setenv(name, "1")
    torch.use_deterministic_algorithms(False)
    yield
    integration.unapply()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A random Llama and a tokenizer, saved."""
    path = str(tmp_path_factory.mktemp("tiny"))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<unk>", "<pad>", "<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEXT, *ROWS["chosen"], *ROWS["rejected"]], trainer)
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    llama().save_pretrained(path)
    gc.freeze()  # every run of a trainer collects garbage, which takes half a second when it scans all modules
    yield path
    gc.unfreeze()


def llama(seed=0, **settings):
    settings = {"vocab_size": 320, "hidden_size": 32} | settings
    config = transformers.LlamaConfig(
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
        **settings,
    )
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config)


def arguments(config, folder, **settings):
    return config(
        **{
            "output_dir": f"{folder}/out",
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "report_to": [],
            "save_strategy": "no",
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "seed": 1,
            "gradient_checkpointing": False,
        }
        | settings
    )


def data(*columns):
    return datasets.Dataset.from_dict({name: ROWS[name] for name in columns})


def loaded(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def sft(folder, **settings):
    model, tokenizer = loaded(folder)
    rows = datasets.Dataset.from_dict({"prompt": ROWS["prompt"], "completion": ROWS["chosen"]})
    return trl.SFTTrainer(
        model, arguments(trl.SFTConfig, folder, **settings), train_dataset=rows, processing_class=tokenizer
    )


def dpo(folder, **settings):
    model, tokenizer = loaded(folder)
    return trl.DPOTrainer(
        model,
        ref_model=llama(seed=7),
        args=arguments(trl.DPOConfig, folder, **settings),
        train_dataset=data("prompt", "chosen", "rejected"),
        processing_class=tokenizer,
    )


def kto(folder, **settings):
    model, tokenizer = loaded(folder)
    rows = {
        "prompt": ROWS["prompt"] * 2,
        "completion": ROWS["chosen"] + ROWS["rejected"],
        "label": [True] * 4 + [False] * 4,
    }
    return trl.KTOTrainer(
        model,
        ref_model=llama(seed=7),
        args=arguments(trl.KTOConfig, folder, **settings),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer,
    )


def length_reward(completions, **kwargs):
    return [float(len(set(text))) for text in completions]


ONLINE = {"num_generations": 2, "max_completion_length": 6, "temperature": 0.9}


def grpo(folder, **settings):
    model, tokenizer = loaded(folder)
    args = arguments(trl.GRPOConfig, folder, **ONLINE, **settings)
    return trl.GRPOTrainer(
        model, reward_funcs=length_reward, args=args, train_dataset=data("prompt"), processing_class=tokenizer
    )


def rloo(folder, **settings):
    model, tokenizer = loaded(folder)
    args = arguments(trl.RLOOConfig, folder, **ONLINE, **settings)
    return trl.RLOOTrainer(
        model, reward_funcs=length_reward, args=args, train_dataset=data("prompt"), processing_class=tokenizer
    )


def reward(folder, **settings):
    tokenizer = loaded(folder)[1]
    torch.manual_seed(0)  # for the head of the reward
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    return trl.RewardTrainer(
        model,
        args=arguments(trl.RewardConfig, folder, **settings),
        train_dataset=data("prompt", "chosen", "rejected"),
        processing_class=tokenizer,
    )


def distillation(folder, **settings):
    model, tokenizer = loaded(folder)
    return trl.DistillationTrainer(
        model,
        teacher_model=llama(seed=7, hidden_size=16),
        args=arguments(trl.DistillationConfig, folder, max_completion_length=6, **settings),
        train_dataset=data("prompt"),
        processing_class=tokenizer,
    )


def pairs(trainer, config, folder, **settings):
    model, tokenizer = loaded(folder)
    args = arguments(config, folder, max_length=48, **settings)
    rows = data("prompt", "chosen", "rejected")
    return trainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)


def cpo(folder, **settings):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    return pairs(CPOTrainer, CPOConfig, folder, **settings)


def orpo(folder, **settings):
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return pairs(ORPOTrainer, ORPOConfig, folder, **settings)


def gkd(folder, **settings):
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    model, tokenizer = loaded(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% generation %}{% endgeneration %}{% endfor %}"
    )
    turns = [
        [{"role": "user", "content": p}, {"role": "assistant", "content": c}]
        for p, c in zip(ROWS["prompt"], ROWS["chosen"], strict=True)
    ]
    return GKDTrainer(
        model=model,
        teacher_model=llama(seed=7, hidden_size=16),
        args=arguments(GKDConfig, folder, max_new_tokens=4, **settings),
        train_dataset=datasets.Dataset.from_dict({"messages": turns * 8}),
        processing_class=tokenizer,
    )


def sdft(folder, **settings):
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    return self_distillation(SDFTTrainer, SDFTConfig, folder, **settings)


def sdpo(folder, **settings):
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    return self_distillation(SDPOTrainer, SDPOConfig, folder, reward_funcs=length_reward, **settings)


def self_distillation(trainer, config, folder, reward_funcs=None, **settings):
    model, tokenizer = loaded(folder)
    rows = data("prompt").add_column("privileged_context", ROWS["chosen"])
    return trainer(
        model,
        args=arguments(
            config,
            folder,
            **{"max_completion_length": 6, "num_generations": 2, "distillation_mode": "full_logits"} | settings,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        **({} if reward_funcs is None else {"reward_funcs": reward_funcs}),
    )


def online_dpo(folder, **settings):
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    model, tokenizer = loaded(folder)
    return OnlineDPOTrainer(
        model=model,
        ref_model=llama(seed=7),
        reward_funcs=length_reward,
        args=arguments(OnlineDPOConfig, folder, max_new_tokens=6, **settings),
        train_dataset=data("prompt"),
        processing_class=tokenizer,
    )


def tpo(folder, **settings):
    from trl.experimental.tpo import TPOConfig, TPOTrainer

    model, tokenizer = loaded(folder)
    args = arguments(TPOConfig, folder, max_length=48, **settings)
    rows = data("prompt", "chosen", "rejected", "reference")
    return TPOTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)


def a2po(folder, **settings):
    from trl.experimental.a2po import A2POConfig, A2POTrainer

    model, tokenizer = loaded(folder)
    args = arguments(A2POConfig, folder, max_completion_length=6, num_value_samples=3, beta2=0.1, **settings)
    return A2POTrainer(
        model,
        reward_funcs=lambda completions, **kwargs: [float(len(text) % 2) for text in completions],
        args=args,
        train_dataset=data("prompt"),
        processing_class=tokenizer,
    )


def run(make, folder, **settings):
    trainer = make(folder, **settings)
    torch.manual_seed(0)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


UNCOMPARED = ("runtime", "per_second", "step_time", "time", "mfu", "throughput", "tokens_per")


def assert_same(make, folder, rtol=1e-4, **settings):
    expected = run(make, folder, **settings)
    integration.apply()
    with fused_losses.strict():
        found = run(make, folder, **settings)
    assert_same_history(found, expected, rtol)
    return found


def assert_same_history(found, expected, rtol):
    assert len(found) == len(expected) == 3
    assert any(entry["grad_norm"] > 0 for entry in found)
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if not any(word in name for word in UNCOMPARED):
                torch.testing.assert_close(
                    a[name], b[name], rtol=rtol, atol=rtol / 10, msg=lambda m, n=name: f"{n}: {m}"
                )


DPO_TYPES = ["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"]
DPO_TYPES += ["aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"]
CASES = {
    "sft": (sft, {}),
    "sft dft": (sft, {"loss_type": "dft"}),
    **{f"dpo {t}": (dpo, {"loss_type": [t], "label_smoothing": 0.1}) for t in DPO_TYPES},
    "dpo weighted": (dpo, {"use_weighting": True, "loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0, 0.3]}),
    "kto": (kto, {}),
    "kto apo_zero_unpaired": (kto, {"loss_type": "apo_zero_unpaired"}),
    **{
        f"grpo {t}": (grpo, {"loss_type": t, "beta": 0.1})
        for t in ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")
    },
    "grpo entropy": (grpo, {"top_entropy_quantile": 0.5, "entropy_coef": 0.1, "importance_sampling_level": "sequence"}),
    "rloo": (rloo, {"beta": 0.1}),
    "reward": (reward, {}),
    **{f"distillation {beta}": (distillation, {"beta": beta, "temperature": 0.8}) for beta in (0.0, 0.5, 1.0)},
    **{f"cpo {t}": (cpo, {"loss_type": t}) for t in ("sigmoid", "hinge", "ipo", "simpo", "alphapo")},
    "orpo": (orpo, {}),
    **{f"gkd {beta}": (gkd, {"beta": beta, "lmbda": 0.5, "temperature": 0.8}) for beta in (0.0, 0.5, 1.0)},
    **{f"online_dpo {t}": (online_dpo, {"loss_type": t}) for t in ("sigmoid", "ipo")},
    **{f"tpo {t}": (tpo, {"loss_type": t, "tpo_alpha": 0.5}) for t in ("sigmoid", "hinge", "ipo", "tpo-l")},
    "tpo without gold": (tpo, {"tpo_alpha": 0.0}),
    "a2po": (a2po, {"filter_all_incorrect": False}),
    **{f"sdft {alpha}": (sdft, {"distillation_alpha": alpha}) for alpha in (0.0, 0.3, 1.0)},
    "sdft topk_logits": (sdft, {"distillation_mode": "topk_logits"}),
    "sdft sampled_token": (sdft, {"distillation_mode": "sampled_token", "distillation_alpha": 1.0}),
    "sdpo": (sdpo, {"distillation_weight": 0.5}),
}


@pytest.mark.parametrize("name", CASES)
def test_same_losses_gradient_norms_and_metrics(folder, name):
    make, settings = CASES[name]
    assert_same(make, folder, **settings)


@pytest.mark.parametrize("make", [cpo, orpo, tpo, gkd], ids=lambda f: f.__name__)
def test_same_evaluation(folder, make):
    expected = make(folder).evaluate(make(folder).train_dataset)
    integration.apply()
    with fused_losses.strict():
        found = make(folder).evaluate(make(folder).train_dataset)
    for name in expected.keys() & found.keys():
        if not any(word in name for word in UNCOMPARED):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    assert "eval_loss" in found


@pytest.mark.parametrize("make", [tpo, gkd], ids=lambda f: f.__name__)
def test_predictions_are_real_logits(folder, make):
    trainer = make(folder)
    expected = trainer.predict(trainer.train_dataset)
    integration.apply()
    found = trainer.predict(trainer.train_dataset)
    torch.testing.assert_close(found.predictions, expected.predictions)
    assert found.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], rel=1e-4)


@pytest.mark.parametrize("setting", ["gradient_checkpointing", "gradient_accumulation_steps", "bf16", "peft"])
@pytest.mark.parametrize("make", [orpo, gkd], ids=lambda f: f.__name__)
def test_other_ways_to_train(folder, make, setting, monkeypatch):
    from_pretrained = transformers.AutoModelForCausalLM.from_pretrained

    def adapted(*args, **kwargs):
        torch.manual_seed(0)
        return peft.get_peft_model(from_pretrained(*args, **kwargs), peft.LoraConfig(task_type="CAUSAL_LM"))

    settings = {
        "gradient_checkpointing": {"gradient_checkpointing": True},
        "gradient_accumulation_steps": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        "bf16": {"bf16": True, "rtol": 2e-2},
        "peft": {},
    }
    if setting == "peft":
        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", adapted)
    assert_same(make, folder, **settings[setting])


@pytest.mark.slow
@pytest.mark.parametrize("make", [sft, dpo, kto, grpo, rloo, distillation, cpo, orpo, tpo, gkd, sdft, online_dpo, a2po])
def test_same_when_compiled(folder, make):
    torch._dynamo.reset()
    assert_same(make, folder, torch_compile=True, per_device_train_batch_size=2, rtol=1e-3)


# The two functions of TRL that are replaced, on their own.

N, V, H = 11, 37, 8
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"final_logit_softcapping": 2.0},
    "scale": {"logit_scale": 0.3},
    "all": {"temperature": 0.7, "final_logit_softcapping": 2.0, "logit_scale": 0.3},
}


def normal(*shape):
    return torch.randn(*shape, requires_grad=True)


def values_and_gradients(function, leaves, *args):
    results = [x for x in function(*leaves, *args) if x is not None]
    weights = [torch.linspace(-1, 2, x.numel()).view_as(x) for x in results]
    loss = sum((x * w).sum() for x, w in zip(results, weights, strict=True) if x.requires_grad)
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    return results, torch.autograd.grad(loss, wanted, allow_unused=True)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_log_prob_function(name, bias):
    from trl.trainer.utils import _ChunkedLogProbFunction as Theirs

    options = {"temperature": 1.0, "final_logit_softcapping": None, "logit_scale": 1.0} | OPTIONS[name]
    leaves, targets = (normal(N, H), normal(V, H), normal(V) if bias else None), torch.arange(N)
    args = (options["temperature"], 8, options["final_logit_softcapping"], options["logit_scale"])
    outputs = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

    def results(function, *args):
        return values_and_gradients(lambda *x: function.apply(*x[:3], targets, *x[3:]), leaves, *args, outputs)

    ours = results(integration.ChunkedLogProbFunction, *args)
    torch.testing.assert_close(ours, results(Theirs, *args), rtol=1e-4, atol=1e-5)
    assert [x.requires_grad for x in ours[0]] == [True, True, False, False, False]
    if name != "plain":
        assert not torch.allclose(ours[0][0], results(Theirs, 1.0, 8, None, 1.0)[0][0])
    few = integration.ChunkedLogProbFunction.apply(*leaves, targets, *args, ("is_top1",))
    assert [x is None for x in few] == [False, True, True, True, False]


def test_log_prob_function_casts_a_16_bit_head():
    hidden, weight, targets = normal(N, H), normal(V, H).detach().bfloat16().requires_grad_(), torch.arange(N)
    log_probs = integration.ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 8)[0]
    torch.testing.assert_close(log_probs, (hidden @ weight.float().T).log_softmax(-1)[range(N), range(N)])
    log_probs.sum().backward()
    assert weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", OPTIONS)
def test_divergence_function(name, beta):
    from trl.trainer.distillation_trainer import ChunkedDivergenceFunction as Theirs

    options = {"temperature": 1.0, "final_logit_softcapping": None, "logit_scale": 1.0} | OPTIONS[name]
    leaves = (normal(N, H), normal(V, H), normal(V), normal(N, 5).detach(), normal(V, 5).detach(), normal(V).detach())
    scale, softcap = options["logit_scale"], options["final_logit_softcapping"]
    args = (beta, options["temperature"], scale, softcap, 2 * scale, softcap and 3 * softcap)
    ours = values_and_gradients(integration.ChunkedDivergenceFunction.apply, leaves, *args)
    torch.testing.assert_close(ours, values_and_gradients(Theirs.apply, leaves, *args), rtol=1e-4, atol=1e-5)
    assert not ours[0][1].requires_grad


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
@pytest.mark.parametrize("masked", [False, True])
def test_gkd_loss(reduction, masked):
    from trl.experimental.gkd import GKDTrainer

    student, teacher = normal(2, 5, V), normal(2, 5, V).detach()
    labels = torch.arange(10).view(2, 5).masked_fill(torch.arange(5) < 2, -100) if masked else None

    def loss(*items):
        found = GKDTrainer.generalized_jsd_loss(student, teacher, labels, 0.3, 0.7, reduction, *items)
        return found, torch.autograd.grad(found.sum(), student)

    expected = [loss(), loss(7), loss(torch.tensor(7))]
    integration.apply()
    torch.testing.assert_close([loss(), loss(7), loss(torch.tensor(7))], expected, rtol=1e-4, atol=1e-6)


# The memory that is held, the functions that are put back, and the messages.


def step(trainer):
    """The number of tokens that are projected, and a function that computes one loss and its gradients."""
    model = trainer.model.train()
    if hasattr(trainer, "_forward"):
        ids, mask = torch.randint(4, 320, (4, 24)), torch.ones(4, 24, dtype=torch.long)
        return 4 * 47, lambda: trainer._forward(model, ids, mask, ids, mask).sum().backward()
    if hasattr(trainer, "_get_sequence_logps"):
        ids = torch.randint(4, 320, (4, 48))
        return 4 * 47, lambda: trainer._get_sequence_logps(model, ids, torch.ones_like(ids), 47).sum().backward()
    if hasattr(trainer, "_forward_logits"):
        trainer.current_gradient_accumulation_steps = 1
        ids = torch.randint(4, 320, (32, 48))
        mask, both = torch.ones_like(ids), torch.cat([ids, ids], 1)
        batch = {"prompt_ids": ids, "prompt_mask": mask, "completion_ids": ids, "completion_mask": mask}
        batch |= {"teacher_input_ids": both, "teacher_attention_mask": torch.ones_like(both)}
        return ids.numel(), lambda: trainer.compute_loss(model, batch).backward()
    batch = next(iter(trainer.get_train_dataloader()))
    tokens = sum(batch[k].numel() for k in ("chosen_input_ids", "rejected_input_ids", "input_ids") if k in batch)
    return tokens, lambda: trainer.compute_loss(model, batch).backward()


@pytest.mark.parametrize("make", [cpo, orpo, tpo, gkd, sdft, online_dpo, a2po, sft, dpo], ids=lambda f: f.__name__)
def test_no_logits_are_held(folder, make, monkeypatch):
    rows, vocab = (32, 4096) if make in (gkd, sdft) else (4, 16384)  # a chunk of a divergence has 128 tokens or more

    def wide(*args, original=llama, **settings):
        return original(vocab_size=vocab, hidden_size=8)

    monkeypatch.setitem(globals(), "llama", wide)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", wide)
    own = {"teacher_model_kind": "live"} if make is sdft else {}  # so that no other teacher is loaded
    trainer = make(folder, per_device_train_batch_size=rows, **own)
    tokens, call = step(trainer)
    call()
    without = peak_bytes(call)
    integration.apply()
    with fused_losses.strict(), fused_losses.workspace("1MiB"):
        ours = peak_bytes(call)
    logits = tokens * vocab * 4
    print(f"{make.__name__}: {tokens} tokens, logits {logits:,} bytes; a step held {without:,}, now {ours:,}")
    assert ours < logits
    if make not in (sft, dpo):
        assert without - ours > logits


def test_unapply_gives_back_what_was_there():
    import trl.trainer.distillation_trainer as distillation
    import trl.trainer.utils as utils
    from trl.experimental.cpo import cpo_trainer
    from trl.experimental.gkd import gkd_trainer
    from trl.experimental.online_dpo import OnlineDPOTrainer
    from trl.experimental.orpo import orpo_trainer
    from trl.experimental.sdft import loss_utils, sdft_trainer

    places = [
        (utils, "_ChunkedLogProbFunction"),
        (distillation, "ChunkedDivergenceFunction"),
        (cpo_trainer.CPOTrainer, "concatenated_forward"),
        (cpo_trainer, "selective_log_softmax"),
        (orpo_trainer.ORPOTrainer, "concatenated_forward"),
        (orpo_trainer, "selective_log_softmax"),
        (gkd_trainer.GKDTrainer, "compute_loss"),
        (gkd_trainer.GKDTrainer, "generalized_jsd_loss"),
        (OnlineDPOTrainer, "_forward"),
        (sdft_trainer.SDFTTrainer, "_forward_logits"),
        (loss_utils, "selective_log_softmax"),
    ]
    before = [vars(owner)[name] for owner, name in places]
    integration.apply()
    integration.apply()
    assert all(vars(owner)[name] is not old for (owner, name), old in zip(places, before, strict=True))
    integration.unapply()
    assert all(vars(owner)[name] is old for (owner, name), old in zip(places, before, strict=True))


def test_versions(monkeypatch):
    def installed(version):
        monkeypatch.setattr(importlib.metadata, "version", version)

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        integration.apply()
    integration.unapply()
    installed(lambda name: integration.TESTED)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        integration.apply()
    integration.unapply()
    installed(lambda name: "9.9")
    with pytest.warns(UserWarning, match=r"trl 9\.9 is untested"):
        integration.apply()
    integration.unapply()

    def missing(name):
        raise importlib.metadata.PackageNotFoundError

    installed(missing)
    with pytest.raises(ImportError, match="trl is not installed"):
        integration.apply()
    monkeypatch.undo()
    import trl.trainer.utils as utils
    from trl.trainer.distillation_trainer import ChunkedDivergenceFunction

    monkeypatch.delattr("trl.trainer.distillation_trainer.ChunkedDivergenceFunction")
    before = utils._ChunkedLogProbFunction
    with pytest.raises(AttributeError, match="ChunkedDivergenceFunction"):
        integration.apply()
    assert utils._ChunkedLogProbFunction is before
    assert ChunkedDivergenceFunction is not None
    monkeypatch.undo()
    monkeypatch.delattr("trl.experimental.gkd.gkd_trainer.GKDTrainer.generalized_jsd_loss")  # wrapped last
    with pytest.raises(AttributeError, match="generalized_jsd_loss"):
        integration.apply()
    assert utils._ChunkedLogProbFunction is before


def test_a_head_of_another_kind_keeps_its_logits(folder):
    model = llama()
    model.lm_head = type("Scaled", (torch.nn.Linear,), {"forward": lambda self, x: 2 * x @ self.weight.T})(32, 320)
    ids = torch.arange(4, 12)[None]
    with pytest.warns(UserWarning, match="LlamaForCausalLM"), patching.lazy_logits(model):
        assert isinstance(model(ids).logits, torch.Tensor)


def test_a_head_whose_forward_was_replaced_keeps_it():
    model, ids = llama(), torch.arange(4, 12)[None]
    own = model.lm_head.forward = lambda x: 2 * x @ model.lm_head.weight.T
    with pytest.warns(UserWarning, match="LlamaForCausalLM"), patching.lazy_logits(model):
        assert isinstance(model(ids).logits, torch.Tensor)
    assert model.lm_head.forward is own


def test_a_model_without_a_head_stays_as_it_is(monkeypatch):
    model, ids = llama(), torch.arange(4, 12)[None]
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    with pytest.warns(UserWarning, match="NoneType"), patching.lazy_logits(model):
        assert isinstance(model(ids).logits, torch.Tensor)


def test_no_warning_for_a_linear_head():
    model = llama()
    model.lm_head = fused_losses.LinearHead.from_linear(model.lm_head)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with patching.lazy_logits(model):
            assert isinstance(model(torch.arange(4, 12)[None]).logits, fused_losses.LinearLogits)


def test_no_warning_for_an_adapted_head_that_is_lazy_already():
    from fused_losses.integrations.transformers import apply

    model = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"]))
    apply(model).train()
    with warnings.catch_warnings(), fused_losses.strict():
        warnings.simplefilter("error", UserWarning)
        with patching.lazy_logits(model):
            assert isinstance(model(torch.arange(4, 12)[None]).logits, fused_losses.LinearLogits)


def test_a_lazy_head_is_put_back_and_keeps_a_bias_and_a_softcap():
    config = transformers.Gemma2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=0.5,
    )
    model, ids = transformers.Gemma2ForCausalLM(config), torch.arange(4, 12)[None]
    model.lm_head.bias = torch.nn.Parameter(torch.linspace(-2, 2, 64))
    with patching.lazy_logits(torch.nn.Sequential(model)), fused_losses.strict():
        lazy = model(ids).logits
        assert lazy.module is model.lm_head  # which gathers the weight where it is sharded
        lazy = lazy.log_softmax(-1).gather(-1, ids[..., None])
    logits = model(ids).logits
    assert isinstance(logits, torch.Tensor)
    assert "forward" not in vars(model.lm_head)
    torch.testing.assert_close(lazy, logits.log_softmax(-1).gather(-1, ids[..., None]))


def test_a_forward_that_a_trainer_waits_for_is_told_from_others():
    def of_a_trainer(num_items_in_batch):
        return patching.trainer_drops_logits()

    def of_another(batch):
        return patching.trainer_drops_logits()

    for step in (of_a_trainer, of_another):
        step.__code__ = step.__code__.replace(co_name="training_step")
    assert of_a_trainer(1) is None  # with gradients
    with torch.no_grad():
        assert of_a_trainer(1) is True
        assert of_another(1) is None


def test_the_example_trains(monkeypatch):
    path = pathlib.Path(__file__).parents[1] / "examples/train_with_trl.py"
    with fused_losses.strict():
        found = runpy.run_path(str(path))["main"]()
    monkeypatch.setattr(integration, "apply", lambda: None)
    integration.unapply()
    expected = runpy.run_path(str(path))["main"]()
    for name, losses in expected.items():
        torch.testing.assert_close(found[name], losses, rtol=1e-4, atol=1e-5)
        assert losses[-1] < losses[0]
