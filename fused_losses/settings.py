"""Settings: choices that hold for many calls. Most are also arguments of the functions they concern.

A setting takes effect when it is constructed, and its previous value is restored when a ``with`` block around it ends:
``workspace("256MiB")`` alone lasts for the process, ``with workspace("256MiB"):`` for the block. All threads see it. An
argument overrides the setting. A checkpoint runs forward again in backward, and raises if another route or workspace then makes
it save other tensors: keep the block open until then.
"""

from __future__ import annotations

import importlib.util
import os
import re
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .autodiff import while_compiling

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
Backend = Literal["triton", "torch"]
Route = Literal["gradients_in_forward", "recompute"]


class _Setting:
    value: ClassVar[Any] = None
    _blocks: ClassVar[list[_Setting]]  # open blocks, in the order in which they were opened

    def __init_subclass__(cls) -> None:
        cls._blocks = []

    def __init__(self, value: Any) -> None:
        self._previous = type(self).value
        type(self).value = self.parse(value)

    @classmethod
    def parse(cls, value: Any) -> Any:
        if value not in (True, False):
            raise TypeError(f"{cls.__name__} is True or False, got {value!r}")
        return value

    @classmethod
    def chosen(cls, argument: Any) -> Any:
        """The value for one call: its argument if given, else the setting."""
        return cls.parse(cls.value if argument is None else argument)

    def __enter__(self) -> None:
        self._blocks.append(self)

    def __exit__(self, *exc: object) -> None:
        at = self._blocks.index(self)
        del self._blocks[at]
        if at == len(self._blocks):
            type(self).value = self._previous
        else:  # another thread's later block is still open: it will restore the value from before this one
            self._blocks[at]._previous = self._previous


def _one_of(name: str, value: Any, choices: tuple[str, ...]) -> Any:
    if value is not None and value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)} or None (chosen for you), got {value!r}")
    return value


class backend(_Setting):
    """``"triton"`` (CUDA, ROCm) or ``"torch"`` (chunked PyTorch, any device); ``None``: Triton where it can run.

    Called alone it holds for the process, in ``with`` for the block.
    """

    @staticmethod
    def parse(value: Backend | None) -> Backend | None:
        return _one_of("backend", value, ("triton", "torch"))


class route(_Setting):
    """How a head's gradients are made: ``"gradients_in_forward"``, ``"recompute"``, or ``None``: as planned.

    Called alone it holds for the process, in ``with`` for the block.
    """

    @staticmethod
    def parse(value: Route | None) -> Route | None:
        return _one_of("route", value, ("gradients_in_forward", "recompute"))


class workspace(_Setting):
    """Bytes a call may use beside its inputs and results: an int, ``"256MiB"``, ``"1.5GiB"``, or ``None``: as planned.

    Per-token results may keep up to this many bytes of logits from forward to backward, so that backward need not recompute
    them. On a GPU, those of a 32-bit head hold 32 MiB of logits in forward, whatever this value. A value too small for the
    logits of 32 tokens, or of 512 columns, may be exceeded. Called alone it holds for the process, in ``with`` for the block.

    Example:
        >>> with workspace("256MiB"):
        ...     workspace.value
        268435456
    """

    @staticmethod
    def parse(value: int | torch.SymInt | str | None) -> Any:
        if value is None or (isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool) and value >= 0):
            return value
        return _bytes(value)


@while_compiling  # Dynamo of PyTorch 2.11 compiles no regular expression
def _bytes(text: Any) -> int:
    units = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*(\w+)\s*", text) if isinstance(text, str) else None
    if not match or match[2] not in units:
        raise ValueError(f"workspace takes bytes, 0 or more, or a string such as '256MiB', got {text!r}")
    return int(float(match[1]) * units[match[2]])


