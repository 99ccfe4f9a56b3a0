"""The requests in flight, noted in the state for the daemon that takes over if this one dies.

The kernel then sends each unanswered request again. The next daemon finds here

- which requests were in flight. One that was in flight at several deaths may have caused them, and is refused;
- what the change that was carried out last is answered. It is answered again, and not carried out again.

Concurrency: one thread. A handler that does not wait runs alone, so all these handlers share one slot of the notes.
"""

from ..recovery.state import LATEST, POINT_BITS, State

__all__ = ["InFlight"]

REFUSED_SCORE = 4
"""Score at which a repeated request is refused. A crash or an OOM kill adds 2, a SIGKILL 1 (see the state)."""


class InFlight:
    """The notes of one daemon. Requests are given by their numbers, without RESENT."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._notes = state.notes
        self._scores = state.suspects()
        self._answers = state.noted_answer()
        self._slots = list(range(1, LATEST))
        self.waiting = 0

    def begin(self, number: int) -> None:
        """A handler is called, which runs alone until :meth:`end` or :meth:`wait`."""
        self._notes[0] = number << POINT_BITS | (self._scores.get(number, 0) if self._scores else 0)

    def end(self) -> None:
        """The handler has returned, and its request is answered."""
        self._notes[0] = 0

    def wait(self) -> int:
        """The request of the handler that has just returned waits. Returns its slot, for :meth:`answered`."""
        slot = self._slots.pop()
        self._notes[slot], self._notes[LATEST] = self._notes[0], slot
        self._notes[0] = 0
        self.waiting += 1
        return slot

    def answered(self, slot: int) -> None:
        """A request that waited is answered."""
        self._notes[slot] = 0
        self._slots.append(slot)
        self.waiting -= 1

    def note_answer(self, number: int, answer: bytes) -> None:
        """A change is carried out, and is about to be answered."""
        self._state.note_answer(number, answer)

    def earlier_answer(self, number: int) -> bytes | None:
        """What the previous daemon was about to answer, if it carried this request out."""
        return self._answers.pop(number, None)

    def is_refused(self, number: int) -> bool:
        """Whether daemons have died while they carried this request out."""
        return self._scores.get(number, 0) >= REFUSED_SCORE
