"""NT-ASGD: SGD that starts averaging its iterates when validation stops improving."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class NTASGD(torch.optim.Optimizer):
    """Non-monotonically triggered averaged SGD.

    Merity et al. 2017 (arXiv:1708.02182), algorithm 1. Each step is w <- w - lr (g + wd w). At
    the end of an epoch `observe` compares the validation loss with the best loss from more than
    nonmono epochs ago. Once it is worse, the optimizer averages all iterates from the next step on,
    and `averaged_weights` swaps the average in for validation, test and checkpoints. The iterate
    itself is never overwritten.

    With decay the trigger divides the learning rates instead and clears its history: plain SGD
    "in the same non-monotonic fashion", to which the paper's ablation (section 6) compares NT-ASGD,
    dividing by 2. The paper does not say what happens to the history.

    With averaging, iterates are averaged from the first step on (T = 0), the first one included:
    fine-tuning, section 5. The trigger then has nothing to start; `triggered` tells that it fired.

    Unlike torch.optim.ASGD, which the paper's code used, a learning rate takes effect in the step
    it is set for, and the first iterate is part of the average.

    Args:
        params: parameters or groups of parameters.
        lr: learning rate, > 0; groups may change theirs at any time.
        weight_decay: L2 penalty's factor, >= 0.
        nonmono: epochs without improvement that are tolerated, >= 0; None: averaging never starts.
        decay: divisor of the learning rates at each trigger, > 1; None: the trigger starts
            averaging.
        averaging: average from the first step on.

    Attributes:
        averaging: True if iterates are averaged.
        triggered: True once the trigger has fired, unless it divides learning rates.

    Raises:
        ValueError: a value outside these ranges.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float = 0.0,
        nonmono: int | None = 5,
        decay: float | None = None,
        averaging: bool = False,
    ) -> None:
        if not lr > 0:
            raise ValueError(f"lr is {lr}; it must be above 0")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay is {weight_decay}; it must not be negative")
        if nonmono is not None and nonmono < 0:
            raise ValueError(f"nonmono is {nonmono}; it must not be negative")
        if decay is not None and not decay > 1:
            raise ValueError(f"decay is {decay}; it must be above 1")
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))
        self.nonmono = nonmono
        self.decay = decay
        self.history: list[float] = []
        self.averaging = averaging
        self.triggered = False
        self.num_averaged = 0

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Take one SGD step and, while averaging, update the average; no device synchronisation."""
        self.num_averaged += self.averaging
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                if group["weight_decay"]:
                    torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, [p.grad for p in params], alpha=-group["lr"])
            if self.averaging:
                self._average(group["params"])

    def _average(self, params: list[Tensor]) -> None:
        for p in params:
            if "average" not in self.state[p]:
                self.state[p]["average"] = torch.zeros_like(p)
        averages = [self.state[p]["average"] for p in params]
        # m_k = m_(k-1) + (w_k - m_(k-1)) / k; exact for k = 1, whatever the average held.
        torch._foreach_lerp_(averages, params, 1 / self.num_averaged)

    def observe(self, valid_loss: float) -> bool:
        """Give the trigger an epoch's validation loss, nats per token.

        Returns:
            True if this call fired the trigger; averaging runs from then on.
        """
        earlier = self.history[: max(0, len(self.history) - (self.nonmono or 0))]
        self.history.append(valid_loss)
        if self.triggered or self.nonmono is None or not earlier:
            return False
        worse = valid_loss > min(earlier)
        if worse and self.decay is not None:
            for group in self.param_groups:
                group["lr"] /= self.decay
            self.history.clear()
            return False
        self.triggered = worse
        self.averaging |= worse
        return worse

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Swap the average, if any, into the parameters within this context; do not step inside."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if "average" in self.state[p]:
                    average = self.state[p]["average"]
                    self.state[p]["average"] = p.data
                    p.data = average

    def state_dict(self) -> dict[str, Any]:
        """Learning rates, averages, their count and the trigger's history."""
        state: dict[str, Any] = super().state_dict()
        state["nt_asgd"] = dict(
            nonmono=self.nonmono,
            history=list(self.history),
            averaging=self.averaging,
            triggered=self.triggered,
            num_averaged=self.num_averaged,
        )
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what state_dict returned."""
        super().load_state_dict(state_dict)
        trigger = state_dict["nt_asgd"]
        self.nonmono = trigger["nonmono"]
        self.history = list(trigger["history"])
        self.averaging = trigger["averaging"]
        self.triggered = trigger.get("triggered", self.averaging)  # in older checkpoints the same
        self.num_averaged = trigger["num_averaged"]
