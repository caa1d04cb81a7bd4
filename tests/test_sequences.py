"""Sums and means of sequences, padded and packed, against one token at a time."""

import functools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_losses import divergence, grpo_loss, selective_log_softmax, sequences
from fused_losses.reference import sequences as reference
from fused_losses.reference.tolerance import assert_accurate

NAN, INF = float("nan"), float("inf")


def positions(lengths):
    return torch.tensor([[t for n in lengths for t in range(n)]])


def borders(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def value_and_grad(f, x, weights):
    x = x.clone().requires_grad_()
    out = f(x)
    # The second term makes the result depend on x where it reads nothing of x.
    (grad,) = torch.autograd.grad((out * weights).sum() + 0 * x.sum(), x)
    return out.detach(), grad


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 99), masked=st.booleans())
@settings(deadline=None, max_examples=40, derandomize=True)
def test_packed_equals_one_document_at_a_time(lengths, seed, masked):
    generator = torch.Generator().manual_seed(seed)
    total, n = sum(lengths), len(lengths)
    x = torch.randn(1, total, dtype=torch.float64, generator=generator)
    mask = torch.rand(1, total, generator=generator) < 0.6 if masked else None
    weights = torch.randn(n, dtype=torch.float64, generator=generator)
    counts = reference.sums_and_counts(x[0], borders(lengths).tolist(), None if mask is None else mask[0])[1]

    def loop(x):
        return reference.sums_and_counts(x[0], borders(lengths).tolist(), None if mask is None else mask[0])[0]

    for layout in (
        {"cu_seqlens": borders(lengths).int()},
        {"position_ids": positions(lengths)},
        {"position_ids": positions(lengths), "num_sequences": n},
    ):
        packed = functools.partial(sequences.sums_and_counts, mask=mask, **layout)
        assert torch.equal(packed(x)[1], counts)
        ours = value_and_grad(lambda x, packed=packed: packed(x)[0], x, weights)
        torch.testing.assert_close(ours, value_and_grad(loop, x, weights))


def test_borders_of_position_ids():
    lengths = [3, 1, 4]
    row = positions(lengths)
    assert sequences.document_borders(row).tolist() == reference.borders_of(row[0].tolist()) == [0, 3, 4, 8]
    # Padding after the documents has position 0 throughout; a row starts a document even where its position is not 0.
    padded = torch.cat([row, torch.zeros(1, 5, dtype=torch.long)], -1)
    assert sequences.document_borders(padded, 3).tolist() == [0, 3, 4, 8]
    assert sequences.document_borders(row, 5).tolist() == [0, 3, 4, 8, 8, 8]
    assert sequences.document_borders(torch.tensor([[0, 1, 2], [7, 8, 0]])).tolist() == [0, 3, 5, 6]


def test_packed_empty_documents_and_the_tail_behind_the_last_border():
    x = torch.tensor([[1.0, 2.0, 3.0, NAN]], requires_grad=True)
    total, count = sequences.sums_and_counts(x, cu_seqlens=torch.tensor([0, 0, 2, 2, 3]))
    assert total.tolist() == [0.0, 3.0, 0.0, 3.0]
    assert count.tolist() == [0, 2, 0, 1]
    total.sum().backward()
    assert x.grad.tolist() == [[1.0, 1.0, 1.0, 0.0]]
    assert sequences.sums_and_counts(torch.empty(1, 0), cu_seqlens=torch.tensor([0, 0]))[0].tolist() == [0.0]


def test_what_one_document_holds_reaches_no_other():
    x = torch.tensor([[1.0, -INF, NAN, 2.0, NAN, 5.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 1, 0, 1]])
    total, count = sequences.sums_and_counts(x, mask, cu_seqlens=torch.tensor([0, 2, 4, 6]))
    assert count.tolist() == [2, 1, 1]
    assert total.tolist() == [-INF, 2.0, 5.0]
    total.sum().backward()
    assert x.grad.tolist() == mask.float().tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_packed_long_rows_are_accurate(dtype):
    lengths = [4000, 1, 97, 1902]
    x = (torch.randn(1, sum(lengths)) - 2).to(dtype)
    mask = torch.rand(1, sum(lengths)) < 0.7
    ours = sequences.sums_and_counts(x, mask, cu_seqlens=borders(lengths))[0]

    def by_document(x):
        return torch.stack([part.sum() for part in x.masked_fill(~mask, 0).split(lengths, -1)])

    assert_accurate(ours, by_document(x.float()), by_document(x.double()))
    assert torch.equal(ours, sequences.sums_and_counts(x, mask, cu_seqlens=borders(lengths))[0])


@pytest.mark.parametrize("mask", [None, torch.zeros(2, 0)], ids=["no mask", "mask"])
def test_mean_of_nothing_is_zero(mask):
    assert torch.equal(sequences.masked_mean(torch.ones(2, 0), mask, -1), torch.zeros(2))
    assert sequences.masked_mean(torch.ones(2, 0), mask) == 0


