"""Runs a table's runs on a Ray cluster. The only module that imports ray."""

import importlib
import os
import threading
from pathlib import Path
from typing import Any

from engine.ablation.pool import PROGRAM, Tick, execute
from engine.ablation.runs import Run
from engine.errors import RunError
from engine.interrupt import Interrupt

# A task whose node dies is run again on another, where its run resumes.
RETRIES = 20


def run_on_ray(
    runs: list[Run],
    address: str | None,
    *,
    threads: int,
    gpus: float | None,
    interrupt: Interrupt,
    tick: Tick,
) -> None:
    """Run them on a cluster whose nodes share this folder and this program's.

    Args:
        address: of the cluster; None: RAY_ADDRESS, or a cluster of this machine alone.
        threads: CPUs of each run.
        gpus: GPUs of each run, fractions allowed; None: 1 where the cluster has any.

    Raises:
        RunError: Ray is not installed, cannot be reached, or has no node that is large enough.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        raise RunError("--ray: ray is not installed (requirements-cluster.txt)") from None
    path = os.pathsep.join([str(PROGRAM.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = dict(env_vars=dict(PYTHONPATH=path))
    try:
        ray.init(address=address, log_to_driver=False, runtime_env=environment)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"--ray: cannot reach {address or 'a cluster'}: {reason}") from error
    try:
        total = ray.cluster_resources()
        gpus = gpus if gpus is not None else float(total.get("GPU", 0) >= 1)
        _check_fits(ray.nodes(), threads, gpus)
        task = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=RETRIES)(_execute)
        names = {task.remote(run, threads, str(Path.cwd())): run.name for run in runs}
        _gather(ray, names, interrupt, tick)
    finally:
        ray.shutdown()


def _check_fits(nodes: list[dict[str, Any]], threads: int, gpus: float) -> None:
    """Refuse tasks that no node can hold: Ray would wait for one for ever."""
    sizes = [node["Resources"] for node in nodes if node["Alive"]]
    if not any(s.get("CPU", 0) >= threads and s.get("GPU", 0) >= gpus for s in sizes):
        raise RunError(f"--ray: no node of the cluster has {threads} CPUs and {gpus:g} GPUs")


def _gather(ray: Any, names: dict[Any, str], interrupt: Interrupt, tick: Tick) -> None:
    """Wait for all tasks; on an interrupt, cancel them and wait for their checkpoints."""
    pending, cancelled = list(names), False
    while pending:
        done, pending = ray.wait(pending, timeout=1.0)
        for task in done:
            try:
                ray.get(task)
            except ray.exceptions.RayError as error:
                if not cancelled:
                    reason = " ".join(str(error).split())[:300]
                    raise RunError(f"--ray: {names[task]}: {reason}") from error
        tick({names[task] for task in pending}, {names[task] for task in done})
        if interrupt.requested and not cancelled:
            cancelled = True
            for task in pending:
                ray.cancel(task)


def _execute(run: Run, threads: int, folder: str) -> None:
    """A Ray task: one run, on this node."""
    os.chdir(folder)
    places = dict(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    execute(run, places, threading.Event())
