"""A table over whole runs: each difference is that of two runs with the same seed."""

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, read_summary, write_corpus

import ablate
import main

SEEDS = (1, 2, 3, 4)
ROWS: dict[str, list[str]] = {"base": [], "other": ["--wdrop", "0.6"]}


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    """Two runs are missing, one of each row: only the seeds that both rows have are compared."""
    tiny = [flag for flag in TINY if flag not in ("--seed", "7")]  # the table has the seeds
    corpus = write_corpus(tmp_path / "corpus", lines=20)
    flags = [*tiny, "--data", str(corpus), "--epochs", "1", "--lr", "10"]
    lines = ['title = "A table"', f"seeds = {list(SEEDS)}", f"flags = {json.dumps(flags)}"]
    for name, own in ROWS.items():
        lines += ["[[rows]]", f"name = {json.dumps(name)}", f"flags = {json.dumps(own)}"]
    table, out = tmp_path / "table.toml", tmp_path / "out"
    table.write_text("\n".join(lines))

    def report() -> list[dict[str, Any]]:
        assert ablate.main([str(table), "--output", str(out), "--report-only"]) == 0
        rows: list[dict[str, Any]] = json.loads((out / "table.json").read_text())["rows"]
        return rows

    saves: dict[tuple[str, int], Path] = {}
    for row in report():
        for planned in row["runs"]:
            save = (out / planned["folder"]).with_suffix(".pt")
            save.parent.mkdir(parents=True, exist_ok=True)
            saves[row["name"], planned["seed"]] = save
            argv = [*flags, *ROWS[row["name"]], "--seed", str(planned["seed"]), "--save", str(save)]
            assert main.main(argv) == 0
    assert saves.keys() == {(row, seed) for row in ROWS for seed in SEEDS}
    for gone in (("base", 1), ("other", 3)):
        shutil.rmtree(saves[gone].with_suffix(""))
        saves.pop(gone).unlink()

    _, other = report()
    for split, key in {"valid": "best_valid_ppl", "test": "test_ppl"}.items():
        ppl = {run: read_summary(save)[key] for run, save in saves.items()}
        differences = [ppl["other", seed] - ppl["base", seed] for seed in (2, 4)]
        found = other["difference"][split]
        assert found["n"] == 2
        assert found["mean"] == pytest.approx(statistics.mean(differences), rel=1e-9)
        assert found["sd"] == pytest.approx(statistics.stdev(differences), rel=1e-9)
        assert other[split]["mean"] == pytest.approx(
            statistics.mean(ppl["other", seed] for seed in (1, 2, 4)), rel=1e-9
        )
