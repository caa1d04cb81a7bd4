"""The policy losses are what TRL 1.16, verl 0.9 and OpenRLHF 0.11 compute, where those are installed: value and gradient.

Not installed by the test extra: `pip install trl==1.16 verl==0.9.1 openrlhf`, as far as they import.
"""

import functools
import importlib.metadata
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fused_losses import modules
from fused_losses.aggregation import aggregate
from fused_losses.kl import kl_estimate
from fused_losses.policy import a2po_loss, grpo_loss, value_loss
from fused_losses.rollouts import group_advantages, mismatch_weight, optimal_values

B, S = 6, 7
MASK = (torch.arange(S) < torch.tensor([7, 5, 2, 6, 3, 7])[:, None]).long()


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LOGP = -0.1 - normal(0, B, S).abs()
OLD = LOGP - torch.tensor([0.4, -0.4, 0, 0.45, -0.05, 0.02])[:, None] - 0.4 * normal(1, B, S)
OLD = OLD.clamp(max=-0.01)
REF = LOGP - 0.5 * normal(2, B, S)
ROLLOUT = OLD + 0.3 * normal(3, B, S)
ENTROPY = normal(4, B, S).abs()
A = torch.tensor([1.3, -0.7, 0.9, -1.1, 0.4, -0.2], dtype=torch.float64)
A_TOKEN = normal(5, B, S)
A_TOKEN[1, :2] = 0


def gradients(loss, *leaves):
    return [
        torch.zeros_like(x) if g is None else g
        for x, g in zip(leaves, torch.autograd.grad(loss, leaves, allow_unused=True), strict=True)
    ]


def unchanged(x, *args, **kwargs):
    return x


def trl_loss(trainer, logp, entropy, **settings):
    """A trainer's own `_compute_loss` on given log-probs."""
    config = {
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "beta": 0.0,
        "loss_type": "grpo",
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "use_vllm": False,
        "vllm_importance_sampling_correction": False,
        "max_completion_length": 9,
        "entropy_coef": 0.0,
        "use_adaptive_entropy": False,
        "current_gradient_accumulation_steps": 1,
        "use_bias_correction_kl": True,
        "delta": None,
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
        "vespo_k_pos": 2.0,
        "vespo_lambda_pos": 3.0,
        "vespo_k_neg": 3.0,
        "vespo_lambda_neg": 2.0,
        "steps_per_generation": 1,
        **settings,
    }
    self = SimpleNamespace(**config, args=SimpleNamespace(**config))
    self.model = SimpleNamespace(training=True)
    self._entropy_bonus_enabled = config["entropy_coef"] != 0
    self._metrics = {"train": defaultdict(list)}
    self.get_off_policy_mask, self.get_gamma_weights = trainer.get_off_policy_mask, trainer.get_gamma_weights
    self.get_high_entropy_mask = functools.partial(trainer.get_high_entropy_mask, self)
    self.accelerator = SimpleNamespace(num_processes=1, gather=unchanged, reduce=unchanged, sync_gradients=False)
    self.accelerator.pad_across_processes = unchanged
    self._get_per_token_logps_and_entropies = lambda *args, **kwargs: (logp, entropy, None)
    ids = torch.zeros(B, 1, dtype=torch.long)
    inputs = {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": MASK, "completion_mask": MASK}
    inputs |= {
        "advantages": A,
        "old_per_token_logps": OLD,
        "ref_per_token_logps": REF,
        "num_items_in_batch": MASK.sum(),
    }
    if config["use_vllm"]:
        rho = torch.nan_to_num((OLD - ROLLOUT) * MASK)
        inputs |= {"importance_sampling_ratio": rho.exp().clamp(max=1.2), "sampling_per_token_logps": ROLLOUT}
    loss = trainer._compute_loss(self, self.model, inputs)
    return loss, {name: value[0] for name, value in self._metrics["train"].items()}


TRL = {
    **{t: ({}, {}) for t in ("grpo", "bnpo", "dapo", "luspo", "sapo", "vespo")},
    "dr_grpo": ({}, {"loss_scale_factor": 9}),
    "cispo": ({"epsilon_high": 1.3}, {"cispo_max": 1.3}),
}
TRL_SETTINGS = {
    "plain": ({}, {}),
    "epsilon": ({"epsilon_low": 0.1, "delta": 1.4}, {"eps_low": 0.1, "delta": 1.4}),
    "sequence": ({"importance_sampling_level": "sequence"}, {"importance_sampling_level": "sequence"}),
    "kl": ({"beta": 0.3}, {"beta": 0.3, "ref_log_probs": REF}),
    "kl uncorrected": (
        {"beta": 0.3, "use_bias_correction_kl": False},
        {"beta": 0.3, "ref_log_probs": REF, "use_bias_correction_kl": False},
    ),
    "masks": (
        {"off_policy_mask_threshold": 0.1, "top_entropy_quantile": 0.4, "entropy_coef": 0.2},
        {"off_policy_mask_threshold": 0.1, "top_entropy_quantile": 0.4, "entropy_coef": 0.2},
    ),
    "vllm": (
        {"use_vllm": True, "vllm_importance_sampling_correction": True, "off_policy_mask_threshold": 0.1},
        {
            "mismatch_weight": mismatch_weight(OLD, ROLLOUT, MASK, high=1.2)[0],
            "off_policy_mask_threshold": 0.1,
            "rollout_log_probs": ROLLOUT,
        },
    ),
}


def compare(theirs, ours):
    logp, entropy = LOGP.clone().requires_grad_(), ENTROPY.clone().requires_grad_()
    (expected, their_metrics), (loss, metrics) = theirs(logp, entropy), ours(logp, entropy)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, logp, entropy), gradients(expected, logp, entropy))
    return metrics, their_metrics


