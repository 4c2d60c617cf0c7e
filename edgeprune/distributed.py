"""The processes that share one calibration, as `torchrun` starts them.

    torchrun --nproc-per-node 2 -m edgeprune compress ...

Every process (rank) takes its part of the calibration sequences, and what they find is summed over all of them, block
by block; rank 0 alone then cuts, writes and speaks, while the others wait in a blocking call. Without torchrun there is
one rank and every exchange is nothing.

An error on one rank must not leave the others waiting for it: before anything is exchanged, each rank says whether it
is well, and one that has met an error says so at the next exchange, so that all end together with the same exit code.
"""

import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

# Its functions take the default group as a default argument. Imported by others once there is a group, they would keep
# it beyond its end, and its threads run into an interpreter that is shutting down: a rare abort after all was done.
import torch.distributed.nn.functional

from edgeprune_runtime.errors import EdgepruneError

LONGEST_WAIT = datetime.timedelta(days=7)
"""Rank 0 may cut, export and measure for hours while the others wait; one that dies is noticed at once all the same."""

T = TypeVar("T")


class Ranks:
    """The processes of this run: `rank` of `size`."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size
        self.is_connected = size > 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all ranks."""
        if self.size > 1:
            self.meet()
            with self._others_may_die():
                for tensor in tensors:
                    dist.all_reduce(tensor)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks."""
        if self.size == 1:
            return [value]
        self.meet()
        values: list[Any] = [None] * self.size
        with self._others_may_die():
            dist.all_gather_object(values, value)
        return values

    def all(self, is_so: bool) -> bool:
        """Whether it is so on every rank."""
        return all(self.gather(is_so))

    def share(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, given to all."""
        found = self.gather(make() if self.is_first else None)[0]
        assert found is not None
        return found

    def meet(self, problem: EdgepruneError | None = None, *, may_continue: bool = False) -> None:
        """Wait for all ranks; say what went wrong here, or hear what went wrong elsewhere.

        Args:
            problem: what went wrong here.
            may_continue: the same command can go on after it (a full disk, a crash), so that what is done stays.

        Raises:
            OtherRankError: if all is well here, but not on another rank.
        """
        said: list[Any] = [None] * self.size
        with self._others_may_die():
            dist.all_gather_object(said, None if problem is None else (str(problem), problem.exit_code, may_continue))
        for rank, trouble in enumerate(said):
            if trouble is not None and problem is None:
                message, exit_code, goes_on = trouble
                # a journal keeps what is done if an error of the system is behind it
                raise OtherRankError(rank, message, exit_code) from (ConnectionError(message) if goes_on else None)

    @contextmanager
    def _others_may_die(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo's and nccl's word for a connection that is gone
            self.is_connected = False
            raise EdgepruneError(
                "another process of this run has died; start the same command again, it continues"
            ) from ConnectionError(str(error))


class OtherRankError(EdgepruneError):
    """Another rank has met an error; the message is its message."""

    def __init__(self, rank: int, message: str, exit_code: int) -> None:
        super().__init__(message if rank == 0 else f"process {rank}: {message}")
        self.exit_code = exit_code


@contextmanager
def joined() -> Iterator[Ranks]:
    """This process among those that torchrun started; they leave together.

    Raises:
        OtherRankError: on every rank that is well, if another one has met an error.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=LONGEST_WAIT)
    ranks = Ranks(dist.get_rank(), size)
    try:
        yield ranks
        ranks.meet()
    except OtherRankError:
        raise  # they know
    except Exception as error:
        if ranks.is_connected:
            if isinstance(error, EdgepruneError):
                ranks.meet(error, may_continue=isinstance(error.__cause__, OSError))
            else:
                ranks.meet(EdgepruneError(f"{type(error).__name__}: {error}"), may_continue=True)
        raise
    finally:
        dist.destroy_process_group()
