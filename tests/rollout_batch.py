"""A batch of sampled sequences on which every clip, mask and weight has an effect."""

import torch

from fused_losses.sequences import document_borders

AGGREGATIONS = ["token_mean", "token_sum", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"]
LENGTHS = [7, 5, 0, 6, 3, 7]


def batch(dtype=torch.float64, garbage=float("nan")):
    """Ratios of tokens and of sequences beyond the clip on both sides, under advantages of both signs.

    Ragged rows, one of them fully masked; garbage at every masked position.
    """
    g = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    B, S = len(LENGTHS), max(LENGTHS)
    mask = (torch.arange(S) < torch.tensor(LENGTHS)[:, None]).long()
    mask[3, 2] = 0

    def log_ratio(*row_means):
        noise = normal(B, S).masked_fill(mask == 0, 0)
        centred = 0.5 * (noise - noise.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1))
        return centred + torch.tensor(row_means, dtype=torch.float64)[:, None]

    log_probs = -0.1 - 3 * torch.rand(B, S, generator=g, dtype=torch.float64)
    tokens = {
        "log_probs": log_probs,
        "old_log_probs": log_probs - log_ratio(0.4, -0.4, 0, 0.45, -0.05, 0.02),
        "ref_log_probs": log_probs - 0.5 * normal(B, S),
        "rollout_log_probs": log_probs - log_ratio(0.5, 0.1, 0, 0.15, -0.05, -0.2),
        "entropy": normal(B, S).abs(),
        "token_advantages": normal(B, S),
        "token_weight": normal(B, S).exp(),
    }
    tokens["some_zero_advantages"] = tokens["token_advantages"].masked_fill(torch.arange(S) % 3 == 1, 0)
    tokens["token_weight"][3, 0] = 0  # a weight of 0, like a mask's
    data = {name: x.masked_fill(mask == 0, garbage).to(dtype) for name, x in tokens.items()}
    data["mask"] = mask
    data["advantages"] = torch.tensor([1.3, -0.7, 0.9, -1.1, 0.4, -0.2], dtype=dtype)
    data["sequence_weight"] = torch.tensor([1.4, 0.6, 1.0, 0.9, 1.2, 0.8], dtype=dtype)
    return data


DATA = batch()


def pack(data):
    """The same batch packed into one row, without the tokens beyond each length (one masked token stays) and the empty row."""
    kept = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    present = torch.tensor(LENGTHS) > 0
    packed = {k: v[present] if v.dim() == 1 else v[kept].unsqueeze(0) for k, v in data.items()}
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).unsqueeze(0)
    return packed, document_borders(positions), kept
