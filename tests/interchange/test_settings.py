"""RecBole's settings become ours, and what has no counterpart is said."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from s3rec_dist import __main__ as cli
from s3rec_dist.config import Config, load_config
from s3rec_dist.interchange.settings import SettingsError, convert


def config_of(**settings: Any) -> Config:
    return convert(settings).config("test")


def about(key: str, **settings: Any) -> list[str]:
    return [note for note in convert(settings).notes if note.startswith(f"{key}:")]


def test_what_is_left_out_has_recboles_defaults() -> None:
    config = config_of()
    assert config.model.position_alignment == "start"
    assert dataclasses.replace(config.model, position_alignment="end") == Config().model
    assert (config.seed, config.pretrain.epochs, config.finetune.epochs) == (2020, 500, 300)
    assert config.pretrain.batch_size == config.finetune.batch_size == 2048
    assert (config.finetune.loss, config.finetune.positions, config.finetune.samples) == ("ce", "last", "all_prefixes")
    assert (config.evaluation.protocol, config.evaluation.cutoffs, config.engine.precision) == ("full", (10,), "fp32")


def test_settings_with_a_counterpart_come_over() -> None:
    given = {"n_layers": 3, "n_heads": 4, "hidden_size": 32, "inner_size": 48, "MAX_ITEM_LIST_LENGTH": 20}
    given |= {"hidden_dropout_prob": 0.3, "attn_dropout_prob": 0.1, "layer_norm_eps": "1e-8", "mask_ratio": 0.4}
    given |= {"aap_weight": 0.1, "mip_weight": 0.2, "map_weight": 0.3, "sp_weight": 0.4, "weight_decay": "1e-5"}
    given |= {"loss_type": "BPR", "clip_grad_norm": {"max_norm": 5}, "use_gpu": False, "enable_amp": True}
    config = config_of(**given)
    model = config.model
    assert (model.layers, model.heads, model.hidden_size, model.inner_size, model.max_length) == (3, 4, 32, 48, 20)
    assert (model.hidden_dropout, model.attention_dropout, model.layer_norm_eps) == (0.3, 0.1, 1e-8)
    tasks = config.pretrain
    assert (tasks.aap_weight, tasks.mip_weight, tasks.map_weight, tasks.sp_weight) == (0.1, 0.2, 0.3, 0.4)
    assert tasks.mask_ratio == 0.4 and config.finetune.loss == "bpr"
    for stage in (config.pretrain, config.finetune):
        assert (stage.weight_decay, stage.gradient_clipping) == (1e-5, 5.0)
    assert (config.engine.device, config.engine.precision) == ("cpu", "auto")


@pytest.mark.parametrize(
    ("valid_metric", "metric", "cutoffs"),
    [
        ("MRR@10", "MRR", (5, 10)),
        ("NDCG@20", "NDCG@20", (5, 10, 20)),
        ("Hit@5", "HR@5", (5, 10)),
        ("recall@10", "HR@10", (5, 10)),
        ("Precision@10", "MRR", (5, 10)),
    ],
)
def test_the_validation_metric_is_ours_with_its_cutoff(valid_metric: str, metric: str, cutoffs: tuple[int]) -> None:
    config = config_of(valid_metric=valid_metric, topk=[5, 10])
    assert (config.finetune.metric, config.evaluation.cutoffs) == (metric, cutoffs)
    told = about("valid_metric", valid_metric=valid_metric)
    assert bool(told) == (valid_metric in ("MRR@10", "Precision@10"))


def test_fine_tuning_stops_after_as_many_validations_as_recbole() -> None:
    """RecBole goes on while the count of validations without improvement is at most stopping_step."""
    assert config_of(stopping_step=10).finetune.patience == 11


def test_sampled_evaluation_comes_over_and_what_is_no_leave_one_out_is_told() -> None:
    settings: dict[str, Any] = {"eval_args": {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "RO", "mode": "uni100"}}
    evaluation = config_of(**settings).evaluation
    assert (evaluation.protocol, evaluation.negatives) == ("sampled", 100)
    assert ["split" in about("eval_args", **settings)[0], "order RO" in about("eval_args", **settings)[1]] == [True] * 2
    popular = {"eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "pop50"}}
    assert config_of(**popular).evaluation.protocol == "full"
    assert "mode pop50" in about("eval_args", **popular)[0]


def test_data_settings_become_a_prepare_command() -> None:
    found = convert(
        {
            "dataset": "shop",
            "data_path": "lake",
            "USER_ID_FIELD": "uid",
            "item_attribute": "brand",
            "val_interval": {"rating": "[3,inf)"},
            "user_inter_num_interval": "[5,inf)",
            "item_inter_num_interval": "(4,100]",
            "rm_dup_inter": "first",
        }
    )
    expected = "--source recbole --input lake/shop --user-column uid --attribute-fields brand --min-user-count 5 "
    expected += "--min-item-count 5 --min-rating 3 --duplicates drop_repeats"
    assert found.prepare == expected.split()
    cli.parser_of("prepare")[0].parse_args([*found.prepare, "--output", "data/shop"])
    assert [note for note in found.notes if note.startswith("item_inter_num_interval: (4,100]: there is only a least")]


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("learner", "sgd", "always Adam"),
        ("hidden_act", "relu", "always gelu"),
        ("shuffle", False, "every epoch is shuffled"),
        ("worker", 3, "no counterpart; threads read ahead"),
        ("frobnicate", 7, "no counterpart, left out"),
        ("field_separator", ",", "--source table"),
        ("val_interval", {"price": "[1,2]"}, "filter the file first"),
        ("rm_dup_inter", "last", "--duplicates drop_repeats the first"),
        ("train_neg_sample_args", {"distribution": "popularity"}, "draws one negative, uniformly"),
        ("pre_model_path", "saved/S3Rec-ml-100k-50.pth", "s3rec import --format recbole"),
        ("clip_grad_norm", {"max_norm": 5, "norm_type": 1}, "always the L2 norm"),
        ("eval_step", 0, "every epoch is validated"),
    ],
)
def test_what_has_no_counterpart_is_told(key: str, value: Any, told: str) -> None:
    (note,) = about(key, **{key: value})
    assert told in note


def test_values_that_say_what_is_done_anyway_are_not_told() -> None:
    assert (
        convert({"learner": "adam", "hidden_act": "gelu", "worker": 0, "seq_separator": " "}).notes == convert({}).notes
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "SASRec"}, "another model's; expected S3Rec"),
        ({"loss_type": "softmax"}, "loss_type: softmax: expected CE or BPR"),
        ({"loss_type": ["CE"]}, "expected CE or BPR"),
        ({"user_inter_num_interval": "5"}, r"'5': expected one interval, as in '\[5,inf\)'"),
        ({"stopping_step": "ten"}, "valid_metric, topk: a value is of another kind"),
        ({"val_interval": "[3,inf)"}, "val_interval, rm_dup_inter: a value is of another kind"),
        ({"eval_args": "full"}, "eval_args: full: expected split"),
        ({"item_attribute": ["class", "genre"]}, "expected the name of one field"),
    ],
)
def test_what_recbole_would_not_take_is_an_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        convert(settings)


def test_the_command_writes_a_config_file_that_loads_and_says_how_its_dataset_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, output = tmp_path / "S3Rec.yaml", tmp_path / "mine.yaml", tmp_path / "ours.yaml"
    first.write_text("n_layers: 4\nhidden_size: 32\nlayer_norm_eps: 1e-12\n")
    second.write_text("n_layers: 1\ndataset: shop\nlearner: sgd\n")
    assert cli.main(["config", "from-recbole", str(first), str(second), "--output", str(output)]) == 0
    printed = capsys.readouterr()
    config = load_config(output)
    assert (config.model.layers, config.model.hidden_size, config.data.path) == (1, 32, "data/shop")
    prepare, pretrain, finetune = printed.out.splitlines()
    assert f"#   {prepare}\n" in output.read_text() and prepare.startswith("s3rec prepare --source recbole")
    for line in (prepare, pretrain, finetune):
        _, name, *arguments = shlex.split(line)
        cli.parser_of(name)[0].parse_intermixed_args(arguments)
    assert "note: learner: sgd: the optimizer here is always Adam" in printed.err
    assert cli.main(["config", "from-recbole", str(first)]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["layers"] == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_heads: 3\n", "model.heads=3 does not divide model.hidden_size=64"),
        ("n_layers: many\n", "model.layers='many': expected int"),
        ("- a\n", "expected RecBole settings as 'key: value', got list"),
        ("a: [\n", "not valid YAML"),
        ("model: !!python/object/apply:os.mkdir [sprung]\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_settings_is_an_error_in_one_line_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(text)
    assert cli.main(["config", "from-recbole", "x.yaml", "--output", "ours.yaml"]) == 2
    error = capsys.readouterr().err
    assert "x.yaml" in error and message in error
    assert [path.name for path in tmp_path.iterdir()] == ["x.yaml"]
