"""A conversation as token ids, with a weight on every token the model has to produce.

The label rule, token by token: the answer of each trained assistant turn *and its suffix* (``<|im_end|>`` and the
newline behind it) count 1; system, user and tool turns, headers, the first token of the sequence and everything that
stands for an image count 0. ``--loss_scale last_round`` trains only the turns behind the last user message, ``all``
everything; a message's own ``loss`` or ``loss_scale`` has the last word.

Text is tokenised piece by piece, cut where answers begin and end, so that a prompt has the same ids in training and at
inference. A media item is printed with one pad token per run of vision tokens; the ids are repeated afterwards, which
is cheaper than tokenising thousands of pads. The tokenizer is the checkpoint's ``tokenizer.json`` through the
``tokenizers`` library; transformers is imported only if that file is missing. Methods may be called from any thread.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tessera.config.errors import UserError
from tessera.contract.model import SEAM, Geometry, MediaItem
from tessera.data.sample import BadRow, ImageRef, Message, Sample
from tessera.data.template import CHATML, ChatTemplate
from tessera.models.geometry import pad_mask

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_TAG = re.compile(r"<(image|video)>")
_SHORT = 512


@dataclass(frozen=True, slots=True)
class Medium:
    """A media item together with the files (one, or one per frame) its pixels come from."""

    item: MediaItem
    sources: tuple[ImageRef, ...]


@dataclass(frozen=True, slots=True)
class Rendered:
    """Text of a sample in ``pieces`` of (text, loss weight), with its media in order of appearance.

    ``slots`` says how often each pad token in the text is repeated; ``plain`` text is tokenised as a document.
    """

    pieces: tuple[tuple[str, float], ...]
    media: tuple[Medium, ...]
    slots: tuple[int, ...]
    plain: bool = False


@dataclass(frozen=True, slots=True)
class Encoded:
    """``tokens [T] int64`` of one sample and ``loss_weight [T] float32``: what producing ``tokens[i]`` counts.

    ``loss_weight`` is not shifted: it belongs to the token itself, and ``loss_weight[0]`` is always 0.
    """

    tokens: np.ndarray
    loss_weight: np.ndarray
    media: tuple[Medium, ...] = ()

    @property
    def items(self) -> tuple[MediaItem, ...]:
        """Geometry of the media, in order of appearance."""
        return tuple(medium.item for medium in self.media)

    @property
    def still(self) -> bool:
        """Whether all media are single frames."""
        return all(len(medium.sources) <= 1 for medium in self.media)

    @property
    def patches(self) -> int:
        """Rows that the media take in the tower's input."""
        return sum(t * h * w for t, h, w in (medium.item.grid for medium in self.media))


