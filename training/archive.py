"""Read and write .npz archives of plain arrays, without trusting their headers.

No array of objects is read or written, so nothing is ever unpickled. It does not know images.
"""

import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from ..core.errors import DataError

MAX_ARRAY_BYTES = 16 * 2**30
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def read_arrays(path: Path, names: set[str]) -> dict[str, NDArray]:
    """Read the named arrays that an archive has.

    Args:
        path: The .npz file.
        names: Arrays to read; those missing are left out, others are not touched.

    Raises:
        DataError: Not an archive, or an array that is damaged, of objects, or too large.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            return {
                name: _read_member(archive, members[f"{name}.npy"], f"{path}: array {name!r}")
                for name in sorted(names)
                if f"{name}.npy" in members
            }
    except DataError:
        raise
    # zipfile and its decompressors raise their own errors on damage.
    except Exception as error:
        raise DataError(f"{path}: not a readable .npz archive ({error})") from error


def write_arrays(path: Path, arrays: Mapping[str, NDArray]) -> None:
    """Write a compressed archive atomically.

    Args:
        path: The .npz file to create or replace.
        arrays: Plain arrays.

    Raises:
        DataError: An array holds objects.
    """
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise DataError(f"{path}: array {name!r} holds objects, which are not written")
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, what: str) -> NDArray:
    with archive.open(info) as file:
        version = npy.read_magic(file)
        if version not in _HEADERS:
            raise DataError(f"{what} has header version {version}; 1.0 and 2.0 are read")
        shape, fortran, dtype = _HEADERS[version](file)
        if dtype.hasobject:
            raise DataError(f"{what} holds objects; only plain numbers and texts are read")
        size = math.prod(shape) * dtype.itemsize
        # A header may promise more than the file holds, to make the reader allocate it.
        if size > min(info.file_size, MAX_ARRAY_BYTES):
            raise DataError(
                f"{what} claims {size} bytes; the file holds {info.file_size}, and at most "
                f"{MAX_ARRAY_BYTES} are read"
            )
        content = file.read(size)
    if len(content) != size:
        raise DataError(f"{what} is cut short: {len(content)} of {size} bytes")
    array = np.frombuffer(bytearray(content), dtype=dtype)
    return array.reshape(shape, order="F" if fortran else "C")
