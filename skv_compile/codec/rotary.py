"""The rotary embedding of a model, read from its config, as a plan for ``lowering.turn``."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from ..lowering.turn import half_split_plan, interleaved_plan

log = logging.getLogger(__name__)

#: Model types that pair neighbouring coordinates instead of halves.
INTERLEAVED = {
    "cohere",
    "cohere2",
    "codegen",
    "ernie4_5",
    "glm",
    "glm4",
    "gptj",
    "helium",
    "llama4",
}


def rotary_plan(model_config: Any, head_dim: int) -> Tensor | None:
    """[2, head_dim] plan of the model's full-attention layers, or None where there is none.

    A plan that does not fit the model costs accuracy, never correctness, so a config that
    cannot be read gives None and a line in the log.
    """
    text = model_config.get_text_config(decoder=True)
    parameters = getattr(text, "rope_parameters", None)
    if isinstance(parameters, dict) and "full_attention" in parameters:
        parameters = parameters["full_attention"]
    if not isinstance(parameters, dict) or not parameters.get("rope_theta"):
        return None
    try:
        speeds = _speeds(text, parameters, head_dim)
    except Exception as error:
        log.info("rotary embedding of %s not understood: %s", type(text).__name__, error)
        return None
    if 2 * len(speeds) > head_dim:
        return None
    plan = interleaved_plan if text.model_type in INTERLEAVED else half_split_plan
    return plan(speeds, head_dim)


def _speeds(text: Any, parameters: dict[str, Any], head_dim: int) -> Tensor:
    """Radians a token of each pair."""
    kind = parameters.get("rope_type", "default")
    if kind != "default":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        return ROPE_INIT_FUNCTIONS[kind](text, torch.device("cpu"))[0].float()
    part = parameters.get("partial_rotary_factor") or getattr(text, "partial_rotary_factor", None)
    turned = int(head_dim * (part or 1.0))
    exponent = torch.arange(0, turned, 2, dtype=torch.float64) / turned
    return (parameters["rope_theta"] ** -exponent).float()
