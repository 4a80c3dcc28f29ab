"""Streams side by side are what the streaming engine is one by one, whatever happens to each of them."""

import pytest
import torch

from flashdrive_node.engine.batched_policy import BatchedPolicy, StreamingPolicy
from flashdrive_node.engine.flow_schedule import FlowSchedule
from flashdrive_node.engine.protocol import CameraFrames, Observation
from flashdrive_node.engine.settings import StreamingSettings
from flashdrive_node.engine.stream import StreamSettings
from flashdrive_node.engine.streaming import StreamingEngine
from flashdrive_node.model.action_space import yaw_matrix
from flashdrive_node.model.errors import InputError
from flashdrive_node.model.loading import LoadedModel
from flashdrive_node.model.sampling import SamplingSettings
from support.narrow_release import damped_model

CAMERAS, FRAMES, HEIGHT, WIDTH, LENGTH, SAMPLES = (1, 6), 3, 64, 96, 5, 2
SCHEDULE = FlowSchedule.uniform(4, (0, 1, 3))
#: Newest frame of each lane, window by window: all in step; one loses a frame, one stands still, one has a gap.
DRIVES = ((2, 2, 2), (3, 3, 3), (4, 4, 5), (5, 4, 50), (6, 6, 51))
NAV = ("Turn left in 37m", None, "Continue straight")


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return damped_model()


def streaming(loaded: LoadedModel, settings: StreamSettings) -> StreamingPolicy:
    policy = BatchedPolicy(
        loaded.model, loaded.tokenizer, SAMPLES, cameras=CAMERAS, max_length=LENGTH, schedule=SCHEDULE
    )
    return StreamingPolicy(policy, settings)


def pictures(lane: int, newest: int) -> torch.Tensor:
    """What a lane's cameras have seen: uint8 [cameras, frames, H, W, 3]."""
    shown = []
    for frame in range(newest - FRAMES + 1, newest + 1):
        generator = torch.Generator().manual_seed(1000 * lane + frame)
        shown.append(torch.randint(0, 256, (2, HEIGHT, WIDTH, 3), dtype=torch.uint8, generator=generator))
    return torch.stack(shown, dim=1)


def history(newest: int) -> tuple[torch.Tensor, torch.Tensor]:
    along = (3.0 + 0.1 * newest) * torch.arange(-15, 1) * 0.1
    return torch.stack((along, 0.01 * along**2, torch.zeros_like(along)), dim=1), yaw_matrix(0.02 * along)


@pytest.mark.parametrize(
    "settings",
    [
        StreamSettings("kv"),
        StreamSettings("kv", refresh_every=3),
        StreamSettings("kv", refresh_views=True),
        StreamSettings("features"),
        StreamSettings("full"),
    ],
)
def test_windows_are_those_of_the_streaming_engine(loaded: LoadedModel, settings: StreamSettings) -> None:
    sampling = SamplingSettings(temperature=0.0, max_length=LENGTH)
    engine_settings = StreamingSettings(
        "none", device="cpu", precision="float32", samples=SAMPLES, sampling=sampling, stream=settings,
        schedule=SCHEDULE, seed=7, cameras=CAMERAS,
    )  # fmt: skip
    engines = [StreamingEngine(engine_settings, loaded) for _ in NAV]
    policy = streaming(loaded, settings)
    policy.begin(3, FRAMES, HEIGHT, WIDTH)
    for number, newest in enumerate(DRIVES):
        stamps = [tuple(range(n - FRAMES + 1, n + 1)) for n in newest]
        # One lane begins anew on the way; others are read in another order than they have.
        lanes = [0, 1, 2] if number < 2 else [2, 0, 1]
        if number == 3:
            engines[0].stream.reset()
            policy.streams.reset(0)
        images = torch.stack([pictures(lane, newest[lane]) for lane in lanes])
        asked: list[int] = []

        def frames(rows, chosen, images=images, asked=asked):
            asked.append(len(rows) * len(chosen))
            return images.flatten(1, 2)[list(rows)][:, list(chosen)]

        told = [history(newest[lane]) for lane in lanes]
        xyz, rot = (torch.stack(one) for one in zip(*told, strict=True))
        noise = torch.randn(SAMPLES, 64, 2, generator=torch.Generator().manual_seed(7 + number))
        plan = policy.plan(
            lanes, [(stamps[lane],) * 2 for lane in lanes], frames, xyz, rot, [NAV[lane] for lane in lanes],
            noise=noise.expand(3, -1, -1, -1),
        )  # fmt: skip
        computed = 0
        for row, lane in enumerate(lanes):
            cameras = tuple(
                CameraFrames(index, stamps[lane], tuple(images[row, i].numpy())) for i, index in enumerate(CAMERAS)
            )
            one = engines[lane].step(Observation(number, 0, cameras, xyz[row].numpy(), rot[row].numpy(), NAV[lane]))
            computed += int(one.metrics["new_images"])
            for j, sample in enumerate(one.samples):
                assert sample.reasoning == plan.texts[row]
                torch.testing.assert_close(plan.xyz[row, j], torch.from_numpy(sample.xyz), atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(plan.speed[row, j], torch.from_numpy(sample.speed), atol=1e-4, rtol=1e-4)
        assert sum(asked) == computed
    assert policy.streams.windows == [2, 5, 5]


def test_samples_with_texts_of_their_own(loaded: LoadedModel) -> None:
    """Greedy, they are equal; each is written by its own row of the batch."""
    stamps, frames = [((0, 1, 2),) * 2], lambda rows, chosen: pictures(0, 2).flatten(0, 1)[None, list(chosen)]
    told = (*(t[None] for t in history(2)), [NAV[0]])
    noise = torch.randn(1, SAMPLES, 64, 2, generator=torch.Generator().manual_seed(0))
    plans = []
    for own in (False, True):
        policy = streaming(loaded, StreamSettings("kv"))
        policy.policy.own_texts = own
        policy.begin(1, FRAMES, HEIGHT, WIDTH)
        plans.append(policy.plan([0], stamps, frames, *told, noise=noise))
    shared, own_texts = plans
    assert own_texts.texts == shared.texts * SAMPLES
    assert own_texts.complete == shared.complete * SAMPLES
    torch.testing.assert_close(own_texts.xyz, shared.xyz, atol=1e-4, rtol=1e-4)


def test_streams_must_have_begun_and_stamps_must_ascend(loaded: LoadedModel) -> None:
    policy = streaming(loaded, StreamSettings("kv"))
    told = (*(t[None] for t in history(2)), [None])
    frames = lambda rows, chosen: pictures(0, 2).flatten(0, 1)[None, list(chosen)]  # noqa: E731
    with pytest.raises(InputError, match="streams that have begun"):
        policy.plan([0], [((0, 1, 2),) * 2], frames, *told)
    policy.begin(1, FRAMES, HEIGHT, WIDTH)
    with pytest.raises(InputError, match="ascending stamps"):
        policy.plan([0], [((2, 1, 0),) * 2], frames, *told)