class Renderer:
    """Chat template and tokenizer of the checkpoint in ``model_dir``.

    ``system`` is used where a row brings none (None: the template's own default); ``loss_scale`` is ``default``,
    ``last_round`` or ``all``.
    """

    def __init__(
        self, model_dir: str | Path, geometry: Geometry, system: str | None = None, loss_scale: str = "default"
    ) -> None:
        directory = Path(model_dir)
        tokens = special_tokens(directory)
        self.geometry = geometry
        self.tokenizer = _tokenizer(directory)
        self.template = ChatTemplate(_template_source(directory, self.tokenizer), tokens)
        self.system = system
        self.loss_scale = loss_scale
        eos = tokens.get("eos_token")
        self.eos_id: int | None = self.tokenizer.token_to_id(eos) if eos else None
        self._pads = {kind: self._pad(kind) for kind in geometry.pad_ids}
        self._short = lru_cache(maxsize=4096)(self._ids)  # prompts recur

    def render(self, sample: Sample, images: Sequence[Medium] = (), videos: Sequence[Medium] = ()) -> Rendered:
        """The sample as text with loss weights; the media of each kind are dealt to its tags in order."""
        messages, media, slots = self._filled(sample, images, videos)
        if sample.plain:
            text = "".join(message["content"] for message in messages)
            return self._complete([(text, 1.0)], media, slots, plain=True)
        found = self.template.pieces(messages, sample.tools, sample.variables)
        weights = self._weights([*self._system(sample), *sample.messages])
        rest = 1.0 if self.loss_scale == "all" else 0.0
        pieces = [(text, rest if answer is None else weights[answer]) for text, answer in found]
        return self._complete(pieces, media, slots)

    def prompt(self, sample: Sample, images: Sequence[Medium] = (), videos: Sequence[Medium] = ()) -> Rendered:
        """The conversation without its final answer, ended by the template's generation prompt."""
        kept = sample.messages[:-1] if sample.answer is not None else sample.messages
        if not kept:
            raise BadRow("nothing to answer: the row holds an assistant turn only")
        asked = replace(sample, messages=kept)
        messages, media, slots = self._filled(asked, images, videos)
        text = self.template.render(messages, asked.tools, asked.variables, generation_prompt=True)
        return self._complete([(text, 0.0)], media, slots)

    def encode(self, rendered: Rendered) -> Encoded:
        """Token ids and weights of a rendered sample, pads expanded."""
        if rendered.plain:
            ids = [self._document(rendered.pieces[0][0])]
        else:
            ids = [self._short(text) if len(text) <= _SHORT else self._ids(text) for text, _ in rendered.pieces]
        counts = [len(piece) for piece in ids]
        tokens = np.array(list(chain.from_iterable(ids)), dtype=np.int64)
        weights = np.repeat(np.array([weight for _, weight in rendered.pieces], dtype=np.float32), counts)
        if rendered.slots:
            tokens, weights = self._expanded(tokens, weights, rendered.slots)
        if len(weights):
            weights[0] = 0.0
        return Encoded(tokens, weights, rendered.media)

    def measure(self, batch: Sequence[Rendered]) -> list[tuple[int, int]]:
        """(tokens, trained tokens) of each sample; equal pieces, such as a fixed prompt, are tokenised once."""
        texts = {text: 0 for rendered in batch if not rendered.plain for text, _ in rendered.pieces}
        found = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False) if texts else []
        texts = dict(zip(texts, (len(encoding) for encoding in found), strict=True))
        sizes = []
        for rendered in batch:
            if rendered.plain:
                lengths = [len(self._document(rendered.pieces[0][0]))]
            else:
                lengths = [texts[text] for text, _ in rendered.pieces]
            trained = sum(n for n, (_, weight) in zip(lengths, rendered.pieces, strict=True) if weight)
            if rendered.pieces[0][1]:
                trained -= 1
            sizes.append((sum(lengths) + sum(rendered.slots) - len(rendered.slots), trained))
        return sizes

    def extents(self, encoded: Encoded) -> list[tuple[int, int]]:
        """[first, behind last) token of each media item, its start and end tokens included."""
        if not encoded.media:
            return []
        pads = np.flatnonzero(pad_mask(encoded.tokens, self.geometry.pad_ids))
        extents, taken = [], 0
        for item in encoded.items:
            lead, trail = self._around(self.geometry.text(item), self._pads[item.kind])
            count = sum(self.geometry.slots(item))
            extents.append((int(pads[taken]) - lead, int(pads[taken + count - 1]) + 1 + trail))
            taken += count
        return extents

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """The text of ``ids``."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def describe(self, encoded: Encoded) -> str:
        """What the model sees and what it learns, decoded: ``[INPUT]`` and ``[LABELS]`` with runs collapsed."""
        pads = set(self.geometry.pad_ids.values())
        tokens, trained = encoded.tokens.tolist(), (encoded.loss_weight != 0).tolist()
        shown = [str(token) if token in pads else None for token in tokens]
        labels = [None if counts else "-100" for counts in trained]
        return f"[INPUT] {self._collapsed(tokens, shown)}\n[LABELS] {self._collapsed(tokens, labels)}"

    def _collapsed(self, tokens: list[int], names: Sequence[str | None]) -> str:
        """The tokens as text; runs of tokens with one name become ``[name * count]``."""
        out: list[str] = []
        for start, end in _runs(names):
            name = names[start]
            out.append(self.decode(tokens[start:end]) if name is None else f"[{name} * {end - start}]")
        return "".join(out)

    def _filled(
        self, sample: Sample, images: Sequence[Medium], videos: Sequence[Medium]
    ) -> tuple[list[dict[str, Any]], tuple[Medium, ...], tuple[int, ...]]:
        """Messages as a chat template reads them, with the media's text in place of their tags."""
        queues = {"image": iter(images), "video": iter(videos)}
        media: list[Medium] = []

        def text_of(match: re.Match[str]) -> str:
            medium = next(queues[match[1]], None)
            if medium is None:
                raise BadRow(f"more <{match[1]}> tags than {match[1]}s")
            media.append(medium)
            text = self.geometry.text(medium.item)
            # Rows write the newline behind an image, or leave it to us.
            followed = match.string.startswith("\n", match.end())
            return text[:-1] if followed and text.endswith("\n") else text

        messages: list[dict[str, Any]] = []
        for message in [*self._system(sample), *sample.messages]:
            content = _TAG.sub(text_of, message.content) if "<" in message.content else message.content
            messages.append({"role": message.role, "content": content})
            if message.tool_calls:
                messages[-1]["tool_calls"] = list(message.tool_calls)
        slots = tuple(count for medium in media for count in self.geometry.slots(medium.item))
        return messages, tuple(media), slots

    def _system(self, sample: Sample) -> list[Message]:
        if self.system is None or sample.plain or sample.messages[0].role == "system":
            return []
        return [Message("system", self.system)]

    def _weights(self, messages: Sequence[Message]) -> list[float]:
        """Loss weight of each assistant message."""
        last_user = max((i for i, message in enumerate(messages) if message.role == "user"), default=-1)
        weights = []
        for index, message in enumerate(messages):
            if message.role == "assistant":
                policy = 0.0 if self.loss_scale == "last_round" and index < last_user else 1.0
                weights.append(policy if message.loss is None else message.loss)
        return weights

    def _complete(
        self, pieces: list[tuple[str, float]], media: tuple[Medium, ...], slots: tuple[int, ...], *, plain: bool = False
    ) -> Rendered:
        """The rendered sample, if the pads in its text are those of its media and no others."""
        if plain:  # the tokenizer's own special tokens go around the whole
            pieces = [(text.replace(SEAM, ""), weight) for text, weight in pieces]
        pieces = [(part, weight) for text, weight in pieces for part in text.split(SEAM) if part]
        if not pieces:
            raise BadRow("the text is empty")
        found = sum(text.count(pad) for text, _ in pieces for pad in self._pads.values())
        if found != len(slots):
            raise BadRow(f"the text holds {found} media pad tokens, its media need {len(slots)}")
        return Rendered(tuple(pieces), media, slots, plain)

    def _expanded(
        self, tokens: np.ndarray, weights: np.ndarray, slots: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and weights with the k-th pad repeated ``slots[k]`` times at weight 0."""
        pads = pad_mask(tokens, self.geometry.pad_ids)
        repeats = np.ones(len(tokens), dtype=np.int64)
        repeats[pads] = slots
        weights[pads] = 0.0
        return np.repeat(tokens, repeats), np.repeat(weights, repeats)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _document(self, text: str) -> list[int]:
        """Ids of a plain text: the tokenizer's own special tokens around it, and the end of the document."""
        ids = list(self.tokenizer.encode(text).ids)
        if self.eos_id is not None and ids[-1:] != [self.eos_id]:
            ids.append(self.eos_id)
        return ids

    def _around(self, text: str, pad: str) -> tuple[int, int]:
        """How many tokens the text of a media item has before its first pad and behind its last one."""
        before, behind = text.partition(pad)[0], text.rpartition(pad)[2].rstrip("\n")
        return sum(len(self._short(part)) for part in before.split(SEAM) if part), len(self._short(behind))

    def _pad(self, kind: str) -> str:
        """Text of a kind's pad token."""
        pad = self.geometry.pad_ids[kind]
        text = self.tokenizer.id_to_token(pad)
        ids = self.tokenizer.encode(self.geometry.placeholder[kind], add_special_tokens=False).ids
        if text is None or ids.count(pad) != 1:
            raise UserError(
                f"the tokenizer does not print {self.geometry.placeholder[kind]!r} with token {pad} in it: "
                f"tokenizer and config.json of the model disagree about the {kind} token"
            )
        return text


def _runs(names: Sequence[str | None]) -> Iterator[tuple[int, int]]:
    """[start, end) of each run of equal names."""
    start = 0
    for index in range(1, len(names) + 1):
        if index == len(names) or names[index] != names[start]:
            yield start, index
            start = index


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    return found if isinstance(found, dict) else {}


def special_tokens(directory: Path) -> dict[str, str]:
    """``bos_token``, ``eos_token`` ... as text, from the tokenizer's config files."""
    files = ("special_tokens_map.json", "tokenizer_config.json")
    merged = {key: value for file in files for key, value in _read_json(directory / file).items()}
    named = {name: value for name, value in merged.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def stored_template(directory: Path) -> str | None:
    """The chat template's jinja source, wherever the checkpoint in ``directory`` keeps it; None if it has none."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        held = _read_json(directory / name).get("chat_template")
        if isinstance(held, list):  # several named templates
            held = next((entry["template"] for entry in held if entry.get("name") == "default"), None)
        if isinstance(held, str):
            return held
    return None


def _template_source(directory: Path, tokenizer: Tokenizer) -> str:
    """The chat template of the checkpoint, or ChatML where its tokens suggest that."""
    stored = stored_template(directory)
    if stored is not None:
        return stored
    if tokenizer.token_to_id("<|im_start|>") is not None and tokenizer.token_to_id("<|im_end|>") is not None:
        return CHATML
    raise UserError(f"{directory} has no chat template: put a chat_template.jinja there")


def _tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of the checkpoint, with no padding or truncation of its own."""
    from tokenizers import Tokenizer

    file = directory / "tokenizer.json"
    if file.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # noqa: BLE001 - the library raises bare Exception
            raise UserError(f"{file} cannot be read as a tokenizer: {error}") from None
    else:
        import transformers

        # Asked for by its class, a tokenizer does not look at config.json, which may name code that nobody runs here.
        named = _read_json(directory / "tokenizer_config.json").get("tokenizer_class")
        kind = str(named) if named in transformers.__all__ else "AutoTokenizer"
        try:
            tokenizer = (
                getattr(transformers, kind).from_pretrained(directory, trust_remote_code=False).backend_tokenizer
            )
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{directory} holds no usable tokenizer (tokenizer.json): {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
