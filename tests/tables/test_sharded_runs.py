"""Runs of the real program over a sharded item table: the same at any world size, to the bit after a resume."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from runs import curve, died_run, events, make_config, make_dataset, run

from s3rec_dist.__main__ import main
from s3rec_dist.config import Config, EvaluationConfig, to_dict
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.evaluation import EvaluationError, evaluate, item_vectors_in_parts
from s3rec_dist.export import export, load_model, streamed_model
from s3rec_dist.training import checkpoint
from s3rec_dist.training.engine import World
from s3rec_dist.training.loop import Task
from s3rec_dist.training.nonfinite import Diverged, check_finite

RUNS = str(Path(__file__).parents[1] / "training" / "runs.py")
ROWS = "item_embedding.weight"
SHARDED = {"model__item_table": "sharded", "finetune__epochs": 2, "pretrain__epochs": 2}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_dataset(folder)
    return folder / "dataset"


Launch = Callable[..., list[str]]


def jobs(launch: Launch, ranks: int, folder: Path, wanted: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Runs them one after the other; what each rank raised in each."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(wanted))
    output = launch(ranks, [RUNS, str(folder / "jobs.json")])[0]
    found: dict[str, list[str]] = json.loads(output.split("RESULT ")[1].splitlines()[0])
    return found


def job(dataset: Path, output: Path, stage: str, dies_before: int | None = None, **changes: Any) -> dict[str, Any]:
    config = to_dict(make_config(dataset, output, **{**SHARDED, **changes}))
    return {"stage": stage, "config": config, "dies_before": dies_before}


def both_stages(dataset: Path, output: Path, **changes: Any) -> dict[str, dict[str, Any]]:
    changes = {"finetune__pretrained": "auto", **changes}
    return {stage: job(dataset, output, stage, **changes) for stage in ("pretrain", "finetune")}


@pytest.fixture(scope="module")
def alone(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages on one process."""
    output = tmp_path_factory.mktemp("alone")
    config = make_config(dataset, output, finetune__pretrained="auto", **SHARDED)
    run("pretrain", config)
    run("finetune", config)
    return output


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.extended)])
def test_curves_metrics_and_rows_are_those_of_one_process(
    ranks: int, launch: Launch, dataset: Path, alone: Path, tmp_path: Path
) -> None:
    found = jobs(launch, ranks, tmp_path, both_stages(dataset, tmp_path))
    assert all(not any(raised) for raised in found.values()), found
    for stage, name in [("pretrain", "train/loss"), ("finetune", "train/loss"), ("finetune", "validation/MRR")]:
        expected, own = (curve(folder / stage, name) for folder in (alone, tmp_path))
        assert own == pytest.approx(expected, rel=1e-5) and len(own) >= 2
    expected, own_rows = (checkpoint.load_weights(str(folder / "finetune"))[0][ROWS] for folder in (alone, tmp_path))
    torch.testing.assert_close(own_rows, expected, rtol=1e-4, atol=1e-5)


def test_a_resumed_run_repeats_to_the_bit_and_goes_on_with_another_world_size(
    launch: Launch, dataset: Path, alone: Path, tmp_path: Path
) -> None:
    changes = {"pretrain__checkpoint_every_steps": 5, "pretrain__checkpoint_async": False}
    config = make_config(dataset, tmp_path / "alone", **SHARDED, **changes)
    folder = died_run("pretrain", config, 23)
    run("pretrain", config)
    assert [event["step"] for event in events(folder, "resume")] == [20]
    own = {step: loss for step, loss in curve(folder).items() if step > 20}
    assert own == {step: loss for step, loss in curve(alone / "pretrain").items() if step > 20}
    for part in ("ids", "rows", "exp_avg", "exp_avg_sq"):
        assert torch.equal(rows_of(folder)[part], rows_of(alone / "pretrain")[part])

    moved = tmp_path / "moved"
    jobs(launch, 2, moved / "first", {"a": job(dataset, moved, "pretrain", dies_before=23, **changes)})
    run("pretrain", make_config(dataset, moved, **SHARDED, **changes))
    assert curve(moved / "pretrain") == pytest.approx(curve(alone / "pretrain"), rel=1e-5)
    jobs(launch, 2, moved / "again", {"a": job(dataset, moved, "pretrain", pretrain__epochs=3, **changes)})
    assert [event["step"] for event in events(moved / "pretrain", "resume")] == [20, 34]


def rows_of(folder: Path) -> dict[str, torch.Tensor]:
    """The rows in a run's newest checkpoint, of one process."""
    found = checkpoint.newest(folder / "checkpoints")
    assert found is not None
    return load_file(found.folder / "tables" / "items-00000-of-00001.safetensors")


