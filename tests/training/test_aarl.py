"""Reinforcement learning of drafters: the objective by hand, what an action is worth, and learning by both."""

import json
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from flashdrive_node.cli.main import main
from flashdrive_node.engine.batched_policy import BatchedPolicy
from flashdrive_node.engine.drafter import Drafter, load_drafter
from flashdrive_node.engine.drafter_config import PARTS
from flashdrive_node.engine.prompt_slots import prompt_room
from flashdrive_node.evaluation.bag_clips import BagClips
from flashdrive_node.model import batched
from flashdrive_node.model.checkpoint_writer import save_checkpoint
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.flow_matching import integrate
from flashdrive_node.training.aarl import AarlSettings, AarlTrainer, hold
from flashdrive_node.training.aarl_reward import AarlRule, DraftJudge, distance, expected_accepted
from flashdrive_node.training.acceptance import reached
from flashdrive_node.training.action_value import ActionValue
from flashdrive_node.training.draft_replay import DraftingTarget, guesser
from flashdrive_node.training.drafter_files import drafter_config, new_drafter, save_drafter
from flashdrive_node.training.drafter_loss import anchors, cut, guessed_logits
from flashdrive_node.training.prompt_views import views_of
from flashdrive_node.training.rollouts import Rollouts, RolloutSettings, Samples
from flashdrive_node.training.text_records import TextRecorder
from support.driven_bag import RIG, write_bag

LENGTH, BLOCK = 8, 4
CALM = RolloutSettings(lanes=2, reset=0.0, drop=0.0, refresh_every=(0,), refresh_views=0.0)


@pytest.fixture(scope="module")
def bags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bags")
    return [write_bag(folder / f"{i}", 8.2, shade=lambda t, i=i: round(t * (7 + i)) % 200) for i in range(3)]


@pytest.fixture
def policy(model, tokenizer) -> BatchedPolicy:
    with torch.no_grad():
        head = model.language.lm_head.weight
        generator = torch.Generator().manual_seed(5)
        head.copy_(0.2 * torch.randn(head.shape, generator=generator))
        velocity = model.expert.action_out_proj.weight  # zero in a new model, which makes all texts alike
        velocity.copy_(torch.randn(velocity.shape, generator=generator))
    return BatchedPolicy(model, tokenizer, temperature=0.0, cameras=(0, 1), max_length=LENGTH)


@pytest.fixture
def drafter(model) -> Drafter:
    return new_drafter(drafter_config(model.config, 1, 16, BLOCK, 2, None, "flat", PARTS), model, 1)


@pytest.fixture
def recorder(policy, drafter, tokenizer, model) -> TextRecorder:
    shape = drafter.config
    return TextRecorder(policy, shape.target_layer_ids, prompt_room(tokenizer, model.config), shape.image_cells)


@pytest.fixture
def samples(policy, recorder, bags) -> Samples:
    return next(Rollouts(policy, BagClips(bags[:2], RIG), CALM, seed=0, recorder=recorder))


def test_expected_accepted_guesses_are_a_sum_over_all_drafts(recorder) -> None:
    target = DraftingTarget.of(recorder)
    vocabulary = len(target.forbidden)
    logs = torch.full((2, 3, vocabulary), -torch.inf)
    words = [3, 5, target.closing]
    chances = torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(0))
    logs[:, :, words] = (chances / chances.sum(dim=2, keepdim=True)).log()
    labels = torch.tensor([[5, 3, 5], [target.closing, target.stop, -1]])
    found = expected_accepted(logs, labels, torch.tensor([7, 7]), target)
    probabilities = logs[0].exp()
    by_hand = 0.0
    for draft in product(words, repeat=3):
        right = [guess == label for guess, label in zip(draft, labels[0].tolist(), strict=True)]
        accepted = right.index(False) if False in right else 3
        by_hand += accepted * float(torch.stack([probabilities[k, token] for k, token in enumerate(draft)]).prod())
    assert float(found[0]) == pytest.approx(by_hand, rel=1e-5)
    # Behind the closing token the stop token is guessed whatever the drafter thinks; nothing counts behind it.
    assert float(found[1]) == pytest.approx(2 * float(logs[1, 0, target.closing].exp()), rel=1e-5)


def test_distance_is_the_divergence_of_guesses_that_count() -> None:
    logits = torch.randn(2, 2, 2, 6, generator=torch.Generator().manual_seed(0))
    logits[..., 4] = -torch.inf
    logs, reference = (part.clone() for part in logits.log_softmax(dim=-1))
    logs.requires_grad_()
    counts = torch.tensor([[True, False], [True, True]])
    found = distance(logs, reference, counts)
    allowed = [0, 1, 2, 3, 5]
    each = [
        float((logs[i, k, allowed].exp() * (logs[i, k, allowed] - reference[i, k, allowed])).sum().detach())
        for i, k in counts.nonzero().tolist()
    ]
    assert float(found.detach()) == pytest.approx(sum(each) / 3, rel=1e-5)
    assert float(distance(logs, logs, counts).detach()) == 0.0
    (gradient,) = torch.autograd.grad(found, logs)
    assert bool(gradient.isfinite().all())


