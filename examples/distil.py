"""Distil a larger tiny transformer into a smaller one on real text: the sources of Python's own standard library.

``python examples/distil.py [picture.png]`` trains a teacher, then three students of one size from the same initial weights: on
the text alone, on the teacher's whole distribution, and on its 16 likeliest tokens, which is all that a remote teacher would
have to send. It prints each model's held-out loss and its distance from the teacher, and plots both over training.
"""

from __future__ import annotations

import collections
import copy
import pathlib
import re
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tiny_transformer import TinyTransformer
from torch import Tensor

from fused_losses.distillation import distillation_loss, sparse_distillation_loss, teacher_topk
from fused_losses.divergence import divergence

Batch = tuple[Tensor, Tensor]  # ids (B, S) and the tokens that follow them
MODULES = (
    "argparse",
    "ast",
    "configparser",
    "dataclasses",
    "datetime",
    "difflib",
    "doctest",
    "enum",
    "inspect",
    "tarfile",
)
HELD_OUT = ("optparse", "shutil")


class Text(NamedTuple):
    train: Tensor  # (tokens,)
    held_out: Tensor  # (tokens,)
    vocab: int


class Curve(NamedTuple):
    """A model's numbers on held-out text during training, in nats per token."""

    steps: list[int]
    loss: list[float]
    from_teacher: list[float]


def read_text(vocab: int = 1024) -> Text:
    """Ids of words, signs, and line breaks with their indentation; the most common are the vocabulary, 0 is any other."""
    library = pathlib.Path(copy.__file__).parent
    train, held_out = (
        re.findall(
            r"\n *| ?[A-Za-z_]+|.", "\n".join((library / f"{name}.py").read_text(encoding="utf-8") for name in names)
        )
        for names in (MODULES, HELD_OUT)
    )
    ids = {word: i + 1 for i, (word, _) in enumerate(collections.Counter(train).most_common(vocab - 1))}
    return Text(*(torch.tensor([ids.get(word, 0) for word in words]) for words in (train, held_out)), vocab)


def batch(tokens: Tensor, generator: torch.Generator, rows: int = 16, length: int = 48) -> Batch:
    starts = torch.randint(len(tokens) - length - 1, (rows, 1), generator=generator)
    places = starts + torch.arange(length + 1)
    return tokens[places[:, :-1]], tokens[places[:, 1:]]


@torch.no_grad()
def measure(model: TinyTransformer, teacher: TinyTransformer | None, text: Text) -> tuple[float, float]:
    ids, labels = batch(text.held_out, torch.Generator().manual_seed(1), rows=64)
    logits = model(ids)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    return loss, 0.0 if teacher is None else divergence(logits, teacher(ids)).mean().item()


def train(
    model: TinyTransformer,
    text: Text,
    steps: int,
    loss_of: Callable[[TinyTransformer, Batch], Tensor],
    teacher: TinyTransformer | None = None,
) -> Curve:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    curve = Curve([], [], [])
    for step in range(steps + 1):
        if step % max(1, steps // 10) == 0 or step == steps:
            loss, from_teacher = measure(model, teacher, text)
            curve.steps.append(step)
            curve.loss.append(loss)
            curve.from_teacher.append(from_teacher)
        loss_of(model, batch(text.train, generator)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return curve


def of_labels(model: TinyTransformer, batch: Batch) -> Tensor:
    ids, labels = batch
    return F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())


def of_teacher(teacher: TinyTransformer) -> Callable[[TinyTransformer, Batch], Tensor]:
    """The teacher's whole distribution and the labels, both in one pass over the student's head."""

    def loss(model: TinyTransformer, batch: Batch) -> Tensor:
        ids, labels = batch
        with torch.no_grad():
            teacher_logits = teacher(ids)
        return distillation_loss(model(ids), teacher_logits, labels, hard_weight=0.2, soft_weight=0.8)

    return loss


def of_top_tokens(teacher: TinyTransformer, k: int = 16) -> Callable[[TinyTransformer, Batch], Tensor]:
    """The teacher's ``k`` likeliest tokens and one bucket for the others."""

    def loss(model: TinyTransformer, batch: Batch) -> Tensor:
        ids, labels = batch
        with torch.no_grad():
            top = teacher_topk(teacher(ids), k)
        logits = model(ids)
        soft = sparse_distillation_loss(logits, *top, labels).loss
        return 0.2 * F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + 0.8 * soft

    return loss


def distil(teacher_steps: int = 150, steps: int = 120, teacher_hidden: int = 96, hidden: int = 24) -> dict[str, Curve]:
    torch.manual_seed(0)
    text = read_text()
    teacher = TinyTransformer(text.vocab, hidden=teacher_hidden, layers=2)
    curves = {"teacher": train(teacher, text, teacher_steps, of_labels)}
    student = TinyTransformer(text.vocab, hidden=hidden, layers=1)
    losses = {"text alone": of_labels, "teacher": of_teacher(teacher), "teacher's top 16": of_top_tokens(teacher)}
    for name, loss_of in losses.items():
        curves[f"student on {name}"] = train(copy.deepcopy(student), text, steps, loss_of, teacher)
    return curves


def draw(curves: dict[str, Curve], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, far = figure.subplots(1, 2)
    loss.axhline(curves["teacher"].loss[-1], color="black", linestyle=":", label="teacher")
    for name, curve in curves.items():
        if name != "teacher":
            loss.plot(curve.steps, curve.loss, label=name)
            far.plot(curve.steps, curve.from_teacher, label=name)
    loss.set(xlabel="step", ylabel="held-out loss, nats per token")
    far.set(xlabel="step", ylabel="KL(teacher ‖ student), nats per token")
    loss.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    torch.set_num_threads(1)  # models this small gain nothing from more
    found = distil()
    print(f"{'':<28}{'held-out loss':>14}{'from the teacher':>18}")
    for name, curve in found.items():
        print(f"{name:<28}{curve.loss[-1]:>14.3f}{curve.from_teacher[-1]:>18.3f}")
    if len(sys.argv) > 1:
        draw(found, sys.argv[1])
