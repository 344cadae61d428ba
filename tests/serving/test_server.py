"""``s3rec serve``: the answers of ``s3rec recommend``, to many at once, and a page that shows and explains them."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from browser import open_page
from handmade import random_groups, shard_batch
from processes import free_port, start_process

from s3rec_dist.__main__ import main
from s3rec_dist.config import Config, ModelConfig
from s3rec_dist.data.dataset import ATTRIBUTES_SCHEMA, ITEMS_SCHEMA, Dataset, new_manifest
from s3rec_dist.data.formats import write_shards
from s3rec_dist.data.sources import SourceError, read_names
from s3rec_dist.export import write_model
from s3rec_dist.model import S3Rec
from s3rec_dist.serving.batching import Batcher, Overloaded
from s3rec_dist.serving.padded import PaddedEncoder
from s3rec_dist.serving.recommender import Recommender, Request
from s3rec_dist.storage import Storage

for package in ("fastapi", "uvicorn", "prometheus_client"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

HOSTILE = "<img src=x onerror=document.title='owned'>"
N = 39


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """39 items, i1 to i39; item i has the attributes a(i % 4) and, every third, common."""
    folder = tmp_path_factory.mktemp("serve") / "dataset"
    groups = random_groups()
    starts = np.cumsum([0, *map(len, groups)])
    batches = [shard_batch(rows, int(first)) for first, rows in zip(starts, groups, strict=False)]
    ids = list(range(1, N + 1))
    attributes = [[1 + i % 4, *([5] if i % 3 == 0 else [])] for i in ids]
    items = {
        "id": ids,
        "raw": [f"i{i}" for i in ids],
        "count": [N - i for i in ids[:-1]] + [1],
        "attributes": attributes,
    }
    new_manifest(
        str(folder),
        name="toy",
        format="parquet",
        shards=write_shards(batches, str(folder / "shards"), 2, "parquet"),
        items=pa.table(items, schema=ITEMS_SCHEMA),
        attributes=pa.table(
            {"id": [1, 2, 3, 4, 5], "field": ["kind"] * 4 + ["mark"], "raw": ["a0", "a1", "a2", "a3", "common"]},
            schema=ATTRIBUTES_SCHEMA,
        ),
        preparation={},
        created_with="tests",
    )
    return Dataset.open(str(folder))


@pytest.fixture(scope="module")
def folder(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=16, inner_size=32, layers=2, max_length=10, initializer_range=0.5)
    model = S3Rec(config, dataset.n_items, dataset.n_attributes, dataset.item_attributes())
    path = str(tmp_path_factory.mktemp("model") / "m")
    write_model(model, path, {"stage": "finetune"}, dataclasses.replace(Config(), model=config), dataset)
    return path


@pytest.fixture(scope="module")
def recommender(folder: str) -> Recommender:
    return Recommender.load(folder, Storage(), {"i7": "Seven", "i8": HOSTILE})


@pytest.fixture
def client(recommender: Recommender) -> Iterator[Any]:
    from fastapi.testclient import TestClient

    from s3rec_dist.serving.server import make_app

    with TestClient(make_app(recommender, k_max=20)) as client:
        yield client


def test_the_answers_are_those_of_recommend(client: Any, dataset: Dataset, folder: str, tmp_path: Path) -> None:
    output = str(tmp_path / "best.parquet")
    assert main(["recommend", folder, "--dataset", dataset.path, "--k", "7", "--output", output]) == 0
    expected = pq.read_table(output).to_pylist()
    sequences = dataset.read_row_group(0)
    for row, user in enumerate(sequences.users.to_pylist()):
        history = sequences.values[sequences.offsets[row] : sequences.offsets[row + 1]]
        answer = client.post("/recommend", json={"items": [f"i{i}" for i in history], "k": 7}).json()
        own = [entry for entry in expected if entry["user"] == user]
        found = answer["recommendations"]
        assert [entry["item"] for entry in found] == [entry["item"] for entry in own]
        assert [entry["score"] for entry in found] == pytest.approx([entry["score"] for entry in own], abs=1e-5)


def test_an_answer_is_the_same_in_any_batch(recommender: Recommender) -> None:
    requests = [Request([1 + i % N, 1 + 7 * i % N, 5], 1 + i % 9, exclude=[i % 4 + 1]) for i in range(30)]
    together = recommender.recommend(requests)
    for request, answer in zip(requests, together, strict=True):
        alone = recommender.recommend([request])[0]
        assert [found.item for found in answer] == [found.item for found in alone]
        assert len(answer) == request.k
        assert not {found.item for found in answer} & {*request.items, *request.exclude}


def test_seen_items_come_back_where_they_may(client: Any) -> None:
    asked = {"items": ["i1", "i2", "i3"], "k": 20}
    without = client.post("/recommend", json=asked).json()["recommendations"]
    with_seen = client.post("/recommend", json={**asked, "include_seen": True}).json()["recommendations"]
    assert not {"i1", "i2", "i3"} & {entry["item"] for entry in without}
    best = [entry["item"] for entry in with_seen if entry["item"] not in ("i1", "i2", "i3")]
    assert best == [entry["item"] for entry in without][: len(best)]


@pytest.mark.parametrize(
    ("asked", "status", "says"),
    [
        ({"items": ["nope", "i1"]}, 422, "item 'nope' is not in the catalogue; take it out, or send unknown: 'skip'"),
        ({"items": ["nope"], "unknown": "skip"}, 422, "none of the items is in the catalogue"),
        ({"items": []}, 422, "at least 1 item"),
        ({"items": ["i1"], "k": 21}, 422, "less than or equal to 20"),
        ({"items": ["i1"] * 10_001}, 422, "at most 10000 items"),
        ({"items": ["i1"], "kay": 5}, 422, "kay: Extra inputs are not permitted"),
        ({"items": ["i1"] * 501, "why": True}, 422, "why: a history of 501 items; at most 500 are explained"),
        ({"items": [None] * 9}, 422, "items.0: Input should be a valid string; 8 more like it"),
        ({"items": ["x" * 1000] * 2000}, 413, "the body is larger than 1,048,576 bytes"),
    ],
)
def test_a_request_that_cannot_be_answered_is_told_why(client: Any, asked: Any, status: int, says: str) -> None:
    response = client.post("/recommend", json=asked)
    assert response.status_code == status and says in response.text


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"items": ["\\ud800"]}', "items.0: Input should be a valid string"),
        (b'{"items": ["i1"], "\\ud800": 1}', "Input should be a valid string"),
        (b'{"items": ["i1"], "k": NaN}', "k: Input should be a finite number"),
        (b'{"items": ["i1"', "the body is no JSON"),
    ],
)
def test_what_no_answer_can_repeat_is_refused_without_repeating_it(client: Any, body: bytes, says: str) -> None:
    response = client.post("/recommend", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 422 and says in response.json()["detail"]


def test_unknown_items_are_skipped_where_asked_and_named(client: Any) -> None:
    answer = client.post("/recommend", json={"items": ["nope", "i1"], "unknown": "skip"}).json()
    expected = client.post("/recommend", json={"items": ["i1"]}).json()
    assert answer["unknown"] == ["nope"] and answer["recommendations"] == expected["recommendations"]


def test_attention_is_what_the_encoder_pays(recommender: Recommender) -> None:
    """Put together with the values, it is the vector that the model gives."""
    history = list(range(1, 15))
    shares = recommender.attention(history)
    assert sum(shares) == pytest.approx(1, abs=1e-5) and shares[:4] == [0] * 4  # before the latest 10
    encoder = PaddedEncoder(recommender.model).eval()
    items, lengths = torch.tensor([history[4:]]), torch.tensor([10])
    with torch.no_grad():
        newest, x, _ = encoder._before_last_block(items, lengths)
        block = encoder.blocks[-1]
        values = block.qkv(x)[..., 2 * 16 :].view(1, 10, 2, 8)
        attended = torch.einsum("bhl,blhd->bhd", encoder.attention(items, lengths), values).reshape(1, 1, 16)
        y = block.attention_norm(newest + block.attention_output(attended))
        y = block.output_norm(y + block.inner_output(torch.nn.functional.gelu(block.inner(y))))
        packed = recommender.model.encode_last(items[0].int(), torch.tensor([0, 10], dtype=torch.int32), 10)
    torch.testing.assert_close(y[0], packed, rtol=0, atol=1e-5)


def test_reasons_are_shared_attributes_rarer_first_and_cosines(client: Any, recommender: Recommender) -> None:
    answer = client.post("/recommend", json={"items": ["i3", "i1"], "k": 20, "why": True}).json()
    assert [item["item"] for item in answer["history"]] == ["i3", "i1"]
    vectors = recommender.model.item_embedding.weight.detach()
    for found, reason in zip(answer["recommendations"], answer["reasons"], strict=True):
        number = int(found["item"][1:])
        expected = {}
        if number % 4 == 1:
            expected["i1"] = ["a1"]
        both = [*(["a3"] if number % 4 == 3 else []), *(["common"] if number % 3 == 0 else [])]  # 10 and 13 items
        if both:
            expected["i3"] = both
        assert {entry["item"]: entry["attributes"] for entry in reason["shared"]} == expected
        cosine = torch.cosine_similarity(vectors[number], vectors[3], dim=0)
        assert reason["similarity"][0] == pytest.approx(float(cosine), abs=1e-5)


def test_items_are_found_by_id_and_name_the_popular_first(client: Any) -> None:
    assert [item["item"] for item in client.get("/items", params={"q": "i1", "limit": 3}).json()["items"]] == [
        "i1", "i10", "i11",
    ]  # fmt: skip
    assert client.get("/items", params={"q": "SEV"}).json()["items"][0]["item"] == "i7"


def test_health_and_metrics_are_for_operators(client: Any) -> None:
    client.post("/recommend", json={"items": ["i1"]})
    client.post("/recommend", json={"items": ["nope"]})
    client.post("/recommend", json={"items": ["i1"], "k": 21})
    client.post("/recommend", json={"items": ["x" * 1000] * 2000})
    health = client.get("/health").json()
    assert (health["status"], health["items"], health["waiting"]) == ("ready", N, 0)
    text = client.get("/metrics").text
    for line in (
        's3rec_requests_total{status="200"} 1.0',
        's3rec_requests_total{status="422"} 2.0',
        's3rec_requests_total{status="413"} 1.0',
        "s3rec_seconds_count 4.0",
        "s3rec_batch_count 1",
    ):
        assert line in text


def test_the_page_may_load_nothing_from_elsewhere(client: Any) -> None:
    response = client.get("/")
    assert "default-src 'self'" in response.headers["content-security-policy"]
    assert client.get("/page.js").headers["content-type"].startswith("text/javascript")


# Batching


def test_requests_that_wait_are_answered_together_and_an_error_is_everyones_own() -> None:
    sizes: list[int] = []
    begun, go = threading.Event(), threading.Event()

    def answer(requests: Sequence[int]) -> list[int]:
        begun.set()
        go.wait(10)
        if -1 in requests:
            raise ValueError("no")
        return [2 * request for request in requests]

    async def ask() -> list[Any]:
        batcher: Batcher[int, int] = Batcher(answer, most=8, wait_s=0, most_waiting=20, on_batch=sizes.append)
        first = asyncio.ensure_future(batcher.ask(1))
        await asyncio.to_thread(begun.wait, 10)
        rest = [asyncio.ensure_future(batcher.ask(i)) for i in (2, 3, 4, -1)]
        await asyncio.sleep(0)
        go.set()
        answers = await asyncio.gather(first, *rest, return_exceptions=True)
        alone = await batcher.ask(5)
        batcher.close()
        return [*answers, alone]

    answers = asyncio.run(ask())
    assert sizes == [1, 4, 1] and answers[0] == 2 and answers[-1] == 10
    assert all(isinstance(error, ValueError) for error in answers[1:5])


def test_more_than_may_wait_are_sent_away_and_the_others_answered() -> None:
    begun, go = threading.Event(), threading.Event()

    def answer(requests: Sequence[int]) -> list[int]:
        begun.set()
        go.wait(10)
        return list(requests)

    async def ask() -> list[Any]:
        batcher: Batcher[int, int] = Batcher(answer, most=1, wait_s=0, most_waiting=2)
        first = asyncio.ensure_future(batcher.ask(0))
        await asyncio.to_thread(begun.wait, 10)
        rest = [asyncio.ensure_future(batcher.ask(i)) for i in range(1, 6)]
        await asyncio.sleep(0)
        go.set()
        answers = await asyncio.gather(first, *rest, return_exceptions=True)
        batcher.close()
        return answers

    answers = asyncio.run(ask())
    assert answers[:3] == [0, 1, 2] and all(isinstance(error, Overloaded) for error in answers[3:])


def test_a_service_that_is_overloaded_says_when_to_come_back(
    recommender: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastapi.testclient import TestClient

    from s3rec_dist.serving.server import make_app

    async def full(self: Any, request: Any) -> Any:
        raise Overloaded

    monkeypatch.setattr(Batcher, "ask", full)
    with TestClient(make_app(recommender)) as client:
        response = client.post("/recommend", json={"items": ["i1"]})
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")


# Names


def test_names_come_from_tables_and_from_recbole(tmp_path: Path) -> None:
    pq.write_table(pa.table({"item": [1, 2], "name": ["one", None]}), tmp_path / "n.parquet")
    (tmp_path / "n.csv").write_text("sku,title\ni1,One\n")
    (tmp_path / "n.item").write_text("item_id:token\tmovie_title:token_seq\n1\tToy Story\n")
    assert read_names(str(tmp_path / "n.parquet"), "item", "name", Storage()) == {"1": "one"}
    assert read_names(str(tmp_path / "n.csv"), "sku", "title", Storage()) == {"i1": "One"}
    assert read_names(str(tmp_path / "n.item"), "item_id", "movie_title", Storage()) == {"1": "Toy Story"}
    with pytest.raises(SourceError, match=r"n.item: no column 'name' for the name; there are item_id, movie_title"):
        read_names(str(tmp_path / "n.item"), "item_id", "name", Storage())


# The service as a process


@pytest.mark.slow
def test_the_service_serves_a_page_and_ends_well(folder: str, tmp_path: Path) -> None:
    (tmp_path / "names.csv").write_text(f'item,name\ni7,Seven\ni8,"{HOSTILE}"\n')
    port = free_port()
    command = [sys.executable, "-m", "s3rec_dist", "serve", folder, "--port", str(port)]
    server = start_process([*command, "--names", str(tmp_path / "names.csv"), "--threads", "1"], {})
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 60
        while True:
            try:
                assert httpx.get(f"{url}/health").json()["status"] == "ready"
                break
            except httpx.TransportError:
                assert server.poll() is None and time.monotonic() < until
                time.sleep(0.1)
        for width in (1280, 390):
            with open_page(url, width) as (page, wrong):
                page.fill("#search", "seven")
                page.wait_for_selector("#found li")
                page.keyboard.press("Enter")
                page.wait_for_selector("#best li")
                page.fill("#search", "onerror")
                page.wait_for_selector("#found li")
                page.keyboard.press("ArrowDown")
                page.keyboard.press("Enter")
                page.locator("#history li .bar").nth(1).wait_for()
                assert page.locator("#history .name").all_inner_texts() == ["Seven", HOSTILE]
                expected = httpx.post(f"{url}/recommend", json={"items": ["i7", "i8"]}).json()["recommendations"]
                shown = page.locator("#best li").evaluate_all("lines => lines.map(line => line.dataset.item)")
                assert shown == [entry["item"] for entry in expected]
                assert "Similar: " in page.inner_text("#best") and "Shared: " in page.inner_text("#best")
                assert "a3" in page.inner_text("#best") or "a0" in page.inner_text("#best")
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                page.click("#history button >> nth=0")
                page.locator("#history li").nth(1).wait_for(state="detached")
                assert page.title() == "s3rec_dist" and not wrong
    finally:
        server.send_signal(signal.SIGTERM)
        printed = server.communicate(timeout=30)[0]
    assert server.returncode == 0, printed
    assert printed.splitlines() == [f"serving toy on {url}"]


def test_a_service_told_to_end_as_soon_as_it_says_where_it_is_ends(folder: str) -> None:
    server = start_process([sys.executable, "-m", "s3rec_dist", "serve", folder, "--port", "0", "--threads", "1"], {})
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    finally:
        server.kill()
        server.communicate()
    assert 0 < int(line.rpartition(":")[2]) <= 65535


@pytest.fixture
def never_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: Any, sockets: Any = None) -> None:
        raise AssertionError("it served")

    monkeypatch.setattr("uvicorn.Server.run", run)


@pytest.mark.usefixtures("never_serves")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--port", "70000"], "--port 70000: expected 0 (any that is free) to 65535"),
        (["--threads", "-1"], "--threads -1: expected at least 1, or 0 for torch's own choice"),
        (["--max-wait-ms", "nan"], "--max-wait-ms nan: expected 0 or more"),
    ],
)
def test_options_that_cannot_be_are_refused(
    folder: str, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", folder, *options]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.usefixtures("never_serves")
def test_a_port_that_is_taken_is_told_before_anything_is_served(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", folder, "--port", str(taken.getsockname()[1])]) == 2
    printed = capsys.readouterr()
    assert "cannot listen: Address already in use" in printed.err and not printed.out


@pytest.mark.slow
def test_the_service_is_measured_beside_the_bare_model(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["model.hidden_size=16", "model.inner_size=16", "model.max_length=10", "engine.threads=1"]
    command = ["bench", "serve", "--dataset", dataset.path, "--steps", "100", "--repetitions", "1", *small]
    assert main(command) == 0
    printed = capsys.readouterr().out
    for line in ("1 clients: ms p99", "64 clients: requests/s", "bare model, batches of 64: requests/s"):
        assert line in printed
