"""The last layer of a language model, whose logits are never made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .linear_logits import LinearLogits


class LinearHead(nn.Linear):
    """The last layer of a language model, returning :class:`LinearLogits` where ``nn.Linear`` returns logits.

    A subclass of ``nn.Linear`` with the same parameters under the same names: checkpoints, tied embeddings and
    initialisation work as before. It gathers its own weight when ``fully_shard(head)`` or ZeRO-3 shards it.

    Args:
        in_features: H.
        out_features: V.
        bias: whether there is a bias.
        scale: multiplies the products (Granite, Cohere).
        softcap: bound of the logits (Gemma 2).
        rank: the rank of a LoRA update ``lora_B (V, R) · lora_A (R, H)`` beside the weight; 0: none.
        alpha: the update is scaled by ``alpha / rank``.
        dropout: probability of dropout on the update's input.

    Example:
        >>> head = LinearHead(4, 7, bias=False, softcap=30.0)
        >>> head(torch.ones(2, 3, 4)).shape
        torch.Size([2, 3, 7])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
        rank: int = 0,
        alpha: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.scale, self.softcap = scale, softcap
        self.add_update(rank, alpha, dropout)

    def add_update(self, rank: int, alpha: float = 1.0, dropout: float = 0.0) -> None:
        """Put a LoRA update of this rank beside the weight, which stays unchanged. It replaces any other update; 0: none."""
        self.alpha, self.dropout = alpha, dropout
        self.lora_A = self.lora_B = None
        if rank:
            self.lora_A = nn.Parameter(self.weight.new_empty(rank, self.in_features))
            self.lora_B = nn.Parameter(self.weight.new_zeros(self.out_features, rank))
            nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, scale: float = 1.0, softcap: float | None = None) -> LinearHead:
        """A head that shares the parameters of ``linear``, which must be a plain ``nn.Linear``."""
        if not isinstance(linear, nn.Linear):
            got = f"{type(linear).__module__}.{type(linear).__qualname__}"
            raise TypeError(
                f"from_linear takes an nn.Linear, the head itself, got {got}: merge an adapter first, or put one beside the "
                "LinearHead with add_update"
            )
        if getattr(linear.forward, "__func__", None) is not nn.Linear.forward or is_parametrized(linear):
            raise TypeError(
                f"from_linear takes an nn.Linear, got {type(linear).__name__}, whose forward or weight is its own and would be "
                "lost: an adapter is to be merged first or put beside the LinearHead with add_update, a scale or softcap "
                "named here, a parametrisation removed"
            )
        if linear._forward_hooks or linear._forward_pre_hooks:
            raise TypeError(f"the hooks of {linear} would be lost: put them on what from_linear returns")
        head = cls(linear.in_features, linear.out_features, device="meta", scale=scale, softcap=softcap)
        head.weight, head.bias = linear.weight, linear.bias
        return head.train(linear.training)

    def extra_repr(self) -> str:
        rank = 0 if self.lora_A is None else len(self.lora_A)
        options = {"scale": (self.scale, 1.0), "softcap": (self.softcap, None), "rank": (rank, 0)}
        named = [f"{name}={value}" for name, (value, default) in options.items() if value != default]
        return ", ".join([super().extra_repr(), *named])

    def forward(self, input: Tensor, *, temperature: float | Tensor = 1.0) -> LinearLogits:
        low_rank = None
        if self.lora_A is not None and self.lora_B is not None:
            u = F.linear(F.dropout(input, self.dropout, self.training), self.lora_A)
            low_rank = (u * (self.alpha / len(self.lora_A)), self.lora_B)
        return LinearLogits(
            input,
            self.weight,
            self.bias,
            scale=self.scale,
            softcap=self.softcap,
            temperature=temperature,
            low_rank=low_rank,
            module=self,
        )

    if TYPE_CHECKING:  # nn.Module's returns Any

        def __call__(self, input: Tensor, *, temperature: float | Tensor = 1.0) -> LinearLogits: ...
