"""The streaming head: every statistic and every coefficient of its gradient, in both variants of the kernels.

``descriptors`` are rows that the copy engine can address (H a multiple of 8), ``pointers`` are all others. The yardstick of the
tolerance rule is eager PyTorch on logits that were accumulated and kept in fp32.
"""

import pytest
import torch
from conftest import INTERPRETED

from fused_losses.kernels import linear_softmax as kernel
from fused_losses.kernels import softmax_rows
from fused_losses.reference.tolerance import assert_accurate
from fused_losses.row_statistics import RowStatistics

STATISTICS = ("entropy", "log_sum_sq_probs", "sum_log_probs", "max_logit", "is_top1")
DTYPES = [torch.float16] + [torch.bfloat16] * (not INTERPRETED)  # the interpreter's bfloat16 is wrong
OPTIONS = {
    "scale": {"scale": 0.7},
    "softcap": {"softcap": 5.0},
    "temperature": {"temperature": True},
    "bias": {"bias": True},
    "low_rank": {"low_rank": True},
    "everything": {"scale": 0.7, "softcap": 5.0, "temperature": True, "bias": True, "low_rank": True},
}


class Head:
    """A head and tokens of odd sizes; ``H`` and ``R`` decide the variant."""

    def __init__(self, device, variant="descriptors", dtype=torch.float16, *, N=21, V=203, K=2, **options):
        H, R = (40, 24) if INTERPRETED else (328, 136)  # several tiles either way
        H, R = (H, R) if variant == "descriptors" else (H + 1, R - 1)
        self.hidden = torch.randn(N, H).to(device, dtype)
        self.weight = (torch.randn(V, H) * (10 / H) ** 0.5).to(device, dtype)
        self.bias = torch.randn(V).to(device, dtype) if options.get("bias") else None
        low_rank = ((torch.randn(N, R) / 2).to(device, dtype), (torch.randn(V, R) / 2).to(device, dtype))
        self.low_rank = low_rank if options.get("low_rank") else None
        self.ids = torch.randint(0, V, (N, K)).to(device)
        self.column_weight = torch.rand(V).to(device)
        self.temperature = (torch.rand(N) + 0.5).to(device) if options.get("temperature") else None
        self.scale, self.softcap = options.get("scale", 1.0), options.get("softcap")

    def exact_in_the_interpreter(self):
        """The interpreter's matrix product rounds by a row's place in its tile: give it products that need no rounding."""
        if INTERPRETED:
            for x in (self.hidden, self.weight, *(self.low_rank or ())):
                x.copy_((x * 4).round() / 4)
        return self

    def forward(self, outputs=STATISTICS, rows=slice(None), saved_logits=None) -> RowStatistics:
        return kernel.linear_softmax_fwd(
            self.hidden[rows],
            self.weight,
            self.bias,
            self.low_rank and (self.low_rank[0][rows], self.low_rank[1]),
            None if self.ids is None else self.ids[rows],
            self.column_weight,
            None if self.temperature is None else self.temperature[rows],
            scale=self.scale,
            softcap=self.softcap,
            outputs=outputs,
            saved_logits=saved_logits,
        )

    def d_logits(self, logsumexp, coefficients, columns=slice(0, None), rows=slice(None), out=None):
        return kernel.linear_softmax_d_logits(
            self.hidden[rows],
            self.weight[columns],
            None if self.bias is None else self.bias[columns],
            self.low_rank and (self.low_rank[0][rows], self.low_rank[1][columns]),
            None if self.ids is None else self.ids[rows],
            self.column_weight[columns],
            None if self.temperature is None else self.temperature[rows],
            logsumexp[rows],
            *(None if x is None else x[rows] for x in coefficients),
            scale=self.scale,
            softcap=self.softcap,
            vocab_start=columns.start,
            out=out,
        )

    def logits(self, dtype):
        """Final logits in ``dtype``, and what they are before scale, softcap and temperature."""
        x = self.hidden.to(dtype) @ self.weight.to(dtype).T
        if self.low_rank is not None:
            x = x + self.low_rank[0].to(dtype) @ self.low_rank[1].to(dtype).T
        if self.bias is not None:
            x = x + self.bias.to(dtype)
        x.requires_grad_()
        z = self.scale * x
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        if self.temperature is not None:
            z = z / self.temperature.to(dtype)[:, None]
        return z, x

    def statistics(self, dtype) -> RowStatistics:
        z = self.logits(dtype)[0].detach()
        logp = z.log_softmax(-1)
        p = logp.exp()
        V = z.shape[1]
        inside = (self.ids >= 0) & (self.ids < V)
        return RowStatistics(
            log_probs=logp.gather(1, self.ids.clamp(0, V - 1)).masked_fill(~inside, 0),
            logsumexp=z.logsumexp(-1).double(),
            entropy=-(p * logp.masked_fill(p == 0, 0)).sum(-1),
            log_sum_sq_probs=(2 * logp).logsumexp(-1),
            sum_log_probs=(logp * self.column_weight.to(dtype)).sum(-1).double(),
            max_logit=z.amax(-1),
            is_top1=z.argmax(-1) == self.ids[:, 0],
        )

    def gradient(self, dtype, coefficients):
        """The gradient in the one form of :mod:`fused_losses.row_statistics`, through autograd to the head's raw output."""
        a, b, e, c, d = (None if t is None else t.to(dtype) for t in coefficients)
        z, x = self.logits(dtype)
        logp = z.detach().log_softmax(-1)
        p = logp.exp()
        dz = torch.zeros_like(p)
        for factor, term in ((a, p), (b, p * logp.masked_fill(p == 0, 0)), (e, p * p)):
            if factor is not None:
                dz += factor[:, None] * term
        if d is not None:
            dz += d[:, None] * self.column_weight.to(dtype)
        if c is not None:
            columns = torch.arange(z.shape[1], device=z.device)
            for k in range(c.shape[1]):
                dz += torch.where(columns == self.ids[:, k : k + 1], c[:, k : k + 1], 0)
        return torch.autograd.grad(z, x, dz)[0]


