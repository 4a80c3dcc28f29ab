"""Drafters: what they learn from against the engine's own, the loss by hand, the replay against decoding, files."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flashdrive_node.cli.main import main
from flashdrive_node.cli.text_options import ChosenClips
from flashdrive_node.engine.batched_policy import BatchedPolicy
from flashdrive_node.engine.drafter import VOCABULARY_FILE, Drafter, load_drafter, read_draft_vocabulary
from flashdrive_node.engine.drafter_config import PARTS, ROTARIES
from flashdrive_node.engine.prompt_slots import prompt_room
from flashdrive_node.engine.protocol import CameraFrames, Observation
from flashdrive_node.engine.settings import StreamingSettings
from flashdrive_node.engine.speculative import forbidden_bias
from flashdrive_node.engine.stream import StreamSettings
from flashdrive_node.engine.streaming import StreamingEngine
from flashdrive_node.evaluation.bag_clips import BagClips
from flashdrive_node.model.checkpoint import CheckpointInfo
from flashdrive_node.model.checkpoint_writer import save_checkpoint
from flashdrive_node.model.errors import CheckpointError, InputError
from flashdrive_node.model.loading import LoadedModel
from flashdrive_node.model.sampling import SamplingSettings
from flashdrive_node.training.acceptance import NGrams, gained, replay, replay_texts
from flashdrive_node.training.architecture import alpamayo_small
from flashdrive_node.training.draft_replay import DraftingTarget, acceptance_of, guesser
from flashdrive_node.training.drafter_files import drafter_config, new_drafter, save_drafter
from flashdrive_node.training.drafter_loss import BlockLoss, anchors, block_loss, cut
from flashdrive_node.training.drafter_training import DrafterSettings, DrafterTrainer
from flashdrive_node.training.prompt_views import views_of
from flashdrive_node.training.text_records import (
    Scenes,
    TextRecorder,
    TextRecords,
    clip_scenes,
    join_records,
)
from flashdrive_node.training.vocabulary import build_tokenizer
from support.driven_bag import RIG, write_bag

LENGTH, BLOCK, CONTEXT = 12, 5, 3
CAMERAS = (0, 1)


@pytest.fixture
def talker(model):
    """The tiny model with a louder output head: its texts differ from window to window."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        head = model.language.lm_head.weight
        head.copy_(torch.randn(head.shape, generator=generator))
    return model


@pytest.fixture
def policy(talker, tokenizer) -> BatchedPolicy:
    return BatchedPolicy(talker, tokenizer, temperature=0.0, cameras=CAMERAS, max_length=LENGTH)


@pytest.fixture
def drafter(talker) -> Drafter:
    return new_drafter(drafter_config(talker.config, block_size=BLOCK, context_length=CONTEXT), talker, 1)


@pytest.fixture
def observations() -> list[Observation]:
    rng = np.random.default_rng(0)
    found = []
    for number in range(3):
        cameras = tuple(
            CameraFrames(
                c, tuple(range(4)), tuple(rng.integers(0, 256, (160, 288, 3), dtype=np.uint8) for _ in range(4))
            )
            for c in CAMERAS
        )
        xyz = np.zeros((16, 3), np.float32)
        xyz[:, 0] = np.arange(-15, 1) * 0.1 * (3 + 4 * number)
        rot = np.tile(np.eye(3, dtype=np.float32), (16, 1, 1))
        found.append(Observation(number, 0, cameras, xyz, rot, "Turn left in 30m" if number == 1 else None))
    return found


def scenes_of(observations: list[Observation]) -> Scenes:
    return Scenes(
        torch.from_numpy(np.stack([np.stack([np.stack(c.images) for c in o.cameras]) for o in observations])),
        torch.from_numpy(np.stack([o.ego_history_xyz for o in observations])),
        torch.from_numpy(np.stack([o.ego_history_rot for o in observations])),
        [o.nav_text for o in observations],
    )


