"""Heads and logits that are DTensors: what part of the vocabulary, and of the tokens, this rank holds.

Over a dimension of the mesh on which the head's weight is

- ``Shard(0)``, the ranks share the vocabulary (see :mod:`fused_losses.vocab_parallel`), and all of them need the hidden states
  of all tokens: hidden states that are sharded there are gathered, and their gradient is reduce-scattered;
- ``Shard(1)``, the weight is first redistributed to ``Shard(0)``: each rank sends the others the part of its columns that they
  need, and none ever holds the whole weight;
- ``Replicate``, each rank has its own tokens if hidden is sharded by tokens, as in data parallelism, and the gradient of the
  weight is a sum over the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from .vocab_parallel import VocabParallel, VocabShard


def is_shard(placement: Placement, dim: int) -> bool:
    return type(placement) is Shard and placement.dim == dim


def part_of_vocabulary(mesh: DeviceMesh, at: int | None, vocab: int) -> VocabShard | None:
    """This rank's part of a vocabulary that is ``Shard`` on dimension ``at`` of the mesh: it is split as by ``torch.chunk``."""
    if at is None:
        return None
    most = -(-vocab // mesh.size(at))
    start = min(mesh.get_local_rank(at) * most, vocab)
    return VocabParallel(mesh.get_group(at), (start, min(start + most, vocab)), vocab).shard(most)


def refuse_group(group: Any) -> None:
    if group is not None:
        raise ValueError(f"DTensors know the ranks that share their vocabulary: leave group={group} out")


def local_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    u: Tensor | None = None,
    B: Tensor | None = None,
    *,
    group: Any,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Any]:
    """This rank's part of a head of DTensors, and its :class:`VocabShard` if the vocabulary is shared."""
    refuse_group(group)
    of = {"hidden": hidden, "weight": weight, "bias": bias, "low_rank[0]": u, "low_rank[1]": B}
    shown = ", ".join(
        f"{name} {tuple(t.shape)} {t.placements if isinstance(t, DTensor) else 'a plain tensor'}"
        for name, t in of.items()
        if t is not None
    )
    meshes = {t.device_mesh if isinstance(t, DTensor) else None for t in of.values() if t is not None}
    if len(meshes) > 1 or not isinstance(weight, DTensor) or not isinstance(hidden, DTensor):
        raise TypeError(
            f"hidden states and head must be DTensors on one mesh, or none of them, got {shown}. Inside its module's forward a "
            "weight sharded by FSDP2 is whole: make the LinearLogits there (LinearHead does). A vocabulary that is really "
            "shared needs hidden as a DTensor too: parallelize_module with VocabParallelHead makes it one"
        )
    mesh = weight.device_mesh
    shared = [at for at, p in enumerate(weight.placements) if is_shard(p, 0)]
    shared = shared or [at for at, p in enumerate(weight.placements) if is_shard(p, 1)][:1]
    known = all(isinstance(p, Replicate) or is_shard(p, 0) or is_shard(p, 1) for p in weight.placements)
    if len(shared) > 1 or not known:
        raise ValueError(
            "a head's weight is Shard(0), Shard(1) or Replicate on each dimension of the mesh, its vocabulary shared on one at "
            f"most; got {shown}"
        )
    at = shared[0] if shared else None
    tokens: list[Placement] = [
        Replicate() if i == at or type(p) is not Shard or p.dim == hidden.ndim - 1 else p
        for i, p in enumerate(hidden.placements)
    ]

    def of_tokens(t: Any) -> Any:
        if t is None:
            return None
        return t.redistribute(placements=tokens).to_local(grad_placements=tokens)

    def of_vocabulary(t: Any) -> Any:
        if t is None:
            return None
        placements = [Shard(0) if i == at else Replicate() for i in range(mesh.ndim)]
        gradient = [Partial() if isinstance(p, Shard) else mine for p, mine in zip(tokens, placements, strict=True)]
        return t.redistribute(placements=placements).to_local(grad_placements=gradient)

    local = of_tokens(hidden)
    shard = part_of_vocabulary(mesh, at, weight.shape[0])
    sharded = None if at is None else hidden.placements[at]
    # Where a later mesh dimension splits this rank's tokens again, they are not one of the parts that were gathered.
    cut_again = at is not None and sharded in hidden.placements[at + 1 :]
    if shard is not None and type(sharded) is Shard and not cut_again:
        dim = sharded.dim
        alike = u is None or u.placements == hidden.placements  # type: ignore[attr-defined]
        if dim < hidden.ndim - 1 and local.shape[dim] % shard.ranks == 0 and alike:
            inner = local.shape[dim] // shard.ranks * local.shape[dim + 1 : -1].numel()
            shard = shard._replace(outer=local.shape[:dim].numel(), inner=inner)
    return local, of_vocabulary(weight), of_vocabulary(bias), of_tokens(u), of_vocabulary(B), shard


