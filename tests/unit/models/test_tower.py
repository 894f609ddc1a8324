"""The tower's surroundings: pixel normalisation, one attention call per block, buffers, names."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tessera.contract.batch import Normalisation
from tessera.models.families import family_of
from tessera.models.tower import channel_major, normalise
from tessera.models.vlm import VLM
from tests.parity import reference as ref

CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
LEVELS = torch.arange(256, dtype=torch.uint8).repeat_interleave(3).view(1, -1)


def test_fused_normalisation_is_the_torchvision_formula() -> None:
    how = Normalisation(**CLIP)
    mean, std = (torch.tensor(CLIP[key]) * (1.0 / (1 / 255)) for key in ("mean", "std"))
    image = channel_major(LEVELS, 3).view(3, 16, 16).float()
    expected = (image - mean[:, None, None]) / std[:, None, None]
    assert torch.equal(channel_major(normalise(LEVELS, how), 3).view(3, 16, 16), expected)


@pytest.mark.parametrize("values", [CLIP, {"mean": (0.5,) * 3, "std": (0.5,) * 3}])
def test_other_normalisation_is_the_pil_processors(values: dict[str, tuple[float, ...]]) -> None:
    from transformers.image_transforms import normalize, rescale

    image = channel_major(LEVELS, 3).view(3, 16, 16).numpy()
    expected = normalize(
        rescale(image, 1 / 255, input_data_format="channels_first"),
        values["mean"],
        values["std"],
        input_data_format="channels_first",
    )
    mine = channel_major(normalise(LEVELS, Normalisation(**values, fused=False)), 3)
    assert mine.dtype == torch.float32
    assert np.array_equal(mine.view(3, 16, 16).numpy(), expected)


def test_windows_of_one_length_are_one_call() -> None:
    """16 windows and one image: one attention call per tower block, one per decoder layer."""
    config = ref.config_of("qwen2_5_vl")
    model, batch = ref.ours(config), ref.batch_of(config, [[3, (1, 32, 32), 4]])
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as seen:
        model(batch)
    calls = Counter({event.key: event.count for event in seen.key_averages()})
    assert calls["aten::scaled_dot_product_attention"] == 3 + 3
    assert calls["aten::item"] == 0
    assert calls["aten::nonzero"] == 0


@pytest.mark.parametrize("name", ref.VLMS)
def test_built_on_meta_with_real_buffers_and_transformers_names(name: str) -> None:
    config = ref.config_of(name)
    with torch.device("meta"):
        model = family_of(config).build(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    # What a checkpoint does not hold must have its value by now: there is no such buffer.
    assert dict(model.named_buffers()).keys() <= model.state_dict().keys()
    assert isinstance(model, VLM)
    theirs = ref.theirs(config, ref.ours(config))
    assert dict(model.named_parameters()).keys() == dict(theirs.named_parameters()).keys()


def test_frozen_tower_and_trained_tower() -> None:
    config = ref.config_of("qwen3_vl")
    model, batch = ref.ours(config), ref.batch_of(config, [[3, (1, 4, 4), 4]])
    visual = model.visual
    assert visual is not None
    visual.requires_grad_(False)
    model(batch, ref.loss).total.backward()
    assert not any(key.startswith("model.visual") for key in ref.gradients(model))
    assert "model.language_model.layers.0.mlp.up_proj.weight" in ref.gradients(model)
