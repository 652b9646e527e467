"""DeMansia-2: DeMansia with Mamba-2 mixers, and attention in two layers. The sizes below are registered with timm.

| name | width | layers | head width | heads of attention | parameters, as published |
|---|---|---|---|---|---|
| demansia2_tiny | 192 | 24 | 48 | 3 | 9.51M |
| demansia2_small | 384 | 24 | 96 | 6 | 32.7M |
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from timm import create_model
from timm.models import generate_default_cfgs, register_model
from torch import nn

from labeler.base.errors import ModelError
from model.backbones.published import PROJECTION, STEM, patch_arguments, registered_size
from model.backbones.timm_interface import build_patch_model, fit_position_embedding, untrained_cfg
from model.backbones.vision_mamba import VisionMamba
from model.families import Family, PublishedWeights, State, register_family

logger = logging.getLogger(__name__)

ATTENTION_LAYERS = (10, 20)
UNTRAINED = 0.01  # of what the first direction's D has moved from its start


class DeMansia2(VisionMamba):
    """DeMansia-2: `VisionMamba` with the mixer "demansia2" and some layers of attention.

    Args:
        attention_layers: numbers of the layers with attention; None: 10 and 20, if the model is that deep.
        attention_heads: heads of the attention.
        attention_head_dim: width of each.
        rotary_dim: channels of each that positions turn.
        attention_conv: taps of the causal convolution over queries, keys and values; 0: none.
        head_dim: head width of the Mamba-2 mixers.
        d_state: state size of the Mamba-2 mixers.
        legacy: as published: the second direction reads channels backwards instead of the sequence, so that all mixers
            but attention see earlier tokens only. The published weights need it; False: truly bidirectional.
        depth: number of layers.
        directions: "both", or "forward": no token sees later ones, by attention neither.
        kwargs: as for `VisionMamba`.

    Raises:
        ModelError: as in `VisionMamba`.
    """

    def __init__(
        self,
        attention_layers: tuple[int, ...] | None = None,
        attention_heads: int = 3,
        attention_head_dim: int = 96,
        rotary_dim: int = 48,
        attention_conv: int = 4,
        head_dim: int = 48,
        d_state: int = 128,
        legacy: bool = False,
        depth: int = 24,
        directions: str = "both",
        **kwargs: Any,
    ) -> None:
        if attention_layers is None:
            attention_layers = tuple(layer for layer in ATTENTION_LAYERS if layer < depth)
        attention = {
            "num_heads": attention_heads,
            "head_dim": attention_head_dim,
            "rotary_dim": rotary_dim,
            "d_conv": attention_conv,
            "directions": directions,
        }
        own = {"head_dim": head_dim, "d_state": d_state, "legacy": legacy, "depth": None if legacy else depth}
        super().__init__(
            depth=depth,
            directions=directions,
            mixer="demansia2",
            mixer_options=own,
            layer_mixers=dict.fromkeys(attention_layers, ("attention", attention)),
            **kwargs,
        )
        if directions == "both" and not legacy:
            self.register_load_state_dict_pre_hook(_warn_of_legacy)


def trained_as_legacy(state: Mapping[str, torch.Tensor]) -> bool | None:
    """Whether weights were trained with `legacy=True`, which leaves the second direction's D as it began, at 1.

    Args:
        state: a state dict.

    Returns:
        None: it cannot be told, as of weights that were not trained.
    """
    first, second = (_farthest_from_one(state, name) for name in (".mixer.D", ".mixer.D_b"))
    return None if first == 0 else second <= UNTRAINED * first


def _farthest_from_one(state: Mapping[str, torch.Tensor], name: str) -> float:
    values = [value for key, value in state.items() if key.endswith(name) and not value.is_meta]
    return max((float((value.float() - 1).abs().max()) for value in values), default=0.0)


def _warn_of_legacy(_: nn.Module, state: Mapping[str, torch.Tensor], prefix: str, *rest: object) -> None:
    if trained_as_legacy(state):
        logger.warning(
            "these weights were trained with DeMansia-2's published second direction, which reads channels backwards: "
            "got a model that reads the sequence in both directions, expected legacy=True for the weights' own answers "
            "(in a recipe: model.args.legacy=true)"
        )


SIZES: dict[str, dict[str, Any]] = {
    "demansia2_tiny": {"embed_dim": 192, "depth": 24},
    "demansia2_small": {"embed_dim": 384, "depth": 24, "head_dim": 96, "attention_heads": 6},
}
NAMES = tuple(SIZES)
default_cfgs = generate_default_cfgs({f"{name}.untrained": untrained_cfg() for name in NAMES})


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> DeMansia2:
    return build_patch_model(DeMansia2, variant, pretrained, **{**SIZES[variant], **kwargs})


@register_model
def demansia2_tiny(pretrained: bool = False, **kwargs: Any) -> DeMansia2:
    """DeMansia-2 of width 192 with 24 layers; `kwargs` as for `DeMansia2`."""
    return _create("demansia2_tiny", pretrained, kwargs)


@register_model
def demansia2_small(pretrained: bool = False, **kwargs: Any) -> DeMansia2:
    """DeMansia-2 of width 384 with 24 layers; `kwargs` as for `DeMansia2`."""
    return _create("demansia2_small", pretrained, kwargs)


def _recognize(state: State) -> bool:
    own = any(name.endswith(".mixer.out_proj_b.weight") for name in state)
    return own and {STEM, "pos_embed"} <= state.keys()


def _builder(weights: PublishedWeights) -> Callable[[], nn.Module]:
    state = weights.state
    arguments = patch_arguments(weights, 2 * state[PROJECTION].shape[-1], "layers")
    layers = range(arguments["depth"])
    attention = tuple(layer for layer in layers if f"layers.{layer}.mixer.A_log" not in state)
    mixer = next(f"layers.{layer}.mixer." for layer in layers if layer not in attention)
    inner, heads = len(state[f"{mixer}norm.weight"]), len(state[f"{mixer}A_log"])
    arguments |= {
        "d_state": (len(state[f"{mixer}in_proj.weight"]) - 2 * inner - heads) // 2,
        "d_conv": state[f"{mixer}conv1d.weight"].shape[2],
        "expand": inner // arguments["embed_dim"],
        "head_dim": inner // heads,
        "legacy": isinstance(weights.settings, Mapping) or trained_as_legacy(state) is not False,
        "attention_layers": attention,
    }
    if attention:
        arguments |= _attention(weights, f"layers.{attention[0]}.mixer.")
    name = registered_size(SIZES, arguments)
    return partial(create_model, name, **arguments) if name else partial(DeMansia2, **arguments)


def _attention(weights: PublishedWeights, mixer: str) -> dict[str, Any]:
    """Arguments of the attention: from the training script's settings, else those of published sizes if they fit."""
    inner, settings = weights.state[f"{mixer}out_proj.weight"].shape[1], weights.settings
    told = settings.get("attn_cfg") if isinstance(settings, Mapping) else None
    if not isinstance(told, Mapping):
        told = {"num_heads": inner // 96, "head_dim": 96, "rotary_emb_dim": 48}
    heads, width = (int(told.get(key, 0)) for key in ("num_heads", "head_dim"))
    if heads * width != inner:
        raise ModelError(
            f"the heads of the attention in {weights.file} are unknown",
            got=f"{inner} channels",
            expected="the training script's settings beside the weights, or heads of 96",
            remedy="Pass model=, a DeMansia2.",
        )
    conv = weights.state.get(f"{mixer}conv1d.weight")
    return {
        "attention_heads": heads,
        "attention_head_dim": width,
        "rotary_dim": int(told.get("rotary_emb_dim", 0)),
        "attention_conv": 0 if conv is None else conv.shape[2],
    }


register_family(
    Family(
        "DeMansia-2",
        NAMES,
        _recognize,
        _builder,
        convert=fit_position_embedding,
        token_head={"aux_head": True},
        projections=("in_proj", "out_proj", "out_proj_b"),
    )
)
