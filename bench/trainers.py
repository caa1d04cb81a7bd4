"""Peak memory of a training step and of an evaluation with transformers, before and after ``apply``, as a Markdown table.

python -m fused_losses.bench.trainers [--tokens 1024] [--workspace 64MiB]; two layers of hidden size 64 before the vocabularies
of three models, so that little but logits is held.
"""

# mypy: disable-error-code="import-not-found,import-untyped"
from __future__ import annotations

import argparse
from typing import Any

import torch

from .. import settings
from ..integrations.transformers import apply, unapply
from .environment import environment
from .memory import peak_bytes

MODELS = {"Llama 3": ("Llama", 128_256), "Qwen 3": ("Qwen3", 151_936), "Gemma 2, softcap": ("Gemma2", 256_000)}
MiB = 2**20


def model(family: str, vocab: int, tokens: int) -> Any:
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": tokens}
    config = getattr(transformers, f"{family}Config")
    return getattr(transformers, f"{family}ForCausalLM")(config(vocab_size=vocab, tie_word_embeddings=True, **sizes))


def peaks(whole: Any, ids: torch.Tensor, workspace: str) -> list[int]:
    """Of training before and after, of evaluation before and after."""

    def train() -> None:
        whole(input_ids=ids, labels=ids).loss.backward()

    def evaluate() -> Any:
        with torch.no_grad():
            return whole(input_ids=ids, labels=ids).loss

    found = []
    for step in (train, evaluate):
        unapply(whole)
        found.append(peak_bytes(step))
        apply(whole)
        whole.zero_grad()  # outside: what it frees would be taken off the peak
        with settings.workspace(workspace):
            found.append(peak_bytes(step))
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--workspace", default="64MiB")
    options = parser.parse_args(argv)
    where = environment("cpu")
    print(f"{where['device']}; torch {where['versions']['torch']}; commit {str(where['commit'])[:12]}\n")
    print("| vocabulary of | dtype | logits | training, before | after | evaluation, before | after |")
    print("|---|---|---|---|---|---|---|")
    for name, (family, vocab) in MODELS.items():
        for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
            ids = torch.randint(3, vocab, (2, options.tokens // 2))
            logits = options.tokens * vocab * dtype.itemsize
            found = peaks(model(family, vocab, options.tokens).to(dtype), ids, options.workspace)
            sizes = " | ".join(f"{size / MiB:.0f} MiB" for size in (logits, *found))
            print(f"| {f'{name}, {vocab}' if short == 'fp32' else ''} | {short} | {sizes} |", flush=True)


if __name__ == "__main__":
    main()