@pytest.mark.parametrize("rotary", [None, *ROTARIES])
def test_records_and_replay_are_those_of_the_engine(talker, tokenizer, policy, observations, rotary) -> None:
    looks = {} if rotary is None else {"rotary": rotary, "parts": PARTS}
    drafter = new_drafter(drafter_config(talker.config, 1, None, BLOCK, CONTEXT, **looks), talker, 1)
    room = prompt_room(tokenizer, talker.config)
    recorder = TextRecorder(policy, drafter.config.target_layer_ids, room if rotary else CONTEXT, (2, 3))
    records = recorder.record(scenes_of(observations))
    assert records.states.shape == (3, recorder.lead - 1 + LENGTH, drafter.config.context_size)
    assert records.clips.tolist() == [0, 1, 2]
    settings = StreamingSettings(
        checkpoint="", device="cpu", precision="float32", sampling=SamplingSettings(top_k=1, max_length=LENGTH),
        cameras=CAMERAS, stream=StreamSettings("full"),
    )  # fmt: skip
    loaded = LoadedModel(talker, tokenizer, CheckpointInfo(Path(), "", "", 0, 0, 0.0))
    target = DraftingTarget.of(recorder)
    for row, observation in enumerate(observations):
        engine = StreamingEngine(settings, loaded, drafter)
        prediction = engine.step(observation)
        assert engine.stream is not None
        one = records.rows(torch.tensor([row]))
        views = views_of(one, recorder.prompt, drafter.config, room)
        states, expected = records.states[row, : recorder.lead], engine.stream.states
        if views is None:
            torch.testing.assert_close(states[-CONTEXT:], expected, rtol=1e-3, atol=1e-4)
        else:
            view = views.view(torch.tensor([0]))
            seen = view.kinds[0] >= 0
            torch.testing.assert_close(states[seen[-room:]], expected[seen[-room:]], rtol=1e-3, atol=1e-4)
            mine, theirs = drafter.read(view), engine.reader.memory
            torch.testing.assert_close(mine.keys[:, :, seen], theirs.keys[:, :, seen], rtol=1e-3, atol=1e-3)
            assert torch.equal(mine.bias, theirs.bias)
            assert torch.equal(mine.base, theirs.base)
        assert float(one.lengths) == prediction.metrics["tokens"]
        found = replay_texts(one, guesser(drafter, target, one, views), BLOCK)
        assert found.acceptance.accept_length.mean == pytest.approx(prediction.metrics["accept_length"])
        assert int(found.routine) == sum(token.routine for token in prediction.trajectory.tokens)
        assert found.acceptance.routine_share.mean == pytest.approx(1 - prediction.metrics["deliberative_share"])
    # The state that a token is drawn from gives that token.
    drawn = talker.language.logits(records.hidden) + forbidden_bias(talker, policy.rule)
    assert torch.equal(drawn.argmax(dim=-1)[records.tokens >= 0], records.tokens[records.tokens >= 0])
    # A drafter that knows the text has every guess right.
    perfect = replay(records, lambda rows, at: known(records, rows, at), BLOCK)
    rounds = [math.ceil((n - 1) / BLOCK) for n in records.lengths.tolist()]
    assert perfect.accept_length.mean == pytest.approx(sum(records.lengths.tolist()) / sum(rounds) - 3 / sum(rounds))
    assert perfect.first_at_start == 1.0


