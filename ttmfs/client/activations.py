"""Evicts the activations of a PyTorch training step into a backup, and brings them back in the backward pass.

::

    with Backup.create("/mnt/ttm/step", size=64 << 30) as backup:
        evicting = ttmfs.torch.EvictActivations(backup)
        for batch in batches:
            with evicting:
                loss = model(batch)
            loss.backward()

Autograd calls ``_pack`` for each tensor that it saves for the backward pass, and ``_unpack`` when it needs that tensor
(``torch.autograd.graph.saved_tensors_hooks``). A tensor's bytes lie in whole pages of the backup, in the order of its
memory. The pages are dropped once autograd releases the tensor.

Threading: the forward and the backward pass may run in any thread. ``_lock`` protects the free pages and the counts.
The garbage collector can release a tensor at any instant, also while its thread holds the lock. So a release only notes
the pages, and the thread that has the lock drops them.
"""

from __future__ import annotations

import bisect
import contextlib
import threading
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

try:
    import torch
except ImportError as error:
    raise ImportError("ttmfs.torch needs PyTorch, which is not installed here: see pytorch.org") from error

from ..errors import InvalidArgument, NoRoom, TtmfsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..handles import Uint64Array
    from .backup import Backup

__all__ = ["EvictActivations", "Evictions"]


@dataclass(frozen=True)
class Evictions:
    """What was evicted since the start. Tensors are counts; bytes are those of the tensors, without padding."""

    evicted: int = 0
    bytes_evicted: int = 0
    brought_back: int = 0
    bytes_brought_back: int = 0
    kept_without_room: int = 0
    """Tensors that stayed in memory because the backup or its mount had no room."""
    bytes_in_backup: int = 0
    """Bytes that are in the backup now."""


