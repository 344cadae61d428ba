"""The rivals get what our stream hands over, and hand it over packed."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from s3rec_dist.__main__ import main
from s3rec_dist.bench.rivals import RivalsError, _pack_arrays, _pack_bytes, _sequences, _sums, rivals
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.data.order import SampleSpec
from s3rec_dist.data.stream import Stream

SPEC = SampleSpec("full_sequence", 50)


@pytest.fixture(scope="module")
def dataset(ml100k: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = str(tmp_path_factory.mktemp("rivals") / "ml-100k")
    assert main(["prepare", "--source", "recbole", "--input", str(ml100k), "--output", folder]) == 0
    return Dataset.open(folder)


def test_rivals_are_given_the_sequences_that_the_stream_hands_over(dataset: Dataset) -> None:
    stream = Stream(dataset, SPEC, batch_size=64, seed=1)
    ours = [part.items.tolist() for packed in stream.iterate(0) for part in packed.split(len(packed))]
    stream.close()
    assert sorted(ours) == sorted(sequence.tolist() for sequence in _sequences(dataset, SPEC))


def test_both_packings_are_the_sequences_end_to_end() -> None:
    arrays = [np.arange(n, dtype=np.int32) for n in (3, 1, 7)]
    for items, offsets in (_pack_arrays(arrays), _pack_bytes([array.tobytes() for array in arrays])):
        assert items.tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4, 5, 6] and offsets.tolist() == [0, 3, 4, 11]
        assert _sums([(items, offsets)]) == (3, 24, 9 + 1 + 49)


def test_a_missing_package_is_named_with_what_to_install(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "litdata", None)
    monkeypatch.setitem(sys.modules, "streaming", sys)
    with pytest.raises(RivalsError, match=r"cannot import litdata.*pip install mosaicml-streaming litdata"):
        rivals(dataset, SPEC, batch_size=64, repetitions=1)


def test_both_rivals_hand_over_every_sequence(dataset: Dataset) -> None:
    pytest.importorskip("streaming", reason="mosaicml-streaming is not installed", exc_type=ImportError)
    pytest.importorskip("litdata", reason="litdata is not installed", exc_type=ImportError)
    ways: list[str] = []
    rates = rivals(dataset, SPEC, batch_size=64, repetitions=2, progress=ways.append)
    assert len(ways) == 8 and all(len(values) == 2 and min(values) > 0 for values in rates.values())
    assert list(rates) == ["MosaicML Streaming", "LitData"]
