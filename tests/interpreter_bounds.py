"""Triton's interpreter reads and writes at any address; with this it refuses what lies outside the tensors of a launch."""

import functools
from typing import Any

import numpy as np
import torch
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

_ranges: list[tuple[int, int]] = []  # the addresses of the storages of the launch under way


def check_bounds() -> None:
    arguments = GridExecutor._init_args_hst

    def of_launch(self: Any, *given: Any) -> Any:
        args, kwargs = found = arguments(self, *given)
        tensors = (getattr(x, "base", x) for x in (*args, *kwargs.values()))  # base: of a TensorDescriptor
        storages = [x.untyped_storage() for x in tensors if isinstance(x, torch.Tensor)]
        _ranges[:] = [(x.data_ptr(), x.data_ptr() + x.nbytes()) for x in storages]
        return found

    GridExecutor._init_args_hst = of_launch
    InterpreterBuilder.create_masked_load = _checked(InterpreterBuilder.create_masked_load, mask=1)
    InterpreterBuilder.create_masked_store = _checked(InterpreterBuilder.create_masked_store, mask=2)


def _checked(access: Any, mask: int) -> Any:
    """The builder's ``access(self, pointers, …)``, which all loads and stores come to; ``mask`` is the place of its mask."""

    @functools.wraps(access)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        pointers = args[0]
        at = pointers.data[np.broadcast_to(args[mask].data, pointers.data.shape)]
        if at.size:
            first, end = int(at.min()), int(at.max()) + pointers.get_element_ty().primitive_bitwidth // 8
            if not any(start <= first and end <= stop for start, stop in _ranges):
                raise IndexError(
                    f"an access of {pointers.data.shape} elements reaches outside every tensor of the launch"
                )
        return access(self, *args, **kwargs)

    return checked
