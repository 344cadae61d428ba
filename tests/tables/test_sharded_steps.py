"""Steps over a sharded item table: those that are skipped, clipped, accumulated, in other precisions and ZeRO stages;
and where its checkpoints go."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from runs import arguments, curve, died_run, events, make_config, make_dataset, run

from s3rec_dist.config import to_dict
from s3rec_dist.training import checkpoint

TRAINING = Path(__file__).parents[1] / "training"
STEPS = str(Path(__file__).with_name("steps.py"))
RUNS, PREEMPTED = (str(TRAINING / name) for name in ("runs.py", "preempted.py"))
SHARDED = {"model__item_table": "sharded", "pretrain__epochs": 1, "finetune__epochs": 2}

Launch = Callable[..., list[str]]

pytestmark = pytest.mark.slow


def result_of(output: str) -> Any:
    return json.loads(output.split("RESULT ")[1].splitlines()[0])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_dataset(folder)
    return folder / "dataset"


@pytest.fixture(scope="module")
def many_items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of which a small batch takes few items."""
    folder = tmp_path_factory.mktemp("many")
    make_dataset(folder, seed=1, users=40, items=400)
    return folder / "dataset"


@pytest.fixture(scope="module", params=[pytest.param(1, marks=pytest.mark.extended), 2])
def steps(request: pytest.FixtureRequest, launch: Launch) -> dict[str, Any]:
    """What steps.py finds on so many processes."""
    return {"ranks": request.param, **result_of(launch(request.param, [STEPS])[0])}


def test_a_step_that_breaks_on_one_rank_changes_neither_weights_nor_rows_nor_an_optimizers_state(
    steps: dict[str, Any],
) -> None:
    assert len(steps["skips"]) == 9
    for settings, differing in steps["skips"].items():
        assert differing == [[]] * steps["ranks"], settings


def test_the_tables_gradient_is_clipped_by_its_own_norm(steps: dict[str, Any]) -> None:
    norms = steps["clips"]
    own, everything = norms["none"]["rows"], norms["none"]["all"]
    assert everything > 4 * own  # so that the others' gradient is beyond both limits
    assert norms["twice"] == pytest.approx(norms["none"], rel=1e-4)
    assert norms["half"] == pytest.approx({"rows": own / 2, "all": everything}, rel=1e-4)


FINETUNE = {"stage": "finetune", "finetune__epochs": 1}
BOUNDED = {"model__item_capacity": 150, "model__item_dtype": "bf16", "pretrain__batch_size": 8}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"pretrain__gradient_accumulation": 2},
    **{f"ZeRO {zero}": {"engine__zero_stage": zero} for zero in (1, 2, 3)},
    **{f"bf16, ZeRO {zero}": {"engine__zero_stage": zero, "engine__precision": "bf16"} for zero in (0, 2)},
    "bf16 rows": {"model__item_dtype": "bf16"},
    "finetune plain": FINETUNE,
    "finetune accumulated": {**FINETUNE, "finetune__gradient_accumulation": 2},
    "finetune bf16, ZeRO 2": {**FINETUNE, "engine__zero_stage": 2, "engine__precision": "bf16"},
    "bounded": BOUNDED,
    "again": {**BOUNDED, "pretrain__checkpoint_every_steps": 5},
    "unbounded": {**BOUNDED, "model__item_capacity": 0},
}
"""Changes to a run, by name."""


@pytest.fixture(scope="module")
def ways(launch: Launch, dataset: Path, many_items: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of runs on two processes, by what they are; "again" is "bounded" once it has died and gone on."""
    folder = tmp_path_factory.mktemp("ways")
    jobs, found = {}, {}
    for name, changes in [*WAYS.items(), ("died", WAYS["again"])]:
        own = {**SHARDED, "stage": "pretrain", **changes}
        stage, data = own.pop("stage"), many_items if "model__item_capacity" in own else dataset
        place = folder / ("again" if name == "died" else name)
        jobs[name] = {"stage": stage, "config": to_dict(make_config(data, place, **own))}
        found[name] = place / stage
    jobs = {"died": jobs.pop("died") | {"dies_before": 23}, **jobs}
    (folder / "jobs.json").write_text(json.dumps(jobs))
    raised = result_of(launch(2, [RUNS, str(folder / "jobs.json")], timeout=280)[0])
    assert all("Died" in error for error in raised.pop("died"))
    assert raised == {name: ["", ""] for name in raised}
    return found


def tables_of(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a run's newest table shards, by file and name."""
    found = checkpoint.newest(folder / "checkpoints")
    assert found is not None
    paths = sorted((found.folder / "tables").iterdir())
    return {f"{path.name} {name}": values for path in paths for name, values in load_file(path).items()}


def assert_same_tables(found: Path, expected: Path) -> None:
    ours, theirs = tables_of(found), tables_of(expected)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("way", ["accumulated", "ZeRO 1", "ZeRO 2", "ZeRO 3", "finetune accumulated"])
def test_accumulation_and_zero_stages_change_no_more_than_rounding(way: str, ways: dict[str, Path]) -> None:
    plain = ways["finetune plain" if way.startswith("finetune") else "plain"]
    assert curve(ways[way]) == pytest.approx(curve(plain), rel=1e-5)
    rows, expected = (checkpoint.load_weights(str(path))[0]["item_embedding.weight"] for path in (ways[way], plain))
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["bf16, ZeRO 0", "bf16, ZeRO 2", "bf16 rows", "finetune bf16, ZeRO 2"])
def test_bf16_weights_and_rows_follow_the_curve_of_fp32(way: str, ways: dict[str, Path]) -> None:
    expected = curve(ways["finetune plain" if way.startswith("finetune") else "plain"])
    assert curve(ways[way]) == pytest.approx(expected, rel=0.03)
    rows = [values.dtype for name, values in tables_of(ways[way]).items() if name.endswith(" rows")]
    assert set(rows) == {torch.bfloat16 if way == "bf16 rows" else torch.float32}


