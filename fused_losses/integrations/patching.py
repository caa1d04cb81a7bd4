"""What the integrations share: version checks, reversible patches, and heads that return :class:`LinearLogits`."""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ..autodiff import while_compiling
from ..linear_head import LinearHead
from ..linear_logits import LinearLogits
from ..linear_logits_checks import callers
from ..token_statistics import token_statistics

_MISSING = object()


def check_version(library: str, tested: str) -> None:
    """Raise if ``library`` is missing; warn if it is not of the ``tested`` minor version."""
    try:
        found = importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(
            f"{library} is not installed: pip install '{library}=={tested}.*', the version this is tested with"
        ) from None
    if found != tested and not found.startswith(f"{tested}."):
        warnings.warn(
            f"{library} {found} is untested with fused_losses: compare a step's loss with and without it, or install "
            f"{library}=={tested}.*",
            stacklevel=3,
        )


class Patches:
    """Attributes of other modules, replaced until :meth:`undo`; a ``with`` block replaces all of them or none."""

    def __init__(self) -> None:
        self._originals: list[tuple[Any, str, Any]] = []

    def __bool__(self) -> bool:
        return bool(self._originals)

    def __enter__(self) -> None:
        pass

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None:
            self.undo()

    def replace(self, owner: Any, name: str, value: Any) -> None:
        original = vars(owner).get(name, _MISSING)  # a staticmethod stays one
        if original is _MISSING:
            raise AttributeError(f"{owner} has no {name}: its library changed, and this integration does not know it")
        self._originals.append((owner, name, original))
        setattr(owner, name, value)

    def undo(self) -> None:
        while self._originals:
            setattr(*self._originals.pop())


@contextmanager
def lazy_logits(*models: nn.Module) -> Iterator[None]:
    """Inside, the heads of ``models``, wrapped or not, return :class:`LinearLogits`.

    The model's own scale and softcap then act on them. A head that is not a plain ``nn.Linear`` still makes logits, with a
    warning that names it.
    """
    with ExitStack() as stack:
        for model in models:
            owner: Any = next(m for m in model.modules() if hasattr(m, "get_output_embeddings"))
            head = owner.get_output_embeddings()
            if isinstance(head, LinearHead) or hasattr(owner, "_fused_losses"):  # transformers' apply(model)
                continue
            plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
            if not plain or "forward" in vars(head):
                warnings.warn(f"the logits are made: the head of {type(owner).__name__} is {type(head)}", stacklevel=3)
                continue
            head.forward = _LazyForward(head)
            stack.callback(vars(head).pop, "forward")
        yield


class _LazyForward:
    def __init__(self, head: nn.Linear) -> None:
        self.head = head

    def __call__(self, input: Tensor) -> LinearLogits:
        return LinearLogits(input, self.head.weight, self.head.bias, module=self.head)


def entropy_from_logits(logits: Tensor | LinearLogits, chunk_size: int | None = None) -> Tensor:
    """Entropy of each token, differentiable; TRL's ``chunk_size`` is accepted and ignored."""
    entropy = token_statistics(logits, outputs=("entropy",)).entropy
    assert entropy is not None
    return entropy


def trainer_drops_logits() -> bool | None:
    """Whether the ``Trainer`` step that runs this forward without gradients reads only a loss; None: no such step runs it.

    In training the forward may be a reference's or a teacher's; in evaluation the step wants the loss alone, or logits too.
    A custom loss may generate in either, as on-policy losses do: ``generate`` reads logits.
    """
    if torch.is_grad_enabled():
        return None
    if torch.compiler.is_compiling():  # one graph for all evaluations of a compiled model, also those that keep logits
        return False if _traced_for_a_prediction() else None
    for frame in callers():
        if _is_call(frame, "prediction_step", "prediction_loss_only"):
            return bool(frame.f_locals["prediction_loss_only"])
        if _is_call(frame, "training_step", "num_items_in_batch"):
            return True
        if _is_call(frame, "generate", "generation_config"):
            return False
    return None


@while_compiling
def _traced_for_a_prediction() -> bool:
    return any(_is_call(frame, "prediction_step", "prediction_loss_only") for frame in callers())


def _is_call(frame: FrameType, function: str, argument: str) -> bool:
    return frame.f_code.co_name == function and argument in frame.f_locals
