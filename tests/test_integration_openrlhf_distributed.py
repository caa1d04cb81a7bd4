"""OpenRLHF's actor in two processes, as its strategy sets them up (DeepSpeed's ZeRO-2 and ZeRO-3, ring attention): the same
log-probs, entropies, gradient norms and parameters with fused losses and without."""

import contextlib
import functools
import gc
import importlib
import os
import sys
import types
import warnings

import pytest
import torch
import torch.distributed as dist
from ranks import needs_ranks

if torch.cuda.device_count() < 2:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
pytest.importorskip("torchdata")
import test_integration_openrlhf as single
from test_integration_openrlhf import actors as _importable  # noqa: F401  a fixture that skips where there are none

from fused_losses import modules, strict
from fused_losses.bench.ranks import run
from fused_losses.integrations import openrlhf as integration

pytestmark = [needs_ranks, pytest.mark.xdist_group("integration_openrlhf"), pytest.mark.filterwarnings("ignore")]
RANKS, STEPS = 2, 3
B, S, V = 2, 9, 41
MASK = (torch.arange(S) < torch.tensor([9, 6])[:, None]).long()
ACTIONS = MASK[:, -4:]
# Without these, ZeRO-3 would keep parameters as small as here whole.
SHARDED = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 0,
}
VARIANTS = {  # what the actor is made with
    "plain": {},
    "whole": {},
    "tied": {},
    "softcap": {},
    "bf16": {},
    "lora": {"lora_rank": 4, "target_modules": "all-linear"},
    "ring": {"packing_samples": True},
}
MODELS = {"tied": {"tie_word_embeddings": True}, "softcap": {"kind": "Gemma2"}, "other": {}}
CASES = [(stage, loss, "plain") for stage in (2, 3) for loss in ("sft", "dpo")]
CASES += [(stage, "ppo", variant) for stage in (2, 3) for variant in VARIANTS]


@functools.cache
def strategy_class():
    from openrlhf.utils.deepspeed import DeepspeedStrategy

    class Strategy(DeepspeedStrategy):
        """OpenRLHF's strategy, but with SGD, which shows a wrong gradient scale where Adam does not."""

        def get_ds_train_config(self, *args, **options):
            config = super().get_ds_train_config(*args, **options)
            config["zero_optimization"] |= self.zero
            optimizer = {"type": "SGD", "params": {"lr": 0.01}}
            return config | {"optimizer": optimizer, "zero_allow_untested_optimizer": True}

        def get_ds_eval_config(self, *args, **options):
            config = super().get_ds_eval_config(*args, **options)
            config["zero_optimization"] |= self.zero
            return config

    return Strategy


def made(actors, folder, stage, variant):
    """A strategy, an actor to train with it, and a frozen actor."""
    ring = RANKS if variant == "ring" else 1
    ds = types.SimpleNamespace(param_dtype="bf16" if variant == "bf16" else "fp32", ring_attn_size=ring)
    args = types.SimpleNamespace(ds=ds, train=types.SimpleNamespace(dynamic_batch_enable=False))
    strategy = strategy_class()(
        micro_train_batch_size=B, train_batch_size=B * RANKS // ring, zero_stage=stage, args=args
    )
    strategy.zero = {} if variant == "whole" else SHARDED
    path = f"{folder}/{variant if variant in MODELS else 'other'}"
    options = {"attn_implementation": "eager", "temperature": 0.7, "param_dtype": ds.param_dtype, **VARIANTS[variant]}
    torch.manual_seed(0)
    actor = actors.Actor(path, ds_config=strategy.get_ds_train_config(), **options)
    frozen = actors.Actor(path, ds_config=strategy.get_ds_eval_config(), **options)
    adam = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
    trained = {"optim": "adam", "adam": adam, "lr_scheduler": "constant", "scheduler_steps": STEPS, "max_norm": 1e9}
    (actor, _, _), frozen = strategy.prepare((actor, trained), frozen)
    return strategy, actor, frozen


