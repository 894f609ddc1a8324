"""The one door: from a name on the command line to a model, its geometry and its weights.

Training, inference, export and evaluation all open a model here, so they cannot disagree about which directory was
meant, which family it is, which pixel limits apply or which tensors were expected. Opening is split by cost::

    locate    --model -> a directory (local first, then the Hugging Face cache or hub)
    describe  config.json and preprocessor_config.json -> family, geometry, plan; no tensors, milliseconds
    load      safetensors -> a module, through the family's weight map, every tensor accounted for
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tessera.config.errors import UserError
from tessera.config.run import ModelArgs
from tessera.config.sources import is_mcore
from tessera.contract.model import Family, Geometry, dtype_of
from tessera.contract.plan import Plan
from tessera.contract.weightmap import WeightMap
from tessera.models.families import family_of, text_config
from tessera.weights.hf import Checkpoint, shapes_of
from tessera.weights.hf import load as load_weights


@dataclass(frozen=True, slots=True)
class Source:
    """A model directory, read but not loaded.

    ``path`` holds config and tokenizer, ``checkpoint`` the tensors, which ``weightmap`` finds. What is saved is called
    as ``disk_names`` says and lies as in ``origin``; None: the weights are in a format that has no such files.
    """

    path: Path
    config: Mapping[str, Any]
    preprocessor: Mapping[str, Any]
    family: Family
    geometry: Geometry
    plan: Plan
    checkpoint: Checkpoint
    weightmap: WeightMap
    disk_names: WeightMap
    origin: Checkpoint | None

    @property
    def types(self) -> dict[str, torch.dtype] | None:
        """The types of the tensors by our names where there is no ``origin`` to say so."""
        return None if self.origin is not None else {name: e.dtype for name, e in self.checkpoint.entries.items()}

    @property
    def location(self) -> Path:
        """The directory that holds the weights, which is what was asked for."""
        return self.checkpoint.path

    @property
    def has_tower(self) -> bool:
        """Whether the model takes images."""
        return self.geometry.patch_size > 0

    @property
    def max_positions(self) -> int | None:
        """The longest sequence the decoder was made for, in tokens."""
        value = {**self.config, **text_config(self.config)}.get("max_position_embeddings")
        return int(value) if value else None

    @property
    def dtype_name(self) -> str:
        """The dtype the checkpoint declares, ``float32`` if it does not."""
        text = text_config(self.config)
        found = (self.config.get("dtype"), self.config.get("torch_dtype"), text.get("dtype"), text.get("torch_dtype"))
        return next((str(name) for name in found if name), "float32")


def locate(model: str, flag: str = "--model") -> Path:
    """The directory that ``flag`` names: a local path, else a repository id in the hub's cache, or online."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    looks_local = model.startswith((".", "/", "~")) or model.count("/") != 1
    if looks_local:
        raise UserError(f"{flag} {model}: no such directory")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(model, ignore_patterns=["*.bin", "*.pth", "*.gguf", "*.h5"]))
    except (huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{flag} {model}: neither a directory here nor a repository that can be downloaded ({first})"
        ) from error


def read_json(path: Path, *, required: bool = False) -> dict[str, Any]:
    """A JSON object from a model directory; ``{}`` if it is absent and not required."""
    if not path.is_file() and not required:
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def describe(args: ModelArgs) -> Source:
    """Read a model's configuration; UserError if it is no model directory or of no known family."""
    if not args.model:
        raise UserError("--model is missing: give a model directory or a Hugging Face repository id", exit_code=2)
    path = locate(args.model)
    new = args.allow_missing_vision_projection_checkpoint
    source = read_mcore(path, args.hf_dir, new_projection=new) if is_mcore(path) else read(path)
    geometry = source.geometry.limited(
        min_pixels=args.min_pixels,
        max_pixels=args.max_pixels,
        video_max_pixels=args.video_max_pixels,
        fps=args.fps,
        max_tiles=args.max_num,
        tiling=args.use_tiling,
    )
    return replace(source, geometry=geometry)


def read(path: Path) -> Source:
    """What the model directory ``path`` says about itself, without a user's limits; UserError as :func:`describe`."""
    config, preprocessor, family = _settings(path)
    checkpoint = Checkpoint(path)
    weightmap = family.weightmap(config, list(checkpoint.names))
    geometry, plan = family.geometry(config, preprocessor), family.plan(config)
    return Source(path, config, preprocessor, family, geometry, plan, checkpoint, weightmap, weightmap, checkpoint)


PROJECTION = "vision_projection."
"""What Megatron-LM calls the tensors between tower and language model, which its combined checkpoints lack."""


