"""MovieLens-100K as its two publishers ship it, read into the same three tables.

GroupLens' `ml-100k.zip` is the original. The wheel of recbole 1.2.1 holds the same ratings in the same order, the same
users, and the films with their year cut out of the title; it serves where only a Python package index is in reach.
"""

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from dlrm_example.data.download import DataUnavailableError, Source, cached_archive, from_pip, from_url

GROUPLENS = Source(
    title="GroupLens (https://files.grouplens.org/datasets/movielens/ml-100k.zip)",
    file_name="ml-100k.zip",
    digest="md5",
    expected="0e33842e24a9c977be4e0107933c0723",
    fetch=from_url("https://files.grouplens.org/datasets/movielens/ml-100k.zip"),
)
RECBOLE = Source(
    title="the wheel recbole==1.2.1 by pip",
    file_name="recbole-1.2.1-py3-none-any.whl",
    digest="sha256",
    expected="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
    fetch=from_pip("recbole==1.2.1"),
)
SOURCES = (GROUPLENS, RECBOLE)

NUM_RATINGS, NUM_USERS, NUM_ITEMS = 100_000, 943, 1_682
GENRES = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
UNKNOWN_YEAR = 0


@dataclass(frozen=True, kw_only=True)
class RawMovieLens:
    """The archive's content: ratings in file order, users and items by id (id 1 first).

    `ratings` has the integer columns user, item, rating, timestamp; `users` has age, gender, occupation and zip;
    `years` is UNKNOWN_YEAR where the title names none; `genres` is a 0/1 matrix over GENRES.
    """

    ratings: pa.Table
    users: pa.Table
    years: np.ndarray
    genres: np.ndarray


def load_raw(folder: Path, sources: tuple[Source, ...] = SOURCES) -> RawMovieLens:
    """Read the cached archive, fetching it first where there is none, and check its row counts."""
    source, path = cached_archive(folder, sources)
    reader = _read_recbole if source.file_name.endswith(".whl") else _read_grouplens
    with zipfile.ZipFile(path) as archive:
        raw = reader(archive)
    counts = (len(raw.ratings), len(raw.users), len(raw.years))
    if counts != (NUM_RATINGS, NUM_USERS, NUM_ITEMS):
        raise DataUnavailableError(f"{path} holds {counts} ratings, users and films, not the published numbers")
    return raw


def _read_grouplens(archive: zipfile.ZipFile) -> RawMovieLens:
    ratings = _read_csv(archive, "ml-100k/u.data", "\t", ["user", "item", "rating", "timestamp"])
    users = _read_csv(archive, "ml-100k/u.user", "|", ["id", "age", "gender", "occupation", "zip"])
    item_columns = ["id", "title", "release_date", "video_date", "url", *GENRES]
    items = _read_csv(archive, "ml-100k/u.item", "|", item_columns)
    genres = np.stack([items[genre].to_numpy() for genre in GENRES], axis=1)
    return _by_id(ratings, users, items, _year_in(items["title"]), genres.astype(np.int64))


def _read_recbole(archive: zipfile.ZipFile) -> RawMovieLens:
    folder = "recbole/dataset_example/ml-100k/ml-100k"
    ratings = _read_csv(archive, f"{folder}.inter", "\t", ["user", "item", "rating", "timestamp"], skip=1)
    users = _read_csv(archive, f"{folder}.user", "\t", ["id", "age", "gender", "occupation", "zip"], skip=1)
    items = _read_csv(archive, f"{folder}.item", "\t", ["id", "title", "year", "genres"], skip=1)
    title_and_year = pc.binary_join_element_wise(items["title"], pa.scalar("("), items["year"], pa.scalar(")"), "")
    return _by_id(ratings, users, items, _year_in(title_and_year), _genre_matrix(items["genres"]))


def _read_csv(archive: zipfile.ZipFile, name: str, delimiter: str, columns: list[str], skip: int = 0) -> pa.Table:
    encoding = "latin-1" if name.endswith("u.item") else "utf-8"
    text = ["gender", "occupation", "zip", "title", "release_date", "video_date", "url", "year"]
    types = {column: pa.string() if column in text else pa.int64() for column in columns}
    if skip and "genres" in types:
        types["genres"] = pa.string()
    return csv.read_csv(
        io.BytesIO(archive.read(name)),
        csv.ReadOptions(column_names=columns, skip_rows=skip, encoding=encoding),
        csv.ParseOptions(delimiter=delimiter, quote_char=False),
        csv.ConvertOptions(column_types=types),
    )


def _year_in(titles: pa.ChunkedArray) -> np.ndarray:
    """The last four digits in brackets: «Land Before Time III (1995) (V)» is of 1995."""
    match = pc.extract_regex(titles, r".*\((?P<year>\d{4})\)")
    years = pc.fill_null(pc.struct_field(match, "year"), str(UNKNOWN_YEAR))
    return pc.cast(years, pa.int64()).to_numpy()


def _genre_matrix(genres: pa.ChunkedArray) -> np.ndarray:
    lists = pc.split_pattern(genres.combine_chunks(), " ")
    rows = pc.list_parent_indices(lists).to_numpy()
    columns = pc.index_in(lists.flatten(), pa.array(GENRES)).to_numpy()
    matrix = np.zeros((len(lists), len(GENRES)), dtype=np.int64)
    matrix[rows, columns] = 1
    return matrix


def _by_id(ratings: pa.Table, users: pa.Table, items: pa.Table, years: np.ndarray, genres: np.ndarray) -> RawMovieLens:
    user_order = np.argsort(users["id"].to_numpy())
    item_order = np.argsort(items["id"].to_numpy())
    for table, order in ((users, user_order), (items, item_order)):
        ids = table["id"].to_numpy()[order]
        if not np.array_equal(ids, np.arange(1, len(ids) + 1)):
            raise DataUnavailableError("the ids in the archive are not 1, 2, 3, ... without a gap")
    sorted_users = users.drop_columns(["id"]).take(user_order).combine_chunks()
    return RawMovieLens(ratings=ratings, users=sorted_users, years=years[item_order], genres=genres[item_order])
