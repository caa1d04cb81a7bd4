"""Loss code that was written for logits and never heard of LinearLogits, run unchanged."""

import copy
import dataclasses
import pathlib
import re
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fused_losses import settings
from fused_losses.bench.memory import peak_bytes
from fused_losses.linear_head import LinearHead
from fused_losses.linear_logits import LinearLogits

B, S, V, H = 2, 6, 13, 8


class ShiftedLoss(nn.Module):
    """As OpenRLHF and many scripts write it."""

    def __init__(self, ignore_index=-100):
        super().__init__()
        self.loss = nn.CrossEntropyLoss(ignore_index=ignore_index)

    def forward(self, logits, labels):
        shift_logits = logits[..., :-1, :].contiguous()
        shift_labels = labels[..., 1:].contiguous()
        return self.loss(shift_logits.view(-1, shift_logits.size(-1)), shift_labels.view(-1))


def log_probs_from_logits(logits, labels):
    return F.log_softmax(logits, dim=-1).gather(dim=-1, index=labels.unsqueeze(-1)).squeeze(-1)


def log_probs_by_difference(logits, index):
    """As TRL writes it for 32-bit logits."""
    squeeze = index.ndim == logits.ndim - 1
    index = index.unsqueeze(-1) if squeeze else index
    selected = torch.gather(logits, dim=-1, index=index)
    logsumexp = torch.stack([torch.logsumexp(row, dim=-1) for row in logits])
    selected = selected - logsumexp.unsqueeze(-1)
    return selected.squeeze(-1) if squeeze else selected


def log_probs_by_row(logits, index):
    """As TRL writes it for 16-bit logits."""
    rows = []
    for row_logits, row_labels in zip(logits, index, strict=True):
        row = F.log_softmax(row_logits, dim=-1)
        rows.append(row.gather(dim=-1, index=row_labels.unsqueeze(-1)).squeeze(-1))
    return torch.stack(rows)


def entropy_from_logits(logits):
    """As verl writes it."""
    pd = torch.nn.functional.softmax(logits, dim=-1)
    return torch.logsumexp(logits, dim=-1) - torch.sum(pd * logits, dim=-1)


def entropy_in_chunks(logits, chunk_size=4):
    """As TRL writes it."""
    flat = logits.reshape(-1, logits.shape[-1])
    entropies = []
    for chunk in flat.split(chunk_size, dim=0):
        logps = F.log_softmax(chunk, dim=-1)
        entropies.append(-(torch.exp(logps) * logps).sum(-1))
    return torch.cat(entropies, dim=0).reshape(logits.shape[:-1])


def grpo_step(logits, ids):
    """Temperature, shift, log-probs, entropy and a clipped loss, as a trainer's step has them."""
    logits = logits[:, :-1, :]
    logits = logits[:, -4:] / 0.9
    logps = log_probs_from_logits(logits, ids[:, -4:])
    ratio = torch.exp(logps - (logps.detach() + 0.3 * torch.sin(torch.arange(4.0))))
    advantages = torch.tensor([[1.0], [-1.0]])
    loss = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
    return loss - 0.01 * entropy_from_logits(logits).mean()


def dpo_step(logits, ids):
    logps = log_probs_by_difference(logits[:, :-1], ids[:, 1:]).sum(-1)
    chosen, rejected = logps.chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def kd_step(logits, ids):
    teacher = torch.linspace(-1, 1, B * S * V).sin().view(B, S, V)
    soft = F.kl_div(F.log_softmax(logits / 2.0, dim=-1), F.softmax(teacher / 2.0, dim=-1), reduction="batchmean")
    return soft * 4.0 + ShiftedLoss()(logits, ids)


def accuracy_and_confidence(logits, ids):
    logps, predictions = logits.log_softmax(-1).max(dim=-1)
    return (predictions == ids).float().mean() + logps.mean()


LOSSES = {
    "shifted": ShiftedLoss(),
    "shifted_ignoring": ShiftedLoss(ignore_index=3),
    "log_probs_from_logits": lambda z, ids: log_probs_from_logits(z, ids).sum(),
    "log_probs_by_difference": lambda z, ids: log_probs_by_difference(z, ids).mean(),
    "log_probs_by_difference_of_several": lambda z, ids: log_probs_by_difference(
        z, ids.unsqueeze(-1).expand(B, S, 2)
    ).mean(),
    "log_probs_by_row": lambda z, ids: log_probs_by_row(z, ids).mean(),
    "entropy_from_logits": lambda z, ids: entropy_from_logits(z).mean(),
    "entropy_in_chunks": lambda z, ids: entropy_in_chunks(z).mean(),
    "grpo": grpo_step,
    "dpo": dpo_step,
    "distillation": kd_step,
    "accuracy": accuracy_and_confidence,
}


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (B, S), generator=g)
    hidden = torch.randn(B, S, H, generator=g).requires_grad_()
    head = nn.Linear(H, V)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
    return hidden, head, ids


