"""The plan fits its budget, prefers the cheaper route, and says why."""

import re

import pytest
import torch

from fused_losses import settings
from fused_losses.chunked.linear_softmax import TILE
from fused_losses.planning import CHUNK_ELEMENTS, NUMBERS_IN_FORWARD, MiB, plan

LLAMA, GEMMA, QWEN = (8192, 128256, 4096), (8192, 256000, 2304), (16384, 151936, 2048)


@pytest.mark.parametrize("shape", [LLAMA, GEMMA, QWEN])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("workspace", [None, "256MiB", "4GiB", "16GiB"])
@pytest.mark.parametrize("per_token", [False, True])
def test_peak_is_gradients_and_at_most_the_budget(shape, dtype, backend, workspace, per_token):
    N, V, H = shape
    p = plan(*shape, dtype, workspace=workspace, backend=backend, per_token=per_token)
    gradients = (N + V) * H * dtype.itemsize
    assert p.peak <= gradients + p.budget
    assert gradients <= p.peak
    assert p.peak == sum(p.parts.values())
    assert p.chunk * p.chunks >= (N if p.route == "gradients_in_forward" else V)
    assert (p.route == "recompute") >= per_token


def test_logits_are_saved_in_what_many_tokens_leave_of_the_budget():
    """At the end the gradient of hidden, its fp32 sum and the saved logits are held at once."""
    p = plan(65536, *LLAMA[1:], per_token=True, workspace="4GiB")
    assert 0 < p.saved < LLAMA[1]
    assert p.peak <= (65536 + LLAMA[1]) * LLAMA[2] * 2 + p.budget


def test_default_budget_is_the_gradients_or_half_a_gibibyte():
    assert plan(*LLAMA).budget == (8192 + 128256) * 4096 * 2
    assert plan(100, 1000, 64).budget == 512 * MiB


@pytest.mark.parametrize(
    ("shape", "workspace", "chunks", "peak"),
    [(LLAMA, None, 2, 2072), (LLAMA, "506MiB", 4, 1572), (QWEN, "5GiB", 1, 5500)],
)
def test_few_large_chunks(shape, workspace, chunks, peak):
    p = plan(*shape, workspace=workspace)
    assert (p.route, p.chunks) == ("gradients_in_forward", chunks)
    assert p.peak <= peak * MiB
    assert p.accumulate == (None if chunks == 1 else torch.bfloat16)


def test_recompute_needs_less_and_keeps_its_slices_small():
    p = plan(*LLAMA, per_token=True)
    assert p.route == "recompute"
    assert p.peak <= 1450 * MiB < plan(*LLAMA).peak
    assert p.flops == 8 / 6 * plan(*LLAMA).flops


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_larger_budget_recomputes_less(dtype):
    default = plan(*LLAMA, dtype, per_token=True)
    gradients = sum(LLAMA[:2]) * LLAMA[2] * 4
    assert default.budget == (gradients if dtype == torch.float32 else 256 * MiB)
    given = ("256MiB", "1GiB", "2GiB", "16GiB")
    plans = [plan(*LLAMA, dtype, per_token=True, workspace=w) for w in given]
    flops = [p.flops / plan(*LLAMA).flops for p in plans]
    assert flops == sorted(flops, reverse=True)
    assert len({*flops}) == 4
    assert flops[-1] == 1  # nothing is made again
    assert plans[-1].saved == LLAMA[1]
    for p in plans:
        held = p.tokens * p.saved * 4
        assert p.flops == (8 * p.vocab - 2 * p.saved) * p.tokens * p.hidden
        assert held <= p.budget
        assert (f"logits of {p.saved} vocabulary entries" in str(p)) == (p.saved > 0)
    assert plan(2048, 49152, 576, dtype, per_token=True).saved == (49152 if dtype == torch.float32 else 0)
    assert (plans[0].saved > 0) == (dtype == torch.float32)  # in fp32, in the buffer of a slice's gradient
    assert plan(*LLAMA, dtype, per_token=True, workspace=1).saved == 0


