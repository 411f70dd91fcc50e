"""The bank on AWS Lambda: its template fits the code, and its package is small and quick.

`make check` holds the template to cfn-lint.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from cqrs_es.brokers.sqs import connect
from cqrs_es.serverless.handling import ENDING_SECONDS
from cqrs_es.settings import Settings
from cqrs_es.stores.dynamodb import connect as connect_store
from cqrs_es.stores.dynamodb import places
from cqrs_es.stores.dynamodb.storage import _TABLE
from tests.bank_data import PROJECT
from tests.cloud import initialised
from tests.lambda_runtime import Sandbox, request

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from cqrs_es.stores.dynamodb.actions import Key

TEMPLATE = PROJECT / "deploy" / "aws" / "template.yaml"
IMPORT_SECONDS = 0.25
FIRST_ANSWER_SECONDS = 0.6
PACKAGE_BYTES = 25 * 1000 * 1000
# Seconds are a processor's, so that waiting for one does not count. One that others use at the
# same time is slower all the same: some tries are for that, and some allowance.
TRIES = 10
SHARED = 1.3
# Machines differ, and one machine from hour to hour: modules of Python's own tell by how much.
YARDSTICK = (
    "import argparse, asyncio, dataclasses, decimal, email.message, http.client, inspect, logging,"
    " sqlite3, ssl, unittest.mock, xml.dom.minidom, zipfile"
)
YARDSTICK_SECONDS = 0.08


class _Loader(yaml.SafeLoader):
    """Reads `!Sub x` and its kin as what follows them."""


def _plain(loader: yaml.SafeLoader, _suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return loader.construct_scalar(node)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    assert isinstance(node, yaml.MappingNode)
    return loader.construct_mapping(node, deep=True)


loader: Any = _Loader
loader.add_multi_constructor("!", _plain)
DOCUMENT: dict[str, Any] = yaml.load(TEMPLATE.read_text(), loader)  # noqa: S506 - a safe one
RESOURCES: dict[str, Any] = DOCUMENT["Resources"]
FUNCTION: dict[str, Any] = DOCUMENT["Globals"]["Function"]


def properties(name: str) -> dict[str, Any]:
    found: dict[str, Any] = RESOURCES[name]["Properties"]
    return found


def settings() -> Settings:
    """Read what the functions are configured with, as the bank in a region."""
    variables: Mapping[str, str] = FUNCTION["Environment"]["Variables"]
    return Settings.from_environment(
        {
            name: text.replace("${AWS::Region}", "eu-central-1").replace("${Prefix}", "bank")
            for name, text in variables.items()
        }
    )


# --- The template --------------------------------------------------------------------


def test_the_table_is_what_the_store_makes() -> None:
    """`init` finds it there, and takes it as its own."""
    made = properties("Table")
    for name in ("KeySchema", "BillingMode"):
        assert made[name] == _TABLE[name]
    (index,), (known,) = made["GlobalSecondaryIndexes"], _TABLE["GlobalSecondaryIndexes"]
    assert index == known
    named = {each["AttributeName"] for each in made["AttributeDefinitions"]}
    assert named == {each["AttributeName"] for each in _TABLE["AttributeDefinitions"]}


def test_names_are_what_the_urls_say() -> None:
    """A function finds its table, queue and topic by its settings alone."""
    found = settings()
    assert found.store_url is not None
    store = connect_store(found.store_url, clock=None, lease_seconds=10)
    broker = connect(found.broker_url, service="bank", event_retention=1)
    names = {
        "Table": ("TableName", store._table.name),
        "Commands": ("QueueName", broker.queue),
        "Events": ("TopicName", broker.topic),
    }
    for resource, (attribute, name) in names.items():
        assert properties(resource)[attribute].replace("${Prefix}", "bank") == name


def test_the_bell_rings_for_heads_and_nothing_else() -> None:
    """What the pump writes must not ring it."""
    (pattern,) = properties("Pump")["Events"]["Bell"]["Properties"]["FilterCriteria"]["Filters"]
    wanted = json.loads(pattern["Pattern"])["dynamodb"]["Keys"]["sk"]["S"]

    def rings(key: Key) -> bool:
        return key.sk in wanted

    assert rings(places.head_key(3))
    assert not rings(places.checkpoint_key("account_query", 3))
    assert not rings(places.due_key(3, "2027-01-01", "id"))
    assert not rings(places.outcome_key("id"))


def test_times_leave_room_for_one_another() -> None:
    """A handler ends before its function, and a function before its message comes again."""
    timeout = FUNCTION["Timeout"]
    assert settings().handler_timeout + 2 * ENDING_SECONDS < timeout
    assert properties("Commands")["VisibilityTimeout"] >= 6 * timeout
    assert properties("Pump")["ReservedConcurrentExecutions"] == 1
    events = properties("Decide")["Events"]["Commands"]["Properties"]
    assert events["FunctionResponseTypes"] == ["ReportBatchItemFailures"]


def test_no_function_may_do_more_than_it_does() -> None:
    """Who answers and who decides reads and writes the table; only the pump publishes."""
    for name, resource in RESOURCES.items():
        if resource["Type"] == "AWS::Serverless::Function":
            assert resource["Properties"]["Role"] == f"{name}Role.Arn"
    policies = {name: json.dumps(properties(name)) for name in RESOURCES if name.endswith("Role")}
    assert {name for name, text in policies.items() if "sns:Publish" in text} == {"PumpRole"}
    assert {name for name, text in policies.items() if "sqs:ReceiveMessage" in text} == {
        "DecideRole"
    }
    assert not re.search(r'"[a-z]+:\*"', "".join(policies.values()))


# --- Budgets -------------------------------------------------------------------------


def processor_seconds(*command: str) -> float:
    """Run a program; return how much of a processor's time it took."""
    before = os.times()
    subprocess.run([sys.executable, *command], check=True, cwd=PROJECT)
    after = os.times()
    return after.children_user + after.children_system - sum(before[2:4])


