"""A tiny random Llama trained by TRL's DPO and ORPO trainers on fused losses: `apply()` is the only line that is ours.

Needs `pip install trl==1.16.* peft`; downloads nothing and runs on a CPU.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from fused_losses.integrations.trl import apply

PAIRS = {
    "prompt": ["the sky is", "grass is", "snow is", "coal is"],
    "chosen": [" blue", " green", " white", " black"],
    "rejected": [" made of cheese", " a kind of fish", " hot", " loud"],
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    tokenizer.train_from_iterator([], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=64
    )


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def train(trainer: Any, config: Any, folder: str, **models: Any) -> list[float]:
    """The losses of five steps."""
    args = config(
        output_dir=folder,
        max_steps=5,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    data = Dataset.from_dict(PAIRS)
    run = trainer(args=args, train_dataset=data, processing_class=make_tokenizer(), model=make_model(), **models)
    run.train()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def main() -> dict[str, list[float]]:
    apply()
    with tempfile.TemporaryDirectory() as folder:
        return {
            "DPO": train(DPOTrainer, DPOConfig, folder, ref_model=make_model()),
            "ORPO": train(ORPOTrainer, ORPOConfig, folder),
        }


if __name__ == "__main__":
    for name, losses in main().items():
        print(name, *(f"{loss:.4f}" for loss in losses))
