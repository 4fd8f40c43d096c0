"""The AWD-LSTM language model."""

import inspect
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from decoders import DECODERS
from embed_regularize import embedded_dropout
from gradient_filter import GradientFilter
from layers import LAYERS
from layers.layer import State
from locked_dropout import LockedDropout
from noise import Noise
from weight_drop import WeightDrop

# The state of each layer; an LSTM's is (h, c), each (1, B, units).
Hidden = list[State]


class RNNModel(nn.Module):
    """Embedding, a stack of weight-dropped LSTMs with locked dropout between them, and a decoder.

    Merity et al. 2017 (arXiv:1708.02182). With tied weights (Inan et al. 2016, arXiv:1611.01462;
    Press & Wolf 2016, arXiv:1608.05859) the decoder's matrix is the embedding and the last layer
    has ninp units. Parameters are named as in the paper's code, whose state dicts load.

    Args:
        rnn_type: kind of layer, a name in layers.LAYERS: "LSTM" or "GRU".
        ntoken: words in the vocabulary, V.
        ninp: width of the embedding, E.
        nhid: units of each layer, H; with tied weights the last layer has ninp.
        nlayers: number of layers.
        dropout: locked dropout on the last layer's output. This and the next four are
            probabilities in [0, 1); 0 switches one off.
        dropouth: locked dropout between layers.
        dropouti: locked dropout on the embedded input.
        dropoute: embedding dropout (whole words).
        wdrop: weight drop on the hidden-to-hidden weights of every layer.
        tie_weights: decode with the embedding matrix.
        grad_filter: threshold of the gradient filter on the input and masked weights of every
            layer; 0: no filter.
        grad_filter_normalize: divide the filters' masks by that of the median sequence.
        decoder: kind of decoder, a name in decoders.DECODERS.
        layer_options: further keywords of the layers' constructor, plain values.
        decoder_options: further keywords of the decoder's constructor.

    Raises:
        ValueError: an unknown rnn_type or decoder, a size below 1 or a dropout outside [0, 1).
    """

    def __init__(
        self,
        rnn_type: str,
        ntoken: int,
        ninp: int,
        nhid: int,
        nlayers: int,
        dropout: float = 0.5,
        dropouth: float = 0.5,
        dropouti: float = 0.5,
        dropoute: float = 0.1,
        wdrop: float = 0,
        tie_weights: bool = False,
        grad_filter: float = 0,
        grad_filter_normalize: bool = False,
        decoder: str = "linear",
        layer_options: dict[str, Any] | None = None,
        decoder_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        given = locals()
        self._keywords = {name: given[name] for name in inspect.signature(RNNModel).parameters}
        _check(**self._keywords)
        self.ntoken = ntoken
        self.nlayers = nlayers
        self.dropout = dropout
        self.dropouth = dropouth
        self.dropouti = dropouti
        self.dropoute = dropoute
        self.wdrop = wdrop
        # Widths of the embedding and of each layer's output: nlayers + 1 numbers.
        self.layer_sizes = [ninp] + [nhid] * (nlayers - 1) + [ninp if tie_weights else nhid]
        self.encoder = nn.Embedding(ntoken, ninp)
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        own = layer_options or {}
        self.layers = [LAYERS[rnn_type](e, h, **own) for e, h in pairwise(self.layer_sizes)]
        rnns: list[nn.Module] = list(self.layers)
        if wdrop:
            rnns = [WeightDrop(layer, layer.recurrent, dropout=wdrop) for layer in self.layers]
        self.rnns = nn.ModuleList(rnns)
        self.lockdrop = LockedDropout()
        self.decoder = DECODERS[decoder](self.layer_sizes[-1], ntoken, **(decoder_options or {}))
        if tie_weights:
            self.decoder.weight = self.encoder.weight
        if grad_filter:
            for layer in self.layers:
                layer.gradient_filter = GradientFilter(
                    threshold=grad_filter, normalize=grad_filter_normalize
                )

    def init_hidden(self, bsz: int) -> Hidden:
        """Zero states for every layer, for an LSTM (h, c), each (1, bsz, units)."""
        return [layer.init_state(bsz) for layer in self.layers]

    def forward(
        self, input: Tensor, hidden: Hidden, return_h: bool = False, noise: Noise | None = None
    ) -> Any:
        """Run the embedding and all layers over a window of text; the decoder is not run.

        Args:
            input: word ids, (T, B).
            hidden: states from init_hidden or an earlier call.
            return_h: also return every layer's output.
            noise: shares the masks between the calls of one window; None: draw new ones.

        Returns:
            (result, hidden), or (result, hidden, raw_outputs, outputs) with return_h. result is
            the last layer's output after dropout, (T·B, E) (H if untied); raw_outputs and outputs
            hold each layer's output before and after locked dropout, (T, B, units).
        """
        noise = noise or Noise()
        x = embedded_dropout(
            self.encoder, input, self.dropoute if self.training else 0, noise=noise
        )
        x = self.lockdrop(x, self.dropouti, noise.of("input"))
        new_hidden, raw_outputs, outputs = [], [], []
        dropouts = [self.dropouth] * (self.nlayers - 1) + [self.dropout]
        for n, (rnn, state, dropout) in enumerate(zip(self.rnns, hidden, dropouts, strict=True)):
            own = noise.of(f"layer {n}")
            raw_output, state = rnn(x, state, noise=own)
            x = self.lockdrop(raw_output, dropout, own)
            new_hidden.append(state)
            raw_outputs.append(raw_output)
            outputs.append(x)
        result = x.flatten(0, 1)
        if return_h:
            return result, new_hidden, raw_outputs, outputs
        return result, new_hidden

    def config(self) -> dict[str, Any]:
        """The constructor's keywords, plain numbers and strings; they rebuild this model."""
        return dict(self._keywords)


def _check(rnn_type: str, decoder: str, **values: Any) -> None:
    for name, kind, known in (("rnn_type", rnn_type, LAYERS), ("decoder", decoder, DECODERS)):
        if kind not in known:
            raise ValueError(f"{name} is {kind!r}; it must be one of {', '.join(known)}")
    for name in ("ntoken", "ninp", "nhid", "nlayers"):
        if values[name] < 1:
            raise ValueError(f"{name} is {values[name]}; it must be at least 1")
    for name in ("dropout", "dropouth", "dropouti", "dropoute", "wdrop"):
        if not 0 <= values[name] < 1:
            raise ValueError(f"{name} is {values[name]}; it must be in [0, 1)")


def repackage_hidden(hidden: Hidden) -> Hidden:
    """Detach the states, so that no gradient passes to earlier windows."""
    return [tuple(part.detach() for part in state) for state in hidden]


def count_parameters(model: nn.Module) -> int:
    """Number of trained values; a tied matrix counts once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
