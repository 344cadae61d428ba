"""``s3rec serve MODEL``: recommendations over HTTP, and a page to try them on.

    s3rec serve models/beauty --port 8080
    curl localhost:8080/recommend -d '{"items": ["B0001", "B0002"], "k": 10}' -H 'Content-Type: application/json'

    POST /recommend    {items: [raw id, oldest first], k, include_seen, exclude, unknown: "error" or "skip", why}
    GET  /items        ?q=text&limit=20: items whose id or name holds the text
    GET  /health       the model, its catalogue, and how many requests wait
    GET  /metrics      for Prometheus
    GET  /             the page

Requests that come at the same time are answered together (``--max-batch``); where too many wait, the answer is 503 with
Retry-After. SIGTERM ends the service after what it has begun. There is no authentication and no TLS: put it behind what
has both.
"""

import argparse
import asyncio
import contextlib
import gc
import json
import math
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch

import s3rec_dist
from s3rec_dist.data.sources import read_names
from s3rec_dist.serving.batching import Batcher, Overloaded
from s3rec_dist.serving.recommender import Recommendation, Recommender, Request, ServeError
from s3rec_dist.storage import add_storage_argument, storage_of

if TYPE_CHECKING:
    from fastapi import FastAPI

MOST_ITEMS, MOST_EXPLAINED, MOST_BYTES = 10_000, 500, 1 << 20
"""Of one request: items of a history, those of one that is explained, bytes of a body."""
_PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


