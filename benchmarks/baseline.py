"""A straightforward implementation of the training step, as the baseline of benchmarks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Hidden = list[tuple[Tensor, Tensor]]


class BaselineModel(nn.Module):
    """AWD-LSTM from stock parts: multiplies by every mask and calls nn.LSTM.

    Same sizes, dropouts, order and distributions of masks as model.RNNModel with tied weights.
    """

    def __init__(
        self, ntoken: int, ninp: int, nhid: int, nlayers: int, dropouts: dict[str, float]
    ) -> None:
        super().__init__()
        self.dropouts = dropouts
        sizes = [ninp] + [nhid] * (nlayers - 1) + [ninp]
        self.encoder = nn.Embedding(ntoken, ninp)
        self.rnns = nn.ModuleList([nn.LSTM(sizes[i], sizes[i + 1]) for i in range(nlayers)])
        self.raw = nn.ParameterList()
        for rnn in self.rnns:
            self.raw.append(rnn.weight_hh_l0)
            del rnn.weight_hh_l0
        self.decoder = nn.Linear(ninp, ntoken)
        self.decoder.weight = self.encoder.weight
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        self.sizes = sizes

    def init_hidden(self, batch_size: int) -> Hidden:
        """Zero states."""
        weight = self.encoder.weight
        return [
            (weight.new_zeros(1, batch_size, n), weight.new_zeros(1, batch_size, n))
            for n in self.sizes[1:]
        ]

    def forward(self, words: Tensor, hidden: Hidden) -> tuple[Tensor, Tensor, Tensor, Hidden]:
        """Logits (T, B, V), last layer's raw and dropped outputs (T, B, E), states."""
        p = self.dropouts
        keep = torch.full((len(self.encoder.weight), 1), 1 - p["dropoute"], device=words.device)
        mask = torch.bernoulli(keep) / (1 - p["dropoute"])
        x = F.embedding(words, self.encoder.weight * mask)
        x = locked(x, p["dropouti"])
        states = []
        raw = x
        for i, rnn in enumerate(self.rnns):
            rnn.weight_hh_l0 = F.dropout(self.raw[i], p["wdrop"])
            raw, state = rnn(x, hidden[i])
            states.append(state)
            x = locked(raw, p["dropout"] if i == len(self.rnns) - 1 else p["dropouth"])
        return self.decoder(x), raw, x, states


def locked(x: Tensor, p: float) -> Tensor:
    """Dropout with one mask for all time steps."""
    mask = torch.bernoulli(torch.full((1, x.size(1), x.size(2)), 1 - p, device=x.device)) / (1 - p)
    return x * mask.expand_as(x)


class BaselineStep:
    """An update with torch.optim.SGD and clip_grad_norm_."""

    def __init__(self, model: BaselineModel, lr: float, clip: float, wdecay: float) -> None:
        self.model = model
        self.lr = lr
        self.clip = clip
        self.optimizer = torch.optim.SGD(model.parameters(), lr=lr, weight_decay=wdecay)

    def __call__(
        self, words: Tensor, targets: Tensor, hidden: Hidden, scale: float
    ) -> tuple[Any, Hidden]:
        """Loss and new states; words and targets (T, B)."""
        self.optimizer.param_groups[0]["lr"] = self.lr * scale
        self.optimizer.zero_grad()
        hidden = [(h.detach(), c.detach()) for h, c in hidden]
        logits, raw, dropped, hidden = self.model(words, hidden)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        objective = loss + 2 * dropped.pow(2).mean() + (raw[1:] - raw[:-1]).pow(2).mean()
        objective.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return loss, hidden
