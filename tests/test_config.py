"""Settings: what is read is what was written, and what cannot be used is refused with its place and the remedy."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from s3rec_dist.config import (
    Config,
    ConfigError,
    EvaluationConfig,
    FinetuneConfig,
    ModelConfig,
    PretrainConfig,
    StageConfig,
    from_dict,
    load_config,
    to_dict,
    to_yaml,
)

SHIPPED = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
SECTIONS = {name: hint for name, hint in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(hint)}


def write(folder: Path, text: str) -> Path:
    path = folder / "experiment.yaml"
    path.write_text(text)
    return path


def test_no_file_and_no_overrides_give_the_defaults() -> None:
    assert load_config(None) == Config()


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "")) == Config()
    assert load_config(write(tmp_path, "# nothing yet\n")) == Config()


def test_a_file_sets_what_it_names_and_leaves_the_rest(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "seed: 7\nmodel: {layers: 3}\nevaluation: {cutoffs: [5, 10]}\n"))
    assert config == dataclasses.replace(
        Config(), seed=7, model=ModelConfig(layers=3), evaluation=EvaluationConfig(cutoffs=(5, 10))
    )


def test_overrides_win_over_the_file_and_the_last_one_wins(tmp_path: Path) -> None:
    path = write(tmp_path, "pretrain: {epochs: 3, mask_ratio: 0.3}\n")
    config = load_config(path, ["pretrain.epochs=4", "pretrain.epochs=5", "output=runs/x"])
    assert (config.pretrain.epochs, config.pretrain.mask_ratio, config.output) == (5, 0.3, "runs/x")


def test_no_override_hides_a_mistake_in_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"experiment\.yaml.*epochs"):
        load_config(write(tmp_path, "pretrain: {epochs: many}\n"), ["pretrain.epochs=4"])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("pretrain.learning_rate=1e-4", 1e-4),  # YAML alone reads 1e-4 as text
        ("pretrain.learning_rate=0.5", 0.5),
        ("pretrain.learning_rate=1", 1.0),
        ("pretrain.adam_betas=[0.8, 0.99]", (0.8, 0.99)),
        ("evaluation.cutoffs=[3]", (3,)),
        ("storage.chained_urls=true", True),
        ("data.path=s3://bucket/a=b", "s3://bucket/a=b"),
        ("tracking.entity=", ""),
    ],
)
def test_an_override_is_read_as_its_settings_type(override: str, expected: object) -> None:
    section, name = override.partition("=")[0].split(".")
    value = getattr(getattr(load_config(None, [override]), section), name)
    assert value == expected
    assert type(value) is type(expected)


REFUSED_OVERRIDES = {
    # unknown settings, and the nearest known one
    "pretrain.epoch=3": r"unknown setting pretrain\.epoch; did you mean pretrain\.epochs\?",
    "sed=3": r"unknown setting sed; did you mean seed\?",
    "zzz=3": r"unknown setting zzz; known keys: output, seed, data",
    "model.finetune.loss=ce": r"unknown setting model\.finetune",
    # shape of an override
    "pretrain.epochs": r"'pretrain\.epochs': expected key=value",
    "seed.x=3": r"seed=\{'x': 3\}: expected int",
    "pretrain=3": r"pretrain: expected a section of settings, got 3",
    "seed=[": r"'seed=\[': the value is not valid YAML",
    # wrong types
    "seed=x": r"seed='x': expected int, got str",
    "seed=1.5": r"seed=1\.5: expected int, got float",
    "seed=true": r"seed=True: expected int, got bool",
    "seed=": r"seed='': expected int, got str",
    "storage.chained_urls=1": r"storage\.chained_urls=1: expected bool, got int",
    "data.verify=full": r"data\.verify='full': expected one of size, hash",
    "data.path=3": r"data\.path=3: expected str, got int",
    "model.hidden_dropout=half": r"model\.hidden_dropout='half': expected float, got str",
    "evaluation.cutoffs=5": r"evaluation\.cutoffs=5: expected a list",
    "evaluation.cutoffs=[5, a]": r"evaluation\.cutoffs\[1\]='a': expected int",
    "pretrain.adam_betas=[0.9]": r"pretrain\.adam_betas=\[0\.9\]: expected a list",
    "pretrain.attribute_negatives=-1": r"pretrain\.attribute_negatives=-1: expected at least 0",
    "finetune.loss=hinge": r"finetune\.loss='hinge': expected one of bce, bpr, ce",
    "finetune.loss=[ce]": r"finetune\.loss=\['ce'\]: expected one of bce, bpr, ce",
    # values out of range
    "data.streams=-1": r"data\.streams=-1: expected at least 0",
    "data.shuffle_window=0": r"data\.shuffle_window=0: expected at least 1",
    "data.prefetch_threads=0": r"data\.prefetch_threads=0: expected at least 1",
    "data.cache_mb=-1": r"data\.cache_mb=-1: expected at least 0",
    "model.layers=0": r"model\.layers=0: expected at least 1",
    "model.hidden_dropout=1.0": r"model\.hidden_dropout=1\.0: expected a value from 0\.0 to 0\.99",
    "model.attention_dropout=.nan": r"model\.attention_dropout=nan: expected a value",
    "pretrain.epochs=-1": r"pretrain\.epochs=-1: expected at least 0",
    "finetune.epochs=-1": r"finetune\.epochs=-1: expected at least 0",
    "pretrain.batch_size=0": r"pretrain\.batch_size=0: expected at least 1",
    "finetune.gradient_accumulation=0": r"finetune\.gradient_accumulation=0: expected at least 1",
    "finetune.learning_rate=-1": r"finetune\.learning_rate=-1\.0: expected a value from 0",
    "pretrain.gradient_clipping=-1": r"pretrain\.gradient_clipping=-1\.0: expected at least 0",
    "pretrain.mask_ratio=1.5": r"pretrain\.mask_ratio=1\.5: expected a value from 0\.0 to 1\.0",
    "pretrain.sp_weight=-1": r"pretrain\.sp_weight=-1\.0: expected at least 0",
    "finetune.patience=-1": r"finetune\.patience=-1: expected at least 0",
    "finetune.pretrained=": r"finetune\.pretrained is empty; write .* 'none'",
    "evaluation.negatives=0": r"evaluation\.negatives=0: expected at least 1",
    "evaluation.cutoffs=[]": r"evaluation\.cutoffs=\[\]: expected positive integers, as in \[5, 10\]",
    "evaluation.cutoffs=[0]": r"evaluation\.cutoffs=\[0\]: expected positive integers",
    "engine.zero_stage=4": r"engine\.zero_stage=4: expected a value from 0 to 3",
    "engine.threads=-2": r"engine\.threads=-2: expected at least 0",
    "model.layer_norm_eps=-1": r"model\.layer_norm_eps=-1\.0: expected at least 0",
    "finetune.adam_betas=[0.9, 1.0]": r"finetune\.adam_betas=\[0\.9, 1\.0\]: expected values from 0 to below 1",
    "pretrain.adam_eps=-1e-8": r"pretrain\.adam_eps=-1e-08: expected at least 0",
    # combinations
    "model.heads=3": r"model\.heads=3 does not divide model\.hidden_size=64; choose",
    "data.streams=48": r"data\.streams=48 does not divide pretrain\.batch_size=256; leave data\.streams=0 or choose",
    "evaluation.negatives_file=x.txt": r"evaluation\.negatives_file needs evaluation\.protocol=sampled",
    "finetune.metric=AUC": r"finetune\.metric='AUC': expected MRR, HR@k or NDCG@k",
    "finetune.metric=MRR@5": r"finetune\.metric='MRR@5': expected MRR, HR@k or NDCG@k",
    "finetune.metric=HR@": r"finetune\.metric='HR@': expected MRR, HR@k or NDCG@k",
    "finetune.metric=HR@7": r"finetune\.metric='HR@7' is not computed .* add 7 to evaluation\.cutoffs",
}


@pytest.mark.parametrize("override", REFUSED_OVERRIDES)
def test_an_unusable_override_is_refused_with_the_remedy(override: str) -> None:
    with pytest.raises(ConfigError, match=REFUSED_OVERRIDES[override]) as caught:
        load_config(None, [override])
    assert str(caught.value).startswith(("command line: ", "argument "))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pretrian: {epochs: 3}", r"unknown setting pretrian; did you mean pretrain\?"),
        ("pretrain: {epochs: 3.0}", r"pretrain\.epochs=3\.0: expected int, got float"),
        ("pretrain:", r"pretrain: expected a section of settings, got None"),
        ("- a\n- b", r"expected settings as 'key: value', got list"),
        ("just words", r"expected settings as 'key: value', got str"),
        ("a: [", r"not valid YAML"),
        ("!!python/object/apply:os.getcwd []", r"not valid YAML"),
        ("1: 2", r"unknown setting 1; known keys"),
    ],
)
def test_an_unusable_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    with pytest.raises(ConfigError, match=r"missing\.yaml: cannot read the config file \(No such file"):
        load_config(missing)
    with pytest.raises(ConfigError, match="cannot read the config file"):
        load_config(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.yaml: .*not UTF-8"):
        load_config(binary)


def test_streams_must_divide_both_batch_sizes() -> None:
    assert load_config(None, ["data.streams=32"]).data.streams == 32
    with pytest.raises(ConfigError, match=r"does not divide finetune\.batch_size=100"):
        load_config(None, ["data.streams=32", "finetune.batch_size=100"])


def test_fp16_on_the_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine\.precision=fp16 does not run with engine\.device=cpu; use bf16"):
        load_config(None, ["engine.device=cpu", "engine.precision=fp16"])


def test_a_sharded_item_table_refuses_what_needs_all_items_and_alone_has_a_capacity() -> None:
    with pytest.raises(ConfigError, match=r"finetune\.loss=ce needs all items .* use finetune\.loss=sampled_ce"):
        load_config(None, ["model.item_table=sharded", "finetune.loss=ce"])
    with pytest.raises(ConfigError, match=r"item_capacity=9 is of a sharded item table; set model\.item_table=sharded"):
        load_config(None, ["model.item_capacity=9"])


def test_offload_needs_a_zero_stage_that_has_it() -> None:
    with pytest.raises(
        ConfigError, match=r"offload=optimizer does not work with engine\.zero_stage=0; use .*=1 or above"
    ):
        load_config(None, ["engine.offload=optimizer"])
    with pytest.raises(ConfigError, match=r"offload=parameters does not work with engine\.zero_stage=2; use .*=3$"):
        load_config(None, ["engine.offload=parameters", "engine.zero_stage=2"])


def test_pretraining_without_any_task_is_refused() -> None:
    weights = [f"pretrain.{task}_weight=0" for task in ("aap", "mip", "map", "sp")]
    assert load_config(None, weights[1:]).pretrain.aap_weight == 0.2
    with pytest.raises(ConfigError, match="aap_weight, mip_weight, map_weight, sp_weight are all 0"):
        load_config(None, weights)


def test_a_section_checks_itself_when_it_is_made_in_python() -> None:
    with pytest.raises(ConfigError, match=r"finetune\.epochs=-1"):
        FinetuneConfig(epochs=-1)
    with pytest.raises(ConfigError, match=r"model\.heads=5"):
        ModelConfig(heads=5)


def test_settings_cannot_be_changed_after_they_are_checked() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 3  # type: ignore[misc]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_file_loads_and_reads_back_equal(path: Path) -> None:
    config = load_config(path)
    assert config.data.path and config.output == f"runs/{path.stem}"
    assert from_dict(yaml.safe_load(to_yaml(config)), "stored") == config


def test_quickstart_beauty_and_lastfm_are_shipped() -> None:
    assert {path.stem for path in SHIPPED} >= {"quickstart", "beauty", "lastfm"}


@pytest.mark.parametrize("name", ["beauty", "lastfm"])
def test_the_papers_experiments_keep_the_papers_settings(name: str) -> None:
    config = load_config(Path(__file__).parents[1] / "configs" / f"{name}.yaml")
    assert config.model == ModelConfig()
    assert config.pretrain.epochs == 150
    assert (config.finetune.loss, config.finetune.samples, config.finetune.batch_size) == ("bce", "full_sequence", 256)
    assert (config.finetune.metric, config.finetune.patience) == ("MRR", 10)
    assert (config.evaluation.protocol, config.evaluation.negatives) == ("sampled", 99)
    assert config.evaluation.cutoffs == (1, 5, 10, 20)


def test_every_setting_is_documented() -> None:
    """An attribute docstring follows each field: it is where people look a setting up."""
    import ast
    import inspect

    import s3rec_dist.config as module

    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
            for field, after in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign) and not ast.unparse(field.annotation).endswith("Config"):
                    documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                    assert documented, f"{node.name}.{ast.unparse(field.target)} has no docstring"


stages = st.fixed_dictionaries(
    {},
    optional={
        "epochs": st.integers(0, 10**6),
        "batch_size": st.integers(1, 10**6),
        "samples": st.sampled_from(typing.get_args(typing.get_type_hints(StageConfig)["samples"])),
        "learning_rate": st.floats(0, 10),
        "adam_betas": st.lists(st.floats(0, 1, exclude_max=True), min_size=2, max_size=2),
        "adam_eps": st.floats(1e-300, 1),
        "checkpoint_every_steps": st.integers(0, 10**6),
    },
)
trees = st.fixed_dictionaries(
    {},
    optional={
        "output": st.text(),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "data": st.fixed_dictionaries({}, optional={"path": st.text(), "verify": st.sampled_from(["size", "hash"])}),
        "pretrain": stages,
        "finetune": stages,
        "evaluation": st.fixed_dictionaries(
            {}, optional={"cutoffs": st.lists(st.integers(1, 100), min_size=1), "seed": st.integers()}
        ),
    },
)


@given(trees)
@settings(deadline=None)
def test_any_config_reads_back_equal_from_its_yaml(tree: dict[str, typing.Any]) -> None:
    config = from_dict(tree, "drawn")
    assert from_dict(yaml.safe_load(to_yaml(config)), "stored") == config
    assert to_dict(from_dict(to_dict(config), "stored")) == to_dict(config)
    for section, drawn in tree.items():
        for name, value in drawn.items() if isinstance(drawn, dict) else ():
            held = getattr(getattr(config, section), name)
            assert held == (tuple(value) if isinstance(value, list) else value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
names = st.sampled_from(
    ["output", "seed", *SECTIONS, *(field.name for cls in SECTIONS.values() for field in dataclasses.fields(cls))]
)


@given(st.dictionaries(names, st.dictionaries(names, json_values, max_size=3) | json_values, max_size=3))
def test_any_tree_gives_a_config_or_a_config_error(tree: dict[str, typing.Any]) -> None:
    try:
        config = from_dict(tree, "drawn")
    except ConfigError as error:
        assert "drawn: " in str(error)
    else:
        assert isinstance(config, Config)


def test_pretraining_and_finetuning_differ_where_the_paper_does() -> None:
    assert PretrainConfig().samples == "all_prefixes"
    assert FinetuneConfig().samples == "full_sequence"