def make_app(
    recommender: Recommender,
    *,
    k_max: int = 100,
    max_batch: int = 64,
    max_wait_ms: float = 0.0,
    max_waiting: int = 1024,
) -> "FastAPI":
    """The service of one model."""
    import prometheus_client as prometheus
    from fastapi import FastAPI, Query, Response
    from fastapi import Request as HTTPRequest
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, PlainTextResponse
    from pydantic import BaseModel, ConfigDict, Field

    registry = prometheus.CollectorRegistry()
    answered = prometheus.Counter("s3rec_requests", "Requests to /recommend", ["status"], registry=registry)
    seconds = prometheus.Histogram("s3rec_seconds", "Of a request to /recommend", buckets=_BUCKETS, registry=registry)
    sizes = prometheus.Histogram(
        "s3rec_batch", "Requests answered together", buckets=(1, 2, 4, 8, 16, 32, 64, 128), registry=registry
    )
    batcher: Batcher[Request, list[Recommendation]] = Batcher(
        recommender.recommend,
        most=max_batch,
        wait_s=max_wait_ms / 1000,
        most_waiting=max_waiting,
        on_batch=sizes.observe,
    )
    explainer: Batcher[tuple[list[int], list[Recommendation]], dict[str, Any]] = Batcher(
        lambda asked: [_reasons(recommender, *one) for one in asked], most=1, wait_s=0, most_waiting=max_waiting
    )

    def waiting() -> int:
        return batcher.waiting + explainer.waiting

    def note(status: int, took: float) -> None:
        answered.labels(str(status)).inc()
        seconds.observe(took)

    prometheus.Gauge("s3rec_waiting", "Requests that wait", registry=registry).set_function(waiting)

    RawId = Annotated[str, Field(coerce_numbers_to_str=True, max_length=1000)]

    class Asked(BaseModel):
        model_config = ConfigDict(extra="forbid")

        items: list[RawId] = Field(min_length=1, max_length=MOST_ITEMS, description="raw item ids, oldest first")
        k: int = Field(10, ge=1, le=k_max)
        include_seen: bool = Field(False, description="whether items of the history are candidates too")
        exclude: list[RawId] = Field([], max_length=MOST_ITEMS, description="raw item ids that are no candidates")
        unknown: Literal["error", "skip"] = Field("error", description="what to do with ids that the catalogue lacks")
        why: bool = Field(
            False,
            description=f"whether to say what the items have in common with the history, of at most {MOST_EXPLAINED}",
        )

    class Refused(BaseModel):
        detail: str

    refused: dict[int | str, dict[str, Any]] = {
        422: {"model": Refused, "description": "What was asked cannot be answered; the detail says why"}
    }
    refused_there = refused | {
        413: {"model": Refused, "description": f"A body of more than {MOST_BYTES:,} bytes"},
        503: {"model": Refused, "description": "Too many requests wait; Retry-After says for how many seconds"},
    }

    @contextlib.asynccontextmanager
    async def lifespan(app: "FastAPI") -> AsyncIterator[None]:
        yield
        batcher.close()
        explainer.close()

    app = FastAPI(
        title="s3rec_dist",
        version=s3rec_dist.__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        responses=refused,
    )
    app.add_middleware(_BoundedBodies)
    app.add_middleware(_Noted, path="/recommend", note=note)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: HTTPRequest, error: RequestValidationError) -> Response:
        return JSONResponse({"detail": _first_fault(error.errors())}, 422)

    @app.post("/recommend", responses=refused_there)
    async def recommend(asked: Asked) -> Response:
        """The best items after a history."""
        status, headers = 200, {}
        content: dict[str, Any]
        unknown = [raw for raw in asked.items if raw not in recommender.ids]
        history = [recommender.ids[raw] for raw in asked.items if raw in recommender.ids]
        if unknown and asked.unknown == "error":
            status = 422
            content = {"detail": f"item {unknown[0]!r} is not in the catalogue; take it out, or send unknown: 'skip'"}
        elif asked.why and len(asked.items) > MOST_EXPLAINED:
            status = 422
            content = {
                "detail": f"why: a history of {len(asked.items):,} items; at most {MOST_EXPLAINED} are explained"
            }
        elif not history:
            status = 422
            content = {"detail": "none of the items is in the catalogue, so there is no history"}
        else:
            excluded = [recommender.ids[raw] for raw in asked.exclude if raw in recommender.ids]
            try:
                best = await batcher.ask(Request(history, asked.k, asked.include_seen, excluded))
                content = {"recommendations": _told(recommender, best), "unknown": unknown}
                if asked.why:
                    content |= await explainer.ask((history, best))
            except Overloaded:
                status, headers = 503, {"Retry-After": "1"}
                content = {"detail": f"{max_waiting} requests wait already; try again in a second"}
        return JSONResponse(content, status, headers)

    @app.get("/items")
    async def items(
        q: Annotated[str, Query(max_length=200)] = "", limit: Annotated[int, Query(ge=1, le=100)] = 20
    ) -> Response:
        """Items whose id or name holds a text, the most popular first."""
        found = await asyncio.to_thread(recommender.search, q, limit)  # goes through the whole catalogue
        return JSONResponse({"items": [_item(recommender, item) for item in found]})

    @app.get("/health")
    async def health() -> Response:
        """Whether the service answers, and from what."""
        manifest = recommender.catalogue.manifest
        facts = {"status": "ready", "version": s3rec_dist.__version__, "waiting": waiting()}
        return JSONResponse(
            facts | {"dataset": manifest.name, "items": manifest.items, "catalogue": manifest.catalogue}
        )

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counters and histograms for Prometheus."""
        return PlainTextResponse(prometheus.generate_latest(registry), media_type=prometheus.CONTENT_TYPE_LATEST)

    def static(name: str, kind: str) -> Callable[[], Awaitable[Response]]:
        content = (files("s3rec_dist.serving") / "page" / name).read_bytes()

        async def serve() -> Response:
            return Response(content, media_type=kind, headers=_HEADERS)

        return serve

    for path, (name, kind) in _PAGE.items():
        app.get(path, include_in_schema=False)(static(name, kind))
    return app


def _item(recommender: Recommender, item: int) -> dict[str, Any]:
    attributes = [recommender.attributes[a - 1] for a in recommender.attributes_of(item)]
    return {
        "item": recommender.raw[item - 1],
        "name": recommender.names[item - 1],
        "attributes": [{"field": name, "value": value} for name, value in attributes],
    }


def _told(recommender: Recommender, best: list[Recommendation]) -> list[dict[str, Any]]:
    return [
        {"rank": rank, **_item(recommender, found.item), "score": found.score} for rank, found in enumerate(best, 1)
    ]


def _reasons(recommender: Recommender, history: list[int], best: list[Recommendation]) -> dict[str, Any]:
    """What the answer to ``why`` adds: the history with the attention on it, and reasons by recommendation."""
    attention = recommender.attention(history)
    reasons = [
        {
            "shared": [
                {
                    "item": recommender.raw[item - 1],
                    "attributes": [recommender.attributes[a - 1][1] for a in attributes],
                }
                for item, attributes in reason.shared[:5]
            ],
            "similarity": reason.similarity,
        }
        for reason in recommender.reasons(history, [found.item for found in best])
    ]
    told = [{**_item(recommender, item), "attention": share} for item, share in zip(history, attention, strict=True)]
    return {"history": told, "reasons": reasons}


def _first_fault(faults: Sequence[Any]) -> str:
    """What is wrong with a request, without what it sent: that may be large, or no Unicode."""
    if faults[0]["type"] == "json_invalid":
        return f"the body is no JSON: {faults[0]['ctx']['error']}, at character {faults[0]['loc'][-1]}"
    place = ".".join(str(part) for part in faults[0]["loc"] if part != "body")
    told = f"{place[:100]}: {faults[0]['msg']}" if place else str(faults[0]["msg"])
    more = f"; {len(faults) - 1} more like it" if len(faults) > 1 else ""
    return (told + more).encode(errors="backslashreplace").decode()


class _Noted:
    """ASGI middleware: status and seconds of every answer of one path, refusals and failures too."""

    def __init__(self, app: Any, path: str, note: Callable[[int, float], None]) -> None:
        self._app, self._path, self._note = app, path, note

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != self._path:
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def noted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            status = status or 500
            raise
        finally:
            if status:  # else the client left before it had asked
                self._note(status, time.perf_counter() - began)


class _BoundedBodies:
    """ASGI middleware: a body of more than MOST_BYTES is refused before it is read."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        body = b""
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return
            body += message.get("body", b"")
            if len(body) > MOST_BYTES:
                content = json.dumps({"detail": f"the body is larger than {MOST_BYTES:,} bytes"}).encode()
                headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
                await send({"type": "http.response.start", "status": 413, "headers": headers})
                await send({"type": "http.response.body", "body": content})
                return
            if not message.get("more_body"):
                break
        whole = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Any:
            return whole.pop() if whole else await receive()

        await self._app(scope, replay, send)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``s3rec serve``."""
    parser.add_argument("model", metavar="MODEL", help="model folder or URL, with its catalogue")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this host only)")
    parser.add_argument(
        "--port", type=int, default=8080, metavar="N", help="port to listen at; 0: any that is free (default: 8080)"
    )
    parser.add_argument(
        "--names", default="", metavar="FILE", help="what items are called: Parquet, CSV, JSONL, or RecBole's NAME.item"
    )
    parser.add_argument("--item-column", default="item", metavar="NAME", help="its column of raw ids (default: item)")
    parser.add_argument("--name-column", default="name", metavar="NAME", help="its column of names (default: name)")
    parser.add_argument("--k-max", type=int, default=100, metavar="K", help="most items of an answer (default: 100)")
    parser.add_argument(
        "--max-batch", type=int, default=64, metavar="N", help="requests answered together at most (default: 64)"
    )
    parser.add_argument(
        "--max-wait-ms",
        type=float,
        default=0.0,
        metavar="MS",
        help="how long a request waits for others (default: 0: those are answered together that came meanwhile)",
    )
    parser.add_argument(
        "--max-waiting",
        type=int,
        default=1024,
        metavar="N",
        help="requests that may wait; more get 503 (default: 1024)",
    )
    parser.add_argument(
        "--threads", type=int, default=0, metavar="N", help="threads of torch (default: its own choice)"
    )
    add_storage_argument(parser)


def run(args: argparse.Namespace) -> None:
    """``s3rec serve``: until SIGTERM or SIGINT."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ServeError(f"serve needs {error.name}: pip install 's3rec-dist[serve]'") from error
    for name in ("k_max", "max_batch", "max_waiting"):
        if getattr(args, name) < 1:
            raise ServeError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least 1")
    if args.threads < 0:
        raise ServeError(f"--threads {args.threads}: expected at least 1, or 0 for torch's own choice")
    if not 0 <= args.max_wait_ms < math.inf:
        raise ServeError(f"--max-wait-ms {args.max_wait_ms}: expected 0 or more")
    if not 0 <= args.port <= 65535:
        raise ServeError(f"--port {args.port}: expected 0 (any that is free) to 65535")
    if args.threads:
        torch.set_num_threads(args.threads)
    storage = storage_of(args)
    names = read_names(args.names, args.item_column, args.name_column, storage) if args.names else None
    recommender = Recommender.load(args.model, storage, names)
    app = make_app(
        recommender,
        k_max=args.k_max,
        max_batch=args.max_batch,
        max_wait_ms=args.max_wait_ms,
        max_waiting=args.max_waiting,
    )
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=10,
        server_header=False,
    )
    server, listener = uvicorn.Server(config), _listen(args.host, args.port)
    for number in (signal.SIGTERM, signal.SIGINT):  # before uvicorn listens to them, and when it raises them again
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    gc.collect()
    gc.freeze()  # else each collection goes through all that was imported, while requests wait
    host = f"[{args.host}]" if ":" in args.host else args.host
    name, port = recommender.catalogue.manifest.name, listener.getsockname()[1]
    print(f"serving {name} on http://{host}:{port}", flush=True)
    server.run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens already, so that who reads the address may connect."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ServeError(f"cannot listen: {error.strerror}; take another --host or --port") from error
