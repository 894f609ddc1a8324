"""The tokenizer of a composed model: the language model's, and what images need beside it.

Token ids are the language model's; its embeddings mean nothing under any other. The special tokens that stand for
images, and those that the chat template prints, are looked up by their text and added at the end where they are
missing. Many models have more embeddings than tokens, so added tokens may find rows that are there already; otherwise
the embedding grows, to a multiple of what it was a multiple of.

The chat template is the language model's if it renders images, else the other model's, and then an answer ends where
that template says so. Files about pixels always come from the model that gives the tower.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from tessera.checkpoint.open import Source, read_json
from tessera.checkpoint.store import write_json
from tessera.config.errors import UserError
from tessera.data import render
from tessera.data.sample import BadRow
from tessera.data.template import ChatTemplate
from tessera.infer.limits import stop_ids
from tessera.models.families.pairing import vision_token_ids

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

FROM_LANGUAGE = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.*", "merges.txt", "special_tokens_map.json"),
    *("added_tokens.json", "*.tiktoken"),
)
TEMPLATES = ("chat_template.*", "additional_chat_templates")
FROM_VISION = "*processor*.json"
_ORDINARY = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What :func:`merged` decided.

    ``ids`` are the vision tokens by field of ``config.json``, ``known`` the tokens of the language model, ``rows`` the
    embeddings the new model needs; ``ends`` further tokens that end an answer. ``template`` is the other model's chat
    template, None to keep the language model's.
    """

    vision: Path
    language: Path
    tokenizer: Tokenizer
    added: Mapping[str, int]
    ids: Mapping[str, int]
    known: int
    rows: int
    template: str | None
    ends: tuple[int, ...]

    def notes(self) -> list[str]:
        """What a reader should know, one line each."""
        side = "the language model's" if self.template is None else "the vision model's"
        added = ", ".join(f"{token} ({number})" for token, number in self.added.items())
        return [f"tokens added to the tokenizer: {added or 'none'}", f"chat template: {side}"]

    def write(self, folder: Path) -> None:
        """Write tokenizer, template, generation config and processor files into ``folder``."""
        for pattern in (*FROM_LANGUAGE, *(TEMPLATES if self.template is None else ())):
            _copy(self.language, pattern, folder)
        _copy(self.vision, FROM_VISION, folder)
        if self.added:
            self.tokenizer.save(str(folder / "tokenizer.json"))
            listed = read_json(folder / "added_tokens.json")
            if listed:
                write_json(folder / "added_tokens.json", {**listed, **self.added})
        if self.template is not None:
            (folder / "chat_template.jinja").write_text(self.template, encoding="utf-8")
        write_json(folder / "tokenizer_config.json", self._tokenizer_config())
        write_json(folder / "generation_config.json", self._generation_config())

    def _tokenizer_config(self) -> dict[str, Any]:
        config = read_json(self.language / "tokenizer_config.json")
        other = read_json(self.vision / "tokenizer_config.json")
        if self.template is not None:
            config.pop("chat_template", None)
        # Processors look vision tokens up by names such as ``image_token``.
        named = {key: value for key, value in other.items() if key.endswith("_token") and key not in _ORDINARY}
        config = {**named, **config}
        extra = other.get("extra_special_tokens")
        if isinstance(extra, dict) and isinstance(config.get("extra_special_tokens", {}), dict):
            config["extra_special_tokens"] = {**extra, **config.get("extra_special_tokens", {})}
        if "added_tokens_decoder" in config:
            found = self.tokenizer.get_added_tokens_decoder()
            new = {str(number): _fields(found[number]) for number in self.added.values()}
            config["added_tokens_decoder"] = {**config["added_tokens_decoder"], **new}
        return config

    def _generation_config(self) -> dict[str, Any]:
        config = read_json(self.language / "generation_config.json")
        model = read_json(self.language / "config.json")
        stops = stop_ids(config) or stop_ids(model.get("text_config") or model)
        new = set(self.ends) - stops
        return {**config, "eos_token_id": sorted(stops | new)} if new or not config else config


