"""Slices, views, permutations and arithmetic of LinearLogits stay lazy, and are those of the logits."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lazy_logits import FEW, MASK, PICK, PROBS, TEMPERATURE, B, H, S, V, check, make, numbers

from fused_losses import settings
from fused_losses.linear_logits import LinearLogits
from fused_losses.reference.linear_logits import linear_logits

VIEWS = {
    "int": lambda z: z[1],
    "negative_int": lambda z: z[:, -1],
    "slice": lambda z: z[:, :-1],
    "step": lambda z: z[:, ::2],
    "two_slices": lambda z: z[1:, 1:3],
    "ellipsis": lambda z: z[..., 1:, :],
    "only_ellipsis": lambda z: z[...],
    "none": lambda z: z[:, None],
    "none_last": lambda z: z[..., None],
    "none_first": lambda z: z[None, 0],
    "mask": lambda z: z[MASK],
    "mask_row": lambda z: z[torch.tensor([False, True])],
    "mask_second": lambda z: z[:, MASK[0]],
    "index": lambda z: z[:, PICK],
    "index_matrix": lambda z: z[:, PICK.view(1, 3)],
    "index_list": lambda z: z[[1, 0, 1]],
    "index_pair": lambda z: z[torch.tensor([0, 1, 1]), PICK],
    "index_and_int": lambda z: z[1, PICK],
    "index_numpy": lambda z: z[:, PICK.cpu().numpy()],
    "index_tensor_scalar": lambda z: z[torch.tensor(1)],
    "vocab_slice": lambda z: z[..., 2:7],
    "vocab_slice_negative": lambda z: z[..., :-3],
    "vocab_index": lambda z: z[..., PICK],
    "vocab_mask": lambda z: z[..., torch.arange(V) % 2 == 0],
    "vocab_and_tokens": lambda z: z[:, 1:, 3:],
    "vocab_in_the_middle": lambda z: z.transpose(1, 2)[:, :, 1:],
    "vocab_in_the_middle_index": lambda z: z.transpose(1, 2)[:, :, PICK],
    "vocab_in_the_middle_separate": lambda z: z.transpose(1, 2)[torch.tensor([0, 1, 1]), :, PICK],
    "vocab_in_the_middle_none": lambda z: z.transpose(1, 2)[:, None, :, 2],
    "vocab_first_index": lambda z: z.permute(2, 0, 1)[:, :, PICK],
    "vocab_first_separate": lambda z: z.permute(2, 0, 1)[:, torch.tensor([0, 1, 1]), None, PICK],
    "view": lambda z: z.view(-1, V),
    "view_size": lambda z: z.view(-1, z.size(-1)),
    "reshape_list": lambda z: z.reshape([S, B, -1]),
    "reshape_function": lambda z: torch.reshape(z, (B, 1, S, V)),
    "reshape_vocab_middle": lambda z: z.transpose(1, 2).reshape(1, B, V, S, 1),
    "view_as": lambda z: z.view_as(torch.empty(B * S, V)),
    "flatten": lambda z: z.flatten(0, 1),
    "flatten_function": lambda z: torch.flatten(z, 0, -2),
    "unflatten": lambda z: z.flatten(0, 1).unflatten(0, (-1, S)),
    "unflatten_last": lambda z: z.unflatten(-1, (-1, 1)),
    "squeeze": lambda z: z[:1].squeeze(),
    "squeeze_dim": lambda z: z[:, :1].squeeze(1),
    "squeeze_several": lambda z: z[:1, :1].squeeze((0, 1)),
    "squeeze_nothing": lambda z: z.squeeze(0),
    "unsqueeze": lambda z: z.unsqueeze(1),
    "unsqueeze_last": lambda z: z.unsqueeze(-1),
    "transpose": lambda z: z.transpose(0, 1),
    "transpose_vocab": lambda z: z.transpose(1, 2),
    "mT": lambda z: z.mT,
    "T": lambda z: z[0].T,
    "t": lambda z: z[0].t(),
    "permute": lambda z: z.permute(2, 0, 1),
    "permute_function": lambda z: torch.permute(z, (1, 2, 0)),
    "movedim": lambda z: z.movedim(-1, 1),
    "swapaxes": lambda z: z.swapaxes(0, 2),
    "split_first": lambda z: z.split(2, dim=1)[1],
    "split_sections": lambda z: torch.split(z, [1, 4], dim=1)[1],
    "split_vocab": lambda z: z.split(4, dim=-1)[2],
    "chunk": lambda z: z.chunk(2, dim=1)[0],
    "chunk_vocab": lambda z: z.chunk(3, -1)[1],
    "tensor_split": lambda z: z.tensor_split(3, dim=1)[1],
    "tensor_split_indices": lambda z: torch.cat(torch.tensor_split(z, (1, -2, 2), dim=1), 1),
    "tensor_split_vocab": lambda z: z.tensor_split([4], -1)[1],
    "repeat": lambda z: z.repeat(3, 2, 1)[1:, 3:],
    "repeat_new_dimension": lambda z: z.repeat(2, 1, 1, 1),
    "repeat_interleave": lambda z: z.repeat_interleave(3, dim=0)[1:5],
    "repeat_interleave_counts": lambda z: torch.repeat_interleave(z, torch.arange(S, device=z.device), 1),
    "unbind": lambda z: z.unbind(1)[2],
    "iteration": lambda z: next(iter(z)),
    "cat": lambda z: torch.cat([z, z[:, 1:]], dim=1),
    "cat_rows": lambda z: torch.cat([z[1:], z, z[:0]]),
    "cat_temperatures": lambda z: torch.cat([z, z / torch.full((B, S, 1), 2.0, device=z.device)], dim=-2),
    "cat_vocab_middle": lambda z: torch.concat([z.transpose(1, 2), z.transpose(1, 2)], dim=2),
    "stack": lambda z: torch.stack([z[0], z[1], z[0]], dim=1),
    "stack_iteration": lambda z: torch.stack(list(z)),
    "roll": lambda z: z.roll(-1, dims=1),
    "roll_function": lambda z: torch.roll(z, (1, 2), (0, 1)),
    "flip": lambda z: z.flip(0, 1),
    "select": lambda z: z.select(1, 2),
    "narrow": lambda z: z.narrow(1, 1, 3),
    "index_select": lambda z: torch.index_select(z, 1, PICK),
    "index_select_vocab": lambda z: z.index_select(-1, PICK),
    "contiguous": lambda z: z[:, 1:].contiguous(),
    "clone": lambda z: z.clone(),
    "to_same": lambda z: z.to(z.device).to(torch.float64).double(),
    "label": lambda z: z.float().double(),
    "times": lambda z: z * 1.5,
    "times_left": lambda z: 1.5 * z,
    "times_negative": lambda z: -2 * z,
    "times_per_token": lambda z: z * TEMPERATURE[..., None],
    "times_per_token_left": lambda z: TEMPERATURE[..., None] * z,
    "times_per_sequence": lambda z: z * TEMPERATURE[:, :1, None],
    "times_scalar_tensor": lambda z: z * torch.tensor(0.3),
    "divided": lambda z: z / 0.7,
    "divided_per_token": lambda z: z / TEMPERATURE.unsqueeze(-1),
    "divided_vocab_middle": lambda z: z.transpose(1, 2) / TEMPERATURE.unsqueeze(1),
    "div_function": lambda z: torch.div(z, 3),
    "negated": lambda z: -z,
    "neg_function": lambda z: torch.neg(z),
    "plus_number": lambda z: z + 2,
    "number_minus": lambda z: 1 - z,
    "plus_per_token": lambda z: z + TEMPERATURE[..., None],
    "minus_per_token": lambda z: z - TEMPERATURE[..., None],
    "per_token_minus": lambda z: TEMPERATURE[..., None] - z,
    "rsub": lambda z: torch.rsub(z, 2),
    "shift_then_view": lambda z: (z - TEMPERATURE[..., None]).transpose(1, 2)[1:] * 2,
    "in_place_divided": lambda z: z.clone().div_(2.0),
    "in_place_times": lambda z: z.clone().mul_(TEMPERATURE[..., None]),
    "stable": lambda z: z - z.max(-1, keepdim=True).values,
    "log_softmax": lambda z: F.log_softmax(z, -1),
    "log_softmax_middle": lambda z: z.transpose(1, 2).log_softmax(1),
    "softmax": lambda z: torch.softmax(z, dim=-1),
    "log_softmax_of_shifted": lambda z: (z - TEMPERATURE[..., None]).log_softmax(-1),
    "log_softmax_twice": lambda z: z.log_softmax(-1).log_softmax(-1),
    "log_softmax_views": lambda z: -F.log_softmax(z, -1)[:, 1:].reshape(-1, V) * 0.5 + 1,
    "log_softmax_per_token": lambda z: z.log_softmax(-1) * TEMPERATURE[..., None],
    "log_softmax_mask": lambda z: z.log_softmax(-1)[MASK],
    "log_softmax_float": lambda z: z.log_softmax(-1, dtype=torch.float64),
    "exp_log_softmax": lambda z: z.log_softmax(-1).exp(),
    "log_of_softmax": lambda z: z.softmax(-1).log(),
    "p_log_p": lambda z: z.softmax(-1) * z.log_softmax(-1),
    "p_z": lambda z: z.softmax(-1) * z,
    "z_p": lambda z: z * z.softmax(-1),
    "clone_log_softmax": lambda z: z.log_softmax(-1).clone(),
}


@pytest.mark.parametrize("options", ["bias", "all"])
@pytest.mark.parametrize("name", VIEWS)
def test_stays_lazy(name, options, no_entries):
    check(VIEWS[name], options)


BIAS = torch.linspace(-1, 1, V, dtype=torch.float64)
UNCAPPED = {
    "plus_bias": lambda z: z + BIAS,
    "bias_plus": lambda z: BIAS + z / 2,
    "minus_bias": lambda z: z - BIAS.view(1, 1, V),
    "plus_bias_middle": lambda z: z.transpose(1, 2) + BIAS[:, None],
    "capped": lambda z: torch.tanh(z / 1.5) * 1.5,
    "capped_left": lambda z: 1.5 * torch.tanh(z / 1.5),
    "capped_method": lambda z: (z / 1.5).tanh() * 1.5,
    "capped_views": lambda z: torch.tanh(z[:, 1:] / 1.5).reshape(-1, V) * 1.5,
    "capped_then_cooled": lambda z: 1.5 * torch.tanh(z * 0.3 / 1.5) / TEMPERATURE[..., None],
    "capped_in_place": lambda z: (z.clone().div_(1.5)).tanh().mul(1.5),
}


@pytest.mark.parametrize("options", ["plain", "scale", "low_rank"])
@pytest.mark.parametrize("name", UNCAPPED)
def test_stays_lazy_without_a_softcap(name, options):
    check(UNCAPPED[name], options)


OUT_OF_RANGE = {
    "sum": lambda z: z.sum(5),
    "sum_several": lambda z: z.sum((-1, 4)),
    "mean": lambda z: z.mean(-4),
    "log_softmax": lambda z: z.log_softmax(5),
    "softmax": lambda z: torch.softmax(z, -4),
    "logsumexp": lambda z: z.logsumexp(5),
    "argmax": lambda z: z.argmax(5),
    "max": lambda z: z.max(5),
    "amax": lambda z: z.amax(5),
    "topk": lambda z: z.topk(2, 5),
    "gather": lambda z: z.gather(5, FEW),
    "cat": lambda z: torch.cat([z, z], 5),
    "stack": lambda z: torch.stack([z, z], 5),
    "nll_loss_of_probabilities": lambda z: F.nll_loss(z.log_softmax(-1).flatten(0, 1), PROBS.flatten(0, 1)),
    "column": lambda z: z[..., torch.tensor(V)],
    "column_negative": lambda z: z[..., torch.tensor(-V - 1)],
    "column_of_log_probs": lambda z: z.log_softmax(-1)[..., torch.tensor(V)],
    "columns_of_log_probs": lambda z: z.log_softmax(-1)[..., [0, -V - 1]],
    "t": lambda z: z.t(),
    "flatten": lambda z: z.flatten(1, 0),
    "index_lists": lambda z: z[[[0, 1]] * 31],
    "index_pair": lambda z: z[[0, 1, 1], [1, 2]],
    "index_everything": lambda z: z[[0, 1], [1, 2], [3, 4, 5]],
    "index_slice_in_a_tuple": lambda z: z[((0, slice(1)),)],
    "index_select_bool": lambda z: z.index_select(1, torch.ones(S, dtype=torch.bool)),
    "index_select": lambda z: z.index_select(0, torch.tensor([B])),
    "index_select_vocab": lambda z: z.index_select(-1, torch.tensor([V])),
    "narrow": lambda z: z.narrow(1, S + 1, 0),
    "chunk": lambda z: z.chunk(0),
    "permute_twice": lambda z: z.permute(0, 0, 1),
    "permute_few": lambda z: z.permute(0, 1),
    "movedim_twice": lambda z: z.movedim((0, 1), (1, 1)),
    "movedim_fewer": lambda z: z.movedim((0, 1), (1,)),
    "topk_many": lambda z: z.topk(-1),
    "view_of_nothing": lambda z: z[:0].view(-1, 0),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_indices_and_dimensions_that_do_not_exist_raise_as_in_eager(name):
    lazy, eager, _ = make()
    with pytest.raises(Exception) as expected:
        OUT_OF_RANGE[name](eager)
    with pytest.raises(expected.type), settings.strict():
        OUT_OF_RANGE[name](lazy)


@pytest.mark.filterwarnings("ignore:.*materialises")
@pytest.mark.parametrize(
    "fn",
    [
        lambda z: z.roll(1),
        lambda z: z.repeat_interleave(2, -1),
        lambda z: z[True],
        lambda z: torch.zeros(B * S, V).view_as(z),
        lambda z: z / 0,
        lambda z: z[:1] * TEMPERATURE.float()[..., None],
        lambda z: z * torch.ones(B, 1, 1, 1),
        lambda z: z * torch.tensor(2j),
        lambda z: torch.ones(2).to(z.double()),
    ],
)
def test_what_has_no_answer_is_as_eager_has_it(fn):
    lazy, eager, _ = make()
    torch.testing.assert_close(fn(lazy), fn(eager))


def test_another_device_materialises():
    with pytest.warns(UserWarning, match="to materialises LinearLogits"):
        assert make()[0].to("meta").is_meta


@pytest.mark.parametrize("fn", [lambda x: x.roll(1, 1), lambda x: x.flip(1), lambda x: x.repeat(2, 1, 1)])
def test_copies_change_alone(fn):
    found = []
    for z in make()[:2]:
        x = z.log_softmax(-1)
        fn(x).mul_(2)
        found.append(x.sum(-1))
    torch.testing.assert_close(*found)


def test_index_select_takes_no_negative_index():
    lazy, *_ = make()
    for dim in (1, -1):
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            lazy.index_select(dim, torch.tensor([-1]))


EDGES = {
    "narrow_from_the_end": lambda z: z.narrow(1, -2, 2),
    "unflatten_the_first": lambda z: z.unflatten(0, (2, 1)),
    "expand_by_name": lambda z: z.expand(size=(3, B, S, V)),
    "split_of_no_tokens": lambda z: z[:0].split(2)[0],
    "index_select_one": lambda z: z.index_select(0, PICK[1]),
    "between_indices": lambda z: z.transpose(1, 2).unsqueeze(0)[:, [0, 1, 1], 3, [1, 2, 3]],
    "between_indices_first": lambda z: z.transpose(1, 2)[[0, 1, 1], torch.tensor(-2), PICK],
    "log_prob_from_the_end": lambda z: z.log_softmax(-1)[..., [-1, 2]],
    "no_entries": lambda z: z[..., 5:5],
    "no_entries_statistics": lambda z: z[:, 1:, 5:5].logsumexp(-1),
    "no_entries_by_list": lambda z: z[1, :, []],
    "no_log_probs": lambda z: z.log_softmax(-1)[..., []],
    "no_tokens_by_list": lambda z: z[[]],
    "no_tokens_statistics": lambda z: z[:, []].logsumexp(-1),
    "top_0": lambda z: z.topk(0),
    "top_0_log_probs": lambda z: z.log_softmax(-1).topk(0),
    "gather_none": lambda z: z.gather(-1, FEW[..., :0]),
    "gather_no_log_probs": lambda z: z.transpose(1, 2).log_softmax(1).gather(1, FEW[..., :0].transpose(1, 2)),
    "sum_of_probabilities": lambda z: z.softmax(-1).sum(),
    "mean_of_probabilities": lambda z: z.softmax(-1).mean(-1),
    "data": lambda z: z.data.logsumexp(-1),
    "real": lambda z: z.real.logsumexp(-1),
    "mH": lambda z: z.mH.logsumexp(-2),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges(name):
    check(EDGES[name], "all", lazy=False)
    lazy, eager, _ = make()
    assert [t.requires_grad for t in numbers(EDGES[name](lazy))] == [
        t.requires_grad for t in numbers(EDGES[name](eager))
    ]


PAIR = torch.tensor([1, 0]), torch.tensor([4, 2])
SEQUENCES = {
    "tuples": ((0, 1), (1, 2)),
    "tuples_of_everything": ((0, 1), (1, 2), (3, -4)),
    "tuples_apart": ((0, 1), None, (1, 2)),
    "tuple_and_tensor": ((0, 1, 1), torch.tensor([1, 2, 3])),
    "tensor_and_tuple": (PAIR[0], (1, 2)),
    "tuple_for_tokens": (slice(None), (0,)),
    "tuple_for_the_vocabulary": (..., (1, 2)),
    "tuple_in_a_tuple": (((0, 1), (1, 0)),),
    "mask_in_a_tuple": ((False, True),),
    "no_tuple": ((),),
    "sizes": torch.Size([1, 2]),
    "floats": ([1.0, 0.0],),
    "lists": [[0, 1], [1, 2]],
    "lists_of_everything": [[0, 1], [1, 2], [3, 4]],
    "lists_in_a_tuple": ([[0, 1], [1, 0]],),
    "list_of_tuples": [(0, 1), (1, 2)],
    "list_of_ranges": [range(2), range(1, 3)],
    "list_of_numbers": [torch.tensor(0), torch.tensor(1)],
    "list_of_tensors": [*PAIR],
    "list_of_one": [PAIR[0]],
    "list_of_arrays": [t.numpy() for t in PAIR],
    "list_of_numpy_numbers": [np.int64(1), np.int64(0)],
    "list_of_masks": [[False, True]],
    "list_of_a_mask": [MASK],
    "list_of_slices": [slice(0, 2), 1],
    "list_with_none": [None, 1],
    "list_with_an_ellipsis": [..., 1],
    "list_with_nothing": [[]],
    "mixed_list": [[0, 1], 2],
    "tensors_in_a_list_in_a_tuple": ([torch.tensor(0), torch.tensor(1)],),
    "range": range(2),
    "list_too_long_for_a_tuple": [[0, 1]] * 32,
    "tensors_too_many_for_a_tuple": [torch.tensor(1)] * 32,
}


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence", "ignore:Creating a tensor from a list")
def test_sequences_index_as_in_eager(name):
    check(lambda z: z[SEQUENCES[name]], "all", lazy=False)


def test_a_list_indexes_whatever_the_default_device_is():
    lazy, eager, _ = make()
    with torch.device("meta"):
        found, expected = lazy[..., [4, 0]].materialize(), eager[..., [4, 0]]
    torch.testing.assert_close(found, expected)


def test_an_index_of_bytes_is_a_mask():
    lazy, eager, _ = make()
    mask = torch.tensor([0, 1], dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for key in (mask, mask[1]):
            torch.testing.assert_close(numbers(lazy[key])[0], eager[key])
        vocab = (torch.arange(V) % 3 == 0).to(torch.uint8)
        torch.testing.assert_close(numbers(lazy.log_softmax(-1)[..., vocab])[0], eager.log_softmax(-1)[..., vocab])


@pytest.mark.parametrize("shape", [(V, 3, V), (V * 3, V), (3, V, V), (3 * V, V, 1), (V, V, 3), (3, -1, V, 1)])
def test_views_keep_the_vocabulary_where_tokens_are_as_many(shape):
    hidden, weight = torch.randn(V, 3, H, dtype=torch.float64), torch.randn(V, H, dtype=torch.float64)
    lazy, eager = LinearLogits(hidden, weight), linear_logits(hidden, weight)
    if shape == (V, V, 3):
        lazy, eager = lazy.transpose(1, 2), eager.transpose(1, 2)
    with settings.strict():
        found = lazy.reshape(shape)
    torch.testing.assert_close(found.materialize(), eager.reshape(shape))


@pytest.mark.filterwarnings("ignore:.*materialises")
def test_vocabularies_in_two_places_are_not_joined_as_one():
    hidden, weight = torch.randn(2, V, H), torch.randn(V, H)
    found, expected = (torch.cat([z, z.mT]).sum(-1) for z in (LinearLogits(hidden, weight), hidden @ weight.T))
    torch.testing.assert_close(found, expected)
