"""What reading and arranging views promises: rows, pages, generations, published tables."""

from __future__ import annotations

import math
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import TYPE_CHECKING
from uuid import UUID

import orjson
import pytest

from cqrs_es import errors
from cqrs_es.ports.views import ParkedAggregate, ViewRow
from tests.contract.building import AWKWARD_IDS, account
from tests.stores import in_sql, on_dynamodb, on_sql, sql_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cqrs_es.ports.storage import Storage
    from cqrs_es.ports.views import SqlValue
    from cqrs_es.types import AggregateKey

TABLE = "ledger__1"


@pytest.fixture
async def storage(storage: Storage) -> Storage:
    """Prepare a view's table."""
    await storage.views.create_table(TABLE)
    return storage


def row(view_id: str, version: int = 1, **content: object) -> ViewRow:
    return ViewRow(view_id, version, orjson.dumps(content))


async def save(storage: Storage, rows: Iterable[ViewRow], table: str = TABLE) -> None:
    async with storage.views.transaction() as transaction:
        await transaction.save(table, list(rows))


async def test_a25_view_row(storage: Storage) -> None:
    """A row is missing, then written, then replaced; each table has rows of its own."""
    assert await storage.views.get(TABLE, "1") is None
    await storage.views.create_table("other__1")
    await save(storage, [row("1", balance="1.00")])
    await save(storage, [row("1", 2, balance="2.00")])
    stored = await storage.views.get(TABLE, "1")
    assert stored is not None
    assert (stored.view_id, stored.version) == ("1", 2)
    assert orjson.loads(stored.payload) == {"balance": "2.00"}
    assert await storage.views.get("other__1", "1") is None


async def test_b13_view_ids_compare_by_bytes(storage: Storage) -> None:
    """View ids that differ in case, accents, spaces or normal form are different rows."""
    await save(storage, [row(view_id, id=view_id) for view_id in AWKWARD_IDS])
    for view_id in AWKWARD_IDS:
        stored = await storage.views.get(TABLE, view_id)
        assert stored is not None
        assert (stored.view_id, orjson.loads(stored.payload)) == (view_id, {"id": view_id})


async def test_rows_are_listed_in_pages(storage: Storage) -> None:
    """Rows are listed in the order of their ids' bytes, a page at a time, each once."""
    await save(storage, [row(view_id) for view_id in AWKWARD_IDS])
    seen: list[str] = []
    while page := await storage.views.page(TABLE, after=seen[-1] if seen else "", limit=7):
        assert len(page) <= 7
        seen.extend(found.view_id for found in page)
    assert seen == sorted(AWKWARD_IDS, key=str.encode)
    assert await storage.views.count(TABLE) == len(AWKWARD_IDS)


@on_sql
async def test_big_row(storage: Storage) -> None:
    """A row of a megabyte comes back as it was."""
    text = "💸'\"\\%s?" * 90_000
    await save(storage, [row("big", text=text)])
    stored = await storage.views.get(TABLE, "big")
    assert stored is not None
    assert orjson.loads(stored.payload) == {"text": text}


@on_dynamodb
async def test_row_that_is_too_big(storage: Storage) -> None:
    """A row of more than DynamoDB takes is refused, with the others of its transaction."""
    with pytest.raises(errors.TooLarge, match="400 KB"):
        await save(storage, [row("small"), row("big", text="💸" * 110_000)])
    assert await storage.views.page(TABLE) == []


# --- Tables ------------------------------------------------------------------


async def test_creating_a_table_twice(storage: Storage) -> None:
    """A table that is there is left as it is."""
    await save(storage, [row("1")])
    await storage.views.create_table(TABLE)
    assert await storage.views.get(TABLE, "1") is not None


async def test_dropping_a_table_twice(storage: Storage) -> None:
    """A table that is not there is no error to drop; created again it is empty."""
    await save(storage, [row("1")])
    await storage.views.drop_table(TABLE)
    await storage.views.drop_table(TABLE)
    await storage.views.create_table(TABLE)
    assert await storage.views.page(TABLE) == []


