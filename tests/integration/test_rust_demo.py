"""`examples/rust_demo.py` answers as the demo of the Rust crate does."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import orjson
import pytest

from tests.bank_data import bank_folder
from tests.command_line import running
from tests.gateways import Served

if TYPE_CHECKING:
    from pathlib import Path

SENT = {
    "DepositMoney": b'{"DepositMoney": {"amount": 1000.0}}',
    "WithdrawMoney": b'{"WithdrawMoney": {"atm_id": "ATM-N468290", "amount": 400.0}}',
    "WriteCheck": b'{"WriteCheck": {"check_number": "1170", "amount": 256.28}}',
}


def test_the_demo_of_the_crate_gets_its_answers(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/bank.db"
    arguments = ("examples.rust_demo:api", "--port", "0")
    with running(*arguments, module="uvicorn", CQRS_ES_STORE_URL=url) as process:
        process.wait_for("running on")
        found = re.search(r"running on http://127.0.0.1:(\d+)", process.err)
        assert found is not None
        demo, path = Served(process, int(found[1])), "/account/test-1"
        nothing = demo.get(path)
        assert (nothing.status, nothing.body) == (404, b"")
        early = demo.ask("POST", path, SENT["DepositMoney"])
        assert (early.status, early.body) == (400, b"account not open")
        opening = b'{"OpenAccount": {"account_id": "test-1"}}'
        for body in (opening, *SENT.values()):
            answer = demo.ask("POST", path, body)
            assert (answer.status, answer.body) == (204, b""), answer
        assert demo.ask("POST", path, b"[").status == 400
        answer = demo.get(path)
        assert answer.status == 200
        assert answer.json == {
            "account_id": "test-1",
            "balance": 343.72,
            "written_checks": ["1170"],
            "ledger": [
                {"description": "deposit", "amount": 1000.0},
                {"description": "atm withdrawal", "amount": 400.0},
                {"description": "1170", "amount": 256.28},
            ],
        }


@pytest.mark.parametrize("name", SENT)
def test_the_bodies_are_those_of_the_demo(name: str) -> None:
    """Where its own files are at hand."""
    file = bank_folder().parent / "rust_demo" / f"{name}.json"
    if not file.exists():
        pytest.skip("the demo's own files are not here")
    assert orjson.loads(file.read_bytes()) == orjson.loads(SENT[name])
