"""The preference losses are what TRL 1.16 and OpenRLHF 0.11 compute, where those are installed: value and gradient."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from fused_losses import modules, preference, selective_log_softmax

trl = pytest.importorskip("trl", reason="as is OpenRLHF, not part of the test extra")
pytestmark = pytest.mark.filterwarnings("ignore")

B, S = 4, 6
# The first token is the prompt; chosen rows come before rejected ones, as in TRL's batches.
COMPLETION_MASK = torch.tensor(
    [[0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0, 0]]
)
COMPLETION_MASK = torch.cat([COMPLETION_MASK, COMPLETION_MASK.roll(1, 0)])
MASK = COMPLETION_MASK[:, 1:]
SMOOTHED = {"exo_pair": 0.1, "robust": 0.1, "aot": 0.1, "aot_unpaired": 0.1}
LOSS_TYPES = [
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
]
LOSS_TYPES += ["apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"]
OURS = {"ipo": "ipo_norm"}


def statistics(rows):
    """What TRL's patched models return; log-probs are 0 outside the completion."""
    logps, moved = (-torch.rand(rows, S) * 3).requires_grad_(), torch.randn(rows, S)
    mask = MASK[:rows]
    return SimpleNamespace(
        leaf=logps,
        log_probs=logps * mask,
        ref_log_probs=(logps.detach() + moved).clamp(max=0) * mask,
        log_sum_sq_probs=-torch.rand(rows, S) * 2 * mask,
        entropy=torch.rand(rows, S),
        mean_logits=torch.randn(rows, S),
        is_top1=torch.rand(rows, S) > 0.5,
        aux_loss=torch.tensor(1.5),
    )


def trainer(**settings):
    """The parts of a trainer that its loss reads."""
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        ref_model=None,
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x, unwrap_model=lambda x: x
        ),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )


def dpo_trainer(loss_types, **settings):
    defaults = {
        "beta": 0.3,
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "ld_alpha": None,
        "use_weighting": False,
        "aux_loss_enabled": False,
        "router_aux_loss_coef": 0.1,
        "loss_weights": [1.0] * len(loss_types),
    }
    return trainer(
        **{**defaults, **settings},
        loss_types=loss_types,
        precompute_ref_logps=True,
        args=SimpleNamespace(discopop_tau=0.05),
    )


def ld_reference(ref_log_probs, ld_alpha):
    weights = torch.ones(2 * B, S)
    if ld_alpha is not None:
        lengths = MASK.sum(-1)
        shared = torch.minimum(lengths[:B], lengths[B:]).repeat(2)
        weights = torch.where(MASK.cumsum(-1) <= shared[:, None], 1.0, ld_alpha)
    return (ref_log_probs * weights).sum(-1).chunk(2)


