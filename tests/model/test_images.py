"""Resized pixels equal the native kernel bit for bit on every device, patch rows equal transformers'."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashdrive_node.model.errors import InputError
from flashdrive_node.model.images import (
    as_batch,
    integer_weights,
    normalise,
    patchify,
    preprocess,
    resize_on_device,
    resize_uint8,
    target_size,
)
from flashdrive_node.model.presets import alpamayo_1_5_10b
from flashdrive_node.model.vision import patch_coordinates

try:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
except ImportError:  # transformers 4
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import (
        Qwen2VLImageProcessor as Qwen2VLImageProcessorPil,
    )
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

CONFIG = alpamayo_1_5_10b()
LIMITS = (CONFIG.min_pixels, CONFIG.max_pixels, 32)
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def noise(*shape, hard=False, seed=0):
    """Uniform noise, or black and white only, which overshoots most."""
    generator = torch.Generator().manual_seed(seed)
    if hard:
        return (torch.randint(0, 2, shape, generator=generator) * 255).to(torch.uint8)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([LIMITS, (3136, 12845056, 28), (1024, 9999, 32)]))
def test_target_size_is_transformers_rule(height, width, limits):
    low, high, factor = limits
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(InputError, match="aspect ratio up to 200 is required"):
            target_size(height, width, *limits)
    else:
        assert target_size(height, width, *limits) == smart_resize(height, width, factor, low, high)


@pytest.mark.parametrize(
    ("size", "target"),
    [
        ((1080, 1920), (320, 576)),
        ((720, 1280), (320, 576)),
        ((540, 960), (320, 576)),
        ((2160, 3840), (320, 576)),
        ((1208, 1920), (320, 544)),
        ((480, 640), (384, 512)),
    ],
)
def test_target_size_of_common_cameras(size, target):
    assert target_size(*size, *LIMITS) == target


def test_target_size_refuses_empty_images():
    with pytest.raises(InputError, match="positive sides are required, found height 0, width 5"):
        target_size(0, 5, *LIMITS)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize(
    "size", [(1080, 1920), (1208, 1920), (720, 1280), (480, 640), (540, 960), (2160, 3840), (361, 643), (320, 600)]
)
def test_resize_on_device_is_the_native_kernel(size, hard, device):
    images = noise(1, 3, *size, hard=hard)
    target = target_size(*size, *LIMITS)
    expected = resize_uint8(images, target)
    assert torch.equal(resize_on_device(images.to(device), target).cpu(), expected)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(resize_uint8(channels_last, target), expected)
    assert torch.equal(resize_on_device(channels_last.to(device), target).cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(2, 300)] * 4), st.integers(1, 3), st.booleans(), st.integers(0, 99))
def test_resize_between_any_sizes(device, sides, count, hard, seed):
    images = noise(count, 3, *sides[:2], hard=hard, seed=seed)
    expected = resize_uint8(images, sides[2:])
    assert torch.equal(resize_on_device(images.to(device), sides[2:]).cpu(), expected)


@given(st.integers(1, 4000), st.integers(1, 700))
@settings(max_examples=50, deadline=None)
def test_weights_fit_sixteen_bits_and_sum_to_one(size_in, size_out):
    weights, bits = integer_weights(size_in, size_out)
    assert np.abs(weights).max() < 1 << 15
    # Each of the taps may have been rounded by half a unit.
    assert (np.abs(weights.sum(axis=1) - (1 << bits)) <= (weights != 0).sum(axis=1)).all()


def test_a_float_resize_is_another_image():
    images = noise(1, 3, 540, 960, hard=True)
    floats = torch.nn.functional.interpolate(images.float(), size=(320, 576), mode="bicubic", antialias=True)
    difference = (floats.round().clamp(0, 255) - resize_uint8(images, (320, 576))).abs()
    assert (difference > 0).float().mean() > 0.05


def test_patch_rows_follow_the_vision_tower():
    """Each row is the patch that the tower's own coordinates name, its two temporal slots equal."""
    images = noise(2, 3, 64, 96)
    rows = patchify(images).view(2, 24, 3, 2, 16, 16)
    row, col = patch_coordinates((4, 6), 2, torch.device("cpu"))
    for image in range(2):
        for i in range(24):
            patch = images[image, :, 16 * row[i] : 16 * row[i] + 16, 16 * col[i] : 16 * col[i] + 16]
            assert torch.equal(rows[image, i, :, 0], patch)
            assert torch.equal(rows[image, i, :, 1], patch)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(1080, 1920), (480, 640), (240, 320)])
