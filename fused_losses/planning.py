"""Chooses the route for a head's gradients and the chunk size, and predicts the memory.

With ``N`` tokens, ``V`` vocabulary and ``H`` hidden, one product over the logits is ``2NVH`` floating point operations.

- ``gradients_in_forward`` (``6NVH``): a chunk of tokens at a time, logits, loss and gradients in one pass. It needs to know the
  loss of each token up to one common factor, so it serves sums and means.
- ``recompute`` (``8NVH``): forward saves a few numbers per token; backward recomputes the logits, a slice of the vocabulary at
  a time. It serves any upstream gradient per token, and it needs the least memory. Forward saves the logits of as many
  vocabulary entries as the budget holds, which backward does not recompute: down to ``6NVH``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .autodiff import unknown
from .chunked.linear_softmax import TILE
from .chunked.softmax_rows import CHUNK_ELEMENTS
from .numerics import statistics_dtype
from .products import BLOCK, gathered_bytes, upcast_bytes
from .settings import Route
from .settings import backend as backend_setting
from .settings import gradient_filter as gradient_filter_setting
from .settings import route as route_setting
from .settings import workspace as workspace_setting

MiB = 2**20
DEFAULT_BUDGET = 512 * MiB  # or the two gradients, whichever is larger
RECOMPUTE_BUDGET = 256 * MiB  # for 16-bit heads: larger slices are not faster, and logits are saved in fp32
ROW_TEMPORARIES = 1  # copies of a chunk of rows that the PyTorch row primitive holds at once
MANY_CHUNKS = 8  # with more chunks than this, a 16-bit sum over them loses too much precision
ACCUMULATION_PAYS = 1024  # tokens a chunk needs before an fp32 sum over chunks is cheaper than recomputing the logits
FEWEST_TOKENS, FEWEST_COLUMNS = 32, 512  # in a chunk, in a slice
NUMBERS_PER_TOKEN = 60  # bytes of statistics, their copies for backward and the coefficients of a gradient
NUMBERS_IN_FORWARD = 33  # bytes per token while the chunks run: ids, statistics, and the loss's numbers for each
TILE_BYTES = 32 * MiB  # of logits that library_tiles.py makes at a time in forward


def padded(columns: int) -> int:
    """The padded length of a row of logits: kernels can write it in whole words, products alike wherever they write it."""
    return math.ceil(columns / 16) * 16


def tile_rows(vocab: int, itemsize: int) -> int:
    return max(32, TILE_BYTES // max(vocab * itemsize, 1))


@dataclass(frozen=True)
class Plan:
    """Route, chunk and predicted memory of one head; ``print`` it for a table."""

    tokens: int
    vocab: int
    hidden: int
    dtype: torch.dtype
    route: Route
    chunk: int  # tokens at a time on "gradients_in_forward", vocabulary entries at a time on "recompute"
    chunks: int
    saved: int  # vocabulary entries whose logits "recompute" saves for backward
    accumulate: torch.dtype | None  # of the sum of d_weight over chunks; None: written once
    budget: int  # bytes
    parts: dict[str, int] = field(repr=False)  # bytes held at the peak, by what holds them
    why: tuple[str, ...] = field(repr=False)

    @property
    def peak(self) -> int:
        """Predicted peak in bytes above the inputs, with outputs and gradients, over forward and backward."""
        return sum(self.parts.values())

    @property
    def flops(self) -> int:
        if self.route == "gradients_in_forward":
            return 6 * self.tokens * self.vocab * self.hidden
        return (8 * self.vocab - 2 * self.saved) * self.tokens * self.hidden

    def __str__(self) -> str:
        unit = "tokens" if self.route == "gradients_in_forward" else "vocabulary entries"
        name = str(self.dtype).removeprefix("torch.")
        logits = self.tokens * self.vocab * self.dtype.itemsize
        rows = [
            ("head", f"{self.tokens} tokens x {self.vocab} vocabulary x {self.hidden} hidden, {name}"),
            ("route", f"{self.route}, {self.flops / 1e12:.3g} TFLOP"),
            ("chunks", f"{self.chunks} of {self.chunk} {unit}"),
            *([("saved", f"logits of {self.saved} vocabulary entries for backward")] if self.saved else []),
            ("d_weight", "written once" if self.accumulate is None else f"summed over chunks in {self.accumulate}"),
            ("workspace", f"at most {self.budget / MiB:.1f} MiB, beside the gradients"),
            ("peak", f"{self.peak / MiB:.1f} MiB above the inputs"),
            *((f"  {part}", f"{size / MiB:.1f} MiB") for part, size in self.parts.items()),
            ("eager holds", f"{logits / MiB:.1f} MiB for each copy of the logits"),
            *(("why", reason) for reason in self.why),
        ]
        return "\n".join(f"{key:<22}{value}" for key, value in rows)


def plan(
    tokens: int,
    vocab: int,
    hidden: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    ignored: int | None = 0,
    shared: bool = False,
    per_token: bool = False,
    route: Route | None = None,
    workspace: int | str | None = None,
    accumulate: str | None = None,
    backend: str = "triton",
    gradient_filter: float | None = None,
) -> Plan:
    r"""Choose the fastest way to a head's gradients within a budget of workspace, and predict its peak memory.

    .. math:: \text{workspace} \le \max(\text{bytes of } d\_hidden + d\_weight,\ 512\,\text{MiB}) \quad\text{by default}

    Route ``recompute`` holds the logits that it saves from forward to backward, once per call. 16-bit heads, which save them in
    fp32, take 256 MiB there by default. Defaults leave additional room for a copy of the hidden states, where tokens are
    ignored, and for their gradient in fp32, where ranks sum it.

    On route ``gradients_in_forward`` ``d_weight`` is written once if one chunk fits; otherwise it is summed over chunks, in its
    own 16-bit dtype for up to 8 of them and in fp32 beyond.

    The plan is for a head in ``dtype``: under autocast the cast weight and, for an fp32 head, its gradient in fp32 are extra.

    Args:
        tokens: ``N``, those that are not ignored.
        vocab: ``V``.
        hidden: ``H``.
        dtype: of hidden and weight.
        ignored: how many tokens beside ``N`` are ignored. If any is, the hidden states of the others are copied. None: they
            are not taken out but zeroed in a copy of all ``N`` (``drop_ignored=False``, ``torch.compile``).
        shared: ``V`` is one rank's part of a vocabulary that ranks share: they all-reduce the gradient of hidden in fp32.
        per_token: each token has an upstream gradient of its own (log-probabilities, ``reduction="none"``).
        route: ``"gradients_in_forward"`` or ``"recompute"``; None is the fastest that fits.
        workspace: bytes, or a string such as ``"256MiB"``, beside inputs, outputs and gradients; None is the setting's.
        accumulate: ``"fp32"`` sums ``d_weight`` over chunks in fp32, however few the chunks.
        backend: ``"torch"`` also holds a few chunks of rows of a fixed size.
        gradient_filter: if it is not 0, the plan includes room for the gathered columns; None is the setting's.

    Returns:
        A :class:`Plan`.

    Raises:
        ValueError: ``per_token`` with route ``"gradients_in_forward"``, a size that is negative or not an integer, or an
            unknown choice.
        TypeError: ``dtype`` is not a ``torch.dtype``.

    Example:
        >>> print(plan(8192, 128256, 4096))
        head                  8192 tokens x 128256 vocabulary x 4096 hidden, bfloat16
        route                 gradients_in_forward, 25.8 TFLOP
        chunks                2 of 4096 tokens
        d_weight              summed over chunks in torch.bfloat16
        workspace             at most 1066.0 MiB, beside the gradients
        peak                  2068.3 MiB above the inputs
          gradients           1066.0 MiB
          logits of a chunk   1002.0 MiB
          numbers per token   0.3 MiB
        eager holds           2004.0 MiB for each copy of the logits
        why                   6NVH against the 8NVH of recompute, and its chunks fit the workspace
        why                   2 chunks: few enough to sum in torch.bfloat16
    """
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {dtype!r}")
    for name, size in (("tokens", tokens), ("vocab", vocab), ("hidden", hidden), ("ignored", ignored or 0)):
        if isinstance(size, float) or size < 0:
            raise ValueError(f"{name} must be an integer of at least 0, got {size}")
    backend_setting.parse(backend)  # type: ignore[arg-type]
    if accumulate not in (None, "fp32"):
        raise ValueError(f"accumulate must be 'fp32' or None, got {accumulate!r}")
    if per_token and route_setting.parse(route) == "gradients_in_forward":
        raise ValueError(
            "route='gradients_in_forward' needs a loss that is summed or averaged over tokens; per-token outputs take "
            "route='recompute' (or None)"
        )
    route = route_setting.chosen(route)
    filters = gradient_filter_setting.chosen(gradient_filter) > 0
    given = workspace_setting.chosen(workspace)
    if unknown(tokens):  # the dtype of sums over chunks, and how many logits are saved, would depend on it
        room = RECOMPUTE_BUDGET if given is None else given
        why = ("how many tokens a mask takes is known after compiling",)
        return Plan(tokens, vocab, hidden, dtype, "recompute", vocab, 1, 0, None, room, {}, why)
    sizes = _Sizes(tokens, vocab, hidden, dtype, ignored, shared, backend, filters)
    usual = max(sizes.gradients, DEFAULT_BUDGET)
    if shared:
        usual += sizes.d_hidden(sizes.all_tokens, sizes.statistics_dtype) - sizes.d_hidden(sizes.all_tokens, dtype)

    def budget(default: int) -> int:
        return default + sizes.copied(tokens) if given is None else given

    if per_token:
        reason = "the upstream gradient of a token is known in backward only"
    elif route == "recompute":
        reason = "asked for"
    else:
        forward, reason = _gradients_in_forward(sizes, budget(usual), accumulate, asked=route is not None)
        if forward is not None:
            return forward
    return _recompute(sizes, budget(RECOMPUTE_BUDGET if dtype.itemsize == 2 else usual), f"recompute: {reason}")


@dataclass(frozen=True)
class _Sizes:
    tokens: int
    vocab: int
    hidden: int
    dtype: torch.dtype
    ignored: int | None
    shared: bool
    backend: str
    filters: bool  # whether there is a gradient filter

    @property
    def statistics_dtype(self) -> torch.dtype:
        return statistics_dtype(self.dtype)

    @property
    def all_tokens(self) -> int:
        return self.tokens + (self.ignored or 0)

    @property
    def gradients(self) -> int:
        """Bytes of the gradients that are returned."""
        return self.d_hidden(self.all_tokens, self.dtype) + self.d_weight(self.dtype)

    def d_hidden(self, tokens: int, dtype: torch.dtype) -> int:
        return tokens * self.hidden * dtype.itemsize

    def d_weight(self, dtype: torch.dtype) -> int:
        return self.vocab * self.hidden * dtype.itemsize

    def copied(self, tokens: int) -> int:
        """Bytes of a copy of the projected ``tokens``' hidden states, made where others are left out or zeroed."""
        return 0 if self.ignored == 0 else tokens * self.hidden * self.dtype.itemsize

    def row_temporaries(self, elements: int) -> int:
        """Bytes that the row primitive holds beside ``elements`` logits."""
        if self.backend == "triton":
            return 0
        return ROW_TEMPORARIES * self.statistics_dtype.itemsize * min(elements, max(CHUNK_ELEMENTS, self.vocab))

    def upcast(self, tokens: int, columns: int) -> int:
        """Bytes of the upcast blocks in products of 16-bit factors that are summed in fp32."""
        return 0 if self.backend == "triton" else upcast_bytes(tokens, columns, self.hidden, self.dtype)

    def gathered(self, tokens: int, columns: int, d_hidden: torch.dtype) -> int:
        """Bytes held where a gradient filter multiplies few of ``columns``."""
        if not self.filters:
            return 0
        return gathered_bytes(tokens, columns, self.hidden, self.dtype, d_hidden, on_cpu=self.backend == "torch")

    def tile(self, columns: int) -> int:
        """Bytes that the PyTorch head holds on route "recompute": a tile of logits and its upcast factors, or its rows."""
        if self.backend == "triton":
            return 0
        rows, columns = min(self.tokens, TILE), min(columns, TILE)
        factors = (rows + columns) * self.hidden if self.dtype.itemsize == 2 else 0
        elements = rows * columns
        rows_at_once = min(elements, max(CHUNK_ELEMENTS, columns))
        return self.statistics_dtype.itemsize * (elements + max(factors, ROW_TEMPORARIES * rows_at_once))

    def scaled(self, *dtypes: torch.dtype) -> int:
        """Bytes that the PyTorch head holds to multiply gradients, made in these dtypes, by the upstream gradient."""
        if self.backend == "triton" or self.dtype.itemsize > 2:
            return 0
        held = 0
        for rows, dtype in zip((self.all_tokens, self.vocab), dtypes, strict=True):
            if dtype == self.dtype:  # a copy in fp32 and the factor for each element
                held = max(held, 2 * 4 * min(rows * self.hidden, 256 * BLOCK))
            else:
                held = max(held, dtype.itemsize * min(rows, BLOCK) * self.hidden)
        return held


