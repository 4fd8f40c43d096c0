"""Clipping, weight decay, SGD and averaging in a few kernels, without device synchronisation."""

from itertools import accumulate

import torch
from torch import Tensor

from loss_scale import AnyLossScale, LogMax, LossScale
from nt_asgd import NTASGD

# Each parameter's offset in the flat buffer is a multiple of this many elements.
ALIGNMENT = 64
# As in torch.nn.utils.clip_grad_norm_.
NORM_EPS = 1e-6


class FusedStep:
    """Clipping and NTASGD's step, fused; unscales the gradients first.

    With S the loss scale, N the norm of the gradients divided by S, and lr, wd the optimizer's:

        w <- w - lr (g / (S max(1, (N + 1e-6) / clip)) + wd w)

    in one kernel over all parameters; a second kernel updates the average. The parameters move into
    one flat buffer, their averages into another. Learning rate, scale and number of averaged
    iterates are on the device, which also detects overflows, skips their updates and adapts the
    scale by LossScale's rules. So a captured graph of the step stays valid, and no update
    synchronises with the device.

    The norm is computed before unscaling, in the gradients' dtype: in float32 a product S N above
    1.8e19 counts as an overflow, too.

    Checkpoints store the state of the optimizer and the loss scale; `note` keeps their counts up to
    date, and `restore` reads them.

    Args:
        optimizer: has one group of parameters, all of one floating dtype and on one device.
        clip: largest global norm of the gradient; 0: no clipping.
        loss_scale: initial scale and rules; None: scale 1, and no update is skipped.
    """

    name = "fused"
    synchronizes = False

    def __init__(self, optimizer: NTASGD, clip: float, loss_scale: LossScale | None = None) -> None:
        (group,) = optimizer.param_groups
        self.optimizer = optimizer
        self.clip = clip
        self.loss_scale = loss_scale
        self.params: list[Tensor] = group["params"]
        self.weight_decay: float = group["weight_decay"]
        sizes = [-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in self.params]
        self.starts = [0, *accumulate(sizes)]
        like = self.params[0].detach()
        self.weights = like.new_zeros(self.starts[-1])
        self.views = self._views(self.weights)
        for p, view in zip(self.params, self.views, strict=True):
            p.data = view.copy_(p.detach())
        self.averages: Tensor | None = None
        self.averaging = False
        zero = torch.zeros((), device=like.device)
        self.rate, self.norm = zero.clone(), zero.clone().to(like.dtype)
        self.overflow = None if loss_scale is None else zero.clone()
        self.scale, self.clean = zero.clone(), zero.clone().int()
        self.num_averaged = zero.clone().to(like.dtype)
        self.restore()

    def _views(self, flat: Tensor) -> list[Tensor]:
        """The parameters' parts of a flat buffer."""
        return [
            flat[start : start + p.numel()].view(p.shape)
            for start, p in zip(self.starts, self.params, strict=False)
        ]

    def restore(self) -> None:
        """See training.step.PlainStep."""
        rules = self.loss_scale
        self.scale.fill_(1 if rules is None else rules.value)
        self.clean.fill_(0 if rules is None else rules.clean)
        self._restore_averages()

    def _restore_averages(self) -> None:
        self.averaging = self.optimizer.averaging
        self.num_averaged.fill_(self.optimizer.num_averaged)
        if not self.averaging:
            return
        if self.averages is None:
            self.averages = self.weights.clone()
        for p, view in zip(self.params, self._views(self.averages), strict=True):
            # Before the first averaged iterate, the average is a copy of the weights.
            view.copy_(self.optimizer.state[p].get("average", p.detach()))
            self.optimizer.state[p]["average"] = view

    def prepare(self, factor: float) -> None:
        """See training.step.PlainStep. Averaging may have begun since the last step."""
        if self.averaging != self.optimizer.averaging:
            self._restore_averages()
        self.rate.fill_(self.optimizer.param_groups[0]["lr"] * factor)

    @torch.no_grad()
    def __call__(self, loss: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """See training.step.PlainStep. The next step overwrites what this one returns."""
        pairs = zip(self.views, self.params, strict=True)
        trained = [(view, p.grad) for view, p in pairs if p.grad is not None]
        weights, gradients = [view for view, _ in trained], [gradient for _, gradient in trained]
        self.norm.copy_(torch.nn.utils.get_total_norm(gradients) / self.scale)
        divisor = self.scale
        if self.clip:
            divisor = divisor * ((self.norm + NORM_EPS) / self.clip).clamp(min=1).to(divisor.dtype)
        if self.overflow is not None:
            self.overflow.copy_(torch.isfinite(loss) & ~torch.isfinite(self.norm))
        torch._fused_sgd_(
            weights, gradients, [], weight_decay=self.weight_decay, momentum=0.0, lr=self.rate,
            dampening=0.0, nesterov=False, maximize=False, is_first_step=False,
            grad_scale=divisor, found_inf=self.overflow,
        )  # fmt: skip
        if self.averages is not None and self.averaging:
            self._average(self.averages)
        rules = self.loss_scale
        if rules is not None and rules.dynamic and self.overflow is not None:
            torch._amp_update_scale_(self.scale, self.clean, self.overflow, 2.0, 0.5, rules.window)
            largest = torch.finfo(self.scale.dtype).max
            self.scale.clamp_(min(rules.low, largest), min(rules.high, largest))
        return self.norm, self.overflow, None

    def _average(self, averages: Tensor) -> None:
        counts = 1.0 if self.overflow is None else 1 - self.overflow.to(self.num_averaged.dtype)
        self.num_averaged += counts
        # m_k = m_(k-1) + (w_k - m_(k-1)) / k; a skipped update has weight 0.
        averages.lerp_(self.weights, counts / self.num_averaged.clamp(min=1))

    def note(self, overflow: bool) -> None:
        """Count the update's iterate in the optimizer. (LossScaling adapts the loss scale.)"""
        self.optimizer.num_averaged += self.averaging and not overflow


def why_not(
    optimizer: torch.optim.Optimizer,
    dtype: torch.dtype | None,
    device: torch.device,
    loss_scale: AnyLossScale | None = None,
) -> str:
    """Reason why FusedStep does not fit; empty if it fits."""
    if not isinstance(optimizer, NTASGD):
        return f"{type(optimizer).__name__} steps by itself"
    if len(optimizer.param_groups) != 1:
        return "there are several groups of parameters"
    if isinstance(loss_scale, LogMax):
        return "--loss-scale logmax reads each update's largest gradient"
    if device.type != "cuda" and dtype != torch.bfloat16:
        return "a CPU has a fused step for bf16 only"
    return ""
