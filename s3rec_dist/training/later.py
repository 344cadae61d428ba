"""Numbers that are read a step later than a GPU is asked for them, so that it always has the next step to do."""

from __future__ import annotations

import torch


class Later:
    """A tensor's one element on its way to this process. A GPU is not waited for until it is read."""

    def __init__(self, value: torch.Tensor) -> None:
        self._value, self._copied = value, None
        if value.device.type == "cuda":
            self._value = torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> float:
        """The number, once it is there."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._value.item()
