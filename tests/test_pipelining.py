"""``torch.distributed.pipelining``: stages pass on tensors only, so the last stage's loss makes the lazy logits."""

import pytest
import torch
import torch.nn.functional as F
from ranks import needs_ranks
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from fused_losses import settings
from fused_losses.bench.ranks import run
from fused_losses.linear_logits import LinearLogits

pytestmark = [needs_ranks, pytest.mark.xdist_group("pipelining")]
V, H = 13, 8
SCHEDULES = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}


class LastStage(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.lm_head = nn.Linear(H, H), nn.Linear(H, V)

    def forward(self, hidden):
        return self.layer(hidden).tanh()

    def loss(self, hidden, labels):
        logits = LinearLogits(hidden, self.lm_head.weight, self.lm_head.bias)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def work(device):
    rank = torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(V, (4, 5), generator=generator)
    found = {}
    for name, schedule in SCHEDULES.items():
        torch.manual_seed(0)
        stages = nn.ModuleList([nn.Embedding(V, H), LastStage()])
        last = stages[1]
        hidden = last(stages[0](ids))
        expected = F.cross_entropy(last.lm_head(hidden).flatten(0, 1), ids.flatten())
        gradients = torch.autograd.grad(expected, list(stages[rank].parameters()))
        stage = PipelineStage(stages[rank].to(device), rank, 2, device)
        losses = []
        with settings.strict():
            step = schedule(stage, 2, loss_fn=last.loss).step
            step(ids.to(device)) if rank == 0 else step(target=ids.to(device), losses=losses)
        made = [p.grad.cpu() for p in stages[rank].parameters()]
        found[name] = (torch.stack(losses).mean().cpu() if rank else None), expected.detach(), made, gradients
    return found


def test_the_loss_of_the_last_stage_is_lazy():
    for of_rank in run(work, 2):
        for loss, expected, made, gradients in of_rank.values():
            if loss is not None:
                torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(made, list(gradients))
