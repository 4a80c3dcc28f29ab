"""Where a checkpoint's files are: a local directory, or a Hugging Face id found in the local cache.

The network is used only where the caller says so. A backbone (``vlm_name_or_path``) gives its configuration and its
tokenizer; its weights are never fetched, because the checkpoint holds them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from flashdrive_node.bundled import BUNDLED, bundled_checkpoint
from flashdrive_node.model.config import ALPAMAYO_1_5, ALPAMAYO_R1, AlpamayoConfig
from flashdrive_node.model.config_parser import parse_config
from flashdrive_node.model.errors import CheckpointError, ConfigError

#: Files of the tokenizer and processor that a checkpoint or backbone may have.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_BACKBONE_PATTERNS = ["*.json", "*.txt", "*.jinja"]
_CHECKPOINT_PATTERNS = ["*.safetensors", *_BACKBONE_PATTERNS]


def resolve_source(
    name_or_path: str | Path,
    revision: str | None = None,
    allow_download: bool = False,
    cache_dir: Path | None = None,
) -> Path:
    """Directory of a checkpoint.

    Args:
        name_or_path: A directory, a Hugging Face id such as ``nvidia/Alpamayo-1.5-10B``, or "bundled".
        revision: Branch, tag or commit of the id; for a directory it must be None.
        allow_download: Fetch what the local cache lacks. Without it the network is not touched.
        cache_dir: Hugging Face cache; None for the one that the environment (HF_HOME, HF_HUB_CACHE) names.

    Raises:
        CheckpointError: There is no such directory, or the cache does not have the id; says how to get it.
    """
    return _resolve(str(name_or_path), revision, allow_download, cache_dir, _CHECKPOINT_PATTERNS)


def _resolve(
    name: str, revision: str | None, allow_download: bool, cache_dir: Path | None, patterns: list[str]
) -> Path:
    path = bundled_checkpoint() if name == BUNDLED else Path(name).expanduser()
    if name and path.is_dir():
        if revision is not None:
            raise CheckpointError(name, [f"revision {revision!r} needs a Hugging Face id, found a local directory"])
        return path
    if name and path.exists():
        raise CheckpointError(name, ["a checkpoint directory is required, found a file; give the directory it is in"])
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(
            name or "checkpoint",
            ["no such directory; a directory or a Hugging Face id such as nvidia/Alpamayo-1.5-10B is required"],
        )
    from huggingface_hub import snapshot_download  # half a second to import
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=not allow_download,
                allow_patterns=patterns,
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        at = f"{name} at revision {revision}" if revision else name
        option = f" --revision {revision}" if revision else ""
        if allow_download:
            problem = f"could not be fetched: {error}. Gated models need an accepted licence and 'hf auth login'"
        else:
            problem = (
                f"no such directory, and not in the Hugging Face cache {cache_dir or HF_HUB_CACHE}; "
                f"fetch it with 'hf download {name}{option}', or allow downloads (--allow-download)"
            )
        raise CheckpointError(at, [problem]) from error


def snapshot_revision(directory: Path) -> str:
    """Commit of a directory inside a Hugging Face cache (``.../snapshots/COMMIT``), else an empty string."""
    directory = directory.absolute()
    return directory.name if directory.parent.name == "snapshots" else ""


def backbone_directory(
    directory: Path, vlm_name_or_path: str, allow_download: bool = False, cache_dir: Path | None = None
) -> Path:
    """Directory of ``vlm_name_or_path``: a path relative to the checkpoint where there is one, else a Hugging Face id.

    Raises:
        CheckpointError: Neither is there.
    """
    relative = directory / vlm_name_or_path
    if vlm_name_or_path and relative.is_dir():
        return relative
    try:
        return _resolve(vlm_name_or_path, None, allow_download, cache_dir, _BACKBONE_PATTERNS)
    except CheckpointError as error:
        problems = [f"'vlm_name_or_path' {vlm_name_or_path!r} (tried {relative} first): {p}" for p in error.problems]
        raise CheckpointError(str(directory), problems) from error


def read_config(directory: Path, allow_download: bool = False, cache_dir: Path | None = None) -> AlpamayoConfig:
    """Architecture of the checkpoint in `directory`, from its ``config.json`` and its backbone's.

    Raises:
        ConfigError: A file is missing or no JSON object, or what it says cannot be used; lists every problem.
        CheckpointError: The backbone cannot be found.
    """
    model = read_json(directory / "config.json")
    problems = []
    if model.get("model_type") not in (ALPAMAYO_1_5, ALPAMAYO_R1):
        problems.append(
            f"key 'model_type' must be {ALPAMAYO_1_5!r} or {ALPAMAYO_R1!r}, found {model.get('model_type')!r}"
        )
    name = model.get("vlm_name_or_path")
    if not isinstance(name, str) or not name:
        problems.append(
            "key 'vlm_name_or_path' (a path relative to the checkpoint, or a Hugging Face id) is required, "
            f"found {name!r}"
        )
    if problems:
        raise ConfigError(str(directory / "config.json"), problems)
    vlm = read_json(backbone_directory(directory, str(name), allow_download, cache_dir) / "config.json")
    return parse_config(model, vlm, str(directory))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ConfigError: It cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror or error}"]) from error
    except ValueError as error:
        raise ConfigError(str(path), [f"not JSON: {error}"]) from error
    if not isinstance(content, dict):
        raise ConfigError(str(path), [f"a JSON object is required, found {content!r:.40}"])
    return content


def has_tokenizer(directory: Path) -> bool:
    """Whether a tokenizer can be built from the files in `directory`."""
    return (directory / "tokenizer.json").is_file() or all(
        (directory / name).is_file() for name in ("vocab.json", "merges.txt")
    )


def tokenizer_directory(
    directory: Path, config: AlpamayoConfig, allow_download: bool = False, cache_dir: Path | None = None
) -> Path:
    """Directory of the tokenizer files: the checkpoint itself where it has them, else its backbone.

    Raises:
        CheckpointError: Neither has them.
    """
    if has_tokenizer(directory):
        return directory
    backbone = backbone_directory(directory, config.vlm_name_or_path, allow_download, cache_dir)
    if not has_tokenizer(backbone):
        raise CheckpointError(
            str(directory),
            [f"tokenizer.json, or vocab.json and merges.txt, is required here or in {backbone}; found neither"],
        )
    return backbone
