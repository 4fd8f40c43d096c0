"""The AWD-LSTM language model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embed_regularize import embedded_dropout
from gradient_filter import GradientFilter
from lanes import Lanes
from linear_cross_entropy import linear_cross_entropy
from locked_dropout import apply_mask, draw_mask
from lstm_cpu import lstm_layer
from lstm_cudnn import CudnnLSTM, pad_last, unpad_last
from weight_drop import WeightDrop, lend_weights

Hidden = list[tuple[Tensor, Tensor]]
# An LSTM's weights in the order in which kernels take them.
WEIGHTS = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")


@dataclass
class Masks:
    """What one window of text is dropped by; None or nothing where nothing is dropped.

    words: a factor per word of the vocabulary, (V, 1).
    locked: factors on the embedded input and on each layer's output, (1, B, units), nlayers + 1.
    weights: per layer, factors on its dropped weights by their names.
    """

    words: Tensor | None
    locked: list[Tensor | None]
    weights: list[dict[str, Tensor]]

    def columns(self, share: slice) -> "Masks":
        """The masks of some of the batch's columns."""
        locked = [None if mask is None else mask[:, share] for mask in self.locked]
        return Masks(self.words, locked, self.weights)


class RNNModel(nn.Module):
    """Embedding, a stack of weight-dropped LSTMs with locked dropout between them, and a decoder.

    Merity et al. 2017 (arXiv:1708.02182). With tied weights (Inan et al. 2016, arXiv:1611.01462;
    Press & Wolf 2016, arXiv:1608.05859) the decoder's matrix is the embedding and the last LSTM
    has ninp units. Parameters are named as in the paper's code, whose state dicts load.

    Args:
        rnn_type: "LSTM".
        ntoken: words in the vocabulary, V.
        ninp: width of the embedding, E.
        nhid: units of each LSTM but, with tied weights, the last, H.
        nlayers: number of LSTMs.
        dropout: locked dropout on the last LSTM's output. Like all four that follow a
            probability in [0, 1); 0 switches it off.
        dropouth: locked dropout between LSTMs.
        dropouti: locked dropout on the embedded input.
        dropoute: embedding dropout (whole words).
        wdrop: weight drop on the hidden-to-hidden weights of every LSTM.
        tie_weights: decode with the embedding matrix.
        grad_filter: threshold of a gradient filter in front of every LSTM, over its input and its
            weights as the kernel sees them; 0: none.

    Raises:
        ValueError: an rnn_type other than "LSTM", a size below 1 or a dropout outside [0, 1).
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
    ) -> None:
        super().__init__()
        if rnn_type != "LSTM":
            raise ValueError(f"rnn_type is {rnn_type!r}; only 'LSTM' is supported")
        for name, size in dict(ntoken=ntoken, ninp=ninp, nhid=nhid, nlayers=nlayers).items():
            if size < 1:
                raise ValueError(f"{name} is {size}; it must be at least 1")
        rates = dict(dropout=dropout, dropouth=dropouth, dropouti=dropouti)
        for name, rate in dict(rates, dropoute=dropoute, wdrop=wdrop).items():
            if not 0 <= rate < 1:
                raise ValueError(f"{name} is {rate}; it must be in [0, 1)")
        self.rnn_type = rnn_type
        self.ntoken = ntoken
        self.ninp = ninp
        self.nhid = nhid
        self.nlayers = nlayers
        self.dropout = dropout
        self.dropouth = dropouth
        self.dropouti = dropouti
        self.dropoute = dropoute
        self.wdrop = wdrop
        self.tie_weights = tie_weights
        self.grad_filter = grad_filter
        self.encoder = nn.Embedding(ntoken, ninp)
        sizes = self.layer_sizes
        rnns: list[nn.Module] = [nn.LSTM(sizes[i], sizes[i + 1]) for i in range(nlayers)]
        if wdrop:
            rnns = [WeightDrop(rnn, ["weight_hh_l0"], dropout=wdrop) for rnn in rnns]
        self.rnns = nn.ModuleList(rnns)
        self.filters = nn.ModuleList(
            [GradientFilter(threshold=grad_filter) for _ in rnns] if grad_filter else []
        )
        self.decoder = nn.Linear(sizes[-1], ntoken)
        if tie_weights:
            self.decoder.weight = self.encoder.weight
        self.init_weights()
        self.compute_in(None)

    @property
    def layer_sizes(self) -> list[int]:
        """Widths along the stack: the embedding's, then each LSTM's output, nlayers + 1 in all."""
        last = self.ninp if self.tie_weights else self.nhid
        return [self.ninp] + [self.nhid] * (self.nlayers - 1) + [last]

    @property
    def gradient_filters(self) -> list[GradientFilter]:
        """The gradient filters, one a layer; none where they are off."""
        return [gate for gate in self.filters if isinstance(gate, GradientFilter)]

    def compute_in(self, dtype: torch.dtype | None, kernel: str = "plain", chunks: int = 1) -> None:
        """Say in what training computes its layers and its decoder; no checkpoint knows of it.

        Args:
            dtype: what their weights and inputs are cast to, bfloat16 or float16; None: they stay
                as they are. Weights, their gradients, states, penalties and the loss stay
                float32 in any case, and evaluation computes in float32 (by a GPU's settings for
                float32 products).
            kernel: "plain": nn.LSTM and F.cross_entropy; "cpu": lstm_cpu and
                linear_cross_entropy; "cudnn": lstm_cudnn, for the device and the dtype that the
                weights have now, and linear_cross_entropy. What was recorded as a CUDA graph
                before must not be replayed afterwards.
            chunks: of time that a window is cut into by "cudnn", so that layers overlap (see
                Lanes). Its result is that of whole windows, but for the order of sums and, in 16
                bits, cells that are rounded between chunks. Not with gradient filters, which
                look at whole windows.

        Raises:
            ValueError: several chunks with another kernel, or gradient filters.
        """
        if chunks > 1 and (kernel != "cudnn" or self.filters):
            what = "gradient filters" if self.filters else f"the {kernel} kernel"
            raise ValueError(f"layers cannot overlap with {what}")
        self.compute_dtype = dtype
        self.kernel = kernel
        self._cast_decoder: Tensor | None = None
        self._layers_filled = False
        self.cudnn_layers: list[CudnnLSTM] = []
        self.chunks = chunks
        weight = self.encoder.weight
        self.lanes = Lanes(self.nlayers if chunks > 1 else 0, weight.device)
        if kernel == "cudnn":
            self.cudnn_layers = [
                CudnnLSTM(width, units, dtype or weight.dtype, weight.device)
                for width, units in pairwise(self.layer_sizes)
            ]

    @contextmanager
    def weights_held(self, masks: Masks) -> Iterator[None]:
        """While this lasts no weight changes, and training runs under these masks alone.

        So the fast kernels need not cast weights for each call: the decoder's, and where cuDNN
        computes the layers theirs, are cast once.
        """
        kernel, weight = self._kernel, self.decoder.weight.detach()
        try:
            if kernel != "plain":
                self._cast_decoder = weight.to(self.compute_dtype or weight.dtype)
            if kernel == "cudnn":
                for layer, rnn, dropped in zip(
                    self.cudnn_layers, self.rnns, masks.weights, strict=True
                ):
                    weights = _raw_weights(rnn)
                    layer.fill([weights[name] for name in WEIGHTS], dropped.get("weight_hh_l0"))
                self._layers_filled = True
            yield
        finally:
            self._cast_decoder, self._layers_filled = None, False

    def config(self) -> dict[str, Any]:
        """The keywords that build this model again, plain numbers and strings."""
        names = ["rnn_type", "ntoken", "ninp", "nhid", "nlayers", "dropout", "dropouth"]
        names += ["dropouti", "dropoute", "wdrop", "tie_weights", "grad_filter"]
        return {name: getattr(self, name) for name in names}

    def init_weights(self) -> None:
        """Embedding and decoder uniform in [-0.1, 0.1], no bias; the LSTMs stay at +-1/sqrt(H)."""
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)

    def init_hidden(self, bsz: int) -> Hidden:
        """Zero states (h, c) for every layer, each (1, bsz, units)."""
        weight = self.encoder.weight
        return [
            (weight.new_zeros(1, bsz, units), weight.new_zeros(1, bsz, units))
            for units in self.layer_sizes[1:]
        ]

    def draw_masks(self, bsz: int) -> Masks:
        """Draw what one window is dropped by; in evaluation, and where a rate is 0, nothing.

        The draws come in the order in which they are used: words, input, then for each layer its
        weights and its output.
        """
        like, sizes = self.encoder.weight, self.layer_sizes
        rates = [self.dropouti] + [self.dropouth] * (self.nlayers - 1) + [self.dropout]
        if not self.training:
            return Masks(None, [None] * len(sizes), [{} for _ in self.rnns])
        words = draw_mask(like, (self.ntoken, 1), self.dropoute) if self.dropoute else None
        masks = Masks(words, [], [])
        for i, (units, rate) in enumerate(zip(sizes, rates, strict=True)):
            if i:
                rnn = self.rnns[i - 1]
                masks.weights.append(rnn.draw_masks() if isinstance(rnn, WeightDrop) else {})
            masks.locked.append(draw_mask(like, (1, bsz, units), rate) if rate else None)
        return masks

    def forward(
        self, input: Tensor, hidden: Hidden, return_h: bool = False, masks: Masks | None = None
    ) -> Any:
        """Run a window of text through the stack.

        Args:
            input: word ids, (T, B).
            hidden: states from init_hidden or an earlier call.
            return_h: also return every layer's output.
            masks: from draw_masks, for a window that is run in several calls; None: fresh ones.

        Returns:
            (result, hidden), or (result, hidden, raw_outputs, outputs) with return_h. result is
            the last layer's output after dropout, (T·B, E) (H if untied), not decoded;
            raw_outputs and outputs hold each layer's output before and after locked dropout,
            (T, B, units).
        """
        masks = masks or self.draw_masks(input.size(1))
        x = embedded_dropout(self.encoder, input, 0, masks.words)
        x = drop(x, masks.locked[0])
        new_hidden, raw_outputs, outputs = self._run_layers(x, hidden, masks)
        result = outputs[-1].flatten(0, 1)
        if return_h:
            return result, new_hidden, raw_outputs, outputs
        return result, new_hidden

    @property
    def _kernel(self) -> str:
        return self.kernel if self.training else "plain"

    def _run_layers(
        self, x: Tensor, hidden: Hidden, masks: Masks
    ) -> tuple[Hidden, list[Tensor], list[Tensor]]:
        """The stack over (T, B, E): of each layer the last states, the output, and that dropped."""
        parts, lanes = [x], Lanes(0, x.device)
        if self.chunks > 1 and self.training:
            parts, lanes = list(x.split(-(-len(x) // self.chunks))), self.lanes
        states = list(hidden)
        raw_outputs: list[list[Tensor]] = [[] for _ in states]
        outputs: list[list[Tensor]] = [[] for _ in states]
        with lanes.opened():
            for part in parts:
                for layer, state in enumerate(states):
                    with lanes.lane(layer, part):
                        output, states[layer] = self._run_layer(
                            layer, part, state, masks.weights[layer]
                        )
                        units, mask = state[0].size(-1), masks.locked[layer + 1]
                        raw_outputs[layer].append(unpad_last(output, units))
                        part = self._drop(output, mask, units, last=layer == self.nlayers - 1)
                        outputs[layer].append(unpad_last(part, units))
        return states, [_join(parts) for parts in raw_outputs], [_join(parts) for parts in outputs]

    def _drop(self, output: Tensor, mask: Tensor | None, units: int, last: bool) -> Tensor:
        """Output under its locked mask; between cuDNN's layers it keeps its dtype and padding."""
        if last or self._kernel != "cudnn":
            return drop(unpad_last(output, units), mask)
        return output if mask is None else apply_mask(output, pad_last(mask, output.size(-1)))

    def _run_layer(
        self, layer: int, x: Tensor, hidden: tuple[Tensor, Tensor], masks: dict[str, Tensor]
    ) -> Any:
        """One LSTM over (T, B, units) with its weights under their masks, behind its filter."""
        rnn: Any = self.rnns[layer]
        kernel, dtype = self._kernel, self.compute_dtype if self.training else None
        weights: dict[str, Tensor] = {}
        # cuDNN's layer masks weights on their way into its buffer; a filter comes after the masks.
        if isinstance(rnn, WeightDrop) and (kernel != "cudnn" or self.filters):
            weights, masks = rnn.masked(masks, None if kernel == "cudnn" else dtype), {}
        lstm: Any = rnn.module if isinstance(rnn, WeightDrop) else rnn
        if self.filters or kernel != "plain" or dtype is not None:
            weights = _raw_weights(rnn) | weights
        if dtype is not None:
            x = x.to(dtype)
            if kernel == "plain":  # the others cast them themselves
                weights = {name: w.to(dtype) for name, w in weights.items()}
        if self.filters:
            x, *filtered = self.filters[layer](x, *weights.values())
            weights = dict(zip(weights, filtered, strict=True))
        h, c = hidden
        if kernel != "plain":
            listed = [weights[name] for name in WEIGHTS]
            if kernel == "cudnn":
                mask, filled = masks.get("weight_hh_l0"), self._layers_filled
                return self.cudnn_layers[layer](x, hidden, listed, mask, filled)
            output, h, c = lstm_layer(x, h[0], c[0], *listed)
            return output, (h[None], c[None])
        with lend_weights(lstm, weights):
            output, (h_n, c_n) = lstm(x, (h.to(x.dtype), c.to(x.dtype)))
        return output, (h_n.to(h.dtype), c_n.to(c.dtype))

    def loss(self, result: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of forward's result, nats per token, float32.

        Args:
            result: (T·B, E), not decoded.
            targets: ids of the words that follow, (T·B,).
        """
        weight, bias = self.decoder.weight, self.decoder.bias
        dtype = self.compute_dtype if self.training else None
        if self._kernel != "plain":
            result = result.to(dtype or result.dtype)
            return linear_cross_entropy(result, weight, bias, targets, self._cast_decoder)
        if dtype is None:
            return F.cross_entropy(self.decoder(result), targets)
        logits = F.linear(result.to(dtype), weight.to(dtype), bias.to(dtype))
        return F.cross_entropy(logits.float(), targets)


def _raw_weights(rnn: nn.Module) -> dict[str, Tensor]:
    """An LSTM's weights as they are trained, by nn.LSTM's names for them."""
    lstm = rnn.module if isinstance(rnn, WeightDrop) else rnn
    return {name.removesuffix("_raw"): w for name, w in lstm.named_parameters()}


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def drop(x: Tensor, mask: Tensor | None) -> Tensor:
    """x under a mask of Masks; None drops nothing."""
    return x if mask is None else x * mask


def repackage_hidden(hidden: Hidden) -> Hidden:
    """The same states cut off from their history, so that no gradient goes further back."""
    return [(h.detach(), c.detach()) for h, c in hidden]


def count_parameters(model: nn.Module) -> int:
    """Number of trained values, a tied matrix counted once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
