"""Sixteen bits, and each fast kernel against float64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Result
from cudnn_on_cpu import install_gpu_kernels
from torch import Tensor

from bptt import Window
from decoders.linear import Linear
from kernels.choose import install
from kernels.linear_cross_entropy import FastLinear
from kernels.lstm_cpu import CpuLSTM
from kernels.precision import DTYPES, choose_precision, set_products
from layers.lstm import LSTM
from model import RNNModel
from noise import Noise
from training.gradient import WindowGradient
from training.objective import Objective, paper_penalties

Run = Callable[..., Result]
CPU = torch.device("cpu")
SIZES = dict(ntoken=40, ninp=24, nhid=36, nlayers=3)
RATES = dict(dropout=0.4, dropouth=0.25, dropouti=0.3, dropoute=0.1, wdrop=0.5)


def make_model(**changes: Any) -> RNNModel:
    torch.manual_seed(1)
    return RNNModel("LSTM", **{**SIZES, **RATES, "tie_weights": True, **changes})


def loss_and_gradients(
    model: RNNModel, rows: Tensor, scale: float = 1.0
) -> tuple[float, dict[str, Tensor]]:
    """Of one window run in two pieces, with AR and TAR; the noise is the same for all models."""
    gradient = WindowGradient(Objective(model, paper_penalties(alpha=2.0, beta=1.0)))
    window = Window(0, len(rows) - 1, pieces=(4, len(rows) - 5))
    noise = Noise(torch.Generator().manual_seed(3))
    loss, _ = gradient(window, rows, model.init_hidden(rows.size(1)), noise, scale)
    grads = {n: p.grad / scale for n, p in model.named_parameters() if p.grad is not None}
    assert all(p.grad.dtype == p.dtype for p in model.parameters() if p.grad is not None)
    return float(loss), grads


def plain(model: RNNModel, dtype: torch.dtype | None) -> None:
    choices = install(model, dtype, CPU, fast=False)
    assert {str(choice) for choice in choices.values()} == {"plain (as asked)"}


def fast_in_16_bits(model: RNNModel, dtype: torch.dtype | None) -> None:
    names = {part: choice.kernel for part, choice in install(model, dtype, CPU).items()}
    assert names == {"layers": "cpu", "decoder": "linear_cross_entropy"}


def fast_in_32_bits(model: RNNModel, dtype: torch.dtype | None) -> None:
    for layer in model.layers:
        layer.kernel = CpuLSTM(torch.float32)
    assert isinstance(model.decoder, Linear)
    model.decoder.kernel = FastLinear(model.decoder, None)


@pytest.mark.usefixtures("with_cudnn")
@pytest.mark.parametrize(
    ("dtype", "prepare", "tolerance"),
    [
        (torch.bfloat16, plain, 0.03),
        (torch.bfloat16, fast_in_16_bits, 0.03),
        (torch.bfloat16, install_gpu_kernels, 0.03),
        (torch.float16, plain, 0.004),
        (None, plain, 1e-5),
        (None, fast_in_32_bits, 1e-5),
        (None, install_gpu_kernels, 1e-5),
    ],
)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(grad_filter=0.5, grad_filter_normalize=True),
        dict(tie_weights=False, wdrop=0, nlayers=1),
    ],
    ids=str,
)
def test_loss_and_gradients_against_float64(
    dtype: torch.dtype | None,
    prepare: Callable[[RNNModel, torch.dtype | None], None],
    tolerance: float,
    changes: dict[str, Any],
) -> None:
    model, exact = make_model(**changes), make_model(**changes).double()
    rows = torch.randint(0, 40, (12, 6))
    prepare(model, dtype)
    loss, grads = loss_and_gradients(model, rows, 1024.0 if dtype == torch.float16 else 1.0)
    expected, exact_grads = loss_and_gradients(exact, rows)
    assert loss == pytest.approx(expected, rel=tolerance / 10)
    assert grads.keys() == exact_grads.keys()
    for name, grad in grads.items():
        error = (grad.double() - exact_grads[name]).norm() / exact_grads[name].norm()
        assert error < tolerance, (name, float(error))


@pytest.mark.parametrize("fast", [False, True])
def test_evaluation_stays_in_full_precision(fast: bool) -> None:
    model = make_model().eval()
    words = torch.randint(0, 40, (9, 4))
    config = model.config()
    expected, _ = model(words, model.init_hidden(4))
    logits = model.decoder(expected)
    install(model, torch.bfloat16, CPU, fast)
    found, hidden = model(words, model.init_hidden(4))
    assert torch.equal(found, expected)
    assert torch.equal(model.decoder(found), logits)
    assert found.dtype == hidden[0][0].dtype == torch.float32
    model.train()
    _, hidden = model(words, model.init_hidden(4))
    assert {part.dtype for state in hidden for part in state} == {torch.float32}
    assert model.config() == config


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_decoder_computes_in_the_dtype(dtype: torch.dtype, fast: bool) -> None:
    """What it is given is rounded first, though locked dropout has made it float32."""
    model = make_model().train()
    output, targets = torch.randn(20, 24), torch.randint(0, 40, (20,))
    exact = model.decoder.loss(output, targets)
    install(model, dtype, CPU, fast)
    loss = model.decoder.loss(output, targets)
    assert torch.equal(loss, model.decoder.loss(output.to(dtype).float(), targets))
    assert loss.dtype == torch.float32
    assert loss != exact
    torch.testing.assert_close(loss, exact, rtol=0.01, atol=0)


def test_a_precision_that_the_device_lacks_is_one_line(
    run: Run, tmp_path: Path, flags: list[str]
) -> None:
    result = run(*flags, "--precision", "tf32", "--save", tmp_path / "a.pt")
    message = "error: argument --precision: tf32 needs a GPU of compute capability 8.0 or more"
    assert (result.code, result.out) == (2, "")
    assert result.err == f"{message}; this is a CPU\n"
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("precision", list(DTYPES))
def test_on_a_gpu_only_fp32_has_exact_products_of_float32(precision: str) -> None:
    """And in each precision products of 16 bits are summed in float32."""
    products: Any = torch.backends.cuda.matmul
    sums = [f"allow_{name}_reduced_precision_reduction" for name in ("bf16", "fp16")]
    before = {name: getattr(products, name) for name in sums}
    try:
        for name in sums:
            setattr(products, name, True)
        set_products(precision, torch.device("cuda"))
        assert not any(getattr(products, name) for name in sums)
    finally:
        for name, value in before.items():
            setattr(products, name, value)
    exact = torch.get_float32_matmul_precision() == "highest", not torch.backends.cudnn.allow_tf32
    assert exact == (precision == "fp32",) * 2


def test_a_device_that_cannot_do_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: LSTM, *_: object) -> None:
        raise RuntimeError('"addmm_impl_cpu_" not implemented\nfor Half')

    monkeypatch.setattr(LSTM, "compute", refuse)
    with pytest.raises(ValueError, match="cannot train an LSTM in fp16"):
        choose_precision("fp16", CPU)
    assert choose_precision("auto", CPU) == "fp32"