def _gradients_in_forward(sizes: _Sizes, budget: int, accumulate: str | None, asked: bool) -> tuple[Plan | None, str]:
    N, V, dtype = sizes.tokens, sizes.vocab, sizes.dtype
    wide = sizes.statistics_dtype
    per_token = wide if dtype == torch.float16 or sizes.shared else dtype
    row = padded(V) * dtype.itemsize
    numbers = sizes.all_tokens * NUMBERS_IN_FORWARD

    def made(sums: torch.dtype) -> int:
        return sizes.d_hidden(sizes.all_tokens, per_token) + sizes.d_weight(sums)

    def at_a_time(tokens: int, sums: torch.dtype) -> int:
        upcast = sizes.upcast(tokens, V) if per_token != dtype or sums != dtype else 0
        product = sizes.d_hidden(tokens, per_token) if sizes.ignored else 0  # before it goes to the tokens' rows
        rows = sizes.row_temporaries(tokens * V) + (product if sizes.shared else 0)  # all-reduced meanwhile
        return max(rows, product + max(sizes.gathered(tokens, V, per_token), upcast))

    def most_tokens(sums: torch.dtype, numbers: int) -> int:
        free, of_token = budget - (made(sums) - sizes.gradients) - numbers, max(row + sizes.copied(1), 1)
        free -= at_a_time(max(0, min(N, free // of_token)), sums)  # fewer tokens need no more
        return max(0, min(N, free // of_token))

    once = most_tokens(dtype, numbers) >= N
    few = most_tokens(dtype, numbers) * MANY_CHUNKS >= N
    if dtype == torch.float16:
        sums, note = wide, "gradients before their scale is known overflow float16"
    elif once or wide == dtype:
        sums, note = dtype, ""
    elif few and not accumulate:
        sums, note = dtype, f"few enough to sum in {dtype}"
    else:
        sums, note = wide, "asked for" if accumulate else f"more than {MANY_CHUNKS} chunks lose too much in {dtype}"
    rounded = sizes.d_hidden(sizes.all_tokens, per_token) if per_token != dtype else 0
    rounded += sizes.d_weight(sums) if sums != dtype else 0
    scaled = sizes.scaled(per_token, sums)
    if not asked:
        n = most_tokens(sums, 0)  # recompute holds numbers per token too
        if n < min(N, FEWEST_TOKENS) or (rounded and rounded + scaled > budget):
            beside = " and fp32 sums" if rounded else ""
            return None, f"the workspace does not hold a chunk of {FEWEST_TOKENS} tokens{beside}"
        if sums != dtype and n < min(N, ACCUMULATION_PAYS) and not accumulate:
            of = "" if torch.compiler.is_compiling() else f" of {n} tokens"  # Dynamo makes a printed number a constant
            return None, f"{note}, and fp32 sums over chunks{of} cost more than recomputing"
    n = _even(N, max(most_tokens(sums, numbers), min(N, FEWEST_TOKENS)))
    chunks = max(1, -(-N // max(n, 1)))
    why = ["asked for" if asked else "6NVH against the 8NVH of recompute, and its chunks fit the workspace"]
    if not torch.compiler.is_compiling() and chunks > 1 and note:
        why.append(f"{chunks} chunks: {note}")
    forward = {
        "gradients": made(sums),
        "logits of a chunk": n * row,
        "hidden of a chunk": sizes.copied(n),
        "at a time": at_a_time(n, sums),
        "numbers per token": numbers,
    }
    loss = {"gradients": made(sums), "numbers per token": sizes.all_tokens * NUMBERS_PER_TOKEN}
    backward = {"gradients": sizes.gradients, "fp32 sums": rounded, "rows at a time": scaled}
    accumulated = None if chunks == 1 and sums == dtype else sums
    return _plan(sizes, budget, "gradients_in_forward", n, chunks, accumulated, (forward, loss, backward), why), ""


def _recompute(sizes: _Sizes, budget: int, why: str) -> Plan:
    N, V, dtype = sizes.tokens, sizes.vocab, sizes.dtype
    wide = sizes.statistics_dtype
    d_hidden, d_hidden_sum = sizes.d_hidden(sizes.all_tokens, dtype), sizes.d_hidden(N, wide)
    copied, numbers = sizes.copied(N), sizes.all_tokens * NUMBERS_PER_TOKEN

    def at_a_time(columns: int, made: bool = True) -> int:
        rows = max(sizes.tile(columns) if made else 0, sizes.row_temporaries(N * columns))  # or saved
        return max(rows, sizes.gathered(N, columns, wide), sizes.upcast(N, columns))

    # At the end the gradient of hidden is made from its sum, if that is wider or covers fewer tokens.
    rounded = sizes.d_hidden(N, dtype) if wide != dtype and sizes.ignored else 0
    beside_gradients = d_hidden_sum + rounded if wide != dtype or sizes.ignored else 0
    at_end = budget - numbers - beside_gradients
    free = budget - numbers - (d_hidden_sum - d_hidden) - copied - at_a_time(V)
    most = min(free, at_end if wide == dtype else RECOMPUTE_BUDGET) // max(N * dtype.itemsize, 1)
    fits = most >= min(V, FEWEST_COLUMNS)
    most = max(most, FEWEST_COLUMNS)
    if wide == dtype:  # one buffer: it holds the first slice's logits from forward on, then every slice's gradient
        v = min(V, most // FEWEST_COLUMNS * FEWEST_COLUMNS)
        saved = v if fits else 0  # there may be many calls before one backward
        held = N * padded(saved) * dtype.itemsize
        buffers = {"d_logits of a slice": N * padded(v) * dtype.itemsize}
    else:  # logits are never rounded to 16 bits, so they have a buffer of their own
        v = _even(V, most)
        rest = min(free - N * v * dtype.itemsize, at_end)
        slices_saved = max(0, rest) // max(N * v * wide.itemsize, 1)
        saved = min(V, slices_saved * v)
        held = N * padded(saved) * wide.itemsize
        buffers = {"d_logits of a slice": N * padded(v) * dtype.itemsize, "logits saved": held}
    forward = {"logits saved": held, "hidden kept": copied, "numbers per token": numbers}
    if sizes.backend == "triton" and wide == dtype and saved < V:  # library_tiles.py makes 32-bit logits
        forward["logits of a tile"] = min(N, tile_rows(V, dtype.itemsize)) * padded(V) * dtype.itemsize
    slices = {
        "d_weight": sizes.d_weight(dtype),
        "d_hidden": d_hidden_sum,
        **buffers,
        "hidden kept": copied,
        "at a time": at_a_time(v, made=saved < V),
        "numbers per token": numbers,
    }
    end = {
        "gradients": sizes.gradients,
        "d_hidden before it": beside_gradients,
        "logits saved": held,
        "numbers per token": numbers,
    }
    chunks = max(1, -(-V // max(v, 1)))
    return _plan(sizes, budget, "recompute", v, chunks, None, (slices, end, forward), [why], saved)


def _even(total: int, most: int) -> int:
    """The size of equal pieces of ``total``, at most ``most``; a multiple that suits matrix products."""
    if most >= total:
        return total
    size = math.ceil(total / math.ceil(total / most))
    # No branch: each side of one would be a graph of its own when compiled.
    return min(math.ceil(size / 128) * 128, most // 32 * 32 or size)


def _plan(
    sizes: _Sizes,
    budget: int,
    route: Route,
    chunk: int,
    chunks: int,
    accumulate: torch.dtype | None,
    phases: Sequence[dict[str, int]],  # bytes that each phase holds
    why: Sequence[str],
    saved: int = 0,
) -> Plan:
    # Nobody reads the parts of a compiled plan, and a branch on which are the largest would be another graph.
    parts = {} if torch.compiler.is_compiling() else max(phases, key=lambda phase: sum(phase.values()))
    if sum(parts.values()) > sizes.gradients + budget:
        why = (*why, "the workspace does not hold the least that this needs, which is taken anyway")
    head = (sizes.tokens, sizes.vocab, sizes.hidden, sizes.dtype)
    held = {part: size for part, size in parts.items() if size}
    return Plan(*head, route, chunk, chunks, saved, accumulate, budget, held, tuple(why))
