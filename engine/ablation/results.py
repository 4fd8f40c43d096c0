"""Collects a table's figures from the folders of its runs."""

import os
import shlex
from pathlib import Path
from typing import Any

from engine.ablation.runs import Run, State, read_state
from engine.ablation.stages import SPLITS, STAGES
from engine.ablation.statistics import agreement, holm, paired, spread
from engine.ablation.table import Row, Table


def collect(table: Table, runs: list[Run], folder: Path) -> dict[str, Any]:
    """All of a table's figures, as table.json has them.

    Means of perplexities are over the seeds that are done; any other run is listed with its cause
    in its row's "left_out". "after" has the stages of the table and the splits that each measures,
    and in each row and run their figures. Differences to the first row, the base, are paired by
    seed (see statistics.paired); p_holm is adjusted over the rows. "agreement" compares, by split,
    the rows' differences to the base with the published ones (see statistics.agreement). Times are
    in seconds, without a run's start.

    Args:
        runs: of each row and seed.
        folder: of the report; links are relative to it.
    """
    states = {run.name: read_state(run) for run in runs}
    rows = []
    for row in table.rows:
        mine = [_run_figures(run, states[run.name], folder) for run in runs if run.row == row]
        rows.append(_row_figures(row, mine, table))
    base, *others = rows
    for other in others:
        other["difference"] = {split: _difference(other, base, split) for split in SPLITS}
    for split in SPLITS:
        adjusted = holm([other["difference"][split]["p"] for other in others])
        for other, p in zip(others, adjusted, strict=True):
            other["difference"][split]["p_holm"] = p
    ran = [run for figures in rows for run in figures["runs"]]
    return dict(
        table=table.name,
        title=table.title,
        note=table.note,
        source=table.source,
        flags=shlex.join(table.flags),
        base=base["name"],
        seeds=sorted({run.seed for run in runs}),
        after={name: list(STAGES[name].keys) for name in table.stages},
        rows=rows,
        agreement={split: _agreement(base, others, split) for split in SPLITS},
        commits=sorted({run["commit"] for run in ran if run["commit"]}),
        made_with=sorted({run["made_with"] for run in ran if run["made_with"]}),
    )


def _run_figures(run: Run, state: State, folder: Path) -> dict[str, Any]:
    done, summary = state.trained, state.summary
    averaging = state.of("averaging")
    epochs = summary.get("epochs")
    whole = epochs and epochs == state.epochs  # none was cut short by --max-updates
    return dict(
        seed=run.seed,
        state="done" if done else state.kind,
        cause=(state.cause or None) if not done else None,
        after={name: vars(step) for name, step in state.steps.items()},
        valid_ppl=summary.get("best_valid_ppl") if done else None,
        test_ppl=summary.get("test_ppl") if done else None,
        best_epoch=summary.get("best_epoch"),
        averaging_epoch=averaging[0]["epoch"] if averaging else None,
        epochs=state.epochs,
        updates=summary.get("updates"),
        parameters=summary.get("parameters"),
        seconds_per_epoch=summary["seconds"] / epochs if done and whole else None,
        curve=[line["ppl"] for line in state.of("valid")][: epochs if done else None],
        filter=_filter_figures(state),
        folder=Path(os.path.relpath(run.folder, folder)).as_posix(),
        commit=state.config.get("git_commit"),
        made_with=_made_with(state.config),
    )


def _made_with(config: dict[str, Any]) -> str:
    """torch's version, precision and kernel of a run: its arithmetic depends on them."""
    version, kernel = config.get("versions", {}).get("torch"), config.get("kernel")
    found = [version and f"torch {version}", config.get("precision"), kernel and f"{kernel} kernel"]
    return ", ".join(filter(None, found))


