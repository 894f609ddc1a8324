"""Any image-text model of transformers, run whole (``models/whole.py``).

Covered are models that see one image as one square of fixed size and as a fixed number of tokens, with ordinary token
positions: LLaVA and its relatives. Everything else is refused by name, because it would train silently wrong: scaled
or capped logits (the head is ours), tiled or native-resolution images, preprocessing with a crop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tessera.config.errors import UserError
from tessera.contract.batch import Grid, Normalisation, Segments
from tessera.contract.model import Family, Geometry, HFConfig, MediaItem
from tessera.contract.plan import Groups, Plan
from tessera.contract.weightmap import Rename, WeightMap
from tessera.models.families import text_config
from tessera.models.families.common import normalisation, tied
from tessera.models.geometry import refuse_tiles
from tessera.models.whole import Whole

CAPPED = ("final_logit_softcapping", "logit_scale", "logits_scaling")
RESAMPLE = {2: "bilinear", 3: "bicubic"}


def image_token(config: HFConfig) -> int:
    """Id of the token that stands for one image slot."""
    found = config.get("image_token_id", config.get("image_token_index"))
    if found is None:
        raise UserError(
            f"config.json: model_type {config['model_type']!r} names no image_token_id; it is not supported"
        )
    return int(found)


def image_slots(config: HFConfig) -> int:
    """Tokens per image: stated by the config, or one per patch of the tower."""
    vision = config["vision_config"]
    if "image_seq_length" in config:
        return int(config["image_seq_length"])
    full = config.get("vision_feature_select_strategy") == "full"
    return int((vision["image_size"] // vision["patch_size"]) ** 2 + full)


def _transformers_model(config: HFConfig) -> Any:
    """The transformers model with real buffers and parameters without storage worth mentioning."""
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    known = AutoModelForImageTextToText._model_mapping
    theirs = AutoConfig.for_model(**config)
    if type(theirs) not in known:
        raise UserError(f"config.json: model_type {config['model_type']!r} is not an image-text model of transformers")
    capped = [name for name in CAPPED if text_config(config).get(name) not in (None, 1, 1.0)]
    if capped:
        raise UserError(
            f"config.json: {capped[0]} changes the logits; model_type {config['model_type']!r} can't be used"
        )
    # Buffers are values that no checkpoint stores: they must not be built on the meta device. Parameters may:
    # their memory is never touched before it is replaced.
    with torch.device("cpu"), no_init_weights():
        return AutoModelForImageTextToText.from_config(theirs)


def build(config: HFConfig) -> nn.Module:
    """The module, its parameters on the current default device."""
    if tied(config):
        raise UserError("config.json: tie_word_embeddings is not supported for models run whole; untie the checkpoint")
    module = Whole(_transformers_model(config), image_token(config), image_slots(config))
    device = torch.get_default_device()
    for owner in module.modules():
        for leaf, parameter in list(owner.named_parameters(recurse=False)):
            empty = torch.empty_like(parameter, device=device)
            owner.register_parameter(leaf, nn.Parameter(empty, requires_grad=parameter.requires_grad))
    return module


def plan(config: HFConfig) -> Plan:
    """Groups by the names of the parts; FSDP units and recompute points are transformers' own layers."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    with torch.device("meta"):
        module = build(config)
    parts = [f"model.{name}" for name, _ in module.get_submodule("model").named_children()]
    language = "model.language_model"
    if language not in parts:
        raise UserError(f"config.json: model_type {config['model_type']!r} has no {language}; it is not supported")
    aligner = tuple(part for part in parts if "projector" in part or "connector" in part)
    layers = [n for n, m in module.named_modules() if isinstance(m, GradientCheckpointingLayer)]
    patterns = sorted({".".join("*" if part.isdigit() else part for part in name.split(".")) for name in layers})
    decoder = tuple(pattern for pattern in patterns if pattern.startswith(language + "."))
    return Plan(
        Groups(llm=(language, "lm_head"), aligner=aligner, vit=tuple({*parts} - {*aligner, language})),
        fsdp_units=decoder,
        recompute_decoder=decoder,
        recompute_tower=tuple(pattern for pattern in patterns if pattern not in decoder),
        layer_loop=False,
    )


