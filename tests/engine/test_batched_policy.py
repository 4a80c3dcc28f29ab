"""Many windows at once give what the plain engine gives window by window."""

from dataclasses import replace

import pytest
import torch

from flashdrive_node.engine import plain
from flashdrive_node.engine.batched_policy import BatchedPolicy
from flashdrive_node.engine.plain import PlainEngine
from flashdrive_node.engine.protocol import CameraFrames, Observation
from flashdrive_node.engine.settings import PlainSettings
from flashdrive_node.model import batched, inference
from flashdrive_node.model.action_space import yaw_matrix
from flashdrive_node.model.errors import InputError, ModelError, PromptError
from flashdrive_node.model.history_tokens import encode_history
from flashdrive_node.model.loading import LoadedModel
from flashdrive_node.model.prompt import driving_prompt, fuse_history
from flashdrive_node.model.sampling import SamplingSettings
from support.narrow_release import damped_model

NAV = ["Turn left in 37m", None, "Continue straight"]
CAMERAS, FRAMES, HEIGHT, WIDTH, LENGTH, SAMPLES = (1, 6), 2, 64, 96, 9, 2


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return damped_model()


@pytest.fixture(scope="module")
def windows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, history positions and rotations of three drives of different speed and bend."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 2, FRAMES, HEIGHT, WIDTH, 3), dtype=torch.uint8, generator=generator)
    back = torch.arange(-15, 1) * 0.1
    speed, bend = torch.tensor([3.0, 7.0, 0.0])[:, None], torch.tensor([0.02, -0.01, 0.0])[:, None]
    along = speed * back
    xyz = torch.stack((along, 0.5 * bend * along**2, torch.zeros_like(along)), dim=2)
    return images, xyz, yaw_matrix(bend * along)


