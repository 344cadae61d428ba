"""A Hugging Face Hub that knows enough for models to be pushed to it and taken from it.

    with serve_hub() as hub:
        ...                        # HF_ENDPOINT=hub.url, HF_TOKEN=hub.token, HF_HUB_DISABLE_XET=1
    hub.repositories["ann/beauty"].branches["main"][-1].files["config.json"]

Files whose names end in .safetensors or .parquet go through LFS, as there. What it does not know is status 404, and
``requests`` has all of them.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repository:
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def commit(self, revision: str) -> Commit | None:
        """The newest commit of a branch, or the one of this id."""
        if self.branches.get(revision):
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.oid == revision), None)


def blob(content: bytes) -> str:
    """Git's id of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".parquet"))


class HubServer:
    """See the module's docstring."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.token = "hf_" + "a" * 34
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_request(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.headers.get("Transfer-Encoding") == "chunked":
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                path = unquote(urlsplit(self.path).path)
                server.requests.append(f"{self.command} {path}")
                token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
                status, headers, reply = server.answer(self.command, path, body, token)
                if isinstance(reply, (dict, list)):
                    reply, headers = json.dumps(reply).encode(), {"Content-Type": "application/json", **headers}
                self.send_response(status)
                for name, value in {"Content-Length": str(len(reply)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(reply)

            do_GET = do_POST = do_PUT = do_HEAD = handle_request

            def log_message(self, *arguments: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, dict[str, str], Any]:
        """(status, headers, body) of one request."""
        may_write, parts = token == self.token, path.strip("/").split("/")
        if method == "PUT" and parts[0] == "large":
            if hashlib.sha256(body).hexdigest() != parts[1]:
                return 400, {}, {"error": "other bytes than were announced"}
            self.large[parts[1]] = body
            return 200, {}, b""
        if path == "/api/validate-yaml":
            front = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            is_good = isinstance(front, dict) and isinstance(front.get("tags"), list)
            return (200 if is_good else 400), {}, {"errors": [] if is_good else [{"message": "tags"}], "warnings": []}
        if path == "/api/repos/create":
            if not may_write:
                return 401, {}, {"error": "Invalid username or password."}
            request = json.loads(body)
            name = f"{request['organization']}/{request['name']}"
            if name in self.repositories:
                return 409, {}, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
            is_private = request.get("visibility") == "private" or bool(request.get("private"))
            self.repositories[name] = Repository(is_private, {"main": [Commit("0" * 40, "initial", {})]})
            return 200, {}, {"url": f"{self.url}/{name}", "id": name}
        at = 2 if parts[:2] == ["api", "models"] else 0
        name, rest = "/".join(parts[at : at + 2]).removesuffix(".git"), parts[at + 2 :]
        repository = self.repositories.get(name)
        if repository is None or (repository.private and not may_write):
            missing = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            return (404 if may_write else 401), missing, {"error": "Repository not found"}
        if method in ("GET", "HEAD"):
            return self._read(name, repository, at == 2, rest)
        if not may_write:
            return 403, {}, {"error": "Forbidden: you must have write access"}
        return self._write(name, repository, rest, body)

    def _read(
        self, name: str, repository: Repository, is_api: bool, rest: list[str]
    ) -> tuple[int, dict[str, str], Any]:
        revision = rest[1] if len(rest) > 1 else "main"
        commit = repository.commit(revision)
        if commit is None:
            return (
                404,
                {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"},
                {"error": "Invalid rev"},
            )
        if is_api and rest[:1] in ([], ["revision"]):
            files = [{"rfilename": path} for path in commit.files]
            return 200, {}, {"id": name, "sha": commit.oid, "private": repository.private, "siblings": files}
        if is_api and rest[0] == "tree":
            return 200, {}, [self._entry(path, content) for path, content in commit.files.items()]
        if rest[:1] == ["resolve"] and "/".join(rest[2:]) in commit.files:
            path = "/".join(rest[2:])
            content = commit.files[path]
            etag = hashlib.sha256(content).hexdigest() if is_large(path) else blob(content)
            return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit.oid}, content
        return (
            404,
            {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"},
            {"error": "Entry not found"},
        )

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": blob(content)}
        if is_large(path):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry

    def _write(
        self, name: str, repository: Repository, rest: list[str], body: bytes
    ) -> tuple[int, dict[str, str], Any]:
        if rest[0] == "branch":
            if rest[1] in repository.branches:
                return 409, {}, {"error": "Reference already exists"}
            repository.branches[rest[1]] = list(repository.branches["main"])
            return 201, {}, {}
        if rest[0] == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {True: "lfs", False: "regular"}
            files = [{"path": path, "uploadMode": modes[is_large(path)], "shouldIgnore": False} for path in paths]
            return 200, {}, {"files": files}
        if rest == ["info", "lfs", "objects", "batch"]:
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.url}/large/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return 200, {}, {"transfer": "basic", "objects": objects}
        if rest[0] == "commit":
            before = repository.commit(rest[1])
            lines = [json.loads(line) for line in body.splitlines()]
            files = dict(before.files) if before else {}
            for line in lines[1:]:
                value = line["value"]
                content = self.large[value["oid"]] if line["key"] == "lfsFile" else base64.b64decode(value["content"])
                files[value["path"]] = content
            oid = hashlib.sha1(body).hexdigest()
            repository.branches[rest[1]].append(Commit(oid, lines[0]["value"]["summary"], files))
            return 200, {}, {"commitUrl": f"{self.url}/{name}/commit/{oid}", "commitOid": oid, "success": True}
        return 404, {}, {"error": "unknown"}


@contextlib.contextmanager
def serve_hub() -> Iterator[HubServer]:
    server = HubServer()
    try:
        yield server
    finally:
        server.close()
