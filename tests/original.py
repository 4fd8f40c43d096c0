"""The command lines of the original's README for the LSTM, as they stand there.

Each list is run in its order, in one folder: a program works on what the ones before it saved.
"""

COMMANDS: dict[str, list[str]] = {
    "penn": [
        "main.py --batch_size 20 --data data/penn --dropouti 0.4 --dropouth 0.25 --seed 141 "
        "--epoch 500 --save PTB.pt",
        "finetune.py --batch_size 20 --data data/penn --dropouti 0.4 --dropouth 0.25 --seed 141 "
        "--epoch 500 --save PTB.pt",
        "pointer.py --data data/penn --save PTB.pt --lambdasm 0.1 --theta 1.0 --window 500 "
        "--bptt 5000",
    ],
    "wikitext-2": [
        "main.py --epochs 750 --data data/wikitext-2 --save WT2.pt --dropouth 0.2 --seed 1882",
        "finetune.py --epochs 750 --data data/wikitext-2 --save WT2.pt --dropouth 0.2 --seed 1882",
        "pointer.py --save WT2.pt --lambdasm 0.1279 --theta 0.662 --window 3785 --bptt 2000 "
        "--data data/wikitext-2",
    ],
    "enwik8": [
        "main.py --epochs 50 --nlayers 3 --emsize 400 --nhid 1840 --alpha 0 --beta 0 --dropoute 0 "
        "--dropouth 0.1 --dropouti 0.1 --dropout 0.4 --wdrop 0.2 --wdecay 1.2e-6 --bptt 200 "
        "--batch_size 128 --optimizer adam --lr 1e-3 --data data/enwik8 --save ENWIK8.pt "
        "--when 25 35",
    ],
    "pennchar": [
        "main.py --epochs 500 --nlayers 3 --emsize 200 --nhid 1000 --alpha 0 --beta 0 --dropoute 0 "
        "--dropouth 0.25 --dropouti 0.1 --dropout 0.1 --wdrop 0.5 --wdecay 1.2e-6 --bptt 150 "
        "--batch_size 128 --optimizer adam --lr 2e-3 --data data/pennchar --save PTBC.pt "
        "--when 300 400",
    ],
}
# What is added where a program would run for days; finetune.py has the sizes of main.py's model.
CUT_SHORT: dict[str, list[str]] = {
    "main.py": ["--max-updates", "2", "--device", "cpu"],
    "finetune.py": ["--max-updates", "2", "--device", "cpu"],
}

# The flags of main.py's lines.
WORD_LEVEL, CHARACTER_LEVEL = (
    [COMMANDS[name][0].removeprefix("main.py ") for name in names]
    for names in (("penn", "wikitext-2"), ("enwik8", "pennchar"))
)
