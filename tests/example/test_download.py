"""Where the archive comes from, in which order, and what is said when it does not come."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from dlrm_example.data.download import DataUnavailableError, Source, cache_folder, cached_archive, from_pip, from_url

CONTENT = b"an archive"


def write(content: bytes, calls: list[str], name: str) -> Callable[[Path], None]:
    def fetch(folder: Path) -> None:
        calls.append(name)
        (folder / f"{name}.zip").write_bytes(content)

    return fetch


def fail(calls: list[str], name: str) -> Callable[[Path], None]:
    def fetch(folder: Path) -> None:
        calls.append(name)
        raise OSError(f"{name} is down")

    return fetch


def source(name: str, fetch: Callable[[Path], None], content: bytes = CONTENT) -> Source:
    expected = hashlib.sha256(content).hexdigest()
    return Source(title=f"the {name}", file_name=f"{name}.zip", digest="sha256", expected=expected, fetch=fetch)


def test_first_source_that_answers_wins(tmp_path: Path) -> None:
    calls: list[str] = []
    first, second = source("first", write(CONTENT, calls, "first")), source("second", write(CONTENT, calls, "second"))
    found, path = cached_archive(tmp_path / "deep" / "cache", (first, second))
    assert (found, path.read_bytes(), calls) == (first, CONTENT, ["first"])


def test_falls_back_to_the_second_source_and_keeps_what_it_gave(tmp_path: Path) -> None:
    calls: list[str] = []
    sources = (source("first", fail(calls, "first")), source("second", write(CONTENT, calls, "second")))
    assert cached_archive(tmp_path, sources)[0] is sources[1]
    assert calls == ["first", "second"]
    assert cached_archive(tmp_path, sources)[0] is sources[1]
    assert calls == ["first", "second"], "the cached archive was fetched again"
    assert [path.name for path in tmp_path.iterdir()] == ["second.zip"], "something was left behind"


def test_error_names_every_source_and_the_way_out(tmp_path: Path) -> None:
    calls: list[str] = []
    sources = (source("first", fail(calls, "first")), source("second", fail(calls, "second")))
    with pytest.raises(DataUnavailableError) as caught:
        cached_archive(tmp_path, sources)
    for part in ("the first: first is down", "the second: second is down", str(tmp_path), "--data_path", "first.zip"):
        assert part in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_wrong_content_is_not_kept(tmp_path: Path) -> None:
    calls: list[str] = []
    tampered = source("first", write(b"something else", calls, "first"))
    with pytest.raises(DataUnavailableError, match=r"sha256 is .*, expected "):
        cached_archive(tmp_path, (tampered,))
    assert not (tmp_path / "first.zip").exists()


def test_a_damaged_cache_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "first.zip").write_bytes(b"half of it")
    with pytest.raises(DataUnavailableError, match=r"delete .*first\.zip"):
        cached_archive(tmp_path, (source("first", fail([], "first")),))


def test_a_fetcher_that_delivers_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataUnavailableError, match=r"delivered no first\.zip"):
        cached_archive(tmp_path, (source("first", lambda folder: None),))


def test_from_url_reads_local_files_and_reports_missing_ones(tmp_path: Path) -> None:
    origin = tmp_path / "origin" / "first.zip"
    origin.parent.mkdir()
    origin.write_bytes(CONTENT)
    assert cached_archive(tmp_path, (source("first", from_url(origin.as_uri())),))[1].read_bytes() == CONTENT
    gone = source("gone", from_url((tmp_path / "gone.zip").as_uri()))
    with pytest.raises(DataUnavailableError, match=r"the gone: .*gone\.zip"):
        cached_archive(tmp_path, (gone,))


def test_from_pip_reports_what_pip_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    missing = source("missing", from_pip("a-project-that-is-not-there==1"))
    with pytest.raises(DataUnavailableError, match="No matching distribution found"):
        cached_archive(tmp_path, (missing,))


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / "cce_torchrec"
    assert cache_folder("elsewhere") == Path("elsewhere")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / ".cache" / "cce_torchrec"