def compare(loss_types, settings, options):
    out = statistics(2 * B)
    fake = dpo_trainer(loss_types, **settings)
    ref_chosen, ref_rejected = ld_reference(out.ref_log_probs, settings.get("ld_alpha"))
    inputs = {
        "input_ids": torch.zeros(2 * B, S + 1, dtype=torch.long),
        "attention_mask": torch.ones(2 * B, S + 1),
        "completion_mask": COMPLETION_MASK,
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    theirs = trl.DPOTrainer._compute_loss(fake, lambda **_: out, inputs, False)
    (their_grad,) = torch.autograd.grad(theirs, out.leaf, retain_graph=True)

    chosen, rejected = out.log_probs.chunk(2)
    masks = {"chosen_mask": MASK[:B], "rejected_mask": MASK[B:]}
    if settings.get("use_weighting"):
        options = {
            **options,
            "weight": preference.wpo_weight(chosen, rejected, *out.log_sum_sq_probs.chunk(2), *masks.values()),
        }
    ours, *rewards = preference.dpo_loss(
        *(chosen, rejected),
        *out.ref_log_probs.chunk(2),
        beta=fake.beta,
        loss_type=[OURS.get(t, t) for t in loss_types],
        **options,
        **masks,
    )
    (our_grad,) = torch.autograd.grad(ours, out.leaf)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_grad, their_grad)

    sides = [
        SimpleNamespace(**{k: None if v.dim() == 0 else v.chunk(2)[i] for k, v in vars(out).items()}) for i in (0, 1)
    ]
    metrics = preference.preference_metrics(*rewards, chosen_statistics=sides[0], rejected_statistics=sides[1], **masks)
    for name in metrics.keys() - {"nll_loss"}:
        assert metrics[name].item() == pytest.approx(fake._metrics["train"][name][0], rel=1e-5, abs=1e-6), name
    return ours.item()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize(
    "modifier", [{}, {"ld_alpha": 0.3}, {"use_weighting": True}, {"aux_loss_enabled": True}], ids=lambda m: str(list(m))
)
def test_dpo(loss_type, modifier):
    if "aot" in loss_type and "use_weighting" in modifier:
        pytest.skip("neither weights aot")
    if "use_weighting" in modifier and loss_type in ("hinge", "sft"):
        pytest.skip("TRL 1.16 multiplies in place what autograd still needs, and raises")
    e = SMOOTHED.get(loss_type, 0.0)
    options = {"label_smoothing": e}
    if "ld_alpha" in modifier:
        options["ld_alpha"] = modifier["ld_alpha"]
    if "aux_loss_enabled" in modifier:
        options |= {"aux_loss": torch.tensor(1.5), "aux_loss_coef": 0.1}
    assert math.isfinite(compare([loss_type], {"label_smoothing": e, **modifier}, options))


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"])
def test_dpo_f_divergences(loss_type, divergence):
    settings = {"f_divergence_type": divergence, "label_smoothing": SMOOTHED.get(loss_type, 0.0)}
    compare([loss_type], settings, settings)


def test_dpo_several_loss_types():
    weights = {"loss_weights": [0.8, 0.2, 1.0]}
    compare(["sigmoid", "bco_pair", "sft"], weights, weights)
    # TRL applies label smoothing to exo_pair, but not to the sigmoid beside it.
    compare(["sigmoid", "exo_pair"], {"label_smoothing": 0.1}, {"label_smoothing": [0.0, 0.1]})


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("label", [[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
def test_kto(loss_type, label):
    out, kl = statistics(B), statistics(B)
    label = torch.tensor(label)
    fake = trainer(
        beta=0.3,
        loss_type=loss_type,
        calculate_KL=loss_type == "kto",
        desirable_weight=1.2,
        undesirable_weight=0.7,
        precompute_ref_logps=True,
        aux_loss_enabled=False,
        _compute_kl_logps=lambda *_: kl.log_probs.sum(-1) if loss_type == "kto" else None,
    )
    inputs = {
        "input_ids": torch.zeros(B, S + 1, dtype=torch.long),
        "attention_mask": torch.ones(B, S + 1),
        "completion_mask": COMPLETION_MASK[:B],
        "label": label,
        "ref_logps": out.ref_log_probs.sum(-1),
        "ref_KL_logps": kl.ref_log_probs.sum(-1) - 3,
    }
    theirs = trl.KTOTrainer._compute_loss(fake, lambda **_: out, inputs, False)
    (their_grad,) = torch.autograd.grad(theirs, out.leaf, retain_graph=True)
    policy, ref = out.log_probs.sum(-1), inputs["ref_logps"]
    ours, _, _, our_kl = preference.kto_loss(
        *(policy[label == 1], policy[label == 0], kl.log_probs.sum(-1)),
        *(ref[label == 1], ref[label == 0], inputs["ref_KL_logps"]),
        beta=0.3,
        loss_type=loss_type,
        desirable_weight=1.2,
        undesirable_weight=0.7,
    )
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, out.leaf)[0], their_grad)
    assert our_kl.item() == pytest.approx(fake._metrics["train"]["kl"][0])
    assert (our_kl > 0) == (loss_type == "kto")


@pytest.mark.parametrize("alpha", [0.0, 0.2])
@pytest.mark.parametrize(
    ("loss_type", "e"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("hinge", 0.0), ("ipo", 0.0), ("simpo", 0.1)]
)
def test_cpo(loss_type, e, alpha):
    cpo = pytest.importorskip("trl.experimental.cpo")
    out = statistics(2 * B)
    lengths = MASK.sum(-1)
    logps = out.log_probs.sum(-1) / (lengths if loss_type in ("ipo", "simpo") else 1)
    fake = trainer(beta=0.3, alpha=alpha, loss_type=loss_type, simpo_gamma=0.7, label_smoothing=e)
    losses, *their_rewards = cpo.CPOTrainer.cpo_loss(fake, *logps.chunk(2))
    theirs = losses.mean() - 0.6 * out.log_probs[:B][MASK[:B] == 1].mean()
    (their_grad,) = torch.autograd.grad(theirs, out.leaf, retain_graph=True)
    options = {"beta": 0.3, "alpha": alpha, "simpo_gamma": 0.7, "label_smoothing": e, "cpo_alpha": 0.6}
    chosen, rejected = out.log_probs.chunk(2)
    masks = {"chosen_mask": MASK[:B], "rejected_mask": MASK[B:]}
    ours, *rewards = preference.cpo_loss(chosen, rejected, loss_type=loss_type, **options, **masks)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, out.leaf)[0], their_grad)
    torch.testing.assert_close(rewards, their_rewards)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "tpo-l"])
