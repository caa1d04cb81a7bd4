"""The one rule for "right": at most twice as far from float64 as eager PyTorch is in the same dtype.

Tests and the bench both call :func:`assert_accurate`; nothing loosens it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def assert_accurate(ours: Tensor, eager: Tensor, exact: Tensor, name: str = "tensor") -> None:
    """Raise ``AssertionError`` unless ``ours`` is as accurate as ``eager``.

    In the largest element and in the Euclidean norm,

        error(ours, exact) <= 2 * error(eager, exact) + 1 ulp,

    with the ulp of the dtype at that magnitude. nan and inf must be exactly where they are in ``exact``, with the
    same sign; an ``exact`` too large for the dtype counts as inf.

    Args:
        ours: the result under test, in the dtype under test.
        eager: the same maths run by plain PyTorch in that dtype.
        exact: the same maths in float64, from the same (already rounded) inputs.
        name: what to call the tensor in the message.
    """
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert ours.dtype == eager.dtype, f"{name}: dtype {ours.dtype}, eager has {eager.dtype}"
    ours64, eager64, exact = (t.detach().to("cpu", torch.float64) for t in (ours, eager, exact))
    rounded = exact.to(ours.dtype).double()
    finite = rounded.isfinite()
    for special in (torch.isnan, torch.isposinf, torch.isneginf):
        wrong = special(ours64) != special(rounded)
        assert not wrong.any(), f"{name}: {int(wrong.sum())} of {wrong.numel()} elements differ in {special.__name__}"
    if not finite.any():
        return
    ours_error = torch.where(finite, ours64 - exact, 0)
    # Where eager itself overflowed, its error cannot be the measure: it counts as 0 there.
    eager_error = torch.where(finite & eager64.isfinite(), eager64 - exact, 0)
    for measure, order in (("largest element", float("inf")), ("norm", 2)):
        error, eager_size, size = (
            torch.linalg.vector_norm(t, ord=order) for t in (ours_error, eager_error, rounded[finite])
        )
        allowed = 2 * eager_size + torch.finfo(ours.dtype).eps * size + torch.finfo(ours.dtype).tiny
        assert error <= allowed, (
            f"{name} {tuple(ours.shape)} {ours.dtype}: error {error:.3e} in the {measure}, "
            f"allowed {allowed:.3e} (eager's is {eager_size:.3e})"
        )
