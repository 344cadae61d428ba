"""Which backend computes an operator: the fastest that takes the tensors, or the one that is asked for, or an error."""

from __future__ import annotations

import re
import threading

import pytest
import torch
from attention_case import Case

from s3rec_dist.kernels.backends import BACKENDS, choose_backend, explain_backend, forced_backend, use_triton

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_auto_is_the_fast_path_of_the_device_and_says_why() -> None:
    assert explain_backend("auto", CPU, torch.float32, 32) == ("sdpa", "the fast path on a CPU")
    assert not use_triton(CPU, torch.float32)
    case = Case((3, 5))
    for name, value in case.results("auto").items():
        assert torch.equal(value, case.results("sdpa")[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_that_is_asked_for_is_taken(backend: str) -> None:
    assert explain_backend(backend, CPU, torch.float64, 7) == (backend, "asked for")
    assert not use_triton(CUDA, torch.float32, backend)


@pytest.mark.parametrize(
    ("installed", "capability", "dtype", "head_size", "obstacle"),
    [
        (True, (9, 0), torch.bfloat16, 64, None),
        (True, (8, 0), torch.float32, 16, None),
        (False, (9, 0), torch.bfloat16, 64, "needs the package triton, which is not installed"),
        (True, (9, 0), torch.float64, 64, "takes float32, float16, bfloat16, not torch.float64"),
        (True, (9, 0), torch.bfloat16, 48, "takes head sizes 16, 32, 64, 128, not 48"),
        (True, (7, 5), torch.float16, 64, "needs a device of compute capability 8.0 or above"),
    ],
)
def test_on_a_gpu_auto_is_triton_where_it_can_be_and_asking_for_it_elsewhere_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
    installed: bool,
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_size: int,
    obstacle: str | None,
) -> None:
    monkeypatch.setattr("s3rec_dist.kernels.backends._HAS_TRITON", installed)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    auto = explain_backend("auto", CUDA, dtype, head_size)
    if obstacle is None:
        assert auto == ("triton", "the fast path on a GPU")
        assert choose_backend("triton", CUDA, dtype, head_size) == "triton"
    else:
        assert auto == ("sdpa", f"triton {obstacle}")
        with pytest.raises(ValueError, match=re.escape(f"backend='triton' {obstacle}; use reference or sdpa")):
            choose_backend("triton", CUDA, dtype, head_size)
    if obstacle is None or "head sizes" in obstacle:  # which concern attention alone
        assert use_triton(CUDA, dtype) and use_triton(CUDA, dtype, "triton")
    else:
        assert not use_triton(CUDA, dtype)
        with pytest.raises(ValueError, match=re.escape(f"backend='triton' {obstacle}; use reference") + "$"):
            use_triton(CUDA, dtype, "triton")


def test_on_a_cpu_triton_only_runs_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s3rec_dist.kernels.backends._HAS_TRITON", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_backend("triton", CPU, torch.float32, 32) == "triton" and use_triton(CPU, torch.float32, "triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    for choose in (lambda: Case((3,)).results("triton"), lambda: use_triton(CPU, torch.float32, "triton")):
        with pytest.raises(ValueError, match="needs a CUDA device, or the environment variable TRITON_INTERPRET=1"):
            choose()


def test_a_forced_backend_overrides_what_was_asked_for_until_its_block_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s3rec_dist.kernels.backends._HAS_TRITON", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def chosen(wanted: str) -> tuple[str, bool]:
        return choose_backend(wanted, CPU, torch.float32, 32), use_triton(CPU, torch.float32, wanted)

    with forced_backend("triton"):
        assert chosen("auto") == chosen("reference") == ("triton", True)
        with pytest.raises(ZeroDivisionError), forced_backend("reference"):
            assert chosen("auto") == chosen("triton") == ("reference", False)
            _ = 1 / 0
        assert chosen("auto") == ("triton", True)
        elsewhere: list[tuple[str, bool]] = []
        thread = threading.Thread(target=lambda: elsewhere.append(chosen("auto")))
        thread.start()
        thread.join()
        assert elsewhere == [("sdpa", False)]
    with forced_backend("sdpa"):
        assert chosen("triton") == ("sdpa", False)
    assert chosen("auto") == ("sdpa", False)


def test_what_cannot_be_forced_is_an_error_that_names_what_can() -> None:
    with pytest.raises(ValueError, match="backend='flash': expected auto, reference, sdpa, triton"):
        use_triton(CPU, torch.float32, "flash")
    with pytest.raises(ValueError, match="backend='auto': expected reference, sdpa, triton"), forced_backend("auto"):
        pass
    with forced_backend("triton"), pytest.raises(ValueError, match="takes head sizes 16, 32, 64, 128, not 7; use ref"):
        Case((3,), d=7).results("auto")


def test_forcing_a_backend_does_not_break_a_compiled_graph() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * (3 if use_triton(x.device, x.dtype) else 2)

    compiled = torch.compile(double, backend="eager", fullgraph=True)
    with forced_backend("triton"):
        assert compiled(torch.ones(1)) == 2
