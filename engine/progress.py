"""Shows progress. The only module that imports tqdm, on first use."""

import importlib
import os
import sys
from typing import Any, Self


class Progress:
    """Progress on stderr: a tqdm bar on a terminal, elsewhere lines.

    Args:
        total: the length in the units of `update`; None if unknown.
        initial: how much of it is done, when resuming inside an epoch.
        description: left of the bar, such as "epoch 3".
        unit: what `update` counts; "B" for bytes, shown as kB, MB or GB.
        timed: show speed and time left of this bar; else the notes stand there.
    """

    def __init__(
        self,
        total: int | None,
        initial: int = 0,
        description: str = "",
        unit: str = "step",
        timed: bool = True,
    ) -> None:
        self._bar: Any = None
        if sys.stderr.isatty():
            tqdm = importlib.import_module("tqdm").tqdm
            columns: dict[str, Any] = {"dynamic_ncols": True}
            if os.get_terminal_size(sys.stderr.fileno()).columns == 0:
                columns = {"ncols": 80}  # unknown width, for which tqdm shows nothing
            if not timed:
                columns["bar_format"] = f"{{l_bar}}{{bar}}| {{n}}/{{total}} {unit}s{{postfix}}"
            # leave=False: the results, on stdout, are what stays on the screen
            columns.update(initial=initial, unit=unit, unit_scale=unit == "B", leave=False)
            self._bar = tqdm(desc=description, total=total, **columns)

    @property
    def visible(self) -> bool:
        """True if there is a bar."""
        return self._bar is not None

    def update(self, n: int = 1, note: str = "") -> None:
        """Count `n` more as done; the note stands right of the bar."""
        if self._bar is not None:
            if self._bar.total is not None:  # which may have been an estimate
                self._bar.total = max(self._bar.total, self._bar.n + n)
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(n)

    def report(self, line: str) -> None:
        """Print a line, unless there is a bar."""
        if self._bar is None:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
