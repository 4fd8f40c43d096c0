"""Where a run's numbers go: metrics.jsonl, the terminal, Weights & Biases.

The only module that imports tqdm and wandb, each when it is first asked for. Both may be missing.
"""

import functools
import importlib
import json
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TextIO

from engine.metrics_file import MetricsFile

# Seconds; left alone, W&B waits for a dead network without end.
INIT_SECONDS = 60.0
FINISH_SECONDS = 60.0
GRACE_SECONDS = 15.0  # for the SDK to notice by itself that its time is up


def warn(message: str) -> None:
    """Print one line, `warning: …`, to stderr, above a progress bar if there is one."""
    line = "warning: " + " ".join(message.split())
    if "tqdm" in sys.modules:  # else the line would land in the middle of the bar
        with suppress(Exception):
            sys.modules["tqdm"].tqdm.write(line, file=sys.stderr)
            return
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class WandbOptions:
    """What the user asked of Weights & Biases.

    None leaves a field to WANDB_PROJECT, WANDB_NAME, WANDB_RUN_GROUP or WANDB_TAGS; the project
    is `awd-lstm` where nothing names one. `mode` is not left to WANDB_MODE.
    """

    mode: Literal["online", "offline", "disabled"] = "disabled"
    project: str | None = None
    name: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: tuple[str, ...] | None = None


class Tracker:
    """Where a run's numbers go: metrics.jsonl always, W&B when asked.

    W&B can fail at any time, and then costs the run one warning; metrics.jsonl is complete, and
    a later resume with W&B sends what W&B has missed.

    Args:
        folder: the run's folder, made if need be; W&B keeps its files there, too.
        config: what W&B shows as the run's configuration.
        wandb: whether and how to use W&B.
        state: when resuming, what `state_dict` returned as the checkpoint was written.

    Raises:
        OSError: metrics.jsonl cannot be written.
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
        path = folder / "metrics.jsonl"
        self._metrics = MetricsFile(path, state.get("metrics_bytes"))
        if self._metrics.damage is not None:
            warn(f"{path}: {self._metrics.damage}; what is missing is marked as a gap")
        self._wandb = _WandbRun(state.get("wandb_id"))
        if wandb.mode != "disabled":
            self._wandb.attempt(self._wandb.start, folder, config, wandb)
            for line in path.read_text(encoding="utf-8").splitlines():
                self._wandb.attempt(self._wandb.log, json.loads(line))

    @property
    def wandb_url(self) -> str | None:
        """Where to look at the W&B run: its address, offline its folder; None without one."""
        return self._wandb.url

    def log(self, event: str, *, step: int, **fields: Any) -> None:
        """Record an event of update `step`: a line of metrics.jsonl, `event/field` in W&B.

        Raises:
            TypeError, ValueError, OSError: as MetricsFile.write.
        """
        record = {"event": event, "step": step, **fields}
        self._metrics.write(record)
        self._wandb.attempt(self._wandb.log, record)

    def summarize(self, **fields: Any) -> None:
        """Set the run's final figures (best_valid_ppl, test_ppl, …) in W&B's summary."""
        self._wandb.attempt(self._wandb.summarize, fields)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on in the same file and W&B run; plain types only.

        What was logged so far is on the disk when it returns: a checkpoint that survives a power
        failure finds its metrics.jsonl.
        """
        self._metrics.sync()
        return {"metrics_bytes": self._metrics.size, "wandb_id": self._wandb.run_id}

    def close(self, exit_code: int = 0) -> None:
        """Close the file and finish the W&B run, waiting a bounded time for its upload."""
        self._metrics.close()
        self._wandb.close(exit_code)