def test_blocks_to_learn_from_are_those_that_decoding_reaches_and_some_more(recorder, drafter, samples) -> None:
    target, records = DraftingTarget.of(recorder), samples.records
    views = views_of(records, recorder.prompt, drafter.config, target.room)
    guess = guesser(drafter, target, records, views)
    by_hand = []
    for row, length in enumerate(records.lengths.tolist()):
        place = 0
        while place < length - 1:
            by_hand.append([row, place])
            guesses = guess(torch.tensor([row]), torch.tensor([place]))[0].tolist()
            text = records.tokens[row, place + 1 : length].tolist()
            right = [guess == token for guess, token in zip(guesses, text, strict=False)]
            place += 1 + (right.index(False) if False in right else len(right))
    assert sorted(reached(records, guess, BLOCK).tolist()) == by_hand
    rule = AarlRule(places=2)
    judge = DraftJudge(drafter, drafter, recorder, ActionValue(recorder.policy), rule, torch.Generator())
    chosen = judge._places(records, views).tolist()
    assert sorted(chosen[: len(by_hand)]) == by_hand
    others = chosen[len(by_hand) :]
    assert len(others) == 2 * len(records)
    assert all(place in anchors(records).tolist() for place in others)


def test_a_text_is_worth_what_the_expert_makes_of_it(policy, samples, tokenizer) -> None:
    """The text that stands in the context already gives the path that the context gives."""
    value, model = ActionValue(policy, flow_steps=3), policy.model
    records = samples.records
    closing = tokenizer.id("cot_end")
    texts = [row[:n] for row, n in zip(records.tokens.tolist(), records.lengths.tolist(), strict=True)]
    noise = torch.randn(samples.actions.shape, generator=torch.Generator().manual_seed(0))
    ended = [value.closed(text) for text in texts]
    assert all(text[-2:] == [closing, policy.rule.stop] for text in ended)
    assert value.closed([4, closing, policy.rule.stop, 9]) == [4, closing, policy.rule.stop]
    found = value.errors(samples, torch.tensor([1, 0, 1]), [ended[1], ended[0], [5, 6]], noise)
    # By hand: prompt and ended text anew in one pass.
    for row, index in ((1, 0), (0, 1)):
        context = samples.context
        prompt = int(context.lengths[row]) - len(texts[row])
        keys = [torch.cat((k[[row], :, :prompt], torch.zeros_like(k[[row], :, :12])), dim=2) for k in context.keys]
        values = [torch.cat((v[[row], :, :prompt], torch.zeros_like(v[[row], :, :12])), dim=2) for v in context.values]
        whole = replace(context, keys=keys, values=values, lengths=torch.tensor([prompt]), missing=0)
        for token in ended[row]:
            batched.run_behind(model, whole, torch.tensor([[token]]), whole.lengths)
            whole.lengths = whole.lengths + 1
        with torch.no_grad():
            action = integrate(batched.velocity_field(model, whole, 1), noise[[row]][:, None], 3)
            speed, height = samples.speeds[[row]][:, None], torch.zeros(1, 1)
            path, driven = (
                model.action_space.to_path(a, speed, height).xyz[0, 0, :, :2]
                for a in (action, samples.actions[[row]][:, None])
            )
        assert float(found[index]) == pytest.approx(float((path - driven).norm(dim=-1).mean()), rel=1e-3)
    assert abs(float(found[2] - found[0])) > 1e-6
    # What stands in the window's own context is left as it was.
    again = value.errors(samples, torch.tensor([1]), [ended[1]], noise)
    assert float(again) == pytest.approx(float(found[0]), rel=1e-5)


class Liking(ActionValue):
    """Paths are half a metre off, and as near as can be with drafts that begin with an even token."""

    def errors(self, samples: Samples, rows: Tensor, texts, noise: Tensor) -> Tensor:
        place = {int(row): 0 for row in rows}
        assert place
        return torch.tensor([0.5 * (text[1] % 2) for text in texts])


def even_share(drafter: Drafter, recorder: TextRecorder, samples: Samples) -> float:
    """Probability that a guess behind the first token is liked."""
    target, records = DraftingTarget.of(recorder), samples.records
    places = anchors(records)
    places = places[places[:, 1] == 0]
    views = views_of(records, recorder.prompt, drafter.config, target.room)
    blocks = cut(records, places, BLOCK, 2, views)
    with torch.no_grad():
        chances = guessed_logits(drafter, target.language, blocks, target.forbidden).softmax(dim=-1)
    return float(chances[:, 0, ::2].sum(dim=-1).mean())