def assert_same_training(loss, ids, labels=None):
    """The same number and the same gradients from a head that makes logits and from one that does not."""
    results = []
    for lazy in (False, True):
        hidden, head, _ = batch()
        with settings.strict(lazy):
            found = loss((LinearHead.from_linear(head) if lazy else head)(hidden), ids)
        found.backward()
        results.append((found, hidden.grad, head.weight.grad, head.bias.grad))
    torch.testing.assert_close(*results)
    assert results[0][1].abs().max() > 0


@pytest.mark.parametrize("name", LOSSES)
def test_unchanged_loss(name):
    assert_same_training(LOSSES[name], batch()[2])


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)])
@pytest.mark.parametrize("shifted", [False, True])
def test_transformers_causal_lm_loss(num_items, shifted):
    loss_utils = pytest.importorskip("transformers.loss.loss_utils")
    ids = batch()[2].masked_fill(torch.arange(S) == 2, -100)

    def loss(logits, labels):
        shift = {"shift_labels": labels} if shifted else {}
        return loss_utils.ForCausalLMLoss(logits, labels, V, num_items_in_batch=num_items, **shift)

    assert_same_training(loss, ids)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("num_items", [None, 5])
def test_transformers_label_smoother(shift, num_items):
    pytest.importorskip("accelerate")
    utils = pytest.importorskip("transformers.trainer_pt_utils")
    ids = batch()[2].masked_fill(torch.arange(S) == 2, -100)
    smoother = utils.LabelSmoother(epsilon=0.2)

    def loss(logits, labels):
        return smoother({"logits": logits}, labels, shift_labels=shift, num_items_in_batch=num_items)

    assert_same_training(loss, ids)


@pytest.mark.parametrize("several", [False, True])
def test_trl_helpers(several):
    utils = pytest.importorskip("trl.trainer.utils")

    def loss(logits, ids):
        index = torch.stack([ids, ids.flip(0)], -1) if several else ids
        return utils.selective_log_softmax(logits, index).mean() + utils.entropy_from_logits(logits).mean()

    assert_same_training(loss, batch()[2])


