"""Contact sheets: every scenario as every camera sees it, with the sentence and the navigation instruction."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from flashdrive_node.world.camera import CAMERAS
from flashdrive_node.world.draws import scene_keys
from flashdrive_node.world.episode import Episode, record
from flashdrive_node.world.expert import Cause
from flashdrive_node.world.render import render
from flashdrive_node.world.scenario import sample_scenes
from flashdrive_node.world.scene import Scenario, Scene, move, select
from flashdrive_node.world.survey import SUBJECT

_CAPTION_PX = 18
#: Scenes of a scenario among which the clearest is shown, and how long they are driven.
_CANDIDATES, _STEPS = 12, 200


def contact_sheet(
    scenarios: Sequence[Scenario],
    split: str,
    first_index: int,
    width: int,
    height: int,
    *,
    samples: int = 2,
    device: torch.device | str = "cpu",
) -> NDArray[np.uint8]:
    """One row per scenario, one column per camera.

    Args:
        scenarios: Rows.
        split: Where the scenes come from.
        first_index: Of the scenes that are tried.
        width, height: Of every picture, pixels.
        samples: Rays per pixel and side.
        device: Where to render.

    Returns:
        RGB, uint8 [rows * (height + 18), cameras * width, 3].
    """
    rows = []
    for scenario in scenarios:
        first = first_index + _CANDIDATES * int(scenario)
        keys = scene_keys(split, np.arange(first, first + _CANDIDATES))
        episode = record(move(sample_scenes(keys, scenario), device), _STEPS)
        row, step = _typical_moment(episode, SUBJECT[scenario])
        index = torch.tensor([row], device=episode.scene.device)
        scene: Scene = select(episode.scene, index)
        state = select(episode.states[step], index)
        pictures = [render(scene, state, c, width, height, samples).image[0].cpu().numpy() for c in CAMERAS]
        text = f"{scenario.name.lower().replace('_', ' ')}: {episode.sentences(step)[row]}"
        instruction = episode.navigation(step)[row]
        rows.append(_caption(f"{text}  [{instruction}]" if instruction else text, width * len(CAMERAS)))
        rows.append(np.concatenate(pictures, axis=1))
    return np.concatenate(rows, axis=0)


def _typical_moment(episode: Episode, subject: tuple) -> tuple[int, int]:
    """Scene and step half a second into what the scenario is about; the longest such stretch wins."""
    steps = range(20, len(episode.decisions) - 5)
    shown = []
    for step in steps:
        reason = episode.reason(step)
        now = torch.zeros_like(reason.cause, dtype=torch.bool)
        for one in subject:
            now = now | ((reason.cause if isinstance(one, Cause) else reason.manoeuvre) == int(one))
        shown.append(now)
    table = torch.stack(shown, dim=1) & ~episode.faults.any[:, None]
    # Night pictures show little on a sheet.
    table = table & (episode.scene.weather.night < 0.5)[:, None]
    row = int(table.sum(dim=1).argmax())
    begun = table[row].nonzero()[:, 0]
    return row, steps[int(begun[len(begun) // 3])] if len(begun) else steps[0]


def _caption(text: str, width: int) -> NDArray[np.uint8]:
    strip = np.full((_CAPTION_PX, width, 3), 24, np.uint8)
    cv2.putText(strip, text, (6, _CAPTION_PX - 5), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (235, 235, 235), 1, cv2.LINE_AA)
    return strip