def known(records: TextRecords, rows: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    behind = at[:, None] + torch.arange(1, BLOCK)
    return records.tokens[rows[:, None], behind.clamp(max=records.tokens.shape[1] - 1)]


def toy_records(texts: list[list[int]], config, seed: int = 0) -> TextRecords:
    """Texts with states that are the same wherever the text is the same up to there."""
    longest = max(map(len, texts))
    generator = torch.Generator().manual_seed(seed)
    noise: dict[tuple[int, ...], torch.Tensor] = {}

    def state(prefix: list[int], size: int) -> torch.Tensor:
        return noise.setdefault((size, *prefix), torch.randn(size, generator=generator))

    lead = config.context_length - 1
    states = torch.zeros(len(texts), lead + longest, config.context_size)
    hidden = torch.zeros(len(texts), longest, config.decoder.hidden_size)
    for row, text in enumerate(texts):
        for j in range(len(text)):
            states[row, lead + j] = state(text[: j + 1], config.context_size)
            hidden[row, j] = state(text[:j], config.decoder.hidden_size)
    tokens = torch.tensor([t + [-1] * (longest - len(t)) for t in texts])
    number = torch.arange(len(texts))
    return TextRecords(tokens, states, hidden, torch.zeros(len(texts), 0, 1), number * 0, number, number * 0)


def test_blocks_start_at_every_place_and_end_with_the_text(drafter) -> None:
    records = toy_records([[5, 6, 7, 8, 9, 10], [5, 11]], drafter.config)
    places = anchors(records)
    assert places.tolist() == [[0, 0], [0, 1], [0, 2], [0, 3], [0, 4], [1, 0]]
    blocks = cut(records, places, BLOCK, CONTEXT)
    assert blocks.known.tolist() == [5, 6, 7, 8, 9, 5]
    assert blocks.labels.tolist() == [
        [6, 7, 8, 9], [7, 8, 9, 10], [8, 9, 10, -1], [9, 10, -1, -1], [10, -1, -1, -1], [11, -1, -1, -1],
    ]  # fmt: skip
    assert torch.equal(blocks.context[2], records.states[0, 2:5])
    assert torch.equal(blocks.hidden[1], records.hidden[0, 2:6])


@pytest.mark.parametrize("soft", [0.0, 0.4])
def test_loss_by_hand(talker, policy, drafter, soft) -> None:
    records = toy_records([[5, 6, 7, 8, 9, 10], [5, 11]], drafter.config)
    blocks = cut(records, anchors(records), BLOCK, CONTEXT)
    forbidden = forbidden_bias(talker, policy.rule)
    loss, right = block_loss(drafter, talker.language, blocks, forbidden, BlockLoss(gamma=2.0, soft=soft))
    total = weights = 0.0
    hits, counts = [0] * (BLOCK - 1), [0] * (BLOCK - 1)
    with torch.no_grad():
        guessed = drafter(talker.language.embed_tokens.weight[blocks.known], blocks.context)
        for m in range(len(blocks.known)):
            for k in range(BLOCK - 1):
                label = int(blocks.labels[m, k])
                if label < 0:
                    continue
                logits = (talker.language.logits(guessed[m, k]) + forbidden).double()
                target = (talker.language.logits(blocks.hidden[m, k]) + forbidden).double().softmax(0)
                log = logits.log_softmax(0)
                apart = sum(float(p * (p.log() - q)) for p, q in zip(target, log, strict=True) if p > 0)
                weight = math.exp(-k / 2.0)
                total += weight * ((1 - soft) * -float(log[label]) + soft * apart)
                weights += weight
                hits[k] += int(logits.argmax()) == label
                counts[k] += 1
    assert float(loss.detach()) == pytest.approx(total / weights, rel=1e-4)
    assert right.tolist() == pytest.approx([h / c for h, c in zip(hits, counts, strict=True)])


def test_learning_what_the_texts_are(policy, talker, drafter, tmp_path) -> None:
    rng = np.random.default_rng(0)
    texts = [[*rng.integers(20, 250, 11).tolist(), policy.rule.stop] for _ in range(6)]
    records = toy_records(texts, drafter.config)
    recorder = TextRecorder(policy, drafter.config.target_layer_ids, CONTEXT)
    settings = DrafterSettings(
        minutes=5.0, steps=200, texts=6, held_out=6, batch=48, matrix_rate=2e-2, loss=BlockLoss(soft=0.0)
    )
    trainer = DrafterTrainer(recorder, drafter, settings)
    before = acceptance_of(drafter, recorder, records).accept_length.mean
    log = trainer.run([records], [records])
    after = log.result["acceptance"]["drafter"]["accept_length"][0]
    assert before < 1.3
    assert after > 1.8
    # Its embeddings are the target's, which is left as it was.
    assert not any(p.requires_grad or p.grad is not None for p in talker.language.parameters())
    assert log.training[-1]["loss"] < 0.6 * log.training[0]["loss"]
    trainer.save(tmp_path / "out", own_vocabulary=True)
    said = read_draft_vocabulary(tmp_path / "out" / "drafter")
    assert said is not None
    assert said.tolist() == sorted({token for text in texts for token in text})
    assert log.result["vocabulary"] == len(said)
    assert log.result["vocabulary_covers"] == 1
    again = load_drafter(tmp_path / "out" / "drafter", talker.config, "cpu", torch.float32)
    assert acceptance_of(trainer.drafter, recorder, records).accept_length.mean == after
    assert acceptance_of(again, recorder, records).accept_length.mean > 1.7  # in bfloat16
    assert (tmp_path / "out" / "training.png").stat().st_size > 1000


def test_a_routine_drafter_learns(policy, talker, tokenizer, observations) -> None:
    shape = drafter_config(talker.config, 1, None, BLOCK, CONTEXT, rotary="flat", parts=PARTS)
    drafter = new_drafter(shape, talker, 1)
    recorder = TextRecorder(policy, shape.target_layer_ids, prompt_room(tokenizer, talker.config), shape.image_cells)
    records = recorder.record(scenes_of(observations))
    before = acceptance_of(drafter, recorder, records).accept_length.mean
    settings = DrafterSettings(
        minutes=5.0, steps=120, texts=3, held_out=3, batch=24, matrix_rate=2e-2, loss=BlockLoss(soft=0.0)
    )
    log = DrafterTrainer(recorder, drafter, settings).run([records], [records])
    assert log.result["acceptance"]["drafter"]["accept_length"][0] > before + 0.5
    assert log.training[-1]["loss"] < 0.5 * log.training[0]["loss"]


def test_learning_repeats_itself(policy, talker) -> None:
    weights = []
    for _ in range(2):
        drafter = new_drafter(drafter_config(talker.config, block_size=BLOCK, context_length=CONTEXT), talker, 1)
        records = toy_records([[20, 21, 22, 23, 24, 25]], drafter.config)
        recorder = TextRecorder(policy, drafter.config.target_layer_ids, CONTEXT)
        settings = DrafterSettings(minutes=5.0, steps=3, texts=1, held_out=1, batch=8)
        DrafterTrainer(recorder, drafter, settings).run([records], [records])
        weights.append(torch.cat([p.flatten() for p in drafter.parameters()]))
    assert torch.equal(*weights)


def test_ngrams_by_hand() -> None:
    grams = NGrams([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 5], [9, 3, 4]], order=3)
    assert grams.guess([1, 2], 2) == [3, 5]
    assert grams.guess([9, 3], 1) == [4]
    assert grams.guess([7], 1) == [3]  # nothing known of 7: the commonest token of all


