"""What a gradient filter leaves out: train one model with it and one without, then measure the share multiplied and the error.

    python examples/gradient_filter.py [--steps 300] [--filter-exponent -12]    # with rich and matplotlib installed

The text is the source code of Python's standard library, the vocabulary its words. Both models start from the same weights and
see the same batches, in turn: on two cores this takes a quarter of an hour or longer, with ``--steps 5`` about a minute. A
second table then shows, for the exact model on unseen text, the share of columns that each filter multiplies and the errors of
the gradients of the head's hidden states and weight, and for comparison the errors of products in bf16.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import time

import torch
import torch.nn.functional as F
from demo import next_token_loss, read_text
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tiny_transformer import TinyTransformer
from torch import Tensor

from fused_losses import gradient_filter
from fused_losses.linear_logits import LinearLogits
from fused_losses.products import few_columns

EXPONENTS = (-10, -12, -14, -16)


def gradients(hidden: Tensor, weight: Tensor, target: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    with gradient_filter(epsilon):
        loss = F.cross_entropy(LinearLogits(hidden, weight), target)
    return torch.autograd.grad(loss, (hidden, weight))


def large_alone(hidden: Tensor, weight: Tensor, target: Tensor, epsilon: float) -> tuple[float, Tensor]:
    """The share of the columns that backward multiplies, and d_hidden if the other columns were dropped."""
    d_logits = ((hidden @ weight.T).softmax(-1) - F.one_hot(target, len(weight))) / len(hidden)
    few = few_columns(d_logits, epsilon)
    columns = slice(None) if few is None else few.columns
    return d_logits[:, columns].shape[1] / len(weight), d_logits[:, columns] @ weight[columns]


def error(found: Tensor, exact: Tensor) -> float:
    return (torch.linalg.vector_norm(found.float() - exact) / torch.linalg.vector_norm(exact)).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--filter-exponent", type=int, default=-12, help="of two, in training")
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--batch", type=int, default=16, help="sequences of 128 tokens per step")
    options = parser.parse_args()
    text, length, console = read_text(options.vocab), 128, Console()
    unseen = text[-32 * length :].view(-1, length)

    torch.manual_seed(0)
    names = ("exact", f"filter 2^{options.filter_exponent}")
    model = TinyTransformer(options.vocab, hidden=options.hidden, positions=length)
    models = dict(zip(names, (model, copy.deepcopy(model)), strict=True))
    settings = (contextlib.nullcontext, lambda: gradient_filter(2.0**options.filter_exponent))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=2e-3) for m in models.values()]
    ratios = []
    for step in track(range(options.steps), f"{options.batch} × {length} tokens a step"):
        starts = torch.randint(0, len(text) - 33 * length, (options.batch,))
        ids = torch.stack([text[s : s + length] for s in starts])
        seconds = []
        for m, optimizer, setting in zip(models.values(), optimizers, settings, strict=True):
            optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 100) * (1 - step / options.steps)
            begin = time.perf_counter()
            with setting():
                next_token_loss(m(ids), ids).backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - begin)
        ratios.append(seconds[1] / seconds[0])
    with torch.no_grad():
        losses = [next_token_loss(m(unseen), unseen).item() for m in models.values()]
        hidden = model.hidden(unseen[:, :-1]).flatten(0, 1)
    table = Table(
        title=f"{options.steps} steps, {options.vocab} words, hidden {options.hidden}, torch {torch.__version__}"
    )
    for column in ("", "loss on unseen text", "time of a step"):
        table.add_column(column, justify="left" if not column else "right")
    for name, loss, ratio in zip(names, losses, (1.0, sorted(ratios)[len(ratios) // 2]), strict=True):
        table.add_row(name, f"{loss:.4f}", f"{ratio:.2f}")
    console.print(table)

    inputs = (hidden.requires_grad_(), model.head.weight, unseen[:, 1:].flatten())
    exact = gradients(*inputs, 0.0)
    table = Table(title=f"{len(hidden)} tokens at a time")
    for column in ("", "columns multiplied", "error of d_hidden", "others dropped", "error of d_weight"):
        table.add_column(column, justify="left" if not column else "right")
    for exponent in EXPONENTS:
        share, dropped = large_alone(*(t.detach() for t in inputs), 2.0**exponent)
        d_hidden, d_weight = gradients(*inputs, 2.0**exponent)
        errors = (error(d_hidden, exact[0]), error(dropped, exact[0]), error(d_weight, exact[1]))
        table.add_row(f"filter 2^{exponent}", f"{share:.2f}", *(f"{e:.1e}" for e in errors))
    d_hidden, d_weight = gradients(*(t.bfloat16() if t.is_floating_point() else t for t in inputs), 0.0)
    errors_in_bf16 = [f"{error(a, b):.1e}" for a, b in ((d_hidden, exact[0]), (d_weight, exact[1]))]
    table.add_row("all, in bf16", "1.00", errors_in_bf16[0], "", errors_in_bf16[1])
    console.print(table)


if __name__ == "__main__":
    main()
