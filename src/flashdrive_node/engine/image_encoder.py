"""Frames in host memory to vision features: upload, resize, patches and the vision tower, the latter as one graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashdrive_node.engine.graphs import Graphs
from flashdrive_node.engine.vision_pass import Grid, VisionPass, joined
from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.images import as_batch, check_frames, patch_rows, target_size
from flashdrive_node.model.vision import VisionFeatures


@dataclass(frozen=True)
class _Buffers:
    """Where the frames of one layout go, and what comes of them."""

    #: Per camera uint8 [frames, height, width, 3], page-locked and on the device.
    host: list[Tensor]
    device: list[Tensor]
    #: [1 + levels, image tokens, text hidden].
    features: Tensor
    #: When the last frames have been sent, and when they have been read.
    sent: torch.cuda.Event = field(default_factory=torch.cuda.Event)
    read: torch.cuda.Event = field(default_factory=torch.cuda.Event)


class ImageEncoder:
    """Encodes frames of some cameras; buffers are kept by the number and size of the frames."""

    def __init__(self, model: Alpamayo, graphs: Graphs | None = None):
        self.model = model
        self.graphs = graphs or Graphs(model.device, enabled=False)
        self._vision = VisionPass(model.vision)
        self._buffers: dict[tuple[tuple[int, ...], ...], _Buffers] = {}
        self._uploads = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None

    def upload(self, cameras: Sequence[Sequence[NDArray[np.uint8]]]) -> list[Tensor]:
        """Bring frames to the device.

        Args:
            cameras: Per camera its frames [height, width, 3], of one size.

        Returns:
            Per camera uint8 [frames, 3, height, width] on the model's device. On a GPU these are buffers that the next
            frames of the same layout go to; the upload runs beside what the device does, which waits for it.

        Raises:
            InputError: Frames that cannot be one batch.
        """
        names = [f"camera {i} of {len(cameras)}" for i in range(len(cameras))]
        if self._uploads is None:
            return [as_batch(frames, name) for frames, name in zip(cameras, names, strict=True)]
        for frames, name in zip(cameras, names, strict=True):
            check_frames(frames, name)
        buffers = self._buffers_for(cameras)
        buffers.sent.synchronize()  # long over, unless frames come one by one
        with torch.cuda.stream(self._uploads):
            self._uploads.wait_event(buffers.read)
            for frames, host, device in zip(cameras, buffers.host, buffers.device, strict=True):
                for i, frame in enumerate(frames):
                    if frame.flags.writeable:  # PyTorch copies with several threads, and takes no others
                        host[i].copy_(torch.from_numpy(frame))
                    else:
                        np.copyto(host[i].numpy(), frame)
                    device[i].copy_(host[i], non_blocking=True)
            buffers.sent.record()
        torch.cuda.current_stream(self.model.device).wait_stream(self._uploads)
        return [device.permute(0, 3, 1, 2) for device in buffers.device]

    def encode(self, cameras: Sequence[Tensor]) -> VisionFeatures:
        """Features of frames that `upload` gave, camera by camera; the next call may overwrite them."""
        if self._uploads is None:
            return self._encode(cameras)
        key = tuple((len(frames), *frames.shape[2:], 3) for frames in cameras)
        buffers = self._buffers[key]
        out = buffers.features

        def run() -> None:
            features = self._encode(cameras)
            for level, tensor in enumerate((features.embeds, *features.deepstack)):
                out[level].copy_(tensor)

        self.graphs.run((self, key), run)
        buffers.read.record()
        embeds, *deepstack = out.unbind()
        return VisionFeatures(embeds, deepstack)

    def _encode(self, cameras: Sequence[Tensor]) -> VisionFeatures:
        # Neighbours of one grid run as one batch.
        runs: list[tuple[Grid, list[Tensor]]] = []
        for frames in cameras:
            patches, grid = patch_rows(frames, self.model.config, self.model.dtype)
            if not runs or runs[-1][0] != grid:
                runs.append((grid, []))
            runs[-1][1].append(patches)
        return joined([self._vision.run(torch.cat(rows) if len(rows) > 1 else rows[0], grid) for grid, rows in runs])

    def _buffers_for(self, cameras: Sequence[Sequence[NDArray[np.uint8]]]) -> _Buffers:
        key = tuple((len(frames), *frames[0].shape) for frames in cameras)
        if key not in self._buffers:
            device = self.model.device
            host = [torch.empty(shape, dtype=torch.uint8, pin_memory=True) for shape in key]
            frames = [torch.empty(shape, dtype=torch.uint8, device=device) for shape in key]
            self._buffers[key] = _Buffers(host, frames, self._features_for(frames))
        return self._buffers[key]

    def _features_for(self, cameras: Sequence[Tensor]) -> Tensor:
        """Room for the features of frames [frames, height, width, 3]."""
        config, tokens = self.model.config, 0
        for frames in cameras:
            height, width = target_size(
                frames.shape[1], frames.shape[2], config.min_pixels, config.max_pixels, config.vision.resize_factor
            )
            tokens += len(frames) * (height // config.vision.resize_factor) * (width // config.vision.resize_factor)
        levels = 1 + len(self.model.vision.deepstack_mergers)
        shape = (levels, tokens, config.text.hidden_size)
        return torch.empty(shape, device=self.model.device, dtype=self.model.dtype)