def read_mcore(path: Path, hf_dir: str | None = None, *, new_projection: bool = False) -> Source:
    """The same for a Megatron checkpoint, whose config and tokenizer lie beside it or in ``hf_dir``.

    With ``new_projection`` a projection that is not there is drawn instead.
    """
    from tessera.weights.megatron import checkpoint as megatron

    found = megatron.locate(path)
    settings = locate(hf_dir, "--hf_dir") if hf_dir else found.root
    if not (settings / "config.json").is_file():
        raise UserError(
            f"{path}: a Megatron checkpoint without config.json; add --hf_dir DIR, a Hugging Face directory with it"
        )
    config, preprocessor, family = _settings(settings)
    held = megatron.open_as_ours(path, family, config, absent=(PROJECTION,) if new_projection else ())
    geometry, plan = family.geometry(config, preprocessor), family.plan(config)
    disk_names = family.weightmap(config, [])
    return Source(settings, config, preprocessor, family, geometry, plan, held, held.weightmap, disk_names, None)


def _settings(path: Path) -> tuple[dict[str, Any], dict[str, Any], Family]:
    """The configs of a model and of its processor, and its family."""
    config = read_json(path / "config.json", required=True)
    preprocessor = read_json(path / "preprocessor_config.json")
    preprocessor = preprocessor or read_json(path / "processor_config.json").get("image_processor", {})
    family = family_of(config)
    return _with_tokens(path, config, family), preprocessor, family


def _with_tokens(path: Path, config: dict[str, Any], family: Family) -> dict[str, Any]:
    """``config`` with what the family's checkpoints leave to their tokenizers; see :class:`Family`."""
    wanted = {name: texts for name, texts in family.tokens.items() if f"{name}_id" not in config}
    if not wanted:
        return config
    known = _added_tokens(path)
    for name, texts in wanted.items():
        found = next((text for text in texts if text in known), None)
        if found is None:
            raise UserError(
                f"{path}: the tokenizer has no token {' or '.join(texts)}, which stands for an image; "
                f"add it there and a row for it to the embedding, or set {name} and {name}_id in config.json"
            )
        config = {**config, name: found, f"{name}_id": known[found]}
    return config


def _added_tokens(path: Path) -> dict[str, int]:
    """Ids of the tokens that were added to a model directory's tokenizer; small files before the large one."""
    named = read_json(path / "added_tokens.json")
    if not named:
        listed = read_json(path / "tokenizer_config.json").get("added_tokens_decoder", {})
        named = {held["content"]: index for index, held in listed.items()}
    if not named:
        named = {held["content"]: held["id"] for held in read_json(path / "tokenizer.json").get("added_tokens", [])}
    return {text: int(index) for text, index in named.items()}


def compute_dtype(source: Source, asked: str | None, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: ``--torch_dtype`` if asked for, else the checkpoint's own where it is fast.

    CPUs have no half precision worth the name, and most have no bfloat16 units either; without being asked, those
    compute in float32 (weights are still written in the checkpoint's dtype).
    """
    name = (asked or source.dtype_name).removeprefix("torch.")
    if device.type != "cpu" or name == "float32":
        return dtype_of(name)
    if asked is None:
        return torch.bfloat16 if name == "bfloat16" and _has_bfloat16_units() else torch.float32
    if name == "float16":
        raise UserError("--torch_dtype float16: CPUs have no fast half precision; use bfloat16 or float32")
    return dtype_of(name)


def slow_on(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why computing in ``dtype`` on ``device`` is a bad idea, None if it is not."""
    if device.type == "cpu" and dtype == torch.bfloat16 and not _has_bfloat16_units():
        return "this CPU has no bfloat16 units; float32 would be many times faster"
    return None


def _has_bfloat16_units() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def load(
    source: Source,
    *,
    dtype: Callable[[str], torch.dtype] | torch.dtype,
    device: torch.device,
    prepare: Callable[[nn.Module], None] = lambda module: None,
    stored: Callable[[str], str | None] = lambda name: name,
) -> nn.Module:
    """The model with its weights on ``device``; ``dtype`` may depend on the parameter's name.

    ``prepare`` sees the module while it is still on the meta device (to freeze or adapt it, say), before ``dtype`` is
    asked. ``stored`` says what a parameter was called before; None: it was not there, and its values are up to others.
    """
    with torch.device("meta"):
        module = source.family.build(source.config)
    shapes = shapes_of(module)
    prepare(module)
    load_weights(module, source.checkpoint, source.weightmap, dtype=dtype, device=device, shapes=shapes, stored=stored)
    return module
