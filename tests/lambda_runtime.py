"""AWS Lambda for tests: runs a handler in AWS's own runtime, awslambdaric, one sandbox each.

As there, an invocation has a deadline at which the process is killed, and between two of
them it is frozen; both also at a test's will. What is not here: IAM, throttling, init's limits.
"""

from __future__ import annotations

import http.server
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from botocore.session import Session

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PROJECT = Path(__file__).parent.parent
MOST_BYTES = 6 * 1024 * 1024
PATIENCE_SECONDS = 100.0
REGION = "eu-central-1"
ARN = f"arn:aws:lambda:{REGION}:123456789012:function:test"


class FunctionError(Exception):
    """What the handler raised, as Lambda reports it."""

    def __init__(self, payload: Mapping[str, Any]) -> None:
        super().__init__(payload.get("errorMessage"))
        self.type = payload.get("errorType")


class Killed(Exception):
    """The process was killed before it answered, by its deadline or by the test."""


@dataclass(frozen=True, slots=True)
class Posted:
    """What the runtime sent: to which path, and the body."""

    path: str
    body: bytes


class Sandbox:
    """One execution environment: started by the first invocation, and anew after a kill."""

    def __init__(
        self, handler: str, environment: Mapping[str, str], log: Path, *, seconds: float = 60.0
    ) -> None:
        self._handler = handler
        self._environment = environment
        self._log = log
        self.seconds = seconds
        self._events: queue.Queue[tuple[str, bytes, float]] = queue.Queue()
        self._posted: queue.Queue[Posted] = queue.Queue()
        self._waiting = threading.Event()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._requests())
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0
        self.kills = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._server.shutdown()
        self._server.server_close()

    # --- Invoking --------------------------------------------------------------

    def invoke(self, event: object, *, seconds: float = 0, kill_after: float = 0) -> Any:
        """Invoke, and freeze the process when it waits for the next; return what it answered.

        It has `seconds` to its deadline; `kill_after` so many it is killed, whatever it does.
        """
        body = json.dumps(event).encode()
        assert len(body) <= MOST_BYTES, "AWS refuses such an event before a function has it"
        if self.process is None:
            self._start()
        else:
            self.process.send_signal(signal.SIGCONT)
        self._waiting.wait(PATIENCE_SECONDS)
        self._waiting.clear()
        id_, seconds = str(uuid.uuid4()), seconds or self.seconds
        self._events.put((id_, body, time.time() + seconds))
        try:
            posted = self._answer(id_, min(seconds, kill_after or seconds))
        except queue.Empty:
            self.kills += 1
            self.kill()
            raise Killed from None
        if self._waiting.wait(PATIENCE_SECONDS) and self.process is not None:
            self.process.send_signal(signal.SIGSTOP)
        answer = json.loads(posted.body)
        if posted.path.endswith("/error"):
            raise FunctionError(answer)
        if len(posted.body) > MOST_BYTES:
            raise FunctionError({"errorType": "Function.ResponseSizeTooLarge"})
        return answer

    def _answer(self, id_: str, seconds: float) -> Posted:
        """Wait for an answer, as long as the process lives; raise `queue.Empty`."""
        end = time.monotonic() + seconds
        while True:
            try:
                posted = self._posted.get(timeout=max(0.0, min(0.1, end - time.monotonic())))
            except queue.Empty:
                if time.monotonic() >= end or self.process is None or self.process.poll():
                    raise
                continue
            if id_ in posted.path:
                return posted
            if posted.path.endswith("/init/error"):
                self.kill()
                raise FunctionError(json.loads(posted.body))

    def _start(self) -> None:
        self.starts += 1
        host, port = self._server.server_address[:2]
        environment = {
            **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
            "AWS_LAMBDA_RUNTIME_API": f"{host!s}:{port}",
            "AWS_LAMBDA_FUNCTION_NAME": "test",
            "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "512",
            "AWS_LAMBDA_FUNCTION_VERSION": "$LATEST",
            "AWS_REGION": REGION,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "LAMBDA_TASK_ROOT": str(PROJECT),
            "PYTHONPATH": str(PROJECT),
            **self._environment,
        }
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "awslambdaric", self._handler],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def kill(self) -> None:
        """Kill the process, as Lambda does at a deadline; the next invocation starts another."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
        self._waiting.clear()
        self._events = queue.Queue()  # a request of the dead process waits at the old one

    def processor_seconds(self) -> float:
        """Return how much of a processor's time the process has taken."""
        assert self.process is not None
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    # --- The runtime API ---------------------------------------------------------

    def _requests(self) -> type[http.server.BaseHTTPRequestHandler]:
        sandbox = self

        class Requests(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                sandbox._waiting.set()
                id_, body, deadline = sandbox._events.get()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Lambda-Runtime-Aws-Request-Id", id_)
                self.send_header("Lambda-Runtime-Deadline-Ms", str(int(deadline * 1000)))
                self.send_header("Lambda-Runtime-Invoked-Function-Arn", ARN)
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self) -> None:
                size = int(self.headers.get("Content-Length", "0"))
                sandbox._posted.put(Posted(self.path, self.rfile.read(size)))
                self.send_response(202)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Say nothing."""

        return Requests


# --- Events, as AWS makes them ---------------------------------------------------


def request(
    method: str, path: str, body: object = None, *, url: bool = False, **headers: str
) -> dict[str, Any]:
    """Make the event of a request through an HTTP API, or through a function URL."""
    path, _, query = path.partition("?")
    domain = f"abc.lambda-url.{REGION}.on.aws" if url else f"abc.execute-api.{REGION}.amazonaws.com"
    return {
        "version": "2.0",
        "routeKey": "$default",
        "rawPath": path,
        "rawQueryString": query,
        "headers": {
            "host": domain,
            "content-type": "application/json",
            **{re.sub("_", "-", name): value for name, value in headers.items()},
        },
        "requestContext": {
            "domainName": domain,
            "stage": "$default",
            "http": {"method": method, "path": path, "sourceIp": "192.0.2.1"},
        },
        "body": body if isinstance(body, str) or body is None else json.dumps(body),
        "isBase64Encoded": False,
    }


def records_of(messages: Sequence[Mapping[str, Any]], queue_arn: str) -> dict[str, Any]:
    """Make the event of messages as SQS gave them."""
    return {
        "Records": [
            {
                "messageId": message["MessageId"],
                "receiptHandle": message["ReceiptHandle"],
                "body": message["Body"],
                "attributes": message.get("Attributes", {}),
                "messageAttributes": {},
                "eventSource": "aws:sqs",
                "eventSourceARN": queue_arn,
                "awsRegion": REGION,
            }
            for message in messages
        ]
    }


SCHEDULED = {
    "version": "0",
    "id": "0",
    "detail-type": "Scheduled Event",
    "source": "aws.scheduler",
    "detail": "{}",
}


def client(service: str, endpoint: str) -> Any:
    """Make a client of a service of moto's."""
    session: Any = Session()
    session.set_credentials("test", "test")
    return session.create_client(service, region_name=REGION, endpoint_url=endpoint)


