"""Videos of some of the scenes that are driven in lock-step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from flashdrive_node.evaluation.closed_loop import ClosedLoop
from flashdrive_node.evaluation.drive_video import DriveVideo
from flashdrive_node.evaluation.policies import CONSTANT_VELOCITY, EXPERT, HISTORY, MODEL, Plans
from flashdrive_node.world.frames import FrameSettings, render_frames
from flashdrive_node.world.scene import Scene, select
from flashdrive_node.world.state import State

#: Of pictures that nobody has made while driving.
_OWN_PICTURES = FrameSettings(chunk=8)
#: Policies as the pictures name them.
_PLANNERS = {MODEL: "the model", HISTORY: "history only", CONSTANT_VELOCITY: "constant speed", EXPERT: "the expert"}
#: Fields of the scores that a viewer is told of.
_FAULTS = {
    "at_fault_collision": "collision",
    "off_road": "off the road",
    "red_light": "red light",
    "stop_sign": "stop line",
}


class Filming:
    """Follows a loop step by step, and draws its videos when it is over."""

    def __init__(self, scene: Scene, rows: Sequence[int], policy: str):
        """Choose scenes.

        Args:
            scene: All scenes of the loop.
            rows: Those that become videos.
            policy: Who drives.
        """
        self.rows = list(rows)
        self._at = torch.tensor(self.rows, dtype=torch.int64, device=scene.device)
        self._scene = select(scene, self._at)
        note = f"{policy} drives this vehicle of the procedural world"
        scenes = [select(self._scene, self._at.new_tensor([i])) for i in range(len(self.rows))]
        self._videos = [DriveVideo(one, note, _PLANNERS[policy]) for one in scenes]

    def add(self, loop: ClosedLoop, plans: Plans | None) -> None:
        """The step that a loop has just made."""
        if not self.rows:
            return
        state = loop.states[-2]
        pictures = self._pictures(loop, state).cpu().numpy()
        scores = loop.tally.scores()
        faults = {title: getattr(scores, name).tolist() for name, title in _FAULTS.items()}
        cameras = [camera.index for camera in _OWN_PICTURES.cameras]
        for number, (row, video) in enumerate(zip(self.rows, self._videos, strict=True)):
            one = self._at[number : number + 1]
            video.add(
                select(state, one),
                select(loop.trajectory, one),
                dict(zip(cameras, pictures[number], strict=True)),
                plans.texts[row] if plans is not None and plans.texts is not None else "",
                [("faults so far", ", ".join(title for title, rows in faults.items() if rows[row]) or "none")],
            )

    def _pictures(self, loop: ClosedLoop, state: State) -> Tensor:
        """uint8 [videos, cameras, H, W, 3]: what the policy saw, where it saw that moment."""
        seen = loop.pictures_at(state)
        if seen is not None:
            return seen[self._at]
        return render_frames(self._scene, select(state, self._at), _OWN_PICTURES)

    def write(self, folder: Path, indices: Sequence[int]) -> None:
        """Draw the videos.

        Args:
            folder: Where to; made if need be.
            indices: Of the scenes in their split, by which the files are named.

        Raises:
            OSError: No video can be written there.
        """
        for index, video in zip(indices, self._videos, strict=True):
            folder.mkdir(parents=True, exist_ok=True)
            video.write(folder / f"{index:06d}.mp4")
