"""Loading a checkpoint: every tensor straight from its file to its device, type and fused place.

One pass over the headers finds everything that is wrong; only then are weights read. Files are read from front to back
by one thread each, which also hashes what it reads; the calling thread copies the pieces to the device, so it alone
touches CUDA. Memory on the host is a fixed number of staging buffers, memory on the device the weights and one piece.
"""

from __future__ import annotations

import hashlib
import logging
import math
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flashdrive_node.model.checkpoint_files import CheckpointFiles, check_overlay, check_tensors, survey
from flashdrive_node.model.errors import CheckpointError
from flashdrive_node.model.safetensors_file import DTYPES, Header
from flashdrive_node.model.source import snapshot_revision
from flashdrive_node.model.state_dict import TensorSlot

logger = logging.getLogger(__name__)

PIECE_BYTES = 32 << 20
_BUFFERS = 10
#: One per shard of the release (5), and one more; hashing keeps a core busy at about 1.5 GB/s.
_READERS = 6
#: Copies to the device that may be under way; the other buffers keep the readers busy.
_IN_FLIGHT = 3


@dataclass(frozen=True)
class CheckpointInfo:
    """What was loaded, for logs and diagnostics."""

    path: Path
    #: Commit of a Hugging Face snapshot, else "".
    revision: str
    #: Of the one file's bytes, or of the lines that ``sha256sum`` prints for several files; "" where not asked for.
    sha256: str
    #: Tensors copied into the model, and their bytes in the files.
    tensors: int
    bytes: int
    seconds: float
    #: SHA-256 of each file by name, those of an overlay as "overlay/NAME".
    file_sha256: dict[str, str] = field(default_factory=dict)
    #: Tensors taken from the overlay.
    replaced: tuple[str, ...] = ()


class _Piece(NamedTuple):
    """Some elements of one tensor, read into a staging buffer."""

    slot: TensorSlot
    dtype: torch.dtype
    #: First element within the tensor, and how many.
    first: int
    length: int
    buffer: Tensor


def load_weights(
    model: nn.Module,
    slots: Sequence[TensorSlot],
    directory: Path,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    overlay: Path | None = None,
    progress: Callable[[float, str], None] | None = None,
    hash_files: bool = True,
    completed: Callable[[str], None] | None = None,
    take: Callable[[TensorSlot, int, Tensor], bool] | None = None,
    ignored: Collection[str] = (),
    unpacked: Path | None = None,
) -> CheckpointInfo:
    """Fill a model from a checkpoint.

    Args:
        model: Modules on the meta device or with storage. Parameters and buffers that are not yet on `device` in the
            required type are allocated there, one by one as their first tensor comes.
        slots: Where each tensor of the file goes in the model (`release_slots`).
        directory: Checkpoint directory: one safetensors file, or shards with an index.
        device: Where the weights go.
        dtype: Type of all weights; None keeps the type that each parameter of the model has.
        overlay: File or directory of a fine-tuned expert: replaces any of ``expert.*``, ``action_in_proj.*`` and
            ``action_out_proj.*``.
        progress: Called with a fraction in 0..1 and what is being done.
        hash_files: Compute the SHA-256 of the files while they are read.
        completed: Called with the name of each parameter or buffer that has all its elements. It may take the tensor
            out of the model, whose memory is then free.
        take: Offered every piece of a tensor before anything is allocated for it: the slot, the number of the piece's
            first element, and the elements, which are not valid later. Returns whether it has taken care of them.
        ignored: Tensors that may be in the files and are not read.
        unpacked: File with further tensors (`unpacked_cache`), which is no part of the checkpoint's hash.

    Raises:
        CheckpointError: Lists everything that is wrong with the files. The model has not been touched then, unless
            reading itself failed.
        ValueError: The slots do not cover the model.
    """
    started = time.monotonic()
    _require_cover(model, slots)
    base = survey(directory)
    if unpacked is not None:
        base.add(survey(unpacked))
    problems = base.problems + check_tensors(base, slots, ignored)
    sources: list[tuple[str, CheckpointFiles]] = [("", base)]
    if overlay is not None:
        over = survey(overlay)
        problems += [f"overlay {overlay}: {problem}" for problem in over.problems + check_overlay(over, slots)]
        sources.append(("overlay/", over))
    if problems:
        raise CheckpointError(str(directory), problems)

    by_name = {slot.name: slot for slot in slots}
    replaced = tuple(sorted(sources[1][1].tensors)) if overlay is not None else ()
    jobs: list[tuple[str, Header, dict[str, TensorSlot]]] = []
    for prefix, files in sources:
        for header in files.headers:
            names = set(header.entries) - (set() if prefix else {*replaced, *ignored})
            jobs.append((prefix + header.path.name, header, {name: by_name[name] for name in names}))
    tensors = sum(len(wanted) for _, _, wanted in jobs)
    total_bytes = sum(header.entries[name].nbytes for _, header, wanted in jobs for name in wanted)
    device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
    targets: dict[str, Tensor] = {}
    open_elements: dict[str, int] = defaultdict(int)
    for _, _, wanted in jobs:
        for slot in wanted.values():
            open_elements[slot.target] += math.prod(slot.shape)

    def put(slot: TensorSlot, first: int, elements: Tensor) -> None:
        if take is not None and take(slot, first, elements):
            return
        if slot.target not in targets:
            targets[slot.target] = materialise(model, slot.target, device, dtype)
        place_of(slot, targets[slot.target]).narrow(0, first, len(elements)).copy_(elements, non_blocking=True)

    def copied(slot: TensorSlot, elements: int) -> None:
        open_elements[slot.target] -= elements
        if not open_elements[slot.target]:
            targets.pop(slot.target, None)
            if completed is not None:
                completed(slot.target)

    hashes = _copy(jobs, put, copied, device, total_bytes, progress, hash_files)
    if unpacked is not None:
        hashes.pop(unpacked.name, None)
    info = CheckpointInfo(
        path=directory,
        revision=snapshot_revision(directory),
        sha256=combined_sha256(hashes),
        tensors=tensors,
        bytes=total_bytes,
        seconds=time.monotonic() - started,
        file_sha256=hashes,
        replaced=replaced,
    )
    if replaced:
        logger.info("overlay %s replaced %d tensors: %s", overlay, len(replaced), ", ".join(replaced))
    return info


