"""Pictures, samples and the ring that keeps them."""

import pytest
import torch

from flashdrive_node.evaluation.history_baseline import route_features
from flashdrive_node.model.history_tokens import encode_history
from flashdrive_node.training.pictures import Photographer, presence_of, retouch
from flashdrive_node.training.replay_buffer import ANSWER_TOKENS, ReplayBuffer
from flashdrive_node.training.supply import DriveSupply, Fresh, MixedSupply
from flashdrive_node.world.camera import CAMERAS
from flashdrive_node.world.render import render, token_labels
from flashdrive_node.world.wording import every_sentence
from training.conftest import noisy_pictures


def test_pictures_are_those_of_the_renderer(windows):
    one = windows.rows(torch.tensor([4]))
    pictures = Photographer(batch=1, compiled=False).shoot(one)
    assert pictures.images.shape == (1, 4, 4, 160, 288, 3)
    view = render(one.scene, one.frames[2], CAMERAS[1], 288, 160)
    assert torch.equal(pictures.images[0, 1, 2], view.image[0])
    presence, nearest = token_labels(view)
    # Camera 1, frame 2 are the 7th of 16 pictures of 45 tokens.
    tokens = slice(6 * 45, 7 * 45)
    assert torch.equal(presence_of(pictures.classes[0, tokens]), presence[0].flatten(0, 1))
    there = nearest.flatten() < 1e4
    distance = pictures.log_distance[0, tokens].float()
    assert ((distance >= 0) == there).all()
    torch.testing.assert_close(distance[there].expm1(), nearest.flatten()[there], rtol=5e-3, atol=0.05)
    with pytest.raises(ValueError, match="at most 1 windows"):
        Photographer(batch=1, compiled=False).shoot(windows)


def test_retouching_varies_pictures_a_little():
    images = noisy_pictures(2).images[:, :, :, ::8, ::8].contiguous()
    changed = retouch(images, torch.Generator().manual_seed(0))
    again = retouch(images, torch.Generator().manual_seed(0))
    assert torch.equal(changed, again)
    assert changed.dtype == torch.uint8
    difference = (changed.float() - images.float()).flatten(2).mean(dim=2).abs()
    assert 0 < difference.mean() < 15


def test_samples_hold_prompt_answer_and_targets(scribe, windows, model, tokenizer):
    some = windows.rows(torch.arange(6))
    batch = scribe.write(some, noisy_pictures(6))
    assert batch.ids.shape == (6, scribe.width)
    history = encode_history(some.history_xyz, some.history_rot, model.config)
    start, end = scribe.layout.history_span
    for row in range(6):
        prompt, whole = int(batch.prompt_lengths[row]), int(batch.lengths[row])
        text = tokenizer.decode(batch.ids[row, prompt:whole])
        assert text == some.sentences[row] + "<|cot_end|><|traj_future_start|>"
        assert torch.equal(batch.ids[row, start:end], history[row])
        route = some.navigation[row]
        assert (route in tokenizer.decode(batch.ids[row, end:prompt])) if route else True
    # Targets integrate to what the expert drives.
    path = model.action_space.to_path(batch.actions, batch.speed)
    torch.testing.assert_close(path.acceleration, some.actions[..., 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(batch.speed, some.frames[-1].speed.float(), atol=0.05, rtol=0.01)


def test_every_sentence_fits(tokenizer, scribe):
    assert max(len(scribe.answer(sentence)) for sentence in every_sentence()) <= ANSWER_TOKENS


def test_route_features_tell_instructions_apart():
    features = route_features([None, "Turn left in 40m", "Turn right", "Continue straight"])
    assert features.tolist() == [[0, 0, 0, 0], [1, 0, 0, pytest.approx(1 / 3)], [0, 1, 0, 1], [0, 0, 1, 0]]
    assert route_features([]).shape == (0, 4)


def test_new_samples_replace_the_oldest(scribe, windows):
    buffer = ReplayBuffer(5)
    batches = [scribe.write(windows.rows(torch.arange(i, i + 3)), noisy_pictures(3, i)) for i in (0, 3, 6)]
    for n, batch in enumerate(batches):
        buffer.add(batch)
        assert len(buffer) == min(5, 3 * (n + 1))
    kept = buffer.rows(torch.arange(5))
    # Rows 4 to 8 of nine; the ring has come round once.
    assert torch.equal(kept.images[4], batches[1].images[1])
    assert torch.equal(kept.images[:1], batches[1].images[2:])
    assert torch.equal(kept.ids[1:4], batches[2].ids)
    drawn = buffer.sample(64, torch.Generator().manual_seed(0))
    assert len(drawn.speed.unique()) == len(kept.speed.unique())
    with pytest.raises(ValueError, match="at most 5 samples"):
        buffer.add(scribe.write(windows.rows(torch.arange(6)), noisy_pictures(6)))


def test_supplies_cut_and_mix(scribe, windows):
    class Shots:
        batch = 25

        def shoot(self, some):
            return noisy_pictures(len(some))

    drives = DriveSupply(iter([windows, windows, windows]), Shots(), scribe)
    first, second = drives(), drives()
    assert first.nominal == second.nominal == 25
    expected = [*windows.sentences, *windows.sentences][25:50]
    lengths = second.samples.lengths - second.samples.prompt_lengths
    assert lengths.tolist() == [len(scribe.answer(sentence)) for sentence in expected]

    given = []
    mixed = MixedSupply(
        [(lambda: given.append("a") or Fresh(None, 10), 0.25), (lambda: given.append("b") or Fresh(None, 10), 0.75)]
    )
    for _ in range(40):
        mixed()
    assert given.count("a") == 10
