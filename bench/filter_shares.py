"""Share of a head's columns that ``gradient_filter`` multiplies, of the first planned chunk of Zipf inputs.

python -m fused_losses.bench.filter_shares [SHAPE[:TOKENS[:DTYPE]] …] [--filter 6.1e-5]
"""

from __future__ import annotations

import argparse

import torch

from ..planning import plan
from ..products import few_columns
from .environment import made_on
from .problem import Problem, head_inputs
from .shapes import find


def share(problem: Problem, gradient_filter: float) -> tuple[int, float]:
    """Tokens per chunk, and the share; 1 where no filter is used because more than half of the columns are large."""
    shape, dtype = problem.shape, problem.dtype
    tokens = plan(problem.tokens, shape.vocab, shape.hidden, dtype, gradient_filter=gradient_filter).chunk
    x = head_inputs(problem, (tokens,))
    d_logits = torch.softmax(x["hidden"] @ x["weight"].t(), -1)
    d_logits[torch.arange(tokens), x["target"]] -= 1
    few = few_columns(d_logits, gradient_filter)
    return tokens, 1.0 if few is None else len(few.columns) / shape.vocab


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("heads", nargs="*", default=["A", "B", "C", "smollm2-135m:2048:float32"])
    parser.add_argument("--filter", type=float, default=2**-14)
    options = parser.parse_args(argv)
    print(made_on("cpu", "torch") + "\n")
    print("| head | tokens of a chunk | share multiplied |\n|---|---|---|")
    for head in options.heads:
        name, tokens, dtype = (*head.split(":"), "", "")[:3]
        shape = find(name)
        problem = Problem(shape, int(tokens or shape.tokens), getattr(torch, dtype or "bfloat16"), "zipf", "cpu")
        chunk, found = share(problem, options.filter)
        print(f"| {name} | {chunk} | {found:.2f} |", flush=True)


if __name__ == "__main__":
    main()
