"""Losses of lazy logits other than in chunks on a CPU: by the kernels, on a GPU if there is one, and on ``meta``.

A tensor on ``meta`` has a device and no numbers. Reading a number on the host raises there, where on a GPU the host would wait.
So does using a CPU tensor beside it, and so does a copy of numbers from the host, for which the host would wait too.
"""

import doctest
import importlib
import types

import lazy_logits
import pytest
import test_lazy_elementwise
import test_lazy_products
import test_lazy_views
import test_linear_logits
import torch
from conftest import DEVICE
from lazy_logits import NUMBERS, V, arguments, leaves, numbers
from test_docstrings import MODULES
from torch.utils._python_dispatch import TorchDispatchMode

import fused_losses
from fused_losses import LinearLogits, selective_log_softmax, settings
from fused_losses.autodiff import host_may_read
from fused_losses.chunked.linear_softmax import linear_softmax_fwd
from fused_losses.chunked.scale import scale
from fused_losses.chunked.softmax_rows import softmax_rows_fwd
from fused_losses.reference.distillation import sparse_distillation_loss
from fused_losses.reference.linear_cross_entropy import linear_cross_entropy
from fused_losses.reference.linear_logits import linear_logits
from fused_losses.reference.sequences import sequence_log_probs, sums_and_counts
from fused_losses.token_statistics import _at_temperature

ONE = test_lazy_views.VIEWS | test_lazy_views.UNCAPPED | test_lazy_views.EDGES | test_linear_logits.SPELLINGS | NUMBERS
TWO = {loss.__name__: loss for loss in test_lazy_products.LOSSES}
# Cases that read numbers on the host, in eager too: masks as indices, and indices and counts that are tensors.
WAITS = """
mask mask_row mask_second index_numpy index_tensor_scalar vocab_mask log_softmax_mask logits_indexed_mask
repeat_interleave_counts between_indices_first jensen_shannon_of_logs
"""


def places(losses):
    cases = [
        (name, place) for name in losses for place in (DEVICE, "meta") if name not in WAITS.split() or place == DEVICE
    ]
    return pytest.mark.parametrize(("name", "place"), cases, indirect=["place"])


@pytest.fixture(autouse=True)
def _no_copy_from_the_host(monkeypatch):
    def refusing(make):
        def made(data, *args, device=None, **kwargs):
            assert isinstance(data, torch.Tensor) or device is None or torch.device(device).type != "meta", data
            return make(data, *args, device=device, **kwargs)

        return made

    torch.utils._device._device_constructors()  # torch.device("meta") caches these before they are replaced here
    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, refusing(getattr(torch, name)))


@pytest.fixture
def place(request, monkeypatch):
    """The device to which the losses' own tensors are moved."""
    for module in (test_lazy_elementwise, test_lazy_products, test_lazy_views, test_linear_logits, lazy_logits):
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                monkeypatch.setattr(module, name, moved(value, request.param))
    monkeypatch.setattr("fused_losses.lazy_elementwise.traced", lambda t: False)  # so it works by rows, as on a GPU
    with settings.backend("triton" if request.param == DEVICE else None):
        yield request.param


def moved(t, place):
    """``t`` on ``place``, in fp32, which the kernels compute in, if it is of a floating dtype."""
    return t.detach().to(place, torch.float32 if t.is_floating_point() else t.dtype)


def compare(fn, inputs, place):
    """``fn`` gives equal numbers and gradients for both kinds of head; on ``meta``, equal shapes, dtypes and devices."""
    found = []
    for kind in (LinearLogits, linear_logits):
        given = [moved(t, place).requires_grad_(t.requires_grad) for t in inputs]
        with settings.strict():
            results = numbers(fn(kind, given))
        trained = [t for t in results if t.requires_grad]
        if trained:
            loss = sum((t * torch.linspace(0.5, 1.5, t.numel(), device=place).view(t.shape)).sum() for t in trained)
            wanted = [t for t in given if t.requires_grad]
            results += torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        found.append(results)
    for ours, eager in zip(*found, strict=True):
        assert (ours.shape, ours.dtype, ours.device) == (eager.shape, eager.dtype, eager.device)
    if place != "meta":
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@places(ONE)
def test_of_one_head(name, place):
    tensors = leaves()

    def fn(kind, given):
        args, options = arguments(dict(zip(tensors, given, strict=True)), bias=True)
        return ONE[name](kind(*args, **options))

    compare(fn, tensors.values(), place)


@places(TWO)
def test_of_two_heads(name, place):
    compare(lambda kind, t: TWO[name](kind(*t[:3]), kind(*t[3:])), test_lazy_products.leaves(), place)