def combined_sha256(hashes: dict[str, str]) -> str:
    """One hash for a checkpoint: of the only file, or of the lines ``HASH  NAME`` of several, sorted by name."""
    if len(hashes) <= 1:
        return next(iter(hashes.values()), "")
    lines = "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes))
    return hashlib.sha256(lines.encode()).hexdigest()


def _require_cover(model: nn.Module, slots: Sequence[TensorSlot]) -> None:
    """Every parameter of the model gets each of its elements once."""
    covered: dict[str, int] = defaultdict(int)
    for slot in slots:
        covered[slot.target] += math.prod(slot.shape)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    problems = [
        f"{target}: {covered[target]} elements in the files' layout, {tensors[target].numel()} in the model"
        if target in tensors
        else f"{target}: not in the model"
        for target in covered
        if target not in tensors or tensors[target].numel() != covered[target]
    ]
    problems += [
        f"{name}: no tensor of the files goes here" for name, _ in model.named_parameters() if name not in covered
    ]
    if problems:
        raise ValueError("model and slots disagree:\n" + "\n".join(problems))


def materialise(model: nn.Module, name: str, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Storage of a parameter or buffer of `model` on `device` in `dtype` (None: its own), allocated where needed."""
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    current: Tensor = getattr(module, leaf)
    dtype = dtype or current.dtype
    if current.device != device or current.dtype != dtype:
        storage = torch.empty(current.shape, dtype=dtype, device=device)
        if isinstance(current, nn.Parameter):
            setattr(module, leaf, nn.Parameter(storage, requires_grad=current.requires_grad))
        else:
            setattr(module, leaf, storage)
    result: Tensor = getattr(module, leaf)
    return result.detach()


def place_of(slot: TensorSlot, target: Tensor) -> Tensor:
    """The rows of `target` that belong to a tensor of the files, as a flat view [elements]."""
    row_size = target.numel() // target.shape[0] if target.ndim else 1
    return target.view(-1).narrow(0, slot.row * row_size, math.prod(slot.shape))


class _Pipe:
    """Staging buffers between the reading threads and the thread that copies."""

    def __init__(self, pinned: bool):
        self.free: SimpleQueue[Tensor] = SimpleQueue()
        #: Pieces, and one None per file that is through.
        self.ready: SimpleQueue[_Piece | None] = SimpleQueue()
        self.stop = threading.Event()
        for _ in range(_BUFFERS):
            self.free.put(torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=pinned))

    def read(self, header: Header, wanted: dict[str, TensorSlot], hash_file: bool) -> str:
        """Send the wanted tensors of one file as pieces. Returns the file's SHA-256, or "" where not asked for."""
        try:
            return self._read(header, wanted, hash_file)
        except BaseException:
            self.stop.set()
            raise
        finally:
            self.ready.put(None)

    def _read(self, header: Header, wanted: dict[str, TensorSlot], hash_file: bool) -> str:
        digest = hashlib.sha256()
        entries = sorted(header.entries.items(), key=lambda item: item[1].start)
        data_start = min((entry.start for _, entry in entries), default=header.file_bytes)
        with header.path.open("rb", buffering=0) as file:
            digest.update(file.read(data_start) if hash_file else b"")
            for name, entry in entries:
                if name not in wanted and not hash_file:
                    continue
                file.seek(entry.start)
                dtype = DTYPES[entry.dtype]
                for offset in range(0, entry.nbytes, PIECE_BYTES):
                    buffer = self.free.get()
                    if self.stop.is_set():
                        self.free.put(buffer)
                        return ""
                    size = min(PIECE_BYTES, entry.nbytes - offset)
                    view = buffer.numpy().data[:size]
                    _read_fully(file, view, header)
                    if hash_file:
                        digest.update(view)
                    if name in wanted:
                        first, length = offset // dtype.itemsize, size // dtype.itemsize
                        self.ready.put(_Piece(wanted[name], dtype, first, length, buffer))
                    else:
                        self.free.put(buffer)
        return digest.hexdigest() if hash_file else ""


def _read_fully(file: FileIO, view: memoryview, header: Header) -> None:
    done = 0
    while done < len(view):
        read = file.readinto(view[done:])
        if not read:
            raise CheckpointError(
                str(header.path), [f"ends at byte {file.tell()}, had {header.file_bytes} bytes when it was checked"]
            )
        done += read


def _copy(
    jobs: list[tuple[str, Header, dict[str, TensorSlot]]],
    put: Callable[[TensorSlot, int, Tensor], None],
    copied: Callable[[TensorSlot, int], None],
    device: torch.device,
    total_bytes: int,
    progress: Callable[[float, str], None] | None,
    hash_files: bool,
) -> dict[str, str]:
    """Read all files and give their pieces to `put`; `copied` is told how many elements came.

    Returns:
        The files' hashes by name, if asked for.
    """
    pipe = _Pipe(pinned=device.type == "cuda")
    in_flight: deque[tuple[torch.cuda.Event, Tensor]] = deque()
    done_bytes, percent, files_left = 0, -1, len(jobs)

    with ThreadPoolExecutor(min(_READERS, len(jobs)), thread_name_prefix="checkpoint") as pool:
        futures = [(name, pool.submit(pipe.read, header, wanted, hash_files)) for name, header, wanted in jobs]
        try:
            while files_left:
                piece = pipe.ready.get()
                if piece is None:
                    files_left -= 1
                    continue
                source = piece.buffer[: piece.length * piece.dtype.itemsize].view(piece.dtype)
                put(piece.slot, piece.first, source)
                if device.type == "cuda":
                    # The buffer may be refilled only when the device has taken it.
                    in_flight.append((torch.cuda.current_stream(device).record_event(), piece.buffer))
                    if len(in_flight) > _IN_FLIGHT:
                        event, buffer = in_flight.popleft()
                        event.synchronize()
                        pipe.free.put(buffer)
                else:
                    pipe.free.put(piece.buffer)
                copied(piece.slot, piece.length)
                done_bytes += source.nbytes
                if progress and done_bytes * 100 // total_bytes > percent:
                    percent = done_bytes * 100 // total_bytes
                    progress(done_bytes / total_bytes, "reading weights")
        finally:
            if files_left:
                # Readers may wait for a buffer; each passes this one on when it sees that it is over.
                pipe.stop.set()
                pipe.free.put(torch.empty(0, dtype=torch.uint8))
            for event, _ in in_flight:
                event.synchronize()
        return {name: future.result() for name, future in futures if hash_files or future.result()}