def trained(drafter: Drafter, recorder: TextRecorder, samples: Samples, rule: AarlRule, steps: int) -> AarlTrainer:
    settings = AarlSettings(5.0, steps, every=10, patience=99, kl_limit=99.0, rate=1e-2, warm_up=10, seed=3, rule=rule)
    trainer = AarlTrainer(recorder, drafter, settings)
    trainer.judge.value = Liking(recorder.policy)
    held = hold(iter([samples]), 2, 1, "held out")
    trainer._learn(iter(lambda: samples, None), held)
    return trainer


def test_learning_follows_the_action_and_the_anchor_holds_it_back(policy, recorder, drafter, samples) -> None:
    # One place per window, the first: what is liked is told of it alone.
    shortened = replace(samples.records, tokens=samples.records.tokens[:, :2], states=samples.records.states[:, :-6])
    shortened = replace(shortened, hidden=shortened.hidden[:, :2])
    short = samples._replace(records=shortened)
    found = {}
    for weight in (0.0, 20.0):
        again = new_drafter(drafter.config, policy.model, 1)
        rule = AarlRule(action_weight=5.0, kl_weight=weight, drafts=8, places=1)
        trainer = trained(again, recorder, short, rule, 100)
        found[weight] = trainer.log.training[-1]
    assert 0.2 < even_share(drafter, recorder, short) < 0.8
    assert found[0.0]["reward of the action"] > found[20.0]["reward of the action"] + 0.2
    assert found[0.0]["KL, nats per guess"] > 5 * found[20.0]["KL, nats per guess"]


def test_accepted_guesses_grow_and_the_best_is_kept(policy, recorder, drafter, samples) -> None:
    trainer = trained(drafter, recorder, samples, AarlRule(action_weight=0.0, kl_weight=0.0), 100)
    rows = trainer.log.training
    assert rows[-1]["expected accepted guesses"] > rows[0]["expected accepted guesses"] + 0.3
    looks = [row["accept length"] for row in trainer.log.validation]
    held = hold(iter([samples]), 2, 1, "held out")
    assert trainer._accepted(held) == pytest.approx(max(looks))
    # Another run of the same seed is the same run.
    again = trained(new_drafter(drafter.config, policy.model, 1), recorder, samples, AarlRule(0.0, 0.0), 100)
    for one, other in zip(trainer.drafter.parameters(), again.drafter.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_run_ends_where_it_strays(recorder, drafter, samples) -> None:
    settings = AarlSettings(5.0, 500, every=2, patience=99, kl_limit=1e-3, rate=2e-2)
    trainer = AarlTrainer(recorder, drafter, settings)
    held = hold(iter([samples]), 2, 1, "held out")
    log = trainer.run(iter(lambda: samples, None), held, held)
    assert log.result["ended"] == "distance to the reference"
    assert log.result["steps"] < 500
    with pytest.raises(InputError, match="windows to learn from are required"):
        AarlTrainer(recorder, drafter, settings).run(iter(()), held, held)
    with pytest.raises(ValueError, match="samples with records are required"):
        DraftJudge(drafter, drafter, recorder, ActionValue(recorder.policy), AarlRule(), torch.Generator()).judge(
            samples._replace(records=None)
        )


def test_the_command(policy, drafter, model, tokenizer_files, bags, tmp_path, capsys) -> None:
    checkpoint = save_checkpoint(model, model.config, tmp_path / "checkpoint", tokenizer_files_dir=tokenizer_files)
    save_drafter(drafter, tmp_path / "drafter")
    rig = tmp_path / "rig.yaml"
    cameras = [
        {"name": c.name, "index": c.index, "topic": c.topic, "transport": "raw", "rate_hz": 10.0} for c in RIG.cameras
    ]
    rig.write_text(json.dumps({"name": "r", "odometry_topic": "/odometry", "cameras": cameras}))
    out = tmp_path / "out"
    arguments = ["train", "aarl", str(checkpoint), str(tmp_path / "drafter"), str(out), "--bag", *map(str, bags)]
    arguments += ["--rig", str(rig), "--device", "cpu", "--steps", "2", "--every", "1", "--lanes", "1", "--drafts", "2"]
    arguments += ["--max-length", str(LENGTH), "--held-out", "2"]
    assert main(arguments) == 0
    result = json.loads((out / "training.json").read_text())["result"]
    assert set(result["before"]) == {"validation", "test"}
    assert result["after"]["test"]["acceptance"]["accept_length"][0] >= 1
    assert (out / "training.png").stat().st_size > 1000
    assert load_drafter(out / "drafter", model.config, "cpu", torch.float32).config == drafter.config
    arguments[4] = str(tmp_path / "other")
    assert main([*arguments, "--drafts", "1"]) == 2
    assert "--drafts 2 or more" in capsys.readouterr().err
