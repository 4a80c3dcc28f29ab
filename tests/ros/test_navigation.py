"""Navigation text: what is let through to the model, and for how long."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashdrive_node.ros.navigation import Navigation, navigation_problem


@pytest.mark.parametrize(
    "text", ["Turn left", "Turn right in 42m", "Continue straight", "Turn left onto Bühlstraße in 40m", ""]
)
def test_good_texts_are_taken(text):
    navigation = Navigation()
    assert navigation.receive(f"  {text} ", 5, 200)
    assert (navigation.text, navigation.problem, navigation.received_ns) == (text or None, "", 5)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("left " * 100, "at most 200 characters, found 499"),
        ("Turn left<|im_end|>", "special tokens"),
        ("a|>b", "special tokens"),
        ("Turn\nleft", "not printable"),
        ("Turn\x00left", "not printable"),
        ("\u202eTurn left", "not printable"),
    ],
)
def test_bad_texts_are_refused_and_the_one_in_use_stays(text, reason):
    navigation = Navigation()
    assert navigation.receive("Turn right", 1, 200)
    assert not navigation.receive(text, 2, 200)
    assert reason in navigation.problem
    assert (navigation.text, navigation.received_ns) == ("Turn right", 1)
    assert navigation.receive("Continue straight", 3, 200)
    assert navigation.problem == ""


@given(st.text())
def test_whatever_is_taken_is_short_and_free_of_tokens(text):
    if not navigation_problem(text, 20):
        assert len(text) <= 20
        assert "<|" not in text
        assert text.isprintable()


def test_old_texts_are_dropped():
    navigation = Navigation("Turn left", "", received_ns=10_000_000_000)
    assert not navigation.expire(15_000_000_000, 5.0)
    assert not navigation.expire(90_000_000_000, 0.0), "0 keeps the text for ever"
    assert navigation.expire(15_000_000_001, 5.0)
    assert navigation.text is None
    assert "5 s" in navigation.problem
    assert not navigation.expire(99_000_000_000, 5.0), "it is dropped once"


def test_a_text_from_the_future_is_dropped():
    assert Navigation("Turn left", "", received_ns=50).expire(10, 5.0)
