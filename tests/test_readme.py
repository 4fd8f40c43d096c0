"""Every command in the README is one that the programs take."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

from flags import (
    ablation_parser,
    diagnosis_parser,
    parse_ablation,
    parse_diagnosis,
    parse_training,
    training_parser,
)

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(?:sh|bash)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
COMMANDS = [
    shlex.split(command, comments=True)
    for line in LINES
    for command in line.split("&&")
    if command.split("#")[0].strip()
]


def described(command: list[str]) -> str:
    return " ".join(command)[:60]


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c[:2] == ["python", "main.py"]], ids=described
)
def test_training_commands_parse(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    if "--help" not in command:
        parse_training(command[2:])


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c[:2] == ["python", "ablate.py"]], ids=described
)
def test_ablation_commands_parse(command: list[str]) -> None:
    args = parse_ablation(command[2:])
    assert (ROOT / args.table).is_file()


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c[:2] == ["python", "diagnose.py"]], ids=described
)
def test_diagnosis_commands_parse(command: list[str]) -> None:
    parse_diagnosis(command[2:])


def test_all_commands_are_of_known_programs() -> None:
    assert len(COMMANDS) > 5
    for command in COMMANDS:
        if command[0] == "python" and command[1] != "-m":
            assert (ROOT / command[1]).is_file(), command
        elif command[:2] == ["python", "-m"] and command[2] != "pytest":
            assert (ROOT / command[2].replace(".", "/")).with_suffix(".py").is_file(), command


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_flags_that_are_mentioned_exist() -> None:
    parsers = [training_parser(), ablation_parser(), diagnosis_parser()]
    known = {name for p in parsers for action in p._actions for name in action.option_strings}
    others = {
        "--keep-memory",
        "--max-restarts",
        "--recipe",
        "--updates",
        "--output",
        "--seconds",
        "--json",
        "--nproc-per-node",
    }
    for flag in set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)):
        # a prefix will do: --epoch is how the original's README spells --epochs
        assert flag in others or any(name.startswith(flag) for name in known), flag


def test_tree_names_what_is_there() -> None:
    tree = next(b for b in re.findall(r"```text\n(.*?)```", README, re.DOTALL) if "main.py" in b)
    for line in tree.splitlines():
        assert (ROOT / line.split()[0]).exists(), line
    listed = {Path(line.split()[0].rstrip("/")).name for line in tree.splitlines()}
    assert {p.name for p in ROOT.glob("*.py")} <= listed
