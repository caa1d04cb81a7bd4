"""Numbers already computed for the tokens of a :class:`LinearLogits`, so that reading them again costs no product.

What a new one takes over, by how it was made:

====================================================  ======================  ========  =============
made as                                               numbers of each token   elements  reads, detached
====================================================  ======================  ========  =============
another label, ``detach()``, ``contiguous()``         the same                the same  the same
a view of the same place in memory as another view    the same as that one    the same  its own
any other view, an index, a ``clone()``               moved, as known so far  none      its own
anything else: scaled, fewer entries, joined          none                    none      its own
====================================================  ======================  ========  =============

"The same" is one shared object: what either learns later, the other knows too. A change in place replaces it by what is known
of the new numbers; a hook that sets ``hidden`` clears it, and a copy or pickle starts without it.

A number computed with a gradient also serves where none is asked for, detached; with a gradient it serves only under the
``gradient_filter`` it was computed under. Where a checkpoint may run forward again, and under transforms, nothing is looked up
or stored. The last result of ``logsumexp`` is not kept here: each :class:`LinearLogits` has its own.
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
        self.places: dict[Any, _Numbers] = {}  # the numbers of all views of one memory, by _place
        self.reads: dict[str, list[Any]] = {}  # of the logits, or of a function of them: see LazyTensor.remember
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
        """The stored numbers. Nothing is kept, in a new dict each time, where a checkpoint may run this again, which must then
        find the same, or where numbers have a tangent, which no_grad keeps and detach() drops."""
        again = transforms_active() or (not torch.compiler.is_compiling() and not may_save(logits.hidden))
        return {} if again else self.numbers

    def tell(self, logits: LinearLogits, new: LinearLogits, moved: Callable[[Tensor], Tensor]) -> None:
        """Pass the numbers of ``logits`` on to ``new``, whose tokens are moved as ``moved`` moves a tensor ``token_shape``."""
        trains = torch.is_grad_enabled()  # else numbers known with a gradient are passed on without it
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
        """``hidden`` and ``u`` detached: the same two objects each time, so that ``same_logits`` recognises them."""
        if self._detached is None:
            self._detached = hidden.detach(), None if u is None else u.detach()
        return self._detached


def _filter(logits: LinearLogits) -> float | None:
    """The gradient filter for what is asked now; None where that has no gradient."""
    return settings.gradient_filter.value if torch.is_grad_enabled() and not logits.rest.detached else None


def _one_memory(a: LinearLogits, b: LinearLogits) -> bool:
    """Whether the hidden states of ``b``, a view or copy of ``a``, share memory with those of ``a``, and all tokens share the
    rest."""
    plain = not isinstance(a.temperature, Tensor) and a.rest.low_rank is None
    plain = plain and not a.rest.gathers  # since what is a view of one row may be a copy of two
    if not plain or traced(a.hidden) or transforms_active():
        return False
    return a.hidden.untyped_storage().data_ptr() == b.hidden.untyped_storage().data_ptr()


def _place(hidden: Tensor) -> Any:
    """Which of the tokens in the memory these are, and in which order."""
    layout = hidden.numel() if hidden.is_contiguous() else (hidden.shape, hidden.stride())
    return hidden.storage_offset(), layout