@pytest.mark.parametrize("setting", TRL_SETTINGS)
@pytest.mark.parametrize("loss_type", TRL)
def test_trl_grpo(loss_type, setting):
    trainer = pytest.importorskip("trl").GRPOTrainer
    (theirs, ours), (their_setting, our_setting) = TRL[loss_type], TRL_SETTINGS[setting]
    if loss_type in ("cispo", "sapo", "vespo"):  # TRL ignores delta here, ours refuses it
        our_setting = {k: v for k, v in our_setting.items() if k != "delta"}
    metrics, theirs = compare(
        lambda logp, entropy: trl_loss(trainer, logp, entropy, loss_type=loss_type, **their_setting, **theirs),
        lambda logp, entropy: grpo_loss(
            logp, OLD, A, MASK, loss_type=loss_type, entropy=entropy, log_ratio_clamp=None, **our_setting, **ours
        ),
    )
    shared = metrics.keys() & theirs.keys()
    assert "entropy" in shared
    for name in shared:
        torch.testing.assert_close(metrics[name].item(), theirs[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_trl_counts_an_empty_sequence(level, monkeypatch):
    trainer = pytest.importorskip("trl").GRPOTrainer
    monkeypatch.setitem(globals(), "MASK", MASK * (torch.arange(B) != 2)[:, None])
    settings = {"importance_sampling_level": level}
    metrics, theirs = compare(
        lambda logp, entropy: trl_loss(trainer, logp, entropy, **settings),
        lambda logp, entropy: grpo_loss(logp, OLD, A, MASK, entropy=entropy, log_ratio_clamp=None, **settings),
    )
    names = [name for name in theirs if name.startswith("clip_ratio/")]
    assert len(names) == 5
    assert theirs["clip_ratio/region_mean"] > 0
    for name in names:
        torch.testing.assert_close(metrics[name].item(), theirs[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("setting", ["plain", "kl", "masks"])
def test_trl_gmpo(setting):
    trainer = pytest.importorskip("trl.experimental.gmpo").GMPOTrainer
    theirs, ours = ({k: v for k, v in o.items() if k[:3] not in ("off", "ent")} for o in TRL_SETTINGS[setting])
    compare(
        lambda logp, entropy: trl_loss(trainer, logp, entropy, **theirs),
        lambda logp, entropy: grpo_loss(logp, OLD, A, MASK, loss_type="gmpo", entropy=entropy, **ours),
    )


def test_trl_a2po():
    trainer = pytest.importorskip("trl.experimental.a2po").A2POTrainer
    rewards, group = torch.tensor([1.0, 0.0, 0.0, 1.0] * B, dtype=torch.float64), 4
    self = SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(beta2=0.3, beta1=0.4),
        _metrics={"train": defaultdict(list)},
    )
    values = 0.4 * ((rewards / 0.4).exp().view(B, group).mean(1)).log()
    inputs = {"input_ids": None, "attention_mask": None, "logits_to_keep": None, "ref_logps": (REF * MASK).sum(1)}
    inputs |= {"rewards": rewards[:B], "v_star": values}

    def theirs(logp, entropy):
        self._get_sequence_logps = lambda *args: (logp * MASK).sum(1)
        return trainer.compute_loss(self, None, inputs), {}

    def ours(logp, entropy):
        return a2po_loss(logp, REF, rewards[:B] - optimal_values(rewards, group, beta=0.4), MASK, beta=0.3)

    metrics, _ = compare(theirs, ours)
    assert metrics["implicit_reward"].item() == pytest.approx(self._metrics["train"]["implicit_reward"][0])
    assert metrics["advantage"].item() == pytest.approx(self._metrics["train"]["advantage"][0])


def test_trl_rloo():
    trainer = pytest.importorskip("trl").RLOOTrainer
    self = SimpleNamespace(
        _get_per_token_logps_and_entropies=None, aux_loss_enabled=False, epsilon_low=0.2, epsilon_high=0.2
    )
    self.model = SimpleNamespace(training=True)
    self.accelerator = SimpleNamespace(gather=unchanged, reduce=unchanged)
    self._metrics = {"train": defaultdict(list)}
    ids = torch.zeros(B, 1, dtype=torch.long)
    inputs = {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": MASK, "completion_mask": MASK}
    inputs |= {"advantages": A, "old_logps": (OLD * MASK).sum(1)}

    def theirs(logp, entropy):
        self._get_per_token_logps_and_entropies = lambda *args, **kwargs: (logp, entropy, None)
        return trainer._compute_loss(self, self.model, inputs), {}

    compare(theirs, lambda logp, entropy: grpo_loss(logp, OLD, A, MASK, loss_type="rloo", log_ratio_clamp=None))


# clip_ratio_c bounds DPPO's ratio.
VERL = {
    "vanilla": ({}, {"loss_type": "ppo", "dual_clip": 3.0}),
    "vanilla, dual clip": ({"clip_ratio_c": 1.3}, {"loss_type": "ppo", "dual_clip": 1.3}),
    "gspo": ({}, {"loss_type": "gspo-token", "log_ratio_clamp": (None, 10.0)}),
    "sapo": ({}, {"loss_type": "sapo"}),
    "gpg": ({}, {"loss_type": "gpg"}),
    "cispo": ({}, {"loss_type": "cispo", "cispo_max": None}),
    "geo_mean": ({}, {"loss_type": "gmpo", "count_empty": True, "log_ratio_clamp": None}),
    "dppo_tv": ({"clip_ratio_c": 1.2}, {"loss_type": "dppo_tv", "delta": 1.2}),
    "dppo_kl": ({"clip_ratio_c": 1.2}, {"loss_type": "dppo_kl", "delta": 1.2}),
    "kl_cov": (
        {"kl_cov_ratio": 0.3, "ppo_kl_coef": 0.7},
        {"loss_type": "kl_cov", "kl_cov_ratio": 0.3, "kl_cov_coef": 0.7, "log_ratio_clamp": None},
    ),
    "clip_cov": (
        {"clip_cov_ratio": 0.9, "clip_cov_lb": 0.05, "clip_cov_ub": 0.6},
        {"loss_type": "clip_cov", "clip_cov_ratio": 0.9, "clip_cov_lb": 0.05, "clip_cov_ub": 0.6}
        | {"log_ratio_clamp": None},
    ),
    "dro": ({"dro_beta": 0.3}, {"loss_type": "dro", "dro_beta": 0.3, "log_ratio_clamp": None}),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize("name", VERL)
def test_verl(name, mode, weighted):
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    from verl.workers.config import ActorConfig, PolicyLossConfig

    settings, options = VERL[name]
    if name in ("dro", "kl_cov", "clip_cov"):
        settings = {"policy_loss": PolicyLossConfig(loss_mode=name, **settings)}
    bounds = (0.03, 0.05) if name.startswith("dppo") else (0.2, 0.3)
    clip = {"clip_ratio_low": bounds[0], "clip_ratio_high": bounds[1]}
    config = ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, **clip | settings)
    kind = name.split(",")[0]
    fixed = kind in ("sapo", "geo_mean") or (kind == "gspo" and importlib.metadata.version("verl") == "0.9.0")
    weight = mismatch_weight(OLD, ROLLOUT, MASK, high=1.5)[0] if weighted else None
    ours = {"eps_low": bounds[0], "eps_high": bounds[1], "count_empty": False} | options
    compare(
        lambda logp, entropy: core_algos.get_policy_loss_fn(kind)(
            OLD, logp, A_TOKEN, MASK, mode, config=config, rollout_is_weights=weight
        ),
        lambda logp, entropy: grpo_loss(
            logp,
            OLD,
            A_TOKEN,
            MASK,
            aggregation="seq_mean_token_mean" if fixed else mode,
            mismatch_weight=weight,
            **ours,
        ),
    )


@pytest.mark.parametrize("order", ["first", "last"])
@pytest.mark.parametrize("ratio", [0.0002, 0.1, 0.15, 1.0])
def test_verl_clip_cov_draw(ratio, order, monkeypatch):
    """verl shuffles the candidates, ours all positions: with order kept or reversed, both draw the same tokens."""
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    from verl.workers.config import ActorConfig, PolicyLossConfig

    def randperm(n, **kwargs):
        return torch.arange(n) if order == "first" else torch.arange(n).flip(0)

    monkeypatch.setattr(torch, "randperm", randperm)
    settings = {"clip_cov_ratio": ratio, "clip_cov_lb": 0.05, "clip_cov_ub": 0.6}
    policy_loss = PolicyLossConfig(loss_mode="clip_cov", **settings)
    config = ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, policy_loss=policy_loss)
    metrics, theirs = compare(
        lambda logp, entropy: core_algos.get_policy_loss_fn("clip_cov")(
            OLD, logp, A_TOKEN, MASK, "token-mean", config=config
        ),
        lambda logp, entropy: grpo_loss(
            logp, OLD, A_TOKEN, MASK, loss_type="clip_cov", log_ratio_clamp=None, **settings
        ),
    )
    assert theirs["actor/pg_clipfrac"] > 0
    torch.testing.assert_close(metrics["clip_ratio/cov_mean"].item(), theirs["actor/pg_clipfrac"])
    torch.testing.assert_close(metrics["ppo_kl"].item(), theirs["actor/ppo_kl"])


@pytest.mark.parametrize("name", ["vanilla", "gspo", "sapo", "cispo", "geo_mean", "dppo_tv", "dppo_kl"])
def test_verl_kl_of_a_far_token(name):
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    from verl.workers.config import ActorConfig

    config = ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True)
    old = OLD.clone()
    old[0, 0] = -60
    _, theirs = core_algos.get_policy_loss_fn(name)(old, LOGP, A_TOKEN, MASK, "token-mean", config=config)
    _, metrics = grpo_loss(LOGP, old, A_TOKEN, MASK, **VERL[name][1])
    torch.testing.assert_close(metrics["ppo_kl"].item(), theirs["actor/ppo_kl"])


def test_verl_aggregation_weights_kl_and_value():
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    from verl.trainer.ppo import rollout_corr_helper

    counts = {"dp_size": 4, "batch_num_tokens": 50, "global_batch_size": 9}
    for mode in ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"):
        for options in ({}, counts, {"loss_scale_factor": 5} if mode != "token-sum" else {}):
            expected = core_algos.agg_loss(LOGP, MASK, mode, **options)
            torch.testing.assert_close(aggregate(LOGP, MASK, mode, count_empty=False, **options), expected)
    for level, ours in (("token", "token"), ("sequence", "sequence_sum")):
        for threshold, bounds in ((1.3, {"high": 1.3}), ("0.6_1.3", {"mode": "mask", "low": 0.6, "high": 1.3})):
            weight, _ = rollout_corr_helper.compute_rollout_correction_weights(OLD - ROLLOUT, MASK, level, threshold)
            mine = mismatch_weight(OLD, ROLLOUT, MASK, level=ours, **bounds)[0]
            mine = mine if mine.dim() == 2 else mine[:, None].expand(B, S)
            torch.testing.assert_close(mine * MASK, weight)
    for name, options in {
        "low_var_kl": {"clamp": 10},
        "k3+": {"clamp": 10, "gradient": "k2"},
        "kl": {"kind": "k1"},
    }.items():
        torch.testing.assert_close(kl_estimate(LOGP, REF, **options), core_algos.kl_penalty(LOGP, REF, name))
    expected = core_algos.compute_value_loss(LOGP, REF, OLD, MASK, 0.2)
    loss, metrics = value_loss(LOGP, OLD, REF, MASK, clip_eps=0.2, count_empty=False)
    torch.testing.assert_close((loss, metrics["clip_ratio"].double()), tuple(x.double() for x in expected))


def test_verl_advantages():
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    rewards, ids = normal(6, B, 1), np.repeat([0, 1], B // 2)
    ones = torch.ones_like(rewards)
    for scaled, scale in ((True, "group"), (False, "none")):
        expected, _ = core_algos.compute_grpo_outcome_advantage(
            rewards.clone(), ones, ids, norm_adv_by_std_in_grpo=scaled
        )
        ours = group_advantages(rewards.squeeze(1), B // 2, scale=scale, eps=1e-6)
        torch.testing.assert_close(ours, expected.squeeze(1))
    expected, _ = core_algos.compute_rloo_vectorized_outcome_advantage(rewards, ones, ids)
    ours = group_advantages(rewards.squeeze(1), B // 2, scale="none", leave_one_out=True)
    torch.testing.assert_close(ours, expected.squeeze(1))


OPENRLHF = [
    {},
    {"clip_eps_low": 0.1, "clip_eps_high": 0.3, "dual_clip": 1.3, "token_level_loss": False},
    {"policy_loss_type": "gspo"},
    {"policy_loss_type": "gspo", "is_correction_level": "seq"},
    {"is_correction_level": "token", "is_correction_mode": "clip", "is_correction_threshold": (0.8, 1.2)},
    {"is_correction_level": "token", "is_correction_threshold": (0.8, 1.2)},
    {"is_correction_level": "seq", "is_correction_threshold": (0.9, 1.1)},
    {"is_correction_level": "token", "is_correction_gating": "binary_kl", "is_correction_threshold": (0, 0.05)},
    {"is_correction_level": "seq", "is_correction_gating": "tv", "is_correction_threshold": (0, 0.08)},
]


@pytest.mark.parametrize("settings", OPENRLHF, ids=str)
def test_openrlhf(settings):
    theirs = pytest.importorskip("openrlhf.models.loss").PolicyLoss(**settings)
    ours = modules.PolicyLoss(**settings)
    for counts in ({}, {"dp_size": 2, "batch_num_tokens": 40, "global_batch_size": 8}):

        def forward(loss, logp, entropy, counts=counts):
            first, *rest = loss(logp, OLD, A_TOKEN, MASK, ROLLOUT, **counts)
            return first, rest

        results, expected = compare(functools.partial(forward, theirs), functools.partial(forward, ours))
        for a, b in zip(results, expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, check_dtype=False)


@pytest.mark.parametrize("settings", [{}, {"clip_eps": 0.2}, {"clip_eps": 0.2, "token_level_loss": False}], ids=str)
def test_openrlhf_value_loss(settings):
    theirs = pytest.importorskip("openrlhf.models.loss").ValueLoss(**settings)
    torch.testing.assert_close(modules.ValueLoss(**settings)(LOGP, OLD, REF, MASK), theirs(LOGP, OLD, REF, MASK))


def test_openrlhf_refuses_what_ours_refuses():
    theirs = pytest.importorskip("openrlhf.models.loss").PolicyLoss
    for settings in (
        {"dual_clip": 1.0},
        {"is_correction_level": "word"},
        {"is_correction_mode": "drop"},
        {"is_correction_gating": "kl"},
        {"is_correction_level": "seq", "is_correction_mode": "clip"},
        {"is_correction_mode": "clip", "is_correction_gating": "tv"},
        {"is_correction_level": "token", "is_correction_gating": "binary_kl"},
    ):
        with pytest.raises((ValueError, AssertionError)):
            theirs(**settings)
        with pytest.raises(ValueError, match=r"must|clip|threshold"):
            modules.PolicyLoss(**settings)
    for module in (theirs, modules.PolicyLoss):
        module(is_correction_mode="clip")
        module(is_correction_gating="tv")


@pytest.mark.parametrize("token_level_loss", [True, False])
@pytest.mark.parametrize("counts", [{}, {"dp_size": 2, "batch_num_tokens": 40, "global_batch_size": 8}], ids=str)
def test_openrlhf_sft_loss(token_level_loss, counts):
    theirs = pytest.importorskip("openrlhf.models.loss").SFTLoss(token_level_loss)
    ours = modules.SFTLoss(token_level_loss)
    compare(lambda logp, _: (theirs(logp, MASK, **counts), {}), lambda logp, _: (ours(logp, MASK, **counts), {}))
