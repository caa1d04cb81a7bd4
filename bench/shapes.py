"""Heads of real models, by name. Shapes are data: to bench another model, add a line.

Sizes are those of the models' published configurations, without padding of the vocabulary beyond theirs.
"""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    name: str
    vocab: int
    hidden: int
    tokens: int = 8192  # in a step, unless --tokens says otherwise


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("stories15m", 32_000, 288),
        Shape("smollm2-135m", 49_152, 576),
        Shape("gpt2", 50_257, 768),
        Shape("gemma3-270m", 262_144, 640),
        Shape("qwen2.5-0.5b", 151_936, 896),
        Shape("qwen3-1.7b", 151_936, 2048, 16_384),
        Shape("gemma2-2b", 256_000, 2304),
        Shape("gpt-oss-20b", 201_088, 2880),
        Shape("llama2-7b", 32_000, 4096),
        Shape("mistral-7b", 32_768, 4096),
        Shape("llama3-8b", 128_256, 4096),
        Shape("qwen3-8b", 151_936, 4096),
        Shape("phi4", 100_352, 5120),
        Shape("deepseek-v3", 129_280, 7168),
        Shape("llama3-70b", 128_256, 8192),
    )
}
ALIASES = {"A": "llama3-8b", "B": "gemma2-2b", "C": "qwen3-1.7b"}  # the three of the published comparisons


def find(name: str) -> Shape:
    """The shape of that name.

    Raises:
        ValueError: no such name; lists those there are.

    Example:
        >>> find("A")
        Shape(name='llama3-8b', vocab=128256, hidden=4096, tokens=8192)
    """
    name = ALIASES.get(name, name)
    if name not in SHAPES:
        raise ValueError(
            f"unknown shape {name!r}; choose from {', '.join([*ALIASES, *SHAPES])}, or give --vocab and --hidden"
        )
    return SHAPES[name]
