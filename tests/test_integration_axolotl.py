"""Axolotl's plugin: its hooks on what TRL and PEFT make, and Axolotl 0.19 itself where it is installed."""

import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import grad

import fused_losses
from fused_losses.linear_logits import LinearLogits

transformers = pytest.importorskip("transformers", minversion="5")
peft = pytest.importorskip("peft")
tokenizers = pytest.importorskip("tokenizers")
utils = pytest.importorskip("trl.trainer.utils")

from fused_losses.integrations.axolotl import FusedLossesPlugin  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*untested with fused_losses")
V = 320
needs_axolotl = pytest.mark.skipif(importlib.util.find_spec("axolotl") is None, reason="needs Axolotl")


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return transformers.LlamaForCausalLM(config)


def stored_logits_only(logits, *_):
    """Like Axolotl's kernels, which read the logits through a pointer."""
    raise TypeError(f"{type(logits).__name__} has no storage")


@pytest.fixture
def _kernels_of_axolotl(monkeypatch):
    for name in ("selective_log_softmax", "entropy_from_logits"):
        monkeypatch.setattr(utils, name, stored_logits_only)


@pytest.mark.usefixtures("_kernels_of_axolotl")
def test_trl_gets_functions_that_take_lazy_logits():
    FusedLossesPlugin().pre_model_load(SimpleNamespace(rl="dpo"))
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 7, 16, requires_grad=True), torch.randn(V, 16, requires_grad=True)
    ids = torch.randint(V, (2, 7))
    logp = (hidden @ weight.T).log_softmax(-1)
    expected = logp.gather(-1, ids[..., None]).squeeze(-1)
    with fused_losses.strict():
        logits = LinearLogits(hidden, weight)
        log_probs, entropy = utils.selective_log_softmax(logits, ids), utils.entropy_from_logits(logits, chunk_size=1)
        grads = grad(log_probs.sum(), (hidden, weight))
    torch.testing.assert_close(log_probs, expected)
    torch.testing.assert_close(grads, grad(expected.sum(), (hidden, weight), retain_graph=True), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(entropy, -(logp.exp() * logp).sum(-1))
    torch.testing.assert_close(utils.selective_log_softmax((hidden @ weight.T), ids), expected)  # and for stored logits


@pytest.mark.usefixtures("_kernels_of_axolotl")
def test_without_trl_its_functions_stay():
    FusedLossesPlugin().pre_model_load(SimpleNamespace(rl=None))
    assert utils.selective_log_softmax is stored_logits_only


def test_models_are_applied_to_as_loaded_and_as_trl_wraps_them():
    plugin, model, ids = FusedLossesPlugin(), llama(), torch.arange(12).view(2, 6)
    plugin.post_model_load(None, model)
    with fused_losses.strict():
        assert isinstance(model(input_ids=ids, labels=ids).logits, LinearLogits)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=2))
    plugin.post_trainer_create(None, SimpleNamespace(model=wrapped))
    with fused_losses.strict():
        assert isinstance(wrapped(input_ids=ids, labels=ids).logits, LinearLogits)


def test_a_reference_that_the_trainer_loads_is_applied_to():
    trainer, ids = SimpleNamespace(model=llama(), ref_model=llama()), torch.arange(12).view(2, 6)
    FusedLossesPlugin().post_trainer_create(None, trainer)
    assert isinstance(trainer.ref_model(input_ids=ids, labels=ids).logits, LinearLogits)
    FusedLossesPlugin().post_trainer_create(None, SimpleNamespace(model=llama(), ref_model=None))


