"""The fine-tuning loss is what transformers, TRL 1.16 and OpenRLHF 0.11 compute, where those are installed."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from fused_losses import modules, sft
from fused_losses.token_statistics import selective_log_softmax

pytestmark = pytest.mark.filterwarnings("ignore")

V = 11
LABELS = torch.tensor([[1, 2, -100, 4, 5, 6], [-100, -100, -100, 3, 9, -100], [5, -100, -100, -100, -100, -100]])
NOTHING = torch.full_like(LABELS, -100)


def assert_same(ours, theirs):
    logits = torch.randn(*LABELS.shape, V, requires_grad=True)
    losses = ours(logits), theirs(logits)
    torch.testing.assert_close(*losses, equal_nan=True)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in losses))


@pytest.mark.parametrize("n", [None, 13, torch.tensor(13)])
@pytest.mark.parametrize("labels", [LABELS, NOTHING])
def test_transformers(labels, n):
    theirs = pytest.importorskip("transformers.loss.loss_utils").ForCausalLMLoss
    assert_same(
        lambda z: sft.sft_loss(z, labels, num_items_in_batch=n, nan_when_empty=True),
        lambda z: theirs(z, labels, V, num_items_in_batch=n),
    )


@pytest.mark.parametrize("labels", [LABELS, NOTHING])
def test_openrlhf(labels):
    theirs = pytest.importorskip("openrlhf.models.loss").GPTLMLoss()
    assert_same(lambda z: modules.GPTLMLoss()(z, labels), lambda z: theirs(z, labels))


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize("n", [None, 13])
@pytest.mark.parametrize("labels", [LABELS, NOTHING])
def test_trl(labels, n, loss_type):
    """The trainer's own `compute_loss`, on the outputs of its patched models."""
    trainer = pytest.importorskip("trl").SFTTrainer

    def theirs(logits):
        target = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        outputs = SimpleNamespace(
            log_probs=selective_log_softmax(logits, target),
            label_mask=target != -100,
            entropy=torch.zeros(target.shape),
            is_top1=torch.zeros(target.shape),
        )
        state = SimpleNamespace(
            model=SimpleNamespace(training=False),
            accelerator=SimpleNamespace(parallelism_config=None, gather_for_metrics=lambda x: x, num_processes=1),
            args=SimpleNamespace(loss_type=loss_type, average_tokens_across_devices=False),
            aux_loss_enabled=False,
            compute_loss_func=None,
            label_smoother=None,
            _metrics={"eval": defaultdict(list)},
            _total_train_tokens=0,
        )
        return trainer.compute_loss(state, lambda **_: outputs, {"labels": labels}, num_items_in_batch=n)

    assert_same(lambda z: sft.sft_loss(z, labels, num_items_in_batch=n, loss_type=loss_type), theirs)
