"""Other packages' versions of each case: adapters of a few lines, run side by side with ours in one process.

An adapter imports its package when it is built, so that a missing one is skipped with the reason. Each is given the options
its package recommends for large heads, and a second line where another choice is faster or smaller.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .problem import Contender, Inputs

Call = Callable[[Inputs], Any]


class Peer(NamedTuple):
    name: str
    build: Callable[[], Call]
    destroys: tuple[str, ...] = ()
    gpu: bool = True


def liger_cross_entropy() -> Call:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda x: liger_cross_entropy(x["logits"], x["target"])


def quack_cross_entropy() -> Call:
    from quack.cross_entropy import cross_entropy

    return lambda x: cross_entropy(x["logits"], x["target"], reduction="mean")


def flash_attn_cross_entropy() -> Call:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return lambda x: cross_entropy_loss(x["logits"], x["target"])[0].mean()


def fla_cross_entropy() -> Call:
    from fla.modules.fused_cross_entropy import cross_entropy_loss

    return lambda x: cross_entropy_loss(x["logits"], x["target"])[0].mean()


def torch_linear_cross_entropy() -> Call:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda x: F.linear_cross_entropy(x["hidden"], x["weight"], x["target"], options=options)


def liger_linear_cross_entropy(chunks_of: int = 1) -> Call:
    """``chunks_of``: how many times the bytes of the hidden states a chunk of logits may take; 1 is Liger's default."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda x: liger_fused_linear_cross_entropy(
        x["hidden"], x["weight"], x["target"], chunk_mem_const=chunks_of
    )


def cut_cross_entropy(filter_eps: str | None = "high") -> Call:
    from cut_cross_entropy import linear_cross_entropy

    return lambda x: linear_cross_entropy(x["hidden"], x["weight"], x["target"], filter_eps=filter_eps)


def quack_linear_cross_entropy() -> Call:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda x: chunked_linear_cross_entropy(x["hidden"], x["weight"], x["target"])


def fla_linear_cross_entropy() -> Call:
    from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss

    return lambda x: fused_linear_cross_entropy_loss(x["hidden"], x["target"], x["weight"])


def trl_token_statistics() -> Call:
    from trl.kernels import ChunkedLogProbFunction

    def call(x: Inputs) -> Any:
        found = ChunkedLogProbFunction.apply(x["hidden"], x["weight"], None, x["target"], 1.0, 32768)
        return found[0], found[1]

    return call


PEERS: dict[str, tuple[Peer, ...]] = {
    "cross_entropy": (
        Peer("liger_kernel", liger_cross_entropy, destroys=("logits",)),
        Peer("quack", quack_cross_entropy),
        Peer("flash_attn", flash_attn_cross_entropy),
        Peer("fla", fla_cross_entropy),
    ),
    "linear_cross_entropy": (
        Peer("F.linear_cross_entropy", torch_linear_cross_entropy, gpu=False),
        Peer("liger_kernel", liger_linear_cross_entropy),
        Peer("liger_kernel 8", lambda: liger_linear_cross_entropy(8)),
        Peer("liger_kernel 16", lambda: liger_linear_cross_entropy(16)),
        Peer("cut_cross_entropy", cut_cross_entropy),
        Peer("cut_cross_entropy unfiltered", lambda: cut_cross_entropy(None)),
        Peer("quack", quack_linear_cross_entropy),
        Peer("fla", fla_linear_cross_entropy),
    ),
    "token_statistics": (Peer("trl", trl_token_statistics, gpu=False),),
}
