"""The command line: the original's commands run, recipes, help, the dry run, and the files."""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import REAL_DATA, ROOT, TINY, Result

import assembly
import cli
from engine.checkpoint import load_model

Run = Callable[..., Result]

# The training commands of the original's README, and its character-level ones with the LSTM.
WORD_LEVEL = [
    "--batch_size 20 --data data/penn --dropouti 0.4 --dropouth 0.25 --seed 141 --epoch 500 "
    "--save PTB.pt",
    "--epochs 750 --data data/wikitext-2 --save WT2.pt --dropouth 0.2 --seed 1882",
]
CHARACTER_LEVEL = [
    "--epochs 50 --nlayers 3 --emsize 400 --nhid 1840 --alpha 0 --beta 0 --dropoute 0 "
    "--dropouth 0.1 --dropouti 0.1 --dropout 0.4 --wdrop 0.2 --wdecay 1.2e-6 --bptt 200 "
    "--batch_size 128 --optimizer adam --lr 1e-3 --data data/enwik8 --save ENWIK8.pt --when 25 35",
    "--epochs 500 --nlayers 3 --emsize 200 --nhid 1000 --alpha 0 --beta 0 --dropoute 0 "
    "--dropouth 0.25 --dropouti 0.1 --dropout 0.1 --wdrop 0.5 --wdecay 1.2e-6 --bptt 150 "
    "--batch_size 128 --optimizer adam --lr 2e-3 --data data/pennchar --save PTBC.pt "
    "--when 300 400",
]


def parse(command: str) -> argparse.Namespace:
    return cli.parse_training(shlex.split(command))[0]


@pytest.mark.parametrize("command", WORD_LEVEL + CHARACTER_LEVEL)
def test_commands_of_the_original_parse(command: str) -> None:
    args = parse(command)
    assert args.model == "LSTM"
    assert args.epochs in (50, 500, 750)


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


def test_flags_of_several_words_have_both_spellings() -> None:
    for action in cli.training_parser()._actions:
        names = {name.lstrip("-") for name in action.option_strings}
        for name in names:
            assert {name.replace("-", "_"), name.replace("_", "-")} <= names or name in "h help"
    assert parse("--batch-size 3").batch_size == parse("--batch_size 3").batch_size == 3


def test_help_is_in_groups_and_gives_every_default() -> None:
    text = cli.training_parser().format_help()
    for group in ("corpus", "model", "regularisers", "optimisation", "run", "logging"):
        assert re.search(rf"^{group}.*:$", text, re.MULTILINE)
    for action in cli.training_parser()._actions:
        if action.help != argparse.SUPPRESS:
            assert action.help
            assert action.option_strings[0] in text


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
    ours = vars(parse(f"@{ROOT / 'recipes' / recipe}.txt"))
    assert ours == vars(parse(command))


def test_a_run_writes_what_the_contract_says(run: Run, corpus_folder: Path, tmp_path: Path) -> None:
    save = tmp_path / "run.pt"
    result = run(*TINY, "--data", corpus_folder, "--save", save, "--epochs", 2, "--samples", 2)
    assert result.code == 0
    lines = result.out.splitlines()
    number = r" *\d+\.\d\d"
    bits = r" *\d+\.\d{3}"
    epoch = rf"\| end of epoch   \d \| time:{number}s \| valid loss{number} \| valid ppl{number} "
    epochs = [line for line in lines if re.fullmatch(epoch + rf"\| valid bpc{bits}", line)]
    assert len(epochs) == 2
    end = rf"\| End of training \| test loss{number} \| test ppl{number} \| test bpc{bits}"
    assert re.fullmatch(end, lines[-3])
    assert all(line.startswith("| It writes: w") for line in lines[-2:])
    assert re.search(
        rf"^\| epoch   1 \|     3/ +\d+ batches \| lr 2.00000 \| ms/batch{number} "
        rf"\| loss{number} \| ppl{number} \| bpc{bits}$",
        result.err,
        re.MULTILINE,
    )

    folder = tmp_path / "run"
    assert {p.name for p in folder.iterdir()} >= {
        "last.pt", "metrics.jsonl", "config.json", "summary.json",
    }  # fmt: skip
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = {
        "train": "step epoch loss ppl lr grad_norm tokens_per_second",
        "valid": "step epoch loss ppl averaged",
        "test": "step loss ppl bpc",
    }
    assert {event["event"] for event in events} == set(keys)
    for event in events:
        assert set(event) == {"event", *keys[event["event"]].split()}
    config = json.loads((folder / "config.json").read_text())
    assert config["flags"]["nhid"] == 8
    assert config["argv"][:2] == ["--emsize", "6"]
    assert config["versions"]["torch"] == torch.__version__
    summary = json.loads((folder / "summary.json").read_text())
    valid = [event["ppl"] for event in events if event["event"] == "valid"]
    assert summary["best_valid_ppl"] == min(valid)
    assert summary["test_ppl"] == events[-1]["ppl"]
    assert summary["best_epoch"] == valid.index(min(valid)) + 1
    assert summary["epochs"] == 2
    assert summary["diverged"] is False
    assert summary["parameters"] == sum(p.numel() for p in load_model(save)[0].parameters())
    assert summary["peak_memory_bytes"] > 1e7
    assert summary["tokens_per_second"] > 0
    assert summary["seconds"] > 0


