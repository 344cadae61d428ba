"""The authors' checkpoints come in and go out, and give the authors' outputs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_models import (
    MODEL_FOLDER,
    SMALL,
    assert_same_weights,
    prepared,
    six_items,
    six_other_items,
    small_model,
    write_run,
)

from s3rec_dist import __main__ as cli
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.data.prepare import PrepareSettings, prepare
from s3rec_dist.data.reconstruct import FinetuneBatch, PretrainBatch
from s3rec_dist.export import ExportError, export, load_model, open_catalogue
from s3rec_dist.interchange.reference import import_reference, reference_names, reference_state
from s3rec_dist.model import S3Rec
from s3rec_dist.recommend import top_k
from s3rec_dist.tables.scored import WholeItems
from s3rec_dist.training.checkpoint import load_weights


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return six_items(tmp_path_factory.mktemp("toy") / "a")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return six_other_items(tmp_path_factory.mktemp("toy") / "b")


@pytest.fixture
def reference(dataset: Dataset, tmp_path: Path) -> Path:
    path = tmp_path / "reference.pt"
    torch.save(reference_state(small_model(dataset)), path)
    return path


def test_import_reads_every_size_but_the_heads_from_the_tensors(dataset: Dataset, reference: Path) -> None:
    model = import_reference(str(reference), heads=4, dataset=dataset)
    assert model.config == SMALL and (model.n_items, model.n_attributes) == (6, 4)
    assert_same_weights(model, small_model(dataset))
    assert import_reference(str(reference)).config == dataclasses.replace(SMALL, heads=2)
    with pytest.raises(ValueError, match=r"model\.heads=3 does not divide model\.hidden_size=8"):
        import_reference(str(reference), heads=3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_import_turns_other_floats_into_fp32(dataset: Dataset, tmp_path: Path, dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in reference_state(small_model(dataset)).items()}
    torch.save(state, tmp_path / "half.pt")
    model = import_reference(str(tmp_path / "half.pt"), heads=4)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.mip_head.weight, state["mip_norm.weight"].float())


def test_import_without_a_dataset_gives_a_folder_without_catalogue_that_loads_and_fine_tunes(
    dataset: Dataset, reference: Path, tmp_path: Path
) -> None:
    output = str(tmp_path / "m")
    arguments = ["--format", "reference", "--checkpoint", str(reference), "--heads", "4", "--output", output]
    assert cli.main(["import", *arguments]) == 0
    assert {path.name for path in Path(output).iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert_same_weights(S3Rec.from_pretrained(output), small_model(dataset))
    assert_same_weights(load_model(output, dataset), small_model(dataset))
    assert open_catalogue(output) is None and "catalogue" not in load_weights(output)[1]
    export(output, dataset, str(tmp_path / "whole"))  # which adds the catalogue
    assert {path.name for path in (tmp_path / "whole").iterdir()} == MODEL_FOLDER


def test_import_refuses_a_dataset_of_other_sizes_or_numbers(
    dataset: Dataset, other: Dataset, reference: Path, tmp_path: Path
) -> None:
    larger = prepared(tmp_path / "larger", "a 1 2 3 4\nb 4 5 6 7\n", {"1": [1, 2]})
    with pytest.raises(ExportError, match=r"knows 6 items and 4 attributes, .* has 7 and 2; prepare the dataset"):
        import_reference(str(reference), 4, larger)
    with pytest.raises(ExportError, match=r"items\.parquet: id 1 stands for '[u-z]', but the reference trains on"):
        import_reference(str(reference), 4, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("item_embeddings.weight"), r"tensor item_embeddings\.weight is missing"),
        (lambda s: s.pop("sp_norm.bias"), r"has no tensor sp_norm\.bias; expected a checkpoint of the S3-Rec authors"),
        (lambda s: s.pop("item_encoder.layer.1.attention.key.bias"), r"has no tensor item_encoder\.layer\.1\.att"),
        (lambda s: s.update({"gru.weight": torch.zeros(2)}), r"has a tensor gru\.weight, which an S3-Rec model"),
        (lambda s: s.update({"LayerNorm.bias": torch.zeros(3)}), r"LayerNorm\.bias has shape \[3\], expected \[8\]"),
        (
            lambda s: s.update({"item_encoder.layer.2.attention.value.weight": torch.zeros(8, 7)}),
            r"layer\.2\.attention\.value\.weight has shape \[8, 7\], expected \[8, 8\]",
        ),
        (
            lambda s: s.update({"position_embeddings.weight": torch.zeros(6)}),
            r"position_embeddings\.weight is of",
        ),
        (lambda s: s.update({"LayerNorm.bias": torch.zeros(8).int()}), r"'LayerNorm\.bias' holds a torch\.IntTensor"),
        (lambda s: s.update({"epoch": 3}), "'epoch' holds a int, not a dense tensor of floats"),
    ],
)
def test_import_accounts_for_every_tensor_by_name(
    dataset: Dataset, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    state = reference_state(small_model(dataset))
    change(state)
    torch.save(state, tmp_path / "changed.pt")
    with pytest.raises(ExportError, match=message):
        import_reference(str(tmp_path / "changed.pt"), heads=4)


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_import_runs_nothing_that_a_pickle_asks_for(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({**reference_state(small_model(dataset)), "trap": Trap(tmp_path / "sprung")}, tmp_path / "trap.pt")
    arguments = ["--checkpoint", str(tmp_path / "trap.pt"), "--output", str(tmp_path / "m")]
    assert cli.main(["import", *arguments]) == 2
    message = capsys.readouterr().err
    assert "trap.pt: holds more than tensors" in message and "save the model's state_dict() alone" in message
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "m").exists()


def test_import_refuses_what_is_no_state_dict(dataset: Dataset, tmp_path: Path, reference: Path) -> None:
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(ExportError, match=r"list\.pt: holds a list, not a state dict"):
        import_reference(str(tmp_path / "list.pt"))
    torch.save(small_model(dataset), tmp_path / "model.pt")
    with pytest.raises(ExportError, match="holds more than tensors"):
        import_reference(str(tmp_path / "model.pt"))
    for name, data in (("text.pt", b"hello\n"), ("empty.pt", b""), ("cut.pt", reference.read_bytes()[:3000])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ExportError, match=name):
            import_reference(str(tmp_path / name))
    assert cli.main(["import", "--checkpoint", str(tmp_path / "none.pt"), "--output", str(tmp_path / "m")]) == 2


def export_reference(dataset: Dataset, folder: Path, *more: str, **changes: Any) -> int:
    run = write_run(dataset, folder, small_model(dataset, **changes))
    arguments = ["--dataset", dataset.path, "--format", "reference", "--output", str(folder / "out" / "x.pt")]
    return cli.main(["export", str(run), *arguments, *more])


def test_an_exported_checkpoint_holds_the_references_tensors_and_comes_back_bit_for_bit(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export_reference(dataset, tmp_path) == 0
    assert capsys.readouterr().out == f"{tmp_path}/out/x.pt: 0.0 MB\n"
    state = torch.load(tmp_path / "out/x.pt", weights_only=True)
    assert state.keys() == {part for parts in reference_names(3).values() for part in parts}
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    query = small_model(dataset).blocks[1].qkv.weight[:8]
    assert torch.equal(state["item_encoder.layer.1.attention.query.weight"], query)
    assert_same_weights(import_reference(str(tmp_path / "out/x.pt"), 4, dataset), small_model(dataset))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x.pt"]


def test_a_checkpoint_goes_to_a_url_and_comes_from_there(dataset: Dataset, tmp_path: Path) -> None:
    assert export_reference(dataset, tmp_path, "--output", "memory://models/x.pt") == 0
    assert_same_weights(import_reference("memory://models/x.pt", 4, dataset), small_model(dataset))
    assert export_reference(dataset, tmp_path / "again", "--output", "memory://models/x.pt") == 2  # is there already


def test_an_existing_file_is_replaced_only_when_asked(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/x.pt").write_text("years of work")
    assert export_reference(dataset, tmp_path) == 2
    assert "x.pt: exists already; choose another output, or pass --overwrite" in capsys.readouterr().err
    assert (tmp_path / "out/x.pt").read_text() == "years of work"
    assert cli.main(["export", str(tmp_path / "run/finetune"), "--dataset", dataset.path, "--format", "reference",
                     "--output", str(tmp_path / "out/x.pt"), "--overwrite"]) == 0  # fmt: skip
    assert torch.load(tmp_path / "out/x.pt", weights_only=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_alignment": "start"}, "train with model.position_alignment=end to export to it"),
        ({"layer_norm_eps": 1e-6}, "fixed at 1e-12; train with that to export to it"),
    ],
)
def test_a_model_that_would_score_otherwise_there_is_not_exported(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    assert export_reference(dataset, tmp_path, **changes) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_model_whose_ids_are_not_the_references_numbers_is_not_exported(
    other: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export_reference(other, tmp_path) == 2
    assert "but the reference trains on the ids of its input files" in capsys.readouterr().err


# Parity with the authors' model, on their data and their weights after 150 epochs. Recorded and found outputs are
# fp32; they may differ by 1e-4 of the largest recorded value, and losses by 1e-4 of themselves.

TOLERANCE = 1e-4


def assert_close(found: torch.Tensor, recorded: np.ndarray) -> None:
    expected = torch.from_numpy(np.asarray(recorded))
    assert found.shape == expected.shape
    error = (found - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE, f"relative error {error:.1e}"


@dataclasses.dataclass(frozen=True)
class Parity:
    model: S3Rec
    golden: dict[str, np.ndarray]

    def ids(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.golden[name]).long()


@pytest.fixture(scope="module", params=["Beauty", "LastFM"])
def imported(
    request: pytest.FixtureRequest, published_data: Path, golden: Path, tmp_path_factory: pytest.TempPathFactory
) -> Parity:
    """The authors' checkpoint after import with the prepared dataset, as from_pretrained gives it."""
    folder = tmp_path_factory.mktemp(request.param)
    dataset, output = str(folder / "dataset"), str(folder / "model")
    prepare(PrepareSettings(source="s3rec", input=str(published_data / f"{request.param}.txt"), output=dataset))
    checkpoint = str(published_data / f"{request.param}-epochs-150.pt")
    assert cli.main(["import", "--checkpoint", checkpoint, "--dataset", dataset, "--output", output]) == 0
    exported = ["--format", "reference", "--output", str(folder / "again.pt")]
    assert cli.main(["export", output, "--dataset", dataset, *exported]) == 0
    found, published = (torch.load(path, weights_only=True) for path in (folder / "again.pt", checkpoint))
    assert found.keys() == published.keys()  # so their finetune loads it strictly
    assert all(torch.equal(found[name], tensor) for name, tensor in published.items())
    with np.load(golden / f"{request.param}.npz") as file:
        return Parity(S3Rec.from_pretrained(output).eval(), dict(file))


