"""Gathering a head's weight that its owner shards between uses (FSDP2, ZeRO-3), for a use in forward and for its backward.

Such a weight is whole only inside its module's forward, and lazy logits are read after that. Whoever reads the weight gathers
it through the module, for as long as the read takes. The same holds for the bias and ``B`` beside it, which may be sharded
where the weight is not (``parametrizations.weight_norm``, ``fully_shard(…, ignored_params=)``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .autodiff import transforms_active


def is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_whole(weight: Tensor, *others: Tensor) -> bool:
    """Whether the head's weight and the others are whole: ZeRO-3 leaves a shape of ``(0,)``, FSDP2 an empty storage."""
    if transforms_active():  # a wrapper has no storage to ask
        return True
    return weight.ndim == 2 and all(t.numel() == 0 or t.untyped_storage().size() > 0 for t in (weight, *others))


def fsdp_unit(module: Any) -> Any:
    """The module through which FSDP2 gathers and shards the parameters of ``module``: itself, or the nearest one around it;
    else None."""
    if module is None or hasattr(module, "unshard"):
        return module
    if not is_distributed():
        return None
    from torch.distributed import _composable_state

    sharded = getattr(_composable_state, "_module_state_mapping", ())  # PyTorch's own list, which has no public name
    around = [m for m in sharded if hasattr(m, "unshard") and any(x is module for x in m.modules())]
    return min(around, key=lambda m: sum(1 for _ in m.modules()), default=None)


def shards(module: Any, **whole: Tensor | None) -> dict[str, Tensor]:
    """The shards that FSDP2 gathers these from: an optimizer changes the shards, and a gather keeps the whole one's version."""
    unit = None if torch.compiler.is_compiling() else fsdp_unit(module)
    if unit is None or not hasattr(unit, "_get_fsdp_state"):
        return {}
    state = unit._get_fsdp_state()
    one = getattr(state, "_fsdp_param_group", None)  # in PyTorch 2.11
    groups = getattr(state, "_fsdp_param_groups", [one])
    parameters = [p for group in groups if group is not None for p in group.fsdp_params]
    return {
        f"shard of {name}": p.sharded_param
        for name, t in whole.items()
        for p in parameters
        if t is not None and getattr(p, "_unsharded_param", None) is t
    }


def gather(parts: Sequence[Tensor], module: Any, shape: torch.Size) -> Callable[[], Any]:
    """Gather ``parts``, the head's weight first; returns a function that undoes it. ``shape``: of the logits, for errors."""
    if torch.compiler.is_compiling() or transforms_active() or parts[0].is_meta or is_whole(*parts):
        return lambda: None
    if module is None:
        raise RuntimeError(
            f"the storage of the head's weight is empty: it was sharded again when the module that owns it (FSDP2, "
            f"ZeRO-3) returned. LinearLogits {tuple(shape)} can gather it: pass module=<that module>."
        )
    unit = fsdp_unit(module)
    if unit is not None:
        unit.unshard()
        return unit.reshard
    if not any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
        raise RuntimeError(
            f"the storage of the head's weight is empty, and no FSDP2 unit around {type(module).__name__} holds it: for "
            f"LinearLogits {tuple(shape)} call fully_shard(head) or fully_shard(model). FullyShardedDataParallel, its "
            "predecessor, must not wrap the head by itself."
        )
    import deepspeed  # type: ignore[import-not-found]

    context = deepspeed.zero.GatheredParameters(list(module.parameters()))
    context.__enter__()
    return lambda: context.__exit__(None, None, None)


@contextmanager
def gathered(parts: Sequence[Tensor], module: Any, shape: torch.Size) -> Iterator[None]:
    """A context in which ``parts`` are whole."""
    release = gather(parts, module, shape)
    try:
        yield
    finally:
        release()


def gather_in_backward(
    output: Tensor, parts: Sequence[Tensor], module: Any, shape: torch.Size, *, trains: bool, made: bool
) -> Tensor:
    """``output``, before whose backward ``parts`` are made whole again.

    ``trains``: the logits have a gradient. ``made``: every rank made the gradients in forward, and only a second derivative
    reads the weight again.
    """
    if torch.compiler.is_compiling() or output.grad_fn is None or (module is None and not is_distributed()):
        return output
    node, unit = output.grad_fn, fsdp_unit(module)
    if module is None:

        def check(_: Any) -> None:
            gather(parts, module, shape)  # raises where they are not whole

        node.register_prehook(check)
    elif unit is not None:
        _unshard_in_backward(node, parts, unit, shape, trains=trains, made=made)
    elif getattr(module, "ds_grads_remaining", 0):
        # ZeRO-3 will free the weight when the gradient of the module's input is computed, and insists on having gathered
        # it when the gradient of its output arrived. It saw no tensors in the module's output: it gets these zeros.
        with torch.enable_grad():
            fetch = module.pre_bwd_fn.apply(torch.zeros((), requires_grad=True)).grad_fn.apply
        node.register_prehook(lambda _: fetch(torch.zeros(())) and None)
    elif trains or not made:
        _gather_until_accumulated(node, parts, module, shape)
    return output


def _unshard_in_backward(
    node: Any, parts: Sequence[Tensor], unit: Any, shape: torch.Size, *, trains: bool, made: bool
) -> None:
    """FSDP2's ``parts``, made whole before ``node`` runs."""
    undo: list[Callable[[], Any]] = []

    def unshard(_: Any) -> None:
        if not made or torch.is_grad_enabled():
            undo.append(gather(parts, unit, shape))
            if not is_whole(*parts):
                # unshard_in_backward is off, and during a backward unshard obeys it.
                unit.set_unshard_in_backward(True)
                unit.unshard()
                unit.set_unshard_in_backward(False)

    node.register_prehook(unshard)
    if not trains:  # else FSDP2 frees the weight, once it has reduced the gradient
        node.register_hook(lambda *_: _run_all(undo))


def _gather_until_accumulated(node: Any, parts: Sequence[Tensor], module: Any, shape: torch.Size) -> None:
    """ZeRO-3's ``parts``, made whole from ``node`` on until the gradients of all parameters of ``module`` are accumulated."""
    undo: list[Callable[[], Any]] = []
    waiting: list[Tensor] = []

    def accumulated(parameter: Tensor) -> None:
        waiting[:] = [p for p in waiting if p is not parameter]
        if not waiting:
            _run_all(undo)

    def start(_: Any) -> None:
        if is_whole(*parts):
            return
        undo.append(gather(parts, module, shape))
        # A parameter must be whole until its gradient is accumulated.
        waiting[:] = [p for p in module.parameters() if p.requires_grad]
        undo.extend(p.register_post_accumulate_grad_hook(accumulated).remove for p in waiting)
        torch.autograd.Variable._execution_engine.queue_callback(lambda: _run_all(undo))

    node.register_prehook(start)


def _run_all(undo: list[Callable[[], Any]]) -> None:
    while undo:
        undo.pop()()
