"""Logs a run's events to metrics.jsonl and Weights & Biases.

The only module that imports wandb, which is optional, on first use.
"""

import importlib
import shlex
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.metrics_file import MetricsFile
from engine.output import one_line

# Timeouts, seconds; W&B itself would wait for a dead network for ever.
INIT_SECONDS = 60.0
FINISH_SECONDS = 60.0
TEARDOWN_SECONDS = 15.0


def warn(message: str) -> None:
    """Print one line, `warning: …`, to stderr, above a progress bar if there is one."""
    line = "warning: " + one_line(" ".join(message.split()))
    if "tqdm" in sys.modules:  # else the line would land in the middle of the bar
        with suppress(Exception):
            sys.modules["tqdm"].tqdm.write(line, file=sys.stderr)
            return
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class WandbOptions:
    """The user's settings of Weights & Biases.

    None leaves a field to WANDB_PROJECT, WANDB_NAME, WANDB_RUN_GROUP or WANDB_TAGS; the default
    project is `awd-lstm`, the default name that of the folder. WANDB_MODE is ignored.
    """

    mode: Literal["online", "offline", "disabled"] = "disabled"
    project: str | None = None
    name: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: list[str] | None = None


class Tracker:
    """Logs a run's events to metrics.jsonl and, optionally, to W&B.

    A resumed run continues its W&B run, or starts a new one in another folder. After a crash the
    events since the last checkpoint are logged again, and appear twice in W&B, with the same
    `step`.

    Args:
        folder: the run's folder, created if missing; also holds W&B's files.
        config: the run's configuration, for W&B.
        wandb: whether and how to use W&B.
        state: when resuming, the checkpoint's `state_dict`.

    Attributes:
        damage: describes what is missing in a resumed run's metrics.jsonl; None: nothing.

    Raises:
        WriteError: metrics.jsonl cannot be written.
    """

    def __init__(
        self,
        folder: Path | str,
        config: dict[str, object],
        wandb: WandbOptions,
        state: dict[str, Any] | None = None,
    ) -> None:
        folder, state = Path(folder), state or {}
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics = MetricsFile(folder / "metrics.jsonl", state.get("metrics_bytes"))
        self.damage = self._metrics.damage
        # A run resumed in another folder must not write to the W&B run of the old folder.
        known = state.get("wandb_id") if (folder / "wandb").is_dir() else None
        self._wandb = WandbRun(folder, config, wandb, known)

    @property
    def wandb_url(self) -> str | None:
        """The W&B run's address, or its folder if offline; None without a W&B run."""
        return self._wandb.url

    def log(self, event: str, *, step: int, **fields: Any) -> None:
        """Record an event of update `step`: a line of metrics.jsonl, `event/field` in W&B.

        Raises:
            TypeError, ValueError, WriteError: as MetricsFile.write.
        """
        record = {"event": event, "step": step, **fields}
        self._metrics.write(record)
        self._wandb.log(record)

    def log_samples(self, sentences: list[str], *, step: int) -> None:
        """Show sentences that the model wrote in W&B, as a table. No-op without any."""

        def send(run: Any) -> None:
            wandb = importlib.import_module("wandb")
            table = wandb.Table(columns=["sentence"], data=[[text] for text in sentences])
            run.log({"step": step, "samples": table})

        if sentences:
            self._wandb.attempt(send)

    def log_picture(self, name: str, figure: Any, *, step: int) -> None:
        """Show a figure of matplotlib in W&B."""

        def send(run: Any) -> None:
            wandb = importlib.import_module("wandb")
            numpy = importlib.import_module("numpy")  # not before engine.program sets its threads
            figure.canvas.draw()
            run.log({"step": step, name: wandb.Image(numpy.asarray(figure.canvas.buffer_rgba()))})

        self._wandb.attempt(send)

    def summarize(self, **fields: Any) -> None:
        """Set the run's final figures (best_valid_ppl, test_ppl, …) in W&B's summary."""
        self._wandb.attempt(lambda run: run.summary.update(fields))

    def state_dict(self) -> dict[str, Any]:
        """Size of metrics.jsonl and id of the W&B run, for a resumed run.

        Syncs metrics.jsonl to the disk first, so that after a power failure it is as long as the
        checkpoint says.
        """
        self._metrics.sync()
        return {"metrics_bytes": self._metrics.size, "wandb_id": self._wandb.id}

    def close(self, exit_code: int = 0) -> None:
        """Close the file and finish the W&B run; waits a bounded time for its upload."""
        self._metrics.close()
        self._wandb.close(exit_code)


