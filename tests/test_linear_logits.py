"""LinearLogits against the logits it stands for: values, shapes, dtypes and gradients, without making them."""

import copy
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lazy_logits import (
    FEW,
    IDS,
    NUMBERS,
    OPTIONS,
    PROBS,
    TEMPERATURE,
    B,
    H,
    S,
    V,
    arguments,
    check,
    gradients,
    leaves,
    make,
)
from torch import nn

from fused_losses import settings
from fused_losses.linear_head import LinearHead
from fused_losses.linear_logits import LinearLogits
from fused_losses.reference.linear_logits import linear_logits


@pytest.mark.parametrize("options", ["plain", "softcap", "all"])
@pytest.mark.parametrize("name", NUMBERS)
def test_answers_without_logits(name, options, no_entries):
    check(NUMBERS[name], options, lazy=False)


@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_counts(options):
    check(lambda z: z, options)
    args, kwargs = arguments(leaves(), **OPTIONS[options])
    plain, _ = arguments(leaves())
    assert options == "plain" or not torch.allclose(linear_logits(*args, **kwargs), linear_logits(*plain))


SPELLINGS = {
    "flip": lambda z: torch.flip(z, dims=(1,)),
    "permute": lambda z: torch.permute(input=z, dims=(0, 2, 1)),
    "sum": lambda z: torch.sum(z, axis=-1, keepdims=True),
    "mean": lambda z: z.mean(axis=-1),
    "max": lambda z: z.max(axis=-1).values,
    "amax": lambda z: z.amax(dim=-1, keepdims=True),
    "log_softmax": lambda z: z.log_softmax(axis=-1).gather(axis=-1, index=FEW),
    "logsumexp": lambda z: torch.logsumexp(input=z, axis=-1),
    "split": lambda z: z.split(split_size=2, dim=1)[1],
    "split_with_sizes": lambda z: z.split_with_sizes(split_sizes=[1, 4], dim=1)[1],
    "swapaxes": lambda z: z.swapaxes(axis0=0, axis1=1),
    "mul": lambda z: torch.mul(input=z, other=2),
    "mul_numpy": lambda z: torch.mul(x1=z, x2=2),
    "add": lambda z: z.add(other=TEMPERATURE[..., None]),
    "sub": lambda z: torch.sub(torch.ones(B, S, 1, device=z.device), other=z),
    "div": lambda z: torch.div(z, other=3),
    "div_not_rounding": lambda z: torch.div(z, 3, rounding_mode=None),
    "in_place": lambda z: (z * 1).mul_(other=2),
    "unsqueeze": lambda z: z.unsqueeze(axis=0),
    "topk": lambda z: z.topk(k=2, axis=-1).values,
    "reshape": lambda z: torch.reshape(input=z, shape=(B * S, V)),
    "view": lambda z: z.view(size=(B * S, V)),
    "to": lambda z: z.to(tensor=PROBS),
    "cat": lambda z: torch.cat([z, z], axis=1),
    "kl_div": lambda z: F.kl_div(input=z.log_softmax(-1), target=PROBS, reduction="sum"),
    "numpy_times": lambda z: np.float64(2.5) * z,
    "times_numpy": lambda z: z * np.float32(2.5),
    "numpy_plus": lambda z: np.float32(2.5) + z,
    "numpy_minus": lambda z: np.float64(2.5) - z,
    "over_numpy": lambda z: z / np.int64(3),
    "times_numpy_bool": lambda z: z * np.bool_(True),
    "numpy_dim": lambda z: z.log_softmax(np.int64(-1)).sum(np.int64(-1)),
    "in_place_numpy": lambda z: (z * 1).div_(np.sqrt(8)),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_other_spellings(name):
    fn = SPELLINGS[name]
    check(fn, "bias", lazy=False)


@pytest.mark.parametrize(
    "fn",
    [
        lambda z: torch.div(z, 2, rounding_mode="floor"),
        lambda z: z == np.float32(1),
        lambda z: np.float64(2) / z,
        lambda z: z.sum(axis=1),
        lambda z: z.max(other=torch.zeros(())),
        lambda z: torch.add(z, 1, alpha=2),
        lambda z: z.tanh() * -2,
        lambda z: z.max(0).values,
        lambda z: z.isfinite().all(0),
        lambda z: z.isinf().float(),
        lambda z: (z == z).float(),
        lambda z: z.isinf() | torch.arange(V).eq(1),
        lambda z: (z.softmax(-1) * z.log_softmax(-1)).gather(-1, IDS[..., None]),
        lambda z: z.roll(1, -1),
        lambda z: z.view(torch.int64 if z.dtype == torch.float64 else torch.int32),
    ],
)
def test_what_a_handler_does_not_know_materialises(fn):
    lazy, eager, _ = make()
    with pytest.warns(UserWarning, match="materialises"):
        found = fn(lazy)
    torch.testing.assert_close(found, fn(eager))


MATERIALISED = {
    "median": lambda z: z.median(),
    "sigmoid": lambda z: z.sigmoid(),
    "equal": lambda z: z == z[0, 0, 0],
    "not_equal": lambda z: z != 0,
    "less": lambda z: z < 0.5,
    "times_vocabulary": lambda z: z * torch.linspace(0, 1, V),
    "where": lambda z: torch.where(z > 0, z, 0.0),
    "softmax_over_what_is_not_named": lambda z: F.softmax(z),
    "softmax_of_probabilities": lambda z: z.softmax(-1).log_softmax(-1),
    "logsumexp_of_probabilities": lambda z: z.softmax(-1).logsumexp(-1),
    "softmax_over_tokens": lambda z: z.softmax(1),
    "view_merging_the_vocabulary": lambda z: z.view(-1),
    "view_after_contiguous": lambda z: z.transpose(1, 2).contiguous().view(V * B, S),
    "view_after_a_contiguous_clone": lambda z: z.mT.clone(memory_format=torch.contiguous_format).view(size=(-1, S)),
    "view_as_after_contiguous": lambda z: z.permute(2, 0, 1).contiguous().view_as(torch.empty(V * B, S)),
    "view_of_log_probs": lambda z: z.log_softmax(-1).transpose(1, 2).contiguous().view([-1]),
    "sum_over_tokens": lambda z: z.sum(1),
    "unbind_vocabulary": lambda z: z.unbind(-1)[2],
    "cat_vocabulary": lambda z: torch.cat([z, z], -1),
    "gather_other_tokens_for_each_entry": lambda z: z.gather(1, IDS[:, :, None].expand(-1, -1, V).clone() % S),
    "gather_by_entry": lambda z: z.gather(1, torch.arange(B * S * V).view(B, S, V) % S),
    "cat_with_a_tensor": lambda z: torch.cat([z, torch.zeros(B, 1, V)], 1),
    "roll_vocabulary": lambda z: z.roll(1, -1),
    "cross_entropy_over_tokens": lambda z: F.cross_entropy(z, torch.ones(B, V, dtype=torch.long)),
    "kl_div_broadcast": lambda z: F.kl_div(z.log_softmax(-1), PROBS[0, 0].float(), reduction="sum"),
    "as_the_second": lambda z: F.pairwise_distance(torch.ones(B, S, V), z),
    "tensor_plus": lambda z: torch.ones(B, S, V) + z,
    "tensor_in_place": lambda z: torch.ones(B, S, V).add_(z),
    "reciprocal": lambda z: 1 / z,
    "gather_some_tokens": lambda z: z.gather(-1, IDS[:, :2, None]),
    "mask_over_everything": lambda z: z[torch.ones(B, S, V, dtype=torch.bool)],
    "clamp": lambda z: z.clamp(-1, 1),
    "matmul": lambda z: z @ torch.ones(V, 2),
    "integer": lambda z: z.to(torch.int32),
    "trained_temperature": lambda z: z / torch.ones(1, requires_grad=True),
    "numpy": lambda z: torch.as_tensor(z.detach().numpy()),
    "entries_by_mask": lambda z: z[[0, 1], [1, 2], torch.arange(V) < 2],
    "columns_of_p_log_p": lambda z: (z.softmax(-1) * z.log_softmax(-1))[..., [0, 3]],
    "slices_of_probabilities": lambda z: z.softmax(-1)[..., :3],
}


@pytest.mark.parametrize("name", MATERIALISED)
def test_the_rest_materialises_and_says_so(name):
    fn = MATERIALISED[name]
    lazy, eager, tensors = make(bias=True)
    with pytest.warns(UserWarning, match="materialises"):
        found = fn(lazy)
    expected = fn(eager)
    torch.testing.assert_close(found, expected)
    if expected.requires_grad:
        ours, theirs = (torch.autograd.grad(t.sum(), tensors["weight"]) for t in (found, expected))
        torch.testing.assert_close(ours, theirs)
    with settings.strict(), pytest.raises(RuntimeError, match="materialises"):
        fn(lazy)


@pytest.mark.parametrize("log_target", [False, True])
def test_kl_div_of_a_teacher_whose_vocabulary_stands_where_tokens_do(log_target):
    results = []
    for kind in (LinearLogits, linear_logits):
        x, y = (kind(*arguments(leaves(seed=seed))[0]).flatten(0, 1)[:7, :7] for seed in (0, 1))
        q = y.T.log_softmax(0) if log_target else y.T.softmax(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append(F.kl_div(x.log_softmax(-1), q, reduction="sum", log_target=log_target))
    torch.testing.assert_close(*results)


def test_a_warning_names_operation_bytes_and_line_once_per_call_site():
    lazy, *_ = make()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            lazy.median()
        lazy.median()
    assert len(caught) == 2
    assert "median materialises LinearLogits (2, 5, 11): 440 bytes" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert caught[0].lineno + 1 == caught[1].lineno


def test_comparison_is_never_identity():
    lazy, *_ = make()
    with pytest.warns(UserWarning, match="materialises"):
        assert (lazy == lazy.clone()).shape == (B, S, V)
    assert (lazy == lazy).shape == (B, S, V)
    assert (lazy == None) is False  # noqa: E711
    assert lazy != "logits"
    assert len({lazy, lazy}) == 1


def test_properties_are_those_of_the_logits():
    lazy, eager, _ = make(bias=True)
    names = "shape ndim dtype device is_cuda is_cpu is_meta requires_grad is_leaf grad nbytes itemsize layout"
    for name in [*names.split(), "is_sparse", "is_nested", "is_quantized"]:
        for ours, theirs in ((lazy, eager), (lazy.softmax(-1), eager.softmax(-1))):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # reading .grad of a non-leaf warns
                assert getattr(ours, name) == getattr(theirs, name), name
    assert not lazy.data.requires_grad
    assert lazy.size() == eager.size()
    assert lazy.size(-1) == V
    assert (lazy.dim(), lazy.numel(), lazy.nelement(), len(lazy)) == (3, B * S * V, B * S * V, B)
    assert (lazy.element_size(), lazy.is_contiguous(), lazy.is_floating_point()) == (4, True, True)
    assert torch.is_floating_point(lazy)
    assert not lazy.transpose(1, 2).is_contiguous()
    with settings.strict():
        for ours in (lazy, lazy.transpose(1, 2), lazy.softmax(-1)):
            assert ours.stride() == (0, 0, 0)
            assert (ours.stride(0), ours.stride(-1), ours.stride(dim=1)) == (0, 0, 0)
            with pytest.raises(IndexError, match="out of range"):
                ours.stride(3)
    assert lazy.get_device() == eager.get_device()
    assert lazy.grad_fn is not None
    assert lazy.detach().grad_fn is None
    assert not lazy.detach().requires_grad
    assert not lazy.detach().logsumexp(-1).requires_grad
    assert lazy.contiguous() is lazy
    assert "LinearLogits((2, 5, 11), torch.float32" in repr(lazy)
    assert "440 bytes not held" in repr(lazy)
    with pytest.raises(AttributeError, match="materialize"):
        lazy.data_ptr  # noqa: B018
    assert not hasattr(lazy, "keys")


NEW = {
    "new_zeros": lambda z: z.new_zeros(2, 3),
    "new_ones": lambda z: z.new_ones((2, 3), dtype=torch.int64),
    "new_full": lambda z: z.new_full((2,), 0.5),
    "new_full_size": lambda z: z.new_full(size=(2,), fill_value=0.5),
    "new_tensor": lambda z: z.new_tensor([1, 2], requires_grad=True),
    "new_empty": lambda z: z.new_empty(2, 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NEW)
def test_new_tensors_are_like_the_logits(name, dtype):
    tensors = leaves(dtype)
    with settings.strict():
        lazy = LinearLogits(tensors["hidden"], tensors["weight"])
        for z in (lazy, lazy.softmax(-1)):
            found, expected = NEW[name](z), NEW[name](F.linear(tensors["hidden"], tensors["weight"]))
            assert found.requires_grad == expected.requires_grad
            torch.testing.assert_close(found, expected)
            assert (z.is_signed(), torch.is_conj(z)) == (True, False)


def test_pickle_and_deepcopy_are_detached_and_without_module():
    head = LinearHead(H, V, softcap=2.0, rank=2)
    nn.init.normal_(head.lora_B)
    logits = head(torch.randn(B, S, H), temperature=TEMPERATURE)[:, 1:].float()
    stored = io.BytesIO()
    torch.save(logits, stored)
    stored.seek(0)
    for copied in (
        pickle.loads(pickle.dumps(logits)),
        copy.deepcopy(logits),
        torch.load(stored, weights_only=False),
        copy.copy(logits),
    ):
        assert copied.module is None
        assert not copied.requires_grad
        assert torch.equal(copied.materialize(), logits.materialize())
    assert copy.deepcopy(logits).weight.data_ptr() != head.weight.data_ptr()


def test_no_tokens():
    logits = LinearLogits(torch.zeros(0, S, H, requires_grad=True), torch.randn(V, H, requires_grad=True))
    assert logits.view(-1, V).shape == (0, V)
    assert logits.logsumexp(-1).shape == (0, S)
    assert logits.argmax(-1).shape == (0, S)
    assert logits.materialize().shape == (0, S, V)
    assert [part.shape for part in logits.chunk(3)] == [(0, S, V)] * 3
    assert F.cross_entropy(logits.view(-1, V), torch.zeros(0, dtype=torch.long)).isnan()
    assert F.cross_entropy(logits.view(-1, V), torch.zeros(0, dtype=torch.long), reduction="sum") == 0


def test_more_than_two_to_the_31_logits():
    logits = LinearLogits(torch.ones(1, 1).expand(2**20, 1), torch.arange(4096.0).unsqueeze(1))
    assert logits.numel() == 2**32
    last = logits.view(2, -1, 4096)[-1, -2:]
    torch.testing.assert_close(last.logsumexp(-1), torch.full((2,), 4095.4587))
    assert last.argmax(-1).tolist() == [4095, 4095]


def test_a_vocabulary_of_one():
    hidden, weight = torch.randn(B, S, H), torch.randn(1, H)
    logits = LinearLogits(hidden, weight)
    torch.testing.assert_close(logits.view(1, -1, 1).squeeze(0).materialize(), (hidden @ weight.T).view(-1, 1))
    assert (logits.log_softmax(-1).gather(-1, IDS[..., None] * 0) == 0).all()


AT = torch.tensor([[[4], [0]], [[1], [1]]])


@pytest.mark.parametrize(
    "fn",
    [
        lambda z: z.gather(1, AT.expand(-1, -1, V)).logsumexp(-1),
        lambda z: z.mT.log_softmax(1).gather(-1, AT.mT[:1].expand(-1, V, -1))[:, 3],
        lambda z: torch.take_along_dim(z, AT[:1] - 2, 1).logsumexp(-1),
        lambda z: (3 * (z - z.mean(-1, keepdim=True))).logsumexp(-1, keepdim=True),
        lambda z: ((z + 1) * TEMPERATURE[..., None].float()).logsumexp(-1),
        lambda z: (0.5 * z.log_softmax(-1) - TEMPERATURE[..., None].float()).logsumexp(-1),
        lambda z: z.max(),
        lambda z: z.log_softmax(-1).min(),
        lambda z: z.softmax(-1).amax(),
        lambda z: TEMPERATURE.type_as(z) + TEMPERATURE.to(z),
        lambda z: torch.ones(B * S * V).view_as(z).sum() + torch.ones(V, B * S).T.reshape_as(z).sum(),
        lambda z: TEMPERATURE[..., None].expand_as(z).sum(),
        lambda z: torch.ones((), dtype=torch.result_type(z, TEMPERATURE)),
        lambda z: torch.isnan(z).any() | z.mT.isnan().any(1).any(),
        lambda z: z.isnan().any(-1, keepdim=True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_reads_numbers_per_token_or_none(fn, dtype):
    tensors = leaves(torch.float32)
    args, kwargs = arguments(tensors, bias=True)
    with settings.strict():
        found = fn(LinearLogits(*args, **kwargs).to(dtype))
    expected = fn(linear_logits(*args, **kwargs).to(dtype))
    assert found.dtype == expected.dtype
    exact = dtype == torch.float32
    torch.testing.assert_close(found, expected, **({} if exact else {"rtol": 2e-2, "atol": 2e-2}))
    if found.requires_grad and exact:
        torch.testing.assert_close(*(gradients([x], tensors)[:3] for x in (found, expected)))


@pytest.mark.filterwarnings("ignore:.*materialises")
@pytest.mark.parametrize("join", [torch.cat, torch.stack])
def test_two_adapters_beside_one_head_are_two_heads(join):
    """Such as the adapters of a policy and of its reference."""
    tensors, found = leaves(), []
    h, w, u = (tensors[name] for name in ("hidden", "weight", "u"))
    for kind in (LinearLogits, linear_logits):
        both = join([kind(h, w, low_rank=(u, B)) for B in (tensors["B"], 2 * tensors["B"])])
        logp = both.log_softmax(-1)[..., 3]
        found.append([logp, *torch.autograd.grad(logp.square().sum(), (h, u, tensors["B"]))])
    torch.testing.assert_close(*found)


@pytest.mark.filterwarnings("ignore:.*materialises")
@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"temperature": TEMPERATURE.float()}, {"scale": 0.0}])
def test_a_bias_added_after_what_is_not_linear(options):
    lazy, eager, tensors = make(**options)
    bias, found = torch.linspace(-1, 1, V, requires_grad=True), []
    for z in (lazy, eager):
        logp = (z + bias).log_softmax(-1).gather(-1, FEW)
        found.append([logp, *torch.autograd.grad(logp.square().sum(), (tensors["weight"], bias))])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*materialises")
@pytest.mark.parametrize("fn", [lambda z: 0 * z, lambda z: 3 * torch.tanh(z / 3)])
@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"temperature": TEMPERATURE.float()}])
def test_a_zero_or_a_cap_after_what_is_not_linear(fn, options):
    lazy, eager, _ = make(**options)
    torch.testing.assert_close(fn(lazy).logsumexp(-1), fn(eager).logsumexp(-1))


def test_a_vocabulary_of_one_beside_numbers_per_token():
    hidden, weight = torch.randn(B, S, H, requires_grad=True), torch.randn(1, H)
    numbers, results = torch.randn(B, S, 1), []
    for head in (LinearLogits, F.linear):
        z = head(hidden, weight)
        with settings.strict():
            loss = (z + numbers).logsumexp(-1).square().sum() + (numbers - z)[..., 0].square().sum()
        results.append([loss, *torch.autograd.grad(loss, [hidden])])
    torch.testing.assert_close(*results)
