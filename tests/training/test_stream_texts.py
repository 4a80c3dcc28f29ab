"""Records of texts that are written in streams, against the engine's own; and where scenes change."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flashdrive_node.engine.batched_policy import BatchedPolicy
from flashdrive_node.engine.drafter_config import PARTS
from flashdrive_node.engine.prompt_slots import prompt_room
from flashdrive_node.engine.settings import StreamingSettings
from flashdrive_node.engine.stream import StreamSettings
from flashdrive_node.engine.streaming import StreamingEngine
from flashdrive_node.evaluation.bag_clips import BagClips
from flashdrive_node.model.checkpoint import CheckpointInfo
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.loading import LoadedModel
from flashdrive_node.model.sampling import SamplingSettings
from flashdrive_node.training.drafter_files import drafter_config, new_drafter
from flashdrive_node.training.prompt_views import PromptViews
from flashdrive_node.training.rollouts import Rollouts, RolloutSettings
from flashdrive_node.training.scene_change import LASTING, SceneWatch
from flashdrive_node.training.text_records import TextRecorder
from flashdrive_node.world.decision_text import every_decision, forms_of, parse
from support.driven_bag import RIG, write_bag

LENGTH, CONTEXT = 6, 3
CALM = RolloutSettings(lanes=2, reset=0.0, drop=0.0, refresh_every=(0,), refresh_views=0.0)


def test_records_of_streams_are_what_the_engines_have(model, tokenizer, tmp_path) -> None:
    """States of a stream's tail come of keys that are kept from older windows, in both alike."""
    bags = [
        write_bag(tmp_path / "one", 8.2),
        write_bag(tmp_path / "two", 8.2, shade=lambda t: 200 - round(t * 7) % 150),
    ]
    policy = BatchedPolicy(model, tokenizer, temperature=0.0, cameras=(0, 1), max_length=LENGTH)
    shape = drafter_config(model.config, 1, None, 4, CONTEXT, None, "flat", PARTS)
    drafter, room = new_drafter(shape, model, 0), prompt_room(tokenizer, model.config)
    recorder = TextRecorder(policy, shape.target_layer_ids, room, shape.image_cells)
    settings = StreamingSettings(
        checkpoint="", device="cpu", precision="float32", sampling=SamplingSettings(top_k=1, max_length=LENGTH),
        cameras=(0, 1), stream=StreamSettings("kv"),
    )  # fmt: skip
    loaded = LoadedModel(model, tokenizer, CheckpointInfo(Path(), "", "", 0, 0, 0.0))
    source = BagClips(bags, RIG)
    clips = [list(clip.windows) for clip in source.clips()]
    engines = [StreamingEngine(settings, loaded, drafter) for _ in bags]
    rollouts = Rollouts(policy, source, CALM, seed=0, recorder=recorder)
    whole = next(Rollouts(policy, source, CALM, seed=0, recorder=recorder)).records
    for number in range(3):
        records = next(rollouts).records
        assert records.clips.tolist() == [0, 1]
        views = PromptViews(records, recorder.prompt, shape, room)
        for row, (engine, windows) in enumerate(zip(engines, clips, strict=True)):
            engine.step(windows[number].observation)
            view = views.view(torch.tensor([row]))
            seen = view.kinds[0] >= 0
            mine, theirs = drafter.read(view), engine.reader.memory
            torch.testing.assert_close(mine.keys[:, :, seen], theirs.keys[:, :, seen], rtol=1e-3, atol=1e-3)
            ids = engine._said.text.rows()[0]
            assert records.tokens[row, : len(ids)].tolist() == ids
    # Kept keys are not those of a first window.
    assert not torch.allclose(records.states, whole.states, atol=1e-3)
    with pytest.raises(InputError, match=r"records with \d+ states in front of a text and 48 image cells are required"):
        PromptViews(replace(records, cells=records.cells[:, :1]), recorder.prompt, shape, room)


def test_a_scene_changes_with_the_decision() -> None:
    # Forms without a gap to be filled are sentences.
    said = [[f"{form}." for form in forms_of(one) if parse(f"{form}.") == one] for one in every_decision()]
    (one, *paraphrases), (other, *_) = [texts for texts in said if len(texts) > 1][:2]
    watch = SceneWatch()
    assert not watch.see(one)
    assert not any(watch.see(text) for text in paraphrases)  # the same decision in other words
    assert not watch.see("No sentence of the world.")
    assert [watch.see(other) for _ in range(LASTING + 2)] == [True] * LASTING + [False] * 2
    watch.begin()
    assert not watch.see(one)  # another clip has no moment before
