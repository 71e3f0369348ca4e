"""Manifests of exported networks: the SHA-256 hash of each file, and where the network comes from."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linflab.platform.errors import InputError
from linflab.platform.files import exists, open_regular

MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "model.safetensors"
MAX_MANIFEST_BYTES = 2**22
CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class FileHash:
    """Hash and size of a file in a manifest."""

    sha256: str
    num_bytes: int


def parse_manifest(content: bytes, source: str) -> dict[str, FileHash]:
    """Return the hashes in a manifest, which is untrusted, by file name.

    Args:
        content: Content of the manifest.
        source: Path or URL of the manifest, for messages.

    Raises:
        InputError: If the content is not a manifest.
    """
    try:
        files = json.loads(content)["files"]
        return {str(name): _parse_hash(entry) for name, entry in files.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{source}: must be a manifest of `linflab export` ({reason})") from None


def _parse_hash(entry: dict[str, Any]) -> FileHash:
    digest, size = entry["sha256"], entry["bytes"]
    if not (isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) and type(size) is int and size >= 0):
        raise ValueError("a file lacks a SHA-256 hash or a size")
    return FileHash(digest, size)


def verify_file(path: Path) -> None:
    """Compare a file with the manifest in its folder, if there is one.

    Raises:
        InputError: If the manifest is not valid, does not list the file, or lists another hash.
        OSError: If a file cannot be read.
    """
    manifest = path.parent / MANIFEST_FILE
    if not exists(manifest):
        return
    with open_regular(manifest) as file:
        hashes = parse_manifest(file.read(MAX_MANIFEST_BYTES), str(manifest))
    if path.name not in hashes:
        raise InputError(f"{path}: is not in {manifest}; use another copy of the export")
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != hashes[path.name].sha256:
        raise InputError(f"{path}: has another SHA-256 hash than in {manifest}; use another copy of the export")
