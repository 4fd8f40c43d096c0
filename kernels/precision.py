"""The number formats that training computes in."""

import torch

from kernels.lstm_cudnn import TRIAL_UNITS, failure_of, trial_layer

DTYPES = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(name: str, device: torch.device) -> str:
    """Resolve auto, and say where the device cannot compute in a precision.

    Weights, optimizer, averages, norms, penalties and losses are float32 in each; this is about
    the matrix products. fp32: IEEE single precision throughout. tf32: a GPU's tensor cores take
    the factors' first 10 bits of fraction. bf16, fp16: layers and decoder get weights and inputs
    that are cast to 16 bits.

    Args:
        name: fp32, tf32, bf16, fp16, or auto: tf32 on a GPU that has it, else fp32.
        device: where training will compute.

    Returns:
        The precision chosen; see set_products.

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
    dtype = DTYPES[name]
    if dtype is not None and (failure := failure_of(lambda: _try_out(dtype, device))):
        raise ValueError(f"{device} cannot train an LSTM in {name}: {failure}")
    return name


def _try_out(dtype: torch.dtype, device: torch.device) -> None:
    """Run a small layer and a product forward and backward."""
    layer = trial_layer(dtype, device)
    x = torch.zeros(2, 3, TRIAL_UNITS, dtype=dtype, device=device, requires_grad=True)
    output, _ = layer(x, layer.init_state(3))
    (output @ output.transpose(1, 2)).float().sum().backward()


def set_products(precision: str, device: torch.device) -> None:
    """Set what a GPU's products of float32 and of 16 bits may be, for the whole process.

    torch has no narrower setting, so that programs call this, and nothing else does.

    Args:
        precision: fp32, tf32, bf16 or fp16.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
        torch.backends.cudnn.allow_tf32 = precision != "fp32"
        # Sums of products of 16 bits are float32 throughout.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
