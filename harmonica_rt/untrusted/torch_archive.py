"""Reads vectors from an archive of `torch.save`, without torch: sizes are checked before anything is allocated.

Hazard: a tensor in such a file is a shape over a storage, and the shape may be anything. With a stride of 0, a storage
of one number is a tensor of as many numbers as the file claims, and the first operation on it allocates them. Here a
vector is never longer than the data that the file holds for it. Archives must be zip files of uncompressed entries, so
that a file cannot unpack to more than its own size either.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from harmonica_rt.untrusted import pickle_data
from harmonica_rt.untrusted.pickle_data import Call, External, ForbiddenNameError, Name, PickleError
from harmonica_rt.untrusted.text import one_line, quoted

_REBUILD_TENSOR = "torch._utils._rebuild_tensor_v2"
_REBUILD_PARAMETER = "torch._utils._rebuild_parameter"
FLOATING = {"float32": "f4", "float64": "f8", "float16": "f2", "bfloat16": "u2"}  # as numpy reads them
_DTYPES = {
    "Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64", "Int": "int32",
    "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool", "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
}  # fmt: skip
# What zipfile raises for damaged archives.
_DAMAGED = (zipfile.BadZipFile, ValueError, LookupError, EOFError, OSError, RuntimeError, struct.error, OverflowError)
_OLD_FORMAT_PICKLES = 5  # in a file of torch before 1.6: a magic number, a version, the system, the contents, the keys


class ArchiveError(ValueError):
    """The file is not one that `torch.save` writes, or does not hold the tensor; the message says why."""


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor as the file describes it; of its fields, only the types have been checked.

    Attributes:
        dtype: torch's name for the dtype, without `torch.`.
        shape: in elements.
        stride: in elements.
        offset: into the storage, in elements.
        key: the key of the storage.
    """

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    key: str


class TorchArchive:
    """An open archive.

    Attributes:
        content: what was saved: plain values and, in place of tensors, values that `tensor_of` takes.

    Raises:
        FileNotFoundError: there is no such file.
        ForbiddenNameError: the file names something other than containers, tensors and `argparse.Namespace`.
        ArchiveError: the file is not an archive of `torch.save`, or is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._storages: dict[str, bytes] = {}
        try:
            self._zip = zipfile.ZipFile(path)
        except FileNotFoundError:
            raise
        except _DAMAGED as error:
            _look_for_code(path)
            raise ArchiveError(f"not a zip archive as torch.save has written since torch 1.6 ({error})") from error
        try:
            self._prefix, pickled = self._find_pickle(os.stat(path).st_size)
            self.content = pickle_data.read(io.BytesIO(pickled))
            order = f"{self._prefix}byteorder"
            self._order = ">" if order in self._zip.namelist() and self._zip.read(order) == b"big" else "<"
        except (ForbiddenNameError, ArchiveError):
            self._zip.close()
            raise
        except (PickleError, *_DAMAGED) as error:
            self._zip.close()
            raise ArchiveError(str(error)) from error

    def __enter__(self) -> TorchArchive:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._zip.close()

    def vector(self, tensor: StoredTensor) -> NDArray[np.float32]:
        """The numbers of a one-dimensional floating-point tensor, in fp32.

        Raises:
            ArchiveError: the tensor has another dtype or number of dimensions, is longer than the data that the file
                holds for it, or its storage is missing.
        """
        if tensor.dtype not in FLOATING or len(tensor.shape) != 1:
            raise ArchiveError(
                f"expected a row of floating-point numbers, got shape {quoted(tensor.shape)}, "
                f"dtype torch.{one_line(tensor.dtype)}"
            )
        data = self._storage(tensor.key)
        dtype = np.dtype(self._order + FLOATING[tensor.dtype])
        stored = np.frombuffer(data, dtype, len(data) // dtype.itemsize)
        [count], [stride] = tensor.shape, tensor.stride
        last = tensor.offset + stride * (count - 1)
        if count < 0 or (count > 1 and stride < 1) or (count and not 0 <= tensor.offset <= last < len(stored)):
            raise ArchiveError(
                f"{quoted(count)} numbers with stride {quoted(stride)} and offset {quoted(tensor.offset)} are not a "
                f"part of the {len(stored)} that are stored; save a contiguous tensor"
            )
        taken = stored[tensor.offset : last + 1 : max(stride, 1)] if count else stored[:0]
        if tensor.dtype == "bfloat16":
            taken = (taken.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):  # fp64 may overflow; the caller checks for infinities
            return taken.astype(np.float32)

    def _storage(self, key: str) -> bytes:
        if key not in self._storages:  # kept, as many tensors may share one
            try:
                self._storages[key] = self._zip.read(f"{self._prefix}data/{key}")
            except _DAMAGED as error:
                raise ArchiveError(f"its numbers are not in the file ({error})") from error
        return self._storages[key]

    def _find_pickle(self, size: int) -> tuple[str, bytes]:
        """The folder of the archive, with its slash, and the bytes of the pickle in it."""
        entries = self._zip.infolist()
        names = [entry.filename for entry in entries]
        if len(set(names)) != len(names):
            raise ArchiveError("it holds two entries of the same name")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ArchiveError("it holds compressed entries, which torch.save does not write")
        if sum(entry.file_size for entry in entries) > size:
            raise ArchiveError("its entries claim to be larger than the file")
        found = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(found) != 1:
            raise ArchiveError("it does not hold exactly one data.pkl")
        return found[0].removesuffix("data.pkl"), self._zip.read(found[0])


def tensor_of(value: object) -> StoredTensor | str:
    """The tensor that a value of an archive describes, or a phrase saying what it is if it is not a plain tensor."""
    if isinstance(value, Call) and value.function == _REBUILD_PARAMETER and value.arguments:
        value = value.arguments[0]
    if not isinstance(value, Call):
        return type(value).__name__
    if value.function != _REBUILD_TENSOR:
        return f"what {value.function} makes"
    match value.arguments:  # a seventh argument marks a conjugate or negative view of what is stored
        case (External(("storage", Name(kind), str(key), *_)), int(offset), tuple(shape), tuple(stride), _, _):
            if len(shape) == len(stride) and all(type(number) is int for number in (*shape, *stride)):
                kind = kind.removeprefix("torch.")
                return StoredTensor(_DTYPES.get(kind.removesuffix("Storage"), kind), shape, stride, offset, key)
    return "a tensor that is not simply a shape over a storage"


def _look_for_code(path: str | os.PathLike[str]) -> None:
    """Raise ForbiddenNameError if a file in the pre-1.6 torch format, or a bare pickle, names what is not data.

    Such a file is refused anyway; this is so that the error says that it could run code, not that it is no zip archive.
    """
    try:
        stream = io.BytesIO(Path(path).read_bytes())
        for _ in range(_OLD_FORMAT_PICKLES):
            pickle_data.read(stream)
    except ForbiddenNameError:
        raise
    except (OSError, ValueError):
        return