@on_sql
async def test_columns_of_a_table(storage: Storage) -> None:
    """A table's columns are named in their order; a table that is not there has none."""
    assert await sql_of(storage.views).columns(TABLE) == ["view_id", "version", "payload"]
    assert await sql_of(storage.views).columns("nothing__1") == []


async def test_tables_are_listed(storage: Storage) -> None:
    """Tables by their names, whose case may be folded; no SQL views."""
    await storage.views.create_table("Other__2")
    if storage.views.sql:
        await storage.views.sql.publish("ledger", TABLE)
    ours = {name.lower() for name in await storage.views.list_tables() if "__" in name}
    assert ours == {TABLE, "other__2"}


@on_sql
async def test_columns_of_a_table_of_ones_own(storage: Storage) -> None:
    """Their names are those of the definitions, without constraints."""
    await sql_of(storage.views).create(
        "own__1", "z INT, a DECIMAL(10, 2), CHECK ((a > 0) AND (z > 0)), PRIMARY KEY (z)"
    )
    assert await sql_of(storage.views).columns("own__1") == ["z", "a"]


async def test_table_with_a_reserved_name(storage: Storage) -> None:
    """A view may be called like a word of SQL."""
    for name in ("order", "select__1", "Group"):
        await storage.views.create_table(name)
        await save(storage, [row("1")], name)
        assert await storage.views.get(name, "1") is not None


@on_sql
async def test_published_table_is_read_by_name(storage: Storage) -> None:
    """The published name shows the table's rows as they are now."""
    await save(storage, [row("1")])
    await sql_of(storage.views).publish("ledger", TABLE)
    await save(storage, [row("2")])
    ids = await sql_of(storage.views).query("SELECT view_id FROM ledger ORDER BY view_id")
    assert [tuple(found) for found in ids] == [("1",), ("2",)]


@on_sql
async def test_publishing_is_idempotent_and_switches(storage: Storage) -> None:
    """Publishing again changes nothing; publishing another table shows that one."""
    await storage.views.create_table("ledger__2")
    await save(storage, [row("old")])
    await save(storage, [row("new")], "ledger__2")
    for table, shown in ((TABLE, "old"), (TABLE, "old"), ("ledger__2", "new")):
        await sql_of(storage.views).publish("ledger", table)
        ids = await sql_of(storage.views).query("SELECT view_id FROM ledger")
        assert [tuple(found) for found in ids] == [(shown,)]


@on_sql
async def test_old_generation_is_dropped_after_the_switch(storage: Storage) -> None:
    """Once another table is published the old one can go."""
    await storage.views.create_table("ledger__2")
    await save(storage, [row("new")], "ledger__2")
    await sql_of(storage.views).publish("ledger", TABLE)
    await sql_of(storage.views).publish("ledger", "ledger__2")
    await storage.views.drop_table(TABLE)
    assert len(await sql_of(storage.views).query("SELECT view_id FROM ledger")) == 1


# --- Queries -----------------------------------------------------------------


@on_sql
async def test_a_name_that_shows_a_table_is_dropped(storage: Storage) -> None:
    """A second time too, and the table stays."""
    await save(storage, [row("1")])
    await sql_of(storage.views).publish("ledger", TABLE)
    for _ in range(2):
        await sql_of(storage.views).unpublish("ledger")
    with pytest.raises(errors.StoreError):
        await sql_of(storage.views).query("SELECT view_id FROM ledger")
    assert await storage.views.count(TABLE) == 1


