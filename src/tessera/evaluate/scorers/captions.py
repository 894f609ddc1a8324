"""Captions against several people's: CIDEr-D, BLEU, ROUGE-L, on words cut as the Penn Treebank cuts them.

The official evaluation of COCO captions cuts words with Stanford's tokeniser, a Java program, and drops punctuation.
:func:`words` does so in Python. On everyday captions the two agree (tests compare them over committed outputs of the
Java program); on rarer things (addresses, smileys, unknown abbreviations) a token may differ. Given the same words,
the three scores equal the official program's (METEOR and SPICE need Java and are not offered).

CIDEr-D compares n-gram counts, each weighted by how few *images* have it among their references: so it is a property of
the whole set of answers, and a subset of a benchmark has other weights than the benchmark.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from tessera.evaluate.scorers.edits import common

_ABBREVIATIONS = """
    adm al apr assn assoc aug ave blvd brig bros calif capt cf co col comdr corp cpl ct dec dept det dr drs
    est etc ext feb fla fri ft gen gov govs hon inc jan jr jul jun lieut lt ltd maj mar mass messrs mon mr mrs
    ms mt nov oct ph pl plc pres prof profs pvt rd rep reps rev sen sens sep sept sgt sq sr st ste sts supt
    tel thu thurs tue tues univ vs wash wed
