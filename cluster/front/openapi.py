"""The OpenAPI document, made of the table of endpoints and the models that validate."""

import re
from typing import Any

from pydantic import TypeAdapter

from cluster.front import wire
from cluster.front.endpoint import EVENT_STREAM, FILES, Endpoint
from cluster.front.endpoints import ENDPOINTS
from cluster.front.problems import MEDIA_TYPE
from jobs.ledger.records import Event

_REF = "#/components/schemas/{model}"
CHANGES_PATH = "/v1/events"
_NAMES = re.compile(r"\{(\w+)\}")
_PATTERN = {"type": "string", "minLength": 1, "maxLength": 4096, "pattern": r"^[^\x00/]+$"}
_REFUSALS = {
    "400": "Something in the request is wrong: `detail` says what was expected and found.",
    "401": "The token is missing or wrong.",
    "403": "It comes by a name that this server does not have.",
    "404": "There is no such thing.",
    "405": "There is another method for it.",
    "413": "The body is too large.",
    "415": "The body is of a type that is not read.",
    "503": "The ledger does not answer; ask again after `Retry-After`.",
}


def openapi_document(version: str) -> dict[str, Any]:
    """Return the document.

    Args:
        version: of mergefleet.
    """
    answers = [(each.name, "serialization", TypeAdapter(each.answer)) for each in ENDPOINTS]
    bodies = [(each.name, "validation", TypeAdapter(each.body)) for each in ENDPOINTS if each.body is not None]
    queries = [(f"{each.name} query", "validation", TypeAdapter(each.query)) for each in ENDPOINTS if each.query]
    others: list[Any] = [
        ("changes query", "validation", TypeAdapter(wire.Since)),
        ("problem", "serialization", TypeAdapter(wire.ProblemDocument)),
        ("event", "serialization", TypeAdapter(Event)),
    ]
    inputs: list[Any] = [*answers, *bodies, *queries, *others]
    schemas, shared = TypeAdapter.json_schemas(inputs, ref_template=_REF)
    definitions = shared["$defs"]
    paths: dict[str, dict[str, Any]] = {}
    for each in ENDPOINTS:
        paths.setdefault(each.path, {})[each.method.lower()] = _operation(each, schemas, definitions)
    paths[CHANGES_PATH] = {"get": _changes(schemas, definitions)}
    used = _used([paths, schemas["problem", "serialization"], schemas["event", "serialization"]], definitions)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mergefleet",
            "version": version,
            "description": "A queue of merges: submit requests, follow jobs, steer them.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "security": [{"token": []}],
        "paths": paths,
        "components": {
            "schemas": {name: definitions[name] for name in sorted(used)},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(endpoint: Endpoint, schemas: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": schemas[endpoint.name, "serialization"]}}
    content |= {media_type: {"schema": {"type": "string"}} for media_type in endpoint.also}
    parameters = [_path_parameter(name) for name in _NAMES.findall(endpoint.path)]
    if endpoint.query is not None:
        parameters += _query_parameters(schemas[f"{endpoint.name} query", "validation"], definitions)
    if EVENT_STREAM in endpoint.also:
        parameters.append(_last_event_id({"type": "integer", "minimum": 0, "maximum": 2**31 - 1}))
    operation: dict[str, Any] = {
        "operationId": endpoint.name,
        "summary": endpoint.summary,
        "parameters": parameters,
        "responses": {"200": {"description": "The answer.", "content": content}, **_refusals(schemas)},
    }
    if endpoint.body is not None:
        types: dict[str, Any] = {"application/json": {"schema": schemas[endpoint.name, "validation"]}}
        if endpoint.takes_files:
            types |= {name: {"schema": {"type": "string"}} for name in FILES if name not in types}
        operation["requestBody"] = {"required": True, "content": types}
    if endpoint.is_open:
        operation["security"] = []
    return operation


def _changes(schemas: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    summary = "All changes as server-sent events, each at least once, from Last-Event-ID on. `data` is an Event."
    return {
        "operationId": "changes",
        "summary": summary,
        "parameters": [
            *_query_parameters(schemas["changes query", "validation"], definitions),
            _last_event_id({"type": "number", "minimum": 0, "maximum": 1e11}),
        ],
        "responses": {
            "200": {"description": "The stream.", "content": {EVENT_STREAM: {"schema": {"type": "string"}}}},
            **_refusals(schemas),
        },
    }


def _refusals(schemas: Any) -> dict[str, Any]:
    problem = {MEDIA_TYPE: {"schema": schemas["problem", "serialization"]}}
    found: dict[str, Any] = {status: {"description": words, "content": problem} for status, words in _REFUSALS.items()}
    found["503"] |= {"headers": {"Retry-After": {"schema": {"type": "integer"}, "required": True}}}
    return found


def _path_parameter(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": _PATTERN}


def _last_event_id(schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": "Last-Event-ID", "in": "header", "required": False, "schema": schema}


def _query_parameters(schema: dict[str, Any], definitions: dict[str, Any]) -> list[dict[str, Any]]:
    model = definitions[schema["$ref"].rpartition("/")[2]]
    found = []
    for name, its in model["properties"].items():
        # In an address a parameter that is null is one that is not there.
        kinds = [each for each in its.get("anyOf", [its]) if each.get("type") != "null"]
        clean = {key: value for key, value in kinds[0].items() if key not in ("default", "title")}
        clean |= {"description": its["description"]} if "description" in its else {}
        parameter = {"name": name, "in": "query", "required": name in model.get("required", []), "schema": clean}
        found.append(parameter | ({"style": "form", "explode": True} if clean.get("type") == "array" else {}))
    return found


def _used(roots: list[Any], definitions: dict[str, Any]) -> set[str]:
    """Return the names of the definitions that are referred to, by others too."""
    used: set[str] = set()
    waiting = list(roots)
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            name = str(value.get("$ref", "")).rpartition("/")[2]
            if name and name not in used:
                used.add(name)
                waiting.append(definitions[name])
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return used
