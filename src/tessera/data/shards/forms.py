"""From the parts of a sample to a row, by what ``dataset.yaml`` says the samples are.

Energon types its samples; each type becomes one of the row formats of :mod:`tessera.data.sample`:

| sample type | row |
|---|---|
| ``VQASample``, ``VQAOCRSample``, ``VidQASample`` | user: context; assistant: the answer of the largest weight |
| ``MultiChoiceVQASample`` | user: context and the lettered choices; assistant: the letter |
| ``CaptioningSample``, ``OCRSample`` | user: the image; assistant: the caption or the text |
| ``TextSample``, ``InterleavedSample`` | a document, with its images in place |
| ``ChatMLSample`` | the conversation, with lists of images and of videos as frames |
| ``CrudeWebdataset``, or no ``dataset.yaml`` | whatever its parts look like: see :func:`guessed` |

The same names ending in ``Webdataset`` are the older spelling. A ``sample_loader`` is a program in the folder, which is
not run: the folder is refused with the way out, a ``field_map``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tessera.config.errors import UserError
from tessera.data.sample import QUERY, RESPONSE, BadRow, Slice
from tessera.data.shards.fields import IMAGES, JSONS, TEXTS, Fields, is_film, parse_expression

Row = dict[str, Any]
Form = Callable[[Fields], Row]
"""The row of a sample."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
UNUSED = tuple(
    f"{unit}_{what}" for unit in ("block", "lines", "words", "chars") for what in ("boxes", "text", "classes")
)
"""Fields of OCR samples that training has no use for: what lies there is not read."""

_CONVERSATION = ("messages", "conversations", "conversation", *QUERY, *RESPONSE)


def form_of(config: Mapping[str, Any] | None, where: str) -> Form:
    """How the samples of a folder become rows, from its parsed ``dataset.yaml`` (None: it has none)."""
    if config is None:
        return guessed
    kind = _kind(config, where)
    if kind == "Crude":
        return guessed
    if kind not in FORMS:
        known = ", ".join(f"{name}Sample" for name in FORMS)
        raise UserError(f"{where}: samples of type {kind} are not read (known: {known}, CrudeWebdataset)")
    if config.get("sample_loader") is not None:
        raise UserError(
            f"{where}: sample_loader {config['sample_loader']} is a program, which is not run; "
            "describe the samples with a field_map instead"
        )
    build, required, optional = FORMS[kind]
    field_map = config.get("field_map")
    if not isinstance(field_map, Mapping) or not all(isinstance(value, str) for value in field_map.values()):
        raise UserError(f"{where}: field_map must map {', '.join(required)} to parts, e.g. image: jpg")
    for name in field_map:
        if name not in (*required, *optional, *UNUSED):
            raise UserError(f"{where}: field_map has {name}, but {kind}Sample has {', '.join((*required, *optional))}")
    for name in required:
        if name not in field_map:
            raise UserError(f"{where}: field_map lacks {name}, which {kind}Sample needs")
    expressions = {name: parse_expression(value) for name, value in field_map.items() if name not in UNUSED}

    def form(fields: Fields) -> Row:
        return build({name: fields.find(options) for name, options in expressions.items()})

    return form


def guessed(fields: Fields) -> Row:
    """The row of a sample nobody described.

    A JSON part that is a list is the conversation, one that is an object with known columns the row itself. Else a text
    part (or the JSON's ``caption``) is the answer about the images, without images a document. Image parts are the
    images, in the order of the numbers in their names.
    """
    row: Row = {}
    kinds = {name: name.rpartition(".")[2].lower() for name in fields.names}
    held = next((fields.get(name) for name, kind in kinds.items() if kind in JSONS), None)
    images = [fields.get(name) for name in sorted(kinds, key=_natural) if kinds[name] in IMAGES]
    if isinstance(held, list):
        row["conversations"] = held
    elif isinstance(held, dict) and any(name.lower() in _CONVERSATION for name in held):
        row.update(_timed(held))
    else:
        text = next((fields.get(name) for name, kind in kinds.items() if kind in TEXTS), None)
        if text is None and isinstance(held, dict):
            text = held.get("caption")
        if text is None:
            raise BadRow(
                f"no conversation in the parts {', '.join(fields.names) or 'none'}: describe them with a field_map"
            )
        row = _asked("", text) if images else {"text": text}
    if any(kind == "jpgs" for kind in kinds.values()):
        images += [image for name, kind in kinds.items() if kind == "jpgs" for image in fields.get(name)]
    if images:
        row["images"] = images
    row.pop("image", None)  # a path of the place where the shard was made
    for name, kind in kinds.items():
        if kind in ("videos", "mp4s"):
            row["videos"] = _videos(fields.get(name))
    return row


