"""Downloads from servers on this machine that behave and misbehave."""

import hashlib
import io
import multiprocessing
import tarfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data import download
from data.download import ensure_corpus, fetch_corpus
from data.errors import DataError, WriteError
from data.files import SPLITS
from data.sources import KNOWN_CORPORA, CorpusSource, Mirror

TEXTS = {"train": b"a b\nc\n", "valid": b"b a\n", "test": b"c c\n"}


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


TEXT_MD5 = {split: md5(data) for split, data in TEXTS.items()}


class Server(ThreadingHTTPServer):
    """Serves `files`; a path may have its body cut short, or never be answered."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.requests: Counter[str] = Counter()
        self.released = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests[self.path] += 1
        body = self.server.files.get(self.path.removeprefix("/short").removeprefix("/stalled"))
        if self.path.startswith(("/drops", "/endless")):
            drops = self.path.startswith("/drops")
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):
                while not self.server.released.wait(0.02 if drops else 0):
                    self.wfile.write(b"a" if drops else bytes(1 << 16))
            return
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.path.startswith("/short"):
            self.wfile.write(body[:-2])
            self.close_connection = True
        elif self.path.startswith("/stalled"):
            self.wfile.write(body[:1])
            self.wfile.flush()
            self.server.released.wait(20)
        else:
            if self.path.startswith("/slow"):
                time.sleep(0.3)
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Server]:
    server = Server(files)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    files = {f"/{split}.txt": data for split, data in TEXTS.items()}
    files |= {f"/slow/{split}.txt": data for split, data in TEXTS.items()}
    files |= {f"/bad/{split}.txt": data + b"x\n" for split, data in TEXTS.items()}
    with serving(files) as server:
        yield server


def plain_source(server: Server, *places: str) -> CorpusSource:
    mirrors = tuple(Mirror(f"{server.url}{place}/{{split}}.txt") for place in places)
    return CorpusSource(mirrors, text_md5=TEXT_MD5)


def archive_of(kind: str, members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as bundle:
            for name, data in members.items():
                bundle.writestr(name, data)
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz") as bundle_:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                bundle_.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def assert_complete(folder: Path) -> None:
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        f"{split}.txt": data for split, data in TEXTS.items()
    }
    assert list(folder.parent.iterdir()) == [folder]


def assert_nothing_left(folder: Path) -> None:
    assert not folder.exists()
    assert list(folder.parent.iterdir()) == []


def test_good_mirror(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also what a killed download left is swept away."""
    folder = tmp_path / "data" / "x"
    (tmp_path / "data" / ".x.1-aa.tmp").mkdir(parents=True)
    (tmp_path / "data" / ".x.1-aa.tmp" / "archive").write_bytes(b"half")
    (tmp_path / "data" / ".x.lock").touch()
    fetch_corpus(plain_source(server, ""), folder)
    assert_complete(folder)
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines() == [f"downloading {server.url}/{s}.txt" for s in SPLITS]
    fetch_corpus(plain_source(server, ""), folder)
    assert server.requests.total() == 3