def assert_statistics(head, ours):
    eager, exact = head.statistics(torch.float32), head.statistics(torch.float64)
    for name in RowStatistics._fields:
        value = getattr(ours, name)
        if name == "is_top1" and value is not None:
            assert torch.equal(value, exact.is_top1)
        elif value is not None:
            assert_accurate(value, getattr(eager, name).to(value.dtype), getattr(exact, name), name)


def random_coefficients(head, names="abecd"):
    N, K = head.ids.shape
    make = {name: torch.randn(N, K) if name == "c" else torch.randn(N) for name in names}
    return [make[name].to(head.hidden.device) if name in make else None for name in "abecd"]


variants = pytest.mark.parametrize("variant", ["descriptors", "pointers"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@variants
def test_the_variants_are_what_they_say(device, variant):
    head = Head(device, variant)
    arch = kernel.architecture(head.hidden.device)
    fits = arch in ("sm_90", "sm_100", "interpreter")
    assert kernel._tma_fits(arch, head.hidden, head.weight) == (fits and variant == "descriptors")
    assert not kernel._tma_fits(arch, head.hidden[:, 1:], head.weight)  # H − 1, and a base that is not aligned
    assert not kernel._tma_fits("sm_80", head.hidden, head.weight)


@dtypes
@pytest.mark.parametrize(
    ("variant", "option"), [("pointers", "everything"), *(("descriptors", option) for option in OPTIONS)]
)
def test_statistics_under_each_option(device, variant, dtype, option):
    head = Head(device, variant, dtype, N=37, **OPTIONS[option])
    assert_statistics(head, head.forward())
    plain = Head(device, variant, dtype, N=37)
    plain.hidden, plain.weight, plain.ids = head.hidden, head.weight, head.ids
    difference = head.statistics(torch.float64).log_probs - plain.statistics(torch.float64).log_probs
    assert difference.abs().min(0).values.max() > 1e-4, "the option changes nothing"


@dtypes
@pytest.mark.parametrize("outputs", [(), ("entropy",), ("max_logit",), ("sum_log_probs",)], ids=str)
def test_only_what_is_asked_for(device, dtype, outputs):
    head = Head(device, dtype=dtype, K=1)
    ours = head.forward(outputs)
    assert {name for name in RowStatistics._fields if getattr(ours, name) is not None} == {
        "log_probs",
        "logsumexp",
        *outputs,
    }
    assert_statistics(head, ours)


@dtypes
@pytest.mark.parametrize("option", ["plain", "everything"])
@pytest.mark.parametrize(
    ("variant", "names"),
    [("pointers", "abecd"), *(("descriptors", names) for names in ("a", "b", "e", "c", "d", "abecd"))],
)
def test_each_coefficient_of_the_gradient(device, variant, dtype, option, names):
    head = Head(device, variant, dtype, N=19, V=99, K=3, **OPTIONS.get(option, {}))
    head.ids[:, 2] = head.ids[:, 0]  # repeated ids add up
    coefficients = random_coefficients(head, names)
    exact = head.gradient(torch.float64, coefficients)
    assert exact.abs().max() > 1e-2
    eager = head.gradient(torch.float32, coefficients).to(dtype)
    logsumexp = head.statistics(torch.float64).logsumexp
    assert_accurate(head.d_logits(logsumexp, coefficients), eager, exact)


@dtypes
@pytest.mark.parametrize("names", ["a", "b", "e"])
def test_each_coefficient_at_a_large_logsumexp(device, dtype, names):
    """Where fp32 holds the logits exactly but logsumexp only to 1/32: its remainder is part of every factor."""
    head = Head(device, dtype=dtype, N=19, V=99, K=1, bias=True, scale=16.0)
    head.hidden, head.weight = (head.hidden * 4).round() / 64, (head.weight * 4).round() / 4
    head.bias.fill_(2.0**15)
    coefficients = random_coefficients(head, names)
    logsumexp = head.statistics(torch.float64).logsumexp
    assert (logsumexp - logsumexp.float()).abs().max() > 1e-2
    exact = head.gradient(torch.float64, coefficients)
    eager = head.gradient(torch.float32, coefficients).to(dtype)
    assert_accurate(head.d_logits(logsumexp, coefficients), eager, exact)


@variants
def test_column_weights_are_optional(device, variant):
    head = Head(device, variant, N=5)
    weighted = head.forward(("sum_log_probs",)).sum_log_probs
    coefficients = random_coefficients(head, "d")
    column_weight, head.column_weight = head.column_weight, torch.ones_like(head.column_weight)
    exact, eager = head.statistics(torch.float64), head.statistics(torch.float32)
    gradient = head.gradient(torch.float64, coefficients)
    ones = kernel.linear_softmax_fwd(head.hidden, head.weight, None, None, None, None, None, outputs=("sum_log_probs",))
    assert ones.log_probs is None
    assert_accurate(ones.sum_log_probs, eager.sum_log_probs, exact.sum_log_probs)
    assert (weighted - ones.sum_log_probs).abs().min() > 1
    got = kernel.linear_softmax_d_logits(
        head.hidden, head.weight, None, None, None, None, None, exact.logsumexp, *coefficients
    )
    assert_accurate(got, gradient.half(), gradient)
    assert column_weight.std() > 0


@variants
def test_slices_of_the_vocabulary(device, variant):
    """Ids stay global; a slice starts anywhere, and some ids lie in other slices."""
    head = Head(device, variant, N=19, V=150, K=2, bias=True, low_rank=True)
    coefficients = random_coefficients(head)
    logsumexp = head.statistics(torch.float64).logsumexp
    exact = head.gradient(torch.float64, coefficients)
    eager = head.gradient(torch.float32, coefficients).half()
    for columns in (slice(0, 64), slice(64, 101), slice(101, 150)):
        in_slice = (head.ids >= columns.start) & (head.ids < columns.stop)
        assert 0 < in_slice.sum() < in_slice.numel()
        room = torch.full((19, 80), 7.0, dtype=torch.float16, device=head.hidden.device)
        out = room[:, 3 : 3 + columns.stop - columns.start]  # neither aligned nor contiguous
        assert head.d_logits(logsumexp, coefficients, columns, out=out) is out
        for got in (out, head.d_logits(logsumexp, coefficients, columns)):
            assert_accurate(got, eager[:, columns], exact[:, columns])
        assert (room[:, :3] == 7).all()
        assert (room[:, 3 + out.shape[1] :] == 7).all()


def test_tiles_without_a_rest(device):
    """As heads have them: rows, vocabulary and hidden size are multiples of a tile's."""
    head = Head(device, N=32, V=128)
    head.hidden, head.weight = torch.randn(32, 128).to(head.hidden), torch.randn(128, 128).to(head.weight) / 4
    ours, coefficients = head.forward(), random_coefficients(head)
    assert_statistics(head, ours)
    exact, eager = head.gradient(torch.float64, coefficients), head.gradient(torch.float32, coefficients)
    assert_accurate(head.d_logits(ours.logsumexp, coefficients), eager.half(), exact)


@variants
def test_skipped_rows_are_zero_and_reach_nothing(device, variant):
    head = Head(device, variant, temperature=True)
    coefficients = random_coefficients(head)
    skipped = torch.zeros(21, dtype=torch.bool, device=head.hidden.device)
    skipped[[0, 7, 20]] = True
    before = head.forward()
    clean = head.d_logits(before.logsumexp, coefficients)
    head.ids[skipped] = -100
    head.ids[5, 1] = -100  # one of two: the row still counts, this id matches nothing
    head.hidden[skipped] = float("nan")
    ours = head.forward()
    gradient = head.d_logits(ours.logsumexp, coefficients)
    for name in RowStatistics._fields:
        got, want = getattr(ours, name), getattr(before, name)
        if got is not None:
            assert (got[skipped] == 0).all(), name
            rest = ~skipped
            if name == "log_probs":
                assert got[5, 1] == 0
                rest[5] = False
            assert torch.equal(got[rest], want[rest]), name
    assert (gradient[skipped] == 0).all()
    rest = ~skipped
    rest[5] = False
    assert torch.equal(gradient[rest], clean[rest])
    assert not torch.equal(gradient[5], clean[5])


@variants
def test_ids_outside_the_vocabulary_match_nothing(device, variant):
    head = Head(device, variant, N=6)
    head.ids[:, 0] = torch.tensor([203, 223, 224, -1, -99, 2**40])  # V, in the last tile's padding, and beyond
    ours = head.forward()
    assert (ours.log_probs[:, 0] == 0).all()
    assert not ours.is_top1.any()
    assert_statistics(head, ours)
    coefficients = random_coefficients(head, "ac")
    exact = head.gradient(torch.float64, coefficients)
    assert_accurate(head.d_logits(ours.logsumexp, coefficients), exact.half(), exact)


@variants
def test_minus_infinity_in_the_bias(device, variant):
    head = Head(device, variant, bias=True)
    head.bias[:70] = float("-inf")  # whole tiles and a part of one
    head.bias[202] = float("-inf")
    head.ids[:, 0] = 3
    head.ids[:, 1] = 100
    head.column_weight = torch.ones_like(head.column_weight)
    ours = head.forward(("entropy", "log_sum_sq_probs", "max_logit", "is_top1"))
    assert (ours.log_probs[:, 0] == float("-inf")).all()
    assert ours.entropy.isfinite().all()
    assert_statistics(head, ours)
    coefficients = random_coefficients(head, "abe")
    gradient = head.d_logits(ours.logsumexp, coefficients)
    exact = head.gradient(torch.float64, coefficients)
    assert (gradient[:, :70] == 0).all()
    assert_accurate(gradient, head.gradient(torch.float32, coefficients).half(), exact)


@variants
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_infinite_and_nan_logits_give_nan(device, variant, value):
    head = Head(device, variant, bias=True)
    head.bias[150] = value
    ours = head.forward()
    for name in ("log_probs", "logsumexp", "entropy", "log_sum_sq_probs", "sum_log_probs"):
        assert getattr(ours, name).isnan().all(), name
    assert torch.equal(ours.max_logit.cpu(), torch.full((21,), value)) or ours.max_logit.isnan().all()
    assert head.d_logits(ours.logsumexp, random_coefficients(head, "a")).isnan().all()


@pytest.mark.parametrize("value", [-2e30, torch.finfo(torch.float32).min])
def test_rows_of_what_trainers_mask_with(device, value):
    head = Head(device, V=130)
    head.bias = torch.full((130,), value, device=device)  # so large that the products vanish: equal logits
    ours = head.forward(("entropy", "max_logit"))
    exact = torch.full_like(ours.log_probs, 130).log()
    torch.testing.assert_close(ours.log_probs, -exact)
    torch.testing.assert_close(ours.entropy.float(), exact[:, 0])
    assert (ours.max_logit == value).all()


@variants
@pytest.mark.parametrize("value", [torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min, -1e36])
@pytest.mark.parametrize("masked", [slice(0, 100), slice(103, 203)])
def test_part_of_the_vocabulary_masked_with_a_number(device, variant, masked, value):
    head = Head(device, variant, bias=True)
    head.bias = head.bias.float()
    head.bias[masked] = value
    head.ids[:] = 101
    ours = head.forward(("entropy", "log_sum_sq_probs", "max_logit"))
    z = head.logits(torch.float64)[0]
    exact = torch.distributions.Categorical(logits=z).entropy().to(ours.entropy)
    torch.testing.assert_close(ours.entropy, exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        ours.log_probs[:, 0].double(), z.log_softmax(-1)[:, 101].to(ours.entropy), rtol=1e-4, atol=1e-5
    )


def test_all_logits_minus_infinity(device):
    head = Head(device, bias=True)
    head.bias[:] = float("-inf")
    ours = head.forward()
    assert ours.log_probs.isnan().all()
    assert (ours.logsumexp == float("-inf")).all()
    assert (ours.max_logit == float("-inf")).all()


@dtypes
@variants
def test_log_probs_of_peaked_rows_are_never_positive(device, variant, dtype):
    head = Head(device, variant, dtype, N=48 if INTERPRETED else 480, V=130, K=1)
    head.hidden *= 12
    head.ids[:, 0] = head.logits(torch.float64)[0].argmax(-1)
    ours = head.forward()
    assert (ours.log_probs <= 0).all()
    assert (ours.log_probs > -1e-3).sum() >= 16, "not peaked"
    assert ours.is_top1.all()
    assert_statistics(head, ours)


def test_a_constant_added_to_the_logits_costs_no_accuracy(device):
    """Up to a power of two that fp32 logits hold exactly, nothing changes but logsumexp and the maximum."""
    head = Head(device, N=16, bias=True)
    head.hidden, head.weight = head.hidden.round(), head.weight.round()
    head.bias.zero_()
    near = head.forward()
    head.bias.fill_(2.0**14)
    far = head.forward()
    assert_statistics(head, far)
    exact = head.statistics(torch.float64)
    for name in ("log_probs", "entropy", "log_sum_sq_probs", "sum_log_probs"):
        assert_accurate(getattr(far, name), getattr(near, name), getattr(exact, name), name)


@variants
@pytest.mark.parametrize("columns", [(20, 21, 40, 100, 150), (140, 200)], ids=["parts and splits", "tiles of a split"])
def test_the_first_of_equal_maxima_is_top1(device, variant, columns):
    head = Head(device, variant, N=24, V=203, K=1)
    head.weight[list(columns)] = head.weight[columns[-1]].clone()
    head.hidden = (head.weight[columns[-1]] * 2).expand(24, -1).contiguous()
    head.ids[:, 0] = torch.arange(24) + columns[0] - 10
    assert torch.equal(head.forward().is_top1, head.ids[:, 0] == columns[0])


@variants
def test_a_token_does_not_depend_on_its_neighbours(device, variant):
    """Bit for bit: alone, elsewhere, in a prefix, in launches of other sizes."""
    head = Head(device, variant, N=37, bias=True, temperature=True, low_rank=True).exact_in_the_interpreter()
    coefficients = random_coefficients(head)
    whole = head.forward()
    gradient = head.d_logits(whole.logsumexp, coefficients)
    order = torch.randperm(37)
    for rows in (slice(20, 21), order[:33]):
        part = head.forward(rows=rows)
        for name in RowStatistics._fields:
            if getattr(whole, name) is not None:
                assert torch.equal(getattr(part, name), getattr(whole, name)[rows]), name
        assert torch.equal(head.d_logits(whole.logsumexp, coefficients, rows=rows), gradient[rows])


def test_launches_of_fewer_rows_change_nothing(device, monkeypatch):
    head = Head(device, temperature=True, low_rank=True).exact_in_the_interpreter()
    whole = head.forward()
    monkeypatch.setattr(kernel, "ROWS_PER_LAUNCH", 8)
    parts = head.forward()
    for name in RowStatistics._fields:
        if getattr(whole, name) is not None:
            assert torch.equal(getattr(parts, name), getattr(whole, name)), name


@variants
def test_runs_repeat_bit_for_bit_and_leave_their_inputs(device, variant):
    head = Head(device, variant, bias=True, temperature=True)
    coefficients = random_coefficients(head)
    tensors = [head.hidden, head.weight, head.bias, head.ids, head.column_weight, head.temperature, *coefficients]
    copies = [t.clone() for t in tensors]
    first, second = head.forward(), head.forward()
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True) if x is not None)
    assert torch.equal(head.d_logits(first.logsumexp, coefficients), head.d_logits(first.logsumexp, coefficients))
    assert all(torch.equal(t, copy) for t, copy in zip(tensors, copies, strict=True))


