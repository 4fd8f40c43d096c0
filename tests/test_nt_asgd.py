"""NT-ASGD against its definition, in float64 and in loops."""

import pytest
import torch
from torch import nn

from nt_asgd import NTASGD


def triggers(history: list[float], nonmono: int | None) -> int | None:
    """The epoch (from 1) at which averaging starts on this history."""
    optimizer = NTASGD([nn.Parameter(torch.zeros(1))], lr=1, nonmono=nonmono)
    started = [epoch for epoch, loss in enumerate(history, 1) if optimizer.observe(loss)]
    assert len(started) <= 1
    return started[0] if started else None


@pytest.mark.parametrize(
    ("nonmono", "history", "expected"),
    [
        (0, [5.0], None),
        (0, [5, 4, 3, 3.5], 4),
        (0, [5, 5, 5], None),  # not worse, so no trigger
        (0, [5, 4, 4.5], 3),
        (1, [5, 4, 4.5], None),  # 4.5 > 5 is false: the last epoch is forgiven
        (1, [5, 4, 4.5, 4.2], 4),  # 4.2 > min(5, 4)
        (2, [5, 4, 4.5, 4.2, 4.1], 5),
        (5, [6, 5, 4, 3, 2, 7], None),  # only 5 losses before the sixth: not more than n
        (5, [6, 5, 4, 3, 2, 1, 5.5], None),
        (5, [1, 9, 9, 9, 9, 9, 2], 7),
        (None, [1, 2, 3, 4, 5, 6, 7, 8, 9], None),
    ],
)
def test_trigger(nonmono: int | None, history: list[float], expected: int | None) -> None:
    assert triggers(history, nonmono) == expected


def problem() -> tuple[list[nn.Parameter], list[torch.Tensor]]:
    params = [nn.Parameter(torch.randn(3, 2).double()), nn.Parameter(torch.randn(4).double())]
    return params, [p.detach().clone() for p in params]


def test_steps_and_average_are_those_of_the_definition(device: torch.device) -> None:
    params, w = problem()
    params = [nn.Parameter(p.detach().to(device)) for p in params]
    optimizer = NTASGD(params, lr=0.5, weight_decay=0.1, nonmono=0)
    iterates: list[list[torch.Tensor]] = []
    for step in range(12):
        if step == 5:
            optimizer.observe(1.0)
            assert optimizer.observe(2.0)
            with optimizer.averaged_weights():  # nothing to average yet: the iterate itself
                torch.testing.assert_close(params[0].detach().cpu(), w[0])
        lr = 0.5 + 0.1 * step  # a rate holds for the step that it is set for
        optimizer.param_groups[0]["lr"] = lr
        for i, p in enumerate(params):
            grad = torch.randn_like(w[i])
            p.grad = grad.to(device)
            w[i] = w[i] - lr * (grad + 0.1 * w[i])
        optimizer.step()
        if step >= 5:
            iterates.append([v.clone() for v in w])
        for p, v in zip(params, w, strict=True):
            torch.testing.assert_close(p.detach().cpu(), v)
    with optimizer.averaged_weights():
        for i, p in enumerate(params):
            mean = sum(it[i] for it in iterates) / len(iterates)
            torch.testing.assert_close(p.detach().cpu(), mean, rtol=1e-12, atol=1e-12)
    for p, v in zip(params, w, strict=True):  # the iterate is back
        torch.testing.assert_close(p.detach().cpu(), v)


def test_averaging_from_the_first_step_on() -> None:
    """Every iterate is averaged, not the first weights; the trigger fires once and is kept."""
    p = nn.Parameter(torch.zeros(1).double())
    optimizer = NTASGD([p], lr=1, nonmono=1, averaging=True)
    p.grad = torch.full_like(p, -1)
    for _ in range(3):  # 1, 2, 3
        optimizer.step()
    with optimizer.averaged_weights():
        assert p.item() == 2
    for loss, fires in ((5, False), (4, False), (4.5, False), (4.2, True), (9, False)):
        assert optimizer.observe(loss) == fires  # 4.2 > min(5, 4)
        assert optimizer.averaging  # whether it fires or not
        resumed = NTASGD([nn.Parameter(torch.zeros(1))], lr=1)
        resumed.load_state_dict(optimizer.state_dict())
        assert resumed.triggered == optimizer.triggered == (len(resumed.history) > 3)


def test_a_state_without_triggered_is_one_of_the_switch() -> None:
    optimizer = NTASGD([nn.Parameter(torch.zeros(1))], lr=1, nonmono=0)
    for averaging in (False, True):
        state = optimizer.state_dict()
        state["nt_asgd"].update(averaging=averaging, history=[1.0])
        del state["nt_asgd"]["triggered"]
        optimizer.load_state_dict(state)
        assert optimizer.observe(2.0) != averaging


def test_parameters_without_gradient_are_averaged_too_and_not_moved() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.full((2,), 3.0))
    optimizer = NTASGD([used, unused], lr=1, weight_decay=0.5, nonmono=0)
    optimizer.observe(1.0)
    optimizer.observe(2.0)
    used.grad = torch.ones(2)
    optimizer.step()
    assert unused.tolist() == [3, 3]
    with optimizer.averaged_weights():
        assert unused.tolist() == [3, 3]


@pytest.mark.parametrize(
    "wrong", [dict(lr=0), dict(weight_decay=-1), dict(nonmono=-1), dict(decay=1)]
)
def test_values_out_of_range(wrong: dict) -> None:
    with pytest.raises(ValueError, match="must"):
        NTASGD([nn.Parameter(torch.zeros(1))], **{"lr": 1, **wrong})