@places(test_lazy_elementwise.LOSSES)
@pytest.mark.parametrize("workspace", [20000, None])
def test_of_two_heads_and_probabilities(name, workspace, place):
    loss, p = test_lazy_elementwise.LOSSES[name], test_lazy_elementwise.probabilities(torch.float32)
    with settings.workspace(workspace):
        compare(lambda kind, t: loss(kind(*t[:3]), kind(*t[3:6]), t[6]), [*test_lazy_elementwise.leaves(), p], place)


# These count labelled tokens or documents to size a tensor; the last one's example reads its numbers.
COUNTS = {"prm_loss", "PRMLoss", "document_borders", "aggregate"}


@pytest.mark.parametrize("name", MODULES)
def test_no_loss_waits_for_the_device(name):
    """Runs every example of the module's docstrings on ``meta``."""
    module = importlib.import_module(name)
    for test in doctest.DocTestFinder().find(module):
        scope = vars(module) | {"torch": torch, "fused_losses": fused_losses}
        for example in test.examples if test.name.split(".")[-1] not in COUNTS else ():
            if not (example.exc_msg or example.options.get(doctest.SKIP)):
                with torch.device("meta"):
                    exec(example.source, scope)


def test_a_temperature_on_the_host():
    x, t = torch.randn(3, V, device="meta"), torch.tensor(0.7)
    assert _at_temperature(x, t, x.shape[:-1])[1].device == x.device
    x, ids = torch.randn(3, V, device=DEVICE), torch.full((3,), 4, device=DEVICE)
    torch.testing.assert_close(
        selective_log_softmax(x, ids, temperature=t), (x / t).log_softmax(-1)[:, 4], rtol=1e-5, atol=1e-5
    )


def test_whether_a_graph_is_captured_is_not_asked_while_compiling(monkeypatch):
    """Dynamo cannot compile a call of ``is_current_stream_capturing``."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: pytest.fail("asked"))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not host_may_read(types.SimpleNamespace(is_cuda=True))


class CountOperators(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **kwargs or {})


def test_pytorch_elsewhere_than_on_a_cpu_takes_larger_pieces():
    """On a CPU their size is chosen for its cache; with such small pieces, a GPU would wait for launches."""
    counts = {}
    for device in ("cpu", "meta"):
        hidden, weight = torch.randn(64, 4, device=device), torch.randn(2**16, 4, device=device)
        with CountOperators() as of_head:
            linear_softmax_fwd(hidden, weight, None, None, None, None, None, outputs=("entropy",))
        with CountOperators() as of_rows:
            softmax_rows_fwd((hidden @ weight.T)[..., None], None, None, None, outputs=("entropy",))
        counts[device] = of_head.number, of_rows.number
    assert counts["meta"][0] < 0.6 * counts["cpu"][0]
    assert counts["meta"][1] < 0.4 * counts["cpu"][1]


class CopiesFromTheHost(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        copies = func is torch.ops.aten._to_copy.default and args[0].is_cpu
        self.number += copies and (kwargs or {}).get("device") == torch.device("meta")
        return func(*args, **kwargs or {})


def test_only_a_cpu_is_asked_whether_the_upstream_gradient_is_1():
    """On another device the host would have to wait for the answer, and ``meta`` has none."""
    gradient = torch.randn(3, 4, device="meta")
    scale(gradient, torch.ones((), device="meta"), gradient)


@pytest.mark.parametrize("t", [torch.tensor(0.7), torch.tensor(2)])
def test_one_number_on_the_host_is_not_copied(t):
    """PyTorch too takes such a number as it is beside a tensor on a GPU."""
    z = LinearLogits(torch.randn(3, 4, device="meta"), torch.randn(V, 4, device="meta"))
    with CopiesFromTheHost() as copies:
        for scaled in (z / t, z * t, (z / t).log_softmax(-1) * t):
            assert scaled.is_meta
    assert copies.number == 0


def test_references_make_tensors_where_their_inputs_are():
    """On a GPU, the tests compare with them there."""
    x, w, ids, mask = torch.randn(2, 4), torch.randn(5, 4), torch.tensor([[0, 3], [2, 1]]), torch.zeros(2, 4)
    with torch.device("meta"):
        found = [
            linear_cross_entropy(x, w, ids[0]),
            sparse_distillation_loss(x, ids, x[:, :2] - 9, ids[0])[0],
            sequence_log_probs(x, mask),
            sums_and_counts(x[0], [0, 4], mask[0])[0],
        ]
    assert [t.device.type for t in found] == ["cpu"] * 4


@pytest.mark.filterwarnings("ignore:.*materialises")
def test_what_goes_to_another_device_is_made():
    z = LinearLogits(*(t.detach() for t in (leaves()["hidden"], leaves()["weight"])))
    for x in (z, z.softmax(-1), (z.softmax(-1) + 1).log()):
        assert x.to("meta").is_meta
        assert x.to("cpu") is x
        with pytest.raises(RuntimeError, match="device"):
            (x + 1).log_softmax(-1) * torch.ones(V, device="meta")
