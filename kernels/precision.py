"""Number formats of training's matrix products: fp32, tf32, bf16, fp16."""

import torch

from kernels.lstm_cudnn import TRIAL_UNITS, failure_of, trial_layer

DTYPES = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(name: str, device: torch.device) -> str:
    """Resolve auto, and check that the device can compute in a precision.

    Weights, optimizer, averages, norms, penalties and losses are always float32; the precision is
    that of matrix products. fp32: IEEE single precision. tf32: a GPU's tensor cores use 10 bits of
    the factors' fractions. bf16, fp16: weights and inputs of layers and decoder are cast to 16
    bits.

    Args:
        name: fp32, tf32, bf16, fp16, or auto: tf32 on a GPU that has it, else fp32.
        device: the training device.

    Returns:
        fp32, tf32, bf16 or fp16; see set_products.

    Raises:
        ValueError: the device does not support it.
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
    """Set the precision of a GPU's matrix products, for the whole process.

    torch has no narrower setting. Only programs call this, never the library.

    Args:
        precision: fp32, tf32, bf16 or fp16.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
        torch.backends.cudnn.allow_tf32 = precision != "fp32"
        # Products of 16-bit numbers are summed in float32.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
