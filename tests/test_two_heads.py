"""How the tokens of two heads are cut into chunks, the dtype their gradients are summed in, and that memory is as planned."""

import itertools

import pytest
import torch

from fused_losses import two_heads
from fused_losses.bench.memory import peak_bytes
from fused_losses.chunked.divergence_rows import BUFFERS
from fused_losses.chunked.linear_softmax import TILE
from fused_losses.chunked.softmax_rows import CHUNK_ELEMENTS
from fused_losses.gradients_in_forward import HEADROOM
from fused_losses.head import Head
from fused_losses.products import gathered_bytes
from fused_losses.reference import divergence as reference
from fused_losses.reference.tolerance import assert_accurate
from fused_losses.row_divergence import Divergence
from fused_losses.settings import workspace
from fused_losses.two_heads import (
    DEFAULT_BUDGET,
    FEWEST_TOKENS,
    STEEPEST,
    TRANSFORM_TEMPORARIES,
    BothHeads,
    Problem,
    _Side,
    budget,
    chunks_of,
    compared_vocab,
    float16_factor,
    saved_tokens,
    two_heads_loss,
)
from fused_losses.vocab_parallel import VocabShard

ALL, STUDENT, NONE = [True] * 10, [True] * 5 + [False] * 5, [False] * 10


def head(tokens, vocab, hidden=8, dtype=torch.float32, shard=None):
    rows = vocab if shard is None else shard.size
    return Head(torch.randn(tokens, hidden).to(dtype), torch.randn(rows, hidden).to(dtype), shard=shard)


def logits(tokens, vocab, dtype=torch.float32):
    return Head(torch.randn(tokens, vocab).to(dtype), None)