def test_an_epoch_that_is_cut_short_is_not_called_ended(
    run: Run, corpus_folder: Path, tmp_path: Path
) -> None:
    flags = [*TINY, "--data", corpus_folder, "--save", tmp_path / "run.pt", "--max-updates", 2]
    result = run(*flags)
    assert "| within epoch   1 | time" in result.out
    assert "end of epoch" not in result.out


def test_end_of_training_is_the_last_line(run: Run, corpus_folder: Path, tmp_path: Path) -> None:
    flags = [*TINY, "--data", corpus_folder, "--save", tmp_path / "run.pt", "--max-updates", 2]
    result = run(*flags, "--bigram")
    bigram, last = result.out.splitlines()[-2:]
    assert "| Interpolated bigram model of the same text | test ppl " in bigram
    assert last.startswith("| End of training | test loss")


def test_an_earlier_run_is_kept(run: Run, corpus_folder: Path, tmp_path: Path) -> None:
    flags = [*TINY, "--data", corpus_folder, "--save", tmp_path / "run.pt", "--max-updates"]
    assert run(*flags, 1).err.count("warning") == 0
    (tmp_path / "run.pt.e7").write_bytes(b"kept by --when")
    first = (tmp_path / "run.pt").read_bytes()
    result = run(*flags, 2)
    assert f"warning: the run that was in {tmp_path / 'run'} is now in" in result.err
    run(*flags, 3)
    assert (tmp_path / "run.1.pt").read_bytes() == first
    assert (tmp_path / "run.1.pt.e7").read_bytes() == b"kept by --when"
    assert json.loads((tmp_path / "run.2" / "summary.json").read_text())["updates"] == 2
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["updates"] == 3


@pytest.mark.parametrize("regulariser", ["dropout", "dropouth", "dropouti", "dropoute", "wdrop"])
def test_each_dropout_is_switched_off_by_its_flag_alone(
    run: Run, corpus_folder: Path, tmp_path: Path, regulariser: str
) -> None:
    base = [*TINY, "--data", corpus_folder, "--max-updates", 4]
    zero = [
        f
        for name in ("dropout", "dropouth", "dropouti", "dropoute", "wdrop")
        for f in (f"--{name}", "0")
        if name != regulariser
    ]
    losses = {}
    for name, flags in {"on": [], "off": [f"--{regulariser}", "0"]}.items():
        run(*base, *zero, *flags, "--save", tmp_path / f"{name}.pt")
        losses[name] = (tmp_path / name / "metrics.jsonl").read_text().split('"lr"')[0]
    assert losses["on"] != losses["off"]


def test_no_asgd_untied_fixed_and_one_layer(run: Run, corpus_folder: Path, tmp_path: Path) -> None:
    flags = [*TINY, "--data", corpus_folder, "--nonmono", 0, "--lr", 30, "--epochs", 6]
    flags += ["--no-asgd", "--untied", "--bptt-scheme", "fixed", "--nlayers", 1]
    assert run(*flags, "--save", tmp_path / "run.pt").code == 0
    assert "averaging" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    model, _ = load_model(tmp_path / "run.pt")
    assert model.decoder.weight.shape[1] == 8