def weightmap(config: HFConfig, disk_names: Sequence[str]) -> WeightMap:
    """transformers' own renaming, tensor by tensor."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    with torch.device("meta"):
        model = _transformers_model(config)
    transforms = get_model_conversion_mapping(model)
    state = model.state_dict()
    renamings = [rule for rule in transforms if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in transforms if not isinstance(rule, WeightRenaming)]
    if converters:
        raise UserError(
            f"config.json: model_type {config['model_type']!r} stores tensors in another layout; it is not supported"
        )
    pairs = {disk: rename_source_key(disk, renamings, [], "model", state)[0] for disk in disk_names}
    renames = tuple(Rename(ours, disk) for disk, ours in pairs.items() if ours != disk)
    return WeightMap(renames)


@dataclass(slots=True)
class SquareGeometry:
    """One image is one square of ``patch_size`` pixels and ``tokens`` tokens; positions count tokens."""

    patch_size: int
    tokens: int
    normalisation: Normalisation
    pad_ids: Mapping[str, int]
    temporal_patch_size: int = 1
    merge_size: int = 1
    resample: str = "bicubic"
    resize: str = "torch"
    placeholder: Mapping[str, str] = field(default_factory=lambda: {"image": "<image>"})

    def resized(self, height: int, width: int, frames: int = 1) -> tuple[int, int]:
        """Always the square."""
        if frames > 1:
            raise UserError("this model takes images only: choose another model or a dataset without videos")
        return self.patch_size, self.patch_size

    def canvases(self, height: int, width: int, frames: int = 1) -> tuple[tuple[int, int], ...]:
        """One: the square."""
        return (self.resized(height, width, frames),)

    def grid(self, height: int, width: int, frames: int = 1) -> Grid:
        """One patch: the image."""
        self.resized(height, width, frames)
        return 1, 1, 1

    def text(self, item: MediaItem) -> str:
        """The placeholder itself."""
        return self.placeholder[item.kind]

    def slots(self, item: MediaItem) -> tuple[int, ...]:
        """The fixed number of tokens."""
        return (self.tokens,)

    def positions(self, tokens: Tensor, items: Sequence[MediaItem]) -> Tensor:
        """``[T] int64``: 0 .. T-1."""
        return torch.arange(tokens.shape[0])

    def tower_inputs(self, grids: Sequence[Grid]) -> tuple[dict[str, Tensor], dict[str, Segments]]:
        """Nothing: the tower works out everything by itself."""
        return {}, {}

    def limited(
        self,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        video_max_pixels: int | None = None,
        fps: float | None = None,
        max_tiles: int | None = None,
        tiling: bool | None = None,
    ) -> SquareGeometry:
        """Unchanged: the size of an image is fixed."""
        refuse_tiles(max_tiles, tiling)
        return self

    def stored(self, file: str, held: Mapping[str, Any]) -> Mapping[str, Any]:
        """Unchanged."""
        return held

    def minimal_grid(self) -> Grid:
        """One image."""
        return 1, 1, 1


def geometry(config: HFConfig, preprocessor: Mapping[str, Any]) -> Geometry:
    """Geometry of a fixed square; a crop is refused, because training would then see other pixels than inference."""
    size = config["vision_config"].get("image_size")
    wanted = preprocessor.get("size", {"height": size, "width": size})
    square = (
        isinstance(size, int) and isinstance(wanted, Mapping) and wanted.get("height") == wanted.get("width") == size
    )
    crop = preprocessor.get("do_center_crop", False)
    if not square or crop:
        raise UserError(
            f"preprocessor_config.json: size {wanted} with do_center_crop {crop} is not supported for this model; "
            f'set size to {{"height": {size}, "width": {size}}} and do_center_crop to false'
        )
    return SquareGeometry(
        patch_size=size,
        tokens=image_slots(config),
        normalisation=normalisation(preprocessor),
        pad_ids={"image": image_token(config)},
        resample=RESAMPLE.get(preprocessor.get("resample", 3), "bicubic"),
        placeholder={"image": preprocessor.get("image_token", "<image>")},
    )


def tiny() -> dict[str, Any]:
    """``config.json`` of a small random LLaVA."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": 5,
        "image_seq_length": 4,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llama",
            "vocab_size": 256,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "initializer_range": 0.05,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "projection_dim": 32,
        },
    }


FAMILY = Family("fallback", (), build, geometry, plan, weightmap, tiny)
