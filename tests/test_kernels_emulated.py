"""What the compiler makes of the kernels for sm_80 and sm_90 is right, in bfloat16 too: their PTX runs on the CPU.

They run in processes of their own: here kernels run in Triton's interpreter, which is wrong about bfloat16 and knows neither
threads nor barriers. ``EMULATE=sm_90 pytest tests/test_divergence.py`` runs any other test this way.
"""

import pytest
import torch
from conftest import python

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which all tests run")
# Each kernel's forward and backward, with either way to load a matrix and with every option.
TESTS = """
kernel_linear_softmax.py::test_statistics_under_each_option[descriptors-everything-torch.bfloat16]
kernel_linear_softmax.py::test_statistics_under_each_option[pointers-everything-torch.bfloat16]
kernel_linear_softmax.py::test_each_coefficient_of_the_gradient[descriptors-abecd-everything-torch.bfloat16]
kernel_linear_softmax.py::test_each_coefficient_of_the_gradient[pointers-abecd-everything-torch.bfloat16]
token_statistics.py::test_values_and_gradients[triton-0.7-None-torch.bfloat16]
token_statistics.py::test_values_and_gradients[triton-0.7-None-torch.float32]
linear_cross_entropy.py::test_other_dtypes[triton-plain-gradients_in_forward-torch.bfloat16]
linear_cross_entropy.py::test_other_dtypes[triton-plain-recompute-torch.bfloat16]
gradients_in_forward.py::test_one_pass_is_statistics_then_gradient[triton-16389-False-negative]
divergence.py::test_values_and_both_gradients[triton-forward_kl-2.5-torch.bfloat16]
divergence.py::test_values_and_both_gradients[triton-jsd-2.5-torch.float32]
divergence.py::test_gradients_written_over_the_logits[triton]
"""
FAULTY = """
import torch, triton, triton.language as tl
from emulated_gpu import launches_run

@triton.jit
def reverse(x_ptr, y_ptr, N, MASKED: tl.constexpr, BARRIER: tl.constexpr):
    i = tl.arange(0, 128)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=(i < N) | (not MASKED), other=0.0))
    if BARRIER:
        tl.debug_barrier()
    tl.store(y_ptr + 128 + i, tl.load(y_ptr + 127 - i))

for n, masked, barrier in ((128, True, True), (100, True, True), (100, False, True), (128, True, False)):
    x, y = torch.randn(n), torch.zeros(256)
    try:
        with launches_run("sm_90"):
            reverse[(1,)](x, y, n, masked, barrier)
        print("right" if torch.equal(y[:n], x) and torch.equal(y[128:], y[:128].flip(0)) else "wrong")
    except RuntimeError as error:
        print(error)
"""


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_what_the_compiler_made_is_right(target):
    tests = [f"tests/test_{test}" for test in TESTS.split()]
    done = python("-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *tests, EMULATE=target)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(tests)} passed" in done.stdout


def test_what_the_interpreter_does_not_see(tmp_path):
    script = tmp_path / "faulty.py"  # Triton wants a file
    script.write_text(FAULTY)
    done = python(str(script))
    plain, masked, outside, race = done.stdout.splitlines() or [done.stderr]
    assert plain == masked == "right"
    assert "read of 4 bytes outside every tensor" in outside or "read of 16 bytes outside every tensor" in outside
    assert "depends on the order of warps" in race
