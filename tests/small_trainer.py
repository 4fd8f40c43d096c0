"""A trainer of a small model, put together without flags, for tests that count by hand."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from bptt import Scheme
from data.corpus import Corpus, batchify
from engine.interrupt import Interrupt
from engine.run_folder import RunFolder
from engine.tracking import Silence
from model import RNNModel
from noise import Noise
from nt_asgd import NTASGD
from training.objective import Objective, Penalty
from training.state import TrainingOptions
from training.step import PlainStep
from training.trainer import Trainer
from training.update import Updater


class SmallTrainer(Trainer):
    """Trainer with plain updates, whose noise can be looked at."""

    updater: Updater

    def __init__(
        self,
        folder: Path,
        model: RNNModel,
        scheme: Scheme,
        corpus: Corpus,
        penalties: Sequence[Penalty],
        *,
        batch_size: int,
        bptt: int,
        lr: float,
        wdecay: float = 0.0,
        clip: float = 0.0,
    ) -> None:
        device = model.encoder.weight.device
        generator = torch.Generator(device).manual_seed(3)
        optimizer = NTASGD(model.parameters(), lr, wdecay)
        self.step = PlainStep(optimizer, clip)
        updater = Updater(
            Objective(model, penalties),
            batchify(corpus.train, batch_size).to(device),
            self.step,
            bptt=bptt,
            make_noise=partial(Noise, generator),
        )
        run_folder = RunFolder(folder / "run.pt", writes=False)
        run_folder.folder.mkdir(exist_ok=True)
        options = TrainingOptions(epochs=1, batch_size=batch_size)
        super().__init__(
            model, optimizer, scheme, corpus, updater, generator, options, run_folder,
            Interrupt(), identity={},
        )  # fmt: skip
        self.tracker = Silence()
        model.train()

    def fix_noise(self, noise: Noise | None = None) -> Noise:
        """All updates to come get this noise, fresh if None, and so the same factors."""
        noise = noise or Noise(self.generator)
        self.updater.make_noise = lambda: noise
        return noise
