"""What the derivatives of the fused operators share, and when an operator must give way to plain differentiable PyTorch.

The operators implement their first derivative in reverse mode. Second derivatives, forward-mode AD and functorch transforms
go through plain PyTorch on whole logits. That suits float64 and small inputs, which is where they are used; it is refused
for inputs whose logits the caller meant never to hold.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

SMALL = 2**22  # logits


def exporting() -> bool:
    """``torch.compiler.is_exporting()``, which is always True in what PyTorch 2.11 compiles."""
    return torch.compiler._is_exporting_flag


def while_compiling(fn: Callable[..., Any]) -> Callable[..., Any]:
    """When a function that calls ``fn`` is compiled, ``fn`` runs once, at compile time, and its result is a graph constant.

    Like ``torch.compiler.assume_constant_result``, which would import the compiler.
    """
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


@while_compiling
def transforms_active() -> bool:
    """Whether forward-mode AD or a functorch transform is active: a custom operator would silently drop its tangents. Dynamo
    runs the transforms that it compiles."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def in_plain_pytorch(*grads: Tensor | None) -> bool:
    """Whether a backward must run in plain PyTorch: it is differentiated again, or the gradients are batched."""
    if torch.compiler.is_compiling():
        return False
    return any(map(batched, grads)) or torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()


def batched(g: Tensor | None) -> bool:
    """Whether ``g`` is a batch of gradients (``is_grads_batched=True``), which none of our operators takes."""
    return g is not None and torch._C._functorch.is_legacy_batchedtensor(g)


def trains(t: Tensor | None) -> bool:
    """Whether autograd will compute a gradient for ``t``."""
    return t is not None and t.requires_grad and torch.is_grad_enabled()


def differentiated(t: Tensor | None) -> bool:
    """Whether a derivative for ``t`` will be computed, in forward mode too."""
    dual = t is not None and forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None
    return dual or trains(t)