def test_prompts_are_those_of_single_windows(loaded, windows):
    _, xyz, rot = windows
    config, tokenizer = loaded.model.config, loaded.tokenizer
    policy = BatchedPolicy(loaded.model, tokenizer, cameras=CAMERAS)
    layout = policy.layout(windows[0])
    tokens = encode_history(xyz, rot, config)
    texts = [tokenizer.encode("Stop."), [], tokenizer.encode("Keep the lane.")]
    batch = layout.build(tokens, NAV, texts)
    for row, nav in enumerate(NAV):
        one = driving_prompt(tokenizer, config, CAMERAS, FRAMES, [(HEIGHT // 16, WIDTH // 16)] * 4, nav)
        one = fuse_history(one, tokens[row])
        end = len(one.ids)
        assert batch.prompt_lengths[row] == end
        assert batch.lengths[row] == end + len(texts[row])
        assert batch.ids[row, : int(batch.lengths[row])].tolist() == one.ids.tolist() + texts[row]
        assert torch.equal(layout.positions(end), one.positions)
        assert layout.rope_delta == one.rope_delta
        assert torch.equal(layout.image_index, one.image_index)


def test_policy_equals_the_plain_engine(loaded, windows, monkeypatch):
    """Rows with and without navigation text; texts that end at different lengths, one of them never."""
    images, xyz, rot = windows
    noise = torch.randn(3, SAMPLES, 64, 2, generator=torch.Generator().manual_seed(1))
    policy = BatchedPolicy(
        loaded.model, loaded.tokenizer, samples=SAMPLES, flow_steps=3, cameras=CAMERAS, max_length=LENGTH
    )
    # Among random weights the stop token is never the likeliest: let a token that some rows come to be one.
    endings = _third_tokens(policy, windows)
    policy.rule = replace(policy.rule, stop=endings[0], end_of_turn=endings[1])
    monkeypatch.setattr(torch, "randn", lambda *_, **__: noise)
    plan = policy.plan(images, xyz, rot, NAV)
    monkeypatch.undo()

    settings = PlainSettings(
        "none", device="cpu", precision="float32", samples=SAMPLES, flow_steps=3,
        sampling=SamplingSettings(temperature=0.0, max_length=LENGTH),
    )  # fmt: skip
    engine = PlainEngine(settings, loaded)
    monkeypatch.setattr(engine, "_stop_rule", lambda: policy.rule)
    for row, nav in enumerate(NAV):
        monkeypatch.setattr(plain.inference, "draw_noise", lambda *_, row=row: noise[row])
        cameras = tuple(
            CameraFrames(index, tuple(range(FRAMES)), tuple(images[row, i].numpy())) for i, index in enumerate(CAMERAS)
        )
        one = engine.step(Observation(row, 0, cameras, xyz[row].numpy(), rot[row].numpy(), nav))
        for j, sample in enumerate(one.samples):
            assert sample.reasoning == plan.texts[row]
            torch.testing.assert_close(plan.xyz[row, j], torch.from_numpy(sample.xyz), atol=2e-5, rtol=1e-5)
            torch.testing.assert_close(plan.yaw[row, j], torch.from_numpy(sample.yaw), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(
                plan.actions[row, j, :, 0], torch.from_numpy(sample.acceleration), atol=5e-5, rtol=1e-4
            )


def _third_tokens(policy: BatchedPolicy, windows: tuple) -> tuple[int, int]:
    """Greedy tokens of step 3 of the first and of step 5 of the second row."""
    images, xyz, rot = windows
    model, layout = policy.model, policy.layout(images)
    prompts = layout.build(encode_history(xyz, rot, model.config), NAV)
    features = batched.encode_images(model, images)
    positions = layout.positions(prompts.ids.shape[1])
    hidden, keys, values = batched.prefill(model, prompts.ids, positions, features, layout.image_index)
    context = batched.BatchContext(keys, values, prompts.prompt_lengths, layout.rope_delta)
    logits = model.language.logits(batched.last_hidden(hidden, prompts.prompt_lengths))
    text = batched.decode(model, context, logits, policy.sampling, policy.rule)
    return int(text.tokens[0, 2]), int(text.tokens[1, 4])


def test_a_pass_over_prompt_and_text_is_a_decoded_context(loaded, windows):
    """What training computes in one pass, texts included, is what decoding builds token by token."""
    images, xyz, rot = windows
    model = loaded.model
    policy = BatchedPolicy(model, loaded.tokenizer, cameras=CAMERAS, max_length=5)
    layout = policy.layout(images)
    tokens = encode_history(xyz, rot, model.config)
    features = batched.encode_images(model, images)

    def context_of(prompts, lengths):
        positions = layout.positions(prompts.ids.shape[1])
        hidden, keys, values = batched.prefill(model, prompts.ids, positions, features, layout.image_index)
        return hidden, batched.BatchContext(keys, values, lengths, layout.rope_delta)

    prompts = layout.build(tokens, NAV)
    hidden, decoded = context_of(prompts, prompts.prompt_lengths)
    logits = model.language.logits(batched.last_hidden(hidden, prompts.prompt_lengths))
    # One token more than is compared: the last of a cut text is not run.
    text = batched.decode(model, decoded, logits, policy.sampling, policy.rule)
    rows = [row[:4] for row in text.rows()]
    decoded.lengths, decoded.missing = prompts.prompt_lengths + 4, 0
    whole = layout.build(tokens, NAV, rows)
    hidden, at_once = context_of(whole, whole.lengths)
    last = model.language.logits(batched.last_hidden(hidden, whole.lengths))
    assert inference.forbid(last, policy.rule).argmax(1).tolist() == text.tokens[:, 4].tolist()

    x = torch.randn(3, 2, 64, 2, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([[0.1, 0.9], [0.5, 0.0], [0.3, 0.3]])
    together = batched.velocity_field(model, at_once, 2)(x, t)
    torch.testing.assert_close(batched.velocity_field(model, decoded, 2)(x, t), together, atol=1e-5, rtol=1e-4)
    # Every row has a flow time of its own.
    single = batched.velocity_field(model, at_once, 1)(x[:, 1:], t[:, 1:])
    torch.testing.assert_close(single, together[:, 1:], atol=1e-5, rtol=1e-4)


def test_gradients_reach_every_part(loaded, windows):
    images, xyz, rot = windows
    model = loaded.model
    layout = BatchedPolicy(model, loaded.tokenizer, cameras=CAMERAS).layout(images)
    prompts = layout.build(encode_history(xyz, rot, model.config), NAV)
    model.requires_grad_(True)
    try:
        features = batched.encode_images(model, images)
        positions = layout.positions(prompts.ids.shape[1])
        hidden, keys, values = batched.prefill(model, prompts.ids, positions, features, layout.image_index)
        context = batched.BatchContext(keys, values, prompts.prompt_lengths, layout.rope_delta)
        velocity = batched.velocity_field(model, context, 1)(torch.zeros(3, 1, 64, 2), torch.tensor(0.5))
        (velocity.square().mean() + model.language.logits(hidden[:, -1]).square().mean()).backward()
        without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert without == []
    finally:
        model.requires_grad_(False)
        model.zero_grad()


def test_bad_input_is_refused(loaded, windows):
    images, xyz, rot = windows
    policy = BatchedPolicy(loaded.model, loaded.tokenizer, cameras=CAMERAS)
    with pytest.raises(InputError, match=r"uint8 .* found torch.float32"):
        policy.plan(images.float(), xyz, rot, NAV)
    with pytest.raises(PromptError, match="special tokens"):
        policy.plan(images, xyz, rot, ["<|im_end|>", None, None])
    with pytest.raises(ModelError, match="required"):
        policy.plan(images, xyz[:2], rot[:2], NAV)
    layout = policy.layout(images)
    with pytest.raises(PromptError, match="at most 10 tokens are required"):
        layout.build(encode_history(xyz, rot, loaded.model.config), NAV, width=10)
