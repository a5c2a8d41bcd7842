"""Kernels in C++, compiled on first use with the machine's own compiler; absent without harm.

The sources of this directory become one shared library without dependencies, in the user's cache directory under a name
that says what it was made of (sources, compiler, flags, processor). Ranks that start together may each compile it: the
file appears whole, by renaming. Where there is no compiler, or anything fails, callers take their PyTorch path.

    CCE_TORCHREC_NATIVE=0    never compile or load it
    CXX                      the compiler, instead of the first of c++, g++ and clang++
    XDG_CACHE_HOME           where the cache is, instead of ~/.cache
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SWITCH = "CCE_TORCHREC_NATIVE"
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared", "-pthread")
_DIGEST_BYTES = 32
_TIMEOUT = 300  # seconds


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or ``None`` where they are switched off or cannot be had."""
    if os.environ.get(SWITCH, "1") == "0":
        return None
    compiler = find_compiler()
    if compiler is None:
        logger.info("No C++ compiler found (CXX, c++, g++, clang++): the PyTorch path is used, which is slower.")
        return None
    try:
        return _declare(_load(compiler))
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        detail = getattr(error, "stderr", None) or error
        logger.info("The native kernels cannot be compiled or loaded; the slower PyTorch path is used. %s", detail)
        return None


@contextmanager
def switched_off() -> Iterator[None]:
    """A context in which callers take their PyTorch path; to compare the two."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "0"
    library.cache_clear()
    try:
        yield
    finally:
        del os.environ[SWITCH]
        if before is not None:
            os.environ[SWITCH] = before
        library.cache_clear()


def usable(*tensors: Tensor) -> ctypes.CDLL | None:
    """The library, where all of these are ordinary contiguous tensors in this machine's memory."""
    if torch.compiler.is_compiling():
        return None
    plain = all(type(tensor) is Tensor and tensor.is_cpu and tensor.is_contiguous() for tensor in tensors)
    return library() if plain else None


def find_compiler() -> list[str] | None:
    """The command that compiles C++."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    found = next(filter(None, map(shutil.which, chosen[:1] or ("c++", "g++", "clang++"))), None)
    return None if found is None else [os.path.realpath(found), *chosen[1:]]


def cached_path(compiler: list[str]) -> Path:
    """Where the library that this compiler makes on this machine is kept."""
    made_of = hashlib.sha256()
    made = os.stat(compiler[0])
    for part in (*compiler, made.st_mtime_ns, made.st_size, *_FLAGS, platform.machine(), _processor()):
        made_of.update(f"{part}\0".encode())
    for source in [*_sources(), *_headers()]:
        made_of.update(source.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "cce_torchrec" / f"native-{made_of.hexdigest()[:32]}.so"


def _sources() -> list[Path]:
    return sorted(Path(__file__).parent.glob("*.cpp"))


def _headers() -> list[Path]:
    return sorted(Path(__file__).parent.glob("*.h"))


def _processor() -> str:
    """What the processor can do, as far as the machine says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = ("model name", "flags", "Features", "CPU part")
    return "".join(sorted({line for line in lines if line.startswith(names)}))


def _load(compiler: list[str]) -> ctypes.CDLL:
    """The cached library, compiled first where it is missing or damaged."""
    try:
        path = cached_path(compiler)
        if not _is_whole(path):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            _compile(compiler, path)
        return ctypes.CDLL(str(path))
    except (OSError, RuntimeError) as error:  # no home, or a cache that cannot be written to or executed from
        logger.info("The native kernels are compiled for this process alone: %s", error)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "native.so"
        _compile(compiler, path)
        return ctypes.CDLL(str(path))


def _is_whole(path: Path) -> bool:
    """Whether the file ends in the digest of what comes before; a cut one may kill the process that loads it."""
    if not path.is_file():
        return False
    content = path.read_bytes()
    return hashlib.sha256(content[:-_DIGEST_BYTES]).digest() == content[-_DIGEST_BYTES:]


def _compile(compiler: list[str], path: Path) -> None:
    """Put the library at ``path``, at once."""
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        made = Path(directory) / "native.so"
        command = [*compiler, *_FLAGS, *map(str, _sources()), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT)
        content = made.read_bytes()
        made.write_bytes(content + hashlib.sha256(content).digest())
        os.replace(made, path)
    logger.info("Compiled the native kernels with %s: %s", compiler[0], path)


def _declare(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes the signatures."""
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    loaded.cce_hashed_rows.argtypes = [pointer, integer, integer, pointer, integer, pointer]
    loaded.cce_hashed_rows.restype = None
    loaded.cce_assigned_rows.argtypes = [pointer, integer, pointer, pointer, *[integer] * 3, pointer, pointer]
    loaded.cce_assigned_rows.restype = ctypes.c_int
    loaded.cce_lookup.argtypes = [*[pointer] * 4, integer]
    loaded.cce_lookup.restype = ctypes.c_int
    loaded.cce_lookup_backward.argtypes = [*[pointer] * 5, integer]
    loaded.cce_lookup_backward.restype = None
    loaded.cce_bucketize.argtypes = [*[pointer] * 4, *[integer] * 3, *[pointer] * 3]
    loaded.cce_bucketize.restype = None
    loaded.cce_lanes.argtypes, loaded.cce_lanes.restype = [], integer
    loaded.cce_nearest.argtypes = [pointer, integer, integer, pointer, integer, pointer, pointer, integer, integer]
    loaded.cce_nearest.argtypes += [ctypes.c_float, pointer, pointer, ctypes.c_int, pointer, pointer, integer]
    loaded.cce_nearest.restype = ctypes.c_int
    loaded.cce_add_moments.argtypes = [pointer, integer, integer, pointer, pointer, pointer]
    loaded.cce_add_moments.restype = None
    return loaded
