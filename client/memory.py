"""What a computation takes of memory, found without its numbers.

Run on torch's ``meta`` device, an operation gives the shape of its answer and touches no data. So
what a network's training takes is a function of the spec alone, the same on every machine, and can
be known of an image that would not fit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OF_KERNELS = 1.25
"""What convolutions take for themselves while they run: 0.1 beside the tensors was measured."""


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that the tensors made by `work` hold at one time.

    What a kernel takes for itself while it runs is not among them.
    """
    living = _Living()
    with living:
        work()
    return living.peak


class _Living(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows each storage that an operation makes until it is let go."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._now = 0
        self._known: weakref.WeakSet[UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self,
        operation: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        made = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._meet(tensor.untyped_storage())
        self.peak = max(self.peak, self._now)
        return made

    def _meet(self, storage: UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        self._now += storage.nbytes()
        weakref.finalize(storage, self._part, storage.nbytes())

    def _part(self, size: int) -> None:
        self._now -= size
