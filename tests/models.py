"""Model directories of tiny random models, as they would lie on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tessera.models.families import family_of, text_config
from tessera.models.init import init_weights
from tessera.weights import hf
from tests.toys import VOCABULARY, make_tokenizer_dir


def make_model_dir(
    path: str | Path, name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **text: Any
) -> Path:
    """Write a loadable checkpoint of family ``name`` with a toy tokenizer; ``text`` changes the decoder's config."""
    family = family_of({"model_type": name})
    config = family.tiny()
    for token in family.tokens:  # as released: the tokenizer alone knows
        del config[f"{token}_id"]
    text_config(config).update({"vocab_size": VOCABULARY, **text})
    directory = make_tokenizer_dir(path, name)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0], "do_sample": False}))
    if "vision_config" in config:
        size = {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}
        processor = {"patch_size": config["vision_config"]["patch_size"], "merge_size": 2, "size": size}
        if name == "internvl":
            processor = {"size": {"height": 56, "width": 56}, "crop_to_patches": True, "max_patches": 4}
        if "llm_config" in config:
            processor = {"crop_size": 56, "do_center_crop": True, "feature_extractor_type": "CLIPFeatureExtractor"}
            processor |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "size": 56}
        (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    with torch.device("meta"):
        module = family.build(config)
    init_weights(module, config, seed, dtype=dtype)
    hf.save(module.state_dict(), directory, family.weightmap(config, []))
    return directory
