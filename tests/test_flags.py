"""The flags: the original's commands, recipes, --help, values, and what makes a run another run."""

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from original import CHARACTER_LEVEL, WORD_LEVEL

import plot
from engine.errors import UsageError
from flags.ablation import ablation_parser
from flags.diagnosis import diagnosis_parser
from flags.finetuning import finetuning_parser
from flags.flag import by_name
from flags.generation import generation_parser
from flags.plotting import plotting_parser
from flags.preparation import preparation_parser
from flags.resume import other_flags, resume_flags
from flags.training import TRAINING, parse_training, settle_scheme, training_parser
from flags.values import natural, positive_int

PARSERS = {
    "main": training_parser,
    "finetune": finetuning_parser,
    "diagnose": diagnosis_parser,
    "ablate": ablation_parser,
    "plot": plotting_parser,
    "prepare": preparation_parser,
    "generate": generation_parser,
}


def parse(command: str) -> argparse.Namespace:
    args, _ = parse_training(shlex.split(command))
    return args


@pytest.mark.parametrize("command", WORD_LEVEL + CHARACTER_LEVEL)
def test_commands_of_the_original_parse(command: str) -> None:
    """Each flag gets the value that stands behind it; all others keep their defaults."""
    args, given = parse_training(shlex.split(command))
    values = vars(args)
    for words in re.findall(r"--(\w+)((?: [^-]\S*)+)", command):
        name = {"epoch": "epochs"}.get(words[0], words[0])
        value = values[name] if isinstance(values[name], list) else [values[name]]
        assert [str(v) for v in value] == [str(type(value[0])(w)) for w in words[1].split()]
        given.remove(name)
    assert given == set()


def test_defaults_are_those_of_the_original() -> None:
    expected = dict(
        data="data/penn", model="LSTM", emsize=400, nhid=1150, nlayers=3, lr=30, clip=0.25,
        epochs=8000, batch_size=80, bptt=70, dropout=0.4, dropouth=0.3, dropouti=0.65,
        dropoute=0.1, wdrop=0.5, seed=1111, nonmono=5, log_interval=200, alpha=2, beta=1,
        wdecay=1.2e-6, optimizer="sgd", when=[-1],
    )  # fmt: skip
    args = vars(parse(""))
    assert {name: args[name] for name in expected} == expected
    assert re.fullmatch(r"\d+\.pt", args["save"])


@pytest.mark.parametrize("program", PARSERS)
def test_help_and_both_spellings(program: str) -> None:
    parser = PARSERS[program]()
    text = "".join(parser.format_help().split())
    for flag in by_name(parser.sections).values():
        assert "".join(flag.help.split()) in text
        if flag.name.startswith("--"):
            dashes, underscores = flag.dest.replace("_", "-"), flag.dest
            assert {f"--{dashes}", f"--{underscores}"} <= parser._option_string_actions.keys()
    for spelling in ("--batch-size", "--batch_size", "--batch"):  # an abbreviation, as of old
        assert parse(f"{spelling} 3").batch_size == 3


@pytest.mark.parametrize("program", PARSERS)
def test_a_mistyped_flag_names_its_neighbour(program: str) -> None:
    parser = PARSERS[program]()
    with pytest.raises(UsageError, match=rf"--zzzz \({program}.py --help lists the flags\)"):
        parser.given(["x", "--zzzz"])
    for flag in by_name(parser.sections).values():
        if flag.name.startswith("--") and len(flag.dest) > 4:
            name = flag.name[:4] + flag.name[5:]
            with pytest.raises(UsageError, match=r"unrecognized.*\(did you mean --"):
                parser.given(["x", f"{name}=3"])