def test_expanded_vectors(device):
    """A gradient that autograd expanded from one number has stride 0."""
    head = Head(device, N=5, bias=True)
    head.bias, head.column_weight = head.bias[:1].expand(203), head.column_weight[:1].expand(203)
    head.temperature = torch.tensor([0.5], device=head.hidden.device).expand(5)
    coefficients = [
        torch.tensor([[0.3]], device=head.hidden.device).expand(5, 2 if name == "c" else 1) for name in "abecd"
    ]
    coefficients = [x if name == "c" else x[:, 0] for name, x in zip("abecd", coefficients, strict=True)]
    assert coefficients[0].stride() == (0,)
    ours = head.forward()
    assert_statistics(head, ours)
    exact, eager = head.gradient(torch.float64, coefficients), head.gradient(torch.float32, coefficients)
    assert_accurate(head.d_logits(ours.logsumexp, coefficients), eager.half(), exact)


def test_strided_inputs(device):
    """Every second row, a transposed weight, sliced columns: read in place."""
    head = Head(device, N=20)
    wide = Head(device, N=20)
    wide.hidden = torch.randn(40, 2 * head.hidden.shape[1] + 1, device=head.hidden.device).half()[::2, 1::2]
    wide.weight = head.weight.T.contiguous().T
    wide.ids = head.ids
    assert not wide.hidden.is_contiguous()
    assert wide.weight.stride() == (1, 203)
    assert_statistics(wide, wide.forward())


