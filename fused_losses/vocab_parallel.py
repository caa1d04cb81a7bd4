r"""A vocabulary shared by the ranks of a process group: each holds some rows of the head, none holds the logits.

Each rank computes the statistics of its part of a token's logits from its own rows, and those of the whole need only a few
numbers per token and rank. With :math:`lse_r` a rank's logsumexp and :math:`q_r = e^{lse_r - lse}` its share of probability:

.. math::
    lse = \log\sum_r e^{lse_r}, \quad \log p_y = \log p_y^r + lse_r - lse, \quad H = \sum_r q_r (H_r + lse - lse_r), \quad
    \log\sum p^2 = \log\sum_r q_r^2 e^{lss_r}, \quad \sum w \log p = \sum_r \big(s_r + (lse_r - lse) \textstyle\sum w_r\big)

Every rank gathers those numbers and merges them in the same order, so that all hold the same bits. From there on each rank
computes the gradient of its own logits by itself; the gradient of hidden is a sum over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .autodiff import trains
from .numerics import on_device, statistics_dtype
from .row_statistics import RowStatistics, empty_statistics, only, skipped

ROUTES = ("", "gradients_in_forward", "recompute")  # ranks compare the positions in it; "": neither of the two
# Bits of VocabShard.sums: which gradients the ranks sum. All ranks must agree on them.
HEAD, HIDDEN, U = 1, 2, 4  # there is a head, not logits that exist; its hidden wants a gradient; its u does
TEACHERS = 8  # times those bits: the same for a teacher's head
STUDENT, TEACHER = 64, 128  # where two sides' gradients need numbers of all ranks: this side wants any gradient


@dataclass(frozen=True)
class VocabParallel:
    """What to pass as ``group=`` where the group alone does not say which part of the vocabulary this rank holds.

    A bare process group stands for ``VocabParallel(group)``: every rank holds equally many consecutive rows, in rank order.

    Args:
        group: the ranks that share the vocabulary.
        vocab_range: ``(start, stop)``, the ids of this rank's rows; further rows of the shard are padding. By default it starts
            at ``rank·rows`` and has as many ids as there are rows. May be empty.
        vocab_size: V, of all ranks together; by default the rows of all. If it is smaller, the last rows are padding.

    Example:
        >>> VocabParallel(None, vocab_range=(0, 3), vocab_size=5).shard(rows=4)
        Traceback (most recent call last):
        ValueError: group is None: pass a process group, or call without group= for a whole vocabulary
    """

    group: Any
    vocab_range: tuple[int, int] | None = None
    vocab_size: int | None = None

    def shard(self, rows: int) -> VocabShard:
        """The :class:`VocabShard` that a shard of ``rows`` rows holds."""
        if self.group is None:
            raise ValueError("group is None: pass a process group, or call without group= for a whole vocabulary")
        rank, ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        if rank < 0:
            raise ValueError(f"this process, rank {dist.get_rank()}, is not in the group that shares the vocabulary")
        vocab = rows * ranks if self.vocab_size is None else self.vocab_size
        if self.vocab_range is None:
            start, stop = (min(at * rows, vocab) for at in (rank, rank + 1))
        elif self.vocab_size is None:
            raise ValueError(f"vocab_range {self.vocab_range} needs vocab_size, the rows of all {ranks} ranks together")
        else:
            start, stop = self.vocab_range
        if not 0 <= start <= stop <= vocab or stop - start > rows or vocab == 0:
            raise ValueError(
                f"rank {rank} of {ranks} holds {rows} rows, which cannot be the ids {(start, stop)} of {vocab}"
            )
        return VocabShard(self.group.group_name, start, stop, vocab, ranks)


def vocab_shard(group: Any, rows: int) -> VocabShard | None:
    """The :class:`VocabShard` that a ``group=`` argument gives a shard of ``rows`` rows; None for None."""
    if group is None or isinstance(group, VocabShard):
        return group
    return (group if isinstance(group, VocabParallel) else VocabParallel(group)).shard(rows)


def is_dtensor(x: Any) -> bool:
    return hasattr(x, "device_mesh")


def local_part(logits: Any, group: Any, dim: int = -1) -> tuple[Any, VocabShard | None]:
    """This rank's columns of the logits without padding, and its :class:`VocabShard`: None where the vocabulary is not shared.

    ``dim`` is the dimension of the classes; ``group`` or a DTensor's placements say which ranks share it.
    """
    if not isinstance(logits, Tensor):
        if group is not None:
            raise ValueError(
                "a LinearLogits knows the group that shares its vocabulary: give group= to its constructor"
            )
        return logits, logits.shard
    if is_dtensor(logits):
        from .tensor_parallel import local_logits

        logits, group = local_logits(logits, dim, group)  # type: ignore[arg-type]
    shard = vocab_shard(group, logits.shape[dim] if logits.ndim else 0)
    if shard is None or shard.size == logits.shape[dim]:  # the gradient of a full-size view would be copied
        return logits, shard
    return logits.narrow(dim, 0, shard.size), shard


def local_target(target: Tensor) -> Tensor:
    return target.to_local() if is_dtensor(target) else target  # type: ignore[attr-defined]


class VocabShard(NamedTuple):
    """This rank's share of a vocabulary: the ids ``[start, stop)`` of ``vocab``. ``group`` is the name of the process group."""

    group: str
    start: int
    stop: int
    vocab: int
    ranks: int
    # Where hidden was gathered from tokens (outer, ranks, inner), each rank wants its own tokens' gradient; (0, 0): all.
    outer: int = 0
    inner: int = 0
    sums: int = 0  # the sum of bits HEAD, HIDDEN, …

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def even_size(self) -> int:
        """How many ids a rank has where they are split evenly."""
        return -(-self.vocab // self.ranks)

    @property
    def part(self) -> slice:
        return slice(self.start, self.stop)

    @classmethod
    def unpacked(cls, text: str) -> VocabShard | None:
        if not text:
            return None
        *numbers, group = text.split(":", 7)
        return cls(group, *map(int, numbers))

    def of_head(self, hidden: Tensor, u: Tensor | None) -> VocabShard:
        """This shard, with the bits of a head that reads ``hidden`` and ``u``."""
        return self._replace(sums=self.sums + HEAD + HIDDEN * trains(hidden) + U * trains(u))

    def of_sides(self, student: Any, teacher: Any) -> VocabShard:
        """This shard, with the bits of a comparison of these two."""
        return self._replace(sums=STUDENT * trains(student) + TEACHER * trains(teacher))

    def beside(self, teacher: VocabShard) -> VocabShard:
        """This shard, of a student's head, with the bits of the teacher's head that it is compared with."""
        return self._replace(sums=self.sums + TEACHERS * teacher.sums)

    def local(self, ids: Tensor) -> Tensor:
        """Ids counted from this rank's first row; −100 stays, and an id of another rank becomes one beyond ``size``, where
        there is no row."""
        mine = (ids >= self.start) & (ids < self.stop)
        return torch.where(mine, ids - self.start, ids + self.size + 1).masked_fill(ids == -100, -100)

    def sum_of(self, local: Tensor) -> Tensor:
        """The sum of the ids that :meth:`local` turned into ``local``."""
        of_all = torch.where(local > self.size, local - self.size - 1, local + self.start)
        return torch.where(local == -100, local, of_all).sum()

    def process_group(self) -> Any:
        return dist.distributed_c10d._resolve_process_group(self.group)  # type: ignore[arg-type]

    def gather(self, x: Tensor) -> Tensor:
        """``x`` of every rank, ``(R, *x.shape)``."""
        group = self.process_group()
        out = x.new_empty(self.ranks * x.numel())
        # all_gather_single is its name from torch 2.13 on.
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        all_gather(out, x.reshape(-1).contiguous(), group=group)
        return out.view(self.ranks, *x.shape)

    def gather_checked(self, x: Tensor, route: str = "", rows: int = 0, ids: Tensor | None = None) -> Tensor:
        """:meth:`gather`; raises on all ranks unless together they hold the vocabulary exactly once and make the same call: the
        same size, route, number of rows and (local) ids."""
        total = 0 if ids is None else self.sum_of(ids)
        call = (*self[1:4], ROUTES.index(route), self.sums, rows, x.numel(), total)
        # Gathered on their own, so that all ranks' sizes are the same even then.
        _check_alike(self.gather(torch.stack([on_device(n, x.device, torch.int64) for n in call])))
        return self.gather(x)

    def topk(self, values: Tensor, ids: Tensor, largest: bool) -> tuple[Tensor, Tensor]:
        """The best of every rank's ``(N, k)``, with ids of the whole vocabulary; a negative id stands for no entry."""
        k, ids = values.shape[1], torch.where(ids < 0, ids, ids + self.start)
        both, both_ids = (self.gather(t).movedim(0, 1).flatten(1) for t in (values, ids))
        last = (both_ids < 0).byte().argsort(stable=True)  # places without an entry last, after −inf too
        both, both_ids = both.gather(-1, last), both_ids.gather(-1, last)
        if k == 1:
            return best_of(both, both_ids, k, largest)
        at = both.argsort(stable=True, descending=largest)[:, :k]
        return both.gather(-1, at), both_ids.gather(-1, at)

    def begin_sum(self, x: Tensor) -> Callable[[], Any]:
        """Start an in-place sum over the ranks of ``x``, a row per token; call the result to wait for it.

        Where ``x`` has the tokens of all ranks and each rank needs only its own, the other rows are left as they were.
        """
        group = self.process_group()
        if self.inner == 0 or x.shape[:-1].numel() != self.outer * self.ranks * self.inner:
            return dist.all_reduce(x, group=group, async_op=True).wait
        of_rank = x.view(self.outer, self.ranks, self.inner, x.shape[-1]).transpose(0, 1)
        mine = torch.empty_like(of_rank[0], memory_format=torch.contiguous_format)
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        parts = of_rank.contiguous()
        work = reduce_scatter(mine.view(-1), parts.view(-1), group=group, async_op=True)

        def end() -> None:
            work.wait()
            of_rank[dist.get_rank(group)] = mine

        return end


class _SummedInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: VocabShard) -> Tensor:
        ctx.shard = shard
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.to(statistics_dtype(grad.dtype), copy=True)
        ctx.shard.begin_sum(total)()
        return total.to(grad.dtype), None


