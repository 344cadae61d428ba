"""``s3rec bench cold``: a shop whose users walk through its categories, so that attributes tell what comes next."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from s3rec_dist.__main__ import main
from s3rec_dist.bench.cold import write_logs
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.data.prepare import PrepareSettings, prepare

USERS, ITEMS, CATEGORIES = 160, 64, 8
SETTINGS = ["model.hidden_size=16", "model.inner_size=32", "model.max_length=10", "model.hidden_dropout=0.1"]
SETTINGS += ["model.attention_dropout=0.1"]
SETTINGS += ["finetune.loss=ce", "finetune.batch_size=32", "finetune.learning_rate=0.01", "finetune.epochs=20"]
SETTINGS += ["finetune.validate_every_epochs=10", "engine.device=cpu", "engine.threads=1", "evaluation.negatives=19"]


def make_shop(folder: Path, attributes: str = "") -> str:
    draw = random.Random(0)
    with open(folder / "shop.txt", "w") as file:
        for user in range(USERS):
            first, count = draw.randrange(CATEGORIES), draw.randint(8, 12)
            categories = [(first + place) % CATEGORIES for place in range(count)]
            items = [1 + category + CATEGORIES * draw.randrange(ITEMS // CATEGORIES) for category in categories]
            file.write(f"u{user} {' '.join(map(str, items))}\n")
    own = {str(item): [1 + (item - 1) % CATEGORIES] for item in range(1, ITEMS + 1)}
    (folder / "shop_item2attributes.json").write_text(json.dumps(own))
    settings = {"input": str(folder / "shop.txt"), "output": str(folder / "shop"), "attributes": attributes}
    prepare(PrepareSettings(source="s3rec", rows_per_group=50, **settings))
    return str(folder / "shop")


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_attributes_rank_items_that_were_held_out(
    tmp_path: Path, temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "cold", "--dataset", make_shop(tmp_path), *SETTINGS]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["users_of_warm_items"] + result["users_of_cold_items"] == USERS
    assert 0 < result["items_appended"] < result["users_of_cold_items"] and result["items"] <= ITEMS
    for candidates, count in (("all_items", result["items"]), ("19_sampled", 20)):
        chance = result[f"HR@10_by_chance,_{candidates}"]
        assert chance == pytest.approx(10 / count, abs=1e-6)
        cold, warm = (f"HR@10_of_{kind}_items,_{candidates},_item_features" for kind in ("cold", "warm"))
        assert result[f"{cold}=add"] > 1.5 * chance and result[f"{cold}=add"] > 1.3 * result[f"{cold}=none"]
        assert min(result[f"{warm}=add"], result[f"{warm}=none"]) > 1.5 * chance
    assert not list(temporary.iterdir())


def test_held_out_items_come_with_the_new_events_alone(tmp_path: Path) -> None:
    dataset = Dataset.open(make_shop(tmp_path))
    old, new = tmp_path / "old", tmp_path / "new"
    write_logs(dataset, str(old), str(new))
    before, after = (pq.read_table(folder / "events.parquet").to_pydict() for folder in (old, new))
    known, held = set(before["item_id"]), set(after["item_id"])
    assert held and not known & held
    assert len(set(after["user_id"])) == len(after["user_id"]) < USERS
    assert min(after["timestamp"]) > max(before["timestamp"])
    for folder, items in ((old, known), (new, held)):
        table = pq.read_table(folder / "items.parquet").to_pydict()
        assert set(table["item_id"]) == items
        for item, own in zip(table["item_id"], table["attributes"], strict=True):
            assert own == [str(1 + (int(item) - 1) % CATEGORIES)]


@pytest.mark.parametrize(
    ("attributes", "change", "words"),
    [("none", "finetune.epochs=1", "have no attributes"), ("", "finetune.pretrained=nowhere", "nowhere")],
)
def test_an_error_leaves_no_folder(
    attributes: str, change: str, words: str, tmp_path: Path, temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "cold", "--dataset", make_shop(tmp_path, attributes), *SETTINGS, change]) == 2
    assert words in capsys.readouterr().err
    assert not list(temporary.iterdir())
