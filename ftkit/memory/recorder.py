"""Follow storages from allocation to release."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

from ftkit.memory import kernels
from ftkit.memory.events import ALLOCATE, FREE, GRADIENT, WORK, WORKSPACE, Events
from ftkit.memory.work import Counter


class Recorder:
    """Follows storages from allocation to release, as a torch dispatch mode."""

    def __init__(self, workspaces: dict[Any, Callable[..., int]]) -> None:
        from torch.utils._python_dispatch import TorchDispatchMode

        recorder = self

        class Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                return recorder.dispatch(func, args, kwargs or {})

        self.events = Events()
        self._counter = Counter()
        self.phase = "forward"
        self.labels: list[str] = ["inputs"]
        self._mode: Any = Mode()  # type: ignore[no-untyped-call]
        self._workspaces = workspaces
        self._live: dict[int, tuple[int, Any]] = {}  # address of a storage → its number and what tells of its end
        self._ignored: set[int] = set()
        self._next = 0
        self._closed = False
        self.head_begins = False  # with the next allocation: what the last layer leaves behind is released before
        import torch

        self._add, self._tensor = torch.ops.aten.add.Tensor, torch.Tensor
        self._add_in_place = torch.ops.aten.add_.Tensor
        self._uses = torch._C._storage_Use_Count
        self._recomputes = torch.is_grad_enabled

    def __enter__(self) -> Recorder:
        self._mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)
        self._closed = True

    def ignore(self, tensor: Any) -> None:
        """Weights are there before the step; they are counted apart."""
        self._ignored.add(tensor.untyped_storage()._cdata)
        self._counter.weight(tensor)

    def number(self, tensor: Any) -> int:
        """The number of a live tensor's storage."""
        return self._live[tensor.untyped_storage()._cdata][0]

    def mark(self, name: str, number: int) -> None:
        for what, count in self._counter.take():
            self.events.add(WORK, -1, count, what)
        self.events.marks.append((len(self.events.kinds), (name, number)))

    def backward_begins(self, layer: int) -> None:
        self.labels = ["layers"]
        self.mark("backward", layer)

    def gradient(self, parameter: Any) -> None:
        self.events.add(GRADIENT, self.number(parameter.grad), 0, "gradients")

    def dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is self._add and self.phase == "backward" and len(args) == 2 and not kwargs:
            added = self._accumulate(args)
            if added is not None:
                return added
        out = func(*args, **kwargs)
        self._see(out)
        self._counter.see(func, args, kwargs, out)
        workspace = self._workspaces.get(func)
        if workspace:
            self.events.add(WORKSPACE, -1, workspace(args), "kernel workspaces")
        return out

    def _label(self) -> str:
        # The engine runs without gradients; what has them in the backward pass is a layer that checkpointing recomputes.
        return self.labels[-1] if self.phase == "forward" or self._recomputes() else "gradients in flight"

    def _accumulate(self, args: Any) -> Any:
        """The autograd engine sums two gradients in place where nothing else holds the first; under a mode it would not."""
        a, b = args
        if not (isinstance(a, self._tensor) and isinstance(b, self._tensor) and a.shape == b.shape and a.dtype == b.dtype):
            return None
        frame: Any = sys._getframe(2)
        while frame is not None and frame.f_code.co_name in ("__torch_dispatch__", "handler", "_wrapped", "inner", "_fn", "dispatch"):
            frame = frame.f_back
        if frame is None or frame.f_code.co_name != "_engine_run_backward":
            return None
        for into, other in ((a, b), (b, a)):
            if self._uses(into.untyped_storage()._cdata) <= 3:  # the engine's buffer, this argument, the wrapper
                return self._add_in_place(into, other)
        return None

    def _see(self, out: Any) -> None:
        if isinstance(out, self._tensor):
            storage = out.untyped_storage()
            address = storage._cdata
            if address in self._live or address in self._ignored:
                return
            size = storage.nbytes()
            if size == 0:
                return
            if self.head_begins:
                self.head_begins = False
                self.mark("head", 0)
            number = self._next
            self._next += 1

            tiled = out.dim() == 2 and out.shape[1] == kernels.HEAD_TILE_VOCABULARY

            def released(_: Any) -> None:
                del self._live[address]
                self._counter.forget(address)
                if not self._closed:
                    self.events.add(FREE, number, size, "", tiled)

            self._live[address] = (number, weakref.ref(storage, released))
            self.events.add(ALLOCATE, number, size, self._label(), tiled)
        elif isinstance(out, (tuple, list)):
            for item in out:
                self._see(item)
