"""``tessera data``: datasets as training would see them, checked, counted, shown, converted, prepared, without a run.

    tessera data --model M --dataset D                 what the rows become: tokens, labels, packs, refused rows
    tessera data lint|stats|show D ...                 every row checked; counted; a page of samples
    tessera data convert llava|sharegpt|messages SRC   shards; with --split also what Energon needs beside them
    tessera data prepare DIR --split 9,1,0             that alone, for shards that exist

A model is described, never loaded; where it is optional it adds token counts. What is written appears complete or not
at all.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from tessera.checkpoint import open as door
from tessera.config.errors import UserError
from tessera.config.run import Run
from tessera.data.corpus import Skips
from tessera.data.encode import Encoder
from tessera.data.inspect import show
from tessera.data.render import Renderer
from tessera.data.shards import prepare
from tessera.data.shards.convert import Counts, convert
from tessera.data.shards.prepare import Prepared
from tessera.data.survey import Survey, datasets_of, survey
from tessera.recipes import album
from tessera.recipes.export import appearing

SKIPPED = "skipped.jsonl"
_PRODUCT = ("*.tar", "*.tar.idx", prepare.META, SKIPPED)
_DEFINITIONS = {
    "llava": ("VQASample", {"image": "jpg", "context": "json[0][value]", "answers": "json[1][value]"}),
    "sharegpt": ("ChatMLSample", {"imgs": "jpgs", "videos": "videos", "conversation": "json"}),
    "messages": ("ChatMLSample", {"imgs": "jpgs", "videos": "videos", "conversation": "json"}),
}
"""What ``dataset.yaml`` says about converted shards: the sample type and its field map."""
_LISTED = 20


def main(run: Run) -> None:
    """Do what ``run.task`` says; without a task print rows, lengths, packs, refused rows and one sample."""
    match run.task:
        case ():
            source = door.describe(run.model)
            out = Path(run.save.output_dir) if run.provenance["output_dir"] != "default" else None
            show(run.data, source.path, source.geometry, source.max_positions, skipped_into=out)
        case ("lint",):
            lint(run)
        case ("stats",):
            _looked(run, print_all=False)
        case ("show",):
            _page(run)
        case ("prepare",):
            assert run.target is not None, "checked by config.resolve"
            _prepared(Path(run.target).expanduser(), run)
        case _:
            _converted(run.task[1], run)


def lint(run: Run) -> Survey:
    """Print every row that is wrong; UserError if there is one."""
    found = _looked(run, print_all=True)
    if len(found.wrong):
        raise UserError(f"{len(found.wrong)} of {found.rows} rows are wrong: {found.wrong.summary()}")
    return found


def _looked(run: Run, *, print_all: bool) -> Survey:
    """Survey the datasets and print what came of it; ``print_all``: each wrong row rather than sizes."""
    found = survey(datasets_of(run.data.dataset), run.data.columns, run.data.root_image_dir, _encoder(run))
    entries = found.wrong.entries()
    if run.shards.json:
        print(json.dumps({**found.summary(), **({"issues": entries} if print_all else {})}, ensure_ascii=False))
        return found
    if not print_all:
        for line in found.lines():
            print(line)
        for count, reason in found.wrong.reasons()[:_LISTED]:
            print(f"  {count}x {reason}")
        return found
    for entry in entries:
        print(f"{entry['dataset']}: row {entry['row']}{_place(entry)}: {entry['reason']}")
    print(f"{found.rows} rows checked, {len(entries)} wrong")
    return found


def _encoder(run: Run) -> Encoder | None:
    """What renders rows for ``--model``, None without one."""
    if run.model.model is None:
        return None
    source = door.describe(run.model)
    renderer = Renderer(source.path, source.geometry, run.data.system, run.data.loss_scale)
    return Encoder(
        renderer,
        source.geometry,
        root_image_dir=run.data.root_image_dir,
        max_length=run.data.max_length or source.max_positions,
        columns=run.data.columns,
    )


def _page(run: Run) -> Path:
    """Write the page of samples into ``--output_dir``."""
    text = album.album(datasets_of(run.data.dataset), run, _encoder(run))
    directory = Path(run.save.output_dir)
    path = directory / album.FILE
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"--output_dir {directory}: writing failed: {error.strerror or error}") from error
    print(f"wrote {path}")
    return path


def _prepared(folder: Path, run: Run) -> Prepared:
    shards = run.shards
    if shards.split is None:
        raise UserError("tessera data prepare: --split is required, e.g. --split 9,1,0", exit_code=2)
    found = prepare.prepare(
        folder,
        shards.split,
        shards.sample_type,
        shards.field_map,
        shuffle=shards.shuffle_tars,
        exist_ok=run.export.exist_ok,
    )
    print(_account(folder, found))
    if shards.sample_type is None:
        print("no --sample_type: no dataset.yaml is written, and samples are read by what their parts look like")
    return found


def _converted(kind: str, run: Run) -> Path:
    """Convert ``run.target`` and, with ``--split``, prepare the shards; all of it appears at once."""
    assert run.target is not None, "checked by config.resolve"
    shards = run.shards
    if shards.split is not None:
        prepare.parse_split(shards.split)
    root = Path(run.target).expanduser()
    given = run.provenance["output_dir"] != "default"
    out = Path(run.save.output_dir) if given else (root if root.is_dir() else root.parent) / "wds"
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not run.export.exist_ok:
        raise UserError(f"tessera data convert: {out} exists already; choose another OUT or add --exist_ok true")
    skips = Skips()

    def report(number: int, reason: str) -> None:
        if run.data.strict:
            raise UserError(f"--strict true: entry {number} of {run.target}: {reason}")
        skips.add(str(run.target), number, reason)

    with appearing(out, _PRODUCT) as aside:
        counts = convert(
            kind, str(root) if root.exists() else run.target, aside, report, most=shards.max_samples_per_tar
        )
        _enough(counts, skips, run)
        if len(skips):
            skips.write(aside / SKIPPED)
        if shards.split is not None:
            sample_type, field_map = _DEFINITIONS[kind]
            found = prepare.prepare(aside, shards.split, sample_type, field_map, shuffle=shards.shuffle_tars)
    print(f"{counts.samples} samples in {counts.shards} shards: {out}")
    if len(skips):
        print(f"left out {len(skips)} of {counts.entries} entries, see {out / SKIPPED}: {skips.summary()}")
    if shards.split is not None:
        print(_account(out, found))
    return out


def _enough(counts: Counts, skips: Skips, run: Run) -> None:
    """UserError where too few entries could be converted."""
    if not counts.samples:
        raise UserError(f"tessera data convert {run.target}: no entry could be converted: {skips.summary() or 'none'}")
    if len(skips) > run.data.max_skip_ratio * counts.entries:
        raise UserError(
            f"{len(skips)} of {counts.entries} entries of {run.target} cannot be converted, more than "
            f"--max_skip_ratio {run.data.max_skip_ratio}: {skips.summary()}"
        )


def _account(folder: Path, found: Prepared) -> str:
    parts = ", ".join(
        f"{part} {len(names)} shards with {sum(found.counts[name] for name in names)} samples"
        for part, names in found.splits.items()
    )
    return f"prepared {folder}: {parts}"


def _place(entry: dict[str, object]) -> str:
    return f" ({entry['place']})" if "place" in entry else ""
