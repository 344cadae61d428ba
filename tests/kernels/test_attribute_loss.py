"""Both backends compute the textbook loss and its gradients, whatever the shapes, tiles, chunks and lists.

Errors are relative: the root mean square of the difference to binary cross-entropy in fp64 on the same inputs, over
that of the latter. Uninitialized memory holds NaN throughout. The Triton kernels run compiled on a GPU and interpreted
without one.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from s3rec_dist.kernels.attribute_loss import TRITON_MOST_FEATURES, _loss, attribute_loss, reference
from s3rec_dist.kernels.backends import forced_backend

HAS_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if HAS_CUDA else "cpu"
needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs the package triton")
needs_cuda = pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")
BACKENDS = ("reference", pytest.param("triton", marks=needs_triton))
pytestmark = pytest.mark.usefixtures("poisoned_memory")

ERROR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""fp32: roundings of sums. The others: weights and gradients are rounded to 11 and 8 bits (the interpreter cuts bits
off when it makes bf16, which doubles that)."""

Lists = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Results = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One call, with inputs that are a function of the case."""

    rows: int = 5
    attributes: int = 13
    features: int = 16
    items: int = 6
    """Of the catalogue. The second has no attribute, the third every one."""
    density: float = 0.3
    dtype: torch.dtype = torch.float32
    seed: int = 1

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        hidden = torch.randn(self.rows, self.features, generator=generator)
        table = torch.randn(self.attributes, self.features, generator=generator) * 2 / self.features**0.5
        return hidden.to(DEVICE, self.dtype), table.to(DEVICE, self.dtype)

    def lists(self) -> Lists:
        """Each row's item, and the catalogue's offsets and values."""
        has = torch.rand(self.items, self.attributes, generator=torch.Generator().manual_seed(self.seed)) < self.density
        has[1:2], has[2:3] = False, True
        offsets = F.pad(has.sum(1).cumsum(0), (1, 0))
        items = torch.arange(self.rows, dtype=torch.int32) * 7 % self.items
        return items.to(DEVICE), offsets.to(DEVICE), has.nonzero()[:, 1].int().to(DEVICE)

    def results(self, backend: str) -> Results:
        return results(lambda h, t: attribute_loss(h, t, *self.lists(), backend=backend), *self.matrices())


def results(
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], hidden: torch.Tensor, table: torch.Tensor
) -> Results:
    """The loss, and gradients of 0.7 times it."""
    hidden, table = hidden.detach().requires_grad_(), table.detach().requires_grad_()
    value = loss(hidden, table)
    grads = torch.autograd.grad(0.7 * value, (hidden, table))
    return {"loss": value.detach(), "grad of hidden": grads[0], "grad of table": grads[1]}


def dense_loss(hidden: torch.Tensor, table: torch.Tensor, lists: Lists) -> torch.Tensor:
    """The definition, with a target for every logit."""
    logits, targets = hidden @ table.T, torch.zeros(len(hidden), len(table), dtype=hidden.dtype)
    items, offsets, values = (x.tolist() for x in lists)
    for row, item in enumerate(items):
        targets[row, values[offsets[item] : offsets[item + 1]]] = 1
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")


def assert_is_the_cross_entropy(case: Case, backend: str) -> None:
    hidden, table = (x.double().cpu() for x in case.matrices())
    expected = results(lambda h, t: dense_loss(h, t, case.lists()), hidden, table)
    for name, value in case.results(backend).items():
        assert value.dtype == (torch.float32 if name == "loss" else case.dtype), name
        assert value.shape == expected[name].shape, name
        error = float((value.double().cpu() - expected[name]).norm())
        bound = ERROR[case.dtype] * float(expected[name].norm())
        assert error <= bound, f"{name} of {case}: error {error:.3g}, expected at most {bound:.3g}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize(
    ("rows", "attributes", "features"),
    [(1, 1, 1), (3, 70, 16), (67, 3, 100), (33, 65, 64), (5, 9, 256), (2, 18, 512)],
)
def test_it_is_the_binary_cross_entropy_against_every_attribute(
    backend: str, dtype: torch.dtype, rows: int, attributes: int, features: int
) -> None:
    assert_is_the_cross_entropy(Case(rows, attributes, features, dtype=dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("density", [0, 0.02, 1])
def test_items_have_no_attribute_few_or_all(backend: str, density: float) -> None:
    assert_is_the_cross_entropy(Case(20, 70, items=7, density=density), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=100 if HAS_CUDA else 10)
@given(
    case=st.builds(
        Case,
        rows=st.integers(0, 70),
        attributes=st.integers(1, 40),
        features=st.integers(1, 40),
        items=st.integers(1, 9),
        density=st.floats(0, 1),
        dtype=st.sampled_from(list(ERROR)),
        seed=st.integers(0, 1000),
    )
)
def test_any_shape_is_the_binary_cross_entropy(backend: str, case: Case) -> None:
    assert_is_the_cross_entropy(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ERROR, ids=str)
def test_without_rows_the_loss_is_zero_and_so_is_the_tables_gradient(backend: str, dtype: torch.dtype) -> None:
    found = Case(rows=0, dtype=dtype).results(backend)
    assert float(found["loss"]) == 0 and found["grad of hidden"].shape == (0, 16)
    assert torch.equal(found["grad of table"], torch.zeros_like(found["grad of table"]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_catalogue_without_attributes_makes_all_negatives(backend: str) -> None:
    hidden, table = Case().matrices()
    offsets, values = torch.zeros(7, dtype=torch.int64, device=DEVICE), torch.zeros(0, dtype=torch.int64, device=DEVICE)
    loss = attribute_loss(hidden, table, Case().lists()[0], offsets, values, backend=backend)
    assert float(loss) == pytest.approx(float(F.softplus(hidden @ table.T).sum()), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", ["hidden", "table", "both"])
def test_it_is_the_same_where_one_side_or_none_learns(backend: str, frozen: str) -> None:
    expected = Case().results(backend)
    hidden, table = Case().matrices()
    hidden.requires_grad_(frozen == "table")
    table.requires_grad_(frozen == "hidden")
    loss = attribute_loss(hidden, table, *Case().lists(), backend=backend)
    assert torch.equal(loss.detach(), expected["loss"])
    assert loss.requires_grad == (frozen != "both")
    if frozen != "both":
        (0.7 * loss).backward()
        learns, name = (hidden, "grad of hidden") if frozen == "table" else (table, "grad of table")
        assert torch.equal(learns.grad, expected[name])
    with torch.no_grad():
        assert torch.equal(attribute_loss(hidden, table, *Case().lists(), backend=backend), expected["loss"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_confident_and_right_loss_keeps_its_digits(backend: str) -> None:
    """Each of 900 logits costs e^-18: positives must not be subtracted from a sum that they dominate."""
    hidden, table = 36 * torch.eye(3, device=DEVICE).repeat(100, 1) - 18, torch.eye(3, device=DEVICE)
    items, offsets = torch.arange(3, device=DEVICE).repeat(100), torch.arange(4, device=DEVICE)
    loss = attribute_loss(hidden, table, items, offsets, offsets[:3], backend=backend)
    assert float(loss) == pytest.approx(900 * math.log1p(math.exp(-18)), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_far_from_zero_stay_finite(backend: str) -> None:
    hidden, table = Case().matrices()
    loss = results(lambda h, t: attribute_loss(h, t, *Case().lists(), backend=backend), hidden * 1e3, table)
    assert all(value.isfinite().all() for value in loss.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows(backend: str, value: float) -> None:
    hidden, table = Case().matrices()
    hidden[3, 2] = value
    assert not attribute_loss(hidden, table, *Case().lists(), backend=backend).isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_change_a_bit(backend: str) -> None:
    expected = Case().results(backend)
    hidden, table = Case().matrices()
    for view in (lambda x: torch.cat((x, x), 1)[:, :16], lambda x: x.T.contiguous().T):
        found = results(
            lambda h, t, view=view: attribute_loss(view(h), view(t), *Case().lists(), backend=backend), hidden, table
        )
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


# In plain PyTorch


@pytest.mark.parametrize(("logits", "least"), [(1, 1), (40, 1), (64, 1), (1, 512), (64, 8), (50, 10), (128, 512)])
def test_the_size_of_a_tile_changes_nothing(monkeypatch: pytest.MonkeyPatch, logits: int, least: int) -> None:
    """Of all attributes or some; fewer than a row, rows and attributes that do not divide the batch, several."""
    monkeypatch.setattr(reference, "LOGITS_PER_CHUNK", logits)
    monkeypatch.setattr(reference, "LEAST_ROWS", least)
    for dtype in ERROR:
        assert_is_the_cross_entropy(Case(rows=29, dtype=dtype), "reference")


@pytest.mark.parametrize("least", [1, 12, 512])
def test_no_more_logits_than_a_tile_has_exist_at_a_time(monkeypatch: pytest.MonkeyPatch, least: int) -> None:
    monkeypatch.setattr(reference, "LOGITS_PER_CHUNK", 50)
    monkeypatch.setattr(reference, "LEAST_ROWS", least)
    largest = 0
    product = torch.Tensor.__matmul__

    def watched(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        result = product(a, b)
        if a.shape[1] == 16:  # features: logits
            largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    Case(rows=30, attributes=20).results("reference")
    assert 20 <= largest <= 50


# On Triton's kernels


@needs_triton
@pytest.mark.parametrize("programs", [1, 5])
def test_however_the_work_is_split_it_is_the_same_loss(monkeypatch: pytest.MonkeyPatch, programs: int) -> None:
    """Alone, and two and three programs for each of three tiles; else every step has its own."""
    from s3rec_dist.kernels.attribute_loss import triton

    monkeypatch.setattr(triton, "PROGRAMS", programs)
    assert_is_the_cross_entropy(Case(rows=70, attributes=100), "triton")


@needs_triton
def test_work_is_split_into_whole_tiles_that_cover_it_and_about_as_many_programs_as_wanted() -> None:
    from s3rec_dist.kernels.attribute_loss.triton import PROGRAMS, _split

    for tiles in (0, 1, 2, 29, 255, 256, 257, 5000):
        for length in (0, 1, 64, 65, 638, 50_000, 3_000_000):
            parts, span = _split(tiles, length, 64)
            assert span % 64 == 0 and parts >= 1
            assert parts * span >= length and (parts - 1) * span < max(length, 1)
            assert parts == 1 or tiles * parts <= PROGRAMS + tiles


@needs_triton
def test_a_call_repeats_to_the_bit() -> None:
    case = Case(rows=70, attributes=70, dtype=torch.bfloat16)
    first, second = case.results("triton"), case.results("triton")
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@needs_triton
def test_it_is_forced_by_the_context_and_refused_where_it_cannot_be() -> None:
    case = replace(Case(), density=0.9)
    with forced_backend("triton"):
        forced = case.results("auto")
    assert all(torch.equal(value, forced[name]) for name, value in case.results("triton").items())
    wide = Case(features=TRITON_MOST_FEATURES + 1)
    with pytest.raises(ValueError, match="backend='triton' takes up to 512 features, not 513; use reference"):
        wide.results("triton")
    with forced_backend("triton"), pytest.raises(ValueError, match="backend='triton' takes up to 512 features"):
        wide.results("auto")
    assert wide.results("auto").keys() == wide.results("reference").keys()


@needs_cuda
def test_on_a_gpu_nothing_is_read_by_the_host() -> None:
    case = Case(rows=3000, attributes=638, features=64, items=500, dtype=torch.bfloat16)
    hidden, table = (x.requires_grad_() for x in case.matrices())
    lists = case.lists()

    def step() -> None:
        torch.autograd.grad(attribute_loss(hidden, table, *lists, backend="triton"), (hidden, table))

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# The operator


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("learns", [(True, True), (False, True)])
def test_the_operator_keeps_pytorchs_rules(backend: str, learns: tuple[bool, bool]) -> None:
    matrices = [x.requires_grad_(needed) for x, needed in zip(Case().matrices(), learns, strict=True)]
    torch.library.opcheck(_loss, (*matrices, *Case().lists(), *learns, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_compile_keeps_it_in_one_graph_for_all_counts_of_rows(backend: str) -> None:
    compilations = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        compilations.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def loss(hidden: torch.Tensor, table: torch.Tensor, *lists: torch.Tensor) -> torch.Tensor:
        return attribute_loss(hidden * 2, table, *lists, backend=backend).sqrt()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=count)
    for rows in (5, 9, 30):
        matrices, lists = Case(rows=rows).matrices(), Case(rows=rows).lists()
        eager, graph = (
            results(lambda h, t, call=call, lists=lists: call(h, t, *lists), *matrices) for call in (loss, compiled)
        )
        assert all(torch.equal(value, graph[name]) for name, value in eager.items())
    assert len(compilations) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden": torch.zeros(5)},
            r"expected hidden \[M, E\] and table \[A, E\] of one type; got \[5\] torch.float32",
        ),
        ({"table": torch.zeros(13, 8)}, r"expected hidden .* got \[5, 16\] torch.float32 and \[13, 8\] torch.float32"),
        ({"table": torch.zeros(13, 16).half()}, r"expected hidden .* and \[13, 16\] torch.float16"),
        ({"items": torch.zeros(4).int()}, r"items is \[4\]; expected \[5\], one for each row of hidden"),
        ({"backend": "fast"}, "backend='fast': expected auto, reference, sdpa, triton"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_expected(changes: dict[str, object], message: str) -> None:
    names = ("hidden", "table", "items", "offsets", "values")
    given = dict(zip(names, (*Case().matrices(), *Case().lists()), strict=True))
    with pytest.raises(ValueError, match=message):
        attribute_loss(**{**given, **changes})  # type: ignore[arg-type]
