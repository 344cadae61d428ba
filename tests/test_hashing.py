"""The hash that stands for every random draw: same bits everywhere, uniform, no traces of its arguments."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s3rec_dist.hashing import GOLDEN, hash64, keep_mask, keep_scale, key_of, mix, uniform_below

SIGNED_64 = st.integers(-(2**63), 2**63 - 1)
N = 1 << 18


def counters(n: int = N) -> np.ndarray:
    return np.arange(n, dtype=np.int64)


def bits_of(key: int, counter: np.ndarray) -> np.ndarray:
    return hash64(np.full(1, key, dtype=np.int64), counter)


def lanes(words: np.ndarray) -> np.ndarray:
    """[n] int64 -> [n, 4] 16-bit lanes, lowest first."""
    return words.view(np.uint16).reshape(-1, 4).astype(np.int64)


def python_hash64(key: int, counter: int) -> int:
    """The definition in unbounded integers."""
    word = 2**64 - 1
    x = (key + counter * (GOLDEN & word)) & word
    x = (x * 0xD6E8FEB86659FD93) & word
    x ^= x >> 32
    x = (x * 0xA0761D6478BD642F) & word
    x ^= x >> 32
    return x - 2**64 if x >> 63 else x


def z_of_chi_square(counts: np.ndarray) -> float:
    """Standard score of Pearson's statistic against equal frequencies."""
    expected = counts.sum() / counts.size
    statistic = float(((counts - expected) ** 2).sum() / expected)
    freedom = counts.size - 1
    return (statistic - freedom) / (2 * freedom) ** 0.5


@given(key=SIGNED_64, counter=SIGNED_64)
def test_numpy_torch_and_the_definition_agree_on_every_bit(key: int, counter: int) -> None:
    by_numpy = hash64(np.array([key]), np.array([counter]))
    by_torch = hash64(torch.tensor([key]), torch.tensor([counter]))
    assert int(by_numpy[0]) == int(by_torch[0]) == python_hash64(key, counter)


@given(key=SIGNED_64, counter=st.integers(-(2**70), 2**70))
def test_a_python_counter_wraps_like_an_array_counter(key: int, counter: int) -> None:
    wrapped = (counter + 2**63) % 2**64 - 2**63
    by_integer = hash64(torch.tensor([key]), counter)
    assert torch.equal(by_integer, hash64(torch.tensor([key]), torch.tensor([wrapped])))
    assert int(hash64(np.array([key]), counter)[0]) == int(by_integer[0])


def test_keys_and_counters_broadcast() -> None:
    keys, counter = torch.arange(3)[:, None], torch.arange(5)[None, :]
    words = hash64(keys, counter)
    assert words.shape == (3, 5)
    assert words.dtype == torch.int64
    assert int(words[2, 4]) == python_hash64(2, 4)