def test_replay_by_hand() -> None:
    config = drafter_config(alpamayo_of_nothing(), block_size=4, context_length=1)
    records = toy_records([[1, 2, 3, 4, 5, 6], [1, 7]], config)
    # Guesses what comes in counting: right up to 6 in the first text, never in the second.
    found = replay(records, lambda rows, at: records.tokens[rows, at][:, None] + torch.arange(1, 4), 4)
    assert found.accept_length.mean == pytest.approx((4 + 1 + 1) / 3)
    assert found.by_place == pytest.approx([2 / 3, 1.0, 1.0])
    assert (found.first_at_start, found.first_later) == (0.5, 1.0)
    assert found.histogram == [1, 1, 0, 1]


def test_gain_by_hand() -> None:
    """Of two clips: 2.5 tokens per pass in place of 1, and 1 in place of 1."""
    config = drafter_config(alpamayo_of_nothing(), block_size=4, context_length=1)
    records = toy_records([[1, 2, 3, 4, 5, 6], [1, 7]], config)
    never = replay_texts(records, lambda rows, at: torch.zeros(len(rows), 3, dtype=torch.int64), 4)
    counting = replay_texts(records, lambda rows, at: records.tokens[rows, at][:, None] + torch.arange(1, 4), 4)
    assert gained(never, counting, records).mean == pytest.approx(0.75)
    assert gained(counting, never, records).mean == pytest.approx(-0.75)
    assert gained(counting, counting, records)[:3] == (0, 0, 0)


def alpamayo_of_nothing():
    from support.small_models import small_config

    return small_config()


