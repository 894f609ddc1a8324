"""Output that must fit a JSON schema or a pattern. (Names only; the work follows.)"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer must be: ``kind`` is ``json_schema``, ``json_object`` or ``regex``.

    ``text`` is the schema as JSON text or the pattern, and empty for ``json_object``.
    """

    kind: str
    text: str = ""
