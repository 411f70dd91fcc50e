"""How soon is one command done, where each is awaited before the next one is given?

    python -m benchmarks.one_at_a_time [--stores memory sqlite postgres mysql] [--against REV]
        [--together 500]

Every contender is a process of its own that lives through all rounds; rounds take turns, so
what else the machine does meets all of them. The library `eventsourcing` and the Rust crates
mysql-es and postgres-es do the same work on a store of the same durability, where they have
that store. With `--together` this framework gets so many commands at once, as a program gives
them that has many users; the others still get one after the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks import measuring
from benchmarks.contenders import building
from benchmarks.measuring import OURS, Contender

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from benchmarks.measuring import Revision

STORES = ("memory", "sqlite", "postgres", "mysql")
CRATES = {"postgres": "postgres-es", "mysql": "mysql-es"}


def contenders(
    store: str, urls: Sequence[str], against: Revision | None, chosen: argparse.Namespace
) -> list[Contender]:
    """Return who is measured on a store; each has a database of its own."""
    together = str(chosen.together)
    ours = Contender(OURS, ("benchmarks.contenders.ours", urls[0], together))
    if against is not None:
        module = ("benchmarks.contenders.ours", urls[1], together)
        return [ours, Contender(against.name, module, against.tree)]
    found = [ours]
    if store != "mysql":
        library = ("benchmarks.contenders.eventsourcing_bank", urls[1])
        found.append(Contender("eventsourcing", library))
    if store in CRATES and (program := building.crates(quick=chosen.quick)) is not None:
        found.append(Contender(CRATES[store], (urls[2], "1"), program=(str(program),)))
    return found


def main() -> None:
    """Measure, on one store after the other."""
    parser = measuring.options(__doc__, rounds=15, commands=300)
    parser.add_argument("--stores", nargs="+", choices=STORES, default=STORES)
    parser.add_argument("--together", type=int, default=1, help="of our commands at once")
    chosen = parser.parse_args()
    chosen.commands = max(chosen.commands, chosen.together)
    how = f", ours {chosen.together} at once" if chosen.together > 1 else ""
    report = measuring.Report("one_at_a_time", chosen)
    with measuring.revision(chosen.against) as against:
        for store in chosen.stores:
            with measuring.databases(store) as urls:
                found = measuring.race(contenders(store, urls, against, chosen), chosen)
                report.add(f"{store}{how}", found)
    report.finish()


if __name__ == "__main__":
    main()