class QueueSource:
    """An event source mapping: brings a queue's messages to sandboxes, ten at a time."""

    def __init__(self, endpoint: str, name: str) -> None:
        self._sqs = client("sqs", endpoint)
        self.url: str = self._sqs.get_queue_url(QueueName=name)["QueueUrl"]
        answer = self._sqs.get_queue_attributes(QueueUrl=self.url, AttributeNames=["QueueArn"])
        self.arn: str = answer["Attributes"]["QueueArn"]

    def depth(self) -> int:
        """Count the messages that are there, in flight or not."""
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        found = self._sqs.get_queue_attributes(QueueUrl=self.url, AttributeNames=names)
        return sum(int(found["Attributes"][name]) for name in names)

    def receive(self) -> list[dict[str, Any]]:
        """Take up to ten messages."""
        answer = self._sqs.receive_message(
            QueueUrl=self.url, MaxNumberOfMessages=10, AttributeNames=["All"]
        )
        return list(answer.get("Messages", []))

    def bring(self, sandbox: Sandbox, **limits: float) -> None:
        """Bring the next messages; delete what is done, and put the others back."""
        self.hand_over(self.receive(), sandbox, **limits)

    def hand_over(
        self, messages: Sequence[Mapping[str, Any]], sandbox: Sandbox, **limits: float
    ) -> None:
        """Bring messages."""
        left = {message["MessageId"] for message in messages}
        try:
            answer = sandbox.invoke(records_of(messages, self.arn), **limits)
            left = {failure["itemIdentifier"] for failure in answer["batchItemFailures"]}
        except (Killed, FunctionError):
            pass
        self.put_back([each for each in messages if each["MessageId"] in left])
        self.delete([each for each in messages if each["MessageId"] not in left])

    def put_back(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Have messages come again at once, as they do after their time-out."""
        entries = [
            {"Id": str(at), "ReceiptHandle": message["ReceiptHandle"], "VisibilityTimeout": 0}
            for at, message in enumerate(reversed(messages))
        ]
        if entries:
            self._sqs.change_message_visibility_batch(QueueUrl=self.url, Entries=entries)

    def delete(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Take messages off the queue."""
        entries = [
            {"Id": str(at), "ReceiptHandle": message["ReceiptHandle"]}
            for at, message in enumerate(messages)
        ]
        if entries:
            self._sqs.delete_message_batch(QueueUrl=self.url, Entries=entries)
