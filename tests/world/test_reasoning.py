"""Sentences: grammatical, varied, and only of what the cameras have seen in the last two seconds."""

from __future__ import annotations

import re
from collections import Counter

import torch

from flashdrive_node.world.episode import Episode
from flashdrive_node.world.expert import Cause
from flashdrive_node.world.reasoning import Start
from flashdrive_node.world.scene import Kind, Scenario
from flashdrive_node.world.sight import EVIDENCE_STEPS, Sight, sight
from flashdrive_node.world.state import State
from flashdrive_node.world.steering import Manoeuvre

STEPS = range(20, 130, 6)
_WORDS = re.compile(r"[A-Z][a-z]+(,? [a-z]+)+\.")
NAMED = {"car": (Kind.CAR,), "truck": (Kind.TRUCK,), "cyclist": (Kind.CYCLIST,), "pedestrian": (Kind.PEDESTRIAN,)}


def test_sentences_are_grammatical_and_varied(episode: Episode) -> None:
    found = Counter(text for step in STEPS for text in episode.sentences(step))
    for text in found:
        assert _WORDS.fullmatch(text), text
        assert 4 <= len(text.split()) <= 24, text
        assert "{" not in text
        assert "  " not in text
    assert len(found) > 70
    assert found.most_common(1)[0][1] < 0.2 * sum(found.values())


def test_only_what_was_seen_is_named(episode: Episode) -> None:
    """An agent that a sentence names was visible at one of the last 20 steps, and is of the kind named."""
    for step in STEPS:
        reason, texts = episode.reason(step), episode.sentences(step)
        seen = torch.stack([s.agents for s in episode.sights[max(0, step + 1 - EVIDENCE_STEPS) : step + 1]]).any(dim=0)
        for actor in (reason.actor, reason.lateral_actor):
            visible = seen.gather(1, actor.clamp(min=0)[:, None])[:, 0]
            assert (visible | (actor < 0)).all()
        for name, kinds in NAMED.items():
            for row, text in enumerate(texts):
                if re.search(rf"\b{name}\b", text):
                    there = seen[row] & (episode.scene.agents.kind[row] == int(kinds[0]))
                    assert there.any(), (step, row, text)


def test_blinded_cameras_leave_nothing_to_name(episode: Episode) -> None:
    blind = Sight(*(torch.zeros_like(v) for v in episode.sights[0]))
    dark = Episode(episode.scene, episode.states, episode.decisions, [blind] * len(episode.sights), episode.faults)
    for step in (30, 60, 90):
        texts = " ".join(dark.sentences(step))
        assert not re.search(r"\b(car|truck|cyclist|pedestrian|cones|light|sign)\b", texts), texts
        assert (dark.reason(step).start == int(Start.NONE)).all()


def test_sight_ends_behind_a_vehicle_and_behind_the_ego(episode: Episode) -> None:
    scene, state = episode.scene, episode.states[0]
    row = int(
        ((scene.scenario == int(Scenario.STOP_AND_GO)) & (scene.road.curvature.abs().amax(dim=1) == 0)).nonzero()[0, 0]
    )
    values = {name: value.clone() for name, value in vars(state).items()}
    # Slot 0 is ahead in the lane; put the walker right before it, then beside the road, then behind the ego.
    lead = float(values["agent_s"][row, 0])
    kinds = scene.agents.kind.clone()
    walker = 11
    values["agent_s"][row, walker], values["agent_d"][row, walker] = lead + 6.0, 0.0
    assert kinds[row, 0] in (int(Kind.CAR), int(Kind.TRUCK))
    if kinds[row, walker] != int(Kind.PEDESTRIAN):
        scene.agents.kind[row, walker] = int(Kind.PEDESTRIAN)
    hidden = sight(scene, State(**values)).agents[row]
    values["agent_d"][row, walker] = -6.0
    beside = sight(scene, State(**values)).agents[row]
    values["agent_s"][row, walker] = -30.0
    behind = sight(scene, State(**values)).agents[row]
    scene.agents.kind.copy_(kinds)
    assert hidden[0]
    assert beside[walker]
    assert not behind[walker]
    if scene.agents.height[row, 0] > 1.5:
        assert not hidden[walker] or scene.agents.height[row, walker] > scene.agents.height[row, 0] + 0.29


def test_scenarios_are_spoken_of(episode: Episode) -> None:
    words = {
        Scenario.RED_LIGHT: r"\b(light|ahead)\b",
        Scenario.STOP_SIGN: r"stop sign",
        Scenario.PEDESTRIAN: r"pedestrian",
        Scenario.PARKED_CAR: r"parked car",
        Scenario.CONES: r"traffic cones",
        Scenario.CYCLIST: r"cyclist",
        Scenario.TURN_LEFT: r"[Tt]urn(ing)? left",
        Scenario.TURN_RIGHT: r"[Tt]urn(ing)? right",
        Scenario.SPEED_BUMP: r"speed bump",
        Scenario.SLOW_LEAD: r"(car|truck) ahead",
        Scenario.CURVE: r"curve|bend",
    }
    texts = [episode.sentences(step) for step in STEPS]
    for scenario, word in words.items():
        rows = (episode.scene.scenario == int(scenario)).nonzero()[:, 0].tolist()
        spoken = [any(re.search(word, t[row]) for t in texts) for row in rows]
        assert sum(spoken) >= 0.6 * len(rows), (scenario.name, spoken)


def test_a_reason_precedes_the_onset(episode: Episode) -> None:
    """Where braking for something begins, the window half a second before already says so."""
    braking = torch.stack([(d.cause == int(Cause.PEDESTRIAN)) & (d.accel < -0.5) for d in episode.decisions])
    rows = (episode.scene.scenario == int(Scenario.PEDESTRIAN)).nonzero()[:, 0].tolist()
    early = []
    for row in rows:
        begun = braking[:, row].nonzero()[:, 0]
        if len(begun) and 25 < int(begun[0]) < 130:
            early.append(int(episode.reason(int(begun[0]) - 4).cause[row]) == int(Cause.PEDESTRIAN))
    assert len(early) >= 3
    assert sum(early) >= 0.7 * len(early)


def test_navigation_counts_down_to_the_turn(episode: Episode) -> None:
    scene = episode.scene
    for step in (0, 40, 80, 120):
        texts = episode.navigation(step)
        for row, text in enumerate(texts):
            to_turn = float(scene.turn_s[row] - episode.states[step].s[row])
            if int(scene.turn[row]) == 0:
                assert text in (None, "Continue straight")
            elif to_turn > 120 or to_turn <= -1:
                assert text is None
            else:
                side = "left" if int(scene.turn[row]) > 0 else "right"
                assert text == (f"Turn {side} in {round(to_turn)}m" if to_turn > 5 else f"Turn {side}")
    turning = scene.turn != 0
    assert sum(t is not None for t in episode.navigation(40)) >= int(turning.sum()) // 2
    for decision in episode.decisions:
        side = torch.where(scene.turn > 0, int(Manoeuvre.TURN_LEFT), int(Manoeuvre.TURN_RIGHT))
        turns = decision.manoeuvre >= int(Manoeuvre.TURN_LEFT)
        assert (decision.manoeuvre == side)[turns].all()
        assert turning[turns].all()
