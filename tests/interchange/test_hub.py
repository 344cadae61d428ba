"""Model folders go to the Hugging Face Hub and come from it, by the real client and a server that speaks its API."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_server import HubServer, serve_hub
from processes import free_port, start_process, wait_for
from toy_models import assert_same_weights, six_items, small_model, write_run

from s3rec_dist import __main__ as cli
from s3rec_dist.export import MODEL_FILES, export
from s3rec_dist.interchange.hub import HubError, at_hand, push
from s3rec_dist.model import S3Rec

hub_package = pytest.importorskip("huggingface_hub")

Run = Callable[..., list[str]]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with serve_hub() as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("hub")
    dataset = six_items(place / "data")
    export(str(write_run(dataset, place)), dataset, str(place / "beauty"))
    return place / "beauty"


@pytest.fixture
def run(hub: HubServer, tmp_path: Path) -> Run:
    """Runs lines of Python against the server, each an expression, in one process; returns what each gave: its value,
    or its error in a line. ``push`` and ``load`` are the command and ``S3Rec.from_pretrained``."""

    def call(*expressions: str, **environment: str) -> list[str]:
        script = "\n".join(
            (
                "import json, os, sys",
                "from s3rec_dist.__main__ import main",
                "from s3rec_dist.model import S3Rec",
                "push = lambda *arguments: main(['push', *arguments])",
                "load = lambda *arguments, **options: S3Rec.from_pretrained(*arguments, **options).n_items",
                "for expression in json.loads(sys.argv[1]):",
                "    try: print('=', eval(expression))",
                "    except ValueError as error: print('=', error)",
            )
        )
        own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
        own |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        process = start_process([sys.executable, "-c", script, json.dumps(expressions)], {**own, **environment})
        return wait_for([process], timeout=60)[0].splitlines()

    return call


def test_a_pushed_folder_is_one_commit_of_its_own_files_and_loads_by_name(
    run: Run, hub: HubServer, folder: Path, tmp_path: Path
) -> None:
    (folder / "notes.txt").write_text("not the model's")
    told = run(
        f"push({str(folder)!r}, 'ann/beauty', '--private')",
        f"push({str(folder)!r}, 'ann/beauty', '--revision', 'v2', '--message', 'the second')",
        "load('ann/beauty')",
        "load('ann/beauty', revision='v2')",
        "load('hf://ann/beauty@v2')",
    )
    repository = hub.repositories["ann/beauty"]
    _, first = repository.branches["main"]
    second = repository.branches["v2"][-1]
    assert repository.private and second.message == "the second"
    assert [line for line in told if not line.startswith("=")] == [
        f"{hub.url}/ann/beauty/commit/{first.oid}",
        'S3Rec.from_pretrained("ann/beauty")',
        f"{hub.url}/ann/beauty/commit/{second.oid}",
        'S3Rec.from_pretrained("ann/beauty", revision="v2")',
    ]
    assert [line for line in told if line.startswith("=")] == ["= 0", "= 0", "= 6", "= 6", "= 6"]
    assert first.files.keys() == set(MODEL_FILES)
    for name in set(MODEL_FILES) - {"README.md"}:
        assert first.files[name] == (folder / name).read_bytes()
    card = first.files["README.md"].decode()  # which names the repository
    assert 'S3Rec.from_pretrained("ann/beauty")' in card and "s3rec recommend hf://ann/beauty --histories" in card
    offline = run("load('ann/beauty')", "load('ann/other')", HF_HUB_OFFLINE="1")
    assert offline[0] == "= 6" and "ann/other: there is no such local folder; on the Hub: " in offline[1]
    assert "cannot be reached, and its files are not in the cache" in offline[1]


def test_the_hubs_refusals_are_told_in_one_line(run: Run, hub: HubServer, folder: Path) -> None:
    place = str(folder)
    told = run(
        f"push({place!r}, 'ann/beauty')",
        f"push({place!r}, 'ann/beauty', '--private')",
        "load('ann/nothing')",
        "load('ann/beauty', revision='v9')",
        "os.environ.update(HF_TOKEN='hf_wrong') or sys.stdout.flush()",
        f"push({place!r}, 'ann/beauty')",
        f"push({place!r}, 'ann/another')",
        "os.environ.update(HF_TOKEN='') or sys.stdout.flush()",
        f"push({place!r}, 'ann/beauty')",
    )
    text = "\n".join(told)
    assert text.count("= 2") == 4
    for words in (
        "s3rec: error: ann/beauty: is there already and public; make it private on the Hub, or choose another",
        f"ann/nothing: no such repository at {hub.url}; if it is private, run 'hf auth login', or set HF_TOKEN",
        "ann/beauty@v9: the repository has no such branch, tag or commit",
        f"s3rec: error: ann/beauty: {hub.url} answered with status 403; the token may not do this: it needs write",
        f"s3rec: error: ann/another: {hub.url} answered with status 401; the token is not valid: run 'hf auth login'",
        "s3rec: error: ann/beauty: no token to write with; run 'hf auth login', or set HF_TOKEN",
    ):
        assert words in text
    assert hub.token not in text and len(hub.repositories["ann/beauty"].branches["main"]) == 2


def test_a_hub_that_is_not_there_is_told_in_one_line(run: Run, folder: Path) -> None:
    gone = f"http://127.0.0.1:{free_port()}"
    pushed, status, loaded = run(f"push({str(folder)!r}, 'ann/beauty')", "load('ann/beauty')", HF_ENDPOINT=gone)
    assert f"s3rec: error: ann/beauty: {gone} cannot be reached" in pushed and status == "= 2"
    assert "there is no such local folder; on the Hub: ann/beauty: " in loaded and "cannot be reached" in loaded


def test_a_damaged_folder_is_not_pushed(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in MODEL_FILES:
        (copy / name).write_bytes((folder / name).read_bytes())
    damaged = bytearray((copy / "items.parquet").read_bytes())
    damaged[100] ^= 1
    (copy / "items.parquet").write_bytes(damaged)
    assert cli.main(["push", str(copy), "ann/beauty"]) == 2
    assert "items.parquet: its SHA-256 is not" in capsys.readouterr().err
    assert cli.main(["push", str(tmp_path), "ann/beauty"]) == 2  # no model folder at all


def test_what_is_no_repository_or_no_local_folder_is_refused(folder: Path) -> None:
    with pytest.raises(HubError, match="beauty: expected USER/REPO"):
        push(str(folder), "beauty")
    with pytest.raises(HubError, match="memory://m: expected a local model folder"):
        push("memory://m", "ann/beauty")
    with pytest.raises(HubError, match=r"revision=v1 is for a Hugging Face repository"):
        at_hand(str(folder), "v1")
    with pytest.raises(HubError, match=r"as in hf://user/repo@v1"):
        S3Rec.from_pretrained("hf://ann/beauty", revision="v1")


def test_a_local_folder_of_a_repositorys_form_goes_first(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ann").mkdir()
    (tmp_path / "ann" / "beauty").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert_same_weights(S3Rec.from_pretrained("ann/beauty"), small_model(six_items(tmp_path / "data")))


def test_the_cards_metadata_are_the_hubs(folder: Path) -> None:
    card = hub_package.ModelCard((folder / "README.md").read_text())
    assert (card.data.library_name, card.data.datasets) == ("s3rec_dist", ["toy"])
    assert {"s3-rec", "safetensors"} <= set(card.data.tags)
    results = {result.metric_name: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {"HR@10": 0.25, "MRR": 0.125}
    measured = results["HR@10"]
    assert (measured.metric_type, measured.task_type) == ("hr_at_10", "next-item-recommendation")
    assert (measured.dataset_name, measured.dataset_split) == ("toy", "validation")
    assert measured.dataset_args == {"protocol": "leave one out, ranked among the negatives of n.txt"}
