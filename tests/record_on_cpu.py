"""CUDA graphs' behaviour on the CPU: operators are captured once and replayed in place."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from kernels.graphs import Graphs, Work


class CpuGraphs(Graphs):
    """Captures the operators that work calls, with the very tensors that they are called on.

    As with a CUDA graph, a replay reads and writes the memory of the capture: Python's numbers are
    constants, everything that was allocated stays where it is, and random numbers are drawn anew.
    To read a value back by item(), or to ask which values are not zero, is an error in a capture.
    Other things that CUDA refuses, copies between devices above all, pass unnoticed. A capture does
    the work once, and then restores all that it wrote to.

    Args:
        generator: that the work draws from, besides torch's default one.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generators = [torch.default_generator, *([generator] if generator else [])]
        self.seen, self.replays = set(), {}
        self.ran = self.captured = self.replayed = 0

    def run_eagerly(self, work: Work) -> None:
        self.ran += 1
        work()

    def capture(self, work: Work) -> Work:
        self.captured += 1
        states = [generator.get_state() for generator in self.generators]
        captured = Capture()
        with captured:
            work()
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)
        for tensor, value in captured.before.values():
            tensor.copy_(value)

        def replay() -> None:
            self.replayed += 1
            captured.replay()

        return replay


class Capture(TorchDispatchMode):
    """The operators called within this context."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        # By storage: what it held before the capture wrote to it.
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.made: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.item.default,
            torch.ops.aten.nonzero.default,
        ):
            raise RuntimeError(f"{function} reads a value back: not in a capture")
        inputs = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        written = function._schema.is_mutable
        if written:
            for tensor in inputs:
                self._save(tensor)
        result = function(*args, **kwargs)
        outputs = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
        known = {t.untyped_storage()._cdata for t in inputs}
        fresh = [t for t in outputs if t.untyped_storage()._cdata not in known]
        self.made |= {t.untyped_storage()._cdata for t in fresh}
        if written or fresh:  # else a view, which stays one
            self.calls.append((function, args, kwargs, [] if written else outputs))
        return result

    def _save(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.made and storage._cdata not in self.before:
            whole = torch.empty(0, dtype=tensor.dtype).set_(storage)  # type: ignore[call-overload]
            self.before[storage._cdata] = (whole, whole.clone())

    @torch.no_grad()
    def replay(self) -> None:
        """Call the operators again, on the same memory."""
        for function, args, kwargs, outputs in self.calls:
            result = function(*args, **kwargs)
            for old, new in zip(outputs, tree_flatten(result)[0], strict=False):
                old.copy_(new)