def test_files_are_small_and_load(tokenizer_files, tmp_path) -> None:
    config = alpamayo_small(build_tokenizer(tokenizer_files))
    shape = drafter_config(config)
    drafter = Drafter(shape)
    with torch.no_grad():
        for tensor in (*drafter.parameters(), drafter.mask_embedding):
            tensor.normal_(0, 0.02)
    written = save_drafter(drafter, tmp_path / "drafter")
    assert written < 2 * 2**20
    loaded = load_drafter(tmp_path / "drafter", config, "cpu", torch.bfloat16)
    assert loaded.config == shape
    for name, parameter in drafter.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.bfloat16())
    assert torch.equal(loaded.mask_embedding, drafter.mask_embedding.bfloat16())
    with pytest.raises(CheckpointError, match="a new or empty directory"):
        save_drafter(drafter, tmp_path / "drafter")


@pytest.mark.parametrize(
    "change", [{"layers": 0}, {"block_size": 1}, {"context_length": 0}, {"target_layer_ids": (9,)}]
)
def test_shapes_that_make_no_drafter(change) -> None:
    with pytest.raises(InputError, match="are required, found"):
        drafter_config(alpamayo_of_nothing(), **change)


def test_recordings_as_scenes(tmp_path) -> None:
    source = BagClips([write_bag(tmp_path / "drive", 9.0)], RIG, 6)
    second = ChosenClips(source, lambda number: number == 1)
    batches = list(clip_scenes(second, 4, torch.device("cpu")))
    assert [len(b.navigation) for b in batches] == [4, 2]
    assert batches[0].images.shape == (4, 2, 4, 36, 64, 3)
    assert batches[0].images.dtype == torch.uint8
    with pytest.raises(InputError, match="texts to learn from"):
        join_records([])


def test_the_command(talker, tokenizer_files, tmp_path, capsys) -> None:
    checkpoint = save_checkpoint(talker, talker.config, tmp_path / "checkpoint", tokenizer_files_dir=tokenizer_files)
    bags = [str(write_bag(tmp_path / f"drive{i}", 8.0)) for i in range(3)]
    rig = tmp_path / "rig.yaml"
    cameras = [
        {"name": c.name, "index": c.index, "topic": c.topic, "transport": "raw", "rate_hz": 10.0} for c in RIG.cameras
    ]
    rig.write_text(json.dumps({"name": "r", "odometry_topic": "/odometry", "cameras": cameras}))
    out = tmp_path / "out"
    arguments = [str(checkpoint), str(out), "--bag", *bags, "--rig", str(rig), "--device", "cpu", "--steps", "2"]
    sizes = ["--max-length", "8", "--batch", "32", "--context", "2", "--block", "4", "--intermediate-size", "16"]
    assert main(["train", "drafter", *arguments, *sizes]) == 0
    content = json.loads((out / "training.json").read_text())
    assert content["result"]["texts"] == 2
    assert content["result"]["acceptance"]["n-grams"]["accept_length"][0] >= 1
    trained = load_drafter(out / "drafter", talker.config, "cpu", torch.float32)
    assert (trained.config.block_size, trained.config.context_length) == (4, 2)
    assert main(["train", "drafter", *arguments, *sizes]) == 2
    assert "a new or empty directory is required" in capsys.readouterr().err
    arguments[1] = str(tmp_path / "routine")
    streams = ["--stream-mode", "kv", "--lanes", "1", "--texts", "3", "--variant", "routine", "--rotary", "mrope"]
    assert main(["train", "drafter", *arguments, *sizes, *streams, "--own-vocabulary"]) == 0
    assert (tmp_path / "routine" / "drafter" / VOCABULARY_FILE).is_file()
    assert not (out / "drafter" / VOCABULARY_FILE).exists()
    routine = load_drafter(tmp_path / "routine" / "drafter", talker.config, "cpu", torch.float32)
    assert (routine.config.variant, routine.config.rotary, routine.config.parts) == ("routine", "mrope", PARTS)
    arguments[1] = str(tmp_path / "more")
    assert main(["train", "drafter", *arguments, *sizes, "--rotary", "flat"]) == 2
    assert "--rotary needs --variant routine" in capsys.readouterr().err
    assert main(["train", "drafter", *arguments, *sizes, "--resume", str(out / "drafter")]) == 0
    assert (
        replace(trained.config)
        == load_drafter(tmp_path / "more" / "drafter", talker.config, "cpu", torch.float32).config
    )
