"""The command line is a promise: the table of flags changes only together with ``flags.txt`` and ``docs/flags.md``.

After a wanted change, ``make docs`` writes both anew; the difference then shows in review.
"""

from __future__ import annotations

from pathlib import Path

from tessera.config.flags import FLAGS, VERBS
from tessera.config.manual import flags_page

FROZEN = Path(__file__).with_name("flags.txt")
PAGE = Path(__file__).parents[2] / "docs" / "flags.md"


def frozen_table() -> str:
    """One line per flag: names, kind, default, choices, bounds, variable, verbs."""
    lines = []
    for flag in FLAGS:
        names = "/".join((flag.name, *flag.aliases, *(f"megatron:{name}" for name in flag.megatron)))
        default = "".join(f" {verb}={value!r}" for verb, value in flag.defaults.items())
        verbs = ",".join(verb for verb in VERBS if flag.belongs_to(verb, "megatron"))
        facts = [f"{flag.room}.{names}", flag.kind, f"default={flag.default!r}{default}"]
        facts += [f"choices={'|'.join(flag.choices)}"] if flag.choices else []
        facts += [f"bounds={flag.low},{flag.high}"] if (flag.low, flag.high) != (None, None) else []
        facts += [f"env={flag.env}"] if flag.env else []
        facts += [f"only={flag.only}"] if flag.only else []
        facts += [f"means={dict(flag.means)!r}"] if flag.means else []
        facts += [f"carry={flag.carry}"] if flag.carry != "never" else []
        lines.append("  ".join([*facts, verbs]))
    return "\n".join(lines) + "\n"


def test_table_is_the_frozen_one() -> None:
    assert FROZEN.read_text() == frozen_table(), "the table of flags changed: if that is wanted, run `make docs`"


def test_page_is_current() -> None:
    assert PAGE.read_text() == flags_page(), "docs/flags.md is not current: run `make docs`"


if __name__ == "__main__":
    FROZEN.write_text(frozen_table())
    PAGE.write_text(flags_page())
