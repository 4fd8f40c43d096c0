"""benchmarks/probe.py: its arithmetic on a CPU, its calls against stand-ins, its files."""

import contextlib
import ctypes
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import Tensor, nn

from benchmarks import probe
from benchmarks.probes import cudnn_api, layers
from benchmarks.probes.clock import TINY, Clock, distance, shorten
from benchmarks.probes.raw_layer import RawLayer
from benchmarks.probes.wavefront import Lanes, Wavefront
from engine.errors import RunError

CPU = torch.device("cpu")
CLOCK = Clock(CPU, 2, 0.0)
ON_CPU = ("--sizes", "tiny", "--device", "cpu")


@pytest.mark.parametrize("chunks", [1, 3, 11])
def test_a_wavefront_is_whole_windows(chunks: int, with_cudnn: None) -> None:
    """Against nn.LSTM by autograd, in float64: output, and every gradient."""
    widths = [5, 7, 9, 6]
    raws = [RawLayer(widths[i], widths[i + 1], torch.float64, CPU, 8) for i in range(3)]
    x = raws[0].random(11, 2)[0]
    gradient = raws[-1].random(11, 2)[3]
    states = [raw.random(1, 2)[1:3] for raw in raws]
    waves = Wavefront(raws, chunks, Lanes(3, CPU))
    output, found = waves.forward(x, states)
    d_x, d_states, d_weights = waves.backward(gradient, found)

    y = given = x[..., :5].clone().requires_grad_()
    starts = [
        [s[..., :n].clone().requires_grad_() for s in pair]
        for pair, n in zip(states, widths[1:], strict=True)
    ]
    lstms = []
    for raw, start in zip(raws, starts, strict=True):
        lstm: Any = nn.LSTM(raw.width, raw.units, dtype=torch.float64)
        for parameter, value in zip(lstm.parameters(), raw.weights, strict=True):
            parameter.data.copy_(value)
        y, _ = lstm(y, tuple(start))
        lstms.append(lstm)
    (y * gradient[..., :6]).sum().backward()
    pairs: list[tuple[Tensor, Tensor | None]] = [(output[..., :6], y.detach())]
    pairs += [(d_x[..., :5], given.grad)]
    for raw, start, lstm, d_pair, d_layer in zip(
        raws, starts, lstms, d_states, d_weights, strict=True
    ):
        units = raw.units
        pairs += [(d[..., :units], s.grad) for d, s in zip(d_pair, start, strict=True)]
        pairs += [(d, p.grad) for d, p in zip(d_layer, lstm.parameters(), strict=True)]
    for ours, theirs in pairs:
        assert theirs is not None
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    assert not output[..., 6:].any()


class FakeLanes:
    """Notes where what is queued, and what it waits for."""

    streams = (None,) * 3

    def __init__(self) -> None:
        self.queued: list[tuple[int, list[str]]] = []

    def run(self, lane: int, work: Callable[[], Any], after: list[str]) -> tuple[Any, str]:
        self.queued.append((lane, after))
        return work(), f"{lane}:{sum(where == lane for where, _ in self.queued)}"

    def mark(self) -> list[str]:
        self.queued.clear()
        return ["start"]

    def join(self) -> None:
        assert len(self.queued) == 6


def test_each_layer_has_its_lane_and_waits_for_its_neighbours(with_cudnn: None) -> None:
    lanes: Any = FakeLanes()
    raws = [RawLayer(8, 8, torch.float64, CPU) for _ in range(3)]
    x, *_, gradient = raws[0].random(4, 2)
    waves = Wavefront(raws, 2, lanes)
    _, found = waves.forward(x, [raw.random(1, 2)[1:3] for raw in raws])
    # events are named LANE:TURN
    assert sorted(lanes.queued) == [
        (0, ["0:1"]), (0, ["start"]),
        (1, ["0:1"]), (1, ["0:2", "1:1"]),
        (2, ["1:1"]), (2, ["1:2", "2:1"]),
    ]  # fmt: skip
    waves.backward(gradient, found)
    assert sorted(lanes.queued) == [
        (0, ["1:1"]), (0, ["1:2", "0:1"]),
        (1, ["2:1"]), (1, ["2:2", "1:1"]),
        (2, ["2:1"]), (2, ["start"]),
    ]  # fmt: skip


