"""Short answers made comparable: punctuation, number words, articles and contractions, as the VQA challenges do it.

Three programs share the idea and the tables and differ in a detail each, which changes scores:

* ``vqa`` (the VQAv2 script, Megatron): a full stop goes unless a digit *follows* it, so ``5.`` is ``5``;
* ``evalai`` (the TextVQA challenge): before that, text is lower-cased and loses ``,`` and ``?``, ``'s`` is set apart;
* ``vlmevalkit``: a full stop goes unless a digit stands on *either* side, so ``5.`` stays ``5.``.

All of them remove at most 32 full stops, and drop a punctuation mark where it touches a space or where the text has a
number like ``1,000``, else put a space in its place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS: Mapping[str, str] = {word: str(value) for value, word in enumerate(_DIGITS)} | {"none": "0"}
ARTICLES = frozenset(("a", "an", "the"))
_CONTRACTED = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll
    how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't
    should've shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's
    there'd there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've
    wouldn't y'all you'd you'll you're you've couldn't've hadn't've he'd've it'd've mightn't've she'd've
    shouldn't've somebody'd've someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've
    y'all'll you'd've y'all'd've 'ow's'at
"""


def _contractions() -> dict[str, str]:
    """Each form by every spelling of it that lacks one apostrophe."""
    found = {"somebody'd": "somebodyd"}
    for form in _CONTRACTED.split():
        for at, sign in enumerate(form):
            if sign == "'":
                found[form[:at] + form[at + 1 :]] = form
    return found


CONTRACTIONS: Mapping[str, str] = _contractions()
STOPS: Mapping[str, re.Pattern[str]] = {
    "vqa": re.compile(r"\.(?!\d)"),
    "evalai": re.compile(r"\.(?!\d)"),
    "vlmevalkit": re.compile(r"(?<!\d)\.(?!\d)"),
}
COMMAS: Mapping[str, re.Pattern[str]] = {
    "vqa": re.compile(r"\d,\d"),
    "evalai": re.compile(r"(?<=\d),+(?=\d)"),
    "vlmevalkit": re.compile(r"\d,\d"),
}
_STOPS_AT_MOST = 32


def unpunctuated(text: str, style: str) -> str:
    """``text`` without punctuation, by the rule of ``style`` (see the module)."""
    number = COMMAS[style].search(text) is not None
    out = text
    for mark in PUNCTUATION:
        gone = number or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if gone else " ")
    return STOPS[style].sub("", out, count=_STOPS_AT_MOST)


def plain_words(text: str) -> str:
    """Lower case, number words as digits, no articles, contractions with their apostrophe, single spaces."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def normal(text: str, style: str) -> str:
    """``text`` as two short answers are compared; ``style`` is ``vqa``, ``evalai`` or ``vlmevalkit``."""
    if style == "evalai":
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return plain_words(unpunctuated(text, style))
