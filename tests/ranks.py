"""What tests in several processes need beside ``fused_losses.bench.ranks``."""

import pytest
import torch.distributed as dist

needs_ranks = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo"
)
