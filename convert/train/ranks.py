"""The processes of one fine-tune: one alone, or those that torchrun or accelerate started together.

    torchrun --nproc-per-node 8 -m adaconvert finetune CKPT DST --data ... --fsdp

runs on eight devices of one machine (`accelerate launch -m adaconvert finetune ...` does as well),
and the same command on each of four machines on 32:

    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        -m adaconvert finetune CKPT DST --data ... --fsdp

CKPT, the data and the folder of DST must be on a disk that every machine sees: checkpoints to
resume from are written beside DST by all processes. `--batch-size` counts the sequences of one
process, so N processes do what one does with N times the batch. The first process alone writes the
result and reports. When one fails, all end, and the first says why.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from adaconvert.errors import AdaconvertError, InterruptedRunError

T = TypeVar("T")
#: one process may write a large result for as long as this while the others wait.
_PATIENCE = timedelta(days=2)
#: how the libraries below say that the process at the other end is gone.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Connection refused")


class OtherProcessError(AdaconvertError):
    """Another process of the run failed; the exit code is that of its error."""

    def __init__(self, failure: Failure) -> None:
        self.exit_code = failure.exit_code
        which = "another process" if failure.rank < 0 else f"process {failure.rank}"
        super().__init__(f"{which} failed: {failure.text}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What one process tells the others of its error.

    Attributes:
        rank: which process, -1 when nobody knows.
        exit_code: of its error.
        text: its message.
    """

    rank: int
    exit_code: int
    text: str

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Failure:
        """Return what to tell of an error."""
        if isinstance(error, AdaconvertError):
            return cls(rank=rank, exit_code=error.exit_code, text=error.describe())
        return cls(rank=rank, exit_code=1, text=f"{type(error).__name__}: {error}")


class Group:
    """The processes that work together; with one of them nothing here talks to anybody.

    Attributes:
        rank: number of this process.
        size: how many there are.
        on_machine: how many of them share this machine's memory.
    """

    def __init__(self, rank: int = 0, size: int = 1, on_machine: int = 1) -> None:
        self.rank = rank
        self.size = size
        self.on_machine = on_machine
        # talks over the network even where the devices have a faster way, and waits long
        self._control: Any = None
        self._store: Any = None

    @property
    def is_main(self) -> bool:
        """Return whether this is the process that writes and reports."""
        return self.rank == 0

    def together(self, what: Callable[[], T]) -> T:
        """Return what `what` returns here, once it has returned in every process.

        Raises:
            OtherProcessError: it raised in another one.
        """
        if self.size == 1:
            return what()
        result, failure, raised = _tried(what, self.rank)
        for other in self._gathered(failure):
            if raised is None and other is not None:
                raise OtherProcessError(other)
        if raised is not None:
            raise raised
        return result  # type: ignore[return-value]

    def on_main(self, what: Callable[[], T]) -> T:
        """Return what `what` returned in the first process, the only one that calls it.

        Raises:
            OtherProcessError: it raised there.
        """
        if self.size == 1:
            return what()
        result, failure, raised = _tried(what, self.rank) if self.is_main else (None, None, None)
        told = self._told((result, failure))
        if raised is not None:
            raise raised
        if told[1] is not None:
            raise OtherProcessError(told[1])
        return result if self.is_main else told[0]  # type: ignore[return-value]

    def main_first(self, what: Callable[[], T]) -> T:
        """Return what `what` returns here; the others call it once the first process has.

        Raises:
            OtherProcessError: it raised in another process.
        """
        kept: list[T] = []
        self.on_main(lambda: kept.append(what()))
        return self.together(lambda: kept[0] if kept else what())

    def publish(self, error: BaseException) -> None:
        """Leave word of an error for processes that wait for this one."""
        if self._store is not None and not isinstance(error, KeyboardInterrupt | GeneratorExit):
            failure = Failure.of(self.rank, error)
            with suppress(RuntimeError):
                self._store.set(f"failed/{self.rank}", f"{failure.exit_code} {failure.text}")

    def word(self) -> Failure | None:
        """Return the error another process left word of, None when none did."""
        if self._store is None:
            return None
        for rank in range(self.size):
            with suppress(RuntimeError):
                if rank != self.rank and self._store.check([f"failed/{rank}"]):
                    code, _, text = self._store.get(f"failed/{rank}").decode().partition(" ")
                    return Failure(rank=rank, exit_code=int(code), text=text)
        return None

    def connect(self, store: Any, serial: int) -> None:
        """Talk over the process group that torch has set up."""
        from torch import distributed

        library: Any = distributed
        self._control = library.new_group(backend="gloo", timeout=_PATIENCE)
        self._store = library.PrefixStore(f"adaconvert/{serial}", store)

    def _gathered(self, mine: T) -> list[T]:
        from torch import distributed

        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, mine, group=self._control)
        return found

    def _told(self, mine: T) -> T:
        from torch import distributed

        found: list[Any] = [mine if self.is_main else None]
        distributed.broadcast_object_list(found, src=0, group=self._control)
        told: T = found[0]
        return told


def is_first_process() -> bool:
    """Return whether the launcher's variables make this the process that reports."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def joined(*, on_cpu: bool) -> Iterator[Group]:
    """Yield the processes of this run; they end together.

    Args:
        on_cpu: train there whatever devices there are.

    Raises:
        OtherProcessError: another process failed.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Group()
        return
    group = Group(
        int(os.environ.get("RANK", "0")), size, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    )
    _start(group, on_cpu=on_cpu)
    try:
        yield group
    except BaseException as error:
        # a lost connection, or the launcher's signal, is news of another process's error
        failure = None if _is_final(error) else group.word() or _lost(error)
        if failure is not None:
            raise OtherProcessError(failure) from error
        if not isinstance(error, InterruptedRunError | OtherProcessError):
            group.publish(error)
        raise


def _lost(error: BaseException) -> Failure | None:
    """Return what happened when a connection ended and nobody left word."""
    if isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST):
        text = "it ended without a word; its machine may have run out of memory"
        return Failure(rank=-1, exit_code=6, text=text)
    return None


def _is_final(error: BaseException) -> bool:
    return isinstance(error, AdaconvertError) and not isinstance(error, InterruptedRunError)


_started: list[Any] = []


def _start(group: Group, *, on_cpu: bool) -> None:
    """Set up torch's process group at the first call; later fine-tunes of the process share it."""
    import torch

    distributed: Any = torch.distributed
    if not _started:
        device = None if on_cpu else torch.accelerator.current_accelerator(check_available=True)
        backend = "gloo"
        if device is not None:
            torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
            fast = distributed.get_default_backend_for_device(device)
            backend = f"cpu:gloo,{device.type}:{fast}"
        store, rank, size = next(iter(distributed.rendezvous("env://")))
        distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
        # its threads must not outlive the interpreter, or the process aborts at its very end
        atexit.register(distributed.destroy_process_group)
        _started.append(store)
    _started.append(group)
    group.connect(_started[0], len(_started))


def _tried(
    what: Callable[[], T], rank: int
) -> tuple[T | None, Failure | None, BaseException | None]:
    """Return the result, or what to tell of the error and the error itself."""
    try:
        return what(), None, None
    except BaseException as error:
        return None, Failure.of(rank, error), error
