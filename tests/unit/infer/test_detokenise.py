"""Streamed pieces of text never hold half a character and join to the whole."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tessera.infer.detokenise import Detokeniser, Spelled, Spelling, StopTexts, streams
from tests.toys import make_tokenizer_dir


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One token per byte: every character beyond ASCII is spread over two to four tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.mark.parametrize(
    "text", ["plain words", "déjà vu — naïve", "汉字 and かな", "👩‍👩‍👧 family 🇫🇷", "\\frac{1}{2}\n\tx", " leading", ""]
)
def test_pieces_join_and_are_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    stream = Detokeniser(lambda some: tokenizer.decode(list(some), skip_special_tokens=False))
    pieces = [stream.push(token) for token in ids] + [stream.finish()]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_unfinished_character_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ok 👍").ids[:-1]
    stream = Detokeniser(lambda some: tokenizer.decode(list(some)))
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) == "ok "
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_invalid_bytes_do_not_hold_the_text_back_for_ever(tokenizer: Tokenizer) -> None:
    continuation = tokenizer.encode("👍").ids[-1]
    ids = [continuation] * 20 + tokenizer.encode("then text").ids
    stream = Detokeniser(lambda some: tokenizer.decode(list(some)))
    text = "".join([stream.push(token) for token in ids] + [stream.finish()])
    assert text.endswith("then text")
    assert text.count("\ufffd") == 20


def test_any_bytes_are_shown_as_they_are_in_the_whole(tokenizer: Tokenizer) -> None:
    """Streamed or not, the same text, and nothing is taken back, whatever a model says."""
    random = np.random.default_rng(0)
    lead = [token for token in range(256) if tokenizer.decode([token]) == "\ufffd"]
    for round_ in range(50):
        few = [int(token) for token in random.choice(lead, 6)]
        ids = [int(random.choice(few)) if random.random() < 0.8 else int(random.integers(256)) for _ in range(60)]
        for stream in (Detokeniser(lambda some: tokenizer.decode(list(some))), Spelled(Spelling(tokenizer))):
            pieces = [stream.push(token) for token in ids] + [stream.finish()]
            assert "".join(pieces) == tokenizer.decode(ids), round_


def test_bytes_of_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Special tokens are silent, others that were added are text, and what the bytes say is what decode says."""
    made = Tokenizer.from_file(str(make_tokenizer_dir(tmp_path) / "tokenizer.json"))
    made.add_tokens(["naïve added", "日本"])
    assert Spelling.fits(made) and Spelling.fits(tokenizer)
    ids = made.encode("<|im_start|>Describe naïve added 日本 the image 👍.<|im_end|>").ids
    stream = streams(made, lambda some: "wrong")()
    text = "".join([stream.push(token) for token in ids] + [stream.finish()])
    assert text == made.decode(ids, skip_special_tokens=True) == "Describe naïve added 日本 the image 👍."
    other = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    other.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    assert not Spelling.fits(other)
    assert isinstance(streams(other, lambda some: "")(), Detokeniser)


@pytest.mark.parametrize("stops", [["</s>"], ["ab", "abc"], ["bab"], ["\n\n", "x"], [""]])
def test_stops_are_found_across_pieces(stops: list[str]) -> None:
    """Whatever the pieces, the text ends before the first stop; nothing of a stop is ever shown."""
    random = np.random.default_rng(1)
    for _ in range(200):
        text = "".join(random.choice(list("abcx\n</s>"), 30))
        cuts = [0, *sorted(random.integers(0, 30, 8).tolist()), 30]
        stream = StopTexts(stops)
        shown = "".join(stream.push(text[a:b]) for a, b in pairwise(cuts)) + stream.finish()
        places = [text.find(stop) for stop in stops if stop and stop in text]
        assert shown == text[: min(places, default=None)]
        assert (stream.found is not None) == bool(places)


def test_leading_space_of_a_word_decoder() -> None:
    words = {"▁the": 0, "▁cat": 1, "s": 2}

    def decode(ids: Sequence[int]) -> str:
        names = {index: word for word, index in words.items()}
        return "".join(names[index] for index in ids).replace("▁", " ").removeprefix(" ")

    stream = Detokeniser(decode)
    assert [stream.push(token) for token in (0, 1, 2)] == ["the", " cat", "s"]