@on_sql
async def test_query_with_parameters(storage: Storage) -> None:
    """Parameters stand where the `?` are, and keep their type and every character."""
    texts = ("", "é💸", "?", "%s", "100%", "'", '"', "\\", "a\nb")
    numbers = (0, -1, 2**62)
    columns = "number BIGINT NOT NULL PRIMARY KEY, name VARCHAR(40)"
    await sql_of(storage.views).create("mixed__1", columns)
    async with in_sql(storage.views) as sql:
        for number, text in enumerate(texts, start=100):
            await sql.execute("INSERT INTO mixed__1 VALUES (?, ?)", (number, text))
        for number in numbers:
            await sql.execute("INSERT INTO mixed__1 VALUES (?, ?)", (number, None))
    for text in texts:
        found = await sql_of(storage.views).query(
            "SELECT name FROM mixed__1 WHERE name = ?", (text,)
        )
        assert [tuple(each) for each in found] == [(text,)]
    for number in numbers:
        where = "SELECT number, name FROM mixed__1 WHERE number = ?"
        found = await sql_of(storage.views).query(where, (number,))
        assert [tuple(each) for each in found] == [(number, None)]


@on_sql
async def test_columns_keep_the_type_of_their_values(storage: Storage) -> None:
    """Text, whole numbers, floats and NULL come back from a projector's table as they went in."""
    columns = "id BIGINT PRIMARY KEY, name VARCHAR(40), number BIGINT, rate DOUBLE PRECISION"
    await sql_of(storage.views).create("mixed__1", columns)
    rows = [
        (1, "é💸 '?' %s \\", -(2**63), 0.1),
        (2, "", 2**63 - 1, -1e300),
        (3, None, None, None),
        (4, "12", 0, 3.0),
    ]
    async with in_sql(storage.views) as sql:
        for each in rows:
            await sql.execute("INSERT INTO mixed__1 VALUES (?, ?, ?, ?)", each)
    found = await sql_of(storage.views).query(
        "SELECT id, name, number, rate FROM mixed__1 ORDER BY id"
    )
    assert [tuple(each) for each in found] == rows
    assert isinstance(found[3][3], float)


COLUMNS = """
    id BIGINT PRIMARY KEY, price DECIMAL(20, 2) NOT NULL, day DATE, at TIMESTAMP,
    done BOOLEAN NOT NULL, body BLOB, key_ UUID, name VARCHAR(60), CHECK (id > 0)
"""
AT = datetime(2026, 3, 29, 1, 30, 0, 123456, tzinfo=UTC)
TYPED: list[tuple[SqlValue, ...]] = [
    (
        1,
        Decimal("12345678901234567.89"),
        date(2026, 3, 29),
        AT,
        True,
        b"\x00'\\\xff",
        UUID(int=1),
        "a",
    ),
    (
        2,
        Decimal("-0.01"),
        date(1970, 1, 1),
        AT - timedelta(days=20_000),
        False,
        b"",
        UUID(int=2),
        "",
    ),
    (3, Decimal("9.50"), None, None, False, None, None, None),
]


@pytest.fixture
async def typed(storage: Storage) -> Storage:
    """Write rows with values of every type, one by one and many at a time, and publish them."""
    await sql_of(storage.views).create("typed__1", COLUMNS)
    names = ("id", "price", "day", "at", "done", "body", "key_", "name")
    async with in_sql(storage.views) as sql:
        await sql.execute("INSERT INTO typed__1 VALUES (?, ?, ?, ?, ?, ?, ?, ?)", TYPED[0])
        rows: list[dict[str, SqlValue]] = [dict(zip(names, row, strict=True)) for row in TYPED[1:]]
        await sql.upsert("typed__1", ["id"], rows)
    await sql_of(storage.views).publish("typed", "typed__1")
    return storage


@on_sql
async def test_values_come_back_as_they_went_in(typed: Storage) -> None:
    """By value and by type, from the table and from what is published; conditions find them."""
    for name in ("typed__1", "typed"):
        found = await sql_of(typed.views).query(f"SELECT * FROM {name} ORDER BY id")  # noqa: S608 - constants
        assert [tuple(each) for each in found] == TYPED
        for row, given in zip(found, TYPED, strict=True):
            for value, original in zip(row, given, strict=True):
                assert isinstance(value, type(original)), (value, original)
    for column, value in {
        "price": TYPED[0][1],
        "day": TYPED[0][2],
        "at": AT,
        "key_": UUID(int=1),
    }.items():
        query = f"SELECT id FROM typed WHERE {column} = ?"  # noqa: S608 - constants
        assert await sql_of(typed.views).query(query, (value,)) == [(1,)], column
    offset = AT.astimezone(timezone(timedelta(hours=2)))
    assert await sql_of(typed.views).query("SELECT at FROM typed WHERE at = ?", (offset,)) == [
        (AT,)
    ]
    assert await sql_of(typed.views).query("SELECT id FROM typed WHERE done = ?", (True,)) == [(1,)]


