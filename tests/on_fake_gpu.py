"""A GPU's updates at the paper's size, on a GPU that is not there.

Tensors have shapes, dtypes and a device, but no data (PyTorch's FakeTensorMode). An operator that
mixes devices fails, and so does all that reads a value back, for there is none. So the program
ends well only if all of an update is on the GPU and nothing waits for it.

    LD_PRELOAD=LIBRARY python on_fake_gpu.py

LIBRARY is fake_gpu.cpp, compiled. Prints a line a case.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from engine.fused_update import FusedUpdater
from engine.loss_scale import LossScale
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from bptt import FixedWindows, FullWindows, RandomizedWindows, Scheme
from evaluation.plain import evaluate
from model import RNNModel
from nt_asgd import NTASGD

BATCH, WORDS, STEPS = 20, 10000, 400
SCHEMES: list[Scheme] = [
    FixedWindows(70), FixedWindows(70, 35), FixedWindows(35, 70), RandomizedWindows(35, 0.5, 1),
    FullWindows(100),
]  # fmt: skip
RATES = dict(dropout=0.4, dropouth=0.25, dropouti=0.4, dropoute=0.1, wdrop=0.5)
CASES: list[tuple[torch.dtype | None, dict[str, Any]]] = [
    (None, {}),
    (torch.bfloat16, {}),
    (torch.float16, {}),
    (torch.float16, dict(grad_filter=10.0)),
    (torch.bfloat16, dict(dict.fromkeys(RATES, 0.0), nlayers=1, tie_weights=False)),
]


# What PyTorch has for a real GPU only, and no function that tells the shapes.


def flatten_weight(weights: list[Tensor], *_: Any) -> Tensor:
    return weights[0].new_zeros(sum(w.numel() for w in weights))


def rnn_backward(
    x: Tensor, weights: list[Tensor], stride: int, buffer: Tensor, h: Tensor, c: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    given = [h, c, *(g for g in rest[:4] if g is not None)]
    assert all(g.dtype == x.dtype and g.is_contiguous() for g in given)
    of_weights = [torch.empty_like(w) for w in weights] if rest[-1][3] else []
    return torch.empty_like(x), torch.empty_like(h), torch.empty_like(c), of_weights


def fused_sgd(parameters: list[Tensor], gradients: list[Tensor], *_: Any, **options: Any) -> None:
    """Refuses what the real one refuses: other strides than the parameter's."""
    for p, g in zip(parameters, gradients, strict=True):
        assert (p.shape, p.stride(), p.dtype) == (g.shape, g.stride(), g.dtype)
    numbers = [options.get(name) for name in ("lr", "grad_scale", "found_inf")]
    assert all(n is None or n.dtype == torch.float32 for n in numbers)


@contextmanager
def operators() -> Iterator[None]:
    library = torch.library.Library("aten", "IMPL")
    library.impl("_cudnn_rnn_flatten_weight", flatten_weight, "Meta")
    library.impl("_cudnn_rnn_backward", rnn_backward, "Meta")
    library.impl("_fused_sgd_.tensor_lr", fused_sgd, "Meta")
    try:
        yield
    finally:
        library._destroy()


class Watch(TorchDispatchMode):
    """Sees to it that no operator takes or gives a tensor that is not on the GPU.

    Counts what turns numbers of 32 bits into numbers of 16, by how many they are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.casts: Counter[int] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_flatten((args, kwargs, result))[0] if isinstance(t, Tensor)]
        assert all(t.is_cuda for t in tensors), function
        name = function.overloadpacket.__name__
        if name in ("copy_", "_to_copy", "mul") and result.itemsize == 2:
            source = args[1] if name == "copy_" else args[0]
            if source.itemsize == 4:
                self.casts[result.numel()] += 1
        return result


def update(dtype: torch.dtype | None, changes: dict[str, Any]) -> None:
    """Updates in every scheme, of which each casts each weight once."""
    settings: dict[str, Any] = dict(RATES, tie_weights=True, nlayers=3) | changes
    nlayers = settings.pop("nlayers")
    with torch.device("cuda"):
        model = RNNModel("LSTM", WORDS, 400, 1150, nlayers, **settings)
    model.compute_in(dtype, "cudnn")
    rows = torch.zeros(STEPS + 1, BATCH, dtype=torch.int64, device="cuda")
    updater = FusedUpdater(
        model, rows, NTASGD(model.parameters(), 30.0, 1.2e-6), bptt=70, clip=0.25, alpha=2.0,
        beta=1.0, loss_scale=LossScale() if dtype == torch.float16 else None,
    )  # fmt: skip
    used = [*model.rnns.parameters(), *model.decoder.parameters()]  # in products
    sizes = Counter(w.numel() for w in used if w.dim() == 2)
    hidden = model.init_hidden(BATCH)
    for number, scheme in enumerate(SCHEMES):
        updater.optimizer.averaging = number > 1  # type: ignore[attr-defined]
        window = max(scheme.windows(STEPS), key=lambda window: len(window.pieces))
        with Watch() as watch:
            step = updater(window, hidden)
        hidden = step.hidden
        if dtype is not None:
            assert {size: watch.casts[size] for size in sizes} == sizes, scheme


class ReadBacks(TorchDispatchMode):
    """Counts values that are read back, and makes them up."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
            return 1.0
        return function(*args, **(kwargs or {}))


def evaluation() -> None:
    """It reads a single value back, the loss."""
    with torch.device("cuda"):
        model = RNNModel("LSTM", WORDS, 400, 1150, 3, **RATES, tie_weights=True)
    with ReadBacks() as found:
        evaluate(model, torch.zeros(20001, dtype=torch.int32), 10)
    assert found.count == 1


if __name__ == "__main__":
    with FakeTensorMode(), operators():
        for case in CASES:
            update(*case)
            print(*case)
        evaluation()
        print("evaluation")