def test_what_reads_checkpoints_gets_a_model_with_all_items(dataset: Path, alone: Path, tmp_path: Path) -> None:
    opened = Dataset.open(str(dataset))
    model = load_model(str(alone / "finetune"), opened).eval()
    found = evaluate(model, opened, EvaluationConfig(cutoffs=(5, 10)), "validation", "cpu").metrics
    best = events(alone / "finetune", "best")[0]
    assert found[best["metric"]] == pytest.approx(best["value"], abs=1e-6)

    export(str(alone / "finetune"), opened, str(tmp_path / "model"))
    exported = load_model(str(tmp_path / "model"), opened)
    assert all(torch.equal(a, b) for a, b in zip(exported.parameters(), model.parameters(), strict=True))

    export(str(alone / "finetune"), opened, str(tmp_path / "cut"), max_shard_bytes=1000)
    assert len(list((tmp_path / "cut").glob("model-*.safetensors"))) > 3
    cut = load_model(str(tmp_path / "cut"), opened)
    assert all(torch.equal(a, b) for a, b in zip(cut.parameters(), model.parameters(), strict=True))
    with streamed_model(str(alone / "finetune"), opened) as streamed:
        vectors = torch.cat(list(item_vectors_in_parts(streamed, opened.n_items, "the dataset")))
        assert torch.equal(vectors, model.item_embedding.weight[1:-1])
        items, offsets = torch.arange(1, 4, dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
        with torch.no_grad():
            torch.testing.assert_close(
                streamed.eval().encode_last(items, offsets, 3), model.encode_last(items, offsets, 3)
            )

    dense = make_config(dataset, tmp_path, finetune__epochs=1, finetune__pretrained=str(alone / "finetune"))
    run("finetune", dense)
    back = make_config(dataset, tmp_path / "b", finetune__epochs=1, finetune__pretrained=str(tmp_path / "model"))
    run("finetune", replace(back, model=replace(back.model, item_table="sharded")))
    a, b = (curve(folder / "finetune")[1] for folder in (tmp_path, tmp_path / "b"))
    assert b == pytest.approx(a, rel=1e-6)  # the first step, before any optimizer


@pytest.mark.parametrize(("protocol", "ranks"), [("full", 3), pytest.param("sampled", 2, marks=pytest.mark.extended)])
def test_processes_that_each_hold_a_part_rank_as_one_that_holds_all(
    protocol: str, ranks: int, launch: Launch, dataset: Path, alone: Path, tmp_path: Path
) -> None:
    opened, model = Dataset.open(str(dataset)), str(alone / "finetune")
    arguments = ["--dataset", str(dataset), "--protocol", protocol, "--negatives", "20", "--cutoffs", "1", "5"]
    found = tmp_path / "found.json"
    chosen = ["--model", model, *arguments, "--item-chunk", "7", "--json", str(found)]
    launch(ranks, ["-m", "s3rec_dist", "evaluate", *chosen])
    config = EvaluationConfig(protocol=protocol, negatives=20, cutoffs=(1, 5))  # type: ignore[arg-type]
    expected = evaluate(load_model(model, opened).eval(), opened, config, "test", "cpu")
    result = json.loads(found.read_text())["results"][0]
    assert result["metrics"] == pytest.approx(expected.metrics, abs=1e-12) and result["users"] == expected.users


def test_processes_that_each_hold_a_part_recommend_as_one_that_holds_all(
    launch: Launch, dataset: Path, alone: Path, tmp_path: Path
) -> None:
    def command(name: str) -> list[str]:
        chosen = ["--dataset", str(dataset), "--output", str(tmp_path / name), "--k", "50", "--item-chunk", "7"]
        return ["recommend", str(alone / "finetune"), *chosen]

    lines = launch(3, ["-m", "s3rec_dist", *command("parts.parquet")])
    assert "recommendations for 73 users" in lines[0] and not lines[1].strip()
    assert main(command("whole.parquet")) == 0
    whole, parts = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("whole", "parts"))
    assert parts.drop(["score"]).equals(whole.drop(["score"])) and parts.num_rows > 73 * 40
    scores = [table.column("score").to_numpy() for table in (whole, parts)]
    assert scores[1] == pytest.approx(scores[0], rel=1e-6)


def test_a_run_does_not_go_on_as_another_kind_of_table(dataset: Path, tmp_path: Path) -> None:
    died_run("pretrain", make_config(dataset, tmp_path, **SHARDED), 20)
    with pytest.raises(checkpoint.CheckpointError, match=r"model.item_table was 'sharded', is 'dense'"):
        run("pretrain", make_config(dataset, tmp_path, pretrain__epochs=2))


MILLIONS = {"model__attribute_table": "sharded", "pretrain__attribute_negatives": 6}
FEATURES = {**MILLIONS, "model__item_features": "add"}