def test_programs_share_the_tiles_of_a_gradient_evenly(device, monkeypatch):
    """A slice of the vocabulary has few tiles a row: a program takes one at a time, and no gradient depends on how many."""
    grids, launched = [], kernel._linear_softmax_d_logits_kernel

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return launched[grid]

    monkeypatch.setattr(kernel, "_linear_softmax_d_logits_kernel", Kernel())
    head = Head(device, N=150, V=300).exact_in_the_interpreter()
    arch = kernel.architecture(head.hidden.device)
    config = kernel.linear_softmax_d_logits_config(arch, kernel._tma_fits(arch, head.hidden), True, False)
    tiles = -(-150 // config.block_n) * -(-300 // config.block_v)
    logsumexp, coefficients = head.forward().logsumexp, random_coefficients(head, "ac")
    found = []
    for programs in (1, 3, 1000):
        monkeypatch.setattr(kernel, "programs", lambda device, programs=programs: programs)
        found.append(head.d_logits(logsumexp, coefficients))
    assert all(torch.equal(found[0], other) for other in found[1:])
    if kernel._tma_fits(arch, head.hidden):
        assert grids == [(1,), (min(3, tiles),), (tiles,)]
    else:
        assert grids == [(tiles,)] * 3


def test_launches_on_the_device_of_its_tensors(device, monkeypatch):
    """Whichever device is current; the other kernels' launchers share the decorator."""
    seen = []
    device_of = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: seen.append(x) or device_of(x))
    head = Head(device)
    head.d_logits(head.forward().logsumexp, random_coefficients(head, "ac"))
    logits = head.weight.float()[..., None]
    logsumexp = softmax_rows.softmax_rows_fwd(logits, None, None, None, outputs=()).logsumexp
    softmax_rows.softmax_rows_bwd(logits, None, None, None, logsumexp, logits[:, 0, 0], None, None, None, None)
    assert [x.data_ptr() for x in seen] == [head.hidden.data_ptr()] * 2 + [logits.data_ptr()] * 2


