"""Open loop of the engines' own computation over many clips at a time: their windows side by side, step by step.

Seeds of the paths' noise are those that the engines draw with, so at greedy the answers are the engines' to rounding.
Pictures of a clip are made once and shown to all configurations.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flashdrive_node.engine.batched_policy import Plan, StreamingPolicy
from flashdrive_node.engine.prediction import medoid
from flashdrive_node.engine.protocol import Observation, Prediction, TrajectorySample
from flashdrive_node.engine.settings import PlainSettings, StreamingSettings
from flashdrive_node.engine.stream import StreamSettings
from flashdrive_node.evaluation.clip import Clip, ClipError, ClipSource, Window
from flashdrive_node.evaluation.clip_scores import ClipScores, WindowScore, score, worst_window
from flashdrive_node.evaluation.devices import Progress
from flashdrive_node.evaluation.evaluation import GAP_NS, WORST, ResultFolder, seed_offset, write_picture
from flashdrive_node.evaluation.policies import batched_policy, loaded_by, weights_of
from flashdrive_node.model import inference
from flashdrive_node.model.errors import InputError, ModelError
from flashdrive_node.model.loading import LoadedModel


@dataclass(eq=False)
class TakenClip:
    """A clip with its windows in memory."""

    name: str
    windows: list[Window] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    #: Why there are no more windows.
    problem: str = ""

    @classmethod
    def of(cls, clip: Clip) -> TakenClip:
        """Take all windows of a clip; those in front of a break are kept."""
        taken = cls(clip.name)
        try:
            for window in clip.windows:
                taken.windows.append(window)
        except (ClipError, ModelError, OSError) as error:
            taken.problem = f"after {len(taken.windows)} window(s): {error}"
        taken.notes = list(clip.notes)
        return taken


class HeldClips:
    """A source of clips that were taken, for several engines to go through."""

    def __init__(self, source: ClipSource, limit: int):
        """Take the first clips of a source that have windows, so many at most; 0 takes none."""
        self.name, self.camera_indices = source.name, source.camera_indices
        self._clips: list[TakenClip] = []
        for clip in source.clips() if limit else ():
            taken = TakenClip.of(clip)
            if taken.windows:
                self._clips.append(taken)
            if len(self._clips) == limit:
                break

    def __len__(self) -> int:
        return len(self._clips)

    def clips(self) -> Iterator[Clip]:
        """The clips."""
        for taken in self._clips:
            yield Clip(taken.name, iter(taken.windows), list(taken.notes))


class Lockstep:
    """Answers the windows of clips side by side, as the engine of some settings would one by one."""

    def __init__(self, loaded: LoadedModel, settings: PlainSettings):
        """Keep the model; the plain engine is a stream that keeps nothing."""
        stream, shared = StreamSettings("full"), settings.sampling.greedy
        if isinstance(settings, StreamingSettings):
            stream, shared = settings.stream, shared or settings.shared_text
        self.settings, self.model = settings, loaded.model
        #: Height, width and channels of the pictures.
        self._shape: tuple[int, ...] = ()
        self.policy = StreamingPolicy(batched_policy(loaded, settings, own_texts=not shared), stream)

    def answer(self, clips: Sequence[TakenClip], folder: ResultFolder) -> list[ClipScores]:
        """Answer and score all windows.

        Args:
            clips: Side by side; their pictures are of one size.
            folder: Takes the picture of each clip's worst window.
        """
        results = [ClipScores(clip.name, problem=clip.problem, notes=list(clip.notes)) for clip in clips]
        first = next((clip.windows[0] for clip in clips if clip.windows), None)
        if first is None:
            return results
        frames = first.observation.cameras[0].images
        self._shape = frames[0].shape
        self.policy.begin(len(clips), len(frames), *self._shape[:2])
        for index in range(max(len(clip.windows) for clip in clips)):
            lanes = [lane for lane, clip in enumerate(clips) if index < len(clip.windows)]
            self._step(index, {lane: clips[lane].windows[index] for lane in lanes}, results)
        for clip, result in zip(clips, results, strict=True):
            if result.worst is not None:
                observation = clip.windows[result.worst.index].observation
                write_picture(observation, folder.clips / f"{clip.name}.jpg")
        return results

    def _step(self, index: int, windows: Mapping[int, Window], results: Sequence[ClipScores]) -> None:
        """Answer a window of each lane; those that cannot be answered are named, and do not stop the others."""
        streams = self.policy.streams
        assert streams is not None
        for lane, window in windows.items():
            before = results[lane].windows[-1].t0_ns if results[lane].windows else window.observation.t0_ns
            if window.observation.t0_ns - before > GAP_NS:
                streams.reset(lane)
        try:
            predictions = self._predict(index, windows, [results[lane].name for lane in windows])
        except ModelError as error:
            if len(windows) > 1:
                for lane, window in windows.items():
                    self._step(index, {lane: window}, results)
                return
            (lane,) = windows
            results[lane].windows.append(WindowScore(index, windows[lane].observation.t0_ns, problem=str(error)))
            streams.reset(lane)
            return
        for (lane, window), prediction in zip(windows.items(), predictions, strict=True):
            result, truth = results[lane], window.truth
            scored = score(index, prediction, truth)
            result.windows.append(scored)
            ade = scored.errors.get(WORST)
            if truth is not None and ade is not None and (result.worst is None or ade > result.worst.ade_m):
                result.worst = worst_window(index, ade, prediction, truth)

    @torch.inference_mode()
    def _predict(self, index: int, windows: Mapping[int, Window], names: Sequence[str]) -> list[Prediction]:
        policy, model, s = self.policy.policy, self.model, self.settings
        observations = [window.observation for window in windows.values()]
        _check(observations, policy.cameras, self._shape)
        xyz = torch.from_numpy(np.stack([o.ego_history_xyz for o in observations])).to(model.device)
        rot = torch.from_numpy(np.stack([o.ego_history_rot for o in observations])).to(model.device)
        generator = torch.Generator(model.device)
        noise = []
        for name in names:
            generator.manual_seed(s.seed + seed_offset(name) + index)
            noise.append(inference.draw_noise(model, s.samples, s.noise_temperature, generator))
        # Texts of all rows come of one generator, the same in every configuration.
        generator.manual_seed(s.seed + index)

        def frames(rows: Sequence[int], images: Sequence[int]) -> Tensor:
            count = len(observations[0].cameras[0].images)
            shown = [observations[row].cameras[i // count].images[i % count] for row in rows for i in images]
            return torch.from_numpy(np.stack(shown)).to(model.device).unflatten(0, (len(rows), len(images)))

        plan = self.policy.plan(
            list(windows),
            [tuple(camera.stamps_ns for camera in o.cameras) for o in observations],
            frames,
            xyz,
            rot,
            [o.nav_text for o in observations],
            generator,
            torch.stack(noise),
        )
        speeds = model.action_space.initial_speed(xyz, rot).tolist()
        return _predictions(plan, [(o.window_id, o.t0_ns) for o in observations], speeds)


def _check(observations: Sequence[Observation], cameras: Sequence[int], shape: tuple[int, ...]) -> None:
    """All windows must be of one layout: streams side by side share a prompt."""
    for o in observations:
        found = [camera.camera_index for camera in o.cameras]
        sizes = {image.shape for camera in o.cameras for image in camera.images}
        if found != list(cameras) or sizes != {shape}:
            raise InputError(
                f"pictures {list(shape)} of cameras {list(cameras)} are required side by side, found {sorted(sizes)} "
                f"of {found}"
            )


def _predictions(plan: Plan, windows: Sequence[tuple[int, int]], speeds: Sequence[float]) -> list[Prediction]:
    """What the engines would hand out, window by window: id and time of each, and its initial speed."""
    chosen = medoid(plan.xyz[..., :2]).tolist()
    columns = (plan.xyz, plan.yaw, plan.speed, plan.actions[..., 0], plan.actions[..., 1])
    xyz, yaw, speed, acceleration, curvature = (column.float().cpu().numpy() for column in columns)
    samples, texts = plan.xyz.shape[1], len(plan.texts) // len(windows)
    predictions = []
    for row, (number, t0_ns) in enumerate(windows):
        said = [row * texts + (j if texts > 1 else 0) for j in range(samples)]
        paths = tuple(
            TrajectorySample(
                xyz[row, j], yaw[row, j], speed[row, j], acceleration[row, j], curvature[row, j],
                plan.texts[text], plan.complete[text],
            )
            for j, text in enumerate(said)
        )  # fmt: skip
        predictions.append(Prediction(number, t0_ns, paths, chosen[row], speeds[row]))
    return predictions


@dataclass(frozen=True)
class LockstepWork:
    """Open loop of several configurations over some clips of a source, for `devices.spread`."""

    #: By name: settings, and the prepared folder that takes the results.
    configurations: Mapping[str, tuple[PlainSettings, Path]]
    #: Makes the source on a device.
    source: Callable[[str], ClipSource]
    #: Clips side by side.
    batch: int

    def total(self, indices: Sequence[int]) -> int:
        """Clips of all configurations."""
        return len(self.configurations) * len(indices)

    def __call__(self, indices: Sequence[int], device: str, progress: Progress) -> list[str]:
        """Names of the clips; the results are in the folders."""
        models: dict[Hashable, LoadedModel] = {}
        wanted, held, names = set(indices), [], []
        for number, clip in enumerate(self.source(device).clips()):
            if number not in wanted:
                continue
            names.append(clip.name)
            if all(ResultFolder(path).done(clip.name) for _, path in self.configurations.values()):
                progress(len(self.configurations))
                continue
            held.append(TakenClip.of(clip))
            if len(held) == self.batch:
                self._answer(held, device, models, progress)
                held = []
        self._answer(held, device, models, progress)
        return names

    def _answer(
        self, clips: Sequence[TakenClip], device: str, models: dict[Hashable, LoadedModel], progress: Progress
    ) -> None:
        for settings, path in self.configurations.values():
            folder = ResultFolder(path)
            todo = [clip for clip in clips if not folder.done(clip.name)]
            if todo:
                weights = weights_of(settings)
                if weights not in models:
                    models[weights] = loaded_by(replace(settings, device=device))
                answers = Lockstep(models[weights], settings).answer(todo, folder)
                for result in answers:
                    result.write(folder.clips / f"{result.name}.json")
            progress(len(clips))