"""
_SIGNS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_SIGNS |= {"\N{EURO SIGN}": "$", "\N{POUND SIGN}": "#", "\N{CENT SIGN}": "cents", "\N{VULGAR FRACTION ONE HALF}": "1/2"}
_SINGLE = str.maketrans({"\N{LEFT SINGLE QUOTATION MARK}": "'", "\N{RIGHT SINGLE QUOTATION MARK}": "'"})
_TOKEN = re.compile(
    rf"""
      (?P<whole> https?://\S+ | www\.\S+ | [\w.]+@[\w.]+\.\w+ | (?<!\w)[@\#][A-Za-z]\w* | </?[A-Za-z]\w*>)
    | (?P<short> (?<![\w.])(?:(?i:{"|".join(_ABBREVIATIONS.split())})\.(?!\w)
               | (?i:nos?|figs?)\.(?=\s\d) | \w+\.(?=[,;])))
    | (?P<initials> (?<!\w)[A-Za-z](?:\.[A-Za-z])+\.?(?!\w) | (?i:\bph\.d\b\.?)
               | (?<![\w'-])[A-Za-z]\.(?!\s(?:The|A|An|It|He|She|They|There|This|In|On|And)(?![\w.]))(?!\w))
    | (?P<capitals> (?<!\w)[A-Z]+&[A-Z]+(?!\w))
    | (?P<number> (?<![\w.])[-+]?(?:\d+(?:[.,:/]\d+)*|\.\d+)(?![\w-]))
    | (?P<word> '(?:tis|twas)\b | 'n'(?!\w) | '\d0s\b | \w+(?:(?!'n')(?:[-/'.]|\.-)\w+)*)
    | (?P<clitic> 'n' | '(?:s|d|m|re|ve|ll|t|n)\b)
    | (?P<marks> [!?]+ | \.{{2,}} | -{{2,}} | `+ | '+)
    | (?P<sign> \S)
    """,
    re.VERBOSE,
)
_SPLIT = {
    "cannot": "can not",
    "gonna": "gon na",
    "gotta": "got ta",
    "wanna": "wan na",
    "lemme": "lem me",
    "gimme": "gim me",
    "'tis": "'t is",
    "'twas": "'t was",
    "y'all": "y' all",
}
_CLITIC = re.compile(r"(?<=\w)('(?:s|d|m|re|ve|ll|n))$")
_QUOTES = "\N{LEFT DOUBLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK}"
_DASHES = "\N{EN DASH}\N{EM DASH}\N{HORIZONTAL ELLIPSIS}"
_DROPPED = frozenset("\"'`.?!,:-;" + _QUOTES + _DASHES)


def words(caption: str) -> list[str]:
    """The words of a caption in lower case, without punctuation, as Stanford's tokeniser cuts them."""
    found: list[str] = []
    for match in _TOKEN.finditer(caption.translate(_SINGLE)):
        text = match[0].lower()
        if match.lastgroup == "word":
            found += _parts(text)
        elif match.lastgroup == "marks":
            found += [text] if text[0] in "!?" else []
        else:
            found.append(_SIGNS.get(text, text))
    return [word for word in found if word not in _DROPPED]


def _parts(word: str) -> list[str]:
    """``word`` without its clitics, and these."""
    if word in _SPLIT:
        return _SPLIT[word].split()
    word = _SIGNS.get(word, word)
    clitics: list[str] = []
    while found := _CLITIC.search(word):
        clitics.insert(0, found[1])
        word = word[: found.start()]
    if len(word) > 3 and word.endswith("n't"):
        clitics.insert(0, "n't")
        word = word.removesuffix("n't")
    return [word, *clitics]


Grams = Counter[tuple[str, ...]]


def grams(tokens: Sequence[str], longest: int = 4) -> list[Grams]:
    """Counts of the 1-grams, 2-grams ... of a text."""
    return [
        Counter(tuple(tokens[at : at + size]) for at in range(len(tokens) - size + 1)) for size in range(1, longest + 1)
    ]


def cider_d(answers: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """CIDEr-D of each answer, 10 for a perfect one; their mean is the benchmark's. Everything is cut into words.

    The length that the Gaussian penalty (sigma 6) looks at is the number of 2-grams, as in the authors' program.
    """
    held = [[grams(reference) for reference in people] for people in references]
    images: Grams = Counter()
    for people in held:
        images.update({gram for reference in people for counts in reference for gram in counts})
    everything = math.log(len(held)) if held else 0.0
    weight_of = {gram: everything - math.log(count) for gram, count in images.items()}

    def weighted(counts: Grams) -> tuple[dict[tuple[str, ...], float], float]:
        vector = {gram: count * weight_of.get(gram, everything) for gram, count in counts.items()}
        return vector, math.sqrt(sum(weight * weight for weight in vector.values()))

    scores = []
    for answer, people in zip(answers, held, strict=True):
        said = grams(answer)
        vectors = [weighted(counts) for counts in said]
        total = 0.0
        for reference in people:
            penalty = math.exp(-((said[1].total() - reference[1].total()) ** 2) / (2 * 6.0**2))
            for (mine, my_norm), counts in zip(vectors, reference, strict=True):
                theirs, their_norm = weighted(counts)
                if my_norm and their_norm:
                    both = sum(
                        min(weight, theirs.get(gram, 0.0)) * theirs.get(gram, 0.0) for gram, weight in mine.items()
                    )
                    total += penalty * both / (my_norm * their_norm)
        scores.append(10 * total / 4 / len(people))
    return scores


def bleu(
    answers: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]], *, smooth: bool = True
) -> list[float]:
    """BLEU 1 to 4 of all answers together, against the reference nearest in length (the shorter of two as near).

    ``smooth`` adds the minute constants of the COCO program, so that no match at all is not quite 0.
    """
    tiny, small = (1e-15, 1e-9) if smooth else (0.0, 0.0)
    hits, tries, said, wanted = [0] * 4, [0] * 4, 0, 0
    for answer, people in zip(answers, references, strict=True):
        said += len(answer)
        wanted += min((abs(len(reference) - len(answer)), len(reference)) for reference in people)[1]
        held = [grams(reference) for reference in people]
        for size, counts in enumerate(grams(answer)):
            most: Grams = Counter()
            for reference in held:
                most |= reference[size]
            hits[size] += (counts & most).total()
            tries[size] += counts.total()
    if not said and not smooth:
        return [0.0] * 4
    ratio = (said + tiny) / (wanted + small) if wanted + small else 1.0
    brevity = _brevity(ratio)
    scores, product = [], 1.0
    for size in range(4):
        below = tries[size] + small
        product *= (hits[size] + tiny) / below if below else 0.0
        scores.append(brevity * product ** (1 / (size + 1)))
    return scores


def _brevity(ratio: float) -> float:
    """The penalty for answers that are shorter than what was wanted, all together."""
    return 1.0 if ratio >= 1 else math.exp(1 - 1 / ratio)


def rouge_l(answer: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """ROUGE-L with beta 1.2: best precision and best recall over the references, which may be two of them."""
    shared = [common(answer, reference) for reference in references]
    precision = max(shared) / len(answer) if answer else 0.0
    recall = max(
        (same / len(reference) for same, reference in zip(shared, references, strict=True) if reference), default=0.0
    )
    if not precision or not recall:
        return 0.0
    return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
