"""What is known of the tokens of a :class:`LinearLogits`, so that a second question about them costs no product.

What a new one has of it, by how it was made:

====================================================  ======================  ========  =============
made as                                               numbers of each token   elements  reads, detached
====================================================  ======================  ========  =============
another label, ``detach()``, ``contiguous()``         the same                the same  the same
a view, of the same place in one memory as another    the same as that one    the same  its own
any other view, an index, a ``clone()``               moved, as known so far  none      its own
anything else: scaled, fewer entries, joined          none                    none      its own
====================================================  ======================  ========  =============

"The same" is one object: what either learns later the other knows. A change in place puts what is known of the new numbers
in place of the old; a hook that sets ``hidden`` forgets all, and a copy or pickle takes nothing along.

A number made with a gradient serves without one too, detached, and with one only under the ``gradient_filter`` it was made
under. Where a checkpoint may run forward again, and under transforms, nothing is found or learned. What ``logsumexp`` gave
last is each one's own and stands beside this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import settings
from .autodiff import may_save, traced, transforms_active

if TYPE_CHECKING:
    from .linear_logits import LinearLogits

_Numbers = dict[tuple[str, float | None], Tensor]  # (N,) or elements (N, V), by name and gradient filter


class Known:
    """See the module."""

    def __init__(self) -> None:
        self.numbers: _Numbers = {}
        self.places: dict[Any, _Numbers] = {}  # the numbers of views in one memory, by _place
        self.reads: dict[str, list[Any]] = {}  # of the logits, or of their softmax: see LazyTensor.remember
        self._detached: tuple[Tensor, Tensor | None] | None = None

    def ask(self, name: str, logits: LinearLogits) -> Tensor | None:
        key, numbers = (name, _filter(logits)), self._numbers(logits)
        if key in numbers or key[1] is not None:
            return numbers.get(key)
        with_gradient = [t for (other, _), t in numbers.items() if other == name]
        return with_gradient[0].detach() if len(with_gradient) > 0 else None

    def learn(self, found: dict[str, Tensor], logits: LinearLogits) -> None:
        self._numbers(logits).update({(name, _filter(logits)): t for name, t in found.items()})

    def _numbers(self, logits: LinearLogits) -> _Numbers:
        """None that last where a checkpoint may run this again, and must find the same then, or where they have a tangent,
        which no_grad leaves and detach() does not."""
        again = transforms_active() or (not torch.compiler.is_compiling() and not may_save(logits.hidden))
        return {} if again else self.numbers

    def tell(self, logits: LinearLogits, new: LinearLogits, moved: Callable[[Tensor], Tensor]) -> None:
        """Tell ``new``, the tokens of ``logits`` as ``moved`` moves one number of each, ``token_shape``."""
        trains = torch.is_grad_enabled()  # else what is known with a gradient is here without
        known = {
            (name, of if trains else None): moved((t if trains else t.detach()).view(logits.token_shape)).reshape(-1)
            for (name, of), t in self._numbers(logits).items()
            if name != "elements"
        }
        if _one_memory(logits, new):
            self.places.setdefault(_place(logits.hidden), self.numbers)
            new.known.numbers, new.known.places = self.places.setdefault(_place(new.hidden), {}), self.places
        new.known.numbers.update(known | new.known.numbers)

    def detached(self, hidden: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The same two each time, by which ``same_logits`` knows them."""
        if self._detached is None:
            self._detached = hidden.detach(), None if u is None else u.detach()
        return self._detached


def _filter(logits: LinearLogits) -> float | None:
    """Of the gradient of what is asked now; None where it has none."""
    return settings.gradient_filter.value if torch.is_grad_enabled() and not logits.rest.detached else None


def _one_memory(a: LinearLogits, b: LinearLogits) -> bool:
    """Whether the hidden states of ``b``, a view of ``a`` or a copy, lie among those of ``a``, and all else is one for all."""
    plain = not isinstance(a.temperature, Tensor) and a.rest.low_rank is None
    plain = plain and not a.rest.gathers  # as one row makes a view of what is a copy of two
    if not plain or traced(a.hidden) or transforms_active():
        return False
    return a.hidden.untyped_storage().data_ptr() == b.hidden.untyped_storage().data_ptr()


def _place(hidden: Tensor) -> Any:
    """Which of the tokens in one memory these are, and in which order."""
    layout = hidden.numel() if hidden.is_contiguous() else (hidden.shape, hidden.stride())
    return hidden.storage_offset(), layout
