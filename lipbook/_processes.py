"""One answer by several processes: shares of the work, and refusals that all of them raise."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

__all__ = ["ALONE", "Digest", "Team"]

Part = TypeVar("Part")
Result = TypeVar("Result")

# Note [teams]
# All processes of a group call the same function with the same arguments. What is cheap each does
# for itself. What is long is cut into parts, the same parts as in one process, so that each part is
# the same program on the same numbers and has the same bits; process r takes the parts r, r + size,
# ..., and all get all results. A meeting is a collective call to which each process brings a value
# or its error. Whoever fails between two meetings still goes to the next one, which is a meeting
# of all: so nobody waits for a process that has given up, and all raise. The last meeting is at the
# end of the block. Meetings have names; processes that meet under different names have gone
# different ways, and say so.

_END = "the end"


class Team:
    """The processes of a group, or this one alone; a block in which all succeed or all raise.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup, optional
        The processes; this one alone unless given.

    Raises
    ------
    TypeError, ValueError
        If it is no group, or one that this process is not in.

    Examples
    --------
    >>> with Team(None) as team:
    ...     team.map(lambda part: part**2, [1, 2, 3])
    [1, 4, 9]
    """

    def __init__(self, group: Any) -> None:
        self.group, self.rank, self.size = group, 0, 1
        self._over = False  # nobody waits for this process any more
        if group is None:
            return
        if distributed.is_available():
            if group is distributed.GroupMember.NON_GROUP_MEMBER:
                raise ValueError("group must be one that this process is in, got one without it")
            if isinstance(group, distributed.ProcessGroup):
                self.rank = distributed.get_rank(group)
                self.size = distributed.get_world_size(group)
                return
        raise TypeError(
            f"group must be a process group of torch.distributed, got {type(group).__name__}"
        )

    def __enter__(self) -> Team:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not self._over and (error is None or isinstance(error, Exception)):
            self._meet(_END, None, error)

    def gather(self, name: str, value: Result) -> list[Result]:
        """Meet, and return the values of all processes, in the order of their ranks."""
        return self._meet(name, value, None)

    def map(self, function: Callable[[Part], Result], parts: Sequence[Part]) -> list[Result]:
        """Apply a function to all parts, each process to its own, and return all results."""
        mine = [function(part) for part in parts[self.rank :: self.size]]
        shares = self.gather(f"{len(parts)} parts", mine)
        return [shares[k % self.size][k // self.size] for k in range(len(parts))]

    def agree(self, **values: Any) -> None:
        """Refuse arguments that are not the same on all processes: tensors bit for bit."""
        if self.size == 1:
            return
        mine = {name: _described(value) for name, value in values.items()}
        first, *others = self.gather(f"the arguments {', '.join(values)}", mine)
        for rank, theirs in enumerate(others, start=1):
            for name, there in theirs.items():
                if there != first[name]:
                    self._over = True  # all find the same and raise
                    raise ValueError(
                        f"{name} must be the same on all processes of the group, got {first[name]} "
                        f"on process 0 and {there} on process {rank}"
                    )

    def _meet(self, name: str, value: Any, error: BaseException | None) -> list[Any]:
        """Bring a value or an error, and get what all have brought, or raise."""
        if self.size == 1:
            return [value]
        self._over = True  # should the meeting itself fail, there is no other
        told = None if error is None else (type(error).__name__, str(error))
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, _packed((name, value, told)), group=self.group)
        found = [pickle.loads(each) for each in found]
        for rank, (_, _, failure) in enumerate(found):
            if failure is not None:
                if error is not None:
                    return []  # and raise that
                kind, text = failure
                cls = {"TypeError": TypeError, "ValueError": ValueError}.get(kind, RuntimeError)
                said = text if cls is not RuntimeError else f"{kind}: {text}"
                raise cls(f"{said} (on process {rank} of the group)")
        names = [theirs for theirs, _, _ in found]
        if len(set(names)) > 1:
            raise RuntimeError(
                "all processes of the group must make the same calls, but they have come to "
                + "; ".join(f"{theirs} (process {rank})" for rank, theirs in enumerate(names))
            )
        self._over = name == _END
        return [brought for _, brought, _ in found]


#: This process, without others.
ALONE = Team(None)


class _Pickler(pickle.Pickler):
    """Tensors as arrays: torch's own way takes ten times as long for small ones."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented


def _packed(value: Any) -> bytes:
    file = io.BytesIO()
    _Pickler(file, protocol=5).dump(value)
    return file.getvalue()


class Digest:
    """SHA-256 of values: tensors by dtype, shape and bytes, objects of other classes by class.

    Examples
    --------
    >>> x = torch.tensor([0.0, 1.0])
    >>> Digest(x).hex == Digest(x.clone()).hex, Digest(x).hex == Digest(-x).hex
    (True, False)
    """

    def __init__(self, *values: Any) -> None:
        self._hash, self._count = hashlib.sha256(), 0
        for value in values:
            self.update(value)

    @property
    def hex(self) -> str:
        """The digest of all values so far."""
        return self._hash.hexdigest()

    def __str__(self) -> str:
        return f"{self._count} values of SHA-256 {self.hex}"

    def update(self, value: Any) -> None:
        """Take one value more."""
        self._count += 1
        self._take(value)

    def _take(self, value: Any) -> None:
        if isinstance(value, Tensor):
            whole = value.detach().cpu().contiguous()
            self._hash.update(f"{whole.dtype}{tuple(whole.shape)}".encode())
            self._hash.update(whole.flatten().view(torch.uint8).numpy().data)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = [getattr(value, field.name) for field in dataclasses.fields(value)]
            self._take([type(value).__name__, *fields])
        elif isinstance(value, (tuple, list)):
            self._hash.update(f"{len(value)} ".encode())
            for part in value:
                self._take(part)
        elif value is None or isinstance(value, (bool, int, float, complex, str)):
            text = f"{type(value).__name__}{value!r}".encode()
            self._hash.update(f"{len(text)} ".encode() + text)
        else:  # an object, of which two processes have two: its class
            kind = value if isinstance(value, type) else type(value)
            self._take(f"{kind.__module__}.{kind.__qualname__}")


def _described(value: Any) -> str:
    """Text of a value, the same text for the same values only."""
    if isinstance(value, Digest):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, complex, str)):
        return repr(value)
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}, SHA-256 {Digest(value).hex}"
    return f"a {type(value).__name__}, SHA-256 {Digest(value).hex}"
