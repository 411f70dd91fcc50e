"""The bank, running as docker-compose.yml says: commands in, views out, healthy, stopped."""

from __future__ import annotations

import json
import os
import re
import tomllib
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest

from tests.bank_data import PROJECT
from tests.waiting import eventually

if TYPE_CHECKING:
    from tests.deployment.composition import Composition, Container
    from tests.deployment.image import Image

pytestmark = pytest.mark.timeout(300)  # the image is built first
PATIENCE_SECONDS = 60.0


def test_the_image_can_do_nothing_but_its_work(image: Image) -> None:
    """It has the bank and no tests, runs as nobody in particular, and can't write."""
    assert {path.name for path in image.inside("/app").iterdir()} == {
        *("config", "domain", "projectors", "worker")
    }
    if os.geteuid() == 0:
        script = "import os; assert os.getuid() == os.getgid() == 10001; open('written', 'w')"
        code, _ = image.run(["python", "-c", script], {})
        assert code == 1
        assert not (image.inside("/app") / "written").exists()


def test_the_image_has_extras_that_there_are() -> None:
    """Pip only warns of one that it does not know."""
    dockerfile = (PROJECT / "Dockerfile").read_text()
    (extras,) = re.findall(r"^ARG EXTRAS=(.*)$", dockerfile, re.MULTILINE)
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert set(extras.split(",")) <= set(project["optional-dependencies"])


def test_the_image_explains_itself(image: Image) -> None:
    """Without a store the program says what it can do."""
    code, printed = image.run([*image.entrypoint, "--help"], {})
    assert code == 0
    assert "worker" in printed


async def test_every_process_gets_healthy(bank: Composition) -> None:
    """The image's health check finds each of them ready."""
    assert len(bank.containers) == 7
    for container in bank.containers:
        await _is_healthy(bank, container)


async def test_a_command_goes_through_to_the_views(bank: Composition) -> None:
    """Sent as an operator does it: accepted, published, and seen by both projectors."""
    opened = bank.ask(
        "send", "account", "ACCT-1", "OpenAccount", '{"account_id": "ACCT-1"}', "--wait"
    )
    assert opened["status"] == "accepted"
    paid = bank.ask("send", "account", "ACCT-1", "DepositMoney", '{"amount": "12.50"}', "--wait")
    assert paid["events"] == [{"type": "CustomerDepositedMoney", "sequence": 2}]

    async def seen() -> bool:
        account = bank.ask("view", "account_query", "ACCT-1")
        return account is not None and account["balance"] == "12.50"

    await eventually(seen, within_seconds=PATIENCE_SECONDS)

    async def everywhere() -> bool:
        partitions = bank.ask("status")["partitions"]
        return all(
            {one["relay"], *one["projectors"].values()} == {one["head"]} for one in partitions
        )

    await eventually(everywhere, within_seconds=PATIENCE_SECONDS)


async def test_a_command_goes_through_over_http(bank: Composition) -> None:
    """With a token of the secrets, to a worker, and back; without one nobody is let in."""
    (gateway,) = [one for one in bank.containers if one.service == "gateway"]
    await _is_healthy(bank, gateway)
    here = f"http://127.0.0.1:{gateway.http_port}"
    path = "/aggregates/account/ACCT-2/OpenAccount"
    payload = b'{"account_id": "ACCT-2"}'
    assert asked(here + path, payload)[0] == 401
    token = (bank.secrets / "reader_token").read_text().strip()
    assert asked(here + path, payload, token)[0] == 403
    token = (bank.secrets / "teller_token").read_text().strip()
    status, outcome = asked(here + path, payload, token)
    assert (status, outcome["status"]) == (200, "accepted")
    seen = f"?seen={outcome['partition']}:{outcome['offset']}"
    status, row = asked(f"{here}/views/account_query/ACCT-2{seen}", None, token)
    assert (status, row["balance"]) == (200, "0")


async def test_it_stops_in_time(bank: Composition) -> None:
    """SIGTERM, as `docker compose stop` sends it: each exits 0 before it would be killed."""
    for container in bank.containers:
        await _is_healthy(bank, container)
    assert set(bank.stop().values()) == {0}


async def _is_healthy(bank: Composition, container: Container) -> None:
    async def healthy() -> bool:
        assert container.process.poll() is None, container.log.read_text()
        return bank.healthy(container)

    await eventually(healthy, within_seconds=PATIENCE_SECONDS)


def asked(url: str, payload: bytes | None = None, token: str | None = None) -> tuple[int, Any]:
    """Ask the gateway; return the status and what it answers."""
    headers = {"Content-Type": "application/json", "Prefer": f"wait={PATIENCE_SECONDS:.0f}"}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(url, payload, headers)  # noqa: S310 - http, on this machine
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS + 20) as answer:  # noqa: S310
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as refused:
        return refused.code, json.load(refused)