def local_logits(logits: DTensor, dim: int, group: Any) -> tuple[Tensor, VocabShard | None]:
    """This rank's part of logits whose classes are dimension ``dim``, and its :class:`VocabShard` if they are shared."""
    refuse_group(group)
    dim %= logits.ndim
    shared = [at for at, p in enumerate(logits.placements) if is_shard(p, dim)]
    if len(shared) > 1 or not all(type(p) is Shard or isinstance(p, Replicate) for p in logits.placements):
        raise ValueError(
            f"logits {tuple(logits.shape)} are Shard or Replicate on each dimension of the mesh, and their classes (dimension "
            f"{dim}) shared on one at most; got {logits.placements}"
        )
    at = shared[0] if shared else None
    return logits.to_local(), part_of_vocabulary(logits.device_mesh, at, logits.shape[dim])


class VocabParallelHead(ParallelStyle):
    """How ``parallelize_module`` shares the vocabulary of a :class:`LinearHead` over a mesh dimension.

    Weight, bias and ``lora_B`` become ``Shard(0)``; the head returns a :class:`LinearLogits` of the whole vocabulary, the same
    on all ranks, of which each holds its rows. ``parallelize_module`` makes new parameters: tie an embedding again afterwards,
    ``model.lm_head.weight = model.embed.weight``.

    Args:
        input_layouts: the placement of the hidden states: ``Replicate()``, or ``Shard(1)`` where the layers before are
            sequence parallel.

    Example:
        >>> from torch.distributed.tensor.parallel import parallelize_module  # doctest: +SKIP
        >>> parallelize_module(model, mesh["tp"], {"lm_head": VocabParallelHead()})  # doctest: +SKIP
    """

    def __init__(self, *, input_layouts: Placement | None = None) -> None:
        self.input_layouts = input_layouts or Replicate()

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        from .linear_head import LinearHead

        if not isinstance(module, LinearHead):
            raise TypeError(
                f"VocabParallelHead parallelises a LinearHead, got {type(module).__name__}: LinearHead.from_linear"
            )
        return distribute_module(module, device_mesh, self._partition, self._prepare)  # type: ignore[arg-type]

    def _partition(self, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for key, parameter in module._parameters.items():
            if parameter is None or isinstance(parameter, DTensor):
                continue
            placement = Replicate() if key == "lora_A" else Shard(0)
            sharded = distribute_tensor(parameter, mesh, [placement])
            module.register_parameter(key, nn.Parameter(sharded, requires_grad=parameter.requires_grad))

    def _prepare(self, module: nn.Module, inputs: Sequence[Any], mesh: DeviceMesh) -> tuple[Any, ...]:
        if not inputs:
            raise TypeError(
                f"the hidden states are the first argument of a {type(module).__name__}: do not give their name"
            )
        hidden, *rest = inputs
        if not isinstance(hidden, DTensor):
            hidden = DTensor.from_local(hidden, mesh, [self.input_layouts], run_check=False)
        return hidden, *rest