class EvictActivations:
    """A context manager: tensors that autograd saves inside it go to a backup. It can be entered again for each step.

    The backup must be empty, and nothing else may use it while this object is used. Close it after the last backward
    pass. Tensors of less than `threshold` bytes stay in memory, and so do parameters, other leaves that require a
    gradient, views of these, sparse tensors, tensors whose elements share memory, and subclasses of torch.Tensor.

    If there is no room, a tensor stays in memory (``on_no_room="keep"``, counted), or NoRoom is raised ("raise").
    `writeback` pushes the pages to swap at once, on a best-effort basis. Raises InvalidArgument.
    """

    def __init__(
        self, backup: Backup, *, threshold: int = 1 << 20, writeback: bool = False, on_no_room: str = "keep"
    ) -> None:
        if on_no_room not in ("keep", "raise"):
            raise InvalidArgument(f"on_no_room is 'keep' or 'raise', not {on_no_room!r}")
        if threshold < 1:
            raise InvalidArgument(f"threshold is a number of bytes, 1 or more, not {threshold}")
        if next(backup.runs(), None):
            raise InvalidArgument("the backup holds pages already; give an empty one, which nothing else uses")
        self._backup = backup
        self._threshold, self._writeback, self._raises = threshold, writeback, on_no_room == "raise"
        self._lock = threading.Lock()
        self._free = FreePages(backup.size // backup.page_size)
        self._released: deque[tuple[int, int, int]] = deque()  # first index, index past the last, bytes
        self._counts = Evictions()
        self._hooks = threading.local()  # of each thread, a stack

    def __enter__(self) -> Self:
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        hooks.__enter__()
        self._hooks.stack = [*getattr(self._hooks, "stack", []), hooks]
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.stack.pop().__exit__(*error)

    @property
    def evictions(self) -> Evictions:
        """The counts, at this moment."""
        self._drop_released()
        with self._lock:
            return self._counts

    # --- what autograd calls ---

    def _pack(self, tensor: Any) -> _Kept | _Evicted:
        """Return what autograd keeps in place of a tensor."""
        if not _can_be_evicted(tensor) or tensor.nbytes < self._threshold:
            return _Kept(tensor)
        if evicted := self._evict(tensor.detach()):
            return evicted
        self._count(kept_without_room=1)
        return _Kept(tensor)

    def _unpack(self, packed: _Kept | _Evicted) -> Any:
        """Return the tensor. Autograd may ask several times."""
        if isinstance(packed, _Kept):
            return packed.unchanged()
        tensor = self._bring_back(packed)
        self._count(brought_back=1, bytes_brought_back=packed.nbytes)
        return tensor

    # --- pages ---

    def _evict(self, tensor: Any) -> _Evicted | None:
        """Store a tensor. Return None if there is no room, unless that is an error."""
        packed_strides = tuple(tensor.stride()) if _is_dense(tensor.shape, tensor.stride()) else None
        host = tensor.cpu() if packed_strides else tensor.cpu().contiguous()
        data = _bytes_of(host)
        pages = -(-len(data) // self._backup.page_size)
        with self._lock:
            first = self._free.take(pages)
        try:
            if first is None:
                raise NoRoom(f"the backup has no {pages} free pages in a row; make it larger")
            self._store(data, first)
        except BaseException as error:
            if first is not None:
                self._release(first, first + pages, 0)
            if self._raises or not isinstance(error, NoRoom):
                raise
            return None
        self._count(evicted=1, bytes_evicted=len(data), bytes_in_backup=len(data))
        return _Evicted(self, first, first + pages, tensor)

    def _store(self, data: np.ndarray[Any, np.dtype[np.uint8]], first: int) -> None:
        """Store the bytes of a tensor from an index on; zeros fill the last page. Raises NoRoom."""
        size = self._backup.page_size
        whole = len(data) // size
        if (
            whole
            and len(self._backup.backup_pages(data[: whole * size].reshape(-1, size), first, self._writeback)) < whole
        ):
            raise NoRoom("the mount has no room for the whole tensor; ttmfs why tells the reason")
        if len(data) % size:
            last = np.zeros(size, np.uint8)
            last[: len(data) % size] = data[whole * size :]
            self._backup.backup_page(last, first + whole, self._writeback)

    def _bring_back(self, evicted: _Evicted) -> Any:
        size = self._backup.page_size
        memory = torch.empty((evicted.past - evicted.first) * size, dtype=torch.uint8)
        handles: Uint64Array = np.arange(evicted.first + 1, evicted.past + 1, dtype=np.uint64)
        self._backup.copy_pages(memory.numpy().reshape(-1, size), handles)
        elements = memory[: evicted.nbytes].view(evicted.dtype)
        if _is_dense(evicted.shape, evicted.strides):
            return elements.as_strided(evicted.shape, evicted.strides).to(evicted.device)
        spread = torch.empty_strided(evicted.shape, evicted.strides, dtype=evicted.dtype, device=evicted.device)
        return spread.copy_(elements.view(evicted.shape))

    def _release(self, first: int, past: int, nbytes: int) -> None:
        """Note that pages are no longer needed. The garbage collector calls it at any instant, in any thread."""
        self._released.append((first, past, nbytes))
        self._drop_released()

    def _drop_released(self) -> None:
        """Drop the noted pages, unless a thread (perhaps this one) holds the lock: the next call drops them then."""
        while self._released and self._lock.acquire(blocking=False):
            try:
                first, past, nbytes = self._released.popleft()
                with contextlib.suppress(TtmfsError):  # the backup was closed or ended
                    self._backup.drop_pages(np.arange(first + 1, past + 1, dtype=np.uint64))
                self._free.give(first, past)
                self._counts = replace(self._counts, bytes_in_backup=self._counts.bytes_in_backup - nbytes)
            finally:
                self._lock.release()

    def _count(self, **more: int) -> None:
        with self._lock:
            self._counts = replace(
                self._counts, **{name: getattr(self._counts, name) + number for name, number in more.items()}
            )
        self._drop_released()


class _Kept:
    """A tensor that stays in memory. Autograd does not check a tensor for changes if a hook keeps it."""

    def __init__(self, tensor: Any) -> None:
        self._tensor, self._version = tensor, tensor._version

    def unchanged(self) -> Any:
        """Return the tensor. Raises RuntimeError if it was changed in place."""
        if self._tensor._version != self._version:
            raise RuntimeError(
                f"a tensor of {tuple(self._tensor.shape)} that the backward pass needs was modified by an inplace "
                "operation after the forward pass saved it"
            )
        return self._tensor


class _Evicted:
    """A tensor in the backup. Its pages are dropped with the last reference to it."""

    def __init__(self, owner: EvictActivations, first: int, past: int, tensor: Any) -> None:
        self._owner, self.first, self.past = owner, first, past
        self.shape, self.strides = tuple(tensor.shape), tuple(tensor.stride())
        self.dtype, self.device, self.nbytes = tensor.dtype, tensor.device, int(tensor.nbytes)

    def __del__(self) -> None:
        self._owner._release(self.first, self.past, self.nbytes)


class FreePages:
    """The indices of a backup that hold no page, as runs (first, past the last), ascending."""

    def __init__(self, count: int) -> None:
        self.runs = [(0, count)]

    def take(self, count: int) -> int | None:
        """Take `count` indices in a row, the lowest ones. Return the first, or None if there is no such run."""
        for place, (first, past) in enumerate(self.runs):
            if past - first >= count:
                self.runs[place : place + 1] = [(first + count, past)] if past - first > count else []
                return first
        return None

    def give(self, first: int, past: int) -> None:
        """Give indices back."""
        place = bisect.bisect(self.runs, (first, past))
        if place < len(self.runs) and self.runs[place][0] == past:
            past = self.runs.pop(place)[1]
        if place and self.runs[place - 1][1] == first:
            place -= 1
            first = self.runs.pop(place)[0]
        self.runs.insert(place, (first, past))


def _can_be_evicted(tensor: Any) -> bool:
    """Whether a copy of the bytes can take a tensor's place, and frees memory: a parameter stays in memory anyway."""
    base = tensor if tensor._base is None else tensor._base
    if (
        type(tensor) is not torch.Tensor
        or isinstance(base, torch.nn.Parameter)
        or (base.is_leaf and base.requires_grad)
    ):
        return False
    return bool(tensor.layout == torch.strided and not tensor.is_quantized and not _overlaps(tensor))


def _overlaps(tensor: Any) -> bool:
    """Whether elements may share memory, as in an expanded tensor: then a copy would be larger."""
    span = 1  # from the first element to past the last
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length > 1:
            if stride < span:
                return True
            span += stride * (length - 1)
    return False


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements fill a piece of memory without gaps, in some order of dimensions."""
    extent = 1
    for stride, length in sorted(zip(strides, shape, strict=True)):
        if length > 1:
            if stride != extent:
                return False
            extent *= length
    return True


def _bytes_of(tensor: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the memory of a dense tensor on the CPU: a view, in the order of the memory."""
    plain = tensor.resolve_conj().resolve_neg()
    data: np.ndarray[Any, np.dtype[np.uint8]] = plain.as_strided((plain.numel(),), (1,)).view(torch.uint8).numpy()
    return data