def test_preprocess_is_transformers_processor(size, device):
    """transformers resizes with Pillow here, whose kernel differs by one of 255 per pass at most."""
    frame = noise(*size, 3).numpy()
    processor = Qwen2VLImageProcessorPil(
        min_pixels=LIMITS[0],
        max_pixels=LIMITS[1],
        patch_size=16,
        merge_size=2,
        temporal_patch_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    expected = processor([frame], return_tensors="pt")
    rows, grids = preprocess([[frame]], CONFIG, device)
    assert [[1, *grid] for grid in grids] == expected["image_grid_thw"].tolist()
    difference = (rows.cpu() - expected["pixel_values"]).abs()
    assert difference.max() < 2.1 / 127.5
    assert difference.mean() < 0.1 / 127.5


def test_every_form_of_a_batch_is_the_same():
    tensor = noise(4, 3, 90, 160)
    frames = [np.ascontiguousarray(frame.permute(1, 2, 0).numpy()) for frame in tensor]
    expected, _ = preprocess([tensor], CONFIG)
    stacked = np.stack(frames)
    mirrored = [np.ascontiguousarray(frame[:, :, ::-1])[:, :, ::-1] for frame in frames]  # negative strides
    sealed = stacked.copy()
    sealed.flags.writeable = False
    for form in (
        frames,
        tuple(frames),
        mirrored,
        stacked,
        np.stack(mirrored),
        sealed,
        stacked[:, ::-1][:, ::-1],
        torch.from_numpy(stacked),
        tensor.numpy(),
    ):
        assert torch.equal(preprocess([form], CONFIG)[0], expected)
    assert as_batch(stacked).data_ptr() == stacked.ctypes.data  # not copied


def test_cameras_of_different_sizes_and_bfloat16():
    wide, tall = noise(2, 3, 270, 480), noise(2, 3, 240, 320)
    rows, grids = preprocess([wide, tall], CONFIG, dtype=torch.bfloat16)
    assert grids == [(20, 34)] * 2 + [(22, 30)] * 2
    assert rows.dtype == torch.bfloat16
    assert rows.shape == (2 * 680 + 2 * 660, 1536)
    assert torch.equal(rows[: 2 * 680], preprocess([wide], CONFIG)[0].bfloat16())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_preprocess_is_the_same_on_every_device(device, dtype):
    frames = [noise(2, 3, 270, 480), noise(2, 3, 240, 320, hard=True)]
    rows, grids = preprocess([frame.to(device) for frame in frames], CONFIG, device, dtype)
    sizes = [target_size(*frame.shape[2:], *LIMITS) for frame in frames]
    expected = [
        ((patchify(resize_uint8(frame, size)).float() - 127.5) / 127.5).to(dtype)
        for frame, size in zip(frames, sizes, strict=True)
    ]
    assert grids == [(h // 16, w // 16) for h, w in sizes for _ in range(2)]
    assert torch.equal(rows.cpu(), torch.cat(expected))


def test_normalisation_ends():
    assert normalise(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


FRAME = np.zeros((90, 160, 3), np.uint8)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([FRAME, FRAME[:80]], "one size, found [90, 160, 3] in image 0 and [80, 160, 3] in image 1"),
        ([FRAME, FRAME.astype(np.float32)], "camera 1 of 2: uint8 is required, found float32 in image 1"),
        ([FRAME[..., 0]], "[height, width, 3] is required, found [90, 160] in image 0"),
        ([], "at least one image is required, found none"),
        (np.zeros((4, 3, 90, 160), np.float32), "uint8 is required, found torch.float32"),
        (np.zeros((4, 90, 160, 4), np.uint8), "[N, 3, H, W] or [N, H, W, 3] is required, found [4, 90, 160, 4]"),
        (torch.zeros(3, 90, 160, dtype=torch.uint8), "is required, found [3, 90, 160]"),
        (np.zeros((1, 2, 500, 3), np.uint8), "aspect ratio up to 200 is required, found 500 x 2"),
    ],
)
def test_images_that_are_refused(frames, message):
    with pytest.raises(InputError, match=re.escape(message)):
        preprocess([[FRAME], frames], CONFIG)