@pytest.mark.parametrize(
    "changes",
    [pytest.param(MILLIONS, marks=pytest.mark.extended, id="attributes"), pytest.param(FEATURES, id="features")],
)
def test_attributes_may_be_cut_over_the_ranks_too(
    changes: dict[str, Any], launch: Launch, dataset: Path, tmp_path: Path
) -> None:
    both = {**changes, "pretrain__epochs": 1, "finetune__epochs": 1}
    one, two = (tmp_path / name for name in ("one", "two"))
    found = jobs(launch, 2, two, both_stages(dataset, two, **both))
    assert all(not any(raised) for raised in found.values()), found
    for stage in ("pretrain", "finetune"):
        run(stage, make_config(dataset, one, finetune__pretrained="auto", **{**SHARDED, **both}))
    for stage, name in [("pretrain", "train/loss"), ("finetune", "train/loss"), ("finetune", "validation/MRR")]:
        assert curve(two / stage, name) == pytest.approx(curve(one / stage, name), rel=1e-5)
    opened = Dataset.open(str(dataset))
    model = load_model(str(two / "finetune"), opened).eval()
    metrics = evaluate(model, opened, EvaluationConfig(cutoffs=(5, 10)), "validation", "cpu").metrics
    assert metrics["MRR"] == pytest.approx(curve(one / "finetune", "validation/MRR")[10], rel=1e-5)


def test_attributes_have_the_same_losses_in_one_table_and_in_parts(dataset: Path, tmp_path: Path) -> None:
    dense = {"pretrain__epochs": 1, "pretrain__attribute_negatives": 6}
    first = run("pretrain", make_config(dataset, tmp_path / "first", **dense))
    start = {"finetune__pretrained": str(first), "finetune__epochs": 1, "model__item_features": "none"}
    one = run("finetune", make_config(dataset, tmp_path / "one", **start))
    both = {**start, **MILLIONS, "model__item_table": "sharded"}
    parts = run("finetune", make_config(dataset, tmp_path / "parts", **both))
    assert curve(parts)[1] == pytest.approx(curve(one)[1], rel=1e-6)
    expected, found = (checkpoint.load_weights(str(folder))[0]["attribute_embedding.weight"] for folder in (one, parts))
    assert torch.equal(found, expected)  # which fine-tuning does not change