def constant(name: str, t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``t`` as the operators take what has no derivative: detached, in ``dtype``, contiguous. Raises where one is wanted."""
    if t is not None and differentiated(t):
        raise RuntimeError(f"the derivative for {name} {tuple(t.shape)} is not implemented; detach it")
    return None if t is None else t.detach().to(dtype).contiguous()


def no_gradient() -> bool:
    """Whether results made now have no gradient. ``no_grad`` does not stop forward-mode AD, and ``detach`` drops tangents."""
    return not torch.is_grad_enabled() and (torch.compiler.is_compiling() or forward_ad._current_level < 0)


def differentiable_again(tokens: int, vocab: int, dtype: torch.dtype) -> bool:
    """Whether whole logits ``(tokens, vocab)`` may be held for a derivative that the fused operators lack."""
    return dtype == torch.float64 or tokens * vocab <= SMALL


def check_differentiable(tokens: int, vocab: int, dtype: torch.dtype) -> None:
    """Raise unless :func:`differentiable_again`."""
    if not differentiable_again(tokens, vocab, dtype):
        raise RuntimeError(
            f"double backward, forward-mode AD and functorch transforms would hold the ({tokens}, {vocab}) logits in "
            f"plain PyTorch, and do so only in float64 or up to {SMALL} logits; got {dtype}. Use fewer tokens."
        )


def refuse_shard(shard: str, shape: Sequence[int]) -> None:
    """Raise if the logits to differentiate are sharded over ranks."""
    if shard:
        raise RuntimeError(
            f"double backward, forward-mode AD and functorch transforms hold whole logits, and {tuple(shape)} is a shard "
            "that a group of ranks shares: gather the vocabulary for them"
        )


def differentiable_gradients(
    fn: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of ``fn(*inputs)`` in plain PyTorch: one per input, or None. Under ``enable_grad`` they can be differentiated
    again."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # As separate tensors: where one input was computed from another, autograd itself follows that path.
        inputs = [None if x is None else x.view_as(x) for x in inputs]
        outputs = fn(*inputs)
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
    wanted = {i: x for i, x in enumerate(inputs) if x is not None and x.requires_grad}
    found = torch.autograd.grad(
        [o for o, _ in pairs], list(wanted.values()), [g for _, g in pairs], create_graph=again, allow_unused=True
    )
    gradients = dict(zip(wanted, found, strict=True))
    return [gradients.get(i) for i in range(len(inputs))]


def for_inputs(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of an operator's first arguments, and None for each of the others."""
    return *gradients, *[None] * (len(ctx.needs_input_grad) - len(gradients))


def traced(t: Tensor) -> bool:
    return torch.compiler.is_compiling() or torch._guards.detect_fake_mode((t,)) is not None or t.is_meta


def unknown(size: int) -> bool:
    """Whether ``size`` is a number of tokens that a mask selects in a compiled function, known only when that runs."""
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import guard_or_true

    return guard_or_true(size == 0) and guard_or_true(size != 0)


def same_sizes(a: torch.Size, b: torch.Size) -> bool:
    """``a == b``; for a size that is :func:`unknown`, a check when the compiled function runs."""
    if not torch.compiler.is_compiling():
        return a == b
    from torch.fx.experimental.symbolic_shapes import guard_or_true

    if len(a) != len(b) or not all(guard_or_true(x == y) for x, y in zip(a, b, strict=True)):
        return False
    for x, y in zip(a, b, strict=True):
        torch._check(x == y)
    return True


def host_may_read(t: Tensor) -> bool:
    """Whether the host may wait for the values of ``t``: not while tracing or capturing a graph, nor under a transform."""
    if traced(t) or transforms_active():  # checked first: Dynamo does not compile the query below
        return False
    return not (t.is_cuda and torch.cuda.is_current_stream_capturing())


@while_compiling
def hooks_on_saved() -> bool:
    """Whether saved-tensor hooks, such as a checkpoint's, see tensors saved now. :mod:`torch.func` refuses them."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None or _compiles_checkpoint()


def _compiles_checkpoint() -> bool:
    """Whether Dynamo is tracing inside a checkpoint: it sets no hooks, but the compiled graph will run under them."""
    dynamo = sys.modules.get("torch._dynamo.symbolic_convert")
    translator = getattr(dynamo.tls, "current_tx", None) if dynamo is not None else None
    tracer = None if translator is None else translator.output.current_tracer
    while tracer is not None and "checkpoint" not in str(tracer.source_target):
        tracer = tracer.parent
    return tracer is not None


@while_compiling
def seeks_nan() -> bool:
    """Whether autograd checks each gradient for nan (:func:`torch.autograd.detect_anomaly`), which it cannot do with traced
    ones."""
    return torch.is_anomaly_enabled() and torch.is_anomaly_check_nan_enabled()


def may_save(t: Tensor) -> bool:
    """Whether forward may save what backward could recompute.

    Not while tracing, where shapes are unknown, and not under saved-tensor hooks: checkpointing runs forward again, perhaps
    under other settings, and offloading logits costs more than recomputing them.
    """
    return not traced(t) and not hooks_on_saved()


def save_for_backward(ctx: Any, *values: Any) -> None:
    """``ctx.save_for_backward`` for any values. That method itself refuses numbers, strings, and tensors made under
    ``torch.inference_mode``, such as a teacher's logits: these are stored on ``ctx``."""
    ctx.others = {i: x for i, x in enumerate(values) if not isinstance(x, Tensor) or x.is_inference()}
    ctx.save_for_backward(*(None if i in ctx.others else x for i, x in enumerate(values)))


def saved_values(ctx: Any) -> list[Any]:
    """The values that :func:`save_for_backward` saved; read them only once, since checkpointing unpacks once."""
    return [ctx.others.get(i, t) for i, t in enumerate(ctx.saved_tensors)]


def read_again(saved: Tensor) -> bool:
    """Whether another backward may follow this one and read what forward saved."""
    return traced(saved) or torch._C._autograd._get_current_graph_task_keep_graph()


def absent(like: Tensor) -> Tensor:
    """A tensor that stands for None, since an operator must return tensors."""
    return like.new_zeros(())


def present(t: Tensor | None, like: Tensor) -> Tensor:
    return absent(like) if t is None else t
