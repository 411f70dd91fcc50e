"""The gateway within other web applications, as docs/http.md has them; `make recipes`.

Their frameworks are no dependencies of anything here: without them the tests are skipped.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.bank_data import PROJECT
from tests.command_line import cqrs_es
from tests.gateways import JSON, Served
from tests.servers import free_port
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

PAGE = (PROJECT / "docs" / "http.md").read_text()
STORE, BANK = "sqlite:///shop.db", "worker.app:app"
ADA = {"X-Forwarded-User": "ada"}
PATH = "/bank/aggregates/account/ada/OpenAccount"
# What Django wants of every project.
DJANGO_SETTINGS = """
SECRET_KEY, ROOT_URLCONF, ALLOWED_HOSTS = "of nothing", "shop.settings", ["*"]
from django.http import HttpResponse
from django.urls import path
urlpatterns = [path("hello", lambda request: HttpResponse("hello"))]
"""
HELLO = """

@api.get("/hello")
async def hello() -> str:
    return "hello"
"""
LITESTAR_HELLO = """
from litestar import get


@get("/hello")
async def hello() -> str:
    return "hello"


star.register(hello)
"""


def block(name: str) -> str:
    """Return a module of the page by the name in its first line."""
    (found,) = re.findall(rf"```python\n# {re.escape(name)}\n(.*?)```", PAGE, re.DOTALL)
    return str(found)


def wanting(framework: str) -> None:
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed: make recipes")


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """Write the shop of the page, with a store that is initialised."""
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "http.py").write_text(block("shop/http.py"))
    assert cqrs_es("init", cwd=tmp_path, CQRS_ES_STORE_URL=STORE, CQRS_ES_APP=BANK).code == 0
    return tmp_path


@contextmanager
def serving(shop: Path, application: str, **environment: str) -> Generator[Served]:
    port = free_port()
    own = {"CQRS_ES_STORE_URL": STORE, "PYTHONPATH": f"{shop}:{PROJECT}"}
    process = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", application, "--port", str(port)],
        cwd=shop,
        env=os.environ | own | environment,
    )
    served = Served(process, port)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    try:
        until(lambda: answers(served, process))
        yield served
    finally:
        process.terminate()
        process.wait(60)


def answers(served: Served, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None
    try:
        return served.get("/hello").status == 200
    except ConnectionRefusedError:
        return False


def check(served: Served) -> None:
    """Ask through the other application: who may, what for, and where things are."""
    payload = b'{"account_id": "ada"}'
    assert served.ask("POST", PATH, payload, JSON).status == 401
    assert served.ask("POST", PATH, payload, JSON | {"X-Forwarded-User": "bob"}).status == 403
    opened = served.ask("POST", PATH, payload, JSON | ADA)
    assert (opened.status, opened.json["status"]) == (200, "accepted")
    later = served.ask("POST", PATH, payload, JSON | ADA | {"Prefer": "respond-async"})
    where = later.headers["location"]
    assert where.startswith("/bank/outcomes/")
    until(lambda: served.ask("GET", where, headers=ADA).status == 200)
    refused = served.ask("GET", "/bank/nothing", headers=ADA)
    assert (refused.status, refused.json["type"]) == (404, "/bank/problems/unknown_route")
    assert served.get("/hello").body.strip(b'"') == b"hello"


def test_fastapi(shop: Path) -> None:
    wanting("fastapi")
    (shop / "shop" / "api.py").write_text(block("shop/api.py") + HELLO)
    with serving(shop, "shop.api:api") as served:
        check(served)


def test_litestar(shop: Path) -> None:
    wanting("litestar")
    wanting("fastapi")  # whose lifespan is the page's
    (shop / "shop" / "api.py").write_text(block("shop/api.py"))
    (shop / "shop" / "star.py").write_text(block("shop/star.py") + LITESTAR_HELLO)
    with serving(shop, "shop.star:star") as served:
        check(served)


def test_django(shop: Path) -> None:
    wanting("django")
    (shop / "shop" / "settings.py").write_text(DJANGO_SETTINGS)
    (shop / "shop" / "asgi.py").write_text(block("shop/asgi.py"))
    with serving(shop, "shop.asgi:application", DJANGO_SETTINGS_MODULE="shop.settings") as served:
        check(served)
