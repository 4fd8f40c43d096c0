"""Chooses the kernel of each part of an update: layers, decoder, step."""

from dataclasses import dataclass

import torch

from decoders.linear import Linear
from kernels import fused_step, linear_cross_entropy, lstm_cpu, lstm_cudnn
from kernels.in_dtype import DecoderInDtype, LayerInDtype
from kernels.linear_cross_entropy import FastLinear
from kernels.lstm_cpu import CpuLSTM
from kernels.lstm_cudnn import CudnnLSTM
from layers.layer import Layer
from loss_scale import AnyLossScale
from model import RNNModel


@dataclass(frozen=True)
class Choice:
    """The kernel of a part, "plain" for plain torch, and why no faster one fits."""

    kernel: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.kernel} ({self.reason})" if self.reason else self.kernel


def in_words(choices: dict[str, Choice]) -> str:
    """The kernels of all parts; if all are plain, in a word."""
    if all(choice.kernel == "plain" for choice in choices.values()):
        return f"plain kernels ({next(iter(choices.values())).reason})"
    return " | ".join(f"{part}: {choice}" for part, choice in choices.items())


def install(
    model: RNNModel, dtype: torch.dtype | None, device: torch.device, fast: bool = True
) -> dict[str, Choice]:
    """Install the fastest kernels that fit in the model's layers and decoder, for training.

    Evaluation stays plain torch in float32, and checkpoints do not depend on kernels. In 16 bits,
    weights, their gradients, states, penalties and the loss stay float32.

    Args:
        model: the model, on the device.
        dtype: bfloat16 or float16, for layers and decoder; None: their weights' dtype.
        device: the training device.
        fast: False: plain torch, the reference.

    Returns:
        The choices for "layers" and "decoder".
    """
    choices = [_install_layer(layer, dtype, device, fast) for layer in model.layers]
    layers = max(choices, key=lambda choice: choice.kernel != "plain")
    return {"layers": layers, "decoder": _install_decoder(model, dtype, device, fast)}


def _install_layer(
    layer: Layer, dtype: torch.dtype | None, device: torch.device, fast: bool
) -> Choice:
    layer.kernel = LayerInDtype(layer, dtype) if dtype is not None else None
    layer.mask_dtype = dtype
    if not fast:
        return Choice("plain", "as asked")
    if device.type == "cuda":
        if reason := lstm_cudnn.why_not(layer, dtype, device):
            return Choice("plain", reason)
        own = dtype or next(layer.parameters()).dtype
        layer.kernel = CudnnLSTM(layer.width, layer.units, own, device)
        return Choice(CudnnLSTM.name)
    reason = lstm_cpu.why_not(layer, dtype, device)
    if reason or dtype is None:
        return Choice("plain", reason)
    layer.kernel = CpuLSTM(dtype)
    packed = lstm_cpu.can_pack(dtype)
    return Choice(CpuLSTM.name, "" if packed else "this CPU or PyTorch cannot pack its weights")


def _install_decoder(
    model: RNNModel, dtype: torch.dtype | None, device: torch.device, fast: bool
) -> Choice:
    decoder = model.decoder
    decoder.kernel = DecoderInDtype(decoder, dtype) if dtype is not None else None
    if not fast:
        return Choice("plain", "as asked")
    reason = linear_cross_entropy.why_not(decoder, dtype, device)
    if reason or not isinstance(decoder, Linear):
        return Choice("plain", reason)
    decoder.kernel = FastLinear(decoder, dtype)
    return Choice(FastLinear.name)


def choose_step(
    optimizer: torch.optim.Optimizer,
    dtype: torch.dtype | None,
    device: torch.device,
    fast: bool,
    loss_scale: AnyLossScale | None = None,
) -> Choice:
    """Choose between FusedStep and PlainStep ("plain")."""
    if not fast:
        return Choice("plain", "as asked")
    if reason := fused_step.why_not(optimizer, dtype, device, loss_scale):
        return Choice("plain", reason)
    return Choice(fused_step.FusedStep.name)
