"""Who may import whom, how large files may be, and that importing anything does nothing."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

GROUND = {"noise", "gradient_filter", "activation_regularize", "bptt", "nt_asgd", "loss_scale"}
NETWORK = {"layers", "decoders", "weight_drop", "locked_dropout", "embed_regularize", "model"}
ROOMS = {"data", "evaluation", "kernels", "engine", "training", "diagnostics", "pictures"}
# What a room may import of the project besides itself: rooms, or single modules of them. What is
# at the top and not named here is a program.
ALLOWED: dict[str, set[str]] = {
    **{name: set[str]() for name in (*GROUND, "data")},
    "locked_dropout": {"noise"},
    "embed_regularize": {"noise"},
    "layers": {"noise", "gradient_filter"},
    "decoders": {"noise", "locked_dropout"},
    "weight_drop": {"noise", "layers"},
    "model": {"noise", "gradient_filter", *NETWORK},
    "kernels": {"noise", "nt_asgd", "loss_scale", *NETWORK, "engine.errors"},
    "evaluation": {"data", "model", "noise"},
    "pictures": {"data"},
    "engine": {"data", "model", "evaluation", "pictures"},
    "training": {*GROUND, *NETWORK, "data", "evaluation", "kernels", "engine"},
    "diagnostics": {*GROUND, *NETWORK, "data", "pictures", "training.objective"},
    "flags": {"engine.errors"},
    "assembly": {*GROUND, *NETWORK, *ROOMS},
    "awd_lstm": {"data", "model", "evaluation", "engine"},
    "programs": {*GROUND, *NETWORK, *ROOMS, "flags", "assembly"},
}
PROGRAM = {"engine.launch", "engine.program"}
NOT_OURS = {"tests", "benchmarks", "docs", "build", "venv", ".venv"}
MODULES = sorted(
    path.relative_to(ROOT)
    for path in ROOT.rglob("*.py")
    if path.relative_to(ROOT).parts[0] not in NOT_OURS
)
BENCHMARKS = sorted(path.relative_to(ROOT) for path in (ROOT / "benchmarks").glob("*.py"))
# Third-party packages that only these modules may import.
OWNERS = {
    "wandb": {"engine/tracking.py"},
    "tqdm": {"engine/progress.py"},
    "matplotlib": {"pictures/canvas.py"},
    "ray": {"engine/ablation/ray_pool.py"},
    "scipy": {"engine/ablation/statistics.py"},
    "requests": {"data/download.py"},
    "safetensors": {"engine/model_folder.py"},
}
# Calls that can run what is in a file or in an argument.
RUNS_CODE = {
    *("eval", "exec", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load"),
    *("marshal.loads", "shelve.open", "yaml.load", "os.system", "os.popen", "torch.hub.load"),
}
RESTRICTED = "engine/original.py"  # has an unpickler of its own, which calls what it lists
LONGEST_FILE, LONGEST_FUNCTION = 300, 60  # lines


def imports(path: Path) -> Iterator[str]:
    """Modules, and what is imported from them, which may be modules."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(name: str) -> str:
    return name.split(".")[0]


OURS = {room_of(path.parts[0]) for path in MODULES}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_down_only(path: Path) -> None:
    own = room_of(path.parts[0])
    allowed = ALLOWED.get(own, PROGRAM)
    for name in imports(path):
        room, module = room_of(name), ".".join(name.split(".")[:2])
        assert room not in ("tests", "benchmarks"), f"{path} imports {name}"
        if room in OURS - {own}:
            assert {room, module} & allowed, f"{path} imports {name}"
        if room in OWNERS:
            assert path.as_posix() in OWNERS[room], f"{path} imports {name}"


def test_the_map_has_no_circle() -> None:
    below: dict[str, set[str]] = {}

    def all_below(room: str, above: tuple[str, ...]) -> set[str]:
        assert room not in above, " -> ".join([*above, room])
        if room not in below:
            found = {room_of(name) for name in ALLOWED[room] if "." not in name} - {room}
            below[room] = found.union(*(all_below(name, (*above, room)) for name in found))
        return below[room]

    for room in ALLOWED:
        all_below(room, ())
        assert room in OURS, f"{room} is on the map alone"


def test_the_model_knows_no_machine() -> None:
    text = (ROOT / "model.py").read_text().lower()
    for word in ("dtype", "device", "kernel", "stream", "chunk", "pad", "cuda", "cudnn"):
        assert word not in text, word


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_no_state_nothing_done_at_import_nothing_long(path: Path) -> None:
    text = (ROOT / path).read_text()
    tree = ast.parse(text)
    assert text.count("\n") <= LONGEST_FILE
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Global), f"{path}:{node.lineno}"
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, f"{path}: {node.name}"
    for node in tree.body:
        allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign)
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        entry = isinstance(node, ast.If) and "__name__" in ast.dump(node.test)
        fine = isinstance(node, (*allowed, ast.AnnAssign)) or docstring or entry
        assert fine, f"{path}:{node.lineno} runs at import"


@pytest.mark.parametrize("path", [*MODULES, *BENCHMARKS], ids=str)
def test_nothing_that_is_loaded_can_run_code(path: Path) -> None:
    assert not RUNS_CODE & set(imports(path))
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Call):
            name, place = ast.unparse(node.func), f"{path}:{node.lineno}"
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert name not in RUNS_CODE, place
            assert given.get("shell", "False") == "False", place
            assert given.get("allow_pickle", "False") == "False", place
            if name == "torch.load" and path.as_posix() != RESTRICTED:
                assert given.get("weights_only") == "True", place


def load(*names: str, before: str = "", unwanted: set[str]) -> str:
    """What modules print that are imported in a process of their own, and which of unwanted they
    load."""
    code = (
        f"import sys{before}\nbefore = set(sys.modules)\nimport {', '.join(names)}\n"
        f"print(sorted({unwanted!r} & (set(sys.modules) - before)), end='')"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def test_importing_everything_loads_nothing_optional_and_prints_nothing() -> None:
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in MODULES]
    # torch takes tqdm where it finds it.
    assert load(*names, before=", torch", unwanted=set(OWNERS)) == "[]"


def test_a_program_is_a_door() -> None:
    """torch is loaded once it is settled how its threads wait, and Ctrl-C ends in a line."""
    programs = OURS - ALLOWED.keys()
    assert {"main", "ablate", "diagnose", "plot", "prepare"} <= programs
    assert load(*programs, unwanted={"torch", "numpy"}) == "[]"
