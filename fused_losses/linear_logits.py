"""Logits that are never made: the hidden states and the head that would make them.

A language model's logits are ``tokens × vocabulary``, the largest tensor of a training step, and a loss reads only a
few numbers per token from them. :class:`LinearLogits` stands for that tensor: it has its shape and its gradients, and
computes what a loss reads of it from ``hidden`` and ``weight``.
"""

from __future__ import annotations

import copy
import functools
import math
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from . import settings
from .autodiff import exporting, no_gradient, transforms_active
from .chunked.linear_softmax import logits_tile
from .chunked.softmax_rows import transform
from .head import Head, head_of, kept_tokens, whole_logits
from .lazy_tensor import LazyTensor, answers, is_number, numel, per_entry_number, per_token_number, wrap_dim
from .linear_logits_checks import (
    Snapshot,
    autocast,
    check_shapes,
    check_tensors,
    check_whereabouts,
    per_token_temperature,
    refuse_autograd_function,
    refuse_reentrant_checkpoint,
    version,
    watch,
)
from .linear_logits_known import Known
from .numerics import check_scaling, full_precision, on_device, statistics_dtype
from .recompute import linear_logits_statistics
from .row_statistics import slices
from .sharded_weight import gather_in_backward, gathered, is_distributed, is_whole, shards
from .token_statistics import target_ids
from .vocab_parallel import VocabShard, best_of, is_dtensor, vocab_shard

NO_ID = -(2**63)  # an ignore_index that no id equals: every id must be in range
TOPK_WORKSPACE = 2**28  # bytes, by default
_HELD = ("rest", "_hidden", "_made", "known", "_normalizer")  # the attributes of a LinearLogits


class Rows(NamedTuple):
    """The tokens of a :class:`LinearLogits`, one row each, in the order of its token dimensions."""

    hidden: Tensor  # (N, H)
    temperature: Tensor | None  # (N,), fp32 (float64 for float64); None: 1 everywhere
    low_rank: tuple[Tensor, Tensor] | None  # (N, R) and (V, R)


class _WithParameters(torch.autograd.Function):
    """``hidden``, with the head's parameters among its ancestors: DDP looks there for what a step uses."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *parameters: Tensor | None) -> Tensor:
        # Not a view, which FSDP2 warns about; but in a compiled graph, detach would cut the gradient.
        return hidden.view_as(hidden) if torch.compiler.is_compiling() else hidden.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, *(None for _ in ctx.needs_input_grad[1:])


class _Tie(torch.autograd.Function):
    """``t``, whose gradient triggers the hooks that FSDP2 and DDP put on ``hidden``, though hidden itself is frozen."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, hidden: Tensor) -> Tensor:
        ctx.like = hidden.shape, hidden.dtype
        return t.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype = ctx.like
        return grad, grad.new_zeros((), dtype=dtype).expand(shape)


class _Rest:
    """What a :class:`LinearLogits` holds beside ``hidden``.

    Neither a tuple, a dict nor a dataclass: FSDP2 casts, and DDP counts, the tensors found in those, and the weight is
    not an output.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    temperature: float | Tensor
    low_rank: tuple[Tensor, Tensor] | None
    shard: VocabShard | None
    all_tokens: Tensor | None  # hidden as gathered from the ranks; held so that nothing else reuses its memory
    module: Any
    vocab: int
    vocab_dim: int
    dtype: torch.dtype
    frozen: bool  # hidden got a grad_fn for DDP's sake only
    detached: bool
    constant: tuple[str, ...]  # the parts that needed no gradient when made, whatever their requires_grad says since
    shards: dict[str, Tensor]  # of weight, bias and low_rank, where an optimizer changes only their shards or DTensors
    gathers: bool  # the weight is sharded and gathered for each use: equally often on all ranks, whatever their tokens
    made: Snapshot  # of parts()
    views: list[int]  # shared by views of each other: how often one of them was changed in place
    seen: int  # views[0] when this was made

    def __init__(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value)

    def but(self, **changes: Any) -> _Rest:
        return _Rest(**{name: getattr(self, name) for name in _Rest.__annotations__} | changes)

    def parts(self) -> dict[str, Tensor | None]:
        u, B = self.low_rank or (None, None)
        return {"weight": self.weight, "bias": self.bias, "u": u, "B": B, **self.shards}

    def of_head(self) -> list[Tensor]:
        """The parts that may be sharded between uses, the weight first."""
        B = self.low_rank and self.low_rank[1]
        return [t for t in (self.weight, self.bias, B) if t is not None]

    def record(self) -> None:
        """Record the versions of the parts: from now on none may change, not even in an optimizer's step."""
        self.made = Snapshot(**self.parts())
        watch(*self.parts().values())


