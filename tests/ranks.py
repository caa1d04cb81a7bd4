"""What tests in several processes need besides ``fused_losses.bench.ranks``."""

import contextlib

import pytest
import torch.distributed as dist

from fused_losses import settings

needs_ranks = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo"
)


def within(options):
    """Apply these settings for the length of a ``with``."""
    stack = contextlib.ExitStack()
    for name, value in options.items():
        stack.enter_context(getattr(settings, name)(value))
    return stack
