"""From a request of HTTP to a validated call: path, query, body, each within its bounds."""

from collections.abc import Mapping
from typing import Any, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.requests import Request

from cluster.front import wire
from cluster.front.endpoint import FILES, Call, Endpoint
from cluster.front.problems import RefusedError
from jobs.errors import BadInputError, InvalidValueError
from jobs.request_files.problems import ProblemList, expectation, mistakes
from jobs.request_files.reading import MAX_FILE_BYTES, decoded
from jobs.text import shown

MAX_BODY_BYTES = MAX_FILE_BYTES
"""As much as a request file may hold."""

_JSON = "application/json"
_NAME = TypeAdapter(wire.Name)


async def call_of(request: Request, endpoint: Endpoint) -> Call:
    """Return what is asked for.

    Raises:
        RefusedError: the body is too large, or of a kind that is not read.
        BadInputError: a parameter or the body is wrong; names everything that is.
    """
    path = read_path(request)
    query = read_query(request, endpoint.query)
    body, media_type = await _read_body(request, endpoint) if endpoint.method == "POST" else (None, "")
    accept = request.headers.get("accept", "")
    return Call(path=path, query=query, body=body, media_type=media_type, accept=accept)


def read_path(request: Request) -> dict[str, str]:
    """Return the parameters of the path.

    Raises:
        BadInputError: one is none that could be a name.
    """
    return {name: _checked("path", _NAME, value, name) for name, value in request.path_params.items()}


def read_query(request: Request, model: type[BaseModel] | None) -> Any:
    """Return the query of an address as a model has it; nothing in it is ignored.

    Raises:
        BadInputError: a parameter is unknown, given twice, or wrong.
    """
    values: dict[str, Any] = {}
    for name, value in request.query_params.multi_items():
        info = None if model is None else model.model_fields.get(name)
        if info is None:
            known = "none" if model is None else ", ".join(model.model_fields)
            raise BadInputError(f"query: expected parameters among {known}, found {shown(name, 200)!r}")
        if get_origin(info.annotation) is tuple:
            values.setdefault(name, []).append(value)
        elif name in values:
            raise BadInputError(f"query: {name}: expected it once, found it again")
        else:
            values[name] = value
    return None if model is None else _checked("query", TypeAdapter(model), values)


async def read_bytes(request: Request) -> bytes:
    """Return a body.

    Raises:
        RefusedError: it is too large.
    """
    too_large = RefusedError(
        413, BadInputError(f"body: expected at most {MAX_BODY_BYTES} bytes; split it: batches may be added to")
    )
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > MAX_BODY_BYTES:
        raise too_large
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_BODY_BYTES:
            raise too_large
    return bytes(content)


async def _read_body(request: Request, endpoint: Endpoint) -> tuple[Any, str]:
    media_type = _media_type(request, FILES if endpoint.takes_files else {_JSON: ""})
    content = await read_bytes(request)
    if endpoint.takes_files:
        problems = ProblemList(request.query_params.get("name", "request"))
        text = decoded(content, problems)
        if text is None:
            raise problems.error()
        return text, media_type
    assert endpoint.body is not None
    return _checked("body", TypeAdapter(endpoint.body), content), media_type


def _media_type(request: Request, known: Mapping[str, str]) -> str:
    media_type, _, parameters = request.headers.get("content-type", "").partition(";")
    media_type = media_type.strip().lower()
    charset = parameters.replace(" ", "").replace('"', "").lower()
    encoding = request.headers.get("content-encoding", "identity").lower()
    if media_type not in known or charset not in ("", "charset=utf-8") or encoding != "identity":
        found = f"{shown(request.headers.get('content-type', 'none'), 200)!r}, encoded as {shown(encoding, 100)!r}"
        raise RefusedError(
            415,
            BadInputError(f"body: expected Content-Type {', '.join(known)}, in UTF-8, not compressed; found {found}"),
        )
    return media_type


def _checked(where: str, adapter: TypeAdapter[Any], value: Any, field: str = "") -> Any:
    """Validate text, values, or the bytes of a JSON document.

    Raises:
        BadInputError: something is wrong; names all of it.
    """
    try:
        return adapter.validate_json(value) if isinstance(value, bytes) else adapter.validate_python(value)
    except ValidationError as error:
        found = []
        for detail in mistakes(error):
            if detail["type"] == "json_invalid":
                expected, what = "a JSON document", detail["msg"]
            else:
                expected, what = expectation(detail)
            name = ".".join(map(str, (*([field] if field else []), *detail["loc"])))
            found.append(f"{f'{shown(name, 200)}: ' if name else ''}expected {expected}, found {shown(what, 200)}")
        raise BadInputError(f"{where}: {'; '.join(found[:100])}") from None
    except InvalidValueError as error:  # one that pydantic does not collect
        raise BadInputError(f"{where}: {error}") from None
