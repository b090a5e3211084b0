"""The keys that somebody has written, and where: in a file, in the files it is based on, or as
overrides."""

from collections.abc import Collection, Iterable


class WrittenKeys(frozenset[str]):
    """Full names of the keys that were given a value.

    >>> written = WrittenKeys([{"SOLVER.STEPS"}, {"SOLVER.MAX_ITER", "SEED"}, {"SEED"}])
    >>> "SOLVER.STEPS" in written, sorted(written.since("SOLVER.MAX_ITER"))
    (True, ['SEED', 'SOLVER.MAX_ITER'])

    Args:
        places: the keys of each place, what is read later last.
    """

    places: tuple[frozenset[str], ...]

    def __new__(cls, places: Iterable[Iterable[str]] = ()) -> "WrittenKeys":
        parts = tuple(map(frozenset, places))
        keys = super().__new__(cls, frozenset().union(*parts))
        keys.places = parts
        return keys

    def by_hand(self, every: Collection[str]) -> "WrittenKeys":
        """Without those of the places that have all of these keys: nobody writes all, a dump does.

        >>> written = WrittenKeys([{"SEED", "OUTPUT_DIR", "VERSION"}, {"SEED"}])
        >>> sorted(written.by_hand(["SEED", "VERSION"]))
        ['SEED']
        """
        return WrittenKeys(keys if set(every) - keys else () for keys in self.places)

    def since(self, key: str) -> frozenset[str]:
        """All keys of the last place that has ``key``, or a key of that node, and of later ones."""
        having = [
            number
            for number, keys in enumerate(self.places)
            if any(other == key or other.startswith(f"{key}.") for other in keys)
        ]
        return frozenset().union(*self.places[having[-1] :]) if having else frozenset()