class FakeStream:
    """Notes who waits for whom; what is queued is done at once."""

    cuda_stream = 0

    def __init__(self, device: object = None) -> None:
        self.waits: list[object] = []

    def wait_stream(self, stream: "FakeStream") -> None:
        self.waits.append(stream)

    def wait_event(self, event: object) -> None:
        self.waits.append(event)

    def record_event(self) -> object:
        return object()


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch, with_cudnn: None) -> None:
    """torch.cuda's streams, events, graphs and profiler, for tensors that are on the CPU."""

    @contextlib.contextmanager
    def within(*args: object, stream: object = None, **more: object) -> Iterator[None]:
        assert set(more) <= {"capture_error_mode"}
        yield

    kernel = SimpleNamespace(
        key="void ns::persist_kernel<float>(int)", count=3, self_device_time_total=1500.0,
        device_type="DeviceType.CUDA",
    )  # fmt: skip
    event = SimpleNamespace(record=lambda: None, elapsed_time=lambda other: 2.0)
    current = FakeStream()
    monkeypatch.setattr(Clock, "on_gpu", True)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "graph", within)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing=False: event)
    graph = SimpleNamespace(replay=lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    seen = SimpleNamespace(key_averages=lambda: [kernel])
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: contextlib.nullcontext(seen))
    properties = SimpleNamespace(name="card", multi_processor_count=1, total_memory=2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.mark.parametrize("name", [n for n in probe.PARTS if not n.startswith("cudnn")])
def test_parts_go_through_with_a_gpu_stood_in(name: str, fake_gpu: None) -> None:
    rows = list(probe.PARTS[name].rows(TINY, CLOCK))
    notes = [row["note"] for row in rows if "note" in row]
    assert all("nvidia-smi" in note for note in notes), notes
    assert probe.PARTS[name].headline(rows)
    if name == "layers":
        assert rows[0]["forward ms"] == 2
        assert rows[0]["backward longest"] == "3 × ns::persist_kernel<float>"
        assert rows[0]["forward kernels ms"] == 1.5
        assert rows[0]["forward persists"]
    if name in ("graphs", "wavefront"):  # a graph that is not replayed has the eager results
        differences = {k: v for row in rows for k, v in row.items() if k.startswith("differs")}
        assert max(differences.values()) < 0.02


def test_lanes_on_streams_wait_for_what_they_need(fake_gpu: None) -> None:
    """Each with a thread of its own; the stand-ins tell who waited for what."""
    lanes: Any = Lanes(2, CPU, threads=True)
    lanes.on_gpu, lanes.streams = True, [FakeStream(), FakeStream()]
    start = lanes.mark()
    first, event = lanes.run(0, lambda: 1, start)
    second, _ = lanes.run(1, lambda: first + 1, [event])
    lanes.join()
    lanes.close()
    assert second == 2
    assert lanes.streams[0].waits == start
    assert lanes.streams[1].waits == [event]
    current: Any = torch.cuda.current_stream()
    assert current.waits == lanes.streams


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    made = tmp_path_factory.mktemp("cudnn") / "libcudnn.so"
    source = Path(__file__).with_name("fake_cudnn.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", made, source], check=True)
    return ctypes.CDLL(str(made))


@pytest.mark.parametrize(
    ("algorithm", "accepted"),
    [
        ("standard", "packed"),
        ("persist-static", "unpacked"),
        ("persist-dynamic", "packed"),
        ("persist-static-small-h", "no"),
    ],
)
def test_cudnns_interface(algorithm: str, accepted: str, library: Any) -> None:
    """The library checks each argument; weights are put where each algorithm has them."""
    rows = list(cudnn_api.rows_of(algorithm)(TINY, CLOCK, library))  # type: ignore[call-arg]
    assert [(r["precision"], r["accepted"]) for r in rows] == [
        (name, accepted) for name in ("fp16", "bf16")
    ]
    for row in rows:
        if accepted == "no":
            assert "packed: cudnnSetRNNDescriptor_v8: NOT_SUPPORTED (small)" in row["note"]
        else:
            assert "note" not in row
            assert row["differs"] == 0
            assert min(row["all ms"], row["standard all ms"]) > 0
    assert ("refused" in cudnn_api.headline(rows)) == (accepted == "no")


def in_this_process(name: str, limit: float) -> probe.Found:
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = probe.main(["--part", name, *ON_CPU])
    ended = f"failed: {error.getvalue().strip()}" if code else probe.DONE
    return ended, [json.loads(line) for line in out.getvalue().splitlines()]