def test_programs_without_torch() -> None:
    """--help works; anything else is one line that says what to install."""
    doors = sorted(path.stem for path in ROOT.glob("*.py") if "run_program(" in path.read_text())
    assert {"main", "ablate", "diagnose", "evaluate", "prepare"} <= set(doors)
    code = (
        "import importlib, sys\nsys.modules['torch'] = None\n"
        f"for door in {doors}:\n"
        "    program = importlib.import_module(door)\n"
        "    try:\n        program.main(['--help'])\n"
        "    except SystemExit as stop:\n        assert stop.code == 0, door\n"
        "for door in ('main', 'diagnose', 'evaluate', 'ablate'):\n"
        "    argv = ['x'] * (door != 'main')\n"
        "    assert importlib.import_module(door).main(argv) == 1, door\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert re.findall(r"^usage: (\w+)\.py", result.stdout, re.MULTILINE) == doors
    assert len(re.findall(r"^  --threads N", result.stdout, re.MULTILINE)) == len(doors)
    missing = "error: torch is not installed; pip install -r requirements.txt does it\n"
    assert result.stderr == 4 * missing


@pytest.mark.parametrize("number", [1, 2])
def test_threads_limit_numpys_too(number: int) -> None:
    """In a program without torch: OpenBLAS starts its threads when numpy is imported."""
    code = (
        f"import os, plot\nplot.main(['nothere', '--threads', '{number}'])\n"
        "import numpy\nprint(len(os.listdir('/proc/self/task')))"
    )
    environment = {"PATH": os.environ["PATH"]}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert int(result.stdout) == min(number, os.cpu_count() or 1)


def test_a_busy_machine_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (99.0, 0.0, 0.0))
    assert plot.main(["nothere"]) == 1
    warning, error = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"warning: the machine is busy \(load average 99.0 on \d+ cores\).*", warning
    )
    assert error.startswith("error: ")


# Recipes


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.txt")), ids=lambda p: p.stem)
def test_recipes_parse_and_later_flags_win(recipe: Path) -> None:
    text = recipe.read_text()
    assert text.startswith("# ")
    assert "expect" in text.lower()
    assert parse(f"@{recipe}").save
    assert parse(f"@{recipe} --nhid 77 --seed 5").nhid == 77
    assert parse(f"--nhid 77 @{recipe} --seed 5").seed == 5


@pytest.mark.parametrize(
    ("recipe", "command"), [("penn", WORD_LEVEL[0]), ("wikitext-2", WORD_LEVEL[1])]
)
def test_recipes_are_the_commands_of_the_original(recipe: str, command: str) -> None:
    assert vars(parse(f"@{ROOT / 'recipes' / recipe}.txt")) == vars(parse(command))


def test_recipes_include_recipes(tmp_path: Path) -> None:
    inner, outer = tmp_path / "in ner.txt", tmp_path / "outer.txt"
    inner.write_text("\ufeff--nhid 5 --emsize 6 # --nhid 9\n")
    outer.write_text(f"--bptt 7 '@{inner}' --emsize 8\n'@{inner}' --when 1 2\n")
    args, given = parse_training([f"@{outer}"])
    assert (args.nhid, args.emsize, args.bptt, args.when) == (5, 6, 7, [1, 2])
    assert given == {"nhid", "emsize", "bptt", "when"}


def test_recipes_that_cannot_be(tmp_path: Path) -> None:
    path, link, other = (tmp_path / f"{name}.txt" for name in ("loop", "link", "other"))
    link.symlink_to(path)
    other.write_text(f"@{path}\n")
    for text, reason in {
        f"--nhid 3\n@{link}\n": f"@{link}: a recipe that includes itself",
        f"@{other}\n": f"@{path}: a recipe that includes itself",
        "--nhid 3\n--save 'x.pt\n": f"@{path}: line 2: No closing quotation",
        f"@{tmp_path}": f"@{tmp_path}: Is a directory",
    }.items():
        path.write_text(text)
        with pytest.raises(UsageError) as caught:
            parse(f"@{path}")
        assert str(caught.value) == reason


# Values


@pytest.mark.parametrize("program", PARSERS)
def test_whole_numbers_have_an_upper_bound(program: str) -> None:
    found, positional = 0, [] if program in ("main", "finetune") else ["x"]
    for flag in by_name(PARSERS[program]().sections).values():
        if flag.type in (positive_int, natural):
            found += 1
            most = PARSERS[program]().given([*positional, flag.name, str(2**31 - 1)])
            assert most[flag.dest] == 2**31 - 1
            for number in (2**31, 10**22, 10**400):
                with pytest.raises(UsageError, match=rf"{flag.name}.*'{number}' is not a whole"):
                    PARSERS[program]().given([flag.name, str(number)])
    assert found


