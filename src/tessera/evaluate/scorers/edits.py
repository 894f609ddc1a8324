"""Edit distance and longest common subsequence, bit-parallel: one big-integer step per element of the longer side.

Column by column, the classical table only ever changes by -1, 0 or +1 between neighbours, so a whole column is two
bit vectors (Myers 1999, Hyyro 2003; for subsequences Hyyro 2004). Python's integers have as many bits as are needed.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def _places(items: Sequence[Hashable]) -> dict[Hashable, int]:
    """For each element the set of its places, as bits."""
    masks: dict[Hashable, int] = {}
    for at, item in enumerate(items):
        masks[item] = masks.get(item, 0) | 1 << at
    return masks


def distance(one: Sequence[Hashable], two: Sequence[Hashable]) -> int:
    """Levenshtein distance: the fewest insertions, deletions and replacements that turn ``one`` into ``two``."""
    if not one or not two:
        return len(one) + len(two)
    places, full, last = _places(one), (1 << len(one)) - 1, 1 << (len(one) - 1)
    up, down, found = full, 0, len(one)
    for item in two:
        same = places.get(item, 0)
        vertical = same | down
        horizontal = (((same & up) + up) ^ up) | same
        more = down | ~(horizontal | up) & full
        less = up & horizontal
        found += bool(more & last) - bool(less & last)
        more, less = more << 1 | 1, less << 1
        up = (less | ~(vertical | more)) & full
        down = more & vertical & full
    return found


def common(one: Sequence[Hashable], two: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence."""
    places, full = _places(one), (1 << len(one)) - 1
    row = full
    for item in two:
        hit = row & places.get(item, 0)
        row = ((row + hit) | (row - hit)) & full
    return len(one) - row.bit_count()