@pytest.fixture(params=["reference", "sdpa", "triton"])
def parity(request: pytest.FixtureRequest, imported: Parity, monkeypatch: pytest.MonkeyPatch) -> Parity:
    """The same with each backend; Triton's kernels are interpreted here, in fewer steps of larger tiles."""
    if request.param == "triton":
        pytest.importorskip("triton")
        monkeypatch.setattr("s3rec_dist.kernels.attribute_loss.triton.TILE", {4: 64})
    old = imported.model
    config = dataclasses.replace(old.config, attention=request.param)
    model = S3Rec(config, old.n_items, old.n_attributes)
    model.load_state_dict(old.state_dict())
    model.attribute_offsets, model.attribute_values = old.attribute_offsets, old.attribute_values
    return Parity(model.eval(), imported.golden)


SEQUENCES = ("masked_item_sequence", "masked_segment_sequence", "pos_segment", "neg_segment")
TASKS = ("aap", "mip", "map", "sp")


def packed(*padded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 items and offsets of padded [B, L] ids, table after table."""
    rows = torch.cat(padded)
    lengths = (rows != 0).sum(1)
    return rows[rows != 0].int(), torch.cat((torch.zeros(1), lengths.cumsum(0))).int()


def test_sizes_are_the_references(imported: Parity) -> None:
    model, golden = imported.model, imported.golden
    assert (model.n_items + 2, model.mask_id, model.n_attributes + 1) == tuple(
        int(golden[name]) for name in ("item_size", "mask_id", "attribute_size")
    )


@torch.no_grad()
@pytest.mark.parametrize(
    ("output", "sequences", "bidirectional"),
    [("bidirectional_output", "masked_item_sequence", True), ("causal_output", "pos_items", False)],
)
def test_padded_hidden_states_are_the_references_within_1e_4(
    parity: Parity, output: str, sequences: str, bidirectional: bool
) -> None:
    items = parity.ids(sequences)
    hidden = parity.model.forward(items, bidirectional=bidirectional)
    inside = items != 0
    assert_close(hidden[inside], parity.golden[output][inside.numpy()])


@torch.no_grad()
@pytest.mark.parametrize("parity", ["reference", "sdpa"], indirect=True)  # the packed test below has Triton's losses
def test_padded_pretraining_losses_are_the_references_within_1e_4(parity: Parity) -> None:
    model = parity.model
    features = torch.zeros(*parity.golden["pos_items"].shape, model.n_attributes + 1, dtype=torch.long)
    features[tuple(torch.from_numpy(parity.golden["attributes_nonzero_b_l_a"]).long().T)] = 1
    masked, masked_segment, pos_segment, neg_segment = map(parity.ids, SEQUENCES)
    losses = model.padded_pretrain_losses(
        features, masked, parity.ids("pos_items"), parity.ids("neg_items"), masked_segment, pos_segment, neg_segment
    )
    for task in TASKS:
        assert_close(losses.terms[task], parity.golden[f"loss_{task}"])


@torch.no_grad()
@pytest.mark.timeout(600)  # interpreted attention and losses: half a minute, on a machine that is busy many times that
def test_packed_pretraining_losses_are_the_references_within_1e_4(parity: Parity) -> None:
    """With the attributes of the exported catalogue, where the recorded ones come from the authors' file."""
    items, offsets = packed(*map(parity.ids, SEQUENCES))
    original, lengths = packed(parity.ids("pos_items"))
    is_masked = items[: len(original)] == parity.model.mask_id
    batch = PretrainBatch(
        items=items,
        offsets=offsets,
        max_length=int(lengths.diff().max()),
        original=original,
        masked=is_masked.nonzero().squeeze(1),
        unmasked=is_masked.logical_not().nonzero().squeeze(1),
        negatives=packed(parity.ids("neg_items"))[0][is_masked],
        sample_keys=torch.zeros(len(lengths) - 1, dtype=torch.int64),
    )
    losses = parity.model.pretrain_losses(batch)
    for task in TASKS:
        assert_close(losses.terms[task], parity.golden[f"loss_{task}"])


@torch.no_grad()
def test_the_packed_fine_tuning_loss_is_the_references_within_1e_4(parity: Parity) -> None:
    items, offsets = packed(parity.ids("finetune_input"))
    batch = FinetuneBatch(
        items=items,
        offsets=offsets,
        max_length=int(offsets.diff().max()),
        targets=packed(parity.ids("finetune_pos"))[0],
        negatives=packed(parity.ids("finetune_neg"))[0],
        sample_keys=torch.zeros(len(offsets) - 1, dtype=torch.int64),
    )
    losses = parity.model.finetune_losses(batch)
    assert_close(losses.total / losses.counts["bce"], parity.golden["loss_finetune_bce"])


@torch.no_grad()
def test_packed_scores_are_the_references_within_1e_4_and_the_best_20_items_the_same(parity: Parity) -> None:
    items, offsets = packed(parity.ids("finetune_input"))
    users = parity.model.encode_last(items, offsets, int(offsets.diff().max()))
    table = parity.model.item_embedding.weight
    assert_close(users[:16] @ table.T, parity.golden["full_scores_first16"])
    nothing = torch.zeros(0, dtype=torch.int64)
    best, _ = top_k(users, WholeItems(table[1:-1]), 20, (nothing, nothing), item_chunk=1000)
    assert torch.equal(best, parity.ids("full_top20"))


@torch.no_grad()
def test_full_sort_predict_takes_right_padded_histories_to_the_references_scores_within_1e_4(parity: Parity) -> None:
    rows = [row[row != 0] for row in parity.ids("finetune_input")[:16]]
    lengths = torch.tensor([len(row) for row in rows])
    right_padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    scores = parity.model.full_sort_predict({"item_id_list": right_padded, "item_length": lengths})
    assert_close(scores, parity.golden["full_scores_first16"][:, :-1])  # the last column is the mask token's
