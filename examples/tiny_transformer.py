"""A language model small enough to read: two layers, random weights, and a head whose logits are never made."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_losses.linear_head import LinearHead
from fused_losses.linear_logits import LinearLogits


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.mlp = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class TinyTransformer(nn.Module):
    """``outputs`` is the vocabulary's size, or 1 for a reward model."""

    def __init__(
        self, vocab: int = 64, outputs: int | None = None, hidden: int = 32, layers: int = 2, positions: int = 64
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, hidden), nn.Embedding(positions, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads=2) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.head = LinearHead(hidden, vocab if outputs is None else outputs, bias=False)

    def hidden(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        S = ids.shape[1]
        visible = torch.ones(S, S, dtype=torch.bool).tril()
        if attention_mask is not None:
            visible = visible & attention_mask[:, None, None, :].bool() | torch.eye(S, dtype=torch.bool)
        x = self.tokens(ids) + self.positions(torch.arange(S))
        for block in self.blocks:
            x = block(x, visible)
        return self.norm(x)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> LinearLogits:
        return self.head(self.hidden(ids, attention_mask))

    @torch.no_grad()
    def sample(self, prompts: Tensor, tokens: int) -> Tensor:
        """``prompts`` ``(B, P)``, each followed by ``tokens`` sampled tokens."""
        ids = prompts
        for _ in range(tokens):
            last = self(ids)[:, -1].materialize()  # the logits of one token per row
            ids = torch.cat([ids, torch.multinomial(last.softmax(-1), 1)], 1)
        return ids