class Silence(Tracker):
    """A tracker that logs nothing, for the ranks other than 0."""

    def __init__(self) -> None:
        self._wandb = WandbRun(Path(), {}, WandbOptions(), None)  # none

    def log(self, event: str, *, step: int, **fields: Any) -> None:
        """No-op."""

    def state_dict(self) -> dict[str, Any]:
        """Empty."""
        return {}

    def close(self, exit_code: int = 0) -> None:
        """No-op."""


class WandbRun:
    """A W&B run, or none. The first call that fails prints a warning; later calls are no-ops.

    Args:
        folder: folder of W&B's files.
        config: the run's configuration.
        options: whether and how to use W&B.
        run_id: of the W&B run to continue; None: a new one.
    """

    def __init__(
        self, folder: Path, config: dict[str, object], options: WandbOptions, run_id: str | None
    ) -> None:
        self.id = run_id
        self.url: str | None = None
        self._run: Any = None
        self._failed = False
        if options.mode != "disabled":
            try:
                self._run = self._start(folder, config, options)
            except (Exception, SystemExit) as error:
                self._fail(error)

    def attempt(self, call: Callable[[Any], object]) -> None:
        """Call a function with the SDK's run; warns if it fails. No-op without a run."""
        if self._run is not None:
            try:
                call(self._run)
            except (Exception, SystemExit) as error:  # never stop training
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._run, self._failed = None, True
        reason = str(error) or type(error).__name__
        warn(f"Weights & Biases is off from here on, metrics.jsonl is not: {reason}")

    def log(self, record: dict[str, Any]) -> None:
        """Send an event. W&B's own step counts rows; the field `step` is the charts' x axis."""
        event = record["event"]
        row = {f"{event}/{k}": v for k, v in record.items() if k not in ("event", "step")}
        self.attempt(lambda run: run.log({"step": record["step"], **row}))

    def close(self, exit_code: int) -> None:
        """Finish the run. After a failure, shut the SDK down, whose exit handler would hang."""
        self.attempt(lambda run: run.finish(exit_code=exit_code))
        self._run = None
        if self._failed:
            thread = threading.Thread(target=_tear_down, args=(exit_code,), daemon=True)
            thread.start()
            thread.join(TEARDOWN_SECONDS)

    def _start(self, folder: Path, config: dict[str, object], options: WandbOptions) -> Any:
        wandb = importlib.import_module("wandb")
        # silent: on a terminal the SDK asks for a missing key, unless it may not print at all
        library = wandb.setup(wandb.Settings(silent=True))
        name = options.name
        if self.id is None:  # a run that goes on keeps the name that it may have been given in W&B
            name = name or library.settings.run_name or folder.name
        run = wandb.init(
            mode=options.mode,
            dir=str(folder),
            config=config,
            project=options.project or library.settings.project or "awd-lstm",
            name=name,
            group=options.group,
            job_type=options.job_type,
            tags=options.tags,
            id=self.id,
            reinit="create_new",  # never another run of this process
            resume=None if self.id is None else "allow",
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=INIT_SECONDS,
                finish_timeout=FINISH_SECONDS,
                finish_timeout_raises=True,
            ),
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        self.id, self.url = str(run.id), run.url or str(Path(run.dir).parent)
        return run


def _tear_down(exit_code: int) -> None:
    with suppress(Exception):
        importlib.import_module("wandb").teardown(exit_code)


def sync_command(folder: Path, *within: str) -> str | None:
    """What to type to upload the offline W&B runs of a folder, and of folders within it that
    match patterns such as "runs/*"; None if there are none."""
    patterns = [f"{place}/wandb/offline-run-*".lstrip("/") for place in ("", *within)]
    found = [f"{shlex.quote(str(folder))}/{p}" for p in patterns if any(folder.glob(p))]
    return f"wandb sync {' '.join(found)}" if found else None