class gradient_filter(_Setting):
    r"""A head's backward multiplies only the vocabulary entries whose gradient is large somewhere: faster, not exact.

    A trained model gives most of a large vocabulary almost no probability at any of some thousand tokens. The value is
    :math:`\epsilon`; 0, the default, multiplies all entries. Otherwise the gradient :math:`dz` of the logits in one product (a
    chunk of tokens on route ``"gradients_in_forward"``, a slice of the vocabulary on ``"recompute"``) is approximated:

    .. math:: dz \approx dz_L + r s^\top, \quad L = \{j : \max_i |dz_{ij}| \ge \epsilon \max_{ik} |dz_{ik}|\}

    .. math:: r_i = \sum_{j \notin L} dz_{ij}, \quad s_j = \sum_i |dz_{ij}| \Big/ \sum_{i,\, k \notin L} |dz_{ik}|
        \text{ for } j \notin L, \text{ else } 0

    The outer product :math:`r s^\top` stands for the small entries, over which all tokens spread their probability much alike;
    so the gradient of the hidden states has an error several times smaller than if they were dropped. If L is more than half of
    the vocabulary, all entries are multiplied. Losses, statistics and the gradient of a bias are exact, and so are the results
    of ``create_graph=True`` and ``torch.func``.

    Called alone it holds for the process, in ``with`` for the block.

    Start with ``2**-14``; ``examples/gradient_filter.py`` trains with and without a filter, and prints the error of both
    gradients beside that of bf16; ``bench/TUNING.md`` has its results. What to know:

    - Only the sum over tokens has a small error. A token whose gradient is small against the largest of its chunk (token
      weights or advantages far apart) gets a rough one, and so do the rows of rare tokens in the weight's gradient where
      signs differ, in policy losses and distillation.
    - The result depends on the chunk: on the workspace, the other tokens, and this rank's part of a shared vocabulary.
    - The value in forward counts. A checkpoint runs forward again in backward: keep the ``with`` open until then.
    - On CUDA the host waits for the number of entries, once per chunk or slice; a captured graph multiplies all entries, as
      does a compiled ``token_loss``. On a CPU, 16-bit products on route ``"gradients_in_forward"`` become slower.

    ``2**-12`` is where the Cut Cross-Entropy paper drops blocks of the gradient (Wijmans et al.,
    https://arxiv.org/abs/2411.09009).

    Example:
        >>> with gradient_filter(2**-12):
        ...     gradient_filter.value
        0.000244140625
    """

    value: ClassVar[float] = 0.0

    @staticmethod
    def parse(value: float) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise ValueError(
                f"gradient_filter takes a share of the largest gradient, such as 2**-12, or 0 (off), got {value!r}"
            )
        return float(value)


class drop_ignored(_Setting):
    """Whether ignored tokens are taken out before a head's products.

    That needs their count on the host, which waits for the device. ``False`` keeps them in, zeroed. The few other functions
    that wait (``document_borders``, ``prm_loss``, ``entropy_mask`` over ranks) document it. Called alone it holds for the
    process, in ``with`` for the block.
    """

    value: ClassVar[bool] = True


class strict(_Setting):
    """Make it an error, not a warning, when an operation would materialise a :class:`LinearLogits`.

    Called alone it holds for the process, in ``with`` for the block.
    """

    value: ClassVar[bool] = False

    def __init__(self, value: bool = True) -> None:
        super().__init__(value)


def triton_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def resolve_backend(tensor: Tensor, choice: Backend | None = None) -> Backend:
    """The backend for ``tensor``: the argument, else the setting, else Triton on a GPU and chunked PyTorch elsewhere.

    float64 is for checking, not for speed: it always runs in PyTorch.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the named backend cannot run here; the message says why.
    """
    choice = backend.chosen(choice)
    if tensor.dtype == torch.float64:
        if choice == "triton":
            raise RuntimeError("backend='triton' computes in fp32; float64 runs on backend='torch', also on a GPU")
        return "torch"
    if choice == "triton":
        if not TRITON_INSTALLED:
            raise RuntimeError("backend='triton' needs the package triton, which is not installed")
        if not tensor.is_cuda and not triton_interpreted():
            raise RuntimeError(
                f"backend='triton' needs tensors on a CUDA or ROCm device, got {tensor.device}; move them there, "
                "use backend='torch', or set TRITON_INTERPRET=1 before the first import to run Triton's interpreter"
            )
    return choice or ("triton" if tensor.is_cuda and TRITON_INSTALLED else "torch")
