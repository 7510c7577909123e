"""Where a layer-by-layer run keeps its hidden states and results, in memory or in a folder.

A folder makes the run resumable: after a block is done, the states that the next one receives are
complete on disk before the journal names it, so a killed run goes on from the last finished block.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaconvert.errors import OptionError, ResourceError
from adaconvert.io.names import escape

if TYPE_CHECKING:
    import numpy
    import torch

    Array = numpy.ndarray[Any, numpy.dtype[Any]]

JOURNAL = "layerwise.json"
_VERSION = 1


class WorkFolder:
    """A folder of one layer-by-layer run.

    Args:
        path: made when missing; holds nothing else than such a run's files.
        digest: of everything the run's results depend on.

    Raises:
        OptionError: the folder holds other files, or a run with another digest.
        ResourceError: it cannot be made or read.
    """

    def __init__(self, path: Path, digest: str) -> None:
        self.path = path
        self._where = f"--work {escape(path.name)}"
        with self._reporting():
            path.mkdir(parents=True, exist_ok=True)
            names = [entry.name for entry in path.iterdir()]
        self._digest = digest
        self._next = self._read() if JOURNAL in names else self._begin(names)

    def _begin(self, names: list[str]) -> int:
        if names:
            raise OptionError(
                "the folder holds files that are not of such a run",
                where=self._where,
                found=escape(sorted(names)[0]),
                hint="Name an empty folder.",
            )
        self._write_journal(0)
        return 0

    def _read(self) -> int:
        try:
            journal = json.loads((self.path / JOURNAL).read_text("utf-8"))
            version, digest, number = (journal[key] for key in ("version", "digest", "next"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OptionError(
                "the journal cannot be read", where=self._where, hint="Delete the folder."
            ) from error
        if version != _VERSION or digest != self._digest or not isinstance(number, int):
            raise OptionError(
                "the folder belongs to another run: model, data or options differ",
                where=self._where,
                hint="Delete it, or name another one.",
            )
        return number

    @property
    def next_block(self) -> int:
        """Return the first block that is not finished."""
        return self._next

    def finish(self, block: int) -> None:
        """Blocks up to `block` are done: a later run starts behind it."""
        self._write_journal(block + 1)
        self._next = block + 1
        self.discard(f"hidden.{block}")

    def save(self, name: str, arrays: Mapping[str, Array]) -> None:
        """`arrays` are on disk under `name`, whole or not at all."""
        import numpy

        part = self.path / f"{name}.part"
        with self._reporting():
            with part.open("wb") as file:
                numpy.savez(file, **dict(arrays))  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.path / f"{name}.npz")

    def load(self, name: str) -> dict[str, Array]:
        """Return the arrays saved under `name`.

        Raises:
            OptionError: there are none, or they are damaged.
        """
        import zipfile

        import numpy

        try:
            with numpy.load(self.path / f"{name}.npz", allow_pickle=False) as stored:
                return {key: stored[key] for key in stored.files}
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise OptionError(
                f"{name}.npz is missing or damaged",
                where=self._where,
                hint="Delete the folder to start again.",
            ) from error

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor that lives in the file `name`; what the file held is kept if it fits."""
        import torch

        size = 1
        for count in shape:
            size *= count
        try:
            flat = torch.from_file(
                str(self.path / f"{name}.bin"), shared=True, size=size, dtype=dtype
            )
        except RuntimeError as error:
            raise ResourceError(
                f"hidden states cannot be kept on disk: {escape(str(error))}", where=self._where
            ) from error
        return flat.view(shape)

    def has(self, name: str, nbytes: int) -> bool:
        """Tell whether the tensor file `name` is there and as long as it must be."""
        path = self.path / f"{name}.bin"
        return path.is_file() and path.stat().st_size == nbytes

    def sync(self, name: str) -> None:
        """The tensor file `name` is on disk, not only in memory."""
        with self._reporting():
            descriptor = os.open(self.path / f"{name}.bin", os.O_RDWR)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def discard(self, name: str) -> None:
        """The tensor file `name` is gone."""
        with self._reporting():
            (self.path / f"{name}.bin").unlink(missing_ok=True)

    def discard_states(self) -> None:
        """No tensor file is left; what was saved stays, so a repeated run has nothing to do."""
        for path in sorted(self.path.glob("*.bin")):
            self.discard(path.stem)

    def _write_journal(self, number: int) -> None:
        text = json.dumps({"version": _VERSION, "digest": self._digest, "next": number})
        part = self.path / f"{JOURNAL}.part"
        with self._reporting():
            with part.open("w", encoding="ascii") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.path / JOURNAL)

    def _reporting(self) -> _Reporting:
        return _Reporting(self._where)


class _Reporting:
    """Turns errors of the operating system into `ResourceError`s that name the folder."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise ResourceError(
                f"cannot be used: {escape(error.strerror or str(error))}", where=self._where
            ) from error
