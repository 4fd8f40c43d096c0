"""What a CUDA graph is, on the CPU: operators that are recorded once and replayed in place."""

from typing import Any

import torch
from engine.graphs import Work
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class CpuRecorder:
    """Records the operators that work calls, with the very tensors that they are called on.

    As with a CUDA graph, a replay reads and writes the memory of the recording: numbers of Python
    are baked in, and so is everything that was allocated, while random numbers are drawn anew. To
    read a value back by item() or to ask which ones are not zero is an error while recording. What
    else CUDA refuses, copies between devices above all, cannot be seen here, and nothing that was
    recorded is ever freed. Unlike there the work is done once while it is
    recorded, so that everything it wrote to is put back afterwards.
    """

    def __init__(self) -> None:
        self.ran = self.recorded = self.replayed = 0

    def run(self, work: Work) -> None:
        self.ran += 1
        work()

    def record(self, work: Work) -> Work:
        self.recorded += 1
        random = torch.get_rng_state()
        recording = Recording()
        with recording:
            work()
        torch.set_rng_state(random)
        for tensor, value in recording.before.values():
            tensor.copy_(value)

        def replay() -> None:
            self.replayed += 1
            recording.replay()

        return replay


class Recording(TorchDispatchMode):
    """The operators called within this context."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        # By storage: what it held before the recording wrote to it.
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
            raise RuntimeError(f"{function} reads a value back: not while recording")
        inputs = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        written = function._schema.is_mutable
        if written:
            for tensor in inputs:
                self._keep(tensor)
        result = function(*args, **kwargs)
        outputs = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
        known = {t.untyped_storage()._cdata for t in inputs}
        fresh = [t for t in outputs if t.untyped_storage()._cdata not in known]
        self.made |= {t.untyped_storage()._cdata for t in fresh}
        if written or fresh:  # else a view, which stays one
            self.calls.append((function, args, kwargs, [] if written else outputs))
        return result

    def _keep(self, tensor: Tensor) -> None:
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