def _filter_figures(state: State) -> dict[str, float] | None:
    """Means of the gradient filters' statistics over run and layers; None without filters.

    smallest and params are relative to the median sequence's mask, scale.
    """
    names = ("singled_out", "scale", "smallest", "params")
    found: dict[str, list[float]] = {name: [] for name in names}
    for line in state.of("train"):
        for name in names:
            key = f"grad_filter_{name}_l"
            found[name] += [v for k, v in line.items() if k.startswith(key) and v is not None]
    if not all(found.values()):
        return None
    mean = {name: sum(values) / len(values) for name, values in found.items()}
    return dict(
        singled_out=mean["singled_out"],
        scale=mean["scale"],
        smallest=min(found["smallest"]) / mean["scale"],
        params=mean["params"] / mean["scale"],
    )


def _row_figures(row: Row, runs: list[dict[str, Any]], table: Table) -> dict[str, Any]:
    done = [run for run in runs if run["state"] == "done"]
    left_out, after = _left_out(runs), {}
    for name in table.stages:
        steps = [dict(run["after"][name], seed=run["seed"]) for run in done if name in run["after"]]
        ppl = [step["ppl"] for step in steps if step["kind"] == "done"]
        found = {split: [p[split] for p in ppl if split in p] for split in SPLITS}
        after[name] = _against(found, row.published_after.get(name, {}))
        left_out += [f"{what} ({name})" for what in _left_out(steps)]
    return dict(
        name=row.name,
        flags=shlex.join(row.flags),
        **_against({s: [run[f"{s}_ppl"] for run in done] for s in SPLITS}, row.published),
        after=after,
        difference=None,
        left_out=left_out,
        parameters=_mean(runs, "parameters"),
        seconds_per_epoch=_mean(done, "seconds_per_epoch"),
        filter=_merged_filters([run["filter"] for run in done if run["filter"]]),
        runs=runs,
    )


def _against(ppl: dict[str, list[float]], published: dict[str, float]) -> dict[str, Any]:
    """Spreads of the perplexities by split, and what they are beyond the published ones."""
    figures: dict[str, Any] = {split: spread(values) for split, values in ppl.items()}
    beyond = {
        split: figures[split]["mean"] - value
        for split, value in published.items()
        if figures[split]["mean"] is not None
    }
    return dict(figures, published=published, beyond_published=beyond)


def _left_out(runs: list[dict[str, Any]]) -> list[str]:
    """Why runs or steps are left out, for instance "seed 3 diverged: loss is nan at update 12"."""
    seeds: dict[str, list[int]] = {}
    for run in runs:
        what = kind = run.get("state") or run["kind"]
        if kind == "new":
            what = "not started yet"
        elif kind == "started":
            what = "not done yet"
            what += f", {run['epochs']} epochs so far" if "epochs" in run else ""
        if kind != "done":
            cause = f": {run['cause']}" if run["cause"] else ""
            seeds.setdefault(what + cause, []).append(run["seed"])
    return [f"seed{'s' * (len(s) > 1)} {', '.join(map(str, s))} {why}" for why, s in seeds.items()]


def _mean(runs: list[dict[str, Any]], key: str) -> Any:
    values = [run[key] for run in runs if run[key] is not None]
    return sum(values) / len(values) if values else None


def _merged_filters(found: list[dict[str, float]]) -> dict[str, float] | None:
    if not found:
        return None
    mean = {name: sum(f[name] for f in found) / len(found) for name in found[0]}
    return dict(mean, smallest=min(f["smallest"] for f in found))


def _difference(row: dict[str, Any], base: dict[str, Any], split: str) -> dict[str, Any]:
    ours, theirs = ({r["seed"]: r[f"{split}_ppl"] for r in x["runs"]} for x in (row, base))
    both = [seed for seed in ours if None not in (ours[seed], theirs.get(seed))]
    return dict(paired([ours[seed] - theirs[seed] for seed in both]), seeds=both)


def _agreement(base: dict[str, Any], others: list[dict[str, Any]], split: str) -> dict[str, Any]:
    published = {row["name"]: row["published"].get(split) for row in (base, *others)}
    origin = published[base["name"]]
    found = [
        (row["difference"][split]["mean"], published[row["name"]] - origin)
        for row in others
        if None not in (origin, published[row["name"]], row["difference"][split]["mean"])
    ]
    return agreement([here for here, _ in found], [there for _, there in found])
