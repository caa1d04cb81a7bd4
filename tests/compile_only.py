"""A pretended GPU: Triton itself compiles a launch down to machine code for a target, and then nothing runs.

So what is compiled is exactly what the launch asks for, as Triton specialises it on the arguments: which of them are divisible
by 16, which are 1, which are absent. Tensors stay on the CPU. Not for a process with ``TRITON_INTERPRET``.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_losses.kernels import configurations, linear_softmax

os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # quicker, and the same machine code


class Target(NamedTuple):
    gpu: GPUTarget
    shared_limit: int  # bytes one program may use
    multiprocessors: int
    matrix_instruction: str  # as the disassembler prints it
    like: str = ""  # the target whose configurations it takes


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024, 108, r"\bHMMA\b"),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024, 132, r"\bHGMMA\b"),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024, 148, r"\bUTC\w*MMA\b"),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024, 304, r"\bv_mfma_\w+"),
    # T4, whose heads are multiplied by the library; RTX 4090; RTX 5090.
    "sm_75": Target(GPUTarget("cuda", 75, 32), 64 * 1024, 40, "", like="sm_80"),
    "sm_89": Target(GPUTarget("cuda", 89, 32), 99 * 1024, 128, r"\bHMMA\b", like="sm_80"),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 99 * 1024, 170, r"\bHMMA\b", like="sm_80"),
}
SHIPPED = tuple(name for name, target in TARGETS.items() if not target.like)
MULTIPLIES = re.compile("_linear_softmax_.*_kernel")  # matrices: the machine code must contain the instruction


class Report(NamedTuple):
    kernel: str
    target: str
    arguments: str  # those present, and the values of constants
    warps: int = 0
    stages: int = 0
    registers: int = 0
    spilled_bytes: int = 0
    shared_bytes: int = 0
    loops: str = ""  # number of instructions in each, where CUDA's tools show them
    matrix_instruction: str = ""  # "" where none was found, "-" where none is needed
    trouble: str = ""  # why it cannot be compiled or launched


class CannotLaunch(RuntimeError):
    pass


class Driver:
    """The part of a device's driver that Triton's launch uses."""

    def __init__(self, name: str) -> None:
        self.name, self.target = name, TARGETS[name]
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self.target.gpu

    def get_current_device(self) -> str:
        return self.name  # Triton caches compiled kernels by device

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_device_properties(self, device: str) -> dict[str, int]:
        return {"max_shared_mem": self.target.shared_limit, "multiprocessor_count": self.target.multiprocessors}

    def load_binary(self, name: str, binary: bytes, shared: int, device: str) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, the most threads

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return self._launch

    def _launch(self, x: int, y: int, z: int, *rest: Any) -> None:
        check_launch(x, y, z, *rest)
        self.launched = (x, y, z), rest[6:]  # the grid, and the kernel's arguments


def check_launch(x: int, y: int, z: int, *rest: Any) -> None:
    """Raise for a grid, or for descriptors of the copy engine, that CUDA would refuse."""
    if not (0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16):
        raise CannotLaunch(f"grid {x, y, z}")
    for tensor in (t for t in rest if isinstance(t, TensorDescriptor)):
        size = tensor.base.element_size()
        if tensor.base.data_ptr() % 16 or any(stride * size % 16 for stride in tensor.strides[:-1]):
            raise CannotLaunch(f"rows of {tensor.strides} elements of {size} bytes are not aligned to 16")
        if tensor.strides[-1] != 1 or max(tensor.block_shape) > 256 or tensor.block_shape[-1] * size < 16:
            raise CannotLaunch(f"blocks of {tensor.block_shape}, strides {tensor.strides}")
        if not all(0 < length <= 2**32 for length in tensor.shape):
            raise CannotLaunch(f"shape {tensor.shape}")


@contextmanager
def pretended_gpu(target: str, launch: Callable[..., Any]) -> Iterator[Driver]:
    """Inside, tensors count as a GPU's, and ``launch(run, fn, *args, **kwargs)`` stands for a kernel's own ``run``."""
    run, before, gpu = JITFunction.run, driver._active, Driver(target)
    like = TARGETS[target].like or target
    device = {"architecture": lambda device: like, "programs": lambda device: TARGETS[target].multiprocessors}
    driver.set_active(gpu)
    try:
        with (
            patch.object(JITFunction, "run", lambda fn, *args, **kwargs: launch(run, fn, *args, **kwargs)),
            patch.multiple(linear_softmax, **device),
            patch.object(configurations, "architecture", device["architecture"]),
            patch.object(torch.Tensor, "is_cuda", property(lambda tensor: True)),
            patch.multiple(torch, mm=_product(torch.mm), addmm=_product(torch.addmm)),
            patch.multiple(torch.cuda, is_current_stream_capturing=lambda: False, synchronize=lambda: None),
        ):
            yield gpu
    finally:
        driver._active = before


def _product(exact: Callable[..., Any]) -> Callable[..., Any]:
    """``exact`` on upcast factors where ``out_dtype`` is given: a CPU has no products of 16-bit factors with an fp32 sum."""

    def multiply(*factors: Any, out_dtype: Any = None, **named: Any) -> Any:
        if out_dtype is not None:
            factors = tuple(factor.to(out_dtype) for factor in factors)
        return exact(*factors, **named)

    return multiply


@contextmanager
def launches_compile(target: str, then: Callable[[Report], None]) -> Iterator[None]:
    """Inside, launches compile for ``target``; ``then`` gets a report of each kernel, once."""
    known = set()

    def compiling(run: Callable[..., Any], fn: JITFunction, *args: Any, **kwargs: Any) -> Any:
        try:
            kernel = run(fn, *args, **kwargs)
        except Exception as error:
            while error.__cause__ is not None:
                error = error.__cause__  # the reason stands below the compiler's listing
            reason = (str(error).strip().splitlines() or [repr(error)])[-1]
            then(Report(fn.__name__, target, "", trouble=f"{type(error).__name__}: {reason[-200:]}"))
            raise
        if kernel.hash not in known:
            known.add(kernel.hash)
            report = _report(kernel, target)
            if "enable_fp_fusion" not in kwargs:
                report = report._replace(trouble="leaves to Triton's version whether products fuse with sums")
            then(report)
        return kernel

    with pretended_gpu(target, compiling):
        yield


def _report(kernel: Any, target: str) -> Report:
    if "cubin" in kernel.asm:
        code = _cuobjdump("--dump-sass", kernel.asm["cubin"])
        (registers, spilled), loops = _nvidia(kernel.asm["cubin"]), " ".join(map(str, _loops(code)))
    else:
        code, loops = kernel.asm["amdgcn"], ""
        registers, spilled = _amd(code)
    instruction = "-"
    if MULTIPLIES.fullmatch(kernel.name):
        found = re.search(TARGETS[target].matrix_instruction, code)
        instruction = found[0] if found else ""
    arguments, meta = _arguments(kernel.src), kernel.metadata
    trouble = "" if instruction else f"no matrix instruction {TARGETS[target].matrix_instruction}"
    if (
        instruction == "HGMMA"
        and "TMA" in arguments
        and not re.search(r"wgmma\.wait_group\S* [1-9]", kernel.asm["ptx"])
    ):
        trouble = "waits for each product before the next begins"
    return Report(
        kernel.name, target, arguments, meta.num_warps, meta.num_stages, registers, spilled, meta.shared, loops,
        instruction, trouble,
    )  # fmt: skip


def _arguments(source: Any) -> str:
    names = source.fn.arg_names
    constants = {names[path[0]]: getattr(value, "value", value) for path, value in source.constants.items()}
    flags = [name for name, value in constants.items() if value is True]
    values = [f"{name}={value}" for name, value in constants.items() if value not in (True, False, None)]
    tensors = [f"{name} {t}" for name, t in source.signature.items() if t.startswith(("*", "tensordesc"))]
    return ", ".join([*flags, *values, *tensors])


def _cuobjdump(what: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout


def _nvidia(cubin: bytes) -> tuple[int, int]:
    """Registers and spilled bytes."""
    usage = _cuobjdump("--dump-resource-usage", cubin)
    registers, stack, local = (int(re.findall(rf"\b{key}:(\d+)", usage)[-1]) for key in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def _loops(code: str) -> list[int]:
    """Number of instructions in each loop, from a backward branch's target to the branch; of the kernel where it has none."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)
    places = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    branches = [(i, re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", text)) for i, (_, text) in enumerate(lines)]
    lengths = [i + 1 - places[int(to[1], 16)] for i, to in branches if to and int(to[1], 16) in places]
    return [length for length in lengths if length > 20] or [len(lines)]


def _amd(assembly: str) -> tuple[int, int]:
    def count(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1])  # type: ignore[index]

    # Scalar registers that do not fit go to lanes of vector registers, not to memory.
    return count("vgpr_count"), max(4 * count("vgpr_spill_count"), count("private_segment_fixed_size"))