@on_sql
async def test_decimals_compare_and_add_exactly(typed: Storage) -> None:
    """In conditions, orders and upserts; never as text or floats."""
    views = typed.views
    assert await sql_of(views).query("SELECT id FROM typed ORDER BY price") == [(2,), (3,), (1,)]
    above = await sql_of(views).query(
        "SELECT id FROM typed WHERE price > ? ORDER BY id", (Decimal(10),)
    )
    assert above == [(1,)]
    changes = {"price": "old.price + new.price - new.price + new.price"}
    cent: dict[str, SqlValue] = {"id": 1, "price": Decimal("0.01"), "done": True}
    async with in_sql(views) as sql:
        for _ in range(3):
            await sql.upsert("typed__1", ["id"], [cent], changes)
        ((price,),) = await sql.fetch("SELECT price FROM typed__1 WHERE id = 1")
        assert price == Decimal("12345678901234567.92")
        await sql.execute("UPDATE typed__1 SET price = ? WHERE id = 1", (price + Decimal("0.01"),))
    assert await sql_of(views).query("SELECT price FROM typed WHERE id = 1") == [
        (Decimal("12345678901234567.93"),)
    ]


class Word(str):
    """A kind of text."""

    __slots__ = ()

    def __str__(self) -> str:
        return "something else"


@on_sql
@pytest.mark.parametrize(
    ("column", "value", "read"),
    [
        ("name", 7, "7"),
        ("name", Word("word"), "word"),
        ("name", True, "1"),
        ("name", Decimal("1.50"), "1.50"),
        ("name", date(2026, 3, 29), "2026-03-29"),
        ("name", AT, "2026-03-29 01:30:00.123456"),
        ("name", UUID(int=7), str(UUID(int=7))),
        ("price", 7, Decimal(7)),
        ("price", "7.50", Decimal("7.50")),
        ("day", "2026-03-29", date(2026, 3, 29)),
        ("day", AT, date(2026, 3, 29)),
        ("at", "2026-03-29 01:30:00.123456", AT),
        ("at", date(2026, 3, 29), datetime(2026, 3, 29, tzinfo=UTC)),
        ("done", 1, True),
        ("key_", str(UUID(int=7)), UUID(int=7)),
    ],
)
async def test_values_of_other_types_are_taken_alike(
    typed: Storage, column: str, value: SqlValue, read: SqlValue
) -> None:
    """What a column can be given beside its own type is the same on all stores."""
    async with in_sql(typed.views) as sql:
        await sql.execute(f"UPDATE typed__1 SET {column} = ? WHERE id = 3", (value,))  # noqa: S608
    [(found,)] = await sql_of(typed.views).query(f"SELECT {column} FROM typed WHERE id = 3")  # noqa: S608
    assert found == read
    assert isinstance(found, type(read))


@on_sql
@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("id", 2**63),
        ("price", math.nan),
        ("price", Decimal("Infinity")),
        ("price", "a lot"),
        ("day", "yesterday"),
        ("at", datetime(2026, 3, 29)),  # noqa: DTZ001 - the subject
        ("at", "noon"),
        ("done", 2),
        ("key_", "seven"),
        ("name", "a\0b"),
        ("name", ["a"]),
        ("name", timedelta(days=1)),
    ],
)
async def test_what_one_store_refuses_all_refuse(
    typed: Storage, column: str, value: SqlValue
) -> None:
    """By an error that parks the aggregate; nothing is stored in its place."""
    with pytest.raises(errors.StoreError):
        async with in_sql(typed.views) as sql:
            await sql.execute(f"UPDATE typed__1 SET {column} = ? WHERE id = 3", (value,))  # noqa: S608
    found = await sql_of(typed.views).query("SELECT * FROM typed WHERE id = 3")
    assert [tuple(each) for each in found] == TYPED[2:]


