"""Fine-tuning to streams: samples are what the engines have in their caches, only the expert changes, overlays load."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flashdrive_node.cli.main import main
from flashdrive_node.engine.batched_policy import BatchedPolicy
from flashdrive_node.engine.plain import PlainEngine
from flashdrive_node.engine.settings import PlainSettings, StreamingSettings
from flashdrive_node.engine.stream import StreamSettings
from flashdrive_node.engine.streaming import StreamingEngine
from flashdrive_node.evaluation.bag_clips import BagClips
from flashdrive_node.model.checkpoint import CheckpointInfo
from flashdrive_node.model.checkpoint_writer import save_checkpoint
from flashdrive_node.model.errors import CheckpointError, InputError
from flashdrive_node.model.loading import LoadedModel, load_alpamayo
from flashdrive_node.model.sampling import SamplingSettings
from flashdrive_node.training.rollouts import Rollouts, RolloutSettings
from flashdrive_node.training.streaming_training import StreamingTrainer, StreamingTrainingSettings, save_expert
from support.driven_bag import RIG, write_bag

LENGTH = 6
CALM = RolloutSettings(lanes=2, reset=0.0, drop=0.0, refresh_every=(0,), refresh_views=0.0)


@pytest.fixture(scope="module")
def bags(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("bags")
    return [write_bag(folder / "one", 8.2), write_bag(folder / "two", 8.2, shade=lambda t: 200 - round(t * 7) % 150)]


@pytest.fixture
def loaded(model, tokenizer) -> LoadedModel:
    return LoadedModel(model, tokenizer, CheckpointInfo(Path(), "", "", 0, 0, 0.0))


@pytest.fixture
def policy(model, tokenizer) -> BatchedPolicy:
    return BatchedPolicy(model, tokenizer, temperature=0.0, cameras=(0, 1), max_length=LENGTH)


def test_samples_are_what_the_engines_have(loaded, policy, bags) -> None:
    common = {
        "checkpoint": "", "device": "cpu", "precision": "float32",
        "sampling": SamplingSettings(top_k=1, max_length=LENGTH), "cameras": (0, 1),
    }  # fmt: skip
    source = BagClips(bags, RIG)
    clips = [list(clip.windows) for clip in source.clips()]
    streams = [StreamingEngine(StreamingSettings(stream=StreamSettings("kv"), **common), loaded) for _ in bags]
    rollouts = Rollouts(policy, source, CALM, seed=0, fresh=True)
    space = loaded.model.action_space
    for number in range(3):
        samples = next(rollouts)
        assert samples.lengths.tolist() == [number + 1] * 2
        for row, (stream, windows) in enumerate(zip(streams, clips, strict=True)):
            plain = PlainEngine(PlainSettings(**common), loaded)
            for engine, context in ((stream, samples.context), (plain, samples.fresh)):
                prediction = engine.step(windows[number].observation)
                used = int(prediction.metrics["prompt_tokens"])
                if engine is stream:
                    # Windows from scratch get the stream's text, where the plain engine writes its own. The last
                    # token of a text that has no end is not run.
                    assert int(context.lengths[row]) == used + prediction.metrics["tokens"]
                    used = int(context.lengths[row]) - 1
                cache = engine.cache if engine is plain else engine.stream.cache
                for layer, (keys, values) in enumerate(zip(context.keys, context.values, strict=True)):
                    for ours, theirs in ((keys, cache.keys), (values, cache.values)):
                        ours = ours[row, :, :used]
                        torch.testing.assert_close(ours, theirs[layer, :, :used], rtol=1e-3, atol=1e-4)
            # The path of the actions is the driven one.
            observation, truth = windows[number].observation, windows[number].truth
            history = torch.from_numpy(observation.ego_history_xyz), torch.from_numpy(observation.ego_history_rot)
            path = space.to_path(samples.actions[row], space.initial_speed(*history))
            torch.testing.assert_close(path.xyz[:, :2], torch.from_numpy(truth.xyz[:, :2]), atol=0.2, rtol=0)


def test_streams_are_disturbed(loaded, policy, bags) -> None:
    anew = Rollouts(policy, BagClips(bags, RIG), RolloutSettings(lanes=1, reset=1.0, drop=0.0), seed=0)
    assert [next(anew).lengths.tolist() for _ in range(3)] == [[1]] * 3
    missing = Rollouts(policy, BagClips(bags[:1], RIG), RolloutSettings(1, 0.0, 0.6), seed=1, repeat=False)
    assert 0 < len(list(missing)) < 4
    with pytest.raises(InputError, match=r"of one size in all clips are required, found others: \[4, 64, 32\]"):
        anew._streams_for(torch.zeros(1, 2, 4, 64, 32, 3, dtype=torch.uint8))
    with pytest.raises(InputError, match="1 lane or more"):
        Rollouts(policy, BagClips(bags, RIG), RolloutSettings(lanes=0), seed=0)


def test_only_the_expert_learns(loaded, policy, bags, tokenizer_files, tmp_path) -> None:
    model = loaded.model
    checkpoint = save_checkpoint(
        model, model.config, tmp_path / "checkpoint", dtype=None, tokenizer_files_dir=tokenizer_files
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = StreamingTrainingSettings(5.0, steps=40, draws=2, rate=1e-2, matrix_rate=3e-2, reuse=20, validation=2)
    trainer = StreamingTrainer(model, settings)
    source = BagClips(bags, RIG)
    measured = Rollouts(policy, source, CALM, seed=0, fresh=True, repeat=False)
    log = trainer.run(Rollouts(policy, source, CALM, seed=0, fresh=True), measured)
    # The same recordings on both sides: what is learnt by heart must show.
    assert log.result["after"]["stream"] < 0.95 * log.result["before"]["stream"]
    assert log.result["after"]["from scratch"] == log.result["before"]["from scratch"]
    assert set(log.result["before"]) == {"from scratch", "stream", "stream, up to 1 windows", "stream, up to 4 windows"}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != name.startswith("expert."), name
    trainer.save(tmp_path / "out")
    overlaid = load_alpamayo(checkpoint, "cpu", torch.float32, overlay=tmp_path / "out" / "expert.safetensors").model
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(overlaid.get_parameter(name), parameter, rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="a new file is required"):
        save_expert(model, tmp_path / "out" / "expert.safetensors")
    empty = BagClips([write_bag(tmp_path / "hole", 8.2, no_odometry=(5.0, 5.5))], RIG)
    with pytest.raises(InputError, match="no window with truth"):
        trainer.run(iter(()), Rollouts(policy, empty, CALM, seed=0, repeat=False))


def test_some_tensors_learn_and_are_written(policy, bags, tmp_path) -> None:
    """Queries alone, which share a matrix with keys and values."""
    model = policy.model
    # The read-out of a new model is zero, and passes no gradient.
    model.expert.action_out_proj.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = StreamingTrainingSettings(5.0, steps=3, draws=1, rate=1e-2, tensors=("*.q_proj.weight",), validation=1)
    trainer = StreamingTrainer(model, settings)
    source = BagClips(bags, RIG)
    trainer.run(Rollouts(policy, source, CALM, seed=0), Rollouts(policy, source, CALM, seed=0, repeat=False))
    queries = model.config.expert.q_size
    for name, parameter in model.named_parameters():
        if name.startswith("expert.") and name.endswith("qkv.weight"):
            assert not torch.equal(parameter[:queries], before[name][:queries])
            assert torch.equal(parameter[queries:], before[name][queries:])
        else:
            assert torch.equal(parameter, before[name]), name
    trainer.save(tmp_path / "out")
    written = load_file(tmp_path / "out" / "expert.safetensors")
    assert {name.split(".")[-2] for name in written} == {"q_proj"}
    assert len(written) == model.config.expert.num_layers
    with pytest.raises(InputError, match="a pattern of tensors such as"):
        StreamingTrainer(model, replace(settings, tensors=("*.lm_head.*",)))


def test_streams_enter_clips_at_different_windows(policy, bags) -> None:
    staggered = replace(CALM, staggered=True)
    whole = list(Rollouts(policy, BagClips(bags, RIG), CALM, seed=0, repeat=False))
    parts = list(Rollouts(policy, BagClips(bags, RIG), staggered, seed=0, repeat=False))
    assert [samples.lengths.tolist() for samples in whole] == [[k, k] for k in range(1, len(whole) + 1)]
    count = len(whole)
    assert sorted(len(samples.lengths) for samples in parts) == [1] * (count // 2) + [2] * (count - count // 2)


def test_the_command(model, tokenizer_files, bags, tmp_path, capsys) -> None:
    checkpoint = save_checkpoint(model, model.config, tmp_path / "checkpoint", tokenizer_files_dir=tokenizer_files)
    rig = tmp_path / "rig.yaml"
    cameras = [
        {"name": c.name, "index": c.index, "topic": c.topic, "transport": "raw", "rate_hz": 10.0} for c in RIG.cameras
    ]
    rig.write_text(json.dumps({"name": "r", "odometry_topic": "/odometry", "cameras": cameras}))
    command = ["train", "streaming", str(checkpoint), str(tmp_path / "out"), "--bag", str(bags[0]), "--rig", str(rig)]
    sizes = ["--lanes", "1", "--steps", "2", "--held-out", "1", "--max-length", "4", "--device", "cpu"]
    assert main([*command, "--validation-bag", str(bags[1]), *sizes]) == 0
    content = json.loads((tmp_path / "out" / "training.json").read_text())
    assert content["result"]["steps"] == 2
    assert (tmp_path / "out" / "expert.safetensors").is_file()
    assert main([*command[:3], str(tmp_path / "more"), *command[4:], *sizes]) == 2
    assert "--bag and --validation-bag are required together" in capsys.readouterr().err
