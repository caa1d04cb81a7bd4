"""Fine-tune a transformers model with its own Trainer; the only line that is ours is ``apply(model)``.

Needs `pip install transformers accelerate`; downloads nothing and runs on a CPU.
"""

from __future__ import annotations

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from fused_losses.integrations.transformers import apply

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    tie_word_embeddings=True,
)
model = LlamaForCausalLM(config)  # yours: AutoModelForCausalLM.from_pretrained(…)
apply(model)

documents = [torch.arange(start, start + 32) % 100 for start in range(100)]  # counting
data = [{"input_ids": ids, "labels": ids} for ids in documents]

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=60,
            per_device_train_batch_size=16,
            learning_rate=2e-2,
            logging_steps=20,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:16])
        trainer.train()
        print(f"evaluation loss {trainer.evaluate()['eval_loss']:.4f}")
    continued = model.generate(documents[40][None, :8], max_new_tokens=4, do_sample=False, pad_token_id=0)
    print("after 40 … 47:", continued[0, 8:].tolist())
