"""The MovieLens archive that tests read, and GroupLens' format written from it."""

import io
import os
import zipfile
from functools import cache
from pathlib import Path

import pytest

from dlrm_example.data.download import DataUnavailableError, cache_folder, cached_archive
from dlrm_example.data.movielens_archive import GENRES, GROUPLENS, RECBOLE

FOLDER = "recbole/dataset_example/ml-100k/ml-100k"


@cache
def _fetched(data_path: str | None) -> tuple[str, Path] | str:
    try:
        source, path = cached_archive(cache_folder(data_path), (RECBOLE, GROUPLENS))
    except DataUnavailableError as error:
        return str(error)
    return source.file_name, path


def data_folder() -> str:
    """Where the archive lies, fetched where need be; offline the test is skipped."""
    found = _fetched(os.environ.get("DLRM_EXAMPLE_TEST_DATA"))
    if isinstance(found, str):
        if "checksum" in found or "expected" in found:
            pytest.fail(found)
        pytest.skip(f"offline: {found}")
    return str(found[1].parent)


def recbole_rows(name: str) -> list[list[str]]:
    """The lines of a file of the recbole wheel, split, without its head; skipped where only GroupLens answered."""
    path = Path(data_folder()) / RECBOLE.file_name
    if not path.exists():
        pytest.skip(f"needs {RECBOLE.file_name}, and only {GROUPLENS.file_name} is cached")
    with zipfile.ZipFile(path) as archive:
        text = archive.read(f"{FOLDER}.{name}").decode("utf-8")
    return [line.split("\t") for line in text.splitlines()[1:]]


def grouplens_zip() -> bytes:
    """What GroupLens publishes, as far as it is read, made of the recbole files."""
    ratings = ["\t".join(row) for row in recbole_rows("inter")]
    users = ["|".join(row) for row in recbole_rows("user")]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("ml-100k/u.data", "\n".join(ratings) + "\n")
        archive.writestr("ml-100k/u.user", "\n".join(users) + "\n")
        items = "\n".join(map(_grouplens_item, recbole_rows("item"))) + "\n"
        archive.writestr("ml-100k/u.item", items.encode("latin-1", errors="replace"))
    return buffer.getvalue()


def _grouplens_item(row: list[str]) -> str:
    number, title, year, genres = row
    if number == "267":  # GroupLens says nothing of this one but its number
        title, date = "unknown", ""
    else:
        title, date = f"{title} ({year})", f"01-Jan-{year}"
    flags = ["1" if genre in genres.split(" ") else "0" for genre in GENRES]
    return "|".join([number, title, date, "", "http://us.imdb.com/M/title-exact", *flags])
