"""Fetch one checked archive from the first source that answers, and keep it in a cache folder."""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10
PIP_SECONDS = 120


class DataUnavailableError(RuntimeError):
    """No source of the data answered, or what is cached is not what it should be."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One place an archive can come from: `fetch(folder)` leaves `file_name` there; `digest` is a hashlib name."""

    title: str
    file_name: str
    digest: str
    expected: str
    fetch: Callable[[Path], None]


def cache_folder(data_path: str | None) -> Path:
    """`data_path` where given, else `cce_torchrec` in the user's cache folder."""
    if data_path is not None:
        return Path(data_path).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cce_torchrec"


def cached_archive(folder: Path, sources: Sequence[Source]) -> tuple[Source, Path]:
    """The archive of the first source that is cached or else answers, and where it lies.

    Raises:
        DataUnavailableError: no source answers, or a cached archive has another checksum.
    """
    for source in sources:
        path = folder / source.file_name
        if path.exists():
            _check(path, source, remedy=f"delete {path} to have it fetched again")
            return source, path
    failures = []
    for source in sources:
        try:
            return source, _fetch_into(folder, source)
        except (OSError, subprocess.SubprocessError, DataUnavailableError) as error:
            failures.append(f"  {source.title}: {_reason(error)}")
            logger.info("%s did not answer (%s)", source.title, _reason(error))
    file_names = " or ".join(source.file_name for source in sources)
    remedy = f"put {file_names} into {folder}, or say with --data_path where it is"
    raise DataUnavailableError("\n".join(["no source of the data answered:", *failures, remedy]))


def _fetch_into(folder: Path, source: Source) -> Path:
    """Fetch beside the final place, check, then rename: a half-written archive is never seen under its name."""
    folder.mkdir(parents=True, exist_ok=True)
    logger.info("fetching %s from %s", source.file_name, source.title)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as temporary:
        source.fetch(Path(temporary))
        fetched = Path(temporary) / source.file_name
        if not fetched.exists():
            raise DataUnavailableError(f"it delivered no {source.file_name}")
        _check(fetched, source, remedy="it may have been changed on its way")
        return fetched.replace(folder / source.file_name)


def _check(path: Path, source: Source, remedy: str) -> None:
    found = hashlib.new(source.digest, path.read_bytes()).hexdigest()
    if found != source.expected:
        raise DataUnavailableError(f"{path.name}: {source.digest} is {found}, expected {source.expected}; {remedy}")


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = str(error.stderr or error).strip().splitlines()
        return lines[-1] if lines else str(error)
    return str(error) or type(error).__name__


def from_url(url: str) -> Callable[[Path], None]:
    """A fetcher of the file at a URL, under the URL's last name."""

    def fetch(folder: Path) -> None:
        target = folder / url.rsplit("/", 1)[-1]
        with urllib.request.urlopen(url, timeout=CONNECT_SECONDS) as answer, open(target, "wb") as file:
            shutil.copyfileobj(answer, file)

    return fetch


def from_pip(requirement: str) -> Callable[[Path], None]:
    """A fetcher of a wheel by this Python's own pip, which knows the user's package index. Installs nothing."""

    def fetch(folder: Path) -> None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=PIP_SECONDS)

    return fetch