def test_no_rows_and_a_vocabulary_of_one(device):
    head = Head(device, N=0)
    ours = head.forward()
    assert ours.log_probs.shape == (0, 2)
    assert head.d_logits(ours.logsumexp, random_coefficients(head, "ac")).shape == (0, 203)
    head = Head(device, N=3, V=1)
    ours = head.forward()
    assert (ours.log_probs == 0).all()
    assert (ours.entropy == 0).all()
    assert_accurate(ours.logsumexp, head.logits(torch.float32)[0][:, 0].double(), head.logits(torch.float64)[0][:, 0])


def test_other_dtypes_and_shapes_are_refused(device):
    h, w = torch.randn(3, 8, device=device), torch.randn(5, 8, device=device)
    args = (None, None, None, None, None)
    with pytest.raises(ValueError, match=r"bfloat16 and float16.*library"):
        kernel.linear_softmax_fwd(h, w, *args, outputs=())
    with pytest.raises(ValueError, match="one dtype"):
        kernel.linear_softmax_fwd(h.half(), w, *args, outputs=())
    with pytest.raises(ValueError, match=r"\(3, 8\).*\(5, 7\)"):
        kernel.linear_softmax_fwd(h.half(), w.half()[:, :7], *args, outputs=())
    with pytest.raises(ValueError, match=r"bias must be \(V,\)"):
        kernel.linear_softmax_fwd(h.half(), w.half(), w[:4, 0], None, None, None, None, outputs=())
    with pytest.raises(ValueError, match="low_rank"):
        kernel.linear_softmax_fwd(h.half(), w.half(), None, (h.half(), w.half()[:, :2]), None, None, None, outputs=())


@pytest.mark.parametrize("variant", ["descriptors", "pointers"])
@pytest.mark.parametrize("columns", [1, 100, 203, 208])
@pytest.mark.parametrize("outputs", [(), ("entropy",), STATISTICS], ids=["log-probs", "entropy", "all"])
def test_logits_are_saved_before_scale_and_softcap(variant, columns, outputs, device, monkeypatch):
    monkeypatch.setattr(kernel, "ROWS_PER_LAUNCH", 16)  # two launches, which must not write each other's rows
    head = Head(device, variant, **OPTIONS["everything"])
    saved_logits = torch.full((head.hidden.shape[0] + 1, 208), 7.0, device=device)
    found = head.forward(outputs, saved_logits=saved_logits[:-1, :columns])
    for a, b in zip(found, head.forward(outputs), strict=True):
        assert a is b is None or torch.equal(a, b)
    exact, eager = head.logits(torch.float64)[1].detach(), head.logits(torch.float32)[1].detach()
    width = min(columns, exact.shape[1])
    assert_accurate(saved_logits[:-1, :width], eager[:, :width], exact[:, :width], "saved_logits")
    assert (saved_logits[:-1, width:] == 7).all()
    assert (saved_logits[-1] == 7).all()