def step(loss, losses, actor, frozen, ids, group):
    """A loss as OpenRLHF's trainer of this name computes it, and the actors' outputs that it reads."""
    options = {"attention_mask": MASK, "ring_attn_group": group, "return_output": True}
    if loss == "ppo":
        with torch.no_grad():
            old = frozen(ids, ACTIONS, attention_mask=MASK, ring_attn_group=group)
        log_probs, output = actor(ids, ACTIONS, return_entropy=True, **options)
        value = losses.PolicyLoss()(log_probs, old, torch.linspace(-1, 2, 4 * B).view(B, 4), ACTIONS)[0]
        entropy = output.entropy[:, -4:] * ACTIONS
        return value - 0.1 * entropy.sum(), (log_probs, entropy, old)
    log_probs, _ = actor(ids, return_logprobs=True, **options)
    if loss == "sft":
        return losses.SFTLoss()(log_probs, MASK[:, 1:]), (log_probs,)
    with torch.no_grad():
        reference = frozen(ids, return_logprobs=True, **options)[0]
    sums = [(x * MASK[:, 1:]).sum(-1).split(B // 2) for x in (log_probs, reference)]
    return losses.DPOLoss(0.5)(*sums[0], *sums[1])[0], (log_probs, reference)


def history(actors, folder, case, fused):
    import deepspeed

    stage, loss, variant = case
    losses = modules if fused else importlib.import_module("openrlhf.models.loss")
    if fused:
        integration.apply()
    strategy, actor, frozen = made(actors, folder, stage, variant)
    group = dist.group.WORLD if variant == "ring" else None
    importlib.import_module("openrlhf.models.ring_attn_utils").set_ring_attn_group(group)
    start = whole(deepspeed, actor)
    ids = torch.randint(1, V, (STEPS, RANKS, B, S), generator=torch.Generator().manual_seed(1)) * MASK
    found = []
    for batch in ids[:, 0 if variant == "ring" else dist.get_rank()]:
        with strict() if fused else contextlib.nullcontext():
            value, read = step(loss, losses, actor, frozen, batch, group)
            strategy.backward(value, actor, None)
        strategy.optimizer_step(None, actor, None)
        found.append([value.detach(), *(x.detach().clone() for x in read), strategy.get_grad_norm(actor)])
    end = whole(deepspeed, actor)
    assert any(not torch.equal(end[name], start[name]) for name in end)
    integration.unapply()
    actor.model.destroy()
    return found, end


def whole(deepspeed, actor):
    with deepspeed.zero.GatheredParameters(list(actor.parameters())):
        return {name: p.detach().clone() for name, p in actor.named_parameters()}


def work(device, folder):
    os.environ.update(HF_HUB_OFFLINE="1", MASTER_ADDR="localhost", MASTER_PORT="0")  # required, but not used
    warnings.simplefilter("ignore")
    single.stand_in_for_flash_attn()
    actors = importlib.import_module("openrlhf.models.actor")
    # The patch is made for transformers 5.15: with it, ZeRO-3 loads no model under 5.23.
    actors._patch_zero3_weight_mapping = lambda: None
    # Ranks attend only to their own part of the tokens: the tested code comes after the model.
    sys.modules["ring_flash_attn"] = types.SimpleNamespace(update_ring_flash_attn_params=lambda *_: None)
    utils = importlib.import_module("openrlhf.utils.utils")
    known = utils.convert_to_torch_dtype
    utils.convert_to_torch_dtype = lambda name: torch.float32 if name == "fp32" else known(name)
    gc.freeze()  # skip all that was imported when ZeRO-3 collects garbage, for each model
    found = {}
    with torch.compiler.set_stance("force_eager"):  # OpenRLHF compiles its entropy
        for case in CASES:
            try:
                found[case] = [history(actors, folder, case, fused) for fused in (False, True)]
            except Exception as error:
                found[case] = repr(error)
                integration.unapply()
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, settings in MODELS.items():
        single.model(vocab=V, **settings).save_pretrained(f"{folder}/{name}")
    return run(work, RANKS, str(folder))


@pytest.mark.parametrize(("stage", "loss", "variant"), CASES)
def test_trains_as_without_apply(trained, stage, loss, variant):
    for found in trained:
        found = found[stage, loss, variant]
        assert not isinstance(found, str), found
        expected, fused = found
        tolerance = {"rtol": 5e-2, "atol": 5e-2} if variant == "bf16" else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(fused, expected, **tolerance)
        assert expected[0][0][-1] > 0  # the gradient norm
