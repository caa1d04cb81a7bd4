"""``EMULATE=sm_90 pytest …``: kernels compile for a GPU that is not there, and their PTX runs on the CPU, by ``ptx.py``.

So the tests written for a GPU run as on one, bfloat16 included, on the code that the compiler made for it: ``sm_80`` or
``sm_90``. Not for a process with ``TRITON_INTERPRET``.
"""

import ctypes
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ptx
import torch
from compile_only import pretended_gpu

FORMATS = {"f32": "<f", "f64": "<d", "u8": "<B", "u16": "<H", "u32": "<I", "u64": "<Q"}


@contextmanager
def launches_run(target: str) -> Iterator[None]:
    """Inside, launches of kernels run as on ``target``."""

    def running(run: Callable[..., Any], fn: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = run(fn, *args, **kwargs)
        _launch(kernel, *gpu.launched)
        return kernel

    with pretended_gpu(target, running) as gpu:
        yield


def _launch(kernel: Any, grid: tuple[int, int, int], args: tuple[Any, ...]) -> None:
    """Run it twice, with programs and warps in opposite orders, and raise unless the results are the same."""
    program = ptx.compiled(kernel.asm["ptx"])
    values, tensors = _values(kernel, args)
    values += [0] * (len(program.parameters) - len(values))  # scratch memory, which no kernel here uses
    buffer = ctypes.create_string_buffer(program.parameter_bytes + 64)
    start = ctypes.addressof(buffer) + -ctypes.addressof(buffer) % 64
    for (offset, kind, size), value in zip(program.parameters.values(), values, strict=True):
        if isinstance(value, int):
            value &= 2 ** (8 * size) - 1
        data = value if isinstance(value, bytes) else struct.pack(FORMATS[kind], value)
        ctypes.memmove(start + offset, data, len(data))
    memory = [torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()) for t in tensors]
    ends = [end for x in memory for end in (x.data_ptr(), x.data_ptr() + x.numel())]
    ranges = (ctypes.c_uint64 * len(ends))(*ends)
    before, after = [x.clone() for x in memory], []
    for backwards in (1, 0):
        for x, kept in zip(memory, before, strict=True):
            x.copy_(kept)
        error = program.run(
            ctypes.c_void_p(start),
            *grid,
            kernel.metadata.num_warps,
            kernel.metadata.shared,
            ranges,
            len(tensors),
            backwards,
        )
        if error:
            raise RuntimeError(f"{kernel.name}: {error.decode()}; tensors {[tuple(t.shape) for t in tensors]}")
        after.append([x.clone() for x in memory])
    for t, x, y in zip(tensors, *after, strict=True):
        if not torch.equal(x, y):
            raise RuntimeError(
                f"{kernel.name}: what it writes to {tuple(t.shape)} depends on the order of warps or programs"
            )


def _values(kernel: Any, args: tuple[Any, ...]) -> tuple[list[Any], list[torch.Tensor]]:
    """The values that the launcher passes, with descriptors as ``struct Map`` of ``ptx.c``, and the tensors behind them."""
    values: list[Any] = []
    tensors: list[torch.Tensor] = []
    maps = iter(getattr(kernel.metadata, "tensordesc_meta", None) or ())
    for kind, arg in zip(kernel.src.signature.values(), args, strict=True):
        if kind == "constexpr":
            continue
        if kind.startswith("tensordesc"):
            tensors.append(arg.base)
            map, pitch = next(maps), arg.strides[0] * arg.base.element_size()
            tile = (*map["block_size"], map["elem_size"], map["swizzle"])
            values += [
                struct.pack("<Qqqqiiii", arg.base.data_ptr(), *arg.shape, pitch, *tile),
                *arg.shape,
                *arg.strides,
            ]
        elif isinstance(arg, torch.Tensor):
            tensors.append(arg)
            values.append(arg.data_ptr())
        else:
            values.append(arg)
    return values, tensors
