"""The number formats that training computes in."""

from collections.abc import Callable

import torch
from torch import nn

from lstm_cpu import can_pack
from lstm_cudnn import CudnnLSTM

# Of a layer that is tried out: for smaller ones, up to 192, cuDNN has other kernels.
TRIAL_UNITS = 200
TRIAL_TOLERANCE = 0.03  # outputs lie within 1, and bfloat16 has 8 bits
Trial = Callable[[torch.dtype, torch.device], None]
DTYPES = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(name: str, device: torch.device) -> str:
    """Make the device compute in a precision, or say that it cannot.

    Weights, optimizer, averages, norms, penalties and losses are float32 in each; this is about
    the matrix products. fp32: IEEE single precision throughout. tf32: a GPU's tensor cores take
    the factors' first 10 bits of fraction. bf16, fp16: layers and decoder get weights and inputs
    that are cast to 16 bits.

    Args:
        name: fp32, tf32, bf16, fp16, or auto: tf32 on a GPU that has it, else fp32.
        device: where training will compute. What products of float32 it allows is set for the
            whole process.

    Returns:
        The precision chosen.

    Raises:
        ValueError: the device cannot do it.
    """
    gpu = device.type == "cuda"
    has_tf32 = gpu and torch.cuda.get_device_capability(device)[0] >= 8
    if name == "auto":
        name = "tf32" if has_tf32 else "fp32"
    if name == "tf32" and not has_tf32:
        what = "this GPU is older" if gpu else "this is a CPU"
        raise ValueError(f"tf32 needs a GPU of compute capability 8.0 or more; {what}")
    allow_products(name, device)
    dtype = DTYPES[name]
    if dtype is not None and (failure := _failure(_try_out, dtype, device)):
        raise ValueError(f"{device} cannot train an LSTM in {name}: {failure}")
    return name


def allow_products(precision: str, device: torch.device) -> None:
    """Set what a GPU's products of float32 and of 16 bits may be, for the whole process.

    Args:
        precision: fp32, tf32, bf16 or fp16.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
        torch.backends.cudnn.allow_tf32 = precision != "fp32"
        # Sums of products of 16 bits are float32 throughout.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def choose_kernel(precision: str, device: torch.device) -> tuple[str, str]:
    """The fastest kernel (see RNNModel.compute_in) for a precision, and why it is this one."""
    if device.type == "cuda":
        if not torch.backends.cudnn.is_available():
            return "plain", "this PyTorch has no cuDNN"
        if failure := cudnn_failure(DTYPES[precision] or torch.float32, device):
            return "plain", f"cuDNN's layer fails: {failure}"
        return "cudnn", "over weights of its own"
    if precision != "bf16":
        return "plain", "a CPU has a faster one for bf16 only"
    packed = "" if can_pack(torch.bfloat16) else "; this CPU or PyTorch cannot pack its weights"
    return "cpu", f"for bf16{packed}"


def cudnn_failure(dtype: torch.dtype, device: torch.device) -> str:
    """Why our layer over cuDNN does not work, found by trying a small one; "": it does."""
    return _failure(_try_cudnn, dtype, device)


def _try_cudnn(dtype: torch.dtype, device: torch.device) -> None:
    """Run our layer forward and backward, and nn.LSTM, which has to come to the same."""
    lstm = _trial_layer(dtype, device)
    x = torch.linspace(-1, 1, 16 * TRIAL_UNITS, device=device).view(2, 8, -1).to(dtype)
    x.requires_grad_()
    zero = x.new_zeros(1, 8, TRIAL_UNITS)
    layer = CudnnLSTM(TRIAL_UNITS, TRIAL_UNITS, dtype, device)
    output, _ = layer(x, (zero, zero), list(lstm.parameters()))
    output.float().sum().backward()
    difference = float((output - lstm(x)[0]).detach().abs().max())
    if not difference < TRIAL_TOLERANCE:
        raise RuntimeError(f"it is {difference:g} off")


def _try_out(dtype: torch.dtype, device: torch.device) -> None:
    """Run a small layer and a product forward and backward."""
    x = torch.zeros(2, 3, TRIAL_UNITS, dtype=dtype, device=device, requires_grad=True)
    output, _ = _trial_layer(dtype, device)(x)
    (output @ output.transpose(1, 2)).float().sum().backward()


def _trial_layer(dtype: torch.dtype, device: torch.device) -> nn.LSTM:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        return nn.LSTM(TRIAL_UNITS, TRIAL_UNITS, device=device, dtype=dtype)


def _failure(trial: Trial, dtype: torch.dtype, device: torch.device) -> str:
    """What a trial fails with, in a line; "": it does not. A lack of memory is no answer."""
    try:
        trial(dtype, device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return " ".join(str(error).split())[:120]
    return ""