def test_bad_mirrors_are_named_and_a_good_one_is_taken(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    causes = {
        "/bad": "wrong checksum",
        "/short": "cut short",
        "/none": "HTTP status 404",
        "/stalled": "no answer for 0.2 s",
    }
    unreachable = Mirror("http://127.0.0.1:9/{split}.txt")
    bad = (*plain_source(server, *causes).mirrors, unreachable)
    start = time.monotonic()
    with pytest.raises(DataError) as caught:
        fetch_corpus(CorpusSource(bad, TEXT_MD5), folder, timeout=0.2)
    assert time.monotonic() - start < 5
    reasons = [f"{server.url}{place}/train.txt ({cause})" for place, cause in causes.items()]
    reasons.append("http://127.0.0.1:9/train.txt (ConnectionError)")
    assert str(caught.value) == f"{folder}: cannot be downloaded: {'; '.join(reasons)}"
    assert_nothing_left(folder)
    good = (*bad, *plain_source(server, "").mirrors)
    fetch_corpus(CorpusSource(good, TEXT_MD5), folder, timeout=0.2)
    assert_complete(folder)


@pytest.mark.parametrize("kind", ["zip", "tgz"])
def test_archives(tmp_path: Path, kind: str) -> None:
    members = {f"./x/{split}.txt": data for split, data in TEXTS.items()}
    data = archive_of(kind, {"../evil.txt": b"evil", **members})
    hollow = archive_of(kind, {"./x/train.txt": TEXTS["train"]})
    with serving({"/good": data, "/hollow": hollow, "/html": b"<html>" * 99}) as server:
        folder = tmp_path / "data" / "x"
        bad = tuple(
            Mirror(f"{server.url}/{name}", "./x/{split}.txt") for name in ("hollow", "html")
        )
        with pytest.raises(DataError) as caught:
            fetch_corpus(CorpusSource(bad), folder)
        assert "/hollow (the archive has no" in str(caught.value)
        assert "/html (not an archive)" in str(caught.value)
        assert_nothing_left(folder)
        wrong = Mirror(f"{server.url}/good", "./x/{split}.txt", md5(b"something else"))
        with pytest.raises(DataError, match="wrong checksum"):
            fetch_corpus(CorpusSource((wrong,)), folder)
        fetch_corpus(CorpusSource((*bad, Mirror(wrong.url, wrong.member, md5(data)))), folder)
        assert_complete(folder)
    assert list(tmp_path.iterdir()) == [folder.parent]


def test_bytes_become_decimal_words(tmp_path: Path) -> None:
    raw = bytes(range(256)) * 3 + b"\n\nab\n" + b"valid\nv\n" + b"test t\n\xff"
    with serving({"/raw.zip": archive_of("zip", {"raw": raw})}) as server:
        mirrors = (Mirror(f"{server.url}/raw.zip", "raw"),)
        fetch_corpus(CorpusSource(mirrors, {}, md5(raw), 8), tmp_path / "x")
        with pytest.raises(DataError, match="wrong checksum of raw"):
            fetch_corpus(CorpusSource(mirrors, {}, md5(b""), 8), tmp_path / "y")
        with pytest.raises(DataError, match="too few"):
            fetch_corpus(CorpusSource(mirrors, {}, md5(raw), len(raw)), tmp_path / "y")
    for split, part in zip(SPLITS, (raw[:-16], raw[-16:-8], raw[-8:]), strict=True):
        expected = " ".join(str(byte) if byte != 10 else "\n" for byte in part)
        assert (tmp_path / "x" / f"{split}.txt").read_bytes() == expected.encode()


def test_what_was_there_is_not_overwritten(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "notes.md").write_text("mine")
    (folder / "train.txt").write_bytes(TEXTS["train"])
    fetch_corpus(plain_source(server, ""), folder)
    assert (folder / "notes.md").read_text() == "mine"
    assert (folder / "test.txt").read_bytes() == TEXTS["test"]
    (folder / "train.txt").write_text("my own text\n")
    (folder / "valid.txt").unlink()
    with pytest.raises(DataError, match=r"train\.txt: already there with other content"):
        fetch_corpus(plain_source(server, ""), folder)
    assert (folder / "train.txt").read_text() == "my own text\n"
    assert not (folder / "valid.txt").exists()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_processes_at_once_download_once(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    context = multiprocessing.get_context("fork")
    arguments = (plain_source(server, "/slow"), folder)
    processes = [context.Process(target=fetch_corpus, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0, 0]
    assert server.requests.total() == 3
    assert_complete(folder)


def test_only_known_names_below_data_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        download, "fetch_corpus", lambda source, folder, timeout: asked.append(folder.name)
    )
    for name in ("penn", "data/mine", "other/penn", "data/demo.txt", "data"):
        ensure_corpus(tmp_path / name)
    assert asked == []
    for name in KNOWN_CORPORA:
        ensure_corpus(tmp_path / "data" / name)
    assert asked == ["penn", "pennchar", "wikitext-2", "wikitext-103", "enwik8"]
    complete = tmp_path / "data" / "penn"
    complete.mkdir(parents=True)
    for split in SPLITS:
        (complete / f"{split}.txt").write_text("anything\n")
    ensure_corpus(complete)
    (tmp_path / "data" / "wikitext-2").write_text("a file")
    ensure_corpus(tmp_path / "data" / "wikitext-2")
    assert len(asked) == 5


def test_folder_that_cannot_be_made(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="cannot write: "):
        fetch_corpus(plain_source(server, ""), tmp_path / "file" / "x")


def test_a_body_that_never_ends_is_given_up(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by drops, each before the server would count as silent, one at full speed."""
    monkeypatch.setattr(CorpusSource, "most_seconds", 0.5)
    (drops, endless, good) = plain_source(server, "/drops", "/endless", "").mirrors
    begin = time.monotonic()
    source = CorpusSource((drops, endless), TEXT_MD5, most_bytes=3_000_000)
    with pytest.raises(DataError) as caught:
        fetch_corpus(source, tmp_path / "x")
    assert time.monotonic() - begin < 5
    assert "/drops/train.txt (not done within 0 s); " in str(caught.value)
    assert "/endless/train.txt (more than 3,000,000 bytes)" in str(caught.value)
    assert_nothing_left(tmp_path / "x")
    fetch_corpus(CorpusSource((drops, good), TEXT_MD5), tmp_path / "x")
    assert_complete(tmp_path / "x")


@pytest.mark.parametrize("kind", ["zip", "tgz"])
def test_an_archive_that_says_it_is_a_bomb_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("shutil.copyfileobj", None)
    with serving({"/bomb": archive_of(kind, {"train.txt": bytes(5_000_000)})}) as server:
        source = CorpusSource((Mirror(f"{server.url}/bomb", "{split}.txt"),), most_bytes=100_000)
        with pytest.raises(DataError, match="has 5,000,000 bytes, and 100,000 are the most"):
            fetch_corpus(source, tmp_path / "x")
    assert_nothing_left(tmp_path / "x")
