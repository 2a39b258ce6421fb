"""What a CUDA graph does, without a GPU: the operator calls of one step, repeated with their recorded scalars and addresses.

Replaying runs no Python of the model. Results are written where they were in the recording. Memory from outside of the step is
named by its address and must still be there: the tape does not keep it alive.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

# operators for whose result the host waits
READS = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::equal"}


class Calls(TorchDispatchMode):
    """`call(func, args, kwargs)` runs every operator inside the block, down to those that inference mode leaves composite."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **(kwargs or {}))
        return self.call(func, args, kwargs or {})


class Outside:
    """A tensor in memory that was there before the step."""

    def __init__(self, tensor: Tensor, storage: StorageWeakRef) -> None:
        self.storage, self.address, self.dtype = storage, tensor.untyped_storage().data_ptr(), tensor.dtype
        self.place = tensor.storage_offset(), tensor.shape, tensor.stride()

    def tensor(self) -> Tensor:
        storage = None if self.storage.expired() else torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        assert storage is not None and storage.data_ptr() == self.address, "a replay reads memory that was freed"
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.place)


class Tape(Calls):
    """Records a step: `with tape: out = step()`, then `end(out)`; `replay()` fills `out` anew."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.outside: dict[int, StorageWeakRef] = {}
        self.made: dict[int, Tensor] = {}
        self.replays = 0

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        assert func.name() not in READS, f"{func} reads a value of the device while a graph is recorded"
        recorded = tree_map(self._name, (args, kwargs))
        out = func(*args, **kwargs)
        new = [t for t in tensors(out) if key(t) not in self.outside and key(t) not in self.made]
        self.made |= {key(t): t for t in new}
        if new or func._schema.is_mutable:  # else a view: nothing runs
            self.calls.append((func, *recorded, [t if any(t is n for n in new) else None for t in tensors(out)]))
        return out

    def _name(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or key(value) in self.made:
            return value
        storage = self.outside.setdefault(key(value), StorageWeakRef(value.untyped_storage()))
        return Outside(value, storage)

    def end(self, out: Tensor) -> None:
        """A recording of a graph computes nothing: whatever is read of it before a replay is wrong."""
        assert out.numel() == 0 or key(out) in self.made
        for tensor in self.made.values():
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, results in self.calls:
            args, kwargs = tree_map(lambda v: v.tensor() if isinstance(v, Outside) else v, (args, kwargs))
            for old, new in zip(results, tensors(func(*args, **kwargs)), strict=True):
                if old is not None:
                    old.copy_(new)


def tensors(out: Any) -> list[Tensor]:
    return [t for t in tree_iter(out) if isinstance(t, Tensor)]


def key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Tapes(list[Tape]):
    """A capture function, and the tapes that it has made."""

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        tape = Tape()
        with tape:
            out = step()
        tape.end(out)
        self.append(tape)
        return tape.replay, out


@contextmanager
def recorded(monkeypatch, capture: Any) -> Iterator[Any]:
    """Streams with a window use this capture function (None: none)."""
    with monkeypatch.context() as patch:
        patch.setattr("dit_ops.pipelines.stages.capture_of", lambda backbone, windowed: capture if windowed else None)
        yield capture