def test_sixteen_bit_sums_end_at_eight_chunks():
    numbers = 8192 * NUMBERS_IN_FORWARD
    most = plan(*LLAMA, workspace=8192 // 8 * 128256 * 2 + numbers)
    assert (most.chunks, most.accumulate) == (8, torch.bfloat16)
    assert plan(*LLAMA, workspace=8192 // 9 * 128256 * 2 + numbers).route == "recompute"
    forced = plan(*LLAMA, workspace=8192 // 9 * 128256 * 2 + numbers, route="gradients_in_forward")
    assert forced.accumulate == torch.float32


def test_fp32_sums_are_counted():
    p = plan(*QWEN, workspace="2GiB", accumulate="fp32")
    assert p.accumulate == torch.float32
    assert p.peak >= (16384 + 151936) * 2048 * 2 + 151936 * 2048 * 4
    assert "asked for" in str(p)
    assert plan(*QWEN, workspace="2GiB").accumulate == torch.bfloat16
    assert plan(*LLAMA, workspace="4GiB", accumulate="fp32").accumulate is None  # one chunk: nothing to sum


@pytest.mark.parametrize("shape", [LLAMA, GEMMA, QWEN])
@pytest.mark.parametrize(("dtype", "accumulate"), [(torch.float16, None), (torch.bfloat16, "fp32")])
@pytest.mark.parametrize("part", [0.6, 0.75, 0.9, 0.99, 1.01, 1.25])
def test_fp32_sums_fit_the_budget(part, dtype, accumulate, shape):
    """They are held together with the gradients that are made from them."""
    N, V, H = shape
    sums = V * H * 4 + (N * H * 4 if dtype == torch.float16 else 0)
    p = plan(*shape, dtype, workspace=int(part * sums), accumulate=accumulate)
    assert p.route == ("recompute" if part < 1 else "gradients_in_forward")
    assert p.peak <= (N + V) * H * 2 + p.budget


def test_fp16_gradients_wait_for_their_scale_in_fp32():
    p = plan(2048, 65536, 64, torch.float16)
    assert (p.route, p.chunks, p.accumulate) == ("gradients_in_forward", 1, torch.float32)
    assert "overflow" not in str(p)  # a reason for sums over chunks, of which there is one
    assert "overflow float16" in str(plan(2048, 65536, 64, torch.float16, workspace="100MiB"))
    assert p.peak >= (2048 + 65536) * 64 * (2 + 4)


def test_blocks_of_fp32_sums_are_counted():
    """Upcast on a CPU: in forward 4 MiB of the logits' gradient and rows of the hidden states, in backward rows of the sum."""
    how = {"route": "gradients_in_forward", "workspace": "30MiB"}
    forward, on_gpu = (plan(8192, 4096, 16, torch.float16, backend=b, **how) for b in ("torch", "triton"))
    assert forward.parts["at a time"] == 4 * 1024 * (1024 + 16)
    assert on_gpu.peak == forward.peak - 4 * 1024 * (1024 + 16)
    backward = plan(8192, 4096, 4096, torch.float16, backend="torch", **how)
    assert backward.parts["rows at a time"] == 4 * 1024 * 4096
    assert plan(8192, 4096, 4096, torch.float16, backend="triton", **how).peak == backward.peak - 4 * 1024 * 4096
    of_weight = plan(8192, 4096, 16, torch.bfloat16, backend="torch", accumulate="fp32", **how)
    assert of_weight.parts["at a time"] == 4 * 1024 * (1024 + 16)
    scaled = plan(1, 8, 2**18, torch.bfloat16, backend="torch", route="gradients_in_forward")
    assert scaled.parts["rows at a time"] == 2 * 4 * 256 * 1024  # a copy in fp32 and its factors


@pytest.mark.parametrize(("tokens", "rows"), [(64, 64), (4096, 65)])
def test_a_tile_of_fp32_logits_is_counted(tokens, rows):
    """On a GPU forward holds at most 32 MiB of them where it saves none."""
    how = {"per_token": True, "workspace": 0}
    assert plan(tokens, 128256, 4, torch.float32, backend="triton", **how).parts["logits of a tile"] == (
        rows * 128256 * 4
    )
    assert "logits of a tile" not in plan(tokens, 128256, 4, torch.float32, backend="torch", **how).parts


def test_rows_on_a_cpu_are_counted():
    """Of a slice made again a tile of logits and its upcast factors, of saved logits the rows that are reduced at once."""
    shape, how = (1024, 65536, 1024), {"per_token": True, "backend": "torch"}
    assert plan(*shape, workspace=0, **how).parts["at a time"] == 4 * (TILE * 512 + (TILE + 512) * 1024)
    saved = plan(*shape, torch.float32, workspace="4GiB", **how)
    assert (saved.saved, saved.parts["at a time"]) == (65536, 4 * CHUNK_ELEMENTS)


@pytest.mark.parametrize(
    ("dtype", "ignored", "bytes"),
    [(torch.bfloat16, 0, 4), (torch.bfloat16, 8192, 4 + 2), (torch.float32, 0, 0), (torch.float32, 8192, 4)],
)
def test_a_gradient_of_hidden_that_is_made_from_its_sum_is_counted(dtype, ignored, bytes):
    p = plan(8192, 512, 4096, dtype, per_token=True, workspace=0, ignored=ignored, backend="triton")
    assert p.parts.get("d_hidden before it", 0) == 8192 * 4096 * bytes


def test_fp32_heads_sum_exactly_in_any_number_of_chunks():
    p = plan(2048, 65536, 64, torch.float32, workspace="32MiB")
    assert p.route == "gradients_in_forward"
    assert p.chunks > 8
    assert p.accumulate == torch.float32


def test_a_budget_nothing_fits_is_said_to_be_exceeded():
    p = plan(*LLAMA, workspace="1MiB")
    assert p.route == "recompute"
    assert "taken anyway" in str(p)


def test_a_sum_over_slices_larger_than_the_budget_is_said_to_exceed_it():
    assert "taken anyway" in str(plan(65536, *LLAMA[1:], per_token=True))  # d_hidden in fp32 is 1 GiB
    assert "taken anyway" not in str(plan(8192, *LLAMA[1:], per_token=True))


@pytest.mark.parametrize("ignored", [1, None])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("shape", [LLAMA, GEMMA, QWEN])
def test_a_copy_of_hidden_states_makes_no_more_chunks_by_default(shape, per_token, ignored):
    N, V, H = shape
    exact = plan(*shape, per_token=per_token)
    copied = plan(N - (ignored or 0), V, H, per_token=per_token, ignored=ignored)
    assert copied.route == exact.route
    assert copied.chunks <= exact.chunks
    assert copied.budget == exact.budget + copied.tokens * H * 2
    assert exact.peak < copied.peak <= (N + V) * H * 2 + copied.budget


@pytest.mark.parametrize("shape", [LLAMA, GEMMA, QWEN])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_that_share_a_vocabulary_sum_up_the_gradient_of_hidden_in_fp32(ranks, shape):
    N, V, H = shape
    alone, shared = (plan(N, V // ranks, H, shared=s) for s in (False, True))
    assert (shared.route, shared.chunks) == (alone.route, alone.chunks)
    assert shared.peak == alone.peak + N * H * 2
    assert shared.budget == alone.budget + N * H * 2


def test_settings_hold_for_a_block_and_arguments_beat_them():
    with settings.workspace("700MiB"), settings.route("recompute"):
        assert plan(*LLAMA).budget == 700 * MiB
        assert plan(*LLAMA).route == "recompute"
        assert plan(*LLAMA, workspace="600MiB", route="gradients_in_forward").budget == 600 * MiB
        assert plan(*LLAMA, route="gradients_in_forward").route == "gradients_in_forward"
    assert plan(*LLAMA).route == "gradients_in_forward"


def test_blocks_of_two_threads_leave_nothing_behind():
    first, second = settings.workspace("1MiB"), settings.workspace("2MiB")
    first.__enter__()
    second.__enter__()
    first.__exit__()
    assert settings.workspace.value == 2 * MiB
    second.__exit__()
    assert settings.workspace.value is None


def test_per_token_refuses_gradients_in_forward_only_as_an_argument():
    with pytest.raises(ValueError, match="per-token outputs take route='recompute'"):
        plan(*LLAMA, per_token=True, route="gradients_in_forward")
    with settings.route("gradients_in_forward"):
        assert plan(*LLAMA, per_token=True).route == "recompute"


def test_unknown_choices_raise():
    with pytest.raises(ValueError, match="accumulate must be 'fp32'"):
        plan(*LLAMA, accumulate="bf16")
    with pytest.raises(ValueError, match="route must be one of"):
        plan(*LLAMA, route="fast")
    with pytest.raises(ValueError, match="backend must be one of"):
        plan(*LLAMA, backend="cuda")
    with pytest.raises(TypeError, match=r"dtype must be a torch\.dtype, got 'bfloat16'"):
        plan(8, 8, 8, "bfloat16")
    for sizes, name in (((-1, 8, 8), "tokens"), ((8, 8.0, 8), "vocab"), ((8, 8, -8), "hidden")):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 0, got"):
            plan(*sizes)
    with pytest.raises(ValueError, match="ignored must be an integer of at least 0, got -1"):
        plan(8, 8, 8, ignored=-1)
    for setting in (settings.drop_ignored, settings.strict):
        with pytest.raises(TypeError, match=f"{setting.__name__} is True or False, got 'no'"):
            setting("no")
    for share in ("2**-12", True, -0.1, 1):
        with pytest.raises(ValueError, match=f"a share of the largest gradient.* got {re.escape(repr(share))}"):
            settings.gradient_filter(share)


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 1, 3), (1, 1, 1), (7, 3, 1)])
def test_tiny_heads_have_a_plan(shape):
    for per_token in (False, True):
        p = plan(*shape, per_token=per_token)
        assert p.chunks == 1
        assert p.peak >= 0


def test_the_table_names_every_part_and_the_reason():
    text = str(plan(*LLAMA))
    for word in ("8192 tokens", "128256 vocabulary", "2 of 4096 tokens", "logits of a chunk", "peak", "6NVH against"):
        assert word in text
    p = plan(*LLAMA, per_token=True, workspace="1GiB")
    for words in (f"{p.chunks} of {p.chunk} vocabulary entries", "written once", "in backward only"):
        assert words in str(p)
    for route in ("gradients_in_forward", "recompute"):
        assert "asked for" in str(plan(*LLAMA, route=route))


@pytest.mark.parametrize("workspace", ["1.5.2MiB", "MiB", ".MiB", "-5MiB", "5", "5 pages", "", -5, 1.5, True])
def test_a_wrong_workspace_is_named(workspace):
    with pytest.raises(ValueError, match=f"256MiB.*{re.escape(repr(workspace))}"):
        plan(*LLAMA, workspace=workspace)


def test_workspaces():
    assert [settings.workspace.parse(w) for w in (0, "0B", "1.5GiB", " 2 KB ")] == [0, 0, 3 * 2**29, 2000]
    units = {"B": 1, "KiB": 2**10, "MiB": 2**20, "MB": 10**6, "GB": 10**9}
    assert [settings.workspace.parse(f"1{w}") for w in units] == list(units.values())


def test_a_backend_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(settings, "TRITON_INSTALLED", False)
    assert settings.resolve_backend(torch.zeros(1)) == "torch"
    with pytest.raises(RuntimeError, match="needs the package triton, which is not installed"):
        settings.resolve_backend(torch.zeros(1), "triton")
