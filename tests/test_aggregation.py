"""From one loss per token to one number, against loops in float64."""

import pytest
import torch
from rollout_batch import AGGREGATIONS, DATA

import fused_losses.reference.aggregation as reference
from fused_losses.aggregation import aggregate


@pytest.mark.parametrize("aggregation", [a for a in AGGREGATIONS if a != "token_sum"])
def test_ranks_need_the_global_count(aggregation):
    needed = "batch_num_tokens" if aggregation == "token_mean" else "global_batch_size"
    with pytest.raises(ValueError, match=f"needs {needed}, the count over all ranks"):
        aggregate(torch.ones(2, 3), None, aggregation, dp_size=2)


@pytest.mark.parametrize("aggregation", [a for a in AGGREGATIONS if a != "token_sum"])
def test_the_other_global_count_alone_is_refused(aggregation):
    own, other = "batch_num_tokens", "global_batch_size"
    own, other = (own, other) if aggregation == "token_mean" else (other, own)
    with pytest.raises(ValueError, match=f"{other} has no effect on {aggregation}, which divides by {own}: pass that"):
        aggregate(torch.ones(2, 3), None, aggregation, **{other: 50})
    both = aggregate(torch.ones(2, 3), None, aggregation, **{other: 50, own: 9})
    torch.testing.assert_close(both, aggregate(torch.ones(2, 3), None, aggregation, **{own: 9}))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_aggregate(aggregation):
    loss = torch.randn(6, 7, dtype=torch.float64)
    mask = DATA["mask"]
    for options in (
        {},
        {"count_empty": False},
        {"loss_scale_factor": 5.0},
        {"dp_size": 4 if aggregation == "token_sum" else 1},
        {"batch_num_tokens": 50.0, "global_batch_size": 9.0, "dp_size": 4},
    ):
        expected = reference.aggregate(loss, mask, aggregation, **options)
        torch.testing.assert_close(aggregate(loss, mask, aggregation, **options), expected)
        torch.testing.assert_close(aggregate(loss, mask, aggregation.replace("_", "-"), **options), expected)
    torch.testing.assert_close(aggregate(loss, None, aggregation), reference.aggregate(loss, None, aggregation))
    assert aggregate(loss.bfloat16(), mask, aggregation).dtype == torch.float32
    nothing = aggregate(loss, mask * 0, aggregation, batch_num_tokens=mask.sum() * 0, global_batch_size=mask.sum() * 0)
    assert nothing == 0
    for shape in ((2, 0), (0, 3), (0, 0)):
        assert aggregate(torch.ones(shape), None, aggregation) == 0
