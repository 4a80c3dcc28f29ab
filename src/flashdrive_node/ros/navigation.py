"""The navigation text: untrusted input of a language model, and of no use when it is old."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Navigation:
    """The text in use, and why the last one was refused or dropped ("" where it was not)."""

    text: str | None = None
    problem: str = ""
    received_ns: int = 0

    def receive(self, text: str, now_ns: int, max_length: int) -> bool:
        """Take a text over, or refuse it and keep the one in use; an empty one clears it. Whether it was taken."""
        text = text.strip()
        self.problem = navigation_problem(text, max_length)
        if not self.problem:
            self.text, self.received_ns = text or None, now_ns
        return not self.problem

    def expire(self, now_ns: int, timeout_s: float) -> bool:
        """Drop a text older than the timeout (0: never); whether it was dropped."""
        # A clock that went back makes every age negative: what came before the jump is of another drive.
        age_s = (now_ns - self.received_ns) / 1e9
        if self.text is None or timeout_s <= 0 or 0 <= age_s <= timeout_s:
            return False
        self.problem = f"navigation text dropped, it is older than {timeout_s:g} s: {self.text!r}"
        self.text = None
        return True


def navigation_problem(text: str, max_length: int) -> str:
    """Why a navigation text is not given to the model, or ""."""
    if len(text) > max_length:
        return f"navigation text refused: at most {max_length} characters, found {len(text)}"
    if "<|" in text or "|>" in text:
        return "navigation text refused: it holds special tokens (<|...|>)"
    if not text.isprintable():
        return "navigation text refused: it holds characters that are not printable"
    return ""
