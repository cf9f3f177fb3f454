"""Numbered things that requests own for a while: pages of keys and values, slots of recurrent states."""

from collections.abc import Iterable


class Pool:
    """The numbers below `size`, each of them free or owned."""

    def __init__(self, size: int):
        self.size = size
        self._free = list(range(size - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Return so many numbers that were free. They are there: the caller has looked at `num_free`."""
        assert count <= len(self._free), f"{count} are wanted of {len(self._free)} that are free"
        return [self._free.pop() for _ in range(count)]

    def give_back(self, numbers: Iterable[int]) -> None:
        """Make numbers free again."""
        self._free.extend(numbers)

    def lost(self, owned: Iterable[int]) -> list[int]:
        """Return the numbers that are neither free nor owned, or more than one of both: none, if all is well."""
        seen = [0] * self.size
        for number in (*self._free, *owned):
            seen[number] += 1
        return [number for number, count in enumerate(seen) if count != 1]
