"""Where a scene changes: moments at which the driver's decision becomes another."""

from __future__ import annotations

from flashdrive_node.world.decision_text import StatedDecision, parse

#: Windows that a change counts for, the first included: half a second at 10 Hz.
LASTING = 5


class SceneWatch:
    """Follows the driver's sentences through one clip after the other."""

    def __init__(self) -> None:
        self._decision: StatedDecision | None = None
        self._since = LASTING

    def begin(self) -> None:
        """Another clip."""
        self._decision, self._since = None, LASTING

    def see(self, sentence: str | None) -> bool:
        """Take the next window's sentence in: whether the decision has changed lately.

        A sentence that states no decision, or none at all, changes nothing.
        """
        decision = None if sentence is None else parse(sentence)
        self._since += 1
        if decision is not None:
            if self._decision is not None and decision != self._decision:
                self._since = 0
            self._decision = decision
        return self._since < LASTING
