"""Imports point down only, and importing anything does nothing."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

GROUND = {"weight_drop", "locked_dropout", "embed_regularize", "gradient_filter"}
GROUND |= {"lstm_cpu", "lstm_cudnn", "lanes", "linear_cross_entropy"}
TECHNIQUES = {"model", "bptt", "nt_asgd", "activation_regularize"}
PROGRAMS = {"main", "finetune", "pointer", "dynamiceval", "generate", "ablate", "diagnose"}
# What a module may import of the project, by the first part of its name.
ALLOWED = {
    **{name: set[str]() for name in GROUND},
    **dict.fromkeys(TECHNIQUES, GROUND | TECHNIQUES),
    "data": {"data"},
    "evaluation": GROUND | TECHNIQUES | {"data", "evaluation"},
    "diagnostics": GROUND | TECHNIQUES | {"data", "diagnostics"},
    "engine": GROUND | TECHNIQUES | {"data", "evaluation", "engine"},
    "flags": {"engine"},
    "cli": {"engine", "flags"},
    **{
        name: GROUND | TECHNIQUES | {"data", "evaluation", "diagnostics", "engine", "cli"} | more
        for name, more in [*((name, {"assembly"}) for name in PROGRAMS), ("assembly", set[str]())]
    },
}
OURS = set(ALLOWED) | {"benchmarks", "tests"}
MODULES = sorted(
    path.relative_to(ROOT)
    for path in ROOT.rglob("*.py")
    if path.relative_to(ROOT).parts[0].removesuffix(".py") in ALLOWED
)
# Third-party packages that only one module may import.
OWNERS = {
    "wandb": {"engine/tracking.py"},
    "tqdm": {"engine/tracking.py"},
    "matplotlib": {"diagnostics/plots.py", "engine/ablation/curves.py"},
    "ray": {"engine/ablation/ray_pool.py"},
    "scipy": {"engine/ablation/statistics.py"},
    "pooch": {"data/download.py"},
}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield node.module or ""


def test_every_module_has_its_place() -> None:
    found = {path.parts[0].removesuffix(".py") for path in MODULES}
    assert {"main", "cli", "model", "data", "engine", "evaluation"} <= found
    tops = {path.stem for path in ROOT.glob("*.py")}
    assert tops <= set(ALLOWED), f"{tops - set(ALLOWED)}: give it a place in ALLOWED"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_down_only(path: Path) -> None:
    own = path.parts[0].removesuffix(".py")
    for name in imports(path):
        top = name.split(".")[0]
        if top in OURS:
            assert top in ALLOWED[own], f"{path} imports {name}"
        if top in OWNERS:
            assert path.as_posix() in OWNERS[top], f"{path} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_no_state_and_nothing_done_at_import(path: Path) -> None:
    tree = ast.parse((ROOT / path).read_text())
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Global), f"{path}:{node.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("exec", "eval"), f"{path}:{node.lineno}"
    for node in tree.body:
        allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign)
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        entry = isinstance(node, ast.If) and "__name__" in ast.dump(node.test)
        fine = isinstance(node, (*allowed, ast.AnnAssign)) or docstring or entry
        assert fine, f"{path}:{node.lineno} runs at import"


def test_importing_everything_loads_nothing_optional_and_prints_nothing() -> None:
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in MODULES]
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)  # torch takes tqdm where it finds it\n"
        f"import {', '.join(names)}\n"
        f"print(sorted(set({sorted(OWNERS)!r}) & set(sys.modules) - before), end='')"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "[]", "")
