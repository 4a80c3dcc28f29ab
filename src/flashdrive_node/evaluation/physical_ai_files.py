"""The files of the PhysicalAI-Autonomous-Vehicles dataset, without the network.

``physical_ai_av`` looks for files in a Hugging Face cache and else downloads them. Here it finds them in a plain copy
of the repository as well, and never asks for more.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from physical_ai_av import PhysicalAIAVDatasetInterface

from flashdrive_node.model.errors import InputError

REPOSITORY = "nvidia/PhysicalAI-Autonomous-Vehicles"
#: The file that every copy of the repository has at its top.
_INDEX = "clip_index.parquet"


class OfflineDataset(PhysicalAIAVDatasetInterface):
    """The package's own reader over a directory of the repository's files."""

    def __init__(self, directory: Path):
        """Read the index of the dataset in `directory`."""
        self._directory = directory
        super().__init__(revision="local", repo_id=REPOSITORY, token=False)

    @property
    def is_offline_mode(self) -> bool:
        """True: a file that is not there is an error."""
        return True

    @is_offline_mode.setter
    def is_offline_mode(self, value: bool) -> None:
        """The package sets it from the environment, which does not count here."""

    def _get_cached_path(self, filename: str) -> str | None:
        path = self._directory / filename
        return str(path) if path.is_file() else None

    def download_file(self, filename: str, **kwargs: Any) -> str:
        """Path of a file of the dataset.

        Raises:
            FileNotFoundError: It is not there.
        """
        path = self._get_cached_path(filename)
        if path is None:
            raise FileNotFoundError(f"{self._directory / filename}: a file of the dataset is required, found nothing")
        return path

    def clip_ids(self) -> list[str]:
        """All clips of the index."""
        return [str(clip_id) for clip_id in self.clip_index.index]

    def has(self, clip_id: str, features: Sequence[str]) -> bool:
        """Whether the files of some features of a clip are there."""
        presence = self.feature_presence
        return all(
            (name not in presence.columns or bool(presence.at[clip_id, name]))
            and self.is_file_cached(self._get_clip_feature_filename(clip_id, name))
            for name in features
        )

    def read(self, clip_id: str, feature: str) -> Any:
        """One feature of one clip, decoded by the package.

        Raises:
            FileNotFoundError: Its file is not there.
            ValueError, KeyError: Its content is not what the package expects.
        """
        return self.get_clip_feature(clip_id, feature, maybe_stream=False)


def open_dataset(directory: Path) -> OfflineDataset:
    """Open a copy of the repository, or the newest snapshot of a Hugging Face cache.

    Raises:
        InputError: There is neither, or its index cannot be read.
    """
    snapshots = directory / f"datasets--{REPOSITORY.replace('/', '--')}" / "snapshots"
    found = [directory, *sorted(snapshots.glob("*"), key=lambda p: p.stat().st_mtime, reverse=True)]
    root = next((path for path in found if (path / _INDEX).is_file()), None)
    if root is None:
        raise InputError(
            f"{directory}: a copy of {REPOSITORY} with {_INDEX} is required, or a Hugging Face cache that holds one, "
            "found neither"
        )
    try:
        return OfflineDataset(root)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{root}: its index cannot be read: {type(error).__name__}: {error}") from error
