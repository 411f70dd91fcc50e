"""Coverage-guided fuzzing of one target: `make fuzz` runs them all in turn.

    python -m tests.fuzz http -max_total_time=600 corpus/

What follows the target's name are options and folders of libFuzzer. What it finds it writes to a
file `crash-…`, which as the only argument is tried again. The settings must name the store and
the broker `memory://`.
"""

from __future__ import annotations

import random
import sys
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, cast

import orjson

# `make fuzz` installs it beside the project; it has no types.
atheris: Any = import_module("atheris")
with atheris.instrument_imports(include=["cqrs_es", "domain"]):
    from tests.fuzz_targets import EXAMPLES, TARGETS

ODD: Final[list[Any]] = [
    None, True, -1, 0, 2**63, 2**64 - 1, 1e308, 1.5, "", "0", "-1", "NaN", "1e999", "9" * 5000,
    "\x00", "\ufeff", "é", "e\u0301", "😀", "2026-02-30T00:00:00Z", "0001-01-01T00:00:00+23:59",
    "9999-12-31T23:59:60Z", [], {}, [[]], {"": None}, "٣", "\u2028", "1" * 70,
]  # fmt: skip


def main() -> None:
    """Fuzz what the command line names."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"name one of: {', '.join(TARGETS)}")
    program, name, *options = sys.argv
    with TemporaryDirectory() as folder:
        for number, example in enumerate(EXAMPLES[name]):
            (Path(folder) / str(number)).write_bytes(example)
        atheris.Setup([program, *options, folder], TARGETS[name], custom_mutator=mutated)
        atheris.Fuzz()


def mutated(data: bytes, most: int, seed: int) -> bytes:
    """Change a value within the JSON that the bytes have; else, and now and then, the bytes.

    A parser written in C shows no coverage, so bytes alone would hardly ever get through it.
    """
    chance = random.Random(seed)
    start = data.find(b"{")
    try:
        value = orjson.loads(data[max(start, 0) :])
    except ValueError:
        value = None
    if not isinstance(value, dict) or chance.random() < 0.2:
        changed: bytes = atheris.Mutate(data, most)
        return changed
    _change(value, chance)
    return data[:start] + orjson.dumps(value)[: most - start]


def _change(value: Any, chance: random.Random) -> None:
    """Replace, take away or add one value, at any depth."""
    places: list[Any] = [*value] if isinstance(value, dict) else [*range(len(value))]
    if not places:
        return
    place = chance.choice(places)
    if isinstance(value[place], dict | list) and value[place] and chance.random() < 0.7:
        _change(value[place], chance)
        return
    what = chance.randrange(4)
    text = cast("Any", value[place])
    if what == 0:
        del value[place]
    elif what == 1 and isinstance(value, dict):
        value[str(chance.choice(ODD))] = value[place]
    elif what == 2 and isinstance(text, str) and text:
        at = chance.randrange(len(text))
        value[place] = text[:at] + str(chance.choice(ODD)) + text[at + 1 :]
    else:
        value[place] = chance.choice(ODD)


main()
