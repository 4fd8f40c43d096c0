"""Which layer waits for what, on streams that keep count of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from lanes import Lanes


class FakeStream:
    """What has been launched in a stream, and what that waits for."""

    current: "FakeStream"

    def __init__(self, device: object = None) -> None:
        self.device = device
        self.after: set[Any] = set()

    def wait_stream(self, other: "FakeStream") -> None:
        self.after |= other.after


@contextmanager
def on(stream: FakeStream) -> Iterator[None]:
    before, FakeStream.current = FakeStream.current, stream
    yield
    FakeStream.current = before


class Given:
    def __init__(self) -> None:
        self.kept_for: list[FakeStream] = []

    def record_stream(self, stream: FakeStream) -> None:
        self.kept_for.append(stream)


def test_a_layer_waits_for_the_one_below_and_for_nothing_above(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream.current)
    main = FakeStream.current = FakeStream()
    layers, chunks = 3, 4
    lanes = Lanes(layers, torch.device("cuda"))
    for window in range(2):
        FakeStream.current.after.add(("masks", window))
        with lanes.opened():
            for chunk in range(chunks):
                for layer in range(layers):
                    given: Any = Given()
                    with lanes.lane(layer, given):
                        stream = FakeStream.current
                        assert stream is lanes.streams[layer]  # type: ignore[comparison-overlap]
                        assert given.kept_for == [stream]
                        now = {key for key in stream.after if key[0] == window}
                        below = {(window, c, n) for c in range(chunk + 1) for n in range(layer)}
                        before = {(window, c, layer) for c in range(chunk)}
                        assert now == below | before
                        assert ("masks", window) in stream.after
                        assert window == 0 or (0, chunks - 1, layers - 1) in stream.after
                        stream.after.add((window, chunk, layer))
                    assert FakeStream.current is main
        assert (window, chunks - 1, layers - 1) in main.after
        assert len([key for key in main.after if key[0] == window]) == layers * chunks


def test_on_a_cpu_a_lane_is_nothing() -> None:
    lanes = Lanes(3, torch.device("cpu"))
    with lanes.opened(), lanes.lane(2, torch.zeros(1)):
        pass
    assert lanes.streams == []
