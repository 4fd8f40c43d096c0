"""The commands, flags, links and Python in README.md and docs/ are ones that work."""

import importlib
import re
import runpy
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, Result, write_corpus

from engine.checkpoint import load_model
from flags import evaluation, export, generation
from flags.ablation import ablation_parser, parse_ablation
from flags.diagnosis import diagnosis_parser, parse_diagnosis
from flags.finetuning import finetuning_parser, parse_finetuning
from flags.parser import Parser
from flags.plotting import parse_plotting, plotting_parser
from flags.preparation import parse_preparation, preparation_parser
from flags.training import parse_training, training_parser

PARSE: dict[str, Callable[[list[str]], object]] = {
    "main.py": parse_training,
    "finetune.py": parse_finetuning,
    "ablate.py": parse_ablation,
    "diagnose.py": parse_diagnosis,
    "evaluate.py": evaluation.parse_evaluation,
    "pointer.py": evaluation.parse_pointer,
    "plot.py": parse_plotting,
    "prepare.py": parse_preparation,
    "export.py": export.parse_export,
    "generate.py": generation.parse_generation,
}
PARSERS = [
    *(training_parser(), finetuning_parser(), ablation_parser(), diagnosis_parser()),
    *(Parser(evaluation.EVALUATION), evaluation.pointer_parser(), plotting_parser()),
    *(preparation_parser(), Parser(export.EXPORT), generation.generation_parser()),
]
TORCHRUN_FLAGS = {"--nproc-per-node", "--max-restarts"}

ALL_PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What your-own-idea.md shows exists only where its patches are applied, and first-hour.md has a
# test of its own.
PAGES = [page for page in ALL_PAGES if page.name not in ("your-own-idea.md", "first-hour.md")]


def blocks(page: Path, language: str) -> list[str]:
    """The page's fenced code in a language."""
    return re.findall(rf"^```(?:{language})\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


COMMANDS = [
    words
    for page in PAGES
    for block in blocks(page, "sh|bash")
    for line in block.replace("\\\n", " ").splitlines()
    for command in line.split("&&")
    if (words := shlex.split(command, comments=True))
]


def of(program: str) -> list[list[str]]:
    """The arguments of each command that runs a program."""
    found = [words[words.index(program) + 1 :] for words in COMMANDS if program in words]
    assert found, f"no page shows {program}"
    return found


@pytest.mark.parametrize("program", PARSE)
def test_commands_parse(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for arguments in of(program):
        PARSE[program](arguments)


def test_training_commands_run(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    size = TINY[: TINY.index("--batch-size") + 2]  # the commands' own windows and dropouts
    short = [*size, "--data", write_corpus(tmp_path / "text"), "--max-updates", 1]
    for number, arguments in enumerate(of("main.py")):
        if "PTB/last.pt" not in arguments and "--dry-run" not in arguments:
            result = run(*arguments, *short, "--save", tmp_path / f"{number}.pt")
            assert result.code == 0, result.err
            assert "| End of training" in result.out


def test_after_training_its_commands_run(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the page's order, on a small model and corpus of the names that they use."""
    monkeypatch.chdir(tmp_path)
    write_corpus(Path("data/penn"))
    with Path("data/penn/train.txt").open("a") as train:
        train.write(" the price of \n")
    for name in ("chapter1.txt", "chapter2.txt"):
        Path(name).write_text("w1 w2\n")
    assert run(*TINY, "--data", "data/penn", "--max-updates", 1, "--save", "PTB.pt").code == 0
    torch.save(load_model("PTB.pt")[0].state_dict(), "original.pt")
    page = ROOT / "docs" / "after-training.md"
    for line in (line for block in blocks(page, "sh") for line in block.splitlines()):
        _, program, *arguments = shlex.split(line, comments=True)
        if program == "finetune.py":
            arguments += ["--max-updates", "2"]
        elif "rms" in arguments:
            arguments += ["--batch-size", "4", "--max-batches", "2"]
        if "--search" in arguments:
            arguments += ["--lr", "1e-5", "1e-4", "--search-tokens", "50"]
        module = importlib.import_module(program.removesuffix(".py"))
        assert module.main(arguments) == 0, line
    for snippet in (snippet for page in PAGES for snippet in blocks(page, "python")):
        Path("snippet.py").write_text(snippet)
        runpy.run_path("snippet.py")


def test_other_commands_are_there() -> None:
    for words in COMMANDS:
        if words[:2] == ["python", "-m"] and words[2] != "pytest":
            module = (ROOT / words[2].replace(".", "/")).with_suffix(".py")
            source = module.read_text()
            for flag in [word for word in words if word.startswith("--")]:
                assert f'"{flag}"' in source, words
        elif words[0] == "python" and words[1] != "-m":
            assert words[1] in PARSE, words
        elif "/" in words[0]:
            assert (ROOT / words[0]).is_file(), words


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    for page in ALL_PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
            path, _, anchor = target.partition("#")
            linked = page.parent / path if path else page
            assert linked.exists(), (page, target)
            assert not anchor or anchor in anchors(linked), (page, target)


def test_flags_that_are_mentioned_exist() -> None:
    known = {name for p in PARSERS for action in p._actions for name in action.option_strings}
    known |= TORCHRUN_FLAGS
    for module in (ROOT / "benchmarks").glob("*.py"):
        known |= set(re.findall(r'"(--[a-z][\w-]*)"', module.read_text()))
    # the original's README spells --epochs as --epoch
    for page in PAGES:
        mentioned = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text()))
        assert mentioned - {"--epoch"} <= known, page


def test_tree_names_what_is_there() -> None:
    tree = next(block for block in blocks(ROOT / "README.md", "text") if "main.py " in block)
    listed = {
        name.rstrip("/") for line in tree.splitlines() for name in line.split("  ")[0].split()
    }
    for name in listed:
        assert (ROOT / name).exists(), name
    assert {path.name for path in ROOT.glob("*.py")} <= listed
