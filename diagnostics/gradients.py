"""The gradient of a whole window: each parameter's share of it, and the effect of clipping."""

import math
from typing import Any, NamedTuple

from torch import Tensor, nn

from model import Hidden, repackage_hidden
from noise import Noise
from training.objective import Objective

CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_'s guard against a norm of 0


class WindowGradient(NamedTuple):
    """The result of one window's backward pass.

    Attributes:
        loss: mean cross-entropy without the penalties, nats per token.
        norms: norm of the gradient of each parameter, a tied matrix under its first name.
        inputs: gradient of each layer's input, (T, B, features).
        hidden: states after the window.
    """

    loss: float
    norms: dict[str, float]
    inputs: list[Tensor]
    hidden: Hidden

    @property
    def norm(self) -> float:
        """The global norm, which clipping limits."""
        return math.hypot(*self.norms.values())


def window_gradient(
    objective: Objective, rows: Tensor, hidden: Hidden, noise: Noise | None = None
) -> WindowGradient:
    """The gradient that an update would get from a window, before clipping.

    The model's own gradients are not kept.

    Args:
        objective: training's, with the dropout that the model's mode says.
        rows: the window's word ids and the row after it, (T + 1, B).
        hidden: states before the window; their history is cut off.
        noise: see RNNModel.forward.

    Raises:
        OverflowError: the gradient is not finite.
    """
    inputs: list[Tensor] = []

    def catch(_: nn.Module, arguments: Any) -> None:
        arguments[0].retain_grad()
        inputs.append(arguments[0])

    model = objective.model
    hooks = [layer.register_forward_pre_hook(catch) for layer in model.layers]
    model.zero_grad(set_to_none=True)
    try:
        before = repackage_hidden(hidden)
        loss, total, hidden = objective(rows[:-1], rows[1:], before, noise)
    finally:
        for hook in hooks:
            hook.remove()
    total.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    norms = {name: float(gradient.norm()) for name, gradient in gradients.items()}
    model.zero_grad(set_to_none=True)
    if not math.isfinite(math.hypot(*norms.values())):
        raise OverflowError("the gradient of a window is not finite")
    caught = [x.grad for x in inputs if x.grad is not None]
    return WindowGradient(float(loss), norms, caught, repackage_hidden(hidden))


def part_of(name: str) -> str:
    """Which part of the model a parameter belongs to: embedding, layer 0, layer 1, …, decoder.

    The tied matrix is called encoder.weight, and so belongs to the embedding.
    """
    first, *rest = name.split(".")
    return f"layer {rest[0]}" if first == "rnns" else {"encoder": "embedding"}.get(first, first)


def shares(norms: dict[str, float]) -> dict[str, float]:
    """Each parameter's share of the squared global norm; the shares add up to 1.

    All 0 where the gradient is.
    """
    total = math.hypot(*norms.values())
    return {name: (norm / total) ** 2 if total > 0 else 0.0 for name, norm in norms.items()}


def by_part(norms: dict[str, float]) -> dict[str, float]:
    """Norm of the gradient of each part of the model."""
    parts: dict[str, list[float]] = {}
    for name, norm in norms.items():
        parts.setdefault(part_of(name), []).append(norm)
    return {part: math.hypot(*own) for part, own in parts.items()}


def clip_factor(norm: float, clip: float) -> float:
    """The factor by which clipping scales a gradient of this global norm; clip 0: no clipping."""
    return min(1.0, clip / (norm + CLIP_EPS)) if clip else 1.0