def test_packed_mean_of_nothing_is_zero():
    x, packing = torch.tensor([[1.0, 2.0, 3.0, 5.0]]), {"cu_seqlens": torch.tensor([0, 3, 4])}
    assert sequences.packed_sum(x, **packing).tolist() == [6.0, 5.0]
    assert sequences.packed_mean(x, **packing).tolist() == [2.0, 5.0]
    assert sequences.packed_mean(x, torch.tensor([[0, 1, 1, 0]]), **packing).tolist() == [2.5, 0.0]


@pytest.mark.parametrize("f", [sequences.masked_sum, sequences.masked_mean])
@pytest.mark.parametrize("dim", [None, -1])
def test_a_number_per_sequence_takes_no_mask_of_tokens(f, dim):
    for shape, other in (((3,), (3, 3)), ((3,), (3, 4)), ((3, 4), (4,)), ((3, 1), (3, 4))):
        with pytest.raises(ValueError, match=re.escape(f"x and mask must have one shape, got {shape} and {other}")):
            f(torch.ones(shape), torch.ones(other), dim)


@pytest.mark.parametrize(
    "use",
    [
        lambda mask: sequences.masked_mean(torch.ones(2, 3), mask),
        lambda mask: sequences.sequence_log_probs(torch.ones(2, 3), mask),
        lambda mask: grpo_loss(torch.zeros(2, 3), None, torch.ones(2), mask),
        lambda mask: selective_log_softmax(torch.zeros(2, 3, 5), torch.zeros(2, 3).long(), row_mask=mask),
        lambda mask: divergence(torch.zeros(2, 3, 5), torch.zeros(2, 3, 5), mask=mask),
    ],
    ids=["mean", "sequence", "policy", "row_mask", "divergence"],
)
def test_labels_are_no_mask(use):
    labels = torch.tensor([[5, 2, -100], [-100, 1, 0]])
    for wrong in (labels, (labels == -100) * -1e9):
        with pytest.raises(ValueError, match=r"mask \(2, 3\) has entries below 0, a mask is 0 or 1"):
            use(wrong)
    use(labels != -100)


def test_a_mask_does_not_broadcast():
    with pytest.raises(ValueError, match=r"tokens and mask must have one shape, got \(2, 3\) and \(3,\)"):
        sequences.sequence_log_probs(torch.ones(2, 3), torch.ones(3))


@pytest.mark.parametrize("f", [sequences.sums_and_counts, sequences.sequence_log_probs, sequences.shift_labels])
def test_packed_takes_one_layout(f):
    with pytest.raises(ValueError, match="cu_seqlens or position_ids"):
        f(torch.ones(1, 4), cu_seqlens=torch.tensor([0, 4]), position_ids=torch.arange(4)[None])


def test_sums_are_not_summed_again():
    with pytest.raises(ValueError, match=r"tokens \(B, S\), .* got \(3,\)"):
        sequences.sequence_log_probs(torch.ones(3))
    assert sequences.sequence_log_probs(torch.ones(3), cu_seqlens=torch.tensor([0, 2, 3])).tolist() == [2.0, 1.0]


@pytest.mark.parametrize("cu_seqlens", [[0, 2, 7], [0, 2, 10**8], [-3, 2, 6], [1, 2, 6], [0, 4, 2, 6], [], [[0, 6]]])
def test_borders_that_are_not_of_these_tokens(cu_seqlens):
    packed, labels = {"cu_seqlens": torch.tensor(cu_seqlens, dtype=torch.int32)}, torch.zeros(1, 6, dtype=torch.long)
    message = (
        "rise from 0 to at most the number of tokens, 6, got" if cu_seqlens not in ([], [[0, 6]]) else "for n documents"
    )
    for f in (sequences.sums_and_counts, sequences.sequence_log_probs, sequences.packed_mean, sequences.shift_labels):
        with pytest.raises(ValueError, match=message):
            f(labels, **packed)
    for shape in ((1, 7), (6,), (1, 1)):
        with pytest.raises(ValueError, match=r"and position_ids must have one shape, got \(1, 6\) and"):
            sequences.sequence_log_probs(labels, position_ids=torch.zeros(shape))
        with pytest.raises(ValueError, match=r"and position_ids must have one shape, got \(1, 6\) and"):
            sequences.shift_labels(labels, position_ids=torch.zeros(shape))