def merged(vision: Source, language: Source, embeddings: int) -> Vocabulary:
    """The tokenizer of ``language``, which has this many embeddings, for images as ``vision`` takes them.

    UserError if either has no usable tokenizer or template.
    """
    seeing, speaking = _tokenizer(vision.path), _tokenizer(language.path)
    known = _size(speaking)
    needed = _vision_tokens(vision, seeing)
    template = None if _renders(language.path, speaking, needed["image_token_id"]) else _template(vision.path)
    special = {token.content: token for _, token in sorted(seeing.get_added_tokens_decoder().items())}
    printed = [text for text, token in special.items() if token.special and text in (template or "")]
    asked = [text for text in special if text in (*needed.values(), *_placeholders(vision, seeing), *printed)]
    unknown = [text for text in needed.values() if text not in special and speaking.token_to_id(text) is None]
    if unknown:
        raise UserError(f"{vision.path}: {unknown[0]} is no special token of tokenizer.json, but config.json needs it")
    missing = [text for text in asked if speaking.token_to_id(text) is None]
    # One by one: the library numbers them in the order it likes.
    for text in missing:
        add = speaking.add_special_tokens if special[text].special else speaking.add_tokens
        add([special[text]])
    ends = [end for number in sorted(_ends(vision, seeing)) if (end := seeing.id_to_token(number)) is not None]
    return Vocabulary(
        vision=vision.path,
        language=language.path,
        tokenizer=speaking,
        added={text: _id(speaking, text) for text in missing},
        ids={field: _id(speaking, text) for field, text in needed.items()},
        known=min(known, embeddings),
        rows=grown(embeddings, _size(speaking)),
        template=template,
        ends=tuple(_id(speaking, text) for text in ends if template is not None and text in template),
    )


def grown(embeddings: int, needed: int) -> int:
    """Embeddings for ``needed`` tokens: those there are, or so many that what divided them still does (up to 128)."""
    if needed <= embeddings:
        return embeddings
    unit = next(size for size in (128, 64, 32, 16, 8, 4, 2, 1) if embeddings % size == 0)
    return -(-needed // unit) * unit


def _vision_tokens(vision: Source, tokenizer: Tokenizer) -> dict[str, str]:
    """The text of every vision token, by field of ``config.json``."""
    pads = {f"{kind}_token_id": number for kind, number in vision.geometry.pad_ids.items()}
    found = {}
    for field, number in {**vision_token_ids(vision.config), **pads}.items():
        text = tokenizer.id_to_token(number)
        if text is None:
            raise UserError(f"{vision.path}: {field} of config.json is {number}, which is no token of tokenizer.json")
        found[field] = text
    return found


def _placeholders(vision: Source, tokenizer: Tokenizer) -> list[str]:
    """The tokens of what stands for an image in a conversation."""
    texts = vision.geometry.placeholder.values()
    return [token for text in texts for token in tokenizer.encode(text, add_special_tokens=False).tokens]


def _ends(vision: Source, tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that end an answer of the vision model."""
    text = read_json(vision.path / "tokenizer_config.json").get("eos_token")
    eos = tokenizer.token_to_id(text.get("content", "") if isinstance(text, dict) else str(text))
    return stop_ids(read_json(vision.path / "generation_config.json"), {"eos_token_id": eos})


def _renders(directory: Path, tokenizer: Tokenizer, image: str) -> bool:
    """Whether the chat template in ``directory``, if there is one, prints the token ``image`` for an image."""
    source = render.stored_template(directory)
    if source is None or tokenizer.token_to_id(image) is None:
        return False
    content = [{"type": "image", "image": "image"}, {"type": "text", "text": "text"}]
    try:
        return image in ChatTemplate(source, render.special_tokens(directory)).render(
            [{"role": "user", "content": content}]
        )
    except (BadRow, jinja2.TemplateError):
        return False  # a template that cannot take a list of parts renders no images


def _template(directory: Path) -> str:
    """The chat template in ``directory``; UserError if there is none."""
    source = render.stored_template(directory)
    if source is None:
        raise UserError(f"--vision {directory}: has no chat template; put its chat_template.jinja there")
    return source


def _tokenizer(directory: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    file = directory / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{file}: no such file; a composed model needs the tokenizers of both models in this format")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001 - the library raises bare Exception
        raise UserError(f"{file} cannot be read as a tokenizer: {error}") from None


def _size(tokenizer: Tokenizer) -> int:
    """One more than the largest id."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _id(tokenizer: Tokenizer, text: str) -> int:
    number = tokenizer.token_to_id(text)
    assert number is not None, f"{text} has been added"
    return int(number)


def _fields(token: AddedToken) -> dict[str, Any]:
    return {
        "content": token.content,
        "lstrip": token.lstrip,
        "normalized": token.normalized,
        "rstrip": token.rstrip,
        "single_word": token.single_word,
        "special": token.special,
    }


def _copy(source: Path, pattern: str, folder: Path) -> None:
    for file in sorted(source.glob(pattern)):
        if file.is_dir():
            shutil.copytree(file, folder / file.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(file, folder / file.name)
