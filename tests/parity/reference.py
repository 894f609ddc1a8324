"""The same tiny model twice, ours and transformers', and batches for both: what the parity tests share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.contract.batch import Batch, Grid, Media, Segments
from tessera.contract.model import Geometry, Head, LossSum, MediaItem
from tessera.models.families import family_of
from tessera.models.init import init_weights
from tessera.models.tiled import TiledGeometry
from tessera.models.tower import channel_major, normalise
from tessera.models.vlm import VLM
from tests.parity.plain import PlainTiles

VLMS = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v_moe", "internvl", "internvl_chat", "NVLM_D")
REMOTE = ("internvl_chat", "NVLM_D")
"""Families whose checkpoints bring their own code: transformers does not know their names."""
OWN = ("composite",)
"""Families that transformers does not have; their references are put together in ``test_composite.py``."""
SEEING = (*VLMS, *OWN)
TEXTS = ("qwen2", "qwen3", "llama", "qwen3_moe")
Sample = Sequence[int | Grid]
"""A segment as numbers of text tokens and image grids, in order."""


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    return family_of({"model_type": name}).tiny() | changes


def ours(config: dict[str, Any], seed: int = 0) -> VLM:
    """Our model with random weights. Norms and biases are moved off one and zero so that they matter."""
    family = family_of(config)
    with torch.device("meta"):
        module = family.build(config)
    model = init_weights(module, config, seed)
    assert isinstance(model, VLM)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for buffer in model.buffers():
            buffer.add_(torch.randn(buffer.shape, generator=generator) * 0.1)
    return model


def theirs(config: dict[str, Any], model: nn.Module, implementation: str = "sdpa") -> nn.Module:
    """transformers' model of ``config`` with the weights of ``model``, or a plain one if transformers has none."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    if config["model_type"] == "NVLM_D":
        return PlainTiles(config, model.state_dict())
    if config["model_type"] == "internvl_chat":
        config = native(config)
    theirs_config = AutoConfig.for_model(**config)
    theirs_config._attn_implementation = implementation
    auto = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
    reference = auto.from_config(theirs_config)
    missing, unexpected = reference.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    reference.tie_weights()
    return reference