@pytest.fixture(scope="module")
def pretrained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense run, whose model others start from."""
    output = tmp_path_factory.mktemp("pretrained")
    return run("pretrain", make_config(dataset, output, pretrain__epochs=1))


def test_processes_that_would_all_hold_all_items_do_not_recommend(
    launch: Launch, dataset: Path, pretrained: Path, tmp_path: Path
) -> None:
    command = ["-m", "s3rec_dist", "recommend", str(pretrained), "--dataset", str(dataset), "--output", "out.parquet"]
    lines = launch(2, command, expect=2)
    assert "was not trained over a sharded item table, so recommend runs as one process" in lines[0]


FIFTY = {"finetune__epochs": 5, "finetune__item_learning_rate": 0.05}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_fifty_steps_are_those_of_a_dense_table(
    ranks: int, launch: Launch, dataset: Path, pretrained: Path, tmp_path: Path
) -> None:
    starts = {
        optimizer: {"finetune__pretrained": str(pretrained), "finetune__item_optimizer": optimizer, **FIFTY}
        for optimizer in ("sgd", "adagrad")
    }
    wanted = {name: job(dataset, tmp_path / name, "finetune", **start) for name, start in starts.items()}
    assert jobs(launch, ranks, tmp_path, wanted) == {name: [""] * ranks for name in starts}
    for optimizer, start in starts.items():
        folder = tmp_path / optimizer / "finetune"
        losses, rows = dense_oracle(make_config(dataset, tmp_path, **start), str(pretrained), optimizer)
        found = curve(folder)
        assert len(losses) == 50 and [found[i + 1] for i in range(50)] == pytest.approx(losses, rel=1e-5)
        newest = checkpoint.newest(folder / "checkpoints")
        assert newest is not None
        own = checkpoint.load_weights(str(newest.folder))[0][ROWS]
        assert (own - rows)[1:].norm() < 1e-5 * rows.norm()


def dense_oracle(config: Config, pretrained: str, optimizer: str) -> tuple[list[float], torch.Tensor]:
    """The losses and item rows of plain PyTorch: one table in one process, one optimizer for it, Adam for the rest."""
    opened = Dataset.open(config.data.path)
    task = Task(config, "finetune", opened, torch.device("cpu"))
    dense_config = replace(config, model=replace(config.model, item_table="dense"))
    dense = Task(dense_config, "finetune", opened, task.device).model()
    dense.load_state_dict(checkpoint.load_weights(pretrained)[0])
    rows = dense.item_embedding.weight
    others = [parameter for parameter in dense.parameters() if parameter is not rows]
    kind = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}[optimizer]
    optimizers = [kind([rows], lr=config.finetune.item_learning_rate)]
    optimizers.append(torch.optim.Adam(others, lr=config.finetune.learning_rate))
    stream = task.stream(World(0, 0, 1, task.device))
    losses, step = [], 0
    for epoch in range(config.finetune.epochs):
        for packed in stream.iterate(epoch, 0):
            found = task.losses(dense, task.batch(packed, epoch), task.dropout_seed(step))
            loss = found.total / task.count(packed)
            for each in optimizers:
                each.zero_grad()
            loss.backward()
            for each in optimizers:
                each.step()
            losses.append(loss.item())
            step += 1
    stream.close()
    return losses, rows.detach()


def test_finetuning_begins_anew_with_the_rows_optimizer_and_age_and_names_the_setting_that_differs(
    tmp_path: Path,
) -> None:
    make_dataset(tmp_path, seed=1, users=40, items=400)
    dataset = tmp_path / "dataset"
    changes = {**SHARDED, "pretrain__epochs": 1, "finetune__epochs": 0, "model__item_capacity": 150}
    changes |= {"pretrain__item_optimizer": "adagrad", "pretrain__batch_size": 8}
    config = make_config(dataset, tmp_path, finetune__pretrained="auto", **changes)
    rows = rows_of(run("pretrain", config))
    for optimizer in ("rowwise_adagrad", "adagrad"):
        own = replace(config, finetune=replace(config.finetune, item_optimizer=optimizer))
        own = replace(own, model=replace(own.model, item_capacity=140))
        found = rows_of(run("finetune", own, resume=False))
        place = torch.tensor([rows["ids"].tolist().index(item) for item in found["ids"].tolist()])
        assert torch.equal(found["rows"], rows["rows"][place]) and len(place) == 140
        assert rows["sum"].any() and not found["sum"].any() and not found["used_at"].any()
    wider = make_config(dataset, tmp_path, finetune__pretrained="auto", model__hidden_size=32, **SHARDED)
    with pytest.raises(checkpoint.CheckpointError, match=r"shape .* follows from model.hidden_size"):
        run("finetune", wider, resume=False)


@pytest.mark.extended
def test_a_bounded_run_goes_on_with_another_world_size(launch: Launch, tmp_path: Path) -> None:
    make_dataset(tmp_path, seed=1, users=40, items=400)
    changes = {"model__item_capacity": 202, "pretrain__batch_size": 8, "pretrain__checkpoint_every_steps": 5}
    changes["pretrain__epochs"] = 1
    data = tmp_path / "dataset"
    jobs(launch, 4, tmp_path / "first", {"a": job(data, tmp_path, "pretrain", dies_before=23, **changes)})
    found = jobs(launch, 2, tmp_path / "again", {"a": job(data, tmp_path, "pretrain", **changes)})
    assert found == {"a": ["", ""]} and events(tmp_path / "pretrain", "resume")[0]["step"] == 20


def test_rows_that_are_not_finite_are_found_wherever_others_are(dataset: Path, alone: Path) -> None:
    opened = Dataset.open(str(dataset))
    task = Task(make_config(dataset, alone, **SHARDED), "finetune", opened, torch.device("cpu"))
    model = task.model().eval()
    task.tables["items"].put(torch.tensor([7]), {"rows": torch.full((1, 16), torch.inf)})
    with pytest.raises(EvaluationError, match=r"item 7: its embedding is not finite"):
        evaluate(model, opened, EvaluationConfig(), "validation", "cpu")
    with pytest.raises(Diverged, match="rows of items"):
        check_finite({"rows of items": task.tables["items"].tensors()["rows"]})


def test_rows_train_where_all_else_has_a_learning_rate_of_zero(dataset: Path, tmp_path: Path) -> None:
    changes = {**SHARDED, "finetune__epochs": 1, "finetune__learning_rate": 0.0, "finetune__item_learning_rate": 0.01}
    losses = curve(run("finetune", make_config(dataset, tmp_path, finetune__schedule="linear", **changes)))
    saved = checkpoint.load_weights(str(tmp_path / "finetune"))[0]
    task = Task(make_config(dataset, tmp_path, **changes), "finetune", Dataset.open(str(dataset)), torch.device("cpu"))
    first = task.model().state_dict()
    assert losses and all(torch.equal(saved[name], first[name]) for name in first)
    assert not torch.equal(saved[ROWS][1:61], torch.cat([rows for _, rows in task.tables["items"].whole()])[1:])
