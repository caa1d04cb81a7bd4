"""Axolotl's trainers without logits: a plugin that its YAML file names.

    plugins:
      - fused_losses.integrations.axolotl.FusedLossesPlugin

Each model that Axolotl loads goes through :func:`fused_losses.integrations.transformers.apply`. On a GPU Axolotl replaces TRL's
log-prob and entropy functions by Triton kernels that read stored logits: the plugin puts this package's there, which take any.
"""

from __future__ import annotations

import importlib
from typing import Any

from ..token_statistics import selective_log_softmax
from . import transformers
from .patching import check_version, entropy_from_logits

try:
    from axolotl.integrations.base import BasePlugin  # type: ignore[import-not-found]
except ImportError:  # this module is imported without Axolotl
    BasePlugin = object

TESTED = "0.19"


class FusedLossesPlugin(BasePlugin):
    """Let the models that Axolotl trains, and their references, make no logits where only a loss reads them."""

    def register(self, cfg: Any) -> None:
        check_version("axolotl", TESTED)

    def pre_model_load(self, cfg: Any) -> None:
        if cfg.rl:  # after Axolotl's own patch, before it imports TRL's trainers, which import these by name
            utils = importlib.import_module("trl.trainer.utils")
            utils.selective_log_softmax = selective_log_softmax  # type: ignore[attr-defined]
            utils.entropy_from_logits = entropy_from_logits  # type: ignore[attr-defined]

    def post_model_load(self, cfg: Any, model: Any) -> None:
        transformers.apply(model)

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        transformers.apply(trainer.model)  # again: TRL's trainers wrap it in PEFT themselves
        reference = getattr(trainer, "ref_model", None)
        if type(reference) is type(trainer.model):  # GRPO loads its own; not one that DeepSpeed or FSDP2 has wrapped
            transformers.apply(reference)