def native(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers calls the values of an ``internvl_chat`` config."""
    vision = dict(config["vision_config"])
    vision["attention_bias"] = vision.pop("qkv_bias")
    vision["use_qk_norm"] = vision.pop("qk_normalization")
    side, patch = vision["image_size"], vision["patch_size"]
    vision |= {"model_type": "internvl_vision", "image_size": [side, side], "patch_size": [patch, patch]}
    text = {key: value for key, value in config["llm_config"].items() if key != "architectures"}
    return config_of("internvl") | {
        "image_token_id": config["image_token_id"],
        "tie_word_embeddings": config["tie_word_embeddings"],
        "text_config": text | {"tie_word_embeddings": config["tie_word_embeddings"]},
        "vision_config": {key: value for key, value in vision.items() if key != "architectures"},
    }


def geometry_of(config: dict[str, Any]) -> Geometry:
    return family_of(config).geometry(config, {})


def fitted(geometry: Geometry, grid: Grid) -> Grid:
    """``grid`` as the model could have it: a model of tiles gets as many as hold its patches."""
    if not isinstance(geometry, TiledGeometry):
        return grid
    across = geometry.side // geometry.patch_size
    return -(-grid[1] * grid[2] // across**2), across, across


def tile_pixels(patches: Tensor, size: Grid, geometry: Geometry) -> Tensor:
    """``pixel_values [n, C, S, S]`` from an item's normalised ``patches``, in our order."""
    tiles, down, across = size
    patch, merge = geometry.patch_size, geometry.merge_size
    blocks = patches.view(tiles, down // merge, across // merge, merge, merge, patch, patch, 3)
    return blocks.permute(0, 7, 1, 3, 5, 2, 4, 6).reshape(tiles, 3, down * patch, across * patch)


def media_arguments(config: dict[str, Any], batch: Batch) -> list[dict[str, Any]]:
    """What transformers' model of ``config`` takes beside the tokens, per segment."""
    geometry, media, start, found = geometry_of(config), batch.media, 0, []
    for index, ids in enumerate(batch.tokens.split(list(batch.segments.lengths))):
        sizes = [] if media is None else [g for g, o in zip(media.sizes, media.owners, strict=True) if o == index]
        if not sizes or media is None or media.minimal:
            found.append({})
            continue
        counts = [t * h * w for t, h, w in sizes]
        patches = normalise(media.patches[start : start + sum(counts)], media.normalisation)
        start += sum(counts)
        if isinstance(geometry, TiledGeometry):
            parts = zip(patches.split(counts), sizes, strict=True)
            found.append({"pixel_values": torch.cat([tile_pixels(part, size, geometry) for part, size in parts])})
            continue
        kinds = (ids[None] == geometry.pad_ids["image"]).int()
        pixels = channel_major(patches, 3)
        found.append({"pixel_values": pixels, "image_grid_thw": torch.tensor(sizes), "mm_token_type_ids": kinds})
    return found


def segment(config: dict[str, Any], sample: Sample, generator: torch.Generator) -> tuple[Tensor, list[MediaItem]]:
    """Random tokens of one segment (ids from 10 on, pads from the config) and its media."""
    geometry, parts, items = geometry_of(config), [], []
    for part in sample:
        if isinstance(part, int):
            parts.append(torch.randint(10, 256, (part,), generator=generator))
        else:
            item = MediaItem("image", fitted(geometry, part))
            items.append(item)
            parts.append(torch.full((sum(geometry.slots(item)),), geometry.pad_ids["image"]))
    return torch.cat(parts), items


def batch_of(config: dict[str, Any], samples: Sequence[Sample], seed: int = 0, minimal: bool = False) -> Batch:
    """The samples packed into one row; all but the last token of each supervised with uneven weights."""
    geometry = geometry_of(config)
    generator = torch.Generator().manual_seed(seed)
    made = [segment(config, sample, generator) for sample in samples]
    tokens = torch.cat([ids for ids, _ in made])
    segments = Segments.of([len(ids) for ids, _ in made])
    targets, weight = torch.roll(tokens, -1), torch.rand(len(tokens), generator=generator) + 0.5
    weight[segments.cu_seqlens[1:].long() - 1] = 0
    items = [(owner, item) for owner, (_, listed) in enumerate(made) for item in listed]
    grids = [item.grid for _, item in items]
    if minimal and not grids:
        grids = [geometry.minimal_grid()]
    batch = Batch(
        tokens=tokens,
        targets=targets,
        loss_weight=weight,
        positions=torch.cat([geometry.positions(ids, listed) for ids, listed in made], dim=-1),
        segments=segments,
        supervised=weight.nonzero().flatten(),
        weight=float(weight.sum()),
        sample_ids=tuple(range(len(samples))),
    )
    if not grids:
        return batch
    inputs, tower_segments = geometry.tower_inputs(grids)
    size = 3 * geometry.temporal_patch_size * geometry.patch_size**2
    patches = torch.randint(0, 256, (sum(t * h * w for t, h, w in grids), size), generator=generator).to(torch.uint8)
    media = Media(
        patches=patches,
        grids=torch.tensor(grids),
        dest=(tokens == geometry.pad_ids["image"]).nonzero().flatten(),
        sizes=tuple(grids),
        owners=tuple(owner for owner, _ in items),
        normalisation=geometry.normalisation,
        tower=inputs,
        tower_segments=tower_segments,
        minimal=not items,
    )
    return replace(batch, media=media)


def loss(hidden: Tensor, head: Head, batch: Batch) -> LossSum:
    """The weighted sum of cross entropies, as plainly as possible."""
    logits = F.linear(hidden, head.weight).float()
    losses = F.cross_entropy(logits, batch.targets, reduction="none")
    return LossSum((losses * batch.loss_weight).sum(), batch.weight)


def logits_of(model: VLM, batch: Batch) -> Tensor:
    return F.linear(model(batch), model.head_weight)


def reference_logits(reference: nn.Module, config: dict[str, Any], batch: Batch) -> Tensor:
    """transformers' logits ``[T, V]``: one call per segment, nothing packed, its own position computation."""
    outs, extras = [], media_arguments(config, batch)
    for ids, extra in zip(batch.tokens.split(list(batch.segments.lengths)), extras, strict=True):
        outs.append(reference(input_ids=ids[None], use_cache=False, **extra).logits[0])
    return torch.cat(outs)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def worst_gradient(mine: dict[str, Tensor], reference: dict[str, Tensor]) -> tuple[float, str]:
    """Largest difference relative to the tensor's largest entry, and the tensor it occurs in."""
    assert mine.keys() == reference.keys()
    # Key biases have no gradient in exact arithmetic (softmax ignores a constant): only rounding noise to compare.
    ratios = {
        name: float((mine[name] - grad).abs().max() / grad.abs().max().clamp_min(1e-3))
        for name, grad in reference.items()
    }
    worst = max(ratios, key=lambda name: ratios[name])
    return ratios[worst], worst
