"""Files that are pickles, read without running anything.

    tree = load_tensors("S3Rec-ml-100k-50.pth", Storage(), allow_pickle=True)
    dataset = load_object("ml-100k-SequentialDataset.pth", Storage(), allow_pickle=True)
    tables = state_of(dataset)["field2id_token"]

Tensors and plain values are made; whatever else a pickle names becomes an object without effect, :class:`Inert`.
"""

from __future__ import annotations

import pickle
import re
import types
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from s3rec_dist.export import ExportError
from s3rec_dist.storage import Storage, StorageError


def load_tensors(path: str, storage: Storage, *, allow_pickle: bool) -> Any:
    """What ``torch.load(weights_only=True)`` gives; with ``allow_pickle`` also of a file that it refuses, where objects
    are :class:`Inert`. Raises :class:`ExportError`."""
    try:
        with storage.at_hand(path) as local:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch's, about the pickle protocol that RecBole asks for
                    return torch.load(local, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError as error:
                if not allow_pickle:
                    raise _needs_consent(path) from error
                return torch.load(local, map_location="cpu", weights_only=False, pickle_module=_inert_pickle())
    except (OSError, StorageError, ExportError):
        raise
    except Exception as error:  # torch raises whatever its zip reader and unpickler meet
        raise ExportError(f"{path}: cannot be read as a torch file ({_line(error)})") from error


def load_object(path: str, storage: Storage, *, allow_pickle: bool) -> Any:
    """The object of a pickle, :class:`Inert` as far as it is no plain value. Raises :class:`ExportError`."""
    if not allow_pickle:
        raise _needs_consent(path)
    try:
        with storage.open(path) as file:
            return _Unpickler(file).load()
    except (OSError, StorageError):
        raise
    except Exception as error:  # pickle raises whatever it meets
        raise ExportError(f"{path}: cannot be read as a pickle ({_line(error)})") from error


def _needs_consent(path: str) -> ExportError:
    return ExportError(
        f"{path}: is a pickle of more than tensors and plain values, as RecBole saves them, and was not read; pass "
        "--allow-pickle to have it read: what it names stays unknown, and nothing of it is imported or run"
    )


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


class Inert:
    """Takes the place of every class and function that a pickle names: keeps what it is given, does nothing."""

    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *arguments: Any, **options: Any) -> Inert:
        inert = object.__new__(cls)
        inert.arguments = arguments
        return inert

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None:
        """For pickles of list-like objects."""

    def extend(self, items: Iterable[Any]) -> None:
        """For pickles of list-like objects."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """For pickles of dict-like objects."""


class _Unpickler(pickle.Unpickler):
    """Makes tensors and plain values; everything else that a pickle names is :class:`Inert`, NumPy's too, of which a
    forged array could point anywhere."""

    def find_class(self, module: str, name: str) -> Any:
        """What makes dictionaries and tensors, or something inert of that name."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *arguments: torch._utils._rebuild_tensor_v2(*arguments)  # one that a pickle may change
        return type(name, (Inert,), {})


def _inert_pickle() -> types.ModuleType:
    """What torch.load takes as ``pickle_module``."""
    module = types.ModuleType("inert_pickle")
    vars(module).update(Unpickler=_Unpickler, load=lambda file, **options: _Unpickler(file, **options).load())
    return module


def texts(value: Any) -> list[str]:
    """The strings of a list, or of an array or a scalar of NumPy that was unpickled inert. Raises ValueError, TypeError
    or LookupError for anything else."""
    kind, dtype, data = type(value).__name__, None, value
    if isinstance(value, Inert) and kind == "_reconstruct":
        _, _, dtype, _, data = value.state
    elif isinstance(value, Inert) and kind == "scalar":
        dtype, data = value.arguments
    if isinstance(data, bytes) and isinstance(dtype, Inert):
        form = f"{dtype.state[1]}{dtype.arguments[0]}"
        if re.fullmatch(r"[<>]U[1-9]\d*", form):
            return np.frombuffer(data, form).tolist()
    if not isinstance(data, (list, tuple)) or not all(isinstance(text, (str, int)) for text in data):
        raise ValueError(f"expected strings, found {kind}")
    return [str(text) for text in data]


def state_of(value: Any) -> Mapping[str, Any]:
    """The attributes of an object that was unpickled inert, or a mapping itself; empty where there are none."""
    state = value.state if isinstance(value, Inert) else value
    return state if isinstance(state, Mapping) else {}
