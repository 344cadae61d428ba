"""Training's state at one moment, copied to host memory so that it can be written while training goes on."""

from __future__ import annotations

import copy
from typing import Any

import torch


class HostCopies:
    """Copies of trees of tensors. Their memory, as much as the tensors have, is kept for the next copy, pinned where
    tensors lie on a GPU: only one tree at a time."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []

    def of(self, tree: Any) -> Any:
        """A copy of dicts, lists, tensors and whatever else. Tensors that share memory share its copy, as files of
        ``torch.save`` do. It is valid until the next call."""
        copied: dict[int, torch.Tensor] = {}
        result = self._copy(tree, copied)
        del self._buffers[len(copied) :]
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return result

    def _copy(self, node: Any, copied: dict[int, torch.Tensor]) -> Any:
        if isinstance(node, torch.Tensor):
            return self._copy_tensor(node.detach(), copied)
        if isinstance(node, dict):
            same = copy.copy(node)  # an OrderedDict of torch's has attributes
            same.update({key: self._copy(value, copied) for key, value in node.items()})
            return same
        if type(node) in (list, tuple):
            return type(node)(self._copy(value, copied) for value in node)
        return copy.deepcopy(node)

    def _copy_tensor(self, tensor: torch.Tensor, copied: dict[int, torch.Tensor]) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in copied:
            source = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            target = self._buffer(len(copied), len(source), tensor.is_cuda)
            copied[storage.data_ptr()] = target.copy_(source, non_blocking=True)
        place = tensor.storage_offset(), tensor.shape, tensor.stride()
        return torch.empty(0, dtype=tensor.dtype).set_(copied[storage.data_ptr()].untyped_storage(), *place)

    def _buffer(self, number: int, size: int, pinned: bool) -> torch.Tensor:
        """The ``number``-th buffer, of this size: the tensors of one training come in the same order every time."""
        buffers = self._buffers
        if number == len(buffers) or (len(buffers[number]), buffers[number].is_pinned()) != (size, pinned):
            buffers[number : number + 1] = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned)]
        return buffers[number]
