"""Trainers in two processes, under DDP, FSDP2 and ZeRO-3: losses, gradient norms and metrics as without fused losses."""

import contextlib
import importlib.util
import os
import warnings

import pytest
import torch
from ranks import needs_ranks

from fused_losses import strict
from fused_losses.bench.ranks import run

pytest.importorskip("trl")
pytest.importorskip("peft")
import test_integration_trl as single
from test_integration_trl import folder  # noqa: F401

pytestmark = [needs_ranks, pytest.mark.xdist_group("integration_distributed"), pytest.mark.filterwarnings("ignore")]
RANKS = 2
ZERO3 = {"stage": 3, "stage3_param_persistence_threshold": 0, "overlap_comm": False, "contiguous_gradients": False}
AUTO = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
ENGINES = {
    "MULTI_CPU": {},  # DDP
    "FSDP": {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}},
    "DEEPSPEED": {"deepspeed": {"zero_optimization": ZERO3, **dict.fromkeys(AUTO, "auto")}, "optim": "sgd"},
}
LORA = {"lora_on_head": ["q_proj", "lm_head"], "lora_on_head_alone": ["lm_head"]}
TRANSFORMERS = ("labels", "label_smoothing", "compute_loss_func", "bf16", *LORA)
TRL = ("sft", "dpo", "kto", "grpo", "rloo", "distillation", "cpo", "orpo", "tpo", "gkd", "sdft", "online_dpo", "a2po")
CASES = dict.fromkeys(ENGINES, (*TRANSFORMERS, *TRL))
CASES["MULTI_CPU"] = (*TRANSFORMERS, "dpo", "gkd")  # DDP leaves every weight whole
CASES["DEEPSPEED"] = tuple(name for name in CASES["DEEPSPEED"] if name != "a2po")  # which TRL refuses under ZeRO-3


def mean_of_log_probs(outputs, labels, num_items_in_batch=None):
    return -outputs.logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:, None]).mean()


def trainer_of(name, path, **settings):
    """TRL's trainer of this name, or transformers' trainer with this option."""
    settings["per_device_train_batch_size"] = 2
    if name in TRL:
        return getattr(single, name)(path, **settings)
    model, tokenizer = single.loaded(path)
    ids = [tokenizer(f"{text} and more of it")["input_ids"][:6] for text in single.TEXT] * 3
    if name == "label_smoothing":
        settings["label_smoothing_factor"] = 0.1
    if name in LORA:
        torch.manual_seed(0)
        adapter = single.peft.LoraConfig(r=4, target_modules=LORA[name], init_lora_weights=False)
        model = single.peft.get_peft_model(model, adapter)
    return single.transformers.Trainer(
        model,
        single.arguments(single.transformers.TrainingArguments, path, **{**settings, "bf16": name == "bf16"}),
        train_dataset=single.datasets.Dataset.from_dict({"input_ids": ids, "labels": ids}),
        compute_loss_func=mean_of_log_probs if name == "compute_loss_func" else None,
    )


def history(name, path, engine, fused):
    from accelerate.state import AcceleratorState

    from fused_losses.integrations import transformers

    AcceleratorState._reset_state(reset_partial_state=True)
    if fused and name in TRL:
        single.integration.apply()
    trainer = trainer_of(name, path, **ENGINES[engine])
    if fused and name in TRANSFORMERS:
        transformers.apply(trainer.model)
    torch.manual_seed(0)
    with strict() if fused else contextlib.nullcontext():
        trainer.train()
    single.integration.unapply()
    assert trainer.accelerator.distributed_type == engine
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def shard_without_an_accelerator():
    """accelerate offers FSDP on accelerators only: make it run on a CPU, with gloo."""
    from accelerate import state

    start = state.AcceleratorState.__init__

    def started(self, *args, fsdp_plugin=None, **options):
        start(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, state.DistributedType.FSDP
            state.PartialState._shared_state["distributed_type"] = self.distributed_type

    state.AcceleratorState.__init__ = started


def work(device, path, engine):
    os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1", DS_ACCELERATOR="cpu")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0", LOCAL_WORLD_SIZE=str(RANKS))  # required, but not used
    warnings.simplefilter("ignore")
    if engine == "FSDP":
        shard_without_an_accelerator()
    found = {}
    for name in CASES[engine]:
        try:
            found[name] = [history(name, path, engine, fused) for fused in (False, True)]
        except Exception as error:
            found[name] = repr(error)
    return found


@pytest.fixture(scope="module")
def trained(folder):  # noqa: F811
    known = {}

    def on(engine):
        if engine not in known:
            known[engine] = run(work, RANKS, folder, engine)[0]  # one rank is enough: all metrics are gathered
        return known[engine]

    return on


@pytest.mark.parametrize(("engine", "name"), [(engine, name) for engine in ENGINES for name in CASES[engine]])
def test_same_losses_gradient_norms_and_metrics(trained, engine, name):
    if engine == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    found = trained(engine)[name]
    assert not isinstance(found, str), found
    expected, fused = found
    single.assert_same_history(fused, expected, rtol=2e-2 if name == "bf16" else 1e-4)