def _kind(config: Mapping[str, Any], where: str) -> str:
    """The sample type's name without its ending."""
    held = config.get("sample_type", config)
    name = held.get("__class__") if isinstance(held, Mapping) else None
    if not isinstance(name, str):
        raise UserError(f"{where}: neither sample_type nor __class__ says what the samples are")
    return name.removesuffix("Sample").removesuffix("Webdataset")


def _vqa(found: Mapping[str, Any]) -> Row:
    answers, weights = found.get("answers"), found.get("answer_weights")
    if isinstance(answers, Sequence) and not isinstance(answers, str):
        if not answers:
            raise BadRow("the list of answers is empty")
        best = 0
        if weights is not None:
            numbers = isinstance(weights, list) and all(isinstance(weight, int | float) for weight in weights)
            if not numbers or len(weights) != len(answers):
                raise BadRow("answer_weights does not go with answers")
            best = max(range(len(answers)), key=lambda i: (weights[i], -i))
        answers = answers[best]
    row = _asked(found["context"], answers)
    return row | _media(found)


def _choice(found: Mapping[str, Any]) -> Row:
    choices, right = found.get("choices"), found.get("correct_choice_idx", 0)
    if not isinstance(choices, list) or not 0 < len(choices) <= len(LETTERS):
        raise BadRow("choices must be a list of 1 to 26 answers")
    if not isinstance(right, int) or not 0 <= right < len(choices):
        raise BadRow(f"correct_choice_idx {right!r} is none of the {len(choices)} choices")
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return _asked("\n".join([str(found["context"]), *lines]), LETTERS[right]) | _media(found)


def _captioning(found: Mapping[str, Any]) -> Row:
    return _asked("", found["caption"]) | _media(found)


def _ocr(found: Mapping[str, Any]) -> Row:
    return _asked("", found["text"]) | _media(found)


def _text(found: Mapping[str, Any]) -> Row:
    return {"text": found["text"]}


def _interleaved(found: Mapping[str, Any]) -> Row:
    sequence = found["sequence"]
    if not isinstance(sequence, list):
        raise BadRow("sequence must be a list of texts and images")
    images = [item for item in sequence if not isinstance(item, str)]
    return {"text": "".join(item if isinstance(item, str) else "<image>" for item in sequence), "images": images}


def _chatml(found: Mapping[str, Any]) -> Row:
    conversation = found["conversation"]
    row = _timed(conversation) if isinstance(conversation, dict) else {"conversations": conversation}
    images, videos = found.get("imgs"), found.get("videos")
    if images is not None:
        row["images"] = images if isinstance(images, list) else [images]
    if videos is not None:
        row["videos"] = _videos(videos)
    return row


def _asked(question: Any, answer: Any) -> Row:
    """A conversation of one question and, if there is one, its answer."""
    turns = [{"role": "user", "content": question}]
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    return {"messages": turns}


def _media(found: Mapping[str, Any]) -> Row:
    video, image = found.get("video"), found.get("image")
    if video is not None:
        return {"videos": _videos([video])}
    return {} if image is None else {"images": image if isinstance(image, list) else [image]}


def _videos(value: Any) -> list[Any]:
    if not isinstance(value, list) or any(is_film(video) or isinstance(video, bytes | Slice) for video in value):
        raise BadRow("video files come later: give a list of frames")
    return value


def _timed(row: Mapping[str, Any]) -> Row:
    """``row`` with ``second_per_grid_ts``, the seconds from frame to frame of each video, as ``fps``."""
    out = {name: value for name, value in row.items() if name != "second_per_grid_ts"}
    seconds = row.get("second_per_grid_ts")
    if seconds:
        if not isinstance(seconds, list) or not all(isinstance(s, int | float) and s > 0 for s in seconds):
            raise BadRow(f"second_per_grid_ts must be a list of positive numbers, not {seconds!r}")
        out["fps"] = [1 / second for second in seconds]
    return out


def _natural(name: str) -> tuple[int, str]:
    """Sorts 2.jpg before 10.jpg."""
    digits = "".join(letter for letter in name.partition(".")[0] if letter.isdigit())
    return int(digits or 0), name


FORMS: Mapping[str, tuple[Callable[[Mapping[str, Any]], Row], tuple[str, ...], tuple[str, ...]]] = {
    "VQA": (_vqa, ("image", "context"), ("answers", "answer_weights")),
    "VQAOCR": (_vqa, ("image", "context"), ("text", "answers", "answer_weights")),
    "VidQA": (_vqa, ("video", "context"), ("answers", "answer_weights")),
    "MultiChoiceVQA": (_choice, ("image", "context", "choices"), ("correct_choice_idx",)),
    "Captioning": (_captioning, ("image", "caption"), ()),
    "OCR": (_ocr, ("image", "text"), ()),
    "Text": (_text, ("text",), ()),
    "Interleaved": (_interleaved, ("sequence",), ()),
    "ChatML": (_chatml, ("conversation",), ("imgs", "videos")),
}
"""Sample type -> (how it becomes a row, the fields it needs, those it may have)."""