def test_schemes_fill_in_their_own_flags() -> None:
    for command, k1, keep_prob in [
        ("--k1 3 --bptt-scheme fixed", 3, None),
        ("--bptt 9 --bptt-scheme fixed", 9, None),
        ("--bptt-scheme randomized", None, 0.5),
        ("--bptt-scheme full", None, None),
    ]:
        args = parse(command)
        settle_scheme(args)
        assert (args.k1, args.keep_prob) == (k1, keep_prob)


def test_quick_is_three_updates_at_most() -> None:
    for command, updates in [("", 3), ("--max-updates 9", 3), ("--max-updates 2", 2)]:
        args = parse(f"--quick {command}")
        settle_scheme(args)
        assert args.max_updates == updates


# What makes a run another run


def test_a_flag_is_compared_unless_it_may_change() -> None:
    free = """data device threads save epochs log_interval diagnostics checkpoint_every
        checkpoint_minutes test_batch_size bigram samples wandb wandb_project wandb_name
        wandb_group wandb_job_type wandb_tags resume dry_run max_updates""".split()  # noqa: SIM905
    saved = vars(parse("--save a.pt"))
    for name in by_name(TRAINING):
        expected = "" if name in free else f"--{name.replace('_', '-')} other (was "
        assert other_flags({name: "other"}, saved).startswith(expected)
        assert (other_flags({name: "other"}, saved) == "") == (name in free)
        assert other_flags({name: saved[name]}, saved) == ""
    assert other_flags({"bigram": True}, saved, also=["bigram"]) == "--bigram True (was False)"


def resumed(command: str, saved: dict[str, Any]) -> argparse.Namespace:
    args, given = parse_training(shlex.split(f"--resume run.pt {command}"))
    args = resume_flags(args, given, saved)
    settle_scheme(args)
    return args


def test_a_resumed_run_has_its_own_flags_but_not_its_session_s() -> None:
    saved = vars(
        parse("--save a.pt --nhid 9 --max-updates 4 --epochs 2 --k1 3 --bptt-scheme fixed")
    )
    args = resumed("--epochs 7 --k1 3", saved)
    assert (args.nhid, args.epochs, args.max_updates, args.k1) == (9, 7, None, 3)
    assert args.save == "a.pt"
    assert args.resume == "run.pt"
    with pytest.raises(UsageError, match=r"other flags: --k1 4 \(was 3\), --lr 2.0 \(was 30.0\)"):
        resumed("--lr 2 --k1 4", saved)


def test_a_flag_newer_than_the_run_counts_with_its_default() -> None:
    saved = vars(parse("--save a.pt --bptt-scheme fixed --bptt 9"))
    for name in ("grad_filter", "k1", "eval_batch_size"):
        del saved[name]
    args = resumed("--grad-filter 0 --k1 9", saved)
    assert (args.grad_filter, args.k1, args.eval_batch_size) == (0, 9, 10)
    with pytest.raises(UsageError) as caught:
        resumed("--grad-filter --k1 8 --eval-batch-size 11", saved)
    differences = "--eval-batch-size 11 (was 10), --grad-filter 10.0 (was 0.0), --k1 8 (was 9)"
    assert str(caught.value).endswith(f"was started with other flags: {differences}")


def test_flags_that_are_gone() -> None:
    saved = vars(parse("--save a.pt"))
    old = resumed("", {**saved, "wavefront": 1, "cuda": None})
    assert vars(old).keys() == saved.keys()
    for gone in (dict(wavefront=3), dict(zone_out=0.1)):
        name = next(iter(gone)).replace("_", "-")
        with pytest.raises(UsageError, match=f"--{name} .*, which this version does not have"):
            resumed("", {**saved, **gone})
