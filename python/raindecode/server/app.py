"""The FastAPI application: routes in OpenAI's form over one Service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import raindecode
from raindecode.decoder import Decoder
from raindecode.server.faults import Fault
from raindecode.server.guard import Guard
from raindecode.server.page import playground
from raindecode.server.plans import Plan
from raindecode.server.protocol import ChatBody, CompletionBody, DetokenizeBody, ErrorBody, TokenizeBody
from raindecode.server.replies import Replies
from raindecode.server.service import Service
from raindecode.server.settings import ServerSettings
from raindecode.server.streams import EventStream

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": what}
    for status, what in {
        400: "A field's value is not allowed", 401: "No key, or a wrong one", 403: "Called by a name that is not allowed",
        404: "No such model", 408: "The body did not arrive in time", 413: "The body is too large",
        415: "The content type is not application/json",
        429: "The queue is full", 500: "The model failed", 503: "The server is shutting down", 504: "No answer in time",
    }.items()
}  # fmt: skip
_UNIONS = {
    "prompt": "give a text, a list of token ids, or a list of these",
    "stop": "give a text, or a list of up to 64 that are not empty",
    "align.urial": "give true, false, or the name of a constant prompt",
    "align.dera.lambda": "give a number from -1000 to 1000, or a list with one per aligned model",
    "align.rain.width": 'give a whole number from 1 to 64, or "auto"',
}


def create_app(settings: ServerSettings, decoder: Decoder | None = None, *, service: Service | None = None) -> FastAPI:
    """A server as an ASGI application. Its lifespan loads the model, unless one is given, and owns the engine's thread.

    Args:
        decoder: for this application alone.
        service: the same, made already with these settings, so that what is wrong with them is known before anything listens.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        running = service
        if running is None:
            loaded = decoder
            if loaded is None:
                loaded = await asyncio.to_thread(Decoder.from_pretrained, settings.model, **dict(settings.loading))
            running = Service(loaded, settings)
        app.state.service = running
        running.start()
        try:
            yield
        finally:
            await running.drain()
            await running.close()

    app = FastAPI(
        title="raindecode", version=raindecode.__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        description="OpenAI's API over a decoder that aligns frozen models while they decode. See the field `align`.",
        responses=_ERRORS,
    )  # fmt: skip
    app.state.settings = settings
    _add_handlers(app)
    _add_routes(app)
    # The last one added is the first to see a request.
    app.add_middleware(Guard, settings=settings)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.cors_origins), allow_methods=["GET", "POST"], allow_headers=["*"],
            expose_headers=["X-Request-Id", "X-Align-Warning"],
        )  # fmt: skip
    return app


async def _service(request: Request) -> Service:  # async: FastAPI gives every call of another kind a thread
    service: Service = request.app.state.service
    return service


Serving = Annotated[Service, Depends(_service)]


