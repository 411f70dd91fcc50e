"""The HTTP gateway's routes as OpenAPI 3.1: an operation for each command and each view."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias

from cqrs_es import program
from cqrs_es.definitions import ViewDefinition
from cqrs_es.messages import FIRST_VERSION
from cqrs_es.schema import messages
from cqrs_es.schema.describe import sent_commands, summary
from cqrs_es.schema.json_schema import Components, any_of, schema_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cqrs_es.definitions import AggregateDefinition
    from cqrs_es.registry import Registry
    from cqrs_es.schema.json_schema import Schema

Part: TypeAlias = dict[str, Any]

_OUTCOME: Final = {"$ref": "#/components/schemas/Outcome"}
_CLOUD_EVENTS: Final = "application/cloudevents-batch+json"
_ERRORS: Final[Mapping[str, str]] = {
    "400": "Not JSON, or a bad header, id or key",
    "401": "Who are you",
    "403": "Not allowed",
    "404": "Unknown type, command, view or id",
    "408": "The body came too slowly",
    "409": "Rejected: by a domain rule, or in conflict with what has happened",
    "412": "In conflict with If-Match or If-None-Match",
    "413": "The body is too large",
    "415": "The body is no application/json",
    "422": "Rejected: invalid_command or id_reused",
    "500": "The command failed; or the view's row is parked: view_parked",
    "503": "Store or broker are away; or the view has not seen the position: view_behind",
}
_RETRY_AFTER: Final[Part] = {
    "Retry-After": {"description": "Seconds to wait", "schema": {"type": "integer"}}
}


def openapi(registry: Registry, service: str) -> Part:
    """Return the document that describes the gateway of an application."""
    components = Components()
    components.schemas |= {"Outcome": messages.OUTCOME, "Problem": messages.PROBLEM}
    paths: Part = {}
    events: list[Schema] = []
    for definition in registry.aggregates.values():
        _commands(definition, paths, components)
        own = _event_schemas(definition, components)
        paths[f"/aggregates/{definition.type}/{{id}}/events"] = {"get": _stream(definition, own)}
        events += own
    for view in registry.projections.values():
        if isinstance(view, ViewDefinition):
            row = components.add(f"view.{view.name}", schema_of(view.state))
            paths[f"/views/{view.name}/{{view_id}}"] = {"get": _row(view, row)}
            paths[f"/views/{view.name}"] = {"get": _rows(view, row)}
    paths["/outcomes/{command_id}"] = {"get": _outcome()}
    paths["/events"] = {"get": _feed(events)}
    for name in ("openapi", "asyncapi"):
        answers = {"200": _answer("The document", {"type": "object"})}
        answers |= _problems("401", "403", "503")
        paths[f"/{name}.json"] = {"get": {"operationId": name, "responses": answers}}
    return {
        "openapi": "3.1.0",
        "info": {"title": service, "version": program.version()},
        "paths": dict(sorted(paths.items())),
        "components": {
            "schemas": dict(sorted(components.schemas.items())),
            "responses": {code: _problem(code, text) for code, text in _ERRORS.items()},
            "parameters": _PARAMETERS,
        },
    }


# --- Commands ----------------------------------------------------------------


def _commands(definition: AggregateDefinition, paths: Part, components: Components) -> None:
    for name, codec in sent_commands(definition).items():
        full = f"{definition.type}.{name}"
        body = components.add(f"command.{full}", schema_of(codec))
        parameters = _used(
            "id",
            "IdempotencyKey",
            "IfMatch",
            "IfNoneMatch",
            "Prefer",
            "CorrelationId",
            "Traceparent",
        )
        if codec.version != FIRST_VERSION:
            parameters.append(_version_of(codec.version))
        operation: Part = {
            "operationId": full,
            "tags": [definition.type],
            "summary": summary(codec.cls),
            "parameters": parameters,
            "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
            "responses": {
                "200": _answer("Accepted", _OUTCOME, _etag("The aggregate's sequence")),
                "202": {
                    "description": "Sent; there is no outcome yet",
                    "headers": {"Location": _header("Where the outcome will be")},
                },
                **_problems(*_ERRORS),
            },
        }
        paths[f"/aggregates/{definition.type}/{{id}}/{name}"] = {"post": operation}


def _outcome() -> Part:
    unknown = {"description": "Not known yet", "headers": _RETRY_AFTER, "content": _PROBLEM}
    return {
        "operationId": "outcome",
        "parameters": _used("command_id"),
        "responses": {
            "200": _answer("What became of the command", _OUTCOME),
            **_problems("400", "401", "403", "503"),
            "404": unknown,
        },
    }


# --- Views and events --------------------------------------------------------


def _row(view: ViewDefinition, row: Schema) -> Part:
    return {
        "operationId": f"view.{view.name}",
        "tags": [view.name],
        "summary": summary(view.cls),
        "parameters": _used("view_id", "seen", "Prefer", "IfNoneMatchTag"),
        "responses": {
            "200": _answer("The row", row, _etag("The row's version")),
            "304": {"description": "Unchanged"},
            **_problems("400", "401", "403", "404", "500", "503"),
        },
    }


def _rows(view: ViewDefinition, row: Schema) -> Part:
    properties = {"view_id": {"type": "string"}, "version": {"type": "integer"}, "payload": row}
    item = {"type": "object", "properties": properties, "required": sorted(properties)}
    return {
        "operationId": f"views.{view.name}",
        "tags": [view.name],
        "parameters": _used("after", "limit", "seen", "Prefer"),
        "responses": {
            "200": _answer("Rows by id", {"type": "array", "items": item}, _NEXT),
            **_problems("400", "401", "403", "404", "500", "503"),
        },
    }


def _event_schemas(definition: AggregateDefinition, components: Components) -> list[Schema]:
    schemas: list[Schema] = []
    for name, event in definition.events.items():
        full = f"{definition.type}.{name}"
        data = components.add(f"event.{full}", schema_of(event.codec))
        message = messages.cloud_event(
            {"const": name}, {"const": event.spec.version}, {"const": definition.type}, data
        )
        schemas.append(components.add(f"cloudevent.{full}", message))
    return schemas


def _stream(definition: AggregateDefinition, events: list[Schema]) -> Part:
    content = {_CLOUD_EVENTS: {"schema": {"type": "array", "items": any_of(events)}}}
    return {
        "operationId": f"events.{definition.type}",
        "tags": [definition.type],
        "parameters": _used("id", "after", "limit"),
        "responses": {
            "200": {"description": "Its events", "headers": _NEXT, "content": content},
            **_problems("400", "401", "403", "404", "503"),
        },
    }


def _feed(events: list[Schema]) -> Part:
    described = "Server-sent events; the `data` of each is a CloudEvent of one of these"
    names = [each["$ref"].rpartition("/")[2] for each in events]
    content = {"text/event-stream": {"schema": {"type": "string"}}}
    answer = {"description": f"{described}: {', '.join(names)}", "content": content}
    return {
        "operationId": "events",
        "parameters": _used("types", "partition", "from", "LastEventId"),
        "responses": {"200": answer, **_problems("400", "401", "403", "503")},
    }


# --- What they consist of ----------------------------------------------------

_PROBLEM: Final[Part] = {
    "application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}
}


def _header(text: str) -> Part:
    return {"description": text, "schema": {"type": "string"}}


def _etag(text: str) -> Part:
    return {"ETag": _header(f"{text}, in quotes")}


_NEXT: Final[Part] = {"Link": _header('The next page, as rel="next"')}


def _answer(text: str, schema: Schema, headers: Part | None = None) -> Part:
    answer: Part = {"description": text, "content": {"application/json": {"schema": schema}}}
    return answer | ({"headers": headers} if headers else {})


def _problem(code: str, text: str) -> Part:
    answer: Part = {"description": text, "content": _PROBLEM}
    return answer | ({"headers": _RETRY_AFTER} if code == "503" else {})


def _problems(*codes: str) -> Part:
    return {code: {"$ref": f"#/components/responses/{code}"} for code in codes}


def _used(*names: str) -> list[Part]:
    return [{"$ref": f"#/components/parameters/{name}"} for name in names]


def _parameter(where: str, name: str, schema: Schema, text: str) -> Part:
    required = {"required": True} if where == "path" else {}
    return {"in": where, "name": name, "description": text, "schema": schema, **required}


def _version_of(version: str) -> Part:
    text = "The payload is of this version; without the header it would be read as 1.0"
    return _parameter("header", "Command-Version", {"const": version}, text) | {"required": True}


_TEXT: Final[Schema] = {"type": "string"}
_PARAMETERS: Final[Part] = {
    "id": _parameter("path", "id", messages.AGGREGATE_ID, "The aggregate's id"),
    "view_id": _parameter("path", "view_id", _TEXT, "The row's id"),
    "command_id": _parameter("path", "command_id", messages.COMMAND_ID, "The command's id"),
    "after": _parameter("query", "after", _TEXT, "Where the page before this one ended"),
    "limit": _parameter(
        "query", "limit", {"type": "integer", "minimum": 1, "maximum": 1000}, "Rows of a page"
    ),
    "seen": _parameter(
        "query",
        "seen",
        {"type": "string", "pattern": "^[0-9]+:[0-9]+$"},
        "<partition>:<offset> that the view must have seen, of an outcome",
    ),
    "types": _parameter("query", "types", _TEXT, "Event types, with commas between them"),
    "partition": _parameter(
        "query", "partition", {"type": "integer", "minimum": 0}, "Of this partition only"
    ),
    "from": _parameter(
        "query", "from", {"enum": ["start", "end"]}, "Where to begin without Last-Event-ID: end"
    ),
    "IdempotencyKey": _parameter(
        "header",
        "Idempotency-Key",
        {"type": "string", "minLength": 1, "maxLength": 255},
        "A UUID, which is the command's id; or other text, from which one is derived",
    ),
    "IfMatch": _parameter("header", "If-Match", _TEXT, "The aggregate's sequence, in quotes"),
    "IfNoneMatch": _parameter(
        "header", "If-None-Match", {"const": "*"}, "The aggregate has no events yet"
    ),
    "IfNoneMatchTag": _parameter("header", "If-None-Match", _TEXT, "The ETag that one has"),
    "Prefer": _parameter(
        "header", "Prefer", _TEXT, "wait=N, in seconds; of commands also respond-async"
    ),
    "CorrelationId": _parameter("header", "Correlation-Id", _TEXT, "Goes into the metadata"),
    "Traceparent": _parameter("header", "traceparent", _TEXT, "Goes into the metadata"),
    "LastEventId": _parameter(
        "header", "Last-Event-ID", _TEXT, "Where to go on: the id of the last event that one has"
    ),
}
