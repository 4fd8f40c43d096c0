"""What the device is, and two figures that say whether it is as fast as it should be."""

import subprocess
from collections.abc import Iterator

import torch

from benchmarks.probes.clock import Clock, Row, Sizes, noted

QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw"
QUERY += ",power.limit,temperature.gpu"


def rows(sizes: Sizes, clock: Clock) -> Iterator[Row]:
    """Versions, clocks as found, bandwidth of a copy, rates of matrix products."""
    cuda = torch.cuda.get_device_properties(clock.device) if clock.on_gpu else None
    yield dict(fact="device", value=cuda.name if cuda else "CPU")
    if cuda:
        yield dict(fact="multiprocessors", value=cuda.multi_processor_count)
        yield dict(fact="memory, GiB", value=cuda.total_memory / 2**30)
    yield dict(fact="torch", value=torch.__version__)
    yield dict(fact="CUDA", value=torch.version.cuda or "")
    yield dict(fact="cuDNN", value=torch.backends.cudnn.version() or "")
    yield _nvidia_smi("clocks as found")
    for name, dtype in (("bf16", torch.bfloat16), ("fp32 as tf32", torch.float32)):
        row: Row = dict(fact=f"{sizes.matmul}³ product in {name}, TFLOP/s")
        with noted(row):
            torch.set_float32_matmul_precision("high")
            a, b = (
                torch.randn(sizes.matmul, sizes.matmul, device=clock.device).to(dtype)
                for _ in range(2)
            )
            ms = clock.ms(lambda _, a=a, b=b: a @ b)  # type: ignore[misc]
            row["value"] = 2 * sizes.matmul**3 / ms / 1e9
        yield row
    row = dict(fact="copy on the device, TB/s read and written")
    with noted(row):
        source = torch.randint(256, (sizes.copied,), dtype=torch.uint8, device=clock.device)
        target = torch.empty_like(source)
        row["value"] = 2 * sizes.copied / clock.ms(lambda _: target.copy_(source)) / 1e9
    yield row
    row = dict(fact="an empty kernel launched, host µs")
    with noted(row):
        one = torch.zeros(1, device=clock.device)
        row["value"] = 1000 * clock.host_ms(lambda _: one.add_(1))
    yield row
    yield _nvidia_smi("clocks afterwards")


def _nvidia_smi(fact: str) -> Row:
    """What nvidia-smi says; it is only asked."""
    row: Row = dict(fact=f"{fact}: {QUERY}")
    with noted(row):
        command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        row["value"] = result.stdout.strip().replace("\n", "; ")
    return row


def headline(rows: list[Row]) -> str:
    """The first few."""
    found = {r["fact"]: r.get("value") for r in rows}
    return ", ".join(f"{k} {v}" for k, v in found.items() if k in ("device", "torch", "cuDNN"))