def test_what_is_known_is_written_and_not_asked_again(tmp_path: Path, with_cudnn: None) -> None:
    output = tmp_path / "probe.md"
    asked = []

    def answer(name: str, limit: float) -> probe.Found:
        asked.append(name)
        if name == "graphs" and asked.count(name) == 1:
            raise KeyboardInterrupt
        return in_this_process(name, limit)

    with pytest.raises(KeyboardInterrupt):
        probe.probe(output, 100, answer)
    assert list(json.loads(output.with_suffix(".json").read_text())["parts"]) == asked[:-1]
    probe.probe(output, 1000, answer)
    assert sorted(asked) == sorted([*probe.PARTS, "graphs"])
    results = json.loads(output.with_suffix(".json").read_text())["parts"]
    assert results["layers"]["ended"] == "done"
    assert len(results["layers"]["rows"]) == len(layers.cases(TINY))
    text = output.read_text()
    assert "| cudnn-persist-static | failed: error: not on this device: cuDNN wants a GPU" in text
    assert all(f"\n## {name}\n" in text for name in probe.PARTS)
    probe.probe(output, 0, answer)  # nothing left
    output.with_suffix(".json").write_text("[]")
    with pytest.raises(RunError, match="not what an earlier probe wrote"):
        probe.probe(output, 0, answer)


def test_a_part_out_of_time(tmp_path: Path) -> None:
    """It is asked again where more time could help; what it said counts meanwhile."""
    row = dict(fact="device", value="card")
    limits = {}

    def answer(name: str, limit: float) -> probe.Found:
        limits[name] = limit
        if name == "layers":
            return probe.OUT_OF_TIME, []
        rows = [row] * int(limit) if name == "device" else []
        return probe.OUT_OF_TIME if limit < 60 else probe.DONE, rows

    output = tmp_path / "a.md"
    with pytest.raises(RunError, match="no time for device, "):
        probe.probe(output, 14, answer)
    assert not limits
    with pytest.raises(RunError, match="no time for device, "):
        probe.probe(output, 30, answer)
    assert "| device | out of time |" in output.read_text()
    assert "device card" in output.read_text()
    limits.clear()
    probe.probe(output, 1000, answer)
    assert limits == {name: part.limit for name, part in probe.PARTS.items()}
    limits.clear()
    probe.probe(output, 1000, answer)  # layers had all the time it may have
    assert not limits
    rows = json.loads(output.with_suffix(".json").read_text())["parts"]["device"]["rows"]
    assert len(rows) == 60


@pytest.mark.parametrize(
    ("ending", "ended"),
    [
        ("sleep 60", "out of time"),
        ("kill -SEGV $$", "failed: ended by signal 11"),
        ("echo 'error: this' >&2; exit 1", "failed: error: this"),
        ("exit 0", "done"),
    ],
)
def test_a_process_that_ends_in_any_way(
    ending: str, ended: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(
        f"#!/bin/bash\necho 'some library'\necho '{{\"a\": 1}}'\nprintf '{{\"b'\n{ending}\n"
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert probe.ask("device", "cuda", 0.5) == (ended, [dict(a=1)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
def test_without_a_gpu_the_probe_says_so(
    device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert probe.main(["--output", str(tmp_path / "a.md"), "--device", device]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: argument --device: ")
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert not list(tmp_path.iterdir())


def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert probe.main([*ON_CPU]) == 2
    assert "argument --output: say where" in capsys.readouterr().err
    assert probe.main([*ON_CPU, "--output", str(tmp_path / "no" / "a.md")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_small_things() -> None:
    long = "void at::native::(anonymous namespace)::" + "k" * 99 + "<int>(float)"
    assert shorten(long) == "k" * 63 + "…"
    nan = torch.tensor([float("nan")])
    assert distance([nan], [torch.ones(1)]) == float("inf")
    assert distance([torch.ones(2)], [torch.ones(2) * 2]) == pytest.approx(0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["graphs", "wavefront"])
def test_streams_and_graphs_on_a_gpu(name: str) -> None:
    """In a process of its own, like the program's: precisions are a process's."""
    command = [sys.executable, "-m", "benchmarks.probe", "--part", name, "--sizes", "tiny"]
    result = subprocess.run(
        [*command, "--device", "cuda"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    for row in map(json.loads, result.stdout.splitlines()):
        assert "note" not in row, row
        assert all(v < 0.02 for k, v in row.items() if k.startswith("differs")), row
