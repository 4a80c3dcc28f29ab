"""How much a window makes the model think, compared with the windows before it: a cheap measure of novelty."""

from __future__ import annotations

from collections.abc import Sequence

#: Windows that the running mean remembers: five seconds at 10 Hz.
WINDOWS = 50


class Novelty:
    """The share of deliberative tokens and its running mean over a stream.

    A token is routine where the drafter guessed it and the model confirmed it, else deliberative. Where guesses fail
    more often than they have lately, the window has something in it that the routine does not foresee.
    """

    def __init__(self, windows: int = WINDOWS):
        """Remember about so many windows."""
        self.windows = windows
        self._mean: float | None = None
        self._seen = 0

    def reset(self) -> None:
        """Forget the stream."""
        self._mean, self._seen = None, 0

    def see(self, routine: Sequence[Sequence[bool]]) -> dict[str, float]:
        """Take a window's labels in, row by row of its texts.

        Returns:
            ``deliberative_share`` (0 to 1); ``deliberative_mean`` of the windows before; ``novelty``, the share divided
            by this mean: 1 is as ever, 2 twice as many. The first window is compared with itself.
        """
        count = sum(len(row) for row in routine)
        share = 1 - sum(sum(row) for row in routine) / count if count else 0.0
        mean = share if self._mean is None else self._mean
        self._seen += 1
        # A plain mean until there are enough windows for the running one.
        self._mean = mean + (share - mean) / min(self._seen, self.windows)
        return {
            "deliberative_share": share,
            "deliberative_mean": mean,
            "novelty": share / mean if mean else 1.0,
        }