def test_borders_beyond_the_tokens_read_and_write_nothing_there(device):
    """Where borders are not checked, on a GPU and in compiled code, they are cut off at the last token."""
    x = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0, 32.0]], device=device, requires_grad=True)
    loose = torch.tensor([0, 2, 7, 10**8], device=device)
    f = sequences.sums_and_counts
    f = f if device == "cuda" else torch.compile(f, fullgraph=True, backend="aot_eager")
    total, count = f(x, cu_seqlens=loose)
    assert total.tolist() == [3.0, 60.0, 0.0]
    assert count.tolist() == [2, 4, 0]
    (total * torch.tensor([1.0, 2.0, 4.0], device=device)).sum().backward()
    assert x.grad.tolist() == [[1.0, 1.0, 2.0, 2.0, 2.0, 2.0]]


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_sequence_log_probs(average, masked):
    logps = -torch.rand(3, 5, dtype=torch.float64)
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]) if masked else None
    weights = torch.randn(3, dtype=torch.float64)
    ours = value_and_grad(lambda x: sequences.sequence_log_probs(x, mask, average), logps, weights)
    expected = value_and_grad(lambda x: reference.sequence_log_probs(x, mask, average), logps, weights)
    torch.testing.assert_close(ours, expected)

    def packed(x):
        row_mask = None if mask is None else mask.reshape(1, -1)
        return sequences.sequence_log_probs(x.reshape(1, -1), row_mask, average, cu_seqlens=borders([5, 5, 5]))

    torch.testing.assert_close(value_and_grad(packed, logps, weights), expected)


def test_sequence_log_probs_options_change_the_number():
    logps, mask = torch.tensor([[-1.0, -2.0, -7.5]]), torch.tensor([[1, 1, 0]])
    first_two = {"position_ids": torch.tensor([[0, 1, 0]]), "num_sequences": 1}
    assert sequences.sequence_log_probs(logps).tolist() == [-10.5]
    assert sequences.sequence_log_probs(logps, average=True).tolist() == [-3.5]
    assert sequences.sequence_log_probs(logps, mask).tolist() == [-3.0]
    assert sequences.sequence_log_probs(logps, mask, average=True).tolist() == [-1.5]
    assert sequences.sequence_log_probs(logps, average=True, **first_two).tolist() == [-1.5]
    assert sequences.sequence_log_probs(logps[0], position_ids=torch.tensor([0, 1, 0])).tolist() == [-3.0, -7.5]


@pytest.mark.parametrize("layout", [{}, {"cu_seqlens": torch.tensor([0, 3, 6])}])
def test_sequence_log_probs_of_nothing(layout):
    logps = torch.tensor([[-1.0, NAN, -3.0], [-INF, NAN, -1.0]], requires_grad=True)
    mask = torch.tensor([[1, 0, 1], [0, 0, 0]])
    shape = (1, 6) if layout else (2, 3)
    total = sequences.sequence_log_probs(logps.view(shape), mask.view(shape), **layout)
    assert total.tolist() == [-4.0, 0.0]
    total.sum().backward()
    assert logps.grad.tolist() == [[1, 0, 1], [0, 0, 0]]
    mean = sequences.sequence_log_probs(logps.view(shape), mask.view(shape), True, **layout)
    assert mean[0] == -2
    assert mean[1].isnan()


def test_bf16_log_probs_are_summed_in_fp32():
    logps = (-torch.rand(4, 300)).bfloat16()
    mask = torch.rand(4, 300) < 0.5
    for average in (False, True):
        ours = sequences.sequence_log_probs(logps, mask, average)
        eager, exact = (
            logps.to(t).masked_fill(~mask, 0).sum(-1) / (mask.sum(-1) if average else 1)
            for t in (torch.float32, torch.float64)
        )
        assert_accurate(ours, eager, exact)


@pytest.mark.parametrize("lengths", [[6], [2, 4], [1, 1, 4], [3, 2, 1], [1] * 6])
def test_shift_labels_never_crosses_a_document(lengths):
    labels = torch.arange(10, 16)[None]
    expected = reference.shift_labels(labels, borders=borders(lengths).tolist())
    assert (expected == -100).sum() == len(lengths)
    assert torch.equal(sequences.shift_labels(labels, cu_seqlens=borders(lengths).int()), expected)
    assert torch.equal(sequences.shift_labels(labels, position_ids=positions(lengths)), expected)


