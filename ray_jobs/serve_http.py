"""The HTTP side of a served model: typed JSON, errors of one sentence, a token, a page to try it. Knows nothing of Ray."""

import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, create_model
from starlette.exceptions import HTTPException
from starlette.routing import Route

from perceiver.config import UserError
from perceiver.inference.served import Interface
from ray_jobs.serve_page import PAGE

MOST_ROWS = 1024
"""Rows of one request."""
MOST_BYTES = 32 << 20
"""Bytes of a request's body."""
MOST_NEW_TOKENS = 4096
"""Of a continuation: a request must not hold a model for hours."""
OPEN = ("/", "/health")
"""What is answered without the token."""
LOCAL_HOSTS = ("127.0.0.1", "localhost")
"""Names of this machine, where no token is needed."""
_EMPTY = ConfigDict(extra="forbid")
_OPTION_TYPES: dict[str, tuple[Any, Any]] = {
    "max_new_tokens": (int, Field(ge=1, le=MOST_NEW_TOKENS)),
    "temperature": (float, Field(ge=0)),
    "top_k": (int, Field(ge=1)),
    "top_p": (float, Field(gt=0, le=1)),
    "num_latents": (int, Field(ge=1)),
    "seed": (int, Field(ge=0)),
    "stop": (list[Annotated[str, Field(min_length=1)]], Field(max_length=16)),
}


class Busy(Exception):
    """No model can take the request now."""


class Backend(Protocol):
    """Whatever has the models."""

    async def predict(self, rows: list[dict[str, Any]], options: dict[str, Any]) -> list[dict[str, Any]]:
        """An answer to each row.

        Raises:
            Busy: none is free.
        """

    def stream(self, text: str, options: dict[str, Any], identity: str) -> AsyncIterator[str]:
        """A continuation piece by piece.

        Raises:
            UserError: the text or an option is refused.
            Busy: none is free.
        """

    async def ready(self) -> bool:
        """Whether a model answers."""


def hashed(token: str) -> str:
    """What is kept of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def build_app(backend: Backend, interface: Interface, token_hash: str | None) -> FastAPI:
    """The application.

    Args:
        backend: answers.
        interface: what the model takes.
        token_hash: of the token that requests must bring (`hashed`); None: none, and only requests for this machine by name are answered.
    """
    app = FastAPI(title=interface.name, docs_url=None, redoc_url=None)  # those pages load scripts from elsewhere
    row, request_type, prompt_type = _types(interface)

    @app.middleware("http")
    async def checked(request: Request, call_next: Any) -> Any:
        if token_hash is None and (request.headers.get("host") or "").rpartition(":")[0] not in LOCAL_HOSTS:
            return _error(403, f"this server answers requests for {' or '.join(LOCAL_HOSTS)} alone, as it has no token")
        if token_hash is not None and request.url.path not in OPEN and not _allowed(request, token_hash):
            return _error(401, "the token is missing or wrong: send the header Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})
        length = request.headers.get("content-length", "0")
        if request.method == "POST" and not (length.isdecimal() and int(length) <= MOST_BYTES and "content-length" in request.headers):
            return _error(413, f"the body must be at most {MOST_BYTES >> 20} MiB, and its length be said (Content-Length)")
        return await call_next(request)

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        shown = interface.to_json() if token_hash is None else None
        return HTMLResponse(PAGE.replace("{{interface}}", json.dumps(shown).replace("<", "\\u003c")))

    @app.get("/health")
    async def health() -> JSONResponse:
        if not await backend.ready():
            return _error(503, "no model is ready yet", {"Retry-After": "1"})
        return JSONResponse({"status": "ok"})

    @app.get("/model")
    async def model() -> JSONResponse:
        return JSONResponse(interface.to_json())

    @app.post("/predict")
    async def predict(body: request_type) -> JSONResponse:  # type: ignore[valid-type]
        # A null is what a row lacks, which is not the same as a column that is left out.
        rows = [given.model_dump(exclude_unset=True) for given in body.rows]  # type: ignore[attr-defined]
        rows = [{**given, "id": str(number if given.get("id") is None else given["id"])} for number, given in enumerate(rows)]
        options = _given(body)
        answers = await backend.predict(rows, options)
        if all(answer["error"] is not None for answer in answers):
            return JSONResponse({"error": answers[0]["error"], "rows": answers}, status_code=422)
        return JSONResponse({"rows": answers})

    if interface.streams:

        @app.post("/stream")
        async def stream(body: prompt_type) -> StreamingResponse:  # type: ignore[valid-type]
            given: Any = body
            pieces = backend.stream(getattr(given, interface.column), _given(given), str(given.id or "0"))
            first = await anext(pieces, None)  # here, so that what is refused has its status
            return StreamingResponse(_events(first, pieces), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return _error(400, f"the body is no JSON ({first.get('ctx', {}).get('error', first['msg'])})")
        place = ".".join(str(part) for part in first["loc"] if part != "body") or "the body"
        fields = f"; a row has {', '.join(row.model_fields)}" if "rows" in first["loc"] else ""
        return _error(422, f"{place}: {first['msg'][:1].lower()}{first['msg'][1:]}{fields}")

    @app.exception_handler(UserError)
    async def refused(request: Request, error: UserError) -> JSONResponse:
        return _error(422, str(error))

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> JSONResponse:
        return _error(503, str(error), {"Retry-After": "1"})

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        there = [f"{'/'.join(sorted(route.methods))} {route.path}" for route in app.routes if isinstance(route, Route) and route.methods]
        return _error(error.status_code, f"there is no {request.method} {request.url.path} here: there are {', '.join(there)}")

    return app


async def _events(first: str | None, pieces: AsyncIterator[str]) -> AsyncIterator[str]:
    """Server-sent events: {"text": piece} for each piece, at the end {"done": true}, or {"error": sentence}."""
    try:
        if first is not None:
            yield _event({"text": first})
        async for piece in pieces:
            yield _event({"text": piece})
        yield _event({"done": True})
    except (UserError, Busy) as error:
        yield _event({"error": str(error)})


def _event(data: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def _types(interface: Interface) -> tuple[type[BaseModel], type[BaseModel], type[BaseModel]]:
    """The types of a row, of a request of /predict and of one of /stream."""
    identity: Any = (str | int | None, None)
    if interface.kind == "frames":
        fields: dict[str, Any] = dict.fromkeys(interface.columns, (str, ...))
    elif interface.columns:
        fields = dict.fromkeys(interface.columns, (Any, None))
    else:
        fields = {interface.column: (str, ...)}
    row = create_model("Row", __config__=_EMPTY, **{**fields, "id": identity})
    options = create_model("Options", __config__=_EMPTY, **{name: _optional(*_OPTION_TYPES[name]) for name in interface.options})
    rows: Any = (list[row], Field(min_length=1, max_length=MOST_ROWS))  # type: ignore[valid-type]
    given: Any = (options | None, None)
    request = create_model("Request", __config__=_EMPTY, rows=rows, options=given)
    prompt = create_model("Prompt", __config__=_EMPTY, **{**fields, "id": identity, "options": given})
    return row, request, prompt


def _optional(kind: Any, limits: Any) -> Any:
    return Annotated[kind, limits] | None, None


def _given(body: Any) -> dict[str, Any]:
    return {} if body.options is None else body.options.model_dump(exclude_none=True)


def _allowed(request: Request, token_hash: str) -> bool:
    scheme, _, token = (request.headers.get("authorization") or "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(hashed(token.strip()), token_hash)


def _error(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": sentence}, status_code=status, headers=dict(headers or {}))
