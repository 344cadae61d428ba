"""``s3rec report``: runs as a page that needs no network and no wide screen, whatever they are called."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from browser import open_page

from s3rec_dist.__main__ import main
from s3rec_dist.config import Config, load_config, to_yaml
from s3rec_dist.reports.page import line_style, report_page
from s3rec_dist.reports.runs import ReportError, differences, read_runs
from s3rec_dist.storage import Storage

pytest.importorskip("plotly")
HOSTILE = "</script><script>document.title='owned'</script>"


def write_run(folder: Path, *settings: str, status: str | None = "finished", losses: int = 4) -> Config:
    """Both stages of a run that logged some steps, was resumed once and skipped a step."""
    config = load_config(None, [f"output={folder}", "data.path=nowhere", *settings])
    for stage in ("pretrain", "finetune"):
        place = folder / stage
        place.mkdir(parents=True)
        (place / "config.yaml").write_text(to_yaml(config))
        entries: list[dict[str, Any]] = [{"time": 1.0, "event": "start", "steps": 40, "processes": 2, "device": "cpu"}]
        for step in range(10, 10 * losses + 1, 10):
            tasks = {f"train/{name}": 9.0 - step / 10 for name in ("loss", "aap", "mip", "map", "sp")}
            speed = {"train/samples_per_second": 100.0 + step, "time/forward_ms": 7.0, "time/backward_ms": 9.0}
            entries.append({"time": 1.0, "step": step, **tasks, **speed})
            if stage == "finetune":
                metrics = {"validation/MRR": step / 1000, "validation/HR@10": step / 500}
                entries.append({"time": 1.0, "step": step, **metrics})
        entries.append({"time": 2.0, "event": "skipped_step", "step": 20, "term": "aap"})
        if status:
            entries.append({"time": 2.0, "event": "end", "status": status})
        (place / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return config


def test_a_run_is_read_with_all_that_its_stages_logged(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    runs = read_runs([str(tmp_path / "a")], Storage())
    assert [(run.label, run.stage, run.status) for run in runs] == [
        ("a", "pretrain", "finished"), ("a", "finetune", "finished"),
    ]  # fmt: skip
    assert runs[0].curve("train/aap") == ([10, 20, 30, 40], [8.0, 7.0, 6.0, 5.0])
    assert runs[1].best() == {"MRR": 0.04, "HR@10": 0.08}
    assert [event["term"] for event in runs[0].faults] == ["aap"]


def test_a_run_that_goes_on_is_read_up_to_its_last_whole_line(tmp_path: Path) -> None:
    write_run(tmp_path / "a", status=None)
    with open(tmp_path / "a/pretrain/metrics.jsonl", "a") as file:
        file.write('{"time": 3.0, "step": 50, "train/lo')
    run = read_runs([str(tmp_path / "a/pretrain")], Storage())[0]
    assert run.status == "running or killed" and max(run.curve("train/loss")[0]) == 40


def test_runs_of_one_name_are_told_apart_and_their_settings_compared(tmp_path: Path) -> None:
    write_run(tmp_path / "x/run")
    write_run(tmp_path / "y/run", "seed=7", "finetune.learning_rate=0.01")
    runs = [run for run in read_runs([str(tmp_path / "x/run"), str(tmp_path / "y/run")], Storage())]
    assert {run.label for run in runs} == {"x/run", "y/run"}
    tuned = [run for run in runs if run.stage == "finetune"]
    found = differences(tuned)
    assert found["seed"] == [42, 7] and found["finetune.learning_rate"] == [0.001, 0.01]
    assert set(found) == {"seed", "finetune.learning_rate", "output"}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("missing", r"nothing: holds no metrics.jsonl; expected a folder that pretrain or finetune writes"),
        ("settings", r"config.yaml: no such file; expected the settings beside metrics.jsonl"),
        ("metrics", r"metrics.jsonl: not what a run logs"),
        ("entries", r"metrics.jsonl: not what a run logs"),
    ],
)
def test_what_is_no_run_is_named(tmp_path: Path, spoil: str, message: str) -> None:
    write_run(tmp_path / "a")
    path = tmp_path / "a"
    if spoil == "missing":
        path = tmp_path / "nothing"
    elif spoil == "settings":
        (path / "pretrain/config.yaml").unlink()
    else:
        (path / "pretrain/metrics.jsonl").write_text("hello\n" if spoil == "metrics" else '["a list"]\n')
    with pytest.raises(ReportError, match=message):
        read_runs([str(path)], Storage())


def test_results_of_another_kind_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a")
    (tmp_path / "r.json").write_text("{}")
    assert main(["report", str(tmp_path / "a"), "--results", str(tmp_path / "r.json")]) == 2
    assert "r.json: not what 's3rec evaluate --json' writes" in capsys.readouterr().err
    assert not (tmp_path / "a/report.html").exists()


def test_no_winner_is_named_among_what_was_measured_in_different_ways(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", "finetune.metric=HR@10", "evaluation.protocol=sampled", losses=3)
    write_run(tmp_path / "c", losses=3)
    a, b, c = (str(tmp_path / name) for name in "abc")
    alike = report_page(read_runs([c, a], Storage()))
    assert "<tr class=best><td>a</td>" in alike and "Each run at its best MRR" in alike
    mixed = report_page(read_runs([a, b], Storage()))
    assert "<tr class=best>" not in mixed
    assert "a at its best MRR: the item before each user&#x27;s last one, ranked among all items not yet seen" in mixed
    assert "b at its best HR@10" in mixed and "ranked among 99 sampled items" in mixed
    results = [{"label": str(i), "metrics": {"MRR": i / 9}, "protocol": f"protocol {i}", "users": 9} for i in range(2)]
    assert "<tr class=best>" not in report_page(read_runs([a], Storage()), results)


def test_every_stage_of_a_run_has_one_line_style_and_other_runs_have_others(tmp_path: Path) -> None:
    write_run(tmp_path / "tuned")
    shutil.rmtree(tmp_path / "tuned/pretrain")
    for i in range(9):
        write_run(tmp_path / f"{i}")
    runs = read_runs([str(tmp_path / name) for name in ("tuned", *map(str, range(9)))], Storage())
    places = {run.label: run.place for run in runs}
    assert all(run.place == places[run.label] for run in runs) and len(set(places.values())) == 10
    assert len({tuple(line_style(place).items()) for place in places.values()}) == 10


def test_a_page_has_every_part_and_no_markup_of_a_run_s_own(tmp_path: Path) -> None:
    write_run(tmp_path / "a", f"tracking.name={HOSTILE}")
    page = report_page(read_runs([str(tmp_path / "a")], Storage()))
    for heading in ("Runs", "Validation", "Losses: pretrain", "Speed: finetune", "What went wrong"):
        assert f"<h2>{heading}" in page
    assert HOSTILE not in page


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(tmp_path: Path, width: int) -> None:
    hostile = tmp_path / "<img src=x onerror=document.title='owned'>"
    write_run(hostile)
    write_run(tmp_path / "b", "seed=7", f"tracking.name={HOSTILE}")
    result = {"label": HOSTILE, "metrics": {"MRR": 0.1234}, "protocol": "test item", "users": 1234}
    (tmp_path / "r.json").write_text(json.dumps({"results": [result]}))
    command = ["report", str(hostile), str(tmp_path / "b"), "--results", str(tmp_path / "r.json")]
    assert main([*command, "--output", str(tmp_path / "report.html")]) == 0
    with open_page(f"file://{tmp_path}/report.html", width) as (page, wrong):
        page.wait_for_function("document.querySelectorAll('.js-plotly-plot .main-svg').length > 20")
        text = page.inner_text("body")
        for part in ("0.1234", "1,234 users", "masked attributes (MAP)", "skipped step", "term aap", "seed"):
            assert part in text
        first = page.evaluate("document.querySelector('.js-plotly-plot').data.map(trace => [...trace.y])")
        assert first == [[0.01, 0.02, 0.03, 0.04]] * 2
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        # plots are drawn again where they take their places beside each other
        page.wait_for_function(
            "[...document.querySelectorAll('.plots > div')].every(d => d.scrollWidth <= d.clientWidth)"
        )
        assert page.title() != "owned" and not wrong
