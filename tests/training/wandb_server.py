"""A W&B server that knows enough for a run to be logged, and that can die.

    with serve_wandb() as server:
        ...  # WANDB_BASE_URL=server.url
        server.hang()       # or server.refuse()
    server.history()        # the rows that were logged

What it does not know it answers with nothing.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PROJECT = {"id": "p", "name": "s3rec-dist", "entity": {"id": "e", "name": "entity"}}


def answer(name: str, variables: dict[str, Any]) -> dict[str, Any]:
    """The data that a GraphQL operation gets."""
    if name == "RunResumeStatus":
        return {"model": {**PROJECT, "bucket": None}}
    if name == "UpsertBucket":
        run = {"id": "b", "name": variables["name"], "displayName": "", "config": "{}", "historyLineCount": 0}
        return {"upsertBucket": {"bucket": {**run, "project": PROJECT}, "inserted": True}}
    if name == "CreateRunFiles":
        return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}}
    return {}


class WandbServer:
    """See the module's docstring."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []
        self._hangs = threading.Event()
        self._ends = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                received = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                body = received.decode(errors="replace")  # some are no text
                if server._hangs.is_set():
                    server._ends.wait()
                    return
                server.requests.append((self.path, body))
                request = json.loads(body) if self.path == "/graphql" else {}
                data = answer(request.get("operationName", ""), request.get("variables", {}))
                reply = json.dumps({"data": data}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            do_GET = do_PUT = do_POST

            def log_message(self, *arguments: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def hang(self) -> None:
        """Requests are taken and never answered from here on."""
        self._hangs.set()

    def refuse(self) -> None:
        """Nobody listens any more."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def sent(self, key: str) -> list[str]:
        """The values of a variable of the run, in all requests that set it."""
        found = [json.loads(body) for path, body in self.requests if path == "/graphql"]
        runs = [request["variables"] for request in found if request["operationName"] == "UpsertBucket"]
        return [run[key] for run in runs if run.get(key)]

    def history(self) -> list[dict[str, Any]]:
        """The rows that were logged."""
        rows: list[dict[str, Any]] = []
        for path, body in self.requests:
            if path.endswith("/file_stream"):
                lines = json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
                rows += map(json.loads, lines)
        return rows


@contextlib.contextmanager
def serve_wandb() -> Iterator[WandbServer]:
    server = WandbServer()
    try:
        yield server
    finally:
        server._ends.set()
        server.refuse()
