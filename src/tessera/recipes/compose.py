"""``tessera compose``: a new vision-language model from the tower of one model and the language model of another.

    --vision DIR --llm DIR                    tower | new aligner | language model
    --vision DIR --llm DIR --aligner DIR      tower | aligner of a VLM, where it fits | language model
    --config FILE or DIR                      random weights for a config.json

Every value of the new ``config.json`` is derived from the parts, every tensor is accounted for (``account.py``), the
tokenizer is the language model's with the tokens that images need (``vocabulary.py``). On text the new model computes
exactly what the language model computes. The result is a function of the parts and the seed: an ordinary model
directory, which appears when it is complete. Memory is that of a few rows of a tensor, whatever the size of the parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera.checkpoint import open as door
from tessera.checkpoint.store import write_json
from tessera.config.errors import UserError
from tessera.config.run import Run
from tessera.contract.model import HFConfig, dtype_of
from tessera.contract.shards import Part as Region
from tessera.models.families import pairing
from tessera.recipes import blueprint, export
from tessera.recipes.account import Account, account
from tessera.recipes.parts import GROUPS, Composition, Part
from tessera.recipes.vocabulary import Vocabulary, merged
from tessera.weights.saving import Saving

CARD = "README.md"


def main(run: Run) -> Path:
    """Compose as ``run`` says; returns the directory that was written."""
    return drawn(run) if run.compose.config is not None else composed(run)


def composed(run: Run) -> Path:
    """The model of ``--vision`` and ``--llm`` in ``--output_dir``."""
    out, parts = Path(run.save.output_dir), open_parts(run)
    _check_place(out, run, [part.source.path for part in parts])
    giving = {group: part for part in parts for group in part.groups}
    vision, language = giving["vit"].source, giving["llm"].source
    embeddings = pairing.built(language.config).decoder.config.vocab
    vocabulary = merged(vision, language, embeddings)
    pair = pairing.pair(vision.config, language.config, vocabulary.rows, vocabulary.ids)
    asked = run.model.torch_dtype
    made = Composition.of(pair.config, parts, dtype_of(asked) if asked else None, vocabulary.known)
    table = account(made, parts)
    notes = [*vocabulary.notes(), _loaded_by(pair), *_types(made)]
    print("\n".join([*table.lines(), *notes]), flush=True)
    if not run.dry_run:
        giving["llm"].check_ties()
        _write(out, run, made, vocabulary, _card(out, parts, table, notes))
    return _done(out, run)


def drawn(run: Run) -> Path:
    """Random weights for ``--config`` in ``--output_dir``."""
    out, asked = Path(run.save.output_dir), run.model.torch_dtype
    assert run.compose.config is not None
    config, folder = blueprint.described(Path(run.compose.config))
    _check_place(out, run, [folder] if folder else [])
    dtype = dtype_of(asked) if asked else None
    tensors = blueprint.tensors_of(config, dtype)
    print(f"{len(tensors):,} tensors, all initialised from seed {run.train.seed}", flush=True)
    if not run.dry_run:
        with export.appearing(out) as aside:
            if folder is not None:
                blueprint.copy_files(folder, aside)
            write_json(aside / "config.json", _typed(config, {dtype for dtype, _ in tensors.values()}))
            blueprint.draw(config, aside, run.train.seed, dtype, run.save.max_shard_size)
    if not (folder and (folder / "tokenizer.json").is_file()):
        print("no tokenizer was there to copy: put one into the directory before training")
    return _done(out, run)


def open_parts(run: Run) -> list[Part]:
    """The directories of the flags, each once, with the groups that it gives."""
    asked = run.compose
    assert asked.vision is not None and asked.llm is not None, "checked by config.resolve"
    places = {"vit": asked.vision, "llm": asked.llm}
    if asked.aligner != "init":
        places["aligner"] = asked.aligner
    found = {group: door.locate(place, GROUPS[group]) for group, place in places.items()}
    groups: dict[Path, list[str]] = {}
    for group, path in found.items():
        groups.setdefault(path.resolve(), []).append(group)
    parts = []
    for given in groups.values():
        flags = " ".join(f"{GROUPS[group]} {places[group]}" for group in given)
        try:
            parts.append(Part.open(found[given[0]], tuple(given)))
            if set(given) & {"vit", "aligner"} and not parts[-1].source.has_tower:
                raise UserError(
                    f"config.json: model_type {parts[-1].source.config['model_type']!r} has no vision tower"
                )
        except UserError as error:
            raise UserError(f"{flags}: {error}") from error
    return parts


def _write(out: Path, run: Run, made: Composition, vocabulary: Vocabulary, card: str) -> None:
    """Everything into ``out``, which appears at the end."""
    tensors = {name: (made.dtypes[name], shape) for name, shape in made.shapes.items()}

    def values(name: str) -> Iterator[tuple[Region, Tensor]]:
        return made.values(name, run.train.seed)

    with export.appearing(out, (*export.PRODUCT, CARD)) as aside:
        Saving.planned(tensors, made.weightmap, max_shard_size=run.save.max_shard_size).write(aside, values)
        vocabulary.write(aside)
        write_json(aside / "config.json", _typed(made.config, set(made.dtypes.values())))
        (aside / CARD).write_text(card, encoding="utf-8")


def _check_place(out: Path, run: Run, parts: list[Path]) -> None:
    """UserError unless ``out`` may be written."""
    if out.resolve() in {path.resolve() for path in parts}:
        raise UserError(f"--output_dir {out}: is one of the parts; choose another directory")
    export.check_free(out, exist_ok=run.export.exist_ok)


def _done(out: Path, run: Run) -> Path:
    print(f"{'would write' if run.dry_run else 'composed'} {out}", flush=True)
    return out


def _loaded_by(pair: pairing.Pair) -> str:
    if not pair.inexpressible:
        return f"loads with: tessera, transformers (model_type {pair.config['model_type']})"
    return f"loads with: tessera only; transformers cannot express it: {pair.inexpressible}"


def _types(made: Composition) -> list[str]:
    """A line where parts are of different types."""
    found = sorted({str(dtype).removeprefix("torch.") for dtype in made.dtypes.values()})
    return [f"types are kept as they are: {', '.join(found)}; --torch_dtype makes them one"] if len(found) > 1 else []


def _typed(config: HFConfig, dtypes: set[torch.dtype]) -> dict[str, Any]:
    """``config`` with the name of its weights' type, the widest if there are several."""
    floating = sorted((dtype for dtype in dtypes if dtype.is_floating_point), key=lambda dtype: dtype.itemsize)
    name = str(floating[-1]).removeprefix("torch.")
    key = "torch_dtype" if "torch_dtype" in config else "dtype"

    def renamed(part: Mapping[str, Any]) -> dict[str, Any]:
        types = {key: name for key in ("dtype", "torch_dtype") if key in part}
        inner = {key: renamed(value) for key, value in part.items() if isinstance(value, dict)}
        return {**part, **inner, **types}

    return {**renamed(config), key: name}


def _card(out: Path, parts: list[Part], table: Account, notes: list[str]) -> str:
    """The model card: what the model is made of."""
    made_of = [f"- {part.label}: `{part.source.path.name}`" for part in parts]
    lines = [f"# {out.name}", "", "Composed by tessera from", "", *made_of, "", *(f"- {note}" for note in notes), ""]
    return "\n".join([*lines, "```text", *table.lines(), "```", ""])