def test_tpo(loss_type):
    """CPO's losses, with the likelihood of a third, gold answer."""
    tpo = pytest.importorskip("trl.experimental.tpo")
    logits = torch.randn(3 * B, S + 1, 5, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(5, (3 * B, S + 1))
    completion_mask = torch.cat([COMPLETION_MASK, COMPLETION_MASK[B:].roll(2, 0)])
    fake = trainer(beta=0.3, loss_type=loss_type, label_smoothing=0.0, tpo_alpha=0.6, tpo_l_gamma=0.7)
    fake.model = SimpleNamespace(training=True)
    inputs = {"input_ids": ids, "completion_mask": completion_mask, "attention_mask": torch.ones_like(ids)}
    theirs = tpo.TPOTrainer._compute_loss(fake, lambda **_: SimpleNamespace(logits=logits), inputs, False)
    (their_grad,) = torch.autograd.grad(theirs, logits)
    logps = selective_log_softmax(logits[:, :-1], ids[:, 1:])
    (chosen, rejected, gold), masks = logps.chunk(3), completion_mask[:, 1:].chunk(3)
    options = {"beta": 0.3, "cpo_alpha": 0.6, "simpo_gamma": 0.7, "nll_loss": -gold[masks[2] == 1].mean()}
    options |= {"loss_type": "simpo" if loss_type == "tpo-l" else loss_type}
    ours, *_ = preference.cpo_loss(chosen, rejected, chosen_mask=masks[0], rejected_mask=masks[1], **options)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, logits)[0], their_grad)


def test_orpo():
    orpo = pytest.importorskip("trl.experimental.orpo")
    out = statistics(2 * B)
    chosen, rejected = (out.log_probs.sum(-1) / MASK.sum(-1)).chunk(2)
    losses, *rest = orpo.ORPOTrainer.odds_ratio_loss(trainer(beta=0.3), chosen, rejected)
    theirs = 1.25 - losses.mean()
    (their_grad,) = torch.autograd.grad(theirs, out.leaf, retain_graph=True)
    masks = {"chosen_mask": MASK[:B], "rejected_mask": MASK[B:]}
    ours, *ours_rest = preference.orpo_loss(*out.log_probs.chunk(2), torch.tensor(1.25), beta=0.3, **masks)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, out.leaf)[0], their_grad)
    torch.testing.assert_close(ours_rest, [x.detach() for x in rest])


@pytest.mark.parametrize("arguments", [(0.3,), (0.3, 0.2), (0.3, 0.0, True), (0.3, 0.2, True)])
def test_openrlhf_dpo(arguments):
    theirs = pytest.importorskip("openrlhf.models.loss").DPOLoss(*arguments)
    leaves = (-torch.rand(4, B) * 9).requires_grad_()
    outputs = modules.DPOLoss(*arguments)(*leaves), theirs(*leaves)
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, leaves)[0] for loss, *_ in outputs))