class Silence(Tracker):
    """The tracker of a process whose numbers another one logs."""

    def __init__(self) -> None:
        pass

    wandb_url = None

    def log(self, event: str, *, step: int, **fields: Any) -> None:
        """Not here."""

    def summarize(self, **fields: Any) -> None:
        """Not here."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def close(self, exit_code: int = 0) -> None:
        """Nothing to close."""


class _WandbRun:
    """A W&B run whose methods go through `attempt`; once one of them fails, it is left alone.

    W&B drops a row whose own step is not above the last one, also in a resumed run: were that
    step the update, a crash between two events of one update would lose the second. So each
    event is a row of its own, W&B's step counts rows, and the logged field `step` is the charts'
    x axis (define_metric).

    A resumed run repeats the events since its checkpoint, and nobody can be asked which of them
    W&B has: offline there is no server, and every resume makes another folder. So wandb-sent.txt
    lists the run's id and what was handed over. What it lacks is sent, however old; what it has
    is not sent again. A run that is continued elsewhere leaves it behind, and gets a new W&B run
    with the whole history.
    """

    def __init__(self, run_id: str | None) -> None:
        self.run_id = run_id
        self.url: str | None = None
        self._run: Any = None
        self._broken = False
        self._rows = 0
        self._sent: dict[str, None] = {}  # in order
        self._sent_file: TextIO | None = None

    def attempt(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Call a method unless something failed before; if this fails, say so and give up."""
        if self._broken:
            return
        try:
            function(*arguments)
        except (Exception, SystemExit) as error:  # whatever it is, training goes on
            self._broken = True
            timed_out = isinstance(error, TimeoutError) and not str(error)
            reason = "no answer in time" if timed_out else str(error) or type(error).__name__
            warn(f"Weights & Biases is off from here on, metrics.jsonl is not: {reason}")

    def start(self, folder: Path, config: dict[str, object], options: WandbOptions) -> None:
        """Start the run, or go on with the one of this id."""
        path = folder / "wandb-sent.txt"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        resumed = self.run_id is not None and lines[:1] == [self.run_id]
        run_id = self.run_id if resumed else None
        init = functools.partial(_init, folder, config, options, run_id)
        run = _within(INIT_SECONDS + GRACE_SECONDS, init)
        self._run, self.run_id = run, str(run.id)
        self.url = run.url or str(Path(run.dir).parent)
        self._sent = dict.fromkeys(lines[1:]) if resumed else {}
        self._rows = max(len(self._sent), run.step)
        self._sent_file = path.open("w", encoding="utf-8")
        print(self.run_id, *self._sent, sep="\n", file=self._sent_file, flush=True)

    def log(self, record: dict[str, Any]) -> None:
        """Send one event, unless W&B has it."""
        event, step = record["event"], record["step"]
        if self._run is None or f"{event} {step}" in self._sent:
            return
        row = {f"{event}/{key}": value for key, value in record.items()}
        del row[f"{event}/event"], row[f"{event}/step"]
        # commit: now, and not when the next row comes, which may be an epoch away
        self._run.log({"step": step, **row}, step=self._rows, commit=True)
        self._rows += 1
        self._sent[f"{event} {step}"] = None
        print(event, step, file=self._sent_file, flush=True)

    def summarize(self, fields: dict[str, Any]) -> None:
        """Set fields of the run's summary."""
        if self._run is not None:
            self._run.summary.update(fields)

    def close(self, exit_code: int) -> None:
        """Finish the run in bounded time, quietly if it is broken already."""
        run, self._run = self._run, None
        if run is not None:
            finish = functools.partial(run.finish, exit_code=exit_code)
            self.attempt(_within, FINISH_SECONDS + GRACE_SECONDS, finish)
        if self._broken:  # else the SDK's exit handler finds a dead service, prints a traceback
            with suppress(Exception):
                _within(GRACE_SECONDS, lambda: importlib.import_module("wandb").teardown(exit_code))
        if self._sent_file is not None:
            self._sent_file.close()