def test_shift_labels_of_rows():
    labels = torch.randint(0, 50, (3, 7))
    assert torch.equal(sequences.shift_labels(labels, -1), reference.shift_labels(labels, -1))
    assert torch.equal(sequences.shift_labels(labels, -1).view(-1), reference.shift_labels(labels, -1).reshape(-1))
    assert sequences.shift_labels(labels[:, :0]).shape == (3, 0)
    assert torch.equal(
        sequences.shift_labels(labels, -1, zigzag=True), reference.shift_labels(labels, -1)
    )  # on one rank zigzag changes nothing
    rows = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6], [5, 6, 0, 0, 1, 2, 0]])
    expected = torch.cat(
        [reference.shift_labels(labels[b : b + 1], -1, reference.borders_of(rows[b].tolist())) for b in range(3)]
    )
    assert torch.equal(sequences.shift_labels(labels, -1, position_ids=rows), expected)
    # The borders of several rows are those of the rows joined into one.
    flat = {"cu_seqlens": sequences.document_borders(rows)}
    assert torch.equal(sequences.shift_labels(labels, -1, **flat), expected)
    x = torch.randn(3, 7)
    ours = sequences.sums_and_counts(x, **flat)
    torch.testing.assert_close(ours, sequences.sums_and_counts(x, position_ids=rows))
    torch.testing.assert_close(ours, sequences.sums_and_counts(x.view(1, -1), **flat))
    # Empty documents in front, in the middle and at the end change nothing; a tail after the last border stands alone.
    for borders in ([0, 0, 2, 2, 4], [0, 0, 2, 2, 4, 4]):
        assert sequences.shift_labels(labels[:1, :5], cu_seqlens=torch.tensor(borders)).tolist() == [
            [labels[0, 1].item(), -100, labels[0, 3].item(), -100, -100]
        ]


def test_shift_labels_takes_no_fractions():
    with pytest.raises(TypeError, match=r"integer tensor, got torch\.float32 \(1, 3\)"):
        sequences.shift_labels(torch.tensor([[1.0, 2.9, 3.0]]))


def test_shift_labels_needs_a_sequence():
    with pytest.raises(ValueError, match=r"labels must be \(B, S\) or \(1, total\), got \(\)"):
        sequences.shift_labels(torch.tensor(3))


def test_shift_labels_is_int64():
    """In uint8, which byte-level models keep their ids in, −100 would be 156, and a token."""
    labels = torch.tensor([[3, 156, 7, 200]])
    for dtype in (torch.uint8, torch.int32):
        assert torch.equal(sequences.shift_labels(labels.to(dtype)), torch.tensor([[156, 7, 200, -100]]))
    assert sequences.shift_labels(torch.zeros(2, 0, dtype=torch.uint8)).shape == (2, 0)


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_pairs_go_through_one_forward(padding_side):
    chosen, rejected = torch.randint(1, 9, (2, 3)), torch.randint(1, 9, (2, 5))
    both = sequences.concatenate_pairs(chosen, rejected, 7, padding_side=padding_side)
    first, second = sequences.split_pairs(both)
    where = slice(0, 3) if padding_side == "right" else slice(2, 5)
    assert torch.equal(first[:, where], chosen)
    assert torch.equal(second, rejected)
    assert (first == 7).sum() - (chosen == 7).sum() == 4
    assert first.data_ptr() == both.data_ptr()  # a view
    again = sequences.concatenate_pairs(rejected, chosen, 7, padding_side=padding_side)
    assert torch.equal(again, torch.cat([second, first]))


def test_pairs_packed_or_padded_give_the_same_sequences():
    logps = -torch.rand(4, 6, dtype=torch.float64)
    lengths = [6, 2, 4, 3]
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    padded = sequences.split_pairs(sequences.sequence_log_probs(logps, mask))
    packed = sequences.split_pairs(sequences.sequence_log_probs(logps[mask][None], cu_seqlens=borders(lengths)))
    torch.testing.assert_close(packed, padded)


def test_pairs_that_do_not_match():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3, 3\)"):
        sequences.concatenate_pairs(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2,\)"):
        sequences.concatenate_pairs(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"\(3, 2\)"):
        sequences.split_pairs(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="must be one of right, left, got 'rigth'"):
        sequences.concatenate_pairs(torch.zeros(2, 3), torch.zeros(2, 4), padding_side="rigth")


@pytest.mark.parametrize("layout", ["padded", "cu_seqlens", "position_ids"])
def test_fullgraph(layout):
    logps, mask = -torch.rand(1, 6), torch.tensor([[1, 1, 0, 1, 1, 1]])
    labels = torch.arange(6)[None]
    how = {
        "padded": {},
        "cu_seqlens": {"cu_seqlens": borders([4, 2])},
        "position_ids": {"position_ids": positions([4, 2])},
    }[layout]
    count = {"num_sequences": 2} if layout == "position_ids" else {}

    def f(logps):
        total = sequences.sequence_log_probs(logps, mask, average=True, **how, **count)
        return total, sequences.shift_labels(labels, **how), sequences.concatenate_pairs(logps, labels)

    ours = torch.compile(f, fullgraph=True, backend="aot_eager")(logps)
    torch.testing.assert_close(ours, f(logps))


def test_sums_under_vmap_are_of_one_row():
    token_logps, mask = torch.randn(3, 5), torch.ones(3, 5)
    assert torch.equal(torch.vmap(sequences.sequence_log_probs)(token_logps, mask), token_logps.sum(-1))
