"""Where checkpoints are found: directories, and a Hugging Face cache, without ever touching the network."""

import shutil
import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from flashdrive_node.model.errors import CheckpointError
from flashdrive_node.model.source import (
    backbone_directory,
    read_config,
    resolve_source,
    snapshot_revision,
    tokenizer_directory,
)
from support.checkpoints import BUNDLED, STUB, edit_json, load

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME, BACKBONE = "nvidia/Alpamayo-1.5-10B", "nvidia/Cosmos-Reason2-8B"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every attempt to reach another machine is an error, and is remembered."""
    attempts: list[Any] = []

    def refuse(*args: Any, **_: Any) -> NoReturn:
        attempts.append(args)
        raise OSError("the network was used")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return attempts


def put_into_cache(cache: Path, name: str, source: Path, commit: str = COMMIT) -> Path:
    """The layout of the Hugging Face cache: blobs, snapshots of links to them, and refs."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    for path in source.iterdir():
        blob = repository / "blobs" / f"{commit[:8]}-{path.name}"
        shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    (repository / "refs" / "main").write_text(commit)
    return snapshot


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache with the bundled checkpoint under the release's name, its backbone under its own."""
    shutil.copytree(BUNDLED, tmp_path / "edited")
    edit_json(tmp_path / "edited" / "config.json", vlm_name_or_path=BACKBONE)
    put_into_cache(tmp_path / "cache", NAME, tmp_path / "edited")
    put_into_cache(tmp_path / "cache", BACKBONE, STUB)
    return tmp_path / "cache"


def test_directory_is_taken_as_it_is() -> None:
    assert resolve_source(BUNDLED) == BUNDLED
    assert resolve_source(str(BUNDLED)) == BUNDLED
    assert snapshot_revision(BUNDLED) == ""


def test_id_is_found_in_the_cache(cache: Path, no_network: list[Any]) -> None:
    for revision in (None, "main", COMMIT):
        directory = resolve_source(NAME, revision, cache_dir=cache)
        assert snapshot_revision(directory) == COMMIT
    config = read_config(directory, cache_dir=cache)
    assert config.vlm_name_or_path == BACKBONE
    assert tokenizer_directory(directory, config, cache_dir=cache) == backbone_directory(
        directory, BACKBONE, cache_dir=cache
    )
    model, info = load(directory, config=config)
    assert info.revision == COMMIT
    assert torch.equal(model.language.lm_head.weight, load(BUNDLED)[0].language.lm_head.weight)
    assert not no_network


def test_id_that_is_not_cached_says_how_to_get_it(cache: Path, no_network: list[Any]) -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve_source("z-lab/Alpamayo-R1-10B", "v2", cache_dir=cache)
    message = str(caught.value)
    assert f"not in the Hugging Face cache {cache}" in message
    assert "hf download z-lab/Alpamayo-R1-10B --revision v2" in message
    assert not no_network


def test_revision_that_is_not_cached(cache: Path, no_network: list[Any]) -> None:
    with pytest.raises(CheckpointError, match="at revision dev"):
        resolve_source(NAME, "dev", cache_dir=cache)
    assert not no_network


def test_download_is_tried_when_allowed(cache: Path, no_network: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(CheckpointError, match="could not be fetched"):
        resolve_source("z-lab/Alpamayo-R1-10B", allow_download=True, cache_dir=cache)
    assert no_network


def test_backbone_beside_the_checkpoint_wins_over_an_id(cache: Path, tmp_path: Path) -> None:
    directory = tmp_path / "edited"
    shutil.copytree(STUB, directory / BACKBONE)
    assert backbone_directory(directory, BACKBONE, cache_dir=cache) == directory / BACKBONE


def test_backbone_that_is_nowhere(cache: Path, tmp_path: Path) -> None:
    shutil.rmtree(cache / f"models--{BACKBONE.replace('/', '--')}")
    with pytest.raises(CheckpointError, match=rf"'vlm_name_or_path' '{BACKBONE}' \(tried .* first\): .*hf download"):
        read_config(tmp_path / "edited", cache_dir=cache)


def test_tokenizer_of_the_checkpoint_wins(tmp_path: Path) -> None:
    config = read_config(BUNDLED)
    assert tokenizer_directory(BUNDLED, config).samefile(STUB)
    own = Path(shutil.copytree(BUNDLED, tmp_path / "own"))
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(STUB / name, own / name)
    assert tokenizer_directory(own, config) == own


def test_tokenizer_that_is_nowhere(tmp_path: Path) -> None:
    own = Path(shutil.copytree(BUNDLED, tmp_path / "own"))
    backbone = tmp_path / "vlm_stub"
    backbone.mkdir()
    shutil.copyfile(STUB / "config.json", backbone / "config.json")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json, or vocab\.json and merges\.txt, is required here or"):
        tokenizer_directory(own, read_config(own))


@pytest.mark.parametrize(
    ("name", "revision", "reason"),
    [
        ("/no/such/directory", None, "no such directory; a directory or a Hugging Face id"),
        ("one-word", None, "no such directory; a directory or a Hugging Face id"),
        ("", None, "no such directory; a directory or a Hugging Face id"),
        (str(BUNDLED / "model.safetensors"), None, "a checkpoint directory is required, found a file"),
        (str(BUNDLED), "main", "revision 'main' needs a Hugging Face id, found a local directory"),
    ],
)
def test_names_that_lead_nowhere(name: str, revision: str | None, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        resolve_source(name, revision)
