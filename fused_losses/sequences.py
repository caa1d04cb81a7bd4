"""From tokens to sequences: which tokens count, where a document ends, and what a sequence sums to.

Masked values are replaced by 0 before the sum, never multiplied by zero: a nan or inf among them reaches neither the
value nor the gradient.

Two layouts hold a batch. Padded: ``(B, S)`` and a mask. Packed: ``(1, total)``, documents end to end, where either
``cu_seqlens`` ``(n + 1,)`` holds the documents' borders ``0 … total``, or ``position_ids`` restarts at 0 with each document.
Packed rows are never unpacked here. Nothing waits for the device, except where ``position_ids`` come without
``num_sequences``: only the device then has the number of documents, and the host needs it as a shape.
"""

from __future__ import annotations

from math import prod
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .autodiff import same_sizes, traced, transforms_active
from .numerics import check_choice, check_masks, on_device, upcast, wide_dtype
from .token_statistics import integer_ids


def same_shape(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors have one shape, as broadcasting would quietly give another loss, and each one
    named a mask is a mask; None is left out.

    Example:
        >>> same_shape(chosen=torch.ones(3), rejected=torch.ones(3, 1))
        Traceback (most recent call last):
        ValueError: chosen and rejected must have one shape, got (3,) and (3, 1)
    """
    given = {name: x.shape for name, x in tensors.items() if x is not None}
    sizes = list(given.values())
    if any(not same_sizes(shape, sizes[0]) for shape in sizes):
        shapes = " and ".join(str(tuple(shape)) for shape in given.values())
        raise ValueError(f"{' and '.join(given)} must have one shape, got {shapes}")
    check_masks(**{name: x for name, x in tensors.items() if name.endswith("mask")})


def check_tensors(**given: Any) -> None:
    """Raise TypeError for an argument that is not a tensor."""
    for name, x in given.items():
        if not isinstance(x, Tensor):
            what = f"{type(x).__name__}: unpack it" if isinstance(x, tuple) else f"{x!r:.40}"
            if hasattr(x, "materialize"):
                what = f"lazy logits {tuple(x.shape)}: pass selective_log_softmax(logits, ids)"
            raise TypeError(f"{name} must be a tensor, got {what}")


def if_logits(x: Tensor) -> str:
    """The end of an error about the shape of log-probabilities: a hint where ``x`` has the shape of logits."""
    return ": of logits, pass selective_log_softmax(logits, ids)" if x.dim() == 3 else ""


def _one_packing(cu_seqlens: Tensor | None, position_ids: Tensor | None) -> None:
    if cu_seqlens is not None and position_ids is not None:
        raise ValueError("packed rows take cu_seqlens or position_ids, got both: leave one out")


def masked_sum(x: Tensor, mask: Tensor | None, dim: int | None = None) -> Tensor:
    """Sum of ``x`` over ``dim`` or over everything, where ``mask``, of the same shape, is nonzero; ``None``: everywhere.

    Example:
        >>> masked_sum(torch.tensor([1.0, float("nan"), 2.0]), torch.tensor([1, 0, 1]))
        tensor(3.)
    """
    same_shape(x=x, mask=mask)
    if mask is not None:
        x = x.masked_fill(mask == 0, 0)
    return x.sum(dim)


def masked_mean(x: Tensor, mask: Tensor | None, dim: int | None = None) -> Tensor:
    """Mean of ``x`` where ``mask``, of the same shape, is nonzero; 0 where nothing is selected.

    Example:
        >>> masked_mean(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.tensor([[1, 1], [0, 0]]), dim=-1)
        tensor([2., 0.])
    """
    if mask is None:
        return x.mean(dim) if x.numel() else x.sum(dim)
    return masked_sum(x, mask, dim) / (mask != 0).sum(dim).clamp(min=1)


def at_least_one(count: Any) -> Any:
    """``count``, which may be a fraction, or 1 where it is 0: the divisor of a sum that may be empty."""
    return count + (count == 0)


def document_borders(position_ids: Tensor, num_sequences: int | None = None) -> Tensor:
    """``cu_seqlens`` of rows packed with ``position_ids``: where each document starts, and where the last one ends.

    A document starts at every position 0, and at the start of every row.

    Args:
        position_ids: ``(1, total)``, or ``(B, S)``, rows that each hold whole documents and count as one long row.
        num_sequences: how many documents there are. Tokens behind them (padding, where every position is 0) are left
            out; missing documents count as empty. ``None`` counts the documents, which waits for the device.

    Returns:
        ``(num_sequences + 1,)`` int64, on the device of ``position_ids``.

    Example:
        >>> document_borders(torch.tensor([[0, 1, 2, 0, 1]]))
        tensor([0, 3, 5])
    """
    starts = position_ids == 0
    starts[..., :1] = True
    document = starts.flatten().cumsum(0) - 1
    if num_sequences is None:
        num_sequences = int(starts.sum())
    return torch.searchsorted(document, torch.arange(num_sequences + 1, device=document.device))


def checked_borders(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """``cu_seqlens`` in int64, none of them beyond the last token.

    Validated on the CPU only; on a GPU checking would synchronise.

    Example:
        >>> checked_borders(torch.tensor([0, 2, 4], dtype=torch.int32), tokens=5)
        tensor([0, 2, 4])
    """
    if cu_seqlens.dim() != 1 or not len(cu_seqlens):
        raise ValueError(f"cu_seqlens must be (n + 1,) for n documents, got {tuple(cu_seqlens.shape)}")
    borders = cu_seqlens.long()
    if (
        borders.is_cpu
        and not traced(borders)
        and (borders[0] != 0 or borders[-1] > tokens or bool((borders.diff() < 0).any()))
    ):
        raise ValueError(
            f"cu_seqlens must rise from 0 to at most the number of tokens, {tokens}, got {borders.tolist()}: pass the "
            "borders of these tokens; do not slice the last one off, shift_labels lets logits stay whole"
        )
    return borders.clamp(0, tokens)


def sums_and_counts(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    position_ids: Tensor | None = None,
    num_sequences: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum of ``x`` over the unmasked tokens of each sequence, and their number.

    A packed row is summed without unpacking it, in float64 and in one order, so that every run gives the same bits.

    Args:
        x: ``(B, S)``, whose rows are the sequences; packed: ``(1, total)``, one number per token, or ``(B, S)``, rows that
            count as one long row.
        mask: as ``x``, nonzero for the tokens that count; ``None``: all.
        cu_seqlens: ``(n + 1,)`` integers, the borders of a packed row's documents, rising from 0. Tokens behind the last
            border belong to no document.
        position_ids: as ``x``, instead of ``cu_seqlens``; see :func:`document_borders`, also for ``num_sequences``.

    Returns:
        Two tensors ``(B,)``, packed ``(n,)``: sums in fp32 (float64 for float64), differentiable in ``x`` (packed: once), and
        int64 counts; 0 and 0 for an empty sequence.

    Raises:
        ValueError: both ``cu_seqlens`` and ``position_ids`` are given, the shape of the mask or of ``position_ids`` is not
            that of ``x``, or ``cu_seqlens`` on the CPU do not rise from 0 to at most the number of tokens. On a GPU they
            are not checked, but clamped to the number of tokens.

    Example:
        >>> sums_and_counts(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0, 1, 1]]))
        (tensor([6.]), tensor([2]))
        >>> sums_and_counts(torch.tensor([[1.0, 2.0, 4.0]]), cu_seqlens=torch.tensor([0, 1, 3]))
        (tensor([1., 6.]), tensor([1, 2]))
    """
    same_shape(tokens=x, mask=mask, position_ids=position_ids)
    _one_packing(cu_seqlens, position_ids)
    shown = torch.ones_like(x, dtype=torch.bool) if mask is None else mask != 0
    x = upcast(x).masked_fill(~shown, 0)
    if position_ids is not None:
        cu_seqlens = document_borders(position_ids, num_sequences)
    if cu_seqlens is None:
        return x.sum(-1), shown.sum(-1)
    borders = checked_borders(cu_seqlens, x.numel())

    def per_document(values: Tensor) -> Tensor:
        # `unsafe` skips the check of the borders, which would wait for the device.
        return torch.segment_reduce(
            values.flatten().to(wide_dtype(values.device)), "sum", offsets=borders, initial=0, unsafe=True
        )

    return per_document(x).to(x.dtype), per_document(shown).long()


def packed_sum(x: Tensor, mask: Tensor | None = None, **packing: Any) -> Tensor:
    """The sums of :func:`sums_and_counts`, whose keywords it takes.

    Example:
        >>> packed_sum(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), cu_seqlens=torch.tensor([0, 3, 4]))
        tensor([6., 4.])
    """
    return sums_and_counts(x, mask, **packing)[0]


def packed_mean(x: Tensor, mask: Tensor | None = None, **packing: Any) -> Tensor:
    """Mean per sequence, from :func:`sums_and_counts`, whose keywords it takes; 0 where nothing is selected.

    Example:
        >>> packed_mean(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1, 1, 0]]), cu_seqlens=torch.tensor([0, 2, 3]))
        tensor([1.5000, 0.0000])
    """
    total, count = sums_and_counts(x, mask, **packing)
    return total / count.clamp(min=1)


class Sequences:
    """Which tokens count and which sequence each belongs to: a row of ``(B, S)``, or a stretch of a packed row."""

    def __init__(self, name: str, tokens: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
        check_tensors(**{name: tokens})
        if tokens.dim() != 2 or (cu_seqlens is not None and len(tokens) != 1):
            shape = f"{tuple(tokens.shape)}{if_logits(tokens)}"
            raise ValueError(f"{name} must be (B, S), or (1, total) with cu_seqlens; got {shape}")
        same_shape(**{name: tokens}, mask=mask)
        self.mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask != 0
        cu_seqlens = None if cu_seqlens is None else checked_borders(cu_seqlens, tokens.shape[1])
        self.cu_seqlens = cu_seqlens
        self.number = len(tokens) if cu_seqlens is None else len(cu_seqlens) - 1
        if cu_seqlens is not None:
            place = torch.arange(tokens.shape[1], device=tokens.device)
            self.mask = self.mask & (place < cu_seqlens[-1])
            self.document = torch.searchsorted(cu_seqlens[1:-1], place, right=True)

    def hide(self, name: str, x: Tensor, or_per_sequence: bool = False) -> Tensor:
        """``x`` in fp32 or float64, 0 at every token that does not count."""
        if x.shape != self.mask.shape:
            otherwise = f"one per sequence ({self.number},) or " if or_per_sequence else ""
            raise ValueError(f"{name} must be {otherwise}one per token {tuple(self.mask.shape)}, got {tuple(x.shape)}")
        return upcast(x).masked_fill(~self.mask, 0)

    def sum(self, x: Tensor) -> Tensor:
        """(B,)"""
        if self.cu_seqlens is None:
            return masked_sum(x, self.mask, -1)
        return packed_sum(x, self.mask, cu_seqlens=self.cu_seqlens)

    def mean(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B,)"""
        mask = self.mask if mask is None else mask
        if self.cu_seqlens is None:
            return masked_mean(x, mask, -1)
        return packed_mean(x, mask, cu_seqlens=self.cu_seqlens)

    def constant(self, name: str, x: Tensor) -> Tensor:
        """``x`` detached, in fp32 or float64: ``(B,)`` if it has one number per sequence, else one per token."""
        x = upcast(x.detach())
        if self.cu_seqlens is None and x.shape == (self.number, 1):
            x = x.squeeze(1)
        return x if x.shape == (self.number,) else self.hide(name, x, or_per_sequence=True)

    def spread(self, x: Tensor) -> Tensor:
        """``x`` broadcastable with the tokens: ``(B,)`` as ``(B, 1)``, packed ``(1, total)``; a token tensor as it is."""
        if x.dim() == 2:
            return x
        if self.cu_seqlens is None:
            return x.unsqueeze(1)
        x = x if len(x) else F.pad(x, (0, 1))  # no documents: every token is behind the last border
        return x[self.document].unsqueeze(0)

    def nonempty(self) -> Tensor:
        """(B,) bool"""
        return self.sum(self.mask.float()) > 0

    def average(self, x: Tensor, per_sequence: bool = False, count_empty: bool = False) -> Tensor:
        """Mean over the tokens that count, or over sequences: those with any, or with ``count_empty`` all, empty ones as 0."""
        x = upcast(x).expand_as(self.mask)
        if per_sequence and count_empty:
            return self.mean(x).sum() / max(self.number, 1)
        return masked_mean(self.mean(x), self.nonempty()) if per_sequence else masked_mean(x, self.mask)


def sequence_log_probs(
    token_logps: Tensor,
    mask: Tensor | None = None,
    average: bool = False,
    *,
    cu_seqlens: Tensor | None = None,
    position_ids: Tensor | None = None,
    num_sequences: int | None = None,
) -> Tensor:
    r"""Log-probability of each sequence: the sum over its tokens, or with ``average`` the mean.

    .. math:: \log\pi(y) = \sum_t m_t \log\pi(y_t \mid y_{<t}) \quad (\,/ \sum_t m_t\,)

    Nothing is shifted: ``mask[b, t]`` decides whether ``token_logps[b, t]`` counts.

    Source: TRL 1.16's and OpenRLHF's ``average_log_prob``. As there, the average over no tokens is 0/0, so nan; the sum
    is 0.

    Args:
        token_logps: ``(B, S)`` log-probabilities in nats; packed: ``(1, total)``.
        mask: as ``token_logps``, nonzero for the tokens that count; ``None``: all.
        average: the mean over a sequence's tokens instead of the sum.
        cu_seqlens, position_ids, num_sequences: for packed rows, as for :func:`sums_and_counts`.

    Returns:
        ``(B,)``, packed ``(n,)``; fp32 (float64 for float64), differentiable in ``token_logps``.

    Raises:
        ValueError: ``token_logps`` are sums already, or as for :func:`sums_and_counts`.

    Example:
        >>> sequence_log_probs(torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[1, 1, 0]]))
        tensor([-3.])
        >>> sequence_log_probs(torch.tensor([[-1.0, -2.0, -9.0]]), average=True, cu_seqlens=torch.tensor([0, 2, 3]))
        tensor([-1.5000, -9.0000])
    """
    packed = cu_seqlens is not None or position_ids is not None
    if token_logps.dim() < 2 and not packed and not transforms_active():  # under vmap a row is (S,)
        raise ValueError(
            "token_logps must be of tokens (B, S), or packed with cu_seqlens or position_ids, got "
            f"{tuple(token_logps.shape)}: sums (B,) are not summed again"
        )
    total, count = sums_and_counts(
        token_logps, mask, cu_seqlens=cu_seqlens, position_ids=position_ids, num_sequences=num_sequences
    )
    return total / count if average else total


def shift_labels(
    labels: Tensor,
    ignore_index: int = -100,
    *,
    cu_seqlens: Tensor | None = None,
    position_ids: Tensor | None = None,
    context_group: dist.ProcessGroup | None = None,
    zigzag: bool = False,
) -> Tensor:
    """Labels moved one place to the left: at each position the token that follows it in the same document.

    Logits then stay whole. Slicing off their last position would cost a logits-sized copy in backward.

    Where ranks share the sequence (context parallelism), the token that follows a part's last one is the first of another
    rank's part: the ranks all-gather the first label of each of their parts, one or two numbers per row. A caller with whole
    labels can instead shift them first and split them afterwards, with the same result.

    Args:
        labels: ``(B, S)`` or packed ``(1, total)`` token ids; this rank's part of them.
        ignore_index: the label where no token follows: at the end of each row and of each document.
        cu_seqlens: borders of a packed row's documents, as for :func:`sums_and_counts`; several rows count as one long row.
            Ranks that share the row pass the borders of the whole row, and hold equal parts of it.
        position_ids: as ``labels``, instead of ``cu_seqlens``: a document starts at every 0.
        context_group: the ranks that share the sequences; each holds at least one token of every row.
        zigzag: of ``2R`` equal chunks, rank ``r`` of ``R`` holds chunks ``r`` and ``2R − 1 − r``, concatenated, so that causal
            attention costs all ranks the same (ring attention's zigzag, PyTorch's ``context_parallel`` with load balancing);
            otherwise the ranks hold consecutive parts, in rank order.

    Returns:
        int64 in the shape of ``labels``.

    Raises:
        TypeError: ``labels`` are not integers.
        ValueError: ``labels`` of no dimension, ``position_ids`` not shaped like them, wrong ``cu_seqlens`` as for
            :func:`sums_and_counts`, both are given, a zigzag part has an odd length, or a part has no tokens.

    Example:
        >>> shift_labels(torch.tensor([[1, 2, 3, 4, 5]]), cu_seqlens=torch.tensor([0, 3, 5]))
        tensor([[   2,    3, -100,    5, -100]])
    """
    _one_packing(cu_seqlens, position_ids)
    labels = integer_ids(labels)  # in uint8 −100 would be 156
    if labels.ndim == 0:
        raise ValueError("labels must be (B, S) or (1, total), got ()")
    if context_group is not None and labels.shape[-1] == 0:  # the others would wait for this rank's first label
        raise ValueError(f"each rank of a context_group holds a token of every row, got labels {tuple(labels.shape)}")
    rank, ranks = (
        (0, 1) if context_group is None else (dist.get_rank(context_group), dist.get_world_size(context_group))
    )
    zigzag = zigzag and ranks > 1
    mine = [rank, 2 * ranks - 1 - rank] if zigzag else [rank]  # which chunks of the whole row these are
    if labels.shape[-1] % len(mine):
        raise ValueError(f"zigzag labels are two chunks of equal length, got {tuple(labels.shape)}")
    chunks = labels.unflatten(-1, (len(mine), -1))  # (B, chunks, length)
    length = chunks.shape[-1]
    # Nobody predicts a document's first token.
    if position_ids is not None:
        same_shape(labels=labels, position_ids=position_ids)
        chunks = chunks.masked_fill(position_ids.reshape(chunks.shape) == 0, ignore_index)
    elif cu_seqlens is not None:
        rows, whole = prod(labels.shape[:-1]), ranks * labels.shape[-1]
        first = torch.stack([on_device(i, labels.device) for i in mine]).unsqueeze(-1) * length
        place = first + torch.arange(length, device=labels.device)
        place = place + whole * torch.arange(rows, device=labels.device).view(*labels.shape[:-1], 1, 1)
        starts = torch.isin(place, checked_borders(cu_seqlens, rows * whole))
        chunks = chunks.masked_fill(starts, ignore_index)
    following = chunks.new_full(chunks.shape[:-1], ignore_index)  # (B, chunks)
    if ranks > 1:
        firsts = [torch.empty_like(following) for _ in range(ranks)]
        dist.all_gather(firsts, chunks[..., 0].contiguous(), context_group)
        in_order = [firsts[r][..., 0] for r in range(ranks)]
        in_order += [firsts[r][..., 1] for r in reversed(range(ranks))] if zigzag else []
        in_order.append(following[..., 0])
        following = torch.stack([in_order[chunk + 1] for chunk in mine], -1)
    # Joined, then cut, so that a row without tokens stays empty: a compiled function may not know whether it has any.
    return torch.cat([chunks, following.unsqueeze(-1)], -1)[..., 1:].flatten(-2).contiguous()


def concatenate_pairs(
    chosen: Tensor, rejected: Tensor, pad_value: float = 0, *, padding_side: Literal["right", "left"] = "right"
) -> Tensor:
    """Chosen over rejected in one batch, the shorter side padded, so that one forward serves both.

    Used for ids (``pad_value`` is the pad id), masks (0) and labels (-100) alike. :func:`split_pairs` splits whatever the
    model returns into the two halves again; reference log-probs computed beforehand are such halves already.

    Args:
        chosen: ``(B, S_w)``.
        rejected: ``(B, S_l)``.
        pad_value: what fills the shorter side.
        padding_side: the end at which it is filled.

    Returns:
        ``(2B, max(S_w, S_l))``.

    Raises:
        ValueError: ``chosen`` and ``rejected`` differ in more than their length, or an unknown ``padding_side``.

    Example:
        >>> concatenate_pairs(torch.tensor([[1, 2, 3]]), torch.tensor([[1, 4]]))
        tensor([[1, 2, 3],
                [1, 4, 0]])
    """
    if chosen.dim() != 2 or rejected.dim() != 2 or len(chosen) != len(rejected):
        raise ValueError(
            f"chosen and rejected must be (B, S) with the same B, got {tuple(chosen.shape)} and {tuple(rejected.shape)}"
        )
    check_choice(("right", "left"), padding_side=padding_side)
    length = max(chosen.shape[1], rejected.shape[1])

    def padded(x: Tensor) -> Tensor:
        missing = length - x.shape[1]
        return F.pad(x, (0, missing) if padding_side == "right" else (missing, 0), value=pad_value)

    return torch.cat([padded(chosen), padded(rejected)])


def split_pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen and the rejected half of a ``(2B, …)`` batch from :func:`concatenate_pairs`: views; lazy for lazy logits.

    Raises:
        ValueError: the first dimension is odd.

    Example:
        >>> split_pairs(torch.tensor([-1.0, -2.0, -3.0, -4.0]))
        (tensor([-1., -2.]), tensor([-3., -4.]))
    """
    if x.shape[0] % 2:
        raise ValueError(f"pairs are (2B, …), chosen over rejected; got {tuple(x.shape)}")
    half = x.shape[0] // 2
    return x[:half], x[half:]