def test_adam_with_a_learning_rate_of_sgd_warns(
    run: Run, corpus_folder: Path, tmp_path: Path
) -> None:
    flags = [*TINY, "--data", corpus_folder, "--save", tmp_path / "run.pt", "--max-updates", 1]
    warning = "warning: --optimizer adam with --lr 30, which is a learning rate for sgd"
    assert warning in run(*flags, "--optimizer", "adam", "--lr", 30).err
    assert "warning: --opt" not in run(*flags, "--optimizer", "adam", "--lr", 0.01).err


def test_dry_run_says_what_it_would_do_and_does_nothing(
    run: Run, corpus_folder: Path, tmp_path: Path
) -> None:
    result = run(*TINY, "--data", corpus_folder, "--save", tmp_path / "run.pt", "--dry-run")
    assert result.code == 0
    assert result.err == ""
    for what in ("tokens", "vocabulary", "parameters", "updates per epoch", "memory"):
        assert f"| {what} " in result.out
    assert not (tmp_path / "run").exists()


def test_dry_run_knows_the_schemes(run: Run, corpus_folder: Path, tmp_path: Path) -> None:
    def plan(*flags: object) -> tuple[int, int]:
        base = [*TINY, "--data", corpus_folder, "--save", tmp_path / "run.pt", "--dry-run"]
        out = run(*base, "--emsize", 60, "--nhid", 90, *flags).out.replace(",", "")
        found = [re.search(rf"\| {w} .*?about (\d+)", out) for w in ("updates per epoch", "memory")]
        return int(found[0][1]), int(found[1][1])  # type: ignore[index]

    words = (corpus_folder / "train.txt").read_text().replace("\n", " <eos> ").split()
    steps = len(words) // 4 - 1
    assert steps > 100
    updates, memory = plan("--bptt-scheme", "fixed", "--bptt", 20)
    assert updates == round(steps / 20)
    assert plan("--bptt-scheme", "fixed", "--bptt", 20, "--k1", 5)[0] == round(steps / 5)
    assert plan("--bptt-scheme", "fixed", "--bptt", 20, "--k1", 40) == (round(steps / 40), memory)
    randomized = plan("--bptt-scheme", "randomized", "--bptt", 20, "--keep-prob", 0.75)
    assert randomized[0] == round(1 + (steps - 1) // 20 / 4)
    full = plan("--bptt-scheme", "full", "--bptt", 20)
    assert full[0] == 1
    assert memory <= full[1] < randomized[1]
    assert plan("--bptt-scheme", "full", "--bptt", 9999)[1] > 1.5 * memory


def test_same_seed_same_run_and_another_seed_another(
    run: Run, corpus_folder: Path, tmp_path: Path
) -> None:
    results = []
    for i, seed in enumerate((1, 1, 2)):
        flags = ["--data", corpus_folder, "--save", tmp_path / f"{i}.pt", "--seed", seed]
        results.append(run(*TINY, *flags, "--epochs", 1).out.splitlines()[-1])
    assert results[0] == results[1] != results[2]


SMALL = ["--emsize", "16", "--nhid", "16", "--device", "cpu", "--test-batch-size", "50"]


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"no corpora in {REAL_DATA}")
@pytest.mark.parametrize(
    ("command", "size"),
    [
        (WORD_LEVEL[0], SMALL),
        pytest.param(WORD_LEVEL[1], SMALL, marks=pytest.mark.slow),
        pytest.param(WORD_LEVEL[0], [], marks=pytest.mark.slow),
        pytest.param(WORD_LEVEL[1], [], marks=pytest.mark.slow),
    ],
    ids=["penn, small", "wikitext-2, small", "penn", "wikitext-2"],
)
def test_commands_of_the_original_run(command: str, size: list[str], tmp_path: Path) -> None:
    """As they stand, cut short, on the real corpora."""
    (tmp_path / "data").symlink_to(REAL_DATA.resolve())
    argv = [sys.executable, str(ROOT / "main.py"), *command.split(), *size, "--max-updates", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count() if not size else 1)}
    result = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith("| End of training | test loss")


def test_parameters_of_the_papers_model() -> None:
    args = parse(WORD_LEVEL[0])
    assert sum(p.numel() for p in assembly.build_model(args, 10_000).parameters()) == 24_221_600
