"""Supervised fine-tuning against one token at a time."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fused_losses import sft
from fused_losses.bench.memory import peak_bytes
from fused_losses.linear_logits import LinearLogits
from fused_losses.reference import sft as reference
from fused_losses.reference.tolerance import assert_accurate
from fused_losses.settings import strict

B, S, V = 3, 7, 11
NAN = float("nan")
LABELS = torch.tensor(
    [[1, 2, -100, 4, 5, 6, 7], [-100, -100, -100, -100, 3, 9, -100], [5, -100, -100, -100, -100, -100, -100]]
)
LENGTHS = [3, 1, 3]
BORDERS = torch.tensor([0, 3, 4, 7])
POSITIONS = torch.tensor([[0, 1, 2, 0, 0, 1, 2]])


def value_and_grad(f, logits):
    logits = logits.detach().clone().requires_grad_()
    loss = f(logits)
    (3 * loss).backward()
    return loss.detach(), logits.grad / 3


OPTIONS = [
    {"average": average, "loss_type": loss_type, "num_items_in_batch": n}
    for average, loss_type, n in itertools.product(["token", "sequence"], ["nll", "dft"], [None, 13])
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("ignore_index", [-100, 9, -1])
def test_sft_loss(options, ignore_index):
    logits = torch.randn(B, S, V, dtype=torch.float64) * 3
    labels = torch.where(LABELS == -100, ignore_index, LABELS)
    ours = value_and_grad(lambda z: sft.sft_loss(z, labels, ignore_index, **options), logits)
    expected = value_and_grad(lambda z: reference.sft_loss(z, labels, ignore_index, **options), logits)
    torch.testing.assert_close(ours, expected)
    assert ours[1].any()
    assert not ours[1][:, -1].any()


def test_options_change_the_number():
    logits = torch.randn(B, S, V, dtype=torch.float64)
    losses = [sft.sft_loss(logits, LABELS, **options).item() for options in OPTIONS]
    losses.append(sft.sft_loss(logits, LABELS.masked_fill(LABELS == -100, 9), 9).item())  # hides the label 9 too
    assert len(set(losses)) == len(losses)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("packing", [{"cu_seqlens": BORDERS}, {"position_ids": POSITIONS}])
def test_packed(options, packing):
    logits, labels = torch.randn(1, S, V, dtype=torch.float64), LABELS[:1].clamp(min=0)
    ours = value_and_grad(lambda z: sft.sft_loss(z, labels, **options, **packing), logits)
    expected = value_and_grad(lambda z: reference.sft_loss(z, labels, **options, borders=BORDERS.tolist()), logits)
    torch.testing.assert_close(ours, expected)
    ends = BORDERS[1:] - 1
    assert not ours[1][:, ends].any()
    assert ours[1].any(-1).sum() == S - len(ends)
    one_document = sft.sft_loss(logits, labels, **options)
    assert ours[0] != one_document


def test_packed_equals_padded():
    logits, labels = torch.randn(1, S, V, dtype=torch.float64), torch.randint(0, V, (1, S))
    shown = torch.arange(3) < torch.tensor(LENGTHS)[:, None]
    padded, padded_labels = torch.full((3, 3, V), NAN, dtype=torch.float64), torch.full((3, 3), -100)
    padded[shown], padded_labels[shown] = logits[0], labels[0]
    for average in ("token", "sequence"):
        packed = sft.sft_loss(logits, labels, average=average, position_ids=POSITIONS, num_sequences=3)
        torch.testing.assert_close(sft.sft_loss(padded, padded_labels, average=average), packed)


@pytest.mark.parametrize("average", ["token", "sequence"])
def test_rows_of_whole_documents(average):
    """Borders count the rows as one long row, and so do those made from position_ids."""
    logits, labels = torch.randn(2, 6, V, dtype=torch.float64), torch.randint(0, V, (2, 6))
    positions, flat = (
        torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3]]),
        {"cu_seqlens": torch.tensor([0, 3, 6, 8, 12])},
    )
    ours = value_and_grad(lambda z: sft.sft_loss(z, labels, average=average, **flat), logits)
    by_positions = value_and_grad(lambda z: sft.sft_loss(z, labels, average=average, position_ids=positions), logits)
    torch.testing.assert_close(ours, by_positions)
    one_row = sft.sft_loss(logits.view(1, 12, V), labels.view(1, 12), average=average, **flat)
    torch.testing.assert_close(ours[0], one_row)
    assert ours[0] != sft.sft_loss(logits, labels, average=average)


@pytest.mark.parametrize("options", [{}, {"average": "sequence"}, {"loss_type": "dft"}, {"ignore_index": 3}])
def test_labels_of_bytes(options):
    logits, labels = torch.randn(2, 5, 256), torch.randint(0, 256, (2, 5), dtype=torch.uint8)
    labels[0, 2] = 3
    positions = torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]])
    ours, wide = (sft.sft_loss(logits, y, position_ids=positions, **options) for y in (labels, labels.long()))
    assert torch.equal(ours, wide)


@pytest.mark.parametrize(
    "options", [{}, {"average": "sequence"}, {"loss_type": "dft"}, {"position_ids": torch.zeros(2, 0)}]
)
@pytest.mark.parametrize("kind", [lambda h, w: h @ w.T, LinearLogits], ids=["tensor", "lazy"])
def test_no_token_at_all(options, kind):
    hidden, weight = torch.randn(2, 0, 4, requires_grad=True), torch.randn(V, 4, requires_grad=True)
    loss = sft.sft_loss(kind(hidden, weight), torch.zeros(2, 0, dtype=torch.long), **options)
    assert loss == 0
    loss.backward()
    assert not weight.grad.any()


def test_against_the_numpy_form():
    logits = torch.randn(B, S, V, dtype=torch.float64)
    for n in (None, 13):
        ours = sft.sft_loss(logits, LABELS, num_items_in_batch=n).item()
        assert ours == pytest.approx(reference.sft_loss_numpy(logits.numpy(), LABELS.numpy(), num_items_in_batch=n))
    assert reference.sft_loss_numpy(logits.numpy(), np.full((B, S), -100)) == 0.0


def test_shifted_as_by_hand():
    logits, labels = torch.randn(2, 5, V), torch.randint(0, V, (2, 5))
    by_hand = F.cross_entropy(logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))
    torch.testing.assert_close(sft.sft_loss(logits, labels), by_hand)
    torch.testing.assert_close(sft.sft_loss(logits[0], labels[0]), sft.sft_loss(logits[:1], labels[:1]))


def test_calls_of_one_batch_add_up():
    logits = torch.randn(B, S, V, dtype=torch.float64)
    count = (LABELS[:, 1:] != -100).sum()
    for n in (count, int(count)):
        parts = sum(sft.sft_loss(logits[b : b + 1], LABELS[b : b + 1], num_items_in_batch=n) for b in range(B))
        torch.testing.assert_close(parts, sft.sft_loss(logits, LABELS))


@pytest.mark.parametrize("options", [{}, {"average": "sequence"}, {"loss_type": "dft"}])
def test_nothing_to_train_on(options):
    logits, labels = torch.randn(B, S, V), torch.full((B, S), -100)
    labels[:, 0] = 3  # no token predicts the first label
    loss, grad = value_and_grad(lambda z: sft.sft_loss(z, labels, **options), logits)
    assert loss == 0
    assert not grad.any()
    loss, grad = value_and_grad(lambda z: sft.sft_loss(z, labels, nan_when_empty=True, **options), logits)
    assert loss.isnan()
    assert not grad.any()
    assert sft.sft_loss(logits, labels, num_items_in_batch=0, nan_when_empty=True, **options).isnan()
    assert sft.sft_loss(logits, labels, num_items_in_batch=4, nan_when_empty=True, **options) == 0
    assert sft.sft_loss(logits[:, :1], labels[:, :1], **options) == 0


@pytest.mark.parametrize("options", [{}, {"average": "sequence"}, {"loss_type": "dft"}])
def test_ignored_logits_reach_nothing(options):
    logits = torch.randn(B, S, V)
    expected = value_and_grad(lambda z: sft.sft_loss(z, LABELS, **options), logits)
    ignored = F.pad(LABELS[:, 1:] == -100, (0, 1), value=True).unsqueeze(-1)
    poisoned = value_and_grad(lambda z: sft.sft_loss(z, LABELS, **options), logits.masked_fill(ignored, NAN))
    assert torch.equal(poisoned[0], expected[0])
    assert torch.equal(poisoned[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("options", [{}, {"average": "sequence"}, {"loss_type": "dft"}])
def test_low_precision_is_computed_in_fp32(dtype, options):
    logits = (torch.randn(B, S, V) * 3).to(dtype)
    ours = value_and_grad(lambda z: sft.sft_loss(z, LABELS, **options), logits)
    assert ours[0].dtype == torch.float32
    eager = value_and_grad(lambda z: reference.sft_loss(z.float(), LABELS, **options), logits)
    exact = value_and_grad(lambda z: reference.sft_loss(z, LABELS, **options), logits.double())
    assert_accurate(ours[0], eager[0], exact[0])
    assert_accurate(ours[1], eager[1], exact[1])


def test_dft_weight_is_a_constant():
    log_probs = -torch.rand(2, 5, dtype=torch.float64).requires_grad_()
    ours, expected = sft.dft(log_probs), reference.dft(log_probs)
    torch.testing.assert_close(ours, expected)
    (grad,) = torch.autograd.grad(ours.sum(), log_probs)
    torch.testing.assert_close(grad, -log_probs.detach().exp())
    assert sft.dft(torch.tensor([-1.0]).bfloat16()).item() == pytest.approx(math.exp(-1))


HEAD_CASES = [*OPTIONS, {"cu_seqlens": BORDERS}, {"average": "sequence", "position_ids": POSITIONS}]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", HEAD_CASES)
def test_linear_logits(options, dtype):
    labels = LABELS[:1].clamp(min=0) if "cu_seqlens" in options or "position_ids" in options else LABELS
    hidden, weight = torch.randn(*labels.shape, 16).to(dtype), torch.randn(V, 16).to(dtype)

    def losses(kind, loss):
        h, w = hidden.to(kind).requires_grad_(), weight.to(kind).requires_grad_()
        value = loss(h, w)
        return value, *torch.autograd.grad(3 * value, [h, w])

    borders = {"borders": BORDERS.tolist()} if len(labels) == 1 else {}
    plain = {k: v for k, v in options.items() if k not in ("cu_seqlens", "position_ids")} | borders
    with strict():
        ours = losses(dtype, lambda h, w: sft.sft_loss(LinearLogits(h, w), labels, **options))
    exact = losses(torch.float64, lambda h, w: reference.sft_loss(h @ w.T, labels, **plain))
    assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if dtype == torch.float64:
        torch.testing.assert_close(ours, exact)
    else:
        eager = losses(dtype, lambda h, w: reference.sft_loss((h @ w.T).float(), labels, **plain))
        for name, a, b, c in zip(("loss", "d_hidden", "d_weight"), ours, eager, exact, strict=True):
            assert_accurate(a, b, c, name)
    unread = ours[1].float().abs().sum(-1, keepdim=True) == 0
    poisoned = hidden.masked_fill(unread, NAN)
    assert torch.equal(sft.sft_loss(LinearLogits(poisoned, weight), labels, **options), ours[0])


@pytest.mark.parametrize("options", [{}, {"average": "sequence"}, {"loss_type": "dft"}])
def test_logits_are_not_copied(options, device):
    logits = torch.randn(2, 300, 40000, device=device, dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(0, 40000, (2, 300), device=device)
    assert peak_bytes(lambda: sft.sft_loss(logits, labels, **options), device) < logits.nbytes / 2
    with_gradient = peak_bytes(lambda: torch.autograd.grad(sft.sft_loss(logits, labels, **options), logits), device)
    assert with_gradient < 1.5 * logits.nbytes


@pytest.mark.parametrize("options", [{}, {"average": "sequence"}, {"loss_type": "dft"}])
@pytest.mark.parametrize("kind", [lambda h, w: h @ w.T, LinearLogits], ids=["tensor", "lazy"])
def test_refuses_what_is_neither_ignored_nor_an_id(kind, options):
    """As F.cross_entropy does: such a label would be counted, without a loss, and change the mean."""
    with pytest.raises(IndexError, match="Target -100 is out of bounds"):
        sft.sft_loss(kind(torch.randn(B, S, 4), torch.randn(V, 4)), LABELS, ignore_index=-1, **options)


def test_refuses():
    with pytest.raises(ValueError, match="'tokens'"):
        sft.sft_loss(torch.zeros(2, 4, V), torch.zeros(2, 4, dtype=torch.long), average="tokens")
    with pytest.raises(ValueError, match="'dtf'"):
        sft.sft_loss(torch.zeros(2, 4, V), torch.zeros(2, 4, dtype=torch.long), loss_type="dtf")
    with pytest.raises(ValueError, match=r"\(2, 2, 4, 11\) and \(2, 2, 4\)"):
        sft.sft_loss(torch.zeros(2, 2, 4, V), torch.zeros(2, 2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\(2, 5, 11\) and \(2, 4\)"):
        sft.sft_loss(torch.zeros(2, 5, V), torch.zeros(2, 4, dtype=torch.long))
    square = LinearLogits(torch.zeros(2, V, 4), torch.zeros(V, 4)).mT  # whose shape fits either way round
    for average in ("token", "sequence"):
        with pytest.raises(ValueError, match="must stand last, it is dimension 1"):
            sft.sft_loss(square, torch.zeros(2, V, dtype=torch.long), average=average)
    both = {"cu_seqlens": torch.tensor([0, 4]), "position_ids": torch.arange(4)[None]}
    with pytest.raises(ValueError, match="cu_seqlens or position_ids"):
        sft.sft_loss(torch.zeros(1, 4, V), torch.zeros(1, 4, dtype=torch.long), **both)


@pytest.mark.parametrize("options", OPTIONS[:6])
def test_fullgraph(options):
    logits = torch.randn(B, S, V)
    compiled = torch.compile(sft.sft_loss, fullgraph=True, backend="aot_eager")
    ours = value_and_grad(lambda z: compiled(z, LABELS, **options), logits)
    torch.testing.assert_close(ours, value_and_grad(lambda z: sft.sft_loss(z, LABELS, **options), logits))


@pytest.mark.parametrize("options", HEAD_CASES[::3])
def test_fullgraph_of_linear_logits(options):
    labels = LABELS[:1].clamp(min=0) if "cu_seqlens" in options or "position_ids" in options else LABELS
    hidden, weight = torch.randn(*labels.shape, 16), torch.randn(V, 16, requires_grad=True)

    def loss(h):
        return sft.sft_loss(LinearLogits(h, weight), labels, **options, **count)

    count = {"num_sequences": 3} if "position_ids" in options else {}
    ours = value_and_grad(torch.compile(loss, fullgraph=True, backend="aot_eager"), hidden)
    torch.testing.assert_close(ours, value_and_grad(loss, hidden))


def test_inputs_stay_as_they_were():
    logits, labels = torch.randn(S, B, V).transpose(0, 1), LABELS.clone()
    before = logits.clone()
    contiguous = value_and_grad(lambda z: sft.sft_loss(z, labels), logits.contiguous())
    torch.testing.assert_close(value_and_grad(lambda z: sft.sft_loss(z, labels), logits), contiguous)
    assert torch.equal(logits, before)
    assert torch.equal(labels, LABELS)


def test_a_float64_mean_of_lazy_logits_is_not_rounded_to_fp32():
    hidden, weight = torch.randn(1, 4, 5, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    labels = torch.tensor([[0, 1, 2, 3]])  # of which 3 count: 1/3 is inexact
    found = sft.sft_loss(LinearLogits(hidden, weight), labels)
    torch.testing.assert_close(found, sft.sft_loss(hidden @ weight.T, labels), rtol=1e-12, atol=0)
