"""Folders of shards for tests: written with the standard library's tarfile, so that our own writer proves nothing."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.toys import make_images

FIELD_MAP = {"image": "jpg", "context": "json[0][value]", "answers": "json[1][value]"}


def write_tar(path: Path, samples: Sequence[tuple[str, Mapping[str, bytes]]], **options: Any) -> Path:
    """A tar file of (key, parts)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for key, parts in samples:
            for name, data in parts.items():
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def pictures(folder: Path, count: int) -> list[bytes]:
    """JPEG files of different sizes."""
    sizes = [(56 + 8 * index, 48) for index in range(count)]
    return [Path(path).read_bytes() for path in make_images(folder, sizes)]


def turns(index: int) -> list[dict[str, str]]:
    """A conversation as LLaVA spells it."""
    return [{"from": "human", "value": f"What is it? {index}\n<image>"}, {"from": "gpt", "value": f"number {index}"}]


def make_shards(folder: Path, count: int = 12, each: int = 3) -> Path:
    """``count`` samples of ``jpg`` and ``json``, ``each`` in every ``pretrain-N.tar``."""
    images = pictures(folder.parent / f"{folder.name}-images", count)
    samples = [(f"{i:05d}", {"jpg": images[i], "json": json.dumps(turns(i)).encode()}) for i in range(count)]
    for number, start in enumerate(range(0, count, each)):
        write_tar(folder / f"pretrain-{number}.tar", samples[start : start + each])
    return folder