def _add_routes(app: FastAPI) -> None:
    @app.post("/v1/chat/completions", response_model=None, tags=["OpenAI"], summary="Answer a conversation")
    async def chat(body: ChatBody, request: Request, service: Serving) -> Response:
        return await _respond(await service.prepare(service.planner.chat, body), request, service, chat=True)

    @app.post("/v1/completions", response_model=None, tags=["OpenAI"], summary="Go on with texts or token ids")
    async def completions(body: CompletionBody, request: Request, service: Serving) -> Response:
        return await _respond(await service.prepare(service.planner.completion, body), request, service, chat=False)

    @app.get("/v1/models", tags=["OpenAI"], summary="The model, and the names it is aligned by")
    async def models(service: Serving) -> dict[str, Any]:
        return {"object": "list", "data": [_model(service, name) for name in service.catalog.aliases]}

    @app.get("/v1/models/{name:path}", tags=["OpenAI"], summary="One model")
    async def model(name: str, service: Serving) -> dict[str, Any]:
        if not name:
            raise HTTPException(404)
        service.catalog.align_of(name, None, None)
        return _model(service, name)

    @app.head("/health", include_in_schema=False)  # what some load balancers ask
    @app.get("/health", tags=["Operation"], summary="Whether requests can be answered")
    async def health(service: Serving) -> Response:
        state = "ok" if service.is_healthy else "draining" if service.is_draining else "failed"
        return JSONResponse({"status": state}, 200 if service.is_healthy else 503)

    @app.get("/metrics", tags=["Operation"], summary="Prometheus' text form")
    async def metrics(service: Serving) -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version", tags=["Operation"], summary="Which software this is")
    async def version() -> dict[str, str]:
        return {"version": raindecode.__version__}

    @app.get("/v1/align", tags=["Operation"], summary="What this server has to align by")
    async def align(service: Serving) -> dict[str, Any]:
        catalog, decoder = service.catalog, service.decoder
        return {
            "model": catalog.name, "num_models": decoder.num_models, "context_length": decoder.context_length,
            "edits": list(catalog.edits), "prompts": list(catalog.prompts), "preset": catalog.preset,
            "default": catalog.default.model_dump(exclude_none=True, by_alias=True),
            "exact": decoder.exact, "dtype": decoder.dtype, "max_concurrent": decoder.engine.max_tasks,
        }  # fmt: skip

    @app.post("/tokenize", tags=["Operation"], summary="Token ids of a text")
    async def tokenize(body: TokenizeBody, service: Serving) -> dict[str, Any]:
        ids = await service.prepare(service.encode, body)
        return {"tokens": ids, "count": len(ids), "max_model_len": service.decoder.context_length}

    @app.post("/detokenize", tags=["Operation"], summary="Text of token ids")
    async def detokenize(body: DetokenizeBody, service: Serving) -> dict[str, str]:
        return {"prompt": await service.prepare(service.decode, body)}

    @app.get("/", response_class=HTMLResponse, tags=["Operation"], summary="The playground")
    async def page() -> Response:
        made = playground()
        return HTMLResponse(made.html, headers={"Content-Security-Policy": made.policy})


async def _respond(plan: Plan, request: Request, service: Service, *, chat: bool) -> Response:
    job = service.submit(plan)
    replies = Replies(plan, service.texts, chat=chat)
    if plan.streams:
        return EventStream(service, job, replies, plan.headers)
    outcomes = await service.answer(job, request)
    if plan.logprobs:  # long ones would hold up the event loop
        return await asyncio.to_thread(lambda: JSONResponse(replies.whole(outcomes), headers=plan.headers))
    return JSONResponse(replies.whole(outcomes), headers=plan.headers)


def _model(service: Service, name: str) -> dict[str, Any]:
    base = service.catalog.name
    return {
        "id": name, "object": "model", "created": int(service.started), "owned_by": "raindecode", "root": base,
        "parent": None if name == base else base, "max_model_len": service.decoder.context_length,
    }  # fmt: skip


def _add_handlers(app: FastAPI) -> None:
    @app.exception_handler(Fault)
    async def fault(_: Request, error: Fault) -> Response:
        return _error(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return _error(_validation(error))

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> Response:
        message = str(error.detail)
        if error.status_code == 404:
            message = f"there is no {request.url.path[:120]!r} here; GET /openapi.json says what there is"
        elif error.status_code == 405:
            message = f"{request.method[:20]} is not allowed for {request.url.path[:120]!r}"
        elif error.status_code == 400:
            message = "the body is not JSON text in UTF-8"
        return _error(Fault(error.status_code, message, headers=dict(error.headers or {})))


def _error(fault: Fault) -> Response:
    return JSONResponse(fault.body, fault.status, headers=fault.headers)


def _validation(error: RequestValidationError) -> Fault:
    """A body that does not fit, told by its first mistake."""
    one = error.errors()[0]
    if one["type"] == "json_invalid":
        return Fault(
            400, f"the body is not JSON: {one.get('ctx', {}).get('error', 'it cannot be read')}", code="invalid_json"
        )
    names = [str(part) for part in one["loc"][1:]]
    where = ".".join(names)
    for union, advice in _UNIONS.items():
        if where == union or where.startswith(f"{union}."):
            return Fault(400, f"{union}: {advice}", param=union)
    what = str(one["msg"]).removeprefix("Value error, ")
    if one["type"] == "extra_forbidden":
        what = "there is no such field here"
    return Fault(400, f"{where}: {what}" if where else what, param=where or None)
