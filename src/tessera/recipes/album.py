"""``tessera data show``: samples of datasets as one HTML page, before anything is trained on them.

A page of pictures and texts finds what no check can: images that do not belong to their questions, answers cut short,
the same picture a hundred times. Rows are drawn with ``--data_seed``, images are shrunk and embedded, so the page is
one file that can be mailed. With a model each row says how many tokens it is, else how many characters.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from tessera.config.run import Run
from tessera.data import media
from tessera.data.encode import Encoder
from tessera.data.sample import BadRow, ImageRef, Sample, normalise
from tessera.data.survey import resolved
from tessera.data.tables import Rows, place_of
from tessera.observe import page
from tessera.observe.gallery import MAX_TEXT, data_uri

PICTURES = 6
FILE = "samples.html"


def album(datasets: Sequence[Rows], run: Run, encoder: Encoder | None) -> str:
    """The page as HTML."""
    chosen = drawn([len(rows) for rows in datasets], run.shards.num_samples, run.data.data_seed)
    body = ["<h1>Samples</h1>", f'<p class="sub">{html.escape(", ".join(rows.name for rows in datasets))}</p>']
    tiles = [
        page.tile(f"{sum(len(rows) for rows in datasets):,}", "rows"),
        page.tile(str(sum(map(len, chosen))), "shown"),
    ]
    body.append(f'<div class="tiles">{"".join(tiles)}</div>')
    for rows, indices in zip(datasets, chosen, strict=True):
        cards = "".join(_card(rows, index, run, encoder) for index in indices)
        body.append(
            page.section(f"{rows.name}: {len(indices)} of {len(rows):,} rows", f'<div class="gallery">{cards}</div>')
        )
    return page.page("Samples", body)


def drawn(counts: Sequence[int], most: int, seed: int) -> list[list[int]]:
    """At most ``most`` rows, spread evenly over datasets of ``counts`` rows, each in order."""
    rng = np.random.default_rng(seed)
    room = [0] * len(counts)
    while sum(room) < min(most, sum(counts)):
        for at, count in enumerate(counts):
            if room[at] < count and sum(room) < most:
                room[at] += 1
    return [sorted(rng.permutation(count)[:n].tolist()) for count, n in zip(counts, room, strict=True)]


def _card(rows: Rows, index: int, run: Run, encoder: Encoder | None) -> str:
    place = place_of(rows, index)
    name = f"row {index}" + (f", {place}" if place else "")
    try:
        row = rows[index]
        sample = resolved(normalise(row, run.data.columns, need_answer=False), rows.base, run.data.root_image_dir)
        size = _size(sample, encoder)
    except BadRow as error:
        return (
            f'<article class="card wrong"><div class="text"><span class="badge bad">cannot be used</span>'
            f'<p class="question">{html.escape(name)}</p><p>{html.escape(str(error))}</p></div></article>'
        )
    turns = "".join(
        f"<dt>{html.escape(message.role)}</dt><dd>{html.escape(message.content[:MAX_TEXT])}"
        f"{'…' if len(message.content) > MAX_TEXT else ''}</dd>"
        for message in sample.messages
    )
    return (
        f'<article class="card"><div class="pictures">{"".join(_pictures(sample))}</div><div class="text">'
        f'<span class="badge">{html.escape(size)}</span><p class="question">{html.escape(name)}</p>'
        f"<dl>{turns}</dl></div></article>"
    )


def _size(sample: Sample, encoder: Encoder | None) -> str:
    if encoder is None:
        return f"{sum(len(message.content) for message in sample.messages)} characters"
    rendered = encoder.rendered(sample)
    [(tokens, trained)] = encoder.renderer.measure([rendered])
    seen = sum(rendered.slots)
    return f"{tokens} tokens, {trained} trained" + (f", {seen} of images" if seen else "")


def _pictures(sample: Sample) -> Iterator[str]:
    sources = [*sample.images, *(frame for video in sample.videos for frame in video)]
    for source in sources[:PICTURES]:
        try:
            yield f'<img src="{data_uri(_name(source), [Path()])}" alt="" loading="lazy">'
        except (OSError, ValueError) as error:
            yield page.missing(str(error))
    if len(sources) > PICTURES:
        yield f'<p class="note">… and {len(sources) - PICTURES} more</p>'


def _name(source: ImageRef) -> str:
    """``source`` as the gallery takes it: a path or a ``data:`` URI."""
    if isinstance(source, str):
        return source
    return "data:image;base64," + base64.b64encode(media.load(source)).decode("ascii")
