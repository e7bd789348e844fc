"""The HTTP server: GET /ping and POST /invocations, as SageMaker calls them. Imports no torch and no stage.

The request body is a JPEG or PNG, the answer an indexed PNG in the photograph's upright size.
Errors are JSON, {"error": reason}, without paths, addresses or code locations.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from roadseg.config.sections import Serve
from roadseg.errors import ImageError, UsageError
from roadseg.images.decode import Limits
from roadseg.inference.predictor import Predictor
from roadseg.serve.model import Labels, Model, load_predictor

logger = logging.getLogger(__name__)

CONTAINER_MODEL = Path("/opt/ml/model")
WORKERS = 2  # one runs the network on all cores while the other decodes and encodes
BODY_DEADLINE_S = 10.0  # for a body to arrive completely: it occupies a slot of the queue meanwhile
GRACE_S = 20  # SageMaker sends SIGKILL 30 s after SIGTERM


def container_release(folder: Path = CONTAINER_MODEL) -> Path | None:
    """The unpacked release that SageMaker puts into its containers; None elsewhere."""
    return folder if (folder / "model.json").is_file() else None


def container_settings(settings: Serve) -> Serve:
    """The settings with the address that SageMaker calls: port 8080 on all interfaces."""
    return settings.model_copy(update={"host": "0.0.0.0", "port": 8080})


def serve(
    release: Path, settings: Serve, *, labels: Labels = "trainIds", say: Callable[[str], None] = lambda text: None
) -> None:
    """Serve a model.tar.gz, or the folder of an unpacked one, until SIGTERM or SIGINT; then return.

    Raises UsageError when it can't listen on the address. If the release can't be loaded, the error is
    logged and /ping answers 503. On a signal, accepted requests are finished within GRACE_S seconds.
    """
    run(create_app(lambda: load_predictor(release, settings.threads), settings, labels), settings, say)


def run(app: FastAPI, settings: Serve, say: Callable[[str], None]) -> None:
    """Run `app` until SIGTERM or SIGINT; `say` gets the address once the socket listens."""
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=512)
    except OSError as e:
        raise UsageError(
            f"can't listen on {settings.host} port {settings.port} ({e.strerror})",
            todo="choose another address with --serve.host and --serve.port, or stop the process that uses it",
        ) from None
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("roadseg.serve").setLevel(logging.INFO)  # also when the root logger was configured elsewhere
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=GRACE_S,
    )
    server = uvicorn.Server(config)

    def stop(signal_number: int, frame: Any) -> None:
        server.should_exit = True

    # uvicorn raises the signal again at its end; with these handlers the process returns instead of dying.
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        say(f"listening on http://{host}:{listener.getsockname()[1]}")
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Slots:
    """Limits the number of requests being processed or waiting. Used by the event loop's thread only."""

    def __init__(self, limit: int) -> None:
        self.free = limit

    @contextmanager
    def take(self) -> Iterator[None]:
        if not self.free:
            raise HTTPException(503, "too many requests are waiting; try again", {"Retry-After": "1"})
        self.free -= 1
        try:
            yield
        finally:
            self.free += 1


def create_app(
    load: Callable[[], Predictor],
    settings: Serve,
    labels: Labels = "trainIds",
    *,
    workers: int = WORKERS,
    body_deadline_s: float = BODY_DEADLINE_S,
) -> FastAPI:
    """The application. `load` is called once, in a thread, when the server starts."""
    model = Model(load, labels)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="predict")
    slots = _Slots(workers + settings.max_queue)
    limits = Limits(settings.max_body_bytes, settings.max_pixels)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        threading.Thread(target=model.load, name="load", daemon=True).start()
        yield
        pool.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(_AccessLog)

    @app.exception_handler(StarletteHTTPException)
    async def refuse(request: Request, e: StarletteHTTPException) -> Response:
        return JSONResponse({"error": e.detail}, e.status_code, e.headers)

    @app.get("/ping")
    async def ping() -> Response:
        _check_ready(model)
        return Response()

    @app.post("/invocations")
    async def invocations(request: Request) -> Response:
        _check_ready(model)
        _check_type(request)
        try:
            with slots.take():
                body = await _read_body(request, settings.max_body_bytes, body_deadline_s)
                return await asyncio.get_running_loop().run_in_executor(pool, model.answer, body, limits)
        except HTTPException:
            raise
        except ImageError as e:
            raise HTTPException(400, str(e)) from None
        except ClientDisconnect:
            return Response(status_code=499)  # the client is gone; the status is for the access log
        except Exception:
            logger.exception("a request failed")
            raise HTTPException(500, "internal error") from None

    return app


def _check_ready(model: Model) -> None:
    if model.state == "loading":
        raise HTTPException(503, "the model is being loaded; try again", {"Retry-After": "1"})
    if model.state == "failed":
        raise HTTPException(503, "the model could not be loaded; see the server's log")


def _check_type(request: Request) -> None:
    """Reject non-image types. A missing type is accepted, and the bytes decide which image type it is."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind and not kind.startswith("image/") and kind not in ("application/octet-stream", "application/x-image"):
        raise HTTPException(415, "expected the plain bytes of a JPEG or PNG, as image/jpeg or image/png")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HTTPException(415, "expected a body without Content-Encoding")


async def _read_body(request: Request, limit_bytes: int, deadline_s: float) -> bytes:
    """Read the body; never holds more than the limit in memory. Raises HTTPException 400, 408 or 413."""
    too_large = HTTPException(413, f"the body is too large; expected at most {limit_bytes:,} bytes")
    if int(request.headers.get("content-length", 0)) > limit_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(deadline_s):
            async for chunk in request.stream():
                if len(body) + len(chunk) > limit_bytes:
                    raise too_large
                body += chunk
    except TimeoutError:
        raise HTTPException(408, f"the body took over {deadline_s:g} s to arrive", {"Connection": "close"}) from None
    if not body:
        raise HTTPException(400, "the body is empty; expected the bytes of a JPEG or PNG")
    return bytes(body)


class _AccessLog:
    """Log one JSON line per request, without headers, query or body; JSON, so that a path can't forge a line."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status, sent_bytes = time.perf_counter(), 0, 0

        async def record(message: Message) -> None:
            nonlocal status, sent_bytes
            if message["type"] == "http.response.start":
                status = message["status"]
            sent_bytes += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, record)
        finally:
            ms = round(1000 * (time.perf_counter() - began), 1)
            line = {"method": scope["method"], "path": scope["path"][:100], "status": status, "ms": ms}
            logger.info(json.dumps({**line, "sent_bytes": sent_bytes}))