@dataclass(eq=False, init=False, repr=False)  # for DDP and FSDP2, which look for tensors in the fields of an output
class LinearLogits(LazyTensor):
    r"""A tensor of logits that is never materialised: write a loss against it as against any logits.

    .. math:: z = c \tanh(s\,(h W^\top + u B^\top + b) / c) / T

    Slices, views and arithmetic by numbers stay lazy; ``F.cross_entropy``, ``log_softmax``, ``gather``, ``logsumexp``,
    ``argmax`` and their kin are answered without the logits, and differentiable in ``hidden``, ``weight``, ``bias``,
    ``u`` and ``B``. Anything else materialises them, with a warning (under ``fused_losses.strict()``, an error). So does
    adding a bias ``(V,)`` of another dtype to 16-bit logits: it would lose digits in the head's dtype.

    It is a value: once ``hidden``, ``weight``, ``bias``, ``u`` or ``B`` was modified in place, using it raises. Weights
    swapped through ``.data``, as for an average of weights or in ZeRO-3's step, go unseen: use the logits before. It can be
    pickled and copied: the copy is detached, has no ``module``, and keeps the name of its ``group``. A weight that is sharded
    between uses is gathered for the copy: a collective, which all ranks must call. Built inside reentrant checkpointing,
    or given to the ``apply`` of a ``torch.autograd.Function``, it raises, since no gradient would reach it there; pass
    ``use_reentrant=False``, or ``materialize()``.

    What stays lazy, and where it differs from a tensor: "Lazy or not" in docs/losses.md. ``isinstance(x, torch.Tensor)`` is
    false, and ``tree_map`` maps ``hidden``.

    What the fused operations read:

    - ``rows()``: the tokens as ``Rows(hidden (N, H), temperature (N,) | None, low_rank ((N, R), (V, R)) | None)``,
      after checking that nothing changed since construction. Results ``(N,)`` go back with ``.view(token_shape)``.
    - ``weight (V, H)``, ``bias (V,) | None``: already cast (autocast) and reduced to the selected rows; detached where the
      logits need no gradient.
    - ``scale``: float; ``softcap``: float or None; ``module``: as given.
    - ``vocab_range``: the ids whose rows ``weight`` holds: all, unless a ``group`` shares the vocabulary; ``shard``: the same
      with the group, or None.
    - ``dtype``: the label: the dtype that functions with PyTorch's names round their results to. Not the dtype of ``hidden``.
    - ``token_shape``: ``shape`` without the vocabulary; ``vocab_dim``: where the vocabulary stands in ``shape``, ≥ 0;
      ``hidden`` is always ``(*token_shape, H)``, with the vocabulary's dimension taken out and H put last.
    - ``with logits.gathered():`` around everything that reads the weight in forward, and
      ``logits.gather_in_backward(output)`` on each differentiable result: with ``module``, they make the weight whole
      there. Both do nothing without it.

    Args:
        hidden: hidden states, ``(…, H)``.
        weight: the head's rows, ``(V, H)``, of the same dtype (under autocast both are cast).
        bias: ``(V,)``.
        scale: multiplies the products.
        softcap: bound ``c`` of the logits; None: no bound.
        temperature: a number, or a tensor with one number per token, which gets no gradient.
        low_rank: ``(u, B)``, ``(…, R)`` and ``(V, R)``: a LoRA update, ``u = s·dropout(h)Aᵀ``.
        group: the ranks that share the vocabulary, a process group or a :class:`VocabParallel`: ``weight``, ``bias`` and ``B``
            are this rank's rows, ``shape[-1]`` is the size of the whole vocabulary. Hidden states and every index are the same
            on all ranks, and so is every result; the gradient of ``hidden`` is summed over them. Where ``hidden`` and
            ``weight`` are DTensors their placements say all this: see :mod:`fused_losses.tensor_parallel`.
        module: the module that owns the weight, where it is sharded between uses (FSDP2's ``fully_shard(head)``,
            DeepSpeed ZeRO-3): the weight is gathered through it in forward and in backward.

    Example:
        >>> hidden, weight = torch.ones(2, 3, 4), torch.eye(5, 4)
        >>> logits = LinearLogits(hidden, weight)
        >>> logits[:, :-1].shape
        torch.Size([2, 2, 5])
        >>> logits.logsumexp(-1)[0]
        tensor([2.4743, 2.4743, 2.4743])
    """

    def _set_hidden(self, hidden: Tensor) -> None:
        if hidden.dtype != self.rest.weight.dtype:  # the module's output was cast
            self.rest = self.rest.but(dtype=hidden.dtype)
            hidden = hidden.to(self.rest.weight.dtype)
        self._hidden = hidden
        self._made = Snapshot(hidden=hidden)
        self.known = Known()
        self._normalizer: tuple[Any, int] = (lambda: None, 0)  # the last result of logsumexp, and its version

    rest: Any
    hidden: Tensor = property(lambda self: self._hidden, _set_hidden)  # type: ignore[assignment]  # noqa: RUF009

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
        temperature: float | Tensor = 1.0,
        low_rank: tuple[Tensor, Tensor] | None = None,
        group: Any = None,
        module: Any = None,
        rest: Any = None,  # in place of all the others: how dataclasses.replace makes a copy with another hidden
    ) -> None:
        if rest is None:
            if weight is None:
                raise TypeError("LinearLogits needs the head's weight (V, H)")
            check_tensors(hidden, weight, bias)
            u, B = low_rank or (None, None)
            check_whereabouts(weight, module)
            held = {"weight": weight, "bias": bias, "B": B}
            if is_dtensor(hidden) or is_dtensor(weight):
                from .tensor_parallel import local_head

                hidden, weight, bias, u, B, group = local_head(hidden, weight, bias, u, B, group=group)
            shard = vocab_shard(group, weight.shape[0])
            if shard is not None and shard.size < weight.shape[0]:  # the rows beyond are padding
                weight, bias, B = (None if t is None else t[: shard.size] for t in (weight, bias, B))
            hidden, weight, bias, u, B = autocast(hidden, weight, bias, u, B)
            check_shapes(hidden, weight, bias, u, B, empty=shard is not None)
            if not isinstance(temperature, Tensor) and temperature == 0:
                raise ValueError("temperature must not be 0")
            check_scaling(softcap)
            if softcap is None and not isinstance(temperature, Tensor):
                scale, temperature = scale / temperature, 1.0
            plain = transforms_active()  # no hooks to serve, and _WithParameters would drop a tangent
            detached = no_gradient()
            if detached:
                refuse_reentrant_checkpoint()
                hidden, u = hidden.detach(), None if u is None else u.detach()
            frozen = not hidden.requires_grad and not plain
            held = {name: t for name, t in held.items() if t is not None and t.dtype == hidden.dtype}  # those not cast
            sharded = shards(module, **held)
            compiling = torch.compiler.is_compiling()
            dtensors = {f"DTensor {name}": t for name, t in held.items() if is_dtensor(t) and not compiling}
            rest = _Rest(
                weight=weight,
                bias=bias,
                scale=scale,
                softcap=softcap,
                temperature=per_token_temperature(temperature, hidden),
                low_rank=None if u is None else (u, B),
                shard=shard,
                all_tokens=None,
                module=module,
                vocab=weight.shape[0] if shard is None else shard.vocab,
                vocab_dim=hidden.ndim - 1,
                dtype=hidden.dtype,
                frozen=frozen,
                detached=detached,
                constant=() if plain or exporting() else _constant(weight=weight, bias=bias, u=u, B=B),
                shards=sharded | dtensors,
                gathers=len(sharded) > 0 or hasattr(weight, "ds_id"),
                views=[0],
                seen=0,
            )
            rest.record()
            # ZeRO-3 wants gradients accumulated while the weight is whole, so they must not wait for hidden's.
            used = () if hasattr(module, "ds_id") and not frozen else (weight, bias, u, B)
            if not (detached or plain or exporting()):  # strict export loses a Function's gradient
                hidden = _WithParameters.apply(hidden, *used)
            if shard is not None and shard.inner and not torch.compiler.is_compiling():
                rest.all_tokens = hidden.detach()
        self.rest = rest
        self._set_hidden(hidden)

    def _part(self, name: str, t: Tensor) -> Tensor:
        """A part of the head: detached if it or the logits are constant, tied to ``hidden`` if that is frozen."""
        if self.rest.detached or (name in self.rest.constant and t.requires_grad):
            return t.detach()
        return _Tie.apply(t, self.hidden) if self.rest.frozen and t.requires_grad and is_distributed() else t

    @property
    def weight(self) -> Tensor:
        return self._part("weight", self.rest.weight)

    @property
    def bias(self) -> Tensor | None:
        return None if self.rest.bias is None else self._part("bias", self.rest.bias)

    @property
    def scale(self) -> float:
        return self.rest.scale

    @property
    def softcap(self) -> float | None:
        return self.rest.softcap

    @property
    def temperature(self) -> float | Tensor:
        """A number, or a tensor of ``token_shape``."""
        return self.rest.temperature

    @property
    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        if self.rest.low_rank is None:
            return None
        u, B = self.rest.low_rank
        return self._part("u", u), self._part("B", B)

    @property
    def shard(self) -> VocabShard | None:
        """This rank's part of a shared vocabulary; its ``outer`` and ``inner`` are 0 unless ``hidden`` still holds, token for
        token, all that was gathered."""
        shard = self.rest.shard
        if shard is None or shard.inner == 0:
            return shard
        hidden, every = self.hidden, self.rest.all_tokens
        unchanged = every is not None and not torch.compiler.is_compiling() and hidden.is_contiguous()
        unchanged = unchanged and (hidden.data_ptr(), hidden.numel()) == (every.data_ptr(), every.numel())
        return shard if unchanged else shard._replace(outer=0, inner=0)

    @property
    def vocab_range(self) -> tuple[int, int]:
        """The ids whose rows of the head this rank holds."""
        return (0, self.rest.vocab) if self.shard is None else (self.shard.start, self.shard.stop)

    @property
    def module(self) -> Any:
        return self.rest.module

    @property
    def vocab_dim(self) -> int:
        return self.rest.vocab_dim

    @property
    def dtype(self) -> torch.dtype:
        return self.rest.dtype

    @property
    def wide(self) -> torch.dtype:
        return statistics_dtype(self.hidden.dtype)

    @property
    def token_shape(self) -> torch.Size:
        return self.hidden.shape[:-1]

    @property
    def shape(self) -> torch.Size:
        tokens = self.token_shape
        return torch.Size([*tokens[: self.vocab_dim], self.rest.vocab, *tokens[self.vocab_dim :]])

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def requires_grad(self) -> bool:
        return self.hidden.requires_grad

    @property
    def grad_fn(self) -> Any:
        return self.hidden.grad_fn

    def __repr__(self) -> str:
        rest = self.rest
        parts = [f"hidden={tuple(self.hidden.shape)}", f"weight={(rest.vocab, self.hidden.shape[-1])}"]
        parts += [f"bias=({rest.vocab},)"] if rest.bias is not None else []
        parts += [f"scale={rest.scale:g}"] if rest.scale != 1 else []
        parts += [f"softcap={rest.softcap:g}"] if rest.softcap is not None else []
        per_token = isinstance(rest.temperature, Tensor)
        parts += ["temperature=one per token"] if per_token else []
        parts += [f"temperature={rest.temperature:g}"] if not per_token and rest.temperature != 1 else []
        parts += [f"low_rank={rest.low_rank[0].shape[-1]}"] if rest.low_rank is not None else []
        return f"LinearLogits({tuple(self.shape)}, {self.dtype}, {', '.join(parts)}; {self.nbytes:,} bytes not held)"

    def __reduce__(self) -> tuple[Any, ...]:
        self.check()
        shard = self.shard and self.shard._replace(outer=0, inner=0)
        rest = self.rest.but(
            shard=shard,
            all_tokens=None,
            module=None,
            detached=True,
            frozen=False,
            shards={},
            gathers=False,
            views=[0],
            seen=0,
        )
        whole = is_whole(*rest.of_head())

        def own(t: Tensor) -> Tensor:
            return t.detach() if whole else t.detach().clone()  # a gathered tensor is freed again

        with self.gathered():
            rest.weight, rest.bias = own(rest.weight), None if rest.bias is None else own(rest.bias)
            rest.low_rank = rest.low_rank and (rest.low_rank[0].detach(), own(rest.low_rank[1]))
        return _rebuild, (self.hidden.detach(), rest)

    def __copy__(self) -> LinearLogits:
        copied = _rebuild(*self.__reduce__()[1])
        copied.rest.views, copied.rest.seen = self.rest.views, self.rest.seen
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> LinearLogits:
        # Lightning copies it in this way: it keeps the fields, then sets them on the copy one by one, hidden last.
        if id(self.rest) in memo:
            return LinearLogits(self.hidden, rest=self.rest)
        return _rebuild(*copy.deepcopy(self.__reduce__()[1], memo))

    def check(self) -> None:
        """Raise if what these logits stand for changed since they were made."""
        if self.rest.views[0] != self.rest.seen:
            raise RuntimeError(
                f"a change in place reached another view of this LinearLogits {tuple(self.shape)}; a lazy view does not "
                "follow, and counts as one where eager would copy (contiguous(), reshape). Use the out-of-place form, change "
                "the logits before taking views, or clone() the view."
            )
        if torch.compiler.is_compiling():
            return
        if self.requires_grad and no_gradient():
            refuse_autograd_function(self)
        changed = self.rest.made.changed(**self.rest.parts()) or self._made.changed(hidden=self.hidden)
        if changed is not None:
            name, then, now = changed
            raise RuntimeError(
                f"{name} was modified in place after this LinearLogits {tuple(self.shape)} was made (version {then} then, "
                f"{now} now): logits made from it would have kept their values. Read what you need before, as before "
                "optimizer.step(), or make them anew."
            )

    def rows(self) -> Rows:
        """The tokens, flattened; see the class."""
        self.check()
        hidden = self.hidden.detach() if self.rest.frozen else self.hidden
        N = numel(self) // self.rest.vocab
        hidden = hidden.reshape(N, hidden.shape[-1])
        temperature = None
        if isinstance(self.temperature, Tensor):
            temperature = self.temperature.reshape(N)
        elif self.temperature != 1:
            temperature = hidden.new_full((N,), self.temperature, dtype=statistics_dtype(hidden.dtype))
        low_rank = self.low_rank
        if low_rank is not None:
            low_rank = (low_rank[0].reshape(N, low_rank[0].shape[-1]), low_rank[1])
        return Rows(hidden, temperature, low_rank)

    def materialize(self) -> Tensor:
        """The logits themselves, differentiable, in ``dtype``."""
        if self.shard is not None:
            raise NotImplementedError(
                f"logits {tuple(self.shape)} whose vocabulary is shared by a group of ranks are on none of them: ask for "
                "log-probabilities, statistics, top-k or a loss instead, or gather the head and leave group= away"
            )
        with self.gathered(), full_precision(self.device):
            z = self.gather_in_backward(_project(head_of(self), self.dtype))
        return z.to(self.dtype).view(*self.token_shape, self.rest.vocab).movedim(-1, self.vocab_dim)

    def gathered(self) -> AbstractContextManager[None]:
        """A context in which the weight is whole."""
        return gathered(self.rest.of_head(), self.module, self.shape)

    def gather_in_backward(self, output: Tensor, made: bool = False) -> Tensor:
        """``output``, before whose backward the weight is made whole again; ``made``: see :mod:`.sharded_weight`."""
        rest = self.rest
        return gather_in_backward(output, rest.of_head(), rest.module, self.shape, trains=self.requires_grad, made=made)

    # The methods of LazyTensor, documented there

    def mapped(self, fn: Callable[[Tensor], Tensor], vocab_dim: int, *, view: bool = True) -> LinearLogits:
        def features(t: Tensor) -> Tensor:
            return fn(t.movedim(-1, self.vocab_dim)).movedim(vocab_dim, -1)

        numbers = self._of_numbers(fn, vocab_dim)
        low_rank = self.rest.low_rank and (features(self.rest.low_rank[0]), self.rest.low_rank[1])
        changes = {"vocab_dim": vocab_dim, "low_rank": low_rank, "temperature": numbers(self.temperature)}
        new = self._but(features(self.hidden), view, **changes)
        self.known.tell(self, new, numbers)
        return new

    def _but(self, hidden: Tensor, view: bool = False, **changes: Any) -> LinearLogits:
        self.check()
        changed = self.rest.but(**changes)
        if not self.rest.detached and (changed.detached or no_gradient()):
            changed.detached, changed.frozen = True, False  # wherever it is read later
            u, B = changed.low_rank or (None, None)
            hidden, u = (self.known if hidden is self.hidden else Known()).detached(hidden, u)
            changed.low_rank = None if u is None else (u, B)
        changed.made = Snapshot(**changed.parts())
        changed.views = self.rest.views if view else [0]
        changed.seen = changed.views[0]
        return LinearLogits(hidden, rest=changed)

    def become(self, new: Any) -> Any:
        if not isinstance(new, LinearLogits):
            if not isinstance(new, LazyTensor) or self._fixed:
                return NotImplemented
            self.rest.views[0] += 1  # only its views are left of it
            self.__class__, self.__dict__ = type(new), vars(new.with_dtype(self.dtype))  # type: ignore[assignment]
            return self
        if new.rest.detached and not self.rest.detached:
            raise RuntimeError(
                f"a change in place under no_grad would take the gradient of a LinearLogits {tuple(self.shape)} away: use "
                "the out-of-place form there, or change the logits before"
            )
        new = new if new.dtype == self.dtype else new.with_dtype(self.dtype)
        self.rest.views[0] += 1
        for name in _HELD:  # PyTorch 2.11's Dynamo does not support an update of vars()
            setattr(self, name, getattr(new, name))
        return self

    def become_changed(self, name: str, change: Callable[[Tensor], Any]) -> Any:
        self.check()
        fixed = self.shard is not None or self._fixed
        return NotImplemented if fixed else self.become(changed_elements(self, name, change))

    @property
    def _fixed(self) -> bool:
        """Whether this cannot change its class: it would lose the gradient, or a compiler would lose track of it."""
        return (self.requires_grad and no_gradient()) or torch.compiler.is_compiling()

    def with_dtype(self, dtype: torch.dtype) -> LinearLogits:
        return self._sharing(self._but(self.hidden, dtype=dtype))

    def _sharing(self, new: LinearLogits) -> LinearLogits:
        """``new``, which has the same tokens, sharing what is known of them."""
        new.known = self.known
        return new

    def as_view(self) -> LinearLogits:
        if self.hidden.is_contiguous() and self.vocab_dim == self.ndim - 1:
            return self
        return self._sharing(self._but(self.hidden, True))

    def vocab_last(self) -> LinearLogits:
        """The same tokens with the vocabulary as the last dimension."""
        return self._but(self.hidden, vocab_dim=self.ndim - 1)

    def detach(self) -> LinearLogits:
        return self._sharing(self._but(self.hidden, True, detached=True))

    def reads(self) -> list[tuple[Any, int | Tensor, Tensor]]:
        return self.known.reads.setdefault("logits", [])

    def normalise_by(self, lse: Tensor) -> None:
        """Remember ``lse (*token_shape)``, the logsumexp of these logits, for :meth:`normalised`."""
        if not torch.compiler.is_compiling():
            self._normalizer = weakref.ref(lse), version(lse)

    def normalised(self, offset: Any) -> Any:
        if torch.compiler.is_compiling():
            return NotImplemented
        lse, made = self._normalizer[0](), self._normalizer[1]
        if lse is None or offset._base is not lse or version(lse) != made:
            return NotImplemented
        expected = lse.unsqueeze(self.vocab_dim)
        trains = self.requires_grad and not no_gradient()
        if (offset.grad_fn is not None) != trains or offset.requires_grad != trains or offset.shape != expected.shape:
            return NotImplemented  # a constant, or from another graph
        if any(t._backward_hooks or t.retains_grad for t in (offset, lse)):
            return NotImplemented
        steps = zip(offset.shape, offset.stride(), expected.stride(), strict=True)
        same = all(n == 1 or step == known for n, step, known in steps)  # the same layout, no transpose
        return LazyExpression(self, "log_softmax") if same else NotImplemented

    def columns(self, key: slice | Tensor) -> Any:
        if self.shard is not None:
            return LazyExpression(self).columns(key)
        with self.gathered():
            weight = self.rest.weight[key]
            bias = None if self.rest.bias is None else self.rest.bias[key]
            low_rank = self.rest.low_rank and (self.rest.low_rank[0], self.rest.low_rank[1][key])
        if len(weight) == 0:
            return self._nothing(self.dtype).movedim(-1, self.vocab_dim)
        return self._but(
            self.hidden, isinstance(key, slice), weight=weight, bias=bias, low_rank=low_rank, vocab=weight.shape[0]
        )

    def _nothing(self, dtype: torch.dtype) -> Tensor:
        """An empty tensor of values, ``(*token_shape, 0)``, differentiable."""
        return self.hidden[..., :0].to(dtype, copy=True)

    def column(self, at: int | Tensor) -> Any:
        if self.shard is not None:
            return super().column(at)
        return self.columns(on_device(at, self.device).view(1)).materialize().squeeze(self.vocab_dim)

    def scaled(self, factor: Any) -> Any:
        if is_number(factor) and self.softcap is None:
            return self._but(self.hidden, scale=self.scale * factor)
        return NotImplemented if is_number(factor) and factor == 0 else self._times_temperature(factor, inverse=True)

    def divided(self, divisor: Any) -> Any:
        return self._times_temperature(divisor, inverse=False)

    def _times_temperature(self, factor: Any, inverse: bool) -> Any:
        if not is_number(factor):
            factor = per_token_number(self, factor)
            if factor is NotImplemented:
                return NotImplemented
            if not no_gradient() and (factor.requires_grad or transforms_active()):
                return self._times_trained(factor if inverse else 1 / factor)
            factor = factor.detach()
        temperature = self.temperature / factor if inverse else self.temperature * factor
        return self._but(self.hidden, temperature=temperature)

    def _times_trained(self, factor: Tensor) -> Any:
        """The logits times ``factor (*token_shape)``, which multiplies the hidden states and so gets its gradient."""
        rest, own = self.rest, self.hidden.dtype
        linear = self.softcap is None and self.bias is None and self.shard is None
        keeps = own.itemsize > 2 or self.dtype == own == torch.bfloat16  # the digits and the range that eager has
        if not linear or not keeps or (rest.detached and self.module is not None):
            return NotImplemented

        def times(t: Tensor) -> Tensor:
            return (t.to(self.wide) * factor.unsqueeze(-1)).to(own)

        weight, low_rank = rest.weight, rest.low_rank
        if rest.detached:
            weight, low_rank = weight.detach(), low_rank and (low_rank[0], low_rank[1].detach())
        low_rank = low_rank and (times(low_rank[0]), low_rank[1])
        constant = tuple([name for name in rest.constant if name != "u"])
        changes = {"weight": weight, "low_rank": low_rank, "detached": False, "frozen": False, "constant": constant}
        return self._but(times(self.hidden), **changes)

    def shifted(self, offset: Any) -> Any:
        if is_number(offset) or per_token_number(self, offset) is not NotImplemented:
            return LazyExpression(self).shifted(offset)
        bias = per_entry_number(self, offset)
        linear = self.softcap is None and not isinstance(self.temperature, Tensor) and self.scale != 0
        linear = linear and self.shard is None
        if bias is NotImplemented or not linear or (self.rest.detached and bias.requires_grad):
            return NotImplemented
        if not self._keeps_digits(bias.dtype):
            return NotImplemented
        bias = (bias.to(self.wide) / self.scale).to(self.hidden.dtype)
        apart = self.rest.detached or transforms_active() or exporting()
        hidden = self.hidden if apart else _WithParameters.apply(self.hidden, bias)
        with self.gathered():
            bias = bias if self.bias is None else self.bias + bias
        constant = tuple([name for name in self.rest.constant if name != "bias"])
        return self._but(hidden, bias=bias, constant=constant)

    def _keeps_digits(self, dtype: torch.dtype) -> bool:
        """Whether a bias of ``dtype``, cast to the dtype of ``hidden``, keeps the digits that eager would keep. If that has 16
        bits, the bias must be used as it is; or, where eager rounds the sum to the same dtype, be divided by a scale that
        changes no digit and leaves it in range."""
        own, scale = self.hidden.dtype, self.scale
        if own.itemsize > 2 or (dtype == own and abs(scale) == 1 and self.bias is None):
            return True
        shifts = abs(math.frexp(scale)[0]) == 0.5 and (own == torch.bfloat16 or abs(scale) >= 1)
        return dtype == self.dtype == own and shifts

    def times(self, other: Any) -> Any:
        return LazyExpression(self).times(other)

    # Numbers per token

    def statistic(self, name: str) -> Tensor:
        """A row statistic without ids, ``token_shape``, differentiable; the pass that computes it runs once."""
        self.check()
        known = self.known.ask(name, self)
        return (self._measure(None, name)[name] if known is None else known).view(self.token_shape)

    def elements(self) -> Tensor:
        """``materialize()`` in ``wide``, made once: the gradients of several expressions are summed before they are rounded."""
        self.check()
        z, V = self.known.ask("elements", self), self.rest.vocab
        if z is None:
            z = self.with_dtype(self.wide).materialize().movedim(self.vocab_dim, -1).reshape(-1, V)
        if z.requires_grad:
            self.known.learn({"elements": z}, self)
        return z.view(*self.token_shape, V).movedim(-1, self.vocab_dim)

    def log_probs_at(self, ids: Tensor, ignore_index: int = NO_ID) -> Tensor:
        """Log-probabilities at ``ids (*token_shape, K)``, 0 where they are ``ignore_index``."""
        if ids.shape[-1] == 0:
            return self._nothing(self.wide)
        flat = target_ids(ids, self.rest.vocab, ignore_index).reshape(-1, ids.shape[-1])
        kept = (None, False) if ignore_index == NO_ID else kept_tokens(flat, None)
        learns = kept == (None, False) and (ignore_index == NO_ID or not self.rest.gathers)
        return self._measure(flat, "log_probs", kept, learns)["log_probs"].view(ids.shape)

    def values_at(self, ids: Tensor) -> Tensor:
        return self.log_probs_at(ids) + self.statistic("logsumexp").unsqueeze(-1)

    def _measure(self, ids: Tensor | None, name: str, kept: Any = (None, False), learns: bool = True) -> dict[str, Any]:
        """A statistic, and the others that losses read beside it: numbers of one pass share its backward. ``ids (N, K)``."""
        names = {name, "logsumexp", "entropy"}
        found = linear_logits_statistics(self, ids, outputs=sorted(names), kept=kept)._asdict()
        if learns:  # not where the others are known for some rows only, or only on ranks that ignore no token
            self.known.learn({other: found[other] for other in names - {"log_probs"}}, self)
        return found

    def vocab_sum(self) -> Tensor:
        if self.softcap is None and self.shard is None:
            return self._linear_sum()
        return self.statistic("sum_log_probs") + self.statistic("logsumexp") * self.rest.vocab

    def sum_log_probs(self) -> Tensor:
        """Sum over the vocabulary of the log-probabilities."""
        if self.softcap is None and self.shard is None:
            return self._linear_sum() - self.statistic("logsumexp") * self.rest.vocab
        return self.statistic("sum_log_probs")

    def _linear_sum(self) -> Tensor:
        """The sum of the logits, which is linear without a softcap: ``hidden`` times the sum of the head's rows."""
        hidden, temperature, low_rank = self.rows()
        dtype = statistics_dtype(hidden.dtype)
        with self.gathered(), full_precision(self.device):
            total = hidden.to(dtype) @ self.weight.sum(0, dtype=dtype)
            if low_rank is not None:
                total = total + low_rank[0].to(dtype) @ low_rank[1].sum(0, dtype=dtype)
            if self.bias is not None:
                total = total + self.bias.sum(dtype=dtype)
            total = self.gather_in_backward(total)
        total = total * self.scale if temperature is None else total * self.scale / temperature
        return total.view(self.token_shape)

    def topk_ids(self, k: int, largest: bool = True) -> tuple[Tensor, Tensor]:
        """The ``k`` largest (or smallest) logits and their ids, ``(*token_shape, k)``, a workspace of logits at a time."""
        rows, dtype = self.rows(), statistics_dtype(self.hidden.dtype)
        N, V = len(rows.hidden), self.rest.weight.shape[0]
        workspace = settings.workspace.value
        room = TOPK_WORKSPACE if workspace is None else workspace
        elements = room // (4 * dtype.itemsize)  # a tile, a low-rank product and what topk needs
        width = max(1, min(V, elements // 1024))
        height = max(1, elements // width)
        values = rows.hidden.new_full((N, k), -torch.inf if largest else torch.inf, dtype=dtype)
        ids = values.new_full((N, k), -1, dtype=torch.int64)  # stays where a shard has fewer than k
        with torch.no_grad(), self.gathered(), full_precision(self.device):
            for part in slices(N, height):
                temperature = None if rows.temperature is None else rows.temperature[part]
                best = rows.hidden.new_empty(part.stop - part.start, 0, dtype=dtype)
                best_ids = best.long()
                for columns in slices(V, width):
                    tile = logits_tile(rows.hidden, self.weight, self.bias, rows.low_rank, part, columns)
                    transform(tile, temperature, self.scale, self.softcap, out=tile, with_slope=False)
                    found = torch.arange(columns.start, columns.stop, device=tile.device).expand(tile.shape)
                    tile, found = best_of(tile, found, k, largest)
                    both, both_ids = torch.cat([best, tile], -1), torch.cat([best_ids, found], -1)
                    best, best_ids = best_of(both, both_ids, k, largest)
                values[part, : best.shape[1]], ids[part, : best.shape[1]] = best, best_ids
            if self.shard is not None:
                values, ids = self.shard.topk(values, ids, largest)
        return values.view(*self.token_shape, k), ids.view(*self.token_shape, k)


def _constant(**parts: Tensor | None) -> tuple[str, ...]:
    return tuple([name for name, t in parts.items() if t is not None and not t.requires_grad])


def _rebuild(hidden: Tensor, rest: _Rest) -> LinearLogits:
    rest.record()
    return LinearLogits(hidden, rest=rest)


def _of_leaf(leaves: Any, rest: _Rest) -> Any:
    # PyTorch 2.11's checkpoint maps hidden to None when it looks for devices: None stands for no logits.
    (hidden,) = leaves
    return LinearLogits(hidden, rest=rest) if isinstance(hidden, Tensor) else hidden


# Compiled, the whole LinearLogits is one output; elsewhere hooks and sinks may touch hidden only.
pytree.register_pytree_node(
    LinearLogits, lambda x: ([x.hidden], x.rest), _of_leaf, serialized_type_name="fused_losses.LinearLogits"
)


def _project(head: Head, dtype: torch.dtype) -> Tensor:
    """Logits ``(n, V)`` in the precision of statistics, unless the label ``dtype`` asks for less."""
    plain = head.softcap is None and head.scale == 1 and head.temperature is None and head.u is None
    if plain and dtype == head.hidden.dtype:
        return F.linear(head.hidden, head.weight, head.bias)
    return whole_logits(head, None)


# Several at once


@answers("cat", "concat", "concatenate", anywhere=True)
def cat(tensors: Sequence[Any], dim: int = 0) -> Any:
    first = tensors[0]
    if not all(isinstance(x, LinearLogits) and x.ndim == first.ndim for x in tensors):
        return NotImplemented
    at = wrap_dim(first, dim)
    if at == first.vocab_dim or not all(x.vocab_dim == first.vocab_dim and _one_head(first, x) for x in tensors):
        return NotImplemented
    for x in tensors:
        x.check()
    at -= at > first.vocab_dim  # among the token dimensions
    hidden = torch.cat([x.hidden for x in tensors], at)
    temperature, low_rank = first.temperature, first.rest.low_rank
    if any(isinstance(x.temperature, Tensor) or x.temperature != temperature for x in tensors):
        dtype = statistics_dtype(hidden.dtype)
        each = [on_device(x.temperature, x.device, dtype).expand(x.token_shape) for x in tensors]
        temperature = torch.cat(each, at)
    if low_rank is not None:
        low_rank = (torch.cat([x.rest.low_rank[0] for x in tensors], at), low_rank[1])
    label = functools.reduce(torch.promote_types, (x.dtype for x in tensors))
    frozen = all(x.rest.frozen for x in tensors)
    return first._but(hidden, temperature=temperature, low_rank=low_rank, dtype=label, frozen=frozen)


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    same = not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b
    return True if same else False  # noqa: SIM210  where Dynamo does not know the numbers, it does not know bool(same) either


def _one_head(a: LinearLogits, b: LinearLogits) -> bool:
    """Whether ``a`` and ``b`` have the same head, for whichever tokens."""
    x, y = a.rest, b.rest
    B, other = (r.low_rank and r.low_rank[1] for r in (x, y))
    same = x.weight is y.weight and x.bias is y.bias and _equal(x.scale, y.scale) and _equal(x.softcap, y.softcap)
    same = same and B is other and x.shard == y.shard
    return same and x.detached == y.detached and x.constant == y.constant


def same_logits(a: LinearLogits, b: LinearLogits) -> bool:
    """Whether ``a`` and ``b`` stand for the same numbers, whatever their labels."""
    one = _one_head(a, b) and a.hidden is b.hidden and a.vocab_dim == b.vocab_dim
    u, v = (x.rest.low_rank and x.rest.low_rank[0] for x in (a, b))
    return one and _equal(a.temperature, b.temperature) and u is v


from . import lazy_losses, lazy_masks, lazy_reductions, lazy_views  # noqa: E402, F401  the other handlers
from .lazy_products import changed_elements  # noqa: E402  it imports LinearLogits
from .log_softmax import LazyExpression  # noqa: E402
