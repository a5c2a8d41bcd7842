"""Compare prepared data with the checksums in its manifest: `python -m dlrm_example.data.verify prepared`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dlrm_example.data.download import DataUnavailableError
from dlrm_example.data.manifest import read_manifest, sha256


def main(argv: Sequence[str] | None = None) -> int:
    """0 where all files of a folder are as they were written, else 1."""
    parser = argparse.ArgumentParser(prog="python -m dlrm_example.data.verify", description=check_checksums.__doc__)
    parser.add_argument("folder", type=Path)
    try:
        check_checksums(parser.parse_args(argv).folder)
    except DataUnavailableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def check_checksums(folder: Path) -> None:
    """Read every data file and compare its checksum with the manifest's.

    Raises:
        DataUnavailableError: one differs.
    """
    for file in (file for files in read_manifest(folder).splits.values() for file in files):
        found = sha256(folder / file.path)
        if found != file.sha256:
            raise DataUnavailableError(
                f"{folder / file.path}: sha256 is {found}, expected {file.sha256}: prepare the data again"
            )


if __name__ == "__main__":
    sys.exit(main())