# One training, as `axolotl train` runs it; then what it logged and trained.
TRAIN = """
import sys, torch
import axolotl.monkeypatch.trainer.utils as kernels
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets, load_preference_datasets
from axolotl.train import train
from axolotl.cli.args import TrainerCliArgs
import fused_losses

def selective_log_softmax(logits, ids):  # as Axolotl's Triton kernels, which want a GPU
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"{type(logits).__name__} has no storage")
    return logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)

if __name__ == "__main__":
    kernels.selective_log_softmax = selective_log_softmax
    torch.manual_seed(0)
    cfg = load_cfg(sys.argv[1])
    load = load_preference_datasets if cfg.rl else load_datasets
    with fused_losses.strict():
        _, _, trainer = train(cfg=cfg, dataset_meta=load(cfg=cfg, cli_args=TrainerCliArgs()))
    trained = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
    ids = torch.arange(6)[None]
    logits = trainer.model(input_ids=ids, labels=ids).logits
    torch.save((trainer.state.log_history, trained, type(logits).__name__), sys.argv[2])
"""
COMMON = {
    "sequence_len": 512, "micro_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2, "logging_steps": 1,
    "learning_rate": 0.1, "lr_scheduler": "constant", "optimizer": "sgd", "seed": 1, "val_set_size": 0.0,
    "save_strategy": "no", "bf16": False, "fp16": False, "tf32": False, "attn_implementation": "sdpa",
    "dataset_num_proc": 1, "dataloader_num_workers": 0, "dataloader_pin_memory": False,
    "chat_template": "tokenizer_default", "special_tokens": {"pad_token": "<pad>"},
}  # fmt: skip
LORA = {"adapter": "lora", "lora_r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "lora_target_modules": ["q_proj"]}
PAIRS = {"type": "chat_template.default", "field_messages": "messages", "split": "train"}
RUNS = {
    "packed": {"sample_packing": True, "datasets": [{"type": "chat_template"}]},
    "dpo": {"rl": "dpo", "datasets": [PAIRS]},
    "dpo_lora": LORA | {"rl": "dpo", "datasets": [PAIRS]},
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A random Llama, its tokenizer and rows of a dataset, saved."""
    path = tmp_path_factory.mktemp("axolotl")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=V,
        special_tokens=["<s>", "</s>", "<pad>", "<unk>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["user assistant a cat sat there, and a dog ran far away"], trainer)
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(path)
    llama().save_pretrained(path)
    for name, run in RUNS.items():
        rows = []
        for i in range(24):
            asked, said = {"role": "user", "content": f"where sat cat {i}?"}, "there, " * (i % 5 + 1)
            chosen, rejected = ({"role": "assistant", "content": text} for text in (said, said[::-1]))
            pair = {"messages": [asked], "chosen": chosen, "rejected": rejected}
            rows.append(pair if "rl" in run else {"messages": [asked, chosen]})
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "train.py").write_text(TRAIN)
    return path


@needs_axolotl
@pytest.mark.parametrize("name", list(RUNS))
def test_axolotl_trains_the_same_without_logits(name, folder, monkeypatch):
    for variable in ("HF_HUB_OFFLINE", "AXOLOTL_DO_NOT_TRACK"):
        monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    results = []
    for plugins in ([], ["fused_losses.integrations.axolotl.FusedLossesPlugin"]):
        out = folder / f"{name}{len(plugins)}"
        config = COMMON | RUNS[name] | {"base_model": str(folder), "output_dir": str(out), "plugins": plugins}
        config["datasets"] = [
            d | {"path": str(folder / f"{name}.jsonl"), "ds_type": "json"} for d in config["datasets"]
        ]
        config["dataset_prepared_path"] = str(out / "prepared")
        (folder / "run.yaml").write_text(json.dumps(config))
        command = [sys.executable, folder / "train.py", folder / "run.yaml", out.with_suffix(".pt")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        results.append(torch.load(out.with_suffix(".pt"), weights_only=False))
    (logs, trained, kind), (ours, trained_by_us, our_kind) = results
    assert (kind, our_kind) == ("Tensor", "LinearLogits")
    assert len(logs) == len(ours) == 3
    for a, b in zip(logs, ours, strict=True):
        for key in {"loss", "grad_norm", "train_loss"} & a.keys():
            assert b[key] == pytest.approx(a[key], rel=1e-4)
    torch.testing.assert_close(trained_by_us, trained, rtol=1e-4, atol=1e-5)
