"""A chart of what was measured: `python -m benchmarks.charts FOUND.json CHART.svg [SETTING …]`.

A panel for each setting, with two groups of bars: by the wall's clock and of CPU, of latencies the
50th and the 99th percentile. A bar is the median of a contender's rounds, the line on it goes from
the least to the most, and behind it stands the median of the ratios to the first. Groups have
scales of their own; a group that an earlier panel has is left out: of the processes of one run the
time by the wall's clock is the same.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from benchmarks.measuring import OURS, ratio

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

Rounds: TypeAlias = "Mapping[str, Sequence[float]]"
"""Of each contender the figures of its rounds."""

LETTER: Final = 6.3  # about how wide one is
NUMBERS: Final = 110  # what stands behind a bar
WIDTH: Final = 210  # of the longest line
ROW: Final = 22
COLOURS: Final = ("#4878a8", "#c8803c")
CLOCKS: Final = {"wall": "by the wall's clock", "cpu": "CPU"}
FEW: Final = 10  # below it decimals matter
TOO_FAR: Final = 2.5  # times the longest bar: what is beyond would leave no room for bars


@dataclass(frozen=True, slots=True)
class Panel:
    """What was found in one setting: groups of bars, by what they show."""

    setting: str
    groups: Mapping[str, Rounds]


def panels(found: Mapping[str, Any]) -> Iterator[Panel]:
    """Yield what a benchmark's JSON has."""
    each = found.get("each", "a command")
    for setting, contenders in found.get("microseconds", {}).items():
        yield Panel(
            setting,
            {
                f"µs {each}, {title}": {name: it[clock] for name, it in contenders.items()}
                for clock, title in CLOCKS.items()
            },
        )
    latencies: dict[str, Any] = found.get("milliseconds", {})
    for what in latencies and next(iter(latencies.values()))["p50"]:
        groups = {
            f"ms, {part}": {name: it[part][what] for name, it in latencies.items()}
            for part in ("p50", "p99")
        }
        yield Panel(what, groups)
    if latencies:
        idle = {name: it["idle"] for name, it in latencies.items()}
        yield Panel("with nothing to do", {"statements a second": idle})
    for setting, by_count in found.get("megabytes", {}).items():
        yield Panel(setting, {"MB": {name: [it] for name, it in by_count.items()}})


def chart(found: Mapping[str, Any], settings: Sequence[str] = ()) -> str:
    """Return the SVG of a benchmark's JSON, of some of its settings or all."""
    chosen = [it for it in panels(found) if not settings or it.setting in settings]
    names = {name for it in chosen for rounds in it.groups.values() for name in rounds}
    left = round(20 + LETTER * max(map(len, names)))
    group = left + WIDTH + NUMBERS
    parts: list[str] = []
    drawn: list[tuple[str, Rounds]] = []
    top = 0
    for panel in chosen:
        parts.append(_text(8, top + 18, f"{found['question']}: {panel.setting}", "bold"))
        rows = 0
        for column, (title, rounds) in enumerate(panel.groups.items()):
            if (title, rounds) in drawn:
                continue
            drawn.append((title, rounds))
            rows = max(rows, len(rounds))
            parts.append(_text(column * group + left, top + 34, title))
            parts += _bars(rounds, column * group, left, top + 40, COLOURS[column])
        top += 52 + ROW * rows
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * group}" height="{top}" '
        'font-family="sans-serif" font-size="11">'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )


def _bars(rounds: Rounds, x: int, left: int, top: int, colour: str) -> Iterator[str]:
    farthest = max(max(each) for each in rounds.values())
    most = min(farthest, TOO_FAR * max(map(statistics.median, rounds.values()))) or 1.0
    ordered = sorted(rounds.items(), key=_ours_first)
    first = ordered[0][1]
    for place, (name, each) in enumerate(ordered):
        y, middle, begin = top + place * ROW, statistics.median(each), x + left
        length, least, longest = (
            WIDTH * min(it / most, 1.0) for it in (middle, min(each), max(each))
        )
        arrow = "→ " if max(each) > most else ""
        number = f"{middle:,.0f}" if middle >= FEW else f"{middle:.1f}"
        times = f" ×{ratio(each, first):.2f}" if place and any(first) else ""
        yield _text(x + 8, y + 13, name)
        yield (
            f'<rect x="{begin}" y="{y + 2}" width="{length:.1f}" height="15" fill="{colour}"/>'
            f'<path d="M{begin + least:.1f} {y + 9.5}H{begin + longest:.1f}" stroke="black"/>'
            f"{_text(begin + max(length, longest) + 4, y + 13, arrow + number + times)}"
        )


def _ours_first(contender: tuple[str, Any]) -> bool:
    return contender[0] != OURS


def _text(x: float, y: int, text: str, weight: str = "normal") -> str:
    return f'<text x="{x:.0f}" y="{y}" font-weight="{weight}">{escape(text)}</text>'


def main() -> None:
    source, target, *settings = sys.argv[1:]
    Path(target).write_text(chart(json.loads(Path(source).read_text()), settings))


if __name__ == "__main__":
    main()
