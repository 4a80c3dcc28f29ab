"""Frames in host memory to vision features: upload, resize, patches and the vision tower, the latter as one graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashdrive_node.engine.frame_copies import Copying, FrameCopies
from flashdrive_node.engine.graphs import Graphs
from flashdrive_node.engine.kernels.patches import frame_patches
from flashdrive_node.engine.vision_pass import Grid, VisionPass, joined
from flashdrive_node.model.alpamayo import Alpamayo
from flashdrive_node.model.images import as_batch, check_frames, target_size
from flashdrive_node.model.vision import VisionFeatures


@dataclass(frozen=True, eq=False)
class Upload:
    """Frames on their way to the device."""

    #: Per camera, as `ImageEncoder.upload` returns them.
    batches: list[Tensor]
    #: Of the frames of all cameras, one after the other: copies on the host that are being made, and the places there
    #: and on the device.
    copying: Copying | None = None
    hosts: tuple[Tensor, ...] = ()
    targets: tuple[Tensor, ...] = ()


class ImageEncoder:
    """Encodes frames of some cameras.

    Frames of one size share a buffer, whatever cameras they are of, and features share another: so memory is that of
    the most frames that came at once.
    """

    def __init__(self, model: Alpamayo, graphs: Graphs | None = None):
        self.model = model
        self.graphs = graphs or Graphs(model.device, enabled=False)
        self._vision = VisionPass(model.vision)
        # By height and width: uint8 [frames, height, width, 3], page-locked and on the device.
        self._frames: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        # [1 + levels, image tokens, text hidden].
        self._features: Tensor | None = None
        self._copies: FrameCopies | None = None
        self._copying: Copying | None = None
        self._uploads: torch.cuda.Stream | None = None
        if model.device.type == "cuda":
            self._copies, self._uploads = FrameCopies(), torch.cuda.Stream(model.device)
            # When the last frames have been sent, and when they have been read.
            self._sent, self._read = torch.cuda.Event(), torch.cuda.Event()

    def upload(self, cameras: Sequence[Sequence[NDArray[np.uint8]]]) -> list[Tensor]:
        """Bring frames to the device: `start` and `finish` in one."""
        return self.finish(self.start(cameras))

    def start(self, cameras: Sequence[Sequence[NDArray[np.uint8]]]) -> Upload:
        """Begin to bring frames to the device, while the caller has other things to do.

        Args:
            cameras: Per camera its frames [height, width, 3], of one size.

        Raises:
            InputError: Frames that cannot be one batch.
        """
        names = [f"camera {i} of {len(cameras)}" for i in range(len(cameras))]
        if self._uploads is None or self._copies is None:
            return Upload([as_batch(frames, name) for frames, name in zip(cameras, names, strict=True)])
        for frames, name in zip(cameras, names, strict=True):
            check_frames(frames, name)
        if self._copying is not None:
            self._copying.wait()  # of an upload that was not finished
        self._make_room(cameras)
        self._sent.synchronize()  # long over, unless frames come one by one
        taken, batches = dict.fromkeys(self._frames, 0), []
        hosts: list[Tensor] = []
        targets: list[Tensor] = []
        for frames in cameras:
            size = frames[0].shape[0], frames[0].shape[1]
            own = slice(taken[size], taken[size] + len(frames))
            host, device = (buffer[own] for buffer in self._frames[size])
            hosts.extend(host)
            targets.extend(device)
            batches.append(device.permute(0, 3, 1, 2))
            taken[size] = own.stop
        flat = [frame for frames in cameras for frame in frames]
        self._copying = self._copies.start([host.numpy() for host in hosts], flat)
        return Upload(batches, self._copying, tuple(hosts), tuple(targets))

    def finish(self, upload: Upload) -> list[Tensor]:
        """Bring to the device what `start` began to.

        Returns:
            Per camera uint8 [frames, 3, height, width] on the model's device. On a GPU these are parts of buffers that
            the next frames go to; the upload runs beside what the device does, which waits for it.
        """
        if upload.copying is None or self._uploads is None:
            return upload.batches
        with torch.cuda.stream(self._uploads):
            self._uploads.wait_event(self._read)
            for frame, rows in upload.copying:
                upload.targets[frame][rows].copy_(upload.hosts[frame][rows], non_blocking=True)
            self._sent.record()
        torch.cuda.current_stream(self.model.device).wait_stream(self._uploads)
        return upload.batches

    def encode(self, cameras: Sequence[Tensor]) -> VisionFeatures:
        """Features of frames that `upload` gave, camera by camera; the next call may overwrite them."""
        if self._uploads is None:
            return self._encode(cameras)
        out = self._features_for(cameras)

        def run() -> None:
            features = self._encode(cameras)
            for level, tensor in enumerate((features.embeds, *features.deepstack)):
                out[level].copy_(tensor)

        # Where a batch starts within its buffer follows from the sizes in front of it.
        key = tuple(tuple(frames.shape) for frames in cameras)
        self.graphs.run((self, key), run)
        self._read.record()
        embeds, *deepstack = out.unbind()
        return VisionFeatures(embeds, deepstack)

    def _encode(self, cameras: Sequence[Tensor]) -> VisionFeatures:
        # Neighbours of one grid run as one batch.
        runs: list[tuple[Grid, list[Tensor]]] = []
        for frames in cameras:
            patches, grid = frame_patches(frames, self.model.config, self.model.dtype)
            if not runs or runs[-1][0] != grid:
                runs.append((grid, []))
            runs[-1][1].append(patches)
        return joined([self._vision.run(torch.cat(rows) if len(rows) > 1 else rows[0], grid) for grid, rows in runs])

    def _make_room(self, cameras: Sequence[Sequence[NDArray[np.uint8]]]) -> None:
        """Buffers for so many frames of every size."""
        counts: dict[tuple[int, int], int] = {}
        for frames in cameras:
            size = frames[0].shape[0], frames[0].shape[1]
            counts[size] = counts.get(size, 0) + len(frames)
        for size, count in counts.items():
            if size not in self._frames or len(self._frames[size][0]) < count:
                self.graphs.clear()  # those that read the smaller buffer
                shape = (count, *size, 3)
                device = torch.empty(shape, dtype=torch.uint8, device=self.model.device)
                self._frames[size] = torch.empty(shape, dtype=torch.uint8, pin_memory=device.is_cuda), device
                if self._uploads is not None:
                    # This memory may have been that of work that is still under way on the other stream.
                    self._uploads.wait_stream(torch.cuda.current_stream(self.model.device))

    def _features_for(self, cameras: Sequence[Tensor]) -> Tensor:
        """Room for the features of frames [frames, 3, height, width]."""
        config, tokens = self.model.config, 0
        factor = config.vision.resize_factor
        for frames in cameras:
            height, width = frames.shape[2:]
            height, width = target_size(height, width, config.min_pixels, config.max_pixels, factor)
            tokens += len(frames) * (height // factor) * (width // factor)
        if self._features is None or self._features.shape[1] < tokens:
            self.graphs.clear()  # those that write to the smaller buffer
            shape = (1 + len(self.model.vision.deepstack_mergers), tokens, config.text.hidden_size)
            self._features = torch.empty(shape, device=self.model.device, dtype=self.model.dtype)
        return self._features[:, :tokens]
