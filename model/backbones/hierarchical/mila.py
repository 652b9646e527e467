"""MILA (also MLLA): linear attention in Mamba's block, in stages. The sizes below are registered with timm.

Han et al., "Demystify Mamba in Vision: A Linear Attention Perspective" (2024).

Legend: B images; C classes; D width of the last stage; h×w token grid, T = h·w tokens.

| name | widths | blocks | parameters | with the token head |
|---|---|---|---|---|
| mila_nano | 32, 64, 128 | 1, 2, 2 | 0.9M | ours |
| mila_tiny | 64, 128, 256, 512 | 2, 4, 8, 4 | 24.4M | 24.9M |
| mila_small | 64, 128, 256, 512 | 3, 6, 21, 6 | 43.0M | 43.5M |
| mila_base | 96, 192, 384, 768 | 3, 6, 21, 6 | 96.0M | 96.8M |

Tokens of the last stage, which the token head reads, are 32×32 pixels. They are mixed where the third stage begins, on
its grid of 16×16 pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm import create_model
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from labeler.base.errors import ModelError
from model.backbones.hierarchical.mila_attention import Rotations
from model.backbones.hierarchical.mila_layers import NORM_EPS, Stage, Stem
from model.backbones.hierarchical.stage_model import StageModel, initialize
from model.backbones.patch_model import drop_path_rates
from model.backbones.timm_interface import untrained_cfg
from model.families import Family, PublishedWeights, State, register_family

HEAD_WIDTH = 32


class Mila(StageModel):
    """Stages of linear attention, each on half the grid of the one before it.

    Images may have any size that divides into tokens of the last stage, 32×32 pixels (patch_size · 2^(stages − 1)):
    positions are rotations, computed for the grid. `img_size` says which ones are kept, and what `grid` is.

    Args:
        img_size: side, or (height, width), in pixels.
        patch_size: side of a token of the first stage, in pixels: 4, as published, or 2.
        in_chans: channels of the images.
        num_classes: classes of the class head; 0: no heads.
        embed_dim: width of the first stage; it doubles from stage to stage.
        depths: number of blocks of each stage.
        num_heads: attention heads of each stage; None: one for 32 channels.
        mlp_ratio: hidden width of the MLP / width.
        qkv_bias: whether queries and keys have a bias.
        aux_head: add an auxiliary head on the tokens.
        drop_rate: dropout after the stem and in the MLPs.
        drop_path_rate: rate of stochastic depth in the last block; the rates rise linearly from 0 in the first.
        global_pool: input of the class head: "avg", the mean of the tokens, or "", every token.
        aux_classes: classes of the auxiliary head, if they are others, as those of a teacher are; None: the same
            classes.

    Raises:
        ModelError: widths and heads that do not divide, an unknown global_pool or patch_size, or an img_size that does
            not divide into tokens.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 8, 4),
        num_heads: Sequence[int] | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        aux_head: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        aux_classes: int | None = None,
    ) -> None:
        super().__init__()
        widths = [embed_dim * 2**i for i in range(len(depths))]
        heads = [width // HEAD_WIDTH for width in widths] if num_heads is None else list(num_heads)
        if not widths or len(heads) != len(widths) or min(depths) < 1:
            raise ModelError(f"depths and num_heads must be of each stage: got {tuple(depths)} and {tuple(heads)}")
        self.in_chans, self.embed_dim, self.patch_size = in_chans, embed_dim, patch_size
        self.num_features = self.head_hidden_size = widths[-1]
        self.num_prefix_tokens, self.stride = 0, patch_size * 2 ** (len(widths) - 1)
        self.img_size = to_2tuple(img_size)
        self.grid = self._grid_for(self.img_size)
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        self.patch_embed = Stem(in_chans, embed_dim, patch_size)
        self.pos_drop = nn.Dropout(drop_rate)
        self.layers = nn.ModuleList(
            Stage(
                widths[i], self._stage_grid(i), [next(rates) for _ in range(depth)], heads[i], i + 1 == len(widths),
                mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, drop=drop_rate,
            )
            for i, depth in enumerate(depths)
        )  # fmt: skip
        self.norm: nn.Module = nn.LayerNorm(self.num_features, eps=NORM_EPS)
        self.head: nn.Module = nn.Identity()
        self.aux_head: nn.Module | None = nn.Identity() if aux_head else None
        self.feature_info = [
            {"num_chs": width, "reduction": patch_size * 2**i, "module": f"layers.{i}.blocks.{depths[i] - 1}"}
            for i, width in enumerate(widths)
        ]
        for module in self.layers.modules():  # convolutions and the stem keep torch's initialization
            if isinstance(module, nn.Linear):
                initialize(module)
        self.reset_classifier(num_classes, global_pool, aux_classes)

    def _stage_grid(self, stage: int) -> tuple[int, int]:
        pixels = self.patch_size * 2**stage
        return self.img_size[0] // pixels, self.img_size[1] // pixels

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Change the image size, and with it `grid` and the rotations that are kept.

        Args:
            img_size: side, or (height, width), in pixels.

        Raises:
            ModelError: the size does not divide into tokens.
        """
        size = to_2tuple(img_size)
        self.img_size, self.grid = size, self._grid_for(size)
        for i, stage in enumerate(self.layers):
            for module in stage.modules():
                if isinstance(module, Rotations):
                    module.resize(self._stage_grid(i))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that should have no weight decay: none, beside norms and biases, which timm adds."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups of parameters, for layer-wise learning rates: by block, or by stage if `coarse`."""
        blocks = [(r"^layers\.(\d+)\.blocks\.(\d+)", None), (r"^layers\.(\d+)\.downsample", (99998,))]
        blocks = [(r"^layers\.(\d+)", None)] if coarse else blocks
        return {"stem": r"^patch_embed", "blocks": [*blocks, (r"^norm", (99999,))]}


SIZES: dict[str, dict[str, Any]] = {
    "mila_nano": {"embed_dim": 32, "depths": (1, 2, 2)},
    "mila_tiny": {"embed_dim": 64, "depths": (2, 4, 8, 4)},
    "mila_small": {"embed_dim": 64, "depths": (3, 6, 21, 6)},
    "mila_base": {"embed_dim": 96, "depths": (3, 6, 21, 6)},
}
NAMES = tuple(SIZES)
CFG = untrained_cfg(first_conv="patch_embed.conv1.conv") | {"fixed_input_size": False, "crop_pct": 0.875}
default_cfgs = generate_default_cfgs({f"{name}.untrained": CFG for name in NAMES})


def own_rotations(state: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict with the model's own rotations where it has those of another grid, or none.

    Args:
        state: weights; it is not modified.
        model: the model to load them into.

    Returns:
        A state dict that fits the model's grids.
    """
    own = {key: value for key, value in model.state_dict().items() if key.endswith(".rope.rotations")}
    same = {key for key, value in own.items() if key in state and state[key].shape == value.shape}
    return {**state, **{key: value for key, value in own.items() if key not in same}}


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> Mila:
    arguments = {**SIZES[variant], **kwargs}
    every = {"out_indices": tuple(range(len(arguments["depths"]))), "feature_cls": "getter"}
    return build_model_with_cfg(
        Mila, variant, pretrained, pretrained_filter_fn=own_rotations, feature_cfg=every, **arguments
    )


@register_model
def mila_nano(pretrained: bool = False, **kwargs: Any) -> Mila:
    """MILA, 32 wide with 5 blocks in three stages: a size of ours, for small images; `kwargs` as for `Mila`."""
    return _create("mila_nano", pretrained, kwargs)


@register_model
def mila_tiny(pretrained: bool = False, **kwargs: Any) -> Mila:
    """MILA-T, 64 wide with 18 blocks; `kwargs` as for `Mila`."""
    return _create("mila_tiny", pretrained, kwargs)


@register_model
def mila_small(pretrained: bool = False, **kwargs: Any) -> Mila:
    """MILA-S, 64 wide with 36 blocks; `kwargs` as for `Mila`."""
    return _create("mila_small", pretrained, kwargs)


@register_model
def mila_base(pretrained: bool = False, **kwargs: Any) -> Mila:
    """MILA-B, 96 wide with 36 blocks; `kwargs` as for `Mila`."""
    return _create("mila_base", pretrained, kwargs)


FIRST = "layers.0.blocks.0."


def _recognize(state: State) -> bool:
    return {f"{FIRST}attn.qk.weight", f"{FIRST}act_proj.weight", f"{FIRST}attn.lepe.weight"} <= state.keys()


def _builder(weights: PublishedWeights) -> Callable[[], nn.Module]:
    state = weights.state
    blocks = {tuple(key.split(".")[1:4:2]) for key in state if key.startswith("layers.") and ".blocks." in key}
    stages = [stage for stage, _ in blocks]
    width, depths = len(state[f"{FIRST}norm1.weight"]), tuple(stages.count(str(i)) for i in range(len(set(stages))))
    name = next((name for name, size in SIZES.items() if (size["embed_dim"], size["depths"]) == (width, depths)), None)
    if name is None:
        raise ModelError(
            f"{weights.file} has no known MILA size, so its num_heads are unknown: got width {width}, "
            f"{depths} blocks, expected those of {', '.join(SIZES)}; pass model="
        )
    rotations = state.get(f"{FIRST}attn.rope.rotations")
    size = (224, 224) if rotations is None else tuple(4 * side for side in rotations.shape[:2])
    arguments = {
        "img_size": size,
        "in_chans": state["patch_embed.conv1.conv.weight"].shape[1],
        "num_classes": len(state["head.weight"]) if "head.weight" in state else 0,
        "aux_head": "aux_head.weight" in state,
        "mlp_ratio": len(state[f"{FIRST}mlp.fc1.weight"]) / width,
        "qkv_bias": f"{FIRST}attn.qk.bias" in state,
    }
    return partial(create_model, name, **arguments)


register_family(
    Family(
        "MILA",
        NAMES,
        _recognize,
        _builder,
        convert=own_rotations,
        token_head={"aux_head": True},
        projections=("in_proj", "act_proj", "out_proj", "qk"),
    )
)