def summed_in_backward(x: Tensor, shard: VocabShard) -> Tensor:
    """``x``, the same on all ranks, whose gradient is the sum of all ranks' gradients."""
    return _SummedInBackward.apply(x, shard)


def best_of(values: Tensor, ids: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    """The ``k`` largest or smallest of ``(N, m)`` and their ids, fewer where ``m < k``; for ``k = 1``, the first of equals."""
    if k == 1:
        best, at = values.max(-1, keepdim=True) if largest else values.min(-1, keepdim=True)
    else:
        best, at = values.topk(min(k, values.shape[-1]), largest=largest)
    return best, ids.gather(-1, at)


def packed(shard: VocabShard | None) -> str:
    """The shard as an operator takes it; :meth:`VocabShard.unpacked` is the inverse."""
    return "" if shard is None else ":".join(str(x) for x in (*shard[1:], shard.group))


def with_weight_sum(outputs: Sequence[str], shard: VocabShard | None) -> Sequence[str]:
    """``outputs``, with what their gradient needs where ranks share the weights too."""
    return (*outputs, "weight_sum") if shard is not None and "sum_log_probs" in outputs else outputs


def _check_alike(found: Tensor) -> None:
    """Raise on every rank unless all shards together are the vocabulary exactly once, in order, and the calls are alike."""
    start, stop, vocab, *call = found.unbind(1)  # (R,) each
    fits = (start[1:] == stop[:-1]).all() & (start[0] == 0) & (stop[-1] == vocab[-1]) & (vocab == vocab[0]).all()
    alike = (found[1:, 3:] == found[0, 3:]).all()
    if found.device.type != "cpu":
        torch._assert_async(fits & alike)
    elif not fits:
        ranges = [(int(a), int(b)) for a, b in zip(start, stop, strict=True)]
        raise ValueError(
            f"the ranks of a group must hold consecutive parts of one vocabulary in rank order, from 0 to its size; got "
            f"{ranges} of {[int(v) for v in vocab]}"
        )
    elif not alike:
        route, sums, rows, numbers, ids = (x.tolist() for x in call)
        bits = {"hidden": HIDDEN, "u": U}
        bits |= {f"of the teacher {name}": TEACHERS * bit for name, bit in bits.items()}
        wanted = [", ".join(name for name, bit in bits.items() if x & bit) or "neither" for x in sums]
        values: dict[str, list[Any]] = {
            "routes": [ROUTES[x] or "of two heads" for x in route],
            "of a head": [bool(x & (HEAD | TEACHERS * HEAD)) for x in sums],
            "what of hidden and u wants a gradient": wanted,
            "whether the student wants any": [bool(x & STUDENT) for x in sums],
            "whether the teacher wants any": [bool(x & TEACHER) for x in sums],
            "tokens of a chunk": rows,
            "numbers to exchange": numbers,
            "sums of the ids": ids,
        }
        differ = "; ".join(f"{name} {x}" for name, x in values.items() if len(set(x)) > 1)
        raise ValueError(
            "the ranks of a group that shares a vocabulary must call alike: the same batch, mask, route, workspace and "
            f"requires_grad; got, rank by rank, {differ}"
        )


def _statistics_of_nothing(like: Tensor, rows: int, ids: Tensor | None, outputs: Collection[str]) -> RowStatistics:
    found = empty_statistics(like, rows, ids, outputs)
    minus_infinity = ("logsumexp", "log_sum_sq_probs", "max_logit")
    pairs = zip(RowStatistics._fields, found, strict=True)
    return RowStatistics(*(None if t is None else t.fill_(-torch.inf if n in minus_infinity else 0) for n, t in pairs))


def merged_statistics(
    of_mine: Callable[[Collection[str]], RowStatistics],
    like: Tensor,
    rows: int,
    ids: Tensor | None,  # (N, K), local
    weight_sum: Tensor | float | None,  # Σ w of this rank's columns; None: of_mine gives it
    outputs: Collection[str],
    shard: VocabShard,
    route: str = "gradients_in_forward",
) -> RowStatistics:
    """Statistics of the whole rows, merged from every rank's ``of_mine(outputs)``, the statistics of its columns."""
    needed = {*outputs} | ({"max_logit"} if "is_top1" in outputs else set())
    needed -= {"weight_sum"} if weight_sum is not None else set()
    mine = of_mine(sorted(needed)) if shard.size else _statistics_of_nothing(like, rows, ids, needed)
    lse = mine.logsumexp
    if mine.log_probs is not None and ids is not None:
        mine = mine._replace(log_probs=mine.log_probs.masked_fill(ids >= shard.size, -torch.inf))
    if mine.sum_log_probs is not None and weight_sum is not None:
        total = weight_sum if isinstance(weight_sum, Tensor) else lse.new_full((), weight_sum)
        mine = mine._replace(weight_sum=total.to(lse.dtype).expand(rows))
    parts = {name: t for name, t in mine._asdict().items() if t is not None}
    numbers = torch.cat([t.reshape(-1).to(lse.dtype) for t in parts.values()])
    gathered = shard.gather_checked(numbers, route, rows, ids)
    columns = gathered.split([t.numel() for t in parts.values()], 1)
    whole = _whole(
        {name: x.reshape(shard.ranks, *t.shape) for (name, t), x in zip(parts.items(), columns, strict=True)}
    )
    skip = skipped(ids)

    def finished(name: str) -> Tensor | None:
        if name not in whole:
            return None
        ignored = ids == -100 if name == "log_probs" and ids is not None else skip
        value = whole[name] if ignored is None else whole[name].masked_fill(ignored, 0)
        return value.to(parts[name].dtype)

    return only([finished(name) for name in RowStatistics._fields], outputs, ids is not None)


def _whole(of: dict[str, Tensor]) -> dict[str, Tensor]:
    """The module's equations; each argument is ``(R, N)``, ``log_probs`` ``(R, N, K)``."""
    lse = of["logsumexp"].logsumexp(0)
    less = of["logsumexp"] - lse  # ≤ 0
    share, gone = less.exp(), less == -torch.inf  # a rank all of whose logits are −inf has no statistics of its own
    whole = {"logsumexp": lse}

    def total(terms: Tensor, where_gone: float | Tensor) -> Tensor:
        return torch.where(gone, where_gone, terms).sum(0)

    if "log_probs" in of:
        log_probs = torch.where(gone[..., None], -torch.inf, of["log_probs"] + less[..., None])
        whole["log_probs"] = log_probs.amax(0).clamp(max=0)
    if "entropy" in of:
        whole["entropy"] = total(share * (of["entropy"] - less), 0.0)
    if "log_sum_sq_probs" in of:
        whole["log_sum_sq_probs"] = torch.where(gone, -torch.inf, of["log_sum_sq_probs"] + 2 * less).logsumexp(0)
    if "sum_log_probs" in of:
        weight_sum = of["weight_sum"]
        no_weight = torch.where(weight_sum == 0, 0.0, -torch.inf).to(lse.dtype)
        whole["weight_sum"] = weight_sum.sum(0)
        whole["sum_log_probs"] = total(of["sum_log_probs"] + weight_sum * less, no_weight)
    if "max_logit" in of:
        whole["max_logit"], first = of["max_logit"].max(0)
        if "is_top1" in of:
            whole["is_top1"] = of["is_top1"].gather(0, first[None])[0]
    return whole