def takes_a_pointer_kernel(logits, index):
    """How TRL decides whether its Triton kernel reads the logits."""
    return (
        logits.device.type in ("cuda", "xpu")
        and logits.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and 1 <= logits.ndim <= 3
        and logits.stride(-1) == 1
        and logits.shape[-1] > 0
        and index.shape == logits.shape[:-1]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_that_read_through_pointers_decline(dtype, monkeypatch):
    hidden, head, ids = batch()
    lazy = LinearLogits(hidden.to(dtype), head.weight.to(dtype))
    eager = lazy.materialize()
    for kind in (LinearLogits, torch.Tensor):
        monkeypatch.setattr(kind, "device", property(lambda _: torch.device("cuda")))
    with settings.strict():
        assert takes_a_pointer_kernel(eager, ids)
        assert not takes_a_pointer_kernel(lazy, ids)
        assert not takes_a_pointer_kernel(lazy[:, 1:].transpose(0, 1).transpose(0, 1), ids[:, 1:])


def cross_entropy_in_float32(logits, labels):
    return F.cross_entropy(logits.float().transpose(1, 2), labels)


class HandWritten(torch.autograd.Function):
    """Trainers that split the sequence or the vocabulary have such functions, with a backward of their own."""

    @staticmethod
    def forward(ctx, logits, labels):
        return cross_entropy_in_float32(logits, labels)


class InFloat32(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, logits, labels):
        return cross_entropy_in_float32(logits, labels)


class WithSetup(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        return cross_entropy_in_float32(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


@pytest.mark.parametrize("function", [HandWritten, InFloat32, WithSetup])
@pytest.mark.parametrize(
    "of", [lambda z: z, lambda z: z[:, 1:], lambda z: z.log_softmax(-1)], ids=["logits", "view", "form"]
)
def test_an_autograd_function_refuses_what_would_get_no_gradient(of, function):
    hidden, head, ids = batch()
    lazy = of(LinearHead.from_linear(head)(hidden))
    ids = ids[:, : lazy.shape[1]]
    with pytest.raises(RuntimeError, match=rf"given to {function.__name__}.apply would get no gradient.*materialize"):
        function.apply(lazy, ids)
    expected = function.apply(lazy.materialize(), ids)
    assert expected.requires_grad
    with torch.no_grad():
        without = of(LinearHead.from_linear(head)(hidden))
    for logits in (without, lazy.detach()):
        torch.testing.assert_close(function.apply(logits, ids), expected.detach())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_refuses_logits_alone():
    def loss(logits, *tensors):
        return ShiftedLoss()(logits, ids)

    hidden, head, ids = batch()
    lazy = LinearHead.from_linear(head)(hidden)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        checkpoint(loss, lazy, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        checkpoint(loss, lazy, torch.ones(()), use_reentrant=True)
    assert_same_training(lambda z, _: checkpoint(loss, z, use_reentrant=False), ids)
    scale = torch.ones((), requires_grad=True)  # its gradient makes the checkpoint run the loss again
    assert_same_training(lambda z, _: checkpoint(loss, z, scale, use_reentrant=True), ids)


def mixed_divergence(logits, teacher):
    """As DistiLLM writes it: sums of softmax and log_softmax, whose gradients cancel up to a small remainder."""
    p, log_p = logits.softmax(-1, dtype=torch.float32), logits.log_softmax(-1, dtype=torch.float32)
    q = teacher.softmax(-1, dtype=torch.float32)
    mixed = torch.log(0.1 * q + 0.9 * p)
    impossible = teacher.isinf()
    return ((p * log_p).masked_fill(impossible, 0) - (p * mixed).masked_fill(impossible, 0)).sum(-1).mean()


@pytest.mark.filterwarnings("ignore:.*materialises")
def test_expressions_of_16_bit_logits_share_one_gradient():
    """However often the logits are materialised, gradients that cancel do so before they are rounded."""
    start, head, _ = batch()
    grads = {}
    for kind in ("exact", "eager", "lazy"):
        dtype = torch.float64 if kind == "exact" else torch.bfloat16
        hidden = start.detach().bfloat16().to(dtype).requires_grad_()
        weight = head.weight.detach().bfloat16().to(dtype).requires_grad_()
        logits = LinearLogits(hidden, weight) if kind == "lazy" else hidden @ weight.T
        mixed_divergence(logits, torch.linspace(-4, 4, B * S * V).sin().view(B, S, V).to(dtype) * 2).backward()
        grads[kind] = torch.cat([hidden.grad.flatten(), weight.grad.flatten()]).double()
    errors = {kind: (grads[kind] - grads["exact"]).norm() for kind in ("eager", "lazy")}
    assert 0 < errors["lazy"] < errors["eager"] < 0.1 * grads["exact"].norm()


@pytest.mark.filterwarnings("ignore:.*materialises")
@pytest.mark.parametrize("kept", ["materialised", "lazy"])
def test_a_target_made_of_the_same_16_bit_logits(kept):
    """As open-unlearning writes CEU and UNDIAL: the target differs from the student's probabilities by little."""
    start, head, _ = batch()
    start, weight = (t.detach().bfloat16() for t in (start, head.weight))
    grads = {}
    for kind in ("exact", "eager", "lazy"):
        dtype = torch.float64 if kind == "exact" else torch.bfloat16
        hidden, leaf = (t.to(dtype, copy=True).requires_grad_() for t in (start, weight))
        z = LinearLogits(hidden, leaf) if kind == "lazy" else hidden @ leaf.T
        own = z.detach()
        if kind == "lazy" and kept == "materialised":
            own = own.materialize()
        z, own = (t if kind == "exact" else t.float() for t in (z, own))
        F.cross_entropy(z.flatten(0, 1), (own * 1.02).softmax(-1).flatten(0, 1)).backward()
        grads[kind] = torch.cat([hidden.grad.flatten(), leaf.grad.flatten()]).double()
    errors = {kind: (grads[kind] - grads["exact"]).norm() for kind in ("eager", "lazy")}
    assert errors["lazy"] <= 2 * errors["eager"] < 0.1 * grads["exact"].norm()


def tiny_llama(transformers):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        {"label_smoothing_factor": 0.1},
        {"bf16": True},
    ],
    ids=lambda o: "_".join(o) or "plain",
)
def test_trainer_runs_a_model_whose_head_is_lazy(tmp_path, options):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 64, (24, 12))]
    start = tiny_llama(transformers)
    logs, trained = [], []
    for lazy in (False, True):
        model = copy.deepcopy(start)
        if lazy:
            model.lm_head = LinearHead.from_linear(model.lm_head)
            assert model.lm_head.weight is model.model.embed_tokens.weight
            assert isinstance(model(data[0]["input_ids"][None]).logits, LinearLogits)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=0.1,
            optim="sgd",  # Adam would magnify the rounding error of a gradient near 0
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            seed=1,
            disable_tqdm=True,
            prediction_loss_only=True,
            **options,
        )
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:4])
        with settings.strict(lazy):
            trainer.train()
            evaluated = trainer.evaluate()["eval_loss"]
        logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry] + [evaluated])
        trained.append(model.lm_head.weight.detach())
    assert len(logs[0]) == 4
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if "bf16" in options else {}
    torch.testing.assert_close(*(torch.tensor(log) for log in logs), **({"rtol": 1e-4, "atol": 1e-4} | tolerance))
    assert not torch.equal(trained[1], start.lm_head.weight)
    if "bf16" not in options:
        torch.testing.assert_close(*trained, rtol=1e-3, atol=1e-4)