def test_arguments_are_left_unchanged() -> None:
    keys, counter = torch.arange(4), torch.arange(4)
    hash64(keys, counter)
    hash64(keys, 0)
    assert torch.equal(keys, torch.arange(4)) and torch.equal(counter, torch.arange(4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_bits_as_the_cpu() -> None:
    keys, counter = torch.arange(-500, 500)[:, None], torch.arange(-500, 500)[None, :] << 40
    assert torch.equal(hash64(keys.cuda(), counter.cuda()).cpu(), hash64(keys, counter))


@given(st.lists(SIGNED_64, unique=True, max_size=50))
def test_mixing_never_maps_two_words_to_one(words: list[int]) -> None:
    assert len(set(mix(np.array(words, dtype=np.int64)).tolist())) == len(words)


@pytest.mark.parametrize("key", [0, 1, -1, 42, 2**62, key_of(42, 3, 1)])
def test_each_16_bit_lane_is_uniform(key: int) -> None:
    four = lanes(bits_of(key, counters()))
    for lane in range(4):
        z = z_of_chi_square(np.bincount(four[:, lane] >> 6, minlength=1 << 10))
        assert abs(z) < 5, f"lane {lane}: z = {z:.1f}"


@pytest.mark.parametrize("key", [0, 42, key_of(7, 7)])
def test_each_bit_is_set_half_of_the_time(key: int) -> None:
    bits = np.unpackbits(bits_of(key, counters()).view(np.uint8)).reshape(N, 64)
    z = (bits.mean(axis=0) - 0.5) * 2 * N**0.5
    assert np.abs(z).max() < 5


NEIGHBOURS: dict[str, Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "counter + 1": lambda c: (bits_of(42, c), bits_of(42, c + 1)),
    "counter + 2": lambda c: (bits_of(42, c), bits_of(42, c + 2)),
    "counter + 4096": lambda c: (bits_of(42, c), bits_of(42, c + 4096)),
    "key + 1": lambda c: (bits_of(42, c), bits_of(43, c)),
    "key + 2^32": lambda c: (bits_of(42, c), bits_of(42 + 2**32, c)),
    "counter + 2^32": lambda c: (bits_of(42, c), bits_of(42, c + 2**32)),
    "the next row's sample id": lambda c: (bits_of(42, c << 24 | 7), bits_of(42, (c + 1) << 24 | 7)),
    "the next prefix's sample id": lambda c: (bits_of(42, c << 24 | 7), bits_of(42, c << 24 | 8)),
    "counter and key exchanged": lambda c: (hash64(c, np.full(1, 42)), hash64(np.full(1, 42), c)),
    "consecutive keys, one counter": lambda c: (hash64(c, 5), hash64(c + 1, 5)),
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neighbouring_arguments_give_unrelated_words(name: str) -> None:
    first, second = NEIGHBOURS[name](counters())
    flips = np.unpackbits((first ^ second).view(np.uint8)).reshape(N, 64).mean(axis=0)
    z = (flips - 0.5) * 2 * N**0.5
    assert np.abs(z).max() < 5, f"bit {int(np.abs(z).argmax())} flips with frequency {flips[np.abs(z).argmax()]:.3f}"
    one, two = lanes(first), lanes(second)
    for a in range(4):
        for b in range(4):
            joint = np.bincount((one[:, a] >> 11) * 32 + (two[:, b] >> 11), minlength=1024)
            assert abs(z_of_chi_square(joint)) < 5.5, f"lanes {a} and {b} depend on each other"


def test_the_dropout_masks_of_two_neighbouring_keys_are_independent() -> None:
    """Keys that differ by one are what consecutive samples get, if a caller forgets to hash them first."""
    keys = np.arange(1000, dtype=np.int64)[:, None]
    kept = hash64(keys, np.arange(1000, dtype=np.int64)[None, :]) & 0xFFFF >= 0x8000
    agreement = (kept[1:] == kept[:-1]).mean()
    assert abs(agreement - 0.5) < 5 * 0.5 / kept[1:].size ** 0.5
    assert abs(kept.mean() - 0.5) < 5 * 0.5 / kept.size**0.5


def test_key_of_depends_on_every_part_and_on_their_order() -> None:
    keys = [key_of(*parts) for parts in [(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1), (0, 0, 0), (-2,), (2**40,)]]
    assert len(set(keys)) == len(keys)
    assert all(-(2**63) <= key < 2**63 for key in keys)


@given(st.lists(st.one_of(SIGNED_64, st.integers(0, 9)), max_size=4))
def test_key_of_is_hash64_part_by_part(parts: list[int]) -> None:
    key = np.zeros(1, dtype=np.int64)
    for part in parts:
        key = hash64(key, part + 1)
    assert key_of(*parts) == int(key[0])


@given(bits=SIGNED_64, bound=st.integers(1, 2**63 - 1))
def test_uniform_below_stays_below_its_bound_in_numpy_and_torch_alike(bits: int, bound: int) -> None:
    by_numpy = int(uniform_below(np.array([bits]), bound)[0])
    assert 0 <= by_numpy == bits % bound < bound
    assert by_numpy == int(uniform_below(torch.tensor([bits]), bound)[0])
    assert by_numpy == int(uniform_below(torch.tensor([bits]), torch.tensor([bound]))[0])


@pytest.mark.parametrize("bound", [1, 2, 3, 7, 100, 1682])
def test_uniform_below_is_uniform(bound: int) -> None:
    draws = uniform_below(bits_of(key_of(3, 1), counters()), bound)
    counts = np.bincount(draws, minlength=bound)
    assert counts.size == bound
    if bound > 1:
        assert abs(z_of_chi_square(counts)) < 5


@pytest.mark.parametrize("bound", [1 << 20, 3 << 30, 10**12 + 39, 1 << 52])
def test_uniform_below_is_uniform_over_vast_ranges(bound: int) -> None:
    """Both in coarse terms, which the word's high bits decide, and in fine ones."""
    draws = uniform_below(bits_of(key_of(3, 2), counters()), bound)
    assert abs(z_of_chi_square(np.bincount((draws / bound * 96).astype(np.int64), minlength=96))) < 5
    assert abs(z_of_chi_square(np.bincount(draws % 64, minlength=64))) < 5


# keep_mask: the dropout of every place in the model. Bounds are 5 standard deviations.

KEYS = hash64(torch.arange(4000), 42)


def python_keep(key: int, feature: int, site: int, p: float) -> bool:
    """The definition in unbounded integers: 16 signed bits against a threshold."""
    lane = python_hash64(key, feature // 4 + site * 2**20) >> 16 * (feature % 4) & 0xFFFF
    return (lane - 2**16 if lane >> 15 else lane) >= round(p * 2**16) - 2**15


@given(
    keys=st.lists(SIGNED_64, min_size=1, max_size=4),
    features=st.integers(1, 13),
    site=st.integers(0, 1000),
    p=st.floats(0, 0.99),
)
def test_keep_mask_equals_its_definition(keys: list[int], features: int, site: int, p: float) -> None:
    mask = keep_mask(torch.tensor(keys), features, site, p)
    assert mask.tolist() == [[python_keep(key, j, site, p) for j in range(features)] for key in keys]


@pytest.mark.parametrize("p", [0.0, 0.01, 0.1, 0.2, 0.5, 0.9, 0.99])
def test_values_are_kept_with_the_rate_in_every_lane_and_scaled_to_the_same_mean(p: float) -> None:
    kept = keep_mask(KEYS, 64, 3, p).double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(kept.mean() - (1 - p)) <= 5 * deviation / kept.numel() ** 0.5 + 2**-17
    assert (kept.mean(0) - (1 - p)).abs().max() <= 5 * deviation / len(KEYS) ** 0.5 + 2**-17
    by_lane = kept.view(-1, 4).mean(0)
    assert (by_lane - (1 - p)).abs().max() <= 5 * deviation / (kept.numel() / 4) ** 0.5 + 2**-17
    assert keep_scale(p) * (1 - round(p * 2**16) / 2**16) == pytest.approx(1, rel=1e-12)
    assert keep_scale(p) == pytest.approx(1 / (1 - p), rel=2e-3)


def test_a_rate_of_zero_keeps_all_as_it_is() -> None:
    assert keep_mask(KEYS, 64, 0, 0.0).all() and keep_scale(0.0) == 1.0


def test_features_of_a_row_and_rows_of_a_feature_are_dropped_independently() -> None:
    """Whole correlation matrices, so that no pair of lanes, words or neighbouring rows hides in an average."""
    kept = keep_mask(KEYS, 64, 3, 0.5).double()
    for table in (kept, keep_mask(torch.arange(64), 4000, 3, 0.5).double().T):
        correlation = torch.corrcoef(table.T) - torch.eye(64)
        assert correlation.abs().max() < 5 / len(table) ** 0.5
    per_row = torch.bincount(keep_mask(KEYS, 8, 3, 0.5).sum(1), minlength=9).numpy()
    binomial = np.array([1, 8, 28, 56, 70, 56, 28, 8, 1]) / 256 * len(KEYS)
    chi = ((per_row - binomial) ** 2 / binomial).sum()
    assert abs(chi - 8) < 5 * 16**0.5


@pytest.mark.parametrize("sites", [(0, 1), (1, 2), (1, 4), (2, 3), (3, 6)])
def test_sites_drop_independently(sites: tuple[int, int]) -> None:
    one, two = (keep_mask(KEYS, 64, site, 0.5) for site in sites)
    agreement = (one == two).double()
    assert abs(agreement.mean() - 0.5) < 5 * 0.5 / agreement.numel() ** 0.5
    assert (agreement.mean(0) - 0.5).abs().max() < 5 * 0.5 / len(KEYS) ** 0.5


def test_a_row_gets_the_same_bits_whatever_the_shape_and_the_rest_of_the_batch() -> None:
    keys = KEYS[:60]
    flat = keep_mask(keys, 21, 5, 0.3)
    assert torch.equal(keep_mask(keys.view(3, 4, 5), 21, 5, 0.3), flat.view(3, 4, 5, 21))
    assert torch.equal(keep_mask(keys.view(3, 20).T, 21, 5, 0.3), flat.view(3, 20, 21).transpose(0, 1))
    assert torch.equal(keep_mask(keys[7], 21, 5, 0.3), flat[7])
    assert torch.equal(keep_mask(keys[[9, 2, 9]], 21, 5, 0.3), flat[[9, 2, 9]])
    assert torch.equal(keep_mask(keys[:, None].expand(60, 2), 21, 5, 0.3), flat[:, None].expand(60, 2, 21))
    assert keep_mask(keys[:0], 21, 5, 0.3).shape == (0, 21)


def test_a_feature_gets_the_same_bits_however_many_there_are() -> None:
    widest = keep_mask(KEYS[:50], 64, 2, 0.4)
    for features in (1, 2, 3, 4, 5, 63):
        assert torch.equal(keep_mask(KEYS[:50], features, 2, 0.4), widest[:, :features])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_mask_of_numbers_holds_the_ones_and_zeros_of_the_mask_of_truths(dtype: torch.dtype) -> None:
    kept = keep_mask(KEYS[:50], 30, 2, 0.4)
    numbers = keep_mask(KEYS[:50], 30, 2, 0.4, dtype)
    assert kept.dtype == torch.bool and numbers.dtype == dtype
    assert torch.equal(numbers, kept.to(dtype))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_keeps_the_same_values_as_the_cpu() -> None:
    for dtype in (torch.bool, torch.bfloat16):
        assert torch.equal(keep_mask(KEYS.cuda(), 30, 2, 0.4, dtype).cpu(), keep_mask(KEYS, 30, 2, 0.4, dtype))
