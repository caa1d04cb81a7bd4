"""Peak memory of one step inside a library, before and after ``apply``, as a Markdown table.

python -m fused_losses.bench.trainers [transformers|trl|verl|openrlhf] [--tokens 1024] [--vocab V] [--workspace 64MiB]; models
have hidden size 64, two layers and fp32 unless stated otherwise, so that they hold little but logits.
"""

# mypy: disable-error-code="import-not-found,import-untyped"
from __future__ import annotations

import argparse
import importlib
import importlib.machinery
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from .. import settings
from ..integrations.patching import check_version
from .environment import made_on
from .memory import peak_bytes

LLAMA3 = 128_256
MODELS = {"Llama 3": ("Llama", LLAMA3), "Qwen 3": ("Qwen3", 151_936), "Gemma 2, softcap": ("Gemma2", 256_000)}
HIDDEN = 64


class Case(NamedTuple):
    cells: list[str]  # of the table's row, before the measured ones
    module: nn.Module  # its parameters get the gradients
    steps: list[Callable[[], Any]]
    target: tuple[Any, ...] = ()  # what `apply` and `unapply` take


def model(vocab: int, tokens: int, family: str = "Llama") -> Any:
    import transformers

    sizes = {"hidden_size": HIDDEN, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": tokens}
    config = getattr(transformers, f"{family}Config")
    return getattr(transformers, f"{family}ForCausalLM")(config(vocab_size=vocab, tie_word_embeddings=True, **sizes))


def of_transformers(tokens: int, vocab: int | None) -> Iterator[Case]:
    def train(whole: Any, ids: Tensor) -> None:
        whole(input_ids=ids, labels=ids).loss.backward()

    def evaluate(whole: Any, ids: Tensor) -> Any:
        with torch.no_grad():
            return whole(input_ids=ids, labels=ids).loss

    for name, (family, own) in MODELS.items():
        size = vocab or own
        for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
            ids, whole = torch.randint(3, size, (2, tokens // 2)), model(size, tokens, family).to(dtype)
            cells = [f"{name}, {size}" if short == "fp32" else "", short, mebibytes(tokens * size * dtype.itemsize)]
            yield Case(cells, whole, [partial(train, whole, ids), partial(evaluate, whole, ids)], (whole,))


def of_trl(tokens: int, vocab: int | None) -> Iterator[Case]:
    """One loss and its gradients, of four sequences: all completion, or all but one token where a prompt is required."""
    import datasets
    import tokenizers
    import trl
    from transformers import PreTrainedTokenizerFast
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    vocab = vocab or LLAMA3
    ids = torch.randint(4, vocab, (4, tokens // 4))
    mask, signs = torch.ones_like(ids), torch.tensor([1, -1, 1, -1])
    batch = {"input_ids": ids, "attention_mask": mask}
    labelled, completed = batch | {"labels": ids}, batch | {"completion_mask": mask}
    pairs = {f"{name}_{key}": x[i::2] for i, name in enumerate(("chosen", "rejected")) for key, x in labelled.items()}
    unpaired = completed | {f"KL_{key}": x for key, x in completed.items()} | {"label": signs > 0}
    parts = {"prompt_ids": ids[:, :1], "prompt_mask": mask[:, :1]}
    parts |= {"completion_ids": ids[:, 1:], "completion_mask": mask[:, 1:]}
    taught = parts | {"teacher_input_ids": ids, "teacher_attention_mask": mask}
    all_logits = partial(SDFTConfig, distillation_mode="full_logits", teacher_model_kind="live")
    scored = parts | {"advantages": signs.float(), "num_items_in_batch": mask[:, 1:].sum()}
    teacher, reference = {"teacher_model": model(vocab, tokens)}, {"ref_model": model(vocab, tokens)}
    reward = {"reward_funcs": lambda completions, **columns: [0.0] * len(completions)}
    trainers: list[tuple[str, Any, Any, str, dict[str, Any], dict[str, Any]]] = [
        ("CPO", CPOTrainer, CPOConfig, "prompt chosen rejected", {}, pairs),
        ("ORPO", ORPOTrainer, ORPOConfig, "prompt chosen rejected", {}, pairs),
        ("GKD, two sets of logits", GKDTrainer, GKDConfig, "messages", teacher, labelled),
        ("SDFT, two sets of logits", SDFTTrainer, all_logits, "prompt privileged_context", {}, taught),
        ("online DPO, without its generation", OnlineDPOTrainer, OnlineDPOConfig, "prompt", reference | reward, parts),
        ("SFT", trl.SFTTrainer, trl.SFTConfig, "prompt completion", {}, labelled),
        ("DPO", trl.DPOTrainer, trl.DPOConfig, "prompt chosen rejected", reference, completed),
        ("KTO", trl.KTOTrainer, trl.KTOConfig, "prompt completion label", reference, unpaired),
        ("GRPO, without its generation", trl.GRPOTrainer, trl.GRPOConfig, "prompt", reward, scored),
    ]

    # A trainer requires a tokenizer and a row of text. What it makes of them is not used: its batches are those above.
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    words = tokenizers.models.WordLevel({word: i for i, word in enumerate(special.values())}, "<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words), **special)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = {"prompt": "a", "completion": "b", "chosen": "b", "rejected": "c", "label": True, "messages": turns}
    row["privileged_context"] = "b"
    plain = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": []}
    datasets.disable_progress_bars()

    def step(trainer: Any, inputs: dict[str, Any]) -> None:
        if isinstance(trainer, OnlineDPOTrainer):  # whose compute_loss generates too
            trainer._forward(trainer.model, *inputs.values()).sum().backward()
        else:
            trainer.compute_loss(trainer.model, dict(inputs)).backward()

    with tempfile.TemporaryDirectory() as folder:
        for name, trainer_class, config, columns, models, inputs in trainers:
            trainer = trainer_class(
                model=model(vocab, tokens),
                args=config(output_dir=folder, **plain),
                train_dataset=datasets.Dataset.from_list([{column: row[column] for column in columns.split()}] * 8),
                processing_class=tokenizer,
                **models,
            )
            trainer.model.train()
            trainer.current_gradient_accumulation_steps = 1  # `train` sets it
            yield Case([name], trainer.model, [partial(step, trainer, inputs)])


def of_verl(tokens: int, vocab: int | None) -> Iterator[Case]:
    """The head alone: both outputs, both gradients."""
    import verl.utils.experimental.torch_functional as heads

    vocab = vocab or LLAMA3
    ids = torch.randint(vocab, (tokens,))
    inputs = nn.ParameterList([torch.randn(tokens, HIDDEN), torch.randn(vocab, HIDDEN)])

    def step() -> None:
        log_probs, entropy = heads.FusedLinearForPPO()(*inputs, ids)
        (log_probs.sum() + entropy.sum()).backward()

    yield Case(["FusedLinearForPPO"], inputs, [step])


def of_openrlhf(tokens: int, vocab: int | None) -> Iterator[Case]:
    """Log-probs of four sequences, all of whose tokens but the first are actions."""
    if importlib.util.find_spec("flash_attn") is None:  # it needs a GPU; nothing of it runs here
        for name in ("flash_attn", "flash_attn.bert_padding", "flash_attn.utils", "flash_attn.utils.distributed"):
            sys.modules[name] = MagicMock(__spec__=importlib.machinery.ModuleSpec(name, None))
    from openrlhf.models import Actor

    vocab = vocab or LLAMA3
    actor = Actor(model(vocab, tokens))
    actor.packing_samples = False
    ids = torch.randint(vocab, (4, tokens // 4))
    mask = torch.ones_like(ids)
    yield Case(["Actor"], actor, [lambda: actor(ids, mask[:, 1:], attention_mask=mask).sum().backward()])


LIBRARIES = {
    "transformers": (
        of_transformers,
        "vocabulary of | dtype | logits | training, before | after | evaluation, before | after",
    ),
    "trl": (of_trl, "trainer | before | after"),
    "verl": (of_verl, "head | before | after"),
    "openrlhf": (of_openrlhf, "model | before | after"),
}


def peaks(case: Case, integration: Any, workspace: str) -> list[int]:
    """Peak bytes of each step, before and after ``apply``."""
    found = []
    for step in case.steps:
        for change in (integration.unapply, integration.apply):
            change(*case.target)
            case.module.zero_grad()  # not measured: what it frees would lower the peak
            with settings.workspace(workspace):
                found.append(peak_bytes(step))
    integration.unapply(*case.target)
    return found


def mebibytes(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("library", nargs="?", choices=LIBRARIES, default="transformers")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocab", type=int, help=f"default: {LLAMA3}; with transformers, each model's own")
    parser.add_argument("--workspace", default="64MiB")
    options = parser.parse_args(argv)
    integration = importlib.import_module(f"fused_losses.integrations.{options.library}")
    try:
        check_version(options.library, integration.TESTED)
    except ImportError as error:
        raise SystemExit(str(error)) from None
    print(made_on("cpu", *dict.fromkeys(("torch", "transformers", options.library))) + "\n")
    cases, header = LIBRARIES[options.library]
    print(f"| {header} |\n|{'---|' * (header.count('|') + 1)}")
    for case in cases(options.tokens, options.vocab):
        sizes = map(mebibytes, peaks(case, integration, options.workspace))
        print(f"| {' | '.join([*case.cells, *sizes])} |", flush=True)


if __name__ == "__main__":
    main()
