"""The expert's paths fulfil what its own texts claim, as the evaluation judges it."""

from collections import Counter

import numpy as np

from flashdrive_node.evaluation.intent import Intent, agrees, stated_intent
from flashdrive_node.world.episode import Episode


def test_the_expert_does_what_it_says(episode: Episode) -> None:
    right: Counter[Intent] = Counter()
    judged: Counter[Intent] = Counter()
    swapped: Counter[Intent] = Counter()
    opposite = {Intent.STOP: Intent.SPEED_UP, Intent.SLOW: Intent.SPEED_UP, Intent.SPEED_UP: Intent.STOP}
    for step in range(17, 57, 8):
        speed = np.stack([s.speed.numpy() for s in episode.states[step : step + 65]], axis=1)
        yaw = np.stack([s.yaw.numpy() for s in episode.states[step : step + 65]], axis=1)
        yaw -= yaw[:, :1]
        for row, text in enumerate(episode.sentences(step)):
            intent = stated_intent(text)
            if intent is not None:
                judged[intent] += 1
                right[intent] += agrees(intent, speed[row, 0], speed[row, 1:], yaw[row, 1:])
                other = opposite.get(intent)
                swapped[intent] += other is not None and agrees(other, speed[row, 0], speed[row, 1:], yaw[row, 1:])
    assert sum(judged.values()) > 400
    for intent, count in judged.items():
        assert right[intent] / count > 0.9, intent
    # A judge that agrees with everything would be no judge.
    assert swapped[Intent.STOP] / judged[Intent.STOP] < 0.6
    assert swapped[Intent.SPEED_UP] / judged[Intent.SPEED_UP] < 0.3
