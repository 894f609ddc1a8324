"""Streamed pieces of text never hold half a character and join to the whole."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tessera.infer.detokenise import Detokeniser


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


def test_leading_space_of_a_word_decoder() -> None:
    words = {"▁the": 0, "▁cat": 1, "s": 2}

    def decode(ids: Sequence[int]) -> str:
        names = {index: word for word, index in words.items()}
        return "".join(names[index] for index in ids).replace("▁", " ").removeprefix(" ")

    stream = Detokeniser(decode)
    assert [stream.push(token) for token in (0, 1, 2)] == ["the", " cat", "s"]