def slowness() -> float:
    """Return how much slower this machine is than the one that the budgets are of, at least 1."""
    return max(1.0, processor_seconds("-c", YARDSTICK) / YARDSTICK_SECONDS)


def test_importing_it_is_quick() -> None:
    """A cold start begins with that; what Python itself takes is not counted."""
    taken: list[float] = []
    for _ in range(TRIES):
        python = processor_seconds("-c", "pass")
        taken.append(processor_seconds("-c", "import worker.serverless") - python)
        if taken[-1] < IMPORT_SECONDS * SHARED * slowness():
            return
    pytest.fail(f"the import took {min(taken):.3f} s of a processor")


def closure(name: str, extras: frozenset[str]) -> Iterator[tuple[str, frozenset[str]]]:
    """Name what is installed with something, as far as its conditions say nothing else."""
    for text in distribution(name).requires or []:
        wanted = re.match(r"([\w.-]+)(?:\[([^\]]*)\])?", text)
        assert wanted
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", text)
        if extra is None or extra[1] in extras:
            yield wanted[1], frozenset(filter(None, (wanted[2] or "").split(",")))


def test_the_package_is_small() -> None:
    """As `deploy/aws/make-package` makes it, but of what is installed here."""
    wanted, known = [("cqrs-es", frozenset({"serverless"}))], set[str]()
    archive = io.BytesIO()
    services = re.compile(r"botocore/data/(?!dynamodb|sns|sqs|sts)[^/]+/")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as package:
        while wanted:
            name, extras = wanted.pop()
            try:
                found = distribution(name)
            except ModuleNotFoundError:  # for other systems, or older Pythons
                continue
            if found.name.lower() in known:
                continue
            known.add(found.name.lower())
            wanted += closure(name, extras)
            for file in found.files or []:
                path = Path(str(found.locate_file(file)))
                if ".." not in file.parts and not services.search(str(file)) and path.is_file():
                    package.write(path, str(file))
        for folder in ("cqrs_es", "domain", "worker", "projectors", "config"):
            for path in (PROJECT / folder).rglob("*.py"):
                package.write(path, str(path.relative_to(PROJECT)))
    assert {"aiobotocore", "botocore", "starlette", "orjson"} <= known
    assert len(archive.getvalue()) < PACKAGE_BYTES


def test_the_first_answer_comes_soon(
    dynamodb_url: str, dynamodb_server: str, tmp_path: Path
) -> None:
    """From the process's start on: the runtime, the import, the store, and a command decided."""
    cloud = initialised(dynamodb_url, dynamodb_server, tmp_path)
    taken: list[float] = []
    for number in range(TRIES):
        log = tmp_path / "function.log"
        with Sandbox("worker.serverless.handler", cloud.environment, log) as sandbox:
            name = f"A-{number}"
            path = f"/aggregates/account/{name}/OpenAccount"
            event = request("POST", path, {"account_id": name}, authorization="Bearer secret")
            assert sandbox.invoke(event)["statusCode"] == 200
            taken.append(sandbox.processor_seconds())
        if taken[-1] < FIRST_ANSWER_SECONDS * SHARED * slowness():
            return
    pytest.fail(f"the first answer took {min(taken):.3f} s of a processor")