def _init(
    folder: Path, config: dict[str, object], options: WandbOptions, run_id: str | None
) -> Any:
    """wandb.init without prompts or output, and without its hooks on this process's end."""
    wandb = importlib.import_module("wandb")
    hooks = sys.exit, sys.excepthook
    limits = {"init_timeout": INIT_SECONDS, "finish_timeout": FINISH_SECONDS}
    try:
        # silent: on a terminal the SDK asks for a missing key, unless it may not print at all
        library = wandb.setup(wandb.Settings(silent=True))
        run = wandb.init(
            mode=options.mode,
            dir=str(folder),
            config=config,
            project=options.project or library.settings.project or "awd-lstm",
            name=options.name,
            group=options.group,
            job_type=options.job_type,
            tags=options.tags,
            id=run_id,
            reinit="create_new",  # never another run of this process, nor wandb.run
            resume=None if run_id is None else "allow",
            settings=wandb.Settings(
                silent=True, console="off", finish_timeout_raises=True, **limits
            ),
        )
    finally:
        sys.exit, sys.excepthook = hooks
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def _within(seconds: float, function: Callable[[], Any]) -> Any:
    """`function()`, or TimeoutError; Ctrl-C gets through. A call that hangs is left behind."""
    outcome: Future[Any] = Future()

    def target() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:  # result() raises it again
            outcome.set_exception(error)

    threading.Thread(target=target, name="wandb", daemon=True).start()
    return outcome.result(seconds)


def log_table(
    folder: Path, options: WandbOptions, rows: list[dict[str, Any]], picture: Path | None
) -> None:
    """Log a finished table as a W&B run of its own; a failure costs one warning.

    Args:
        folder: where W&B keeps its files.
        rows: the table's lines, all with the same keys.
        picture: a PNG to go with it.
    """
    if options.mode == "disabled":
        return
    tracked = _WandbRun(None)

    def send() -> None:
        wandb = importlib.import_module("wandb")
        tracked.start(folder, {}, options)
        table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        images = {} if picture is None else {"curves": wandb.Image(str(picture))}
        tracked._run.log({"table": table, **images})

    tracked.attempt(send)
    tracked.close(0)


class Progress:
    """An epoch's progress on stderr: a tqdm bar on a terminal, elsewhere a line per interval.

    Args:
        total: how much the epoch has to do, in what `update` counts; None if not known.
        initial: how much of it is done, when resuming inside the epoch.
        description: what stands left of the bar, such as "epoch 3".
        bar: force the bar on or off; None asks whether stderr is a terminal.
    """

    def __init__(
        self, total: int | None, initial: int = 0, description: str = "", *, bar: bool | None = None
    ) -> None:
        self._bar: Any = None
        wanted = sys.stderr.isatty() if bar is None else bar
        if wanted and (tqdm := _load_tqdm()) is not None:
            columns: dict[str, Any] = {"dynamic_ncols": True}
            with suppress(OSError, ValueError):  # forced, and stderr is no terminal
                if os.get_terminal_size(sys.stderr.fileno()).columns == 0:
                    columns = {"ncols": 80}  # not known; tqdm would show nothing
            # leave=False: what stays on the screen are the results, on stdout
            self._bar = tqdm(
                desc=description, total=total, initial=initial, unit="step", leave=False, **columns
            )

    def update(self, n: int = 1) -> None:
        """Count `n` more as done."""
        if self._bar is not None:
            self._bar.update(n)

    def report(self, line: str, **postfix: object) -> None:
        """Once per logging interval: `postfix` right of the bar, or `line` where no bar is."""
        if self._bar is not None:
            self._bar.set_postfix(postfix)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the bar off the screen; twice does no harm."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@functools.cache  # so that a missing tqdm is mentioned once, not once per epoch
def _load_tqdm() -> Any:
    """The class tqdm, or None after a warning."""
    try:
        return importlib.import_module("tqdm").tqdm
    except ImportError:
        warn("tqdm is not installed: progress is shown as plain lines")
        return None
