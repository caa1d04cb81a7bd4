"""Other packages' versions of each case: adapters of a few lines, run side by side with ours in one process.

An adapter imports its package when it is built, so that a missing package is skipped with the reason. Each gets the options
that its package recommends for large heads, and a second entry where another choice is faster or smaller.
"""

# mypy: disable-error-code="import-not-found,import-untyped"
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .problem import Inputs

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


def torch_linear_cross_entropy(**chunks: Any) -> Call:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions(**chunks)
    return lambda x: F.linear_cross_entropy(x["hidden"], x["weight"], x["target"], options=options)


def liger_linear_cross_entropy(chunks_of: int = 1) -> Call:
    """``chunks_of``: the largest chunk of logits, as a multiple of the hidden states' bytes; 1 is Liger's default."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda x: liger_fused_linear_cross_entropy(x["hidden"], x["weight"], x["target"], chunk_mem_const=chunks_of)


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


def liger_divergence() -> Call:
    from liger_kernel.transformers.functional import liger_fused_linear_jsd

    return lambda x: liger_fused_linear_jsd(
        x["hidden"], x["weight"], x["teacher_hidden"], x["teacher_weight"], jsd_beta=0.0
    )


def fla_divergence() -> Call:
    from fla.modules.fused_kl_div import fused_kl_div_loss

    return lambda x: fused_kl_div_loss(x["hidden"], x["teacher_hidden"], x["weight"], x["teacher_weight"])


def trl_divergence() -> Call:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def call(x: Inputs) -> Any:
        teacher = (x["teacher_hidden"], x["teacher_weight"], None)
        return ChunkedDivergenceFunction.apply(x["hidden"], x["weight"], None, *teacher, 0.0)[0].mean()

    return call


def liger_dpo() -> Call:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(beta=0.1)

    def call(x: Inputs) -> Any:
        # Liger wants all chosen answers first: (B, 2, S, …) -> (2B, S, …).
        hidden, reference, target = (
            x[n].transpose(0, 1).flatten(0, 1) for n in ("hidden", "reference_hidden", "target")
        )
        return loss(x["weight"], hidden, target, ref_input=reference, ref_weight=x["weight"].detach())[0]

    return call


def liger_grpo() -> Call:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, epsilon_low=0.2, epsilon_high=0.28, loss_type="dapo")

    def call(x: Inputs) -> Any:
        mask = torch.ones_like(x["target"])
        return loss(
            x["hidden"], x["weight"], x["target"], mask, x["advantages"], old_per_token_logps=x["old_log_probs"]
        )[0]

    return call


def trl_grpo() -> Call:
    from trl.kernels import ChunkedLogProbFunction

    from .grpo import loss

    def call(x: Inputs) -> Any:
        head = (x["hidden"].flatten(0, 1), x["weight"], None, x["target"].flatten())
        log_probs = ChunkedLogProbFunction.apply(*head, 1.0, 32768, None, 1.0, ())[0]
        return loss(log_probs.view_as(x["target"]), x)

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
        Peer(
            "F.linear_cross_entropy 2048",
            lambda: torch_linear_cross_entropy(batch_chunk_size=2048, chunking_method=None),
            gpu=False,
        ),
        Peer("liger_kernel", liger_linear_cross_entropy),
        Peer("liger_kernel 8", lambda: liger_linear_cross_entropy(8)),
        Peer("liger_kernel 16", lambda: liger_linear_cross_entropy(16)),
        Peer("cut_cross_entropy", cut_cross_entropy),
        Peer("cut_cross_entropy unfiltered", lambda: cut_cross_entropy(None)),
        Peer("quack", quack_linear_cross_entropy),
        Peer("fla", fla_linear_cross_entropy),
    ),
    "token_statistics": (Peer("trl", trl_token_statistics, gpu=False),),
    "divergence": (
        Peer("liger_kernel", liger_divergence),
        Peer("trl", trl_divergence, gpu=False),
        Peer("fla", fla_divergence),
    ),
    "dpo": (Peer("liger_kernel", liger_dpo),),
    "grpo": (Peer("liger_kernel", liger_grpo), Peer("trl", trl_grpo, gpu=False)),
}
