"""Pictures of windows, and what every visual token of them shows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from flashdrive_node.training.architecture import IMAGE_SIZE
from flashdrive_node.training.windows import Windows, join
from flashdrive_node.world.camera import CAMERAS
from flashdrive_node.world.frames import FRAMES
from flashdrive_node.world.raycast import FAR_M
from flashdrive_node.world.render import render, token_labels
from flashdrive_node.world.scene import Scene, select
from flashdrive_node.world.solids import Pixel
from flashdrive_node.world.state import State

#: Pixels per visual token and side.
TOKEN_PIXELS = 32
CLASSES = len(Pixel)


class Pictures(NamedTuple):
    """What the cameras show in N windows."""

    #: uint8 [N, cameras, frames, H, W, 3].
    images: Tensor
    #: Per visual token, in the order of the model's image tokens: bit c is set where `Pixel` c is present, int16, and
    #: the logarithm of one plus the distance of the nearest thing, float16, negative for none: [N, tokens].
    classes: Tensor
    log_distance: Tensor


class Photographer:
    """Renders windows in batches of one size, so that the renderer is compiled once."""

    def __init__(self, batch: int = 64, size: tuple[int, int] = IMAGE_SIZE, compiled: bool = True):
        """Set the sizes.

        Args:
            batch: Windows at a time; the renderer gets `FRAMES` times as many scenes.
            size: Width and height of the pictures.
            compiled: See `render`.
        """
        self.batch, self.size, self.compiled = batch, size, compiled

    def shoot(self, windows: Windows) -> Pictures:
        """Pictures of up to `batch` windows.

        Raises:
            ValueError: More windows than that.
        """
        count = len(windows)
        if count > self.batch:
            raise ValueError(f"at most {self.batch} windows at a time are required, found {count}")
        # Padded by repeating, since the compiled renderer takes one size only.
        rows = torch.arange(self.batch, device=windows.actions.device) % count
        scene = select(windows.scene, rows.repeat(FRAMES))
        state = join(*(select(moment, rows) for moment in windows.frames))
        images, classes, distance = self.views(scene, state)

        def by_window(t: Tensor) -> Tensor:
            """[frames * batch, cameras, ...] -> [count, cameras, frames, ...]."""
            return t.unflatten(0, (FRAMES, self.batch)).permute(1, 2, 0, *range(3, t.ndim + 1))[:count]

        return Pictures(by_window(images), by_window(classes).flatten(1), by_window(distance).flatten(1))

    def views(self, scene: Scene, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """All cameras at S moments: images uint8 [S, cameras, H, W, 3], and per token classes and log distances."""
        width, height = self.size
        images, classes, distances = [], [], []
        bits = (1 << torch.arange(CLASSES, device=scene.device)).short()
        for camera in CAMERAS:
            view = render(scene, state, camera, width, height, compiled=self.compiled)
            presence, nearest = token_labels(view, TOKEN_PIXELS)
            images.append(view.image)
            classes.append((presence * bits).sum(dim=3, dtype=torch.int16))
            distances.append(torch.where(nearest < FAR_M, nearest.log1p(), -1.0).half())
        return torch.stack(images, 1), torch.stack(classes, 1), torch.stack(distances, 1)


def presence_of(classes: Tensor) -> Tensor:
    """Bits of `Pictures.classes` one by one: int16 [...] -> bool [..., classes]."""
    bits = torch.arange(CLASSES, device=classes.device)
    return (classes[..., None].int() >> bits) & 1 == 1


def retouch(images: Tensor, generator: torch.Generator) -> Tensor:
    """Vary sharpness, contrast, brightness and noise of pictures, alike in all frames of a camera.

    So that the model takes pictures that were smoothed, resized or compressed on their way.

    Args:
        images: uint8 [B, cameras, frames, H, W, 3].
        generator: On the same device.

    Returns:
        uint8 of the same shape.
    """
    rows, cameras = images.shape[:2]

    def draw(low: float, high: float) -> Tensor:
        shape = (rows, cameras, 1, 1, 1, 1)
        return low + (high - low) * torch.rand(shape, device=images.device, generator=generator)

    x = images.half()
    flat = x.flatten(0, 2).permute(0, 3, 1, 2)
    blurred = avg_pool2d(flat, 3, stride=1, padding=1, count_include_pad=False).permute(0, 2, 3, 1).view_as(x)
    x = torch.lerp(x, blurred, draw(-0.3, 0.9).clamp(min=0).half())
    x = (x - 128) * draw(0.9, 1.1).half() + (128 + draw(-10.0, 10.0)).half()
    noise = torch.randn(x.shape, device=x.device, dtype=x.dtype, generator=generator)
    x = x + noise * draw(-3.0, 4.0).clamp(min=0).half()
    return x.round().clamp(0, 255).to(torch.uint8)