def map_fields(fn, x):
    """How Lightning casts a module's output: a deep copy, with the fields in its memo; the cast fields are set afterwards."""
    if isinstance(x, torch.Tensor):
        return fn(x)
    if not dataclasses.is_dataclass(x):
        return x
    fields = {field.name: getattr(x, field.name) for field in dataclasses.fields(x)}
    mapped = copy.deepcopy(x, {id(value): value for value in fields.values()})
    for name, value in fields.items():
        setattr(mapped, name, map_fields(fn, value))
    return mapped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of", [lambda z: z, lambda z: z.log_softmax(-1)], ids=["logits", "form"])
def test_fields_mapped_on_a_copy_share_the_head(of, dtype):
    start, plain, ids = batch()
    results = []
    for mapped in (False, True):
        head = LinearHead.from_linear(copy.deepcopy(plain)).to(dtype)
        hidden = start.detach().to(dtype).requires_grad_()
        logits = of(head(hidden).float())
        if mapped:
            assert peak_bytes(partial(map_fields, lambda t: t, logits)) == 0
            logits = map_fields(torch.Tensor.float, map_fields(torch.Tensor.clone, logits))
        assert logits.dtype == torch.float32
        with settings.strict():
            loss = F.nll_loss(logits.log_softmax(-1).transpose(1, 2), ids)
        loss.backward()
        results.append((loss, hidden.grad, head.weight.grad, head.bias.grad))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_cast_of_fields_is_one_of_the_label():
    hidden, head, _ = batch()
    logits = LinearHead.from_linear(head).bfloat16()(hidden.detach().bfloat16())
    cast = map_fields(torch.Tensor.float, logits)
    assert cast.dtype == torch.float32
    assert torch.equal(cast.materialize(), logits.float().materialize())


def test_another_hidden_has_other_numbers():
    hidden, head, _ = batch()
    logits = LinearHead.from_linear(head)(hidden)
    logits.logsumexp(-1), logits.detach()
    logits.hidden = hidden * 2
    assert torch.equal(logits.logsumexp(-1), LinearHead.from_linear(head)(hidden * 2).logsumexp(-1))
    assert torch.equal(logits.detach().materialize(), head(hidden * 2).detach())


def test_the_page_has_a_forward_to_train_and_sample_with():
    page = (pathlib.Path(__file__).parents[1] / "docs" / "trainers.md").read_text(encoding="utf-8")
    section = page.partition("\n## Your own loop\n")[2].partition("\n## ")[0]
    names = {}
    exec(section.partition("```python\n")[2].partition("```")[0], names)
    _, head, ids = batch()
    model = type("Model", (nn.Module,), {"forward": names["forward"]})()
    model.body, model.lm_head = nn.Embedding(V, H), LinearHead.from_linear(head)
    with settings.strict():
        loss = model(ids, ids)
        sampled = model(ids)[:, -1]
    torch.testing.assert_close(loss, F.cross_entropy(head(model.body(ids)).flatten(0, 1), ids.flatten()))
    written = re.search(r"(logits\[.*) = -inf", section)[1]
    exec(f"{written} = -torch.inf", {"logits": sampled, "best": sampled.topk(3).values, "torch": torch})
    assert (sampled.isfinite().sum(-1) == 3).all()


@pytest.mark.parametrize("installed", [True, False])
def test_the_page_has_what_a_library_writes(installed, monkeypatch):
    page = (pathlib.Path(__file__).parents[1] / "docs" / "trainers.md").read_text(encoding="utf-8")
    section = page.partition("\n## In a library of yours\n")[2].partition("\n## ")[0]
    if not installed:
        monkeypatch.setitem(sys.modules, "fused_losses", None)
    names = {}
    exec(section.partition("```python\n")[2].partition("```")[0], names)
    hidden, head, ids = batch()
    logits = names["logits_for_loss"](hidden, head)
    assert isinstance(logits, torch.Tensor) is not installed
    with settings.strict():
        capped = torch.tanh(logits / 5) * 5 / 0.7
        loss = F.cross_entropy(capped.flatten(0, 1), ids.flatten())
    expected = F.cross_entropy((torch.tanh(head(hidden) / 5) * 5 / 0.7).flatten(0, 1), ids.flatten())
    torch.testing.assert_close(loss, expected)