def test_fewer_rows_than_items_train_and_resume_to_the_bit(ways: dict[str, Path]) -> None:
    assert events(ways["again"], "resume")[0]["step"] == 20
    assert {step: loss for step, loss in curve(ways["again"]).items() if step > 20} == {
        step: loss for step, loss in curve(ways["bounded"]).items() if step > 20
    }
    assert_same_tables(ways["again"], ways["bounded"])
    held = [len(values) for name, values in tables_of(ways["bounded"]).items() if name.endswith(" ids")]
    assert held == [75, 75]
    bounded, unbounded = (list(curve(ways[name]).values()) for name in ("bounded", "unbounded"))
    assert bounded[:3] == unbounded[:3] and bounded != unbounded
    assert sum(bounded[-5:]) < sum(bounded[:5])


ATTRIBUTES = {"model__attribute_table": "sharded", "pretrain__attribute_negatives": 6}


@pytest.mark.parametrize(
    ("stage", "tables"),
    [
        ("pretrain", {}),
        pytest.param("pretrain", ATTRIBUTES, marks=pytest.mark.extended),
        pytest.param("finetune", {}, marks=pytest.mark.extended),
    ],
)
def test_a_compiled_run_has_the_curve_of_one_that_is_not(
    stage: str, tables: dict[str, Any], dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    changes = {**SHARDED, "finetune__epochs": 1, "model__layers": 1, "pretrain__batch_size": 104, **tables}
    plain, compiled = (
        run(stage, make_config(dataset, tmp_path / str(on), engine__compile=on, **changes)) for on in (False, True)
    )
    torch.compiler.reset()
    assert curve(compiled) == pytest.approx(curve(plain), rel=1e-6)


def test_a_run_on_other_storage_keeps_its_rows_there_and_goes_on_from_them(dataset: Path, tmp_path: Path) -> None:
    changes = {**SHARDED, "finetune__checkpoint_every_steps": 4}
    local = run("finetune", make_config(dataset, tmp_path / "local", **changes))
    url, memory = "memory://bucket-of-tables", fsspec.filesystem("memory")
    try:
        for machine, dies_before in (("one", 15), ("another", None)):
            config = make_config(dataset, url, storage__scratch_dir=str(tmp_path / machine), **changes)
            if dies_before:
                died_run("finetune", config, dies_before)
            else:
                run("finetune", config)
        memory.get(f"{url}/finetune", str(tmp_path / "copy"), recursive=True)
    finally:
        memory.rm(url, recursive=True)
    assert events(tmp_path / "copy", "resume")[0]["step"] == 12
    assert curve(tmp_path / "copy") == curve(local)
    assert_same_tables(tmp_path / "copy", local)


def test_a_signal_to_one_rank_in_a_validation_leaves_a_checkpoint_and_the_run_goes_on_to_the_bit(
    launch: Launch, dataset: Path, tmp_path: Path
) -> None:
    changes = {**SHARDED, "evaluation__batch_users": 16}
    command = [PREEMPTED, "1", "validation", "SIGTERM", "finetune", *arguments(dataset, tmp_path, **changes)]
    assert all("Traceback" not in printed for printed in launch(2, command, expect=75))
    folder = tmp_path / "finetune"
    found = checkpoint.newest(folder / "checkpoints")
    assert found is not None and found.state["step"] == 10 and found.state["owes_epoch_end"]
    assert len(list((found.folder / "tables").iterdir())) == 2 and not curve(folder, "validation/MRR")
    places = {"resumed": tmp_path, "whole": tmp_path / "whole"}
    jobs = {n: {"stage": "finetune", "config": to_dict(make_config(dataset, p, **changes))} for n, p in places.items()}
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    assert result_of(launch(2, [RUNS, str(tmp_path / "jobs.json")])[0]) == {name: ["", ""] for name in places}
    for name in ("train/loss", "validation/MRR"):
        assert curve(folder, name) == curve(tmp_path / "whole" / "finetune", name)
    assert_same_tables(folder, tmp_path / "whole" / "finetune")


def test_attributes_alone_cut_over_ranks_leave_validation_to_each_ranks_own_users(
    launch: Launch, dataset: Path, tmp_path: Path
) -> None:
    changes = {**ATTRIBUTES, "finetune__epochs": 1, "engine__hang_seconds": 10}
    wanted = {"a": {"stage": "finetune", "config": to_dict(make_config(dataset, tmp_path, **changes))}}
    (tmp_path / "jobs.json").write_text(json.dumps(wanted))
    assert result_of(launch(2, [RUNS, str(tmp_path / "jobs.json")])[0]) == {"a": ["", ""]}
    alone = run("finetune", make_config(dataset, tmp_path / "alone", **changes))
    found = curve(tmp_path / "finetune", "validation/MRR")
    assert found == pytest.approx(curve(alone, "validation/MRR"), rel=1e-5)