def per_token(vocab, dtype, wanted, hidden=8):
    """Bytes that a token of a chunk takes on a CPU: its logits, their gradient in 16 bits, and factors that are upcast."""
    vocab = -(-vocab // 16) * 16  # rows start at whole words
    if dtype == torch.float32:
        return 4 * vocab
    return 4 * vocab + 2 * vocab * wanted + 4 * (hidden + TILE)


@pytest.mark.parametrize(
    ("dtype", "wanted", "of_token"),
    [
        (torch.float32, ALL, 2 * per_token(100, torch.float32, True)),
        (torch.bfloat16, ALL, 2 * per_token(100, torch.bfloat16, True)),
        (torch.bfloat16, STUDENT, per_token(100, torch.bfloat16, True) + per_token(100, torch.bfloat16, False)),
        (torch.bfloat16, NONE, 2 * per_token(100, torch.bfloat16, False)),
    ],
)
def test_the_largest_chunk_that_fits(dtype, wanted, of_token):
    heads = (head(4096, 100, dtype=dtype), head(4096, 100, dtype=dtype))
    tile = 0 if dtype == torch.float32 else TILE * 8 * 4
    for tokens in (512, 2048):
        assert chunks_of(heads, 4096, wanted, of_token * tokens + tile, "triton").tokens == tokens
        assert chunks_of(heads, 4096, wanted, of_token * tokens + tile - 1, "triton").tokens < tokens
    assert chunks_of(heads, 4096, wanted, of_token * 4096 + tile, "triton").tokens == 4096
    # The row primitive of the torch backend holds a few chunks of rows.
    rows = BUFFERS * 4 * min(CHUNK_ELEMENTS, 4096 * 100)
    assert chunks_of(heads, 4096, wanted, of_token * 512 + tile + rows, "torch").tokens == 512


def test_chunks_are_even_and_few():
    heads = (head(1000, 100), head(1000, 100))
    of_token = 2 * per_token(100, torch.float32, True)
    assert chunks_of(heads, 1000, ALL, of_token * 600, "triton").tokens == 512  # 600 and 400 would be 2 chunks as well
    assert chunks_of(heads, 1000, ALL, of_token * 501, "triton").tokens == 500  # 512 do not fit
    assert chunks_of(heads, 1000, ALL, 1, "triton").tokens == FEWEST_TOKENS
    assert chunks_of(heads, 5, ALL, 1, "triton").tokens == 5
    assert chunks_of(heads, 0, ALL, 1, "triton").tokens == 0


def test_what_is_held_beside_logits_takes_room():
    """Copies of hidden states and their gradients where tokens are ignored; the fp32 gradient of all where ranks sum it."""
    few, H = 100, 64
    heads = (head(4096, few, H), head(4096, few, H))
    of_token = 2 * per_token(few, torch.float32, True) + 3 * 4 * H
    for tokens in (512, 1024):
        assert chunks_of(heads, 4095, STUDENT, of_token * tokens, "triton").tokens == tokens
        assert chunks_of(heads, 4095, STUDENT, of_token * tokens - 1, "triton").tokens < tokens
    shard = VocabShard("group", 0, few, few, 1)
    alone, shared = ((head(4096, few, H, torch.bfloat16, s),) * 2 for s in (None, shard))
    room = 2**23
    assert chunks_of(shared, 4096, STUDENT, room + 4096 * H * 2, "triton") == chunks_of(
        alone, 4096, STUDENT, room, "triton"
    )
    assert (
        chunks_of(shared, 4096, STUDENT, room, "triton").tokens < chunks_of(alone, 4096, STUDENT, room, "triton").tokens
    )


def test_tensors_of_logits_take_no_room():
    one = chunks_of(
        (head(4096, 100), logits(4096, 100)), 4096, ALL, per_token(100, torch.float32, True) * 512, "triton"
    )
    assert one.tokens == 512
    # Vocabularies of different size are cut to the smaller.
    cut = chunks_of(
        (head(4096, 400), logits(4096, 100)), 4096, ALL, per_token(100, torch.float32, True) * 512, "triton"
    )
    assert cut == one


def test_a_shard_is_compared_without_its_padding():
    """The padding of the smaller vocabulary may be a tensor's, while the head beside it has further rows."""
    shard = VocabShard("group", 26, 48, 48, 2)
    assert compared_vocab(head(4, 50, shard=shard._replace(stop=50))._replace(shard=shard), logits(4, 26)) == 22


@pytest.mark.parametrize("option", [{"scale": 2.0}, {"softcap": 3.0}, {"temperature": torch.ones(4096)}], ids=str)
def test_logits_that_are_transformed_take_room(option):
    heads = (head(4096, 100), head(4096, 100))
    changed = (heads[0], heads[1]._replace(**option))
    room = 512 * 2 * per_token(100, torch.float32, True) + BUFFERS * 4 * 4096 * 100
    assert chunks_of(heads, 4096, ALL, room, "torch").tokens == 512
    room += TRANSFORM_TEMPORARIES * 4 * 4096 * 100
    assert chunks_of(changed, 4096, ALL, room, "torch").tokens == 512
    assert chunks_of(changed, 4096, ALL, room - 1, "torch").tokens < 512


@pytest.mark.parametrize(
    ("dtypes", "chunks", "sums"),
    [
        ((torch.bfloat16, torch.bfloat16), 8, (torch.bfloat16, torch.bfloat16)),
        ((torch.bfloat16, torch.bfloat16), 9, (torch.float32, torch.float32)),
        ((torch.float16, torch.bfloat16), 1, (torch.float32, torch.bfloat16)),
        ((torch.float32, torch.float64), 1, (torch.float32, torch.float64)),
    ],
)
def test_sums_over_chunks(dtypes, chunks, sums):
    tokens = 64 * chunks
    heads = tuple(head(tokens, 100, dtype=dtype) for dtype in dtypes)
    extra = sum(100 * 8 * 4 for s, d in zip(sums, dtypes, strict=True) if s != d)
    few = chunks == 1
    found = chunks_of(
        heads, tokens, ALL, 2**30 if few else 64 * 2 * per_token(100, dtypes[0], True) + TILE * 32, "triton"
    )
    assert found.sums == sums
    if not few:
        assert (-(-tokens // found.tokens) > 8) == (extra > 0)


def test_a_filter_takes_room_for_the_columns_it_gathers():
    plain = (head(4096, 2000), head(4096, 2000))
    filtered = tuple(h._replace(gradient_filter=1e-3) for h in plain)
    room = 2**24
    less = gathered_bytes(room // (2000 * 4), 2000, 8, torch.float32, torch.float32, True)  # for one side at a time
    for wanted in (ALL, STUDENT, NONE):
        held = less if wanted is not NONE else 0
        expected = chunks_of(plain, 4096, wanted, room - held, "triton")
        assert chunks_of(filtered, 4096, wanted, room, "triton") == expected


@pytest.mark.parametrize(("dtype", "held"), [(torch.float16, 2 * 100 * 512 * 4), (torch.bfloat16, 0)])
def test_what_sums_a_weights_gradient_in_fp32_takes_room(dtype, held):
    """In float16, gradients are summed in fp32 however few the chunks are."""
    heads = tuple(head(4096, 100, 512, dtype) for _ in range(2))
    room = 1024 * 2 * per_token(100, dtype, True, 512) + TILE * 512 * 4
    trained = [False, True, True, True, True] * 2  # hidden takes room of its own
    others = [False, False, True, True, True] * 2
    assert chunks_of(heads, 4096, others, room, "triton").tokens == 1024
    assert chunks_of(heads, 4096, trained, room + held, "triton").tokens == 1024
    assert chunks_of(heads, 4096, trained, room + held - 1, "triton").tokens < 1024


def test_budget():
    heads = (head(16, 50), head(16, 70))
    assert budget(heads, "1MiB") == 2**20
    with workspace(12345):
        assert budget(heads, None) == 12345
    assert budget(heads, None) == DEFAULT_BUDGET
    for t in (heads[0].hidden, heads[1].weight):
        t.requires_grad_()
    large = heads[1]._replace(weight=torch.empty(2**20, 200, device="meta").requires_grad_())
    assert budget((heads[0], large), None) == 2**20 * 200 * 4 + 16 * 8 * 4
    # A rank has a gradient for each token, and for its share of the rows of weight and B.
    shard = VocabShard("group", 0, 10, 2**20, 2)
    shared = Head(*(torch.empty(n, 200, device="meta").requires_grad_() for n in (2**18, 10)), shard=shard)
    assert budget((shared,), None) == (2**18 + 2**19) * 200 * 4
    shared = shared._replace(**{name: torch.empty(n, 3).requires_grad_() for name, n in (("u", 2**18), ("B", 10))})
    assert budget((shared,), None) == (2**18 + 2**19) * (200 + 3) * 4


def test_ranks_plan_alike():
    """However uneven their shards are, because they exchange numbers chunk by chunk."""
    ends, V, N = (0, 0, 3_000_000, 3_000_010, 4_000_000), 4_000_000, 4096
    found = set()
    for start, stop in itertools.pairwise(ends):
        shard = VocabShard("group", start, stop, V, 4)
        weight = torch.empty(stop - start, 128, device="meta").requires_grad_()
        of_rank = (Head(torch.empty(N, 128, device="meta"), weight, shard=shard),) * 2
        room = budget(of_rank, None)
        found.add((room, chunks_of(of_rank, N, ALL, room, "triton")))
    ((room, chunks),) = found
    assert room == 2 * 1_000_000 * 128 * 4
    assert chunks.tokens < N


def test_what_the_operators_take_is_unpacked_as_it_was():
    x = torch.ones(3)
    student = Head(x, x + 1, x + 2, x + 3, x + 4, x + 5, 0.5, 8.0, VocabShard("group", 1, 3, 9, 2), 0.25)
    teacher = Head(x + 6, x + 7, x + 8, x + 9, x + 10, x + 11, 2.0, None, VocabShard("group", 1, 3, 8, 2), 0.0)
    problem = Problem(student, teacher, x + 12, x + 13, True, Divergence("jsd", 0.3, 1.5))
    assert repr(Problem.unpacked(problem.packed())) == repr(problem)


def of_heads(heads, soft, wanted, workspace, kind="jsd"):
    problem = Problem(*heads, None, None, False, Divergence(kind, 0.5, 1.0))
    both = BothHeads(problem, False, wanted, workspace, "torch")
    gradients = both.gradients(soft, None)
    return both.divergence, gradients


@pytest.mark.parametrize(("chunks", "sums"), [(4, torch.bfloat16), (12, torch.float32)])
def test_gradients_summed_over_chunks_are_accurate(chunks, sums, monkeypatch):
    monkeypatch.setattr(two_heads, "FEWEST_TOKENS", 8)
    torch.manual_seed(0)
    N = 8 * chunks
    heads = (head(N, 60, dtype=torch.bfloat16), head(N, 60, dtype=torch.bfloat16))
    soft = torch.rand(N)
    divergence, gradients = of_heads(heads, soft, ALL, 1)
    assert gradients[1].dtype == gradients[6].dtype == sums
    eager, exact = [], []
    for dtype, found in ((torch.bfloat16, eager), (torch.float64, exact)):
        leaves = [t.to(dtype).requires_grad_() for h in heads for t in h.inputs[:2]]
        values = reference.divergence(
            (leaves[0] @ leaves[1].T).to(torch.promote_types(dtype, torch.float32)),
            (leaves[2] @ leaves[3].T).to(torch.promote_types(dtype, torch.float32)), "jsd",
        )  # fmt: skip
        found += [values.detach(), *torch.autograd.grad((values * soft).sum(), leaves)]
    ours = [divergence, *(g.to(torch.bfloat16) for g in (gradients[0], gradients[1], gradients[5], gradients[6]))]
    names = ("divergence", "student hidden", "student weight", "teacher hidden", "teacher weight")
    for name, a, b, c in zip(names, ours, eager, exact, strict=True):
        assert_accurate(a, b.to(a.dtype), c, name)


@pytest.mark.parametrize(
    ("kind", "trained", "steep"),
    [
        ("forward_kl", "student", False), ("forward_kl", "teacher", True), ("cross_entropy", "teacher", True),
        ("reverse_kl", "student", True), ("reverse_kl", "teacher", False), ("jsd", "both", False),
    ],
)  # fmt: skip
def test_a_factor_leaves_room_for_slopes_without_bound_alone(kind, trained, steep):
    sides = [
        _Side(head(4, 9, dtype=torch.float16), 9, 4, [trained in (name, "both")] * 5, torch.float32)
        for name in ("student", "teacher")
    ]
    which = Divergence(kind, 0.5, 1.0)
    factor = float16_factor(sides, which, torch.ones(4), None)
    assert factor == HEADROOM / (STEEPEST if steep else 1)
    assert float16_factor(sides, which, torch.ones(4), torch.full((4,), 256.0)) == HEADROOM / 256


@pytest.mark.parametrize("size", [1e-7, 1e7])
def test_float16_gradients_neither_vanish_nor_overflow(size, monkeypatch):
    """For an upstream gradient of any size, the gradients are scaled by a power of two so that float16 holds them."""
    monkeypatch.setattr(two_heads, "FEWEST_TOKENS", 8)
    torch.manual_seed(0)
    heads = (head(24, 60, dtype=torch.float16), head(24, 60, dtype=torch.float16))
    _, gradients = of_heads(heads, torch.full((24,), size), ALL, 1)
    doubles = [h.with_inputs(None if t is None else t.double() for t in h.inputs) for h in heads]
    _, exact = of_heads(doubles, torch.full((24,), size, dtype=torch.float64), ALL, 2**30)
    for ours, true in zip(gradients, exact, strict=True):
        assert (ours is None) == (true is None)
        if ours is not None:
            assert ours.dtype == torch.float32
            assert (ours - true).norm() < 2e-3 * true.norm()


@pytest.mark.parametrize("size", [1e-7, 1.0, 1e7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("wanted", [ALL, STUDENT], ids=["both", "student"])
@pytest.mark.parametrize("fewest", [8, 32], ids=["one of three chunks", "all"])
def test_what_forward_saves_backward_multiplies(fewest, wanted, dtype, size, monkeypatch):
    """The gradients are those of one call, and the logits of the chunk that was saved are not made again."""
    monkeypatch.setattr(two_heads, "FEWEST_TOKENS", fewest)
    torch.manual_seed(0)
    N, keep = 30, torch.arange(30)[1:25]
    heads = (head(N, 60, dtype=dtype), head(N, 60, dtype=dtype))
    ids = torch.zeros(N, dtype=torch.int64)
    soft = torch.randn(N, dtype=torch.promote_types(dtype, torch.float32)) * size
    problem = Problem(*heads, ids, keep, False, Divergence("jsd", 0.3, 1.5))
    made = []
    write_logits = Head.write_logits
    monkeypatch.setattr(Head, "write_logits", lambda h, out: made.append(len(out)) or write_logits(h, out))

    def again():
        made.clear()
        return BothHeads(problem, False, wanted, 1, "torch")

    whole = (one := again()).gradients(soft, None)
    assert sum(made) == 2 * len(keep)
    saved = (forward := again()).saved()
    assert sum(made) == 2 * len(keep)
    assert [t is not None for t in saved] == [True, wanted is ALL]
    gradients = again().gradients_from(saved, soft)
    assert sum(made) == 2 * max(0, len(keep) - fewest)
    assert torch.equal(forward.divergence, one.divergence)
    precision = {torch.bfloat16: 1e-2, torch.float64: 1e-12}[dtype]
    for ours, true in zip(gradients, whole, strict=True):
        assert (ours is None) == (true is None)
        if ours is not None:
            assert ours.isfinite().all()
            assert (ours - true).norm() < precision * true.norm()


def test_nothing_is_saved_where_it_cannot_be_used():
    """Namely where a token has two upstream gradients, no side trains, given logits or float16 train, or hooks save tensors."""
    heads = (head(40, 60), head(40, 60))
    assert saved_tokens(heads, 40, STUDENT, False, 2**30, "torch") == 40
    assert saved_tokens(heads, 30, STUDENT, False, 1, "torch") == 30
    assert saved_tokens(heads, 40, STUDENT, True, 2**30, "torch") == 0
    many = (head(4096, 60), head(4096, 60))
    assert saved_tokens(many, 4096, STUDENT, False, 1, "torch") == FEWEST_TOKENS
    assert saved_tokens(heads, 40, NONE, False, 2**30, "torch") == 0
    given = (heads[0], logits(40, 60))
    assert saved_tokens(given, 40, STUDENT, False, 2**30, "torch") == 40
    assert saved_tokens(given, 40, ALL, False, 2**30, "torch") == 0
    half = (heads[0], head(40, 60, dtype=torch.float16))
    assert saved_tokens(half, 40, STUDENT, False, 2**30, "torch") == 40
    assert saved_tokens(half, 40, ALL, False, 2**30, "torch") == 0
    with torch.autograd.graph.save_on_cpu():
        assert saved_tokens(heads, 40, STUDENT, False, 2**30, "torch") == 0


def test_what_is_found_beside_a_loss_has_no_gradient():
    """Such a gradient would be lost."""
    heads = tuple(h.with_inputs(None if t is None else t.requires_grad_() for t in h.inputs) for h in [head(6, 9)] * 2)
    problem = Problem(*heads, torch.arange(6), None, False, Divergence("jsd", 0.5, 1.0)).packed()
    how = {"wanted": [True, True, False, False, False] * 2, "workspace": 2**20, "backend": "torch"}
    found = two_heads_loss(*problem, torch.tensor(1.0), torch.tensor(0.5), **how)
    assert [t.requires_grad for t in found] == [True] + [False] * 12


@pytest.mark.parametrize("options", [{}, {"scale": 0.5, "softcap": 8.0}], ids=["plain", "capped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["jsd", "skewed_kl", "reverse_kl"])
def test_memory_is_the_workspace(kind, dtype, options):
    N, V, H, room = 4096, 2048, 8, 48 * 2**20
    heads = tuple(head(N, V, H, dtype)._replace(**options) for _ in range(2))
    soft = torch.ones(N)
    chunks = chunks_of(heads, N, ALL, room, "torch")
    assert chunks.tokens < N
    results = sum(t.numel() * t.element_size() for h in heads for t in h.inputs[:2]) + N * 4
    peak = peak_bytes(lambda: of_heads(heads, soft, ALL, room, kind))
    assert peak < room + results + 2**20, f"{peak / 2**20:.1f} MiB"
    assert peak > 0.7 * room  # and the workspace is used