@on_sql
async def test_query_with_marks_in_its_text(storage: Storage) -> None:
    """Percent signs, and question marks in literals, are just text."""
    await save(storage, [row("a%b"), row("a?b"), row("axb")])
    found = await sql_of(storage.views).query(
        f"SELECT view_id, '100% ?' FROM {TABLE} WHERE view_id LIKE 'a%' AND view_id <> ?"  # noqa: S608 - a constant
        " ORDER BY view_id",
        ("axb",),
    )
    assert [tuple(each) for each in found] == [("a%b", "100% ?"), ("a?b", "100% ?")]


@on_sql
async def test_query_that_is_wrong(storage: Storage) -> None:
    """A statement that the store refuses is a store's error, and the store stays usable."""
    with pytest.raises(errors.StoreError):
        await sql_of(storage.views).query("SELECT nothing FROM nowhere")
    assert await storage.views.page(TABLE) == []


# --- Generations, checkpoints and markers ------------------------------------


async def test_generations(storage: Storage) -> None:
    """The live generation of a view is set and replaced; each view has its own."""
    assert await storage.views.generations() == {}
    async with storage.views.transaction() as transaction:
        assert await transaction.generations() == {}
        await transaction.set_generation("ledger", 1)
        await transaction.set_generation("bank_totals", 4)
    async with storage.views.transaction() as transaction:
        await transaction.set_generation("ledger", 2)
        assert await transaction.generations() == {"ledger": 2, "bank_totals": 4}
    assert await storage.views.generations() == {"ledger": 2, "bank_totals": 4}


async def test_checkpoints(storage: Storage) -> None:
    """A projector's checkpoints are its own, one per partition."""
    assert await storage.views.checkpoints("ledger__1") == {}
    async with storage.views.transaction() as transaction:
        await transaction.advance("ledger__1", 0, 0, 5)
        await transaction.advance("ledger__1", 3, 0, 7)
        await transaction.advance("Ledger__1", 0, 0, 1)
    assert await storage.views.checkpoints("ledger__1") == {0: 5, 3: 7}
    assert await storage.views.checkpoints("Ledger__1") == {0: 1}


def marker(projector: str, key: AggregateKey, *, attempts: int = 1) -> ParkedAggregate:
    return ParkedAggregate(projector, key, 3, 1, "it didn't fit: “é” 💸", attempts)


async def test_g9_markers_of_parked_aggregates(storage: Storage) -> None:
    """Markers come back as they were set, of one projector or of all, by projector and key."""
    markers = [marker("ledger__1", account(id_)) for id_ in sorted(AWKWARD_IDS)]
    other = marker("totals__1", account("a"))
    async with storage.views.transaction() as transaction:
        for each in (other, *markers):
            await transaction.park(each)
    assert await storage.views.list_parked("totals__1") == [other]
    assert await storage.views.list_parked("ledger__1") == markers
    assert await storage.views.list_parked() == [*markers, other]
    assert await storage.views.list_parked("none") == []


async def test_forgetting_a_projector(storage: Storage) -> None:
    """Forgetting deletes a projector's checkpoints, markers and generation, and nobody else's."""
    kept = marker("totals__1", account())
    async with storage.views.transaction() as transaction:
        for name in ("ledger__1", "totals__1"):
            await transaction.advance(name, 0, 0, 5)
            await transaction.set_generation(name, 1)
        await transaction.park(marker("ledger__1", account()))
        await transaction.park(kept)
    for _ in range(2):
        async with storage.views.transaction() as transaction:
            await transaction.forget("ledger__1")
    assert await storage.views.checkpoints("ledger__1") == {}
    assert await storage.views.checkpoints("totals__1") == {0: 5}
    assert await storage.views.generations() == {"totals__1": 1}
    assert await storage.views.list_parked() == [kept]
