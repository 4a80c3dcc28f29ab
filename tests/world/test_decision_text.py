"""Sentences read back into the decisions that they state."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashdrive_node.world.decision_text import StatedDecision, decision_of, every_decision, forms_of, parse
from flashdrive_node.world.episode import Episode
from flashdrive_node.world.expert import Cause
from flashdrive_node.world.phrases import CROSSING, LANES, NAMES, ONCOMING, PASSED_NAMES, SIDES, WHILE
from flashdrive_node.world.reasoning import Pace, Start
from flashdrive_node.world.steering import Manoeuvre
from flashdrive_node.world.wording import every_sentence


def test_every_sentence_states_one_decision_and_every_decision_is_stated() -> None:
    sentences = every_sentence()
    stated = [parse(text) for text in sentences]
    assert None not in stated
    assert set(stated) == set(every_decision())


@given(
    cause=st.sampled_from(Cause),
    pace=st.sampled_from(Pace),
    manoeuvre=st.sampled_from(Manoeuvre),
    start=st.sampled_from(Start),
    data=st.data(),
)
def test_what_the_wording_says_is_read_back(
    cause: Cause, pace: Pace, manoeuvre: Manoeuvre, start: Start, data: st.DataObject
) -> None:
    decision = decision_of(cause, pace, manoeuvre, start)
    who = data.draw(st.sampled_from([*NAMES, *PASSED_NAMES.values()]))
    side, lane = data.draw(st.sampled_from(SIDES)), data.draw(st.sampled_from(LANES))
    coming = data.draw(st.sampled_from([ONCOMING, *(CROSSING.format(side=side) for side in SIDES)]))
    end = data.draw(st.sampled_from(["", *(f", while {also}" for also in WHILE.values())]))
    for form in forms_of(decision):
        text = form.format(who=who, side=side, lane=lane, coming=coming)
        assert parse(f"{text}{end}.") == decision
        assert parse(f" {text}{end}.\n") == decision


def test_the_worlds_sentences_state_the_worlds_reasons(episode: Episode) -> None:
    labels = set()
    for step in episode.windows[::4]:
        reason = episode.reason(step)
        columns = (reason.cause, reason.pace, reason.manoeuvre, reason.start)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        for text, (cause, pace, manoeuvre, start) in zip(episode.sentences(step), rows, strict=True):
            decision = parse(text)
            assert decision == decision_of(Cause(cause), Pace(pace), Manoeuvre(manoeuvre), Start(start)), text
            assert decision is not None
            labels.add(decision.label)
    assert len(labels) >= 15


@given(position=st.integers(0, 200), letter=st.sampled_from(string.ascii_letters + " .,"), index=st.integers(0, 10**6))
def test_one_changed_letter_is_no_sentence_of_the_wording(position: int, letter: str, index: int) -> None:
    sentences = every_sentence()
    text = sentences[index % len(sentences)]
    position %= len(text)
    changed = (text[:position] + letter + text[position + 1 :]).strip()
    if changed not in set(sentences):
        assert parse(changed) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "Stop.",
        "Stop behind the stopped {who} ahead.",
        "Turn left at the junction as navigated",
        "a" * 10_000,
    ],
)
def test_other_texts_state_nothing(text: str) -> None:
    assert parse(text) is None


@pytest.mark.parametrize(
    ("text", "label", "pace"),
    [
        ("Come to a stop for the red light ahead.", "RED_LIGHT", Pace.STOP),
        ("Stop at the stop line because the traffic light is red.", "RED_LIGHT", Pace.STOP),
        ("Nudge left within the lane to safely pass the parked car on the right.", "NUDGE", Pace.KEEP),
        ("Proceed through the junction because the light is green.", "GREEN_LIGHT", Pace.SPEED_UP),
        ("Keep lane at the set speed since the road ahead is clear, while a stop sign is ahead.", "FREE", Pace.KEEP),
        ("Follow the route, turning left at the junction.", "TURN_LEFT", Pace.KEEP),
    ],
)
def test_labels(text: str, label: str, pace: Pace) -> None:
    decision = parse(text)
    assert decision is not None
    assert (decision.label, decision.pace) == (label, pace)


def test_what_is_pressing_is_said_before_a_manoeuvre() -> None:
    assert decision_of(Cause.PEDESTRIAN, Pace.STOP, Manoeuvre.TURN_LEFT, Start.NONE).label == "PEDESTRIAN"
    assert decision_of(Cause.LEAD, Pace.KEEP, Manoeuvre.NUDGE, Start.NONE).label == "NUDGE"
    assert decision_of(Cause.LEAD, Pace.SLOW, Manoeuvre.LANE_CHANGE, Start.NONE).label == "LANE_CHANGE"
    assert decision_of(Cause.BLOCKED, Pace.KEEP, Manoeuvre.NUDGE, Start.NONE).label == "BLOCKED"
    turning = decision_of(Cause.FREE, Pace.KEEP, Manoeuvre.TURN_LEFT, Start.NONE)
    assert turning == StatedDecision(Cause.TURN, Pace.KEEP, Manoeuvre.TURN_LEFT, Start.NONE)
