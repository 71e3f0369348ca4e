"""Networks in exported folders, at URLs and in repositories of the Hugging Face Hub."""

import errno
import hashlib
import os
import re
import shutil
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from linflab.platform.errors import InputError
from linflab.platform.exchange.manifest import (
    CHUNK_BYTES,
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    WEIGHTS_FILE,
    FileHash,
    parse_manifest,
    verify_file,
)
from linflab.platform.extras import naming_extras
from linflab.platform.files import read_bytes

HUB_PREFIX = "hf://"
MAX_WEIGHTS_BYTES = 2**33
TIMEOUT_S = 30.0  # without data
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


def is_remote(source: str) -> bool:
    """Return whether a text names a network at a URL or in a repository."""
    return source.startswith((HUB_PREFIX, "https://", "http://"))


def fetch_weights(source: str) -> Path:
    """Return the weights file of a remote network; download it first unless it was downloaded before.

    Args:
        source: URL of an exported folder or of its manifest, or `hf://OWNER/NAME` with an optional `@REVISION`.

    Returns:
        Path of `model.safetensors`, with its manifest in the same folder.

    Raises:
        InputError: If the source is not valid or cannot be reached, or a file differs from the manifest.
        ModuleNotFoundError: If the source is a repository and `huggingface_hub` is not installed.
    """
    return _fetch_from_hub(source) if source.startswith(HUB_PREFIX) else _fetch_from_url(source)


def cache_dir() -> Path:
    """Return the folder of downloaded networks: `linflab/networks` in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "linflab" / "networks"


def _fetch_from_url(url: str) -> Path:
    base = url.removesuffix(MANIFEST_FILE).rstrip("/")
    with _open_url(f"{base}/{MANIFEST_FILE}") as answer:
        manifest = answer.read(MAX_MANIFEST_BYTES)
    expected = parse_manifest(manifest, f"{base}/{MANIFEST_FILE}").get(WEIGHTS_FILE)
    if expected is None or expected.num_bytes > MAX_WEIGHTS_BYTES:
        raise InputError(
            f"{url}: its manifest must list {WEIGHTS_FILE}; use a folder of `linflab export --format safetensors`"
        )
    folder = cache_dir() / hashlib.sha256(manifest).hexdigest()
    if not _is_intact(folder, manifest):
        try:
            _download(f"{base}/{WEIGHTS_FILE}", expected, manifest, folder)
        except OSError as error:
            raise InputError(
                f"{folder}: cannot be written ({error}); set XDG_CACHE_HOME to another directory"
            ) from None
    return folder / WEIGHTS_FILE


def _is_intact(folder: Path, manifest: bytes) -> bool:
    """Return whether a folder of the cache has this manifest, and weights with the hash in it."""
    try:
        if read_bytes(folder / MANIFEST_FILE, MAX_MANIFEST_BYTES) != manifest:
            return False
        verify_file(folder / WEIGHTS_FILE)
    except (InputError, OSError):
        return False
    return True


def _download(url: str, expected: FileHash, manifest: bytes, folder: Path) -> None:
    """Download weights with their manifest to a folder, completely or not at all.

    Files of the folder are replaced, since they are damaged, or the same ones from another process.

    Raises:
        InputError: If the weights cannot be downloaded or differ from the manifest.
        OSError: If the folder cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".download-") as temporary:
        partial = Path(temporary) / "network"
        partial.mkdir()
        (partial / MANIFEST_FILE).write_bytes(manifest)
        with _open_url(url) as answer, (partial / WEIGHTS_FILE).open("wb") as file:
            while size <= expected.num_bytes and (chunk := answer.read(CHUNK_BYTES)):
                digest.update(chunk)
                size += len(chunk)
                file.write(chunk)
        if size != expected.num_bytes or digest.hexdigest() != expected.sha256:
            raise InputError(f"{url}: has another size or SHA-256 hash than in its manifest; use another copy")
        try:
            partial.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            _replace_files(partial, folder)


def _replace_files(source: Path, target: Path) -> None:
    """Move manifest and weights between folders of one file system; weights are never there without the manifest."""
    for name in (MANIFEST_FILE, WEIGHTS_FILE):
        os.replace(source / name, target / name)


class _CheckedRedirects(urllib.request.HTTPRedirectHandler):
    """Redirections, whose URLs are checked before anything is sent to them."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        """Return the request that follows a redirection.

        Raises:
            InputError: If its URL can be changed on its way.
        """
        _check_scheme(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Answer:
    """Answer of a server, whose errors name the URL."""

    def __init__(self, url: str, response: "urllib.request._UrlopenRet") -> None:
        self.url, self.response = url, response

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes."""
        try:
            return bytes(self.response.read(size))
        except (OSError, HTTPException) as error:
            raise _unreachable(self.url, error) from None


@contextmanager
def _open_url(url: str) -> Iterator[_Answer]:
    _check_scheme(url)
    try:
        response = urllib.request.build_opener(_CheckedRedirects).open(url, timeout=TIMEOUT_S)
    except InputError:  # of a redirection
        raise
    except (OSError, ValueError, HTTPException) as error:
        raise _unreachable(url, error) from None
    with response:
        yield _Answer(url, response)


def _check_scheme(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in LOCAL_HOSTS):
        raise InputError(f"{url}: must be an https URL, since others can be changed on their way; use https")


def _unreachable(url: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return InputError(
        f"{url}: cannot be read ({reason}); use the URL of a folder of `linflab export --format safetensors`"
    )


def parse_repository(source: str) -> tuple[str, str | None]:
    """Return repository and revision of `OWNER/NAME` or `OWNER/NAME@REVISION`, with or without `hf://`.

    Raises:
        InputError: If the text has another form.
    """
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", source.removeprefix(HUB_PREFIX))
    if match is None:
        raise InputError(
            f"repository={source[:200]}: must be OWNER/NAME or OWNER/NAME@REVISION; use hf://me/my-network"
        )
    return match[1], match[2]


@naming_extras()
def _fetch_from_hub(source: str) -> Path:
    from huggingface_hub import HfApi

    repository, revision = parse_repository(source)
    with _hub_errors(source):
        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        manifest = Path(api.hf_hub_download(repository, MANIFEST_FILE, revision=revision))
        # The commit of the manifest, so that both files are of one version even if another is pushed now.
        weights = Path(api.hf_hub_download(repository, WEIGHTS_FILE, revision=manifest.parent.name))
    return weights


@contextmanager
def _hub_errors(source: str) -> Iterator[None]:
    """Report errors of the Hugging Face Hub as errors of the input."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
    )

    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, LocalTokenNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"repository={source}: cannot be used ({reason}); check its name, run `hf auth login`, or set HF_ENDPOINT"
        ) from None


@naming_extras()
def push_folder(folder: Path, repository: str, is_private: bool) -> str:
    """Upload an exported folder to a repository of the Hugging Face Hub, which is created if necessary.

    Args:
        folder: Folder of an export, with its manifest.
        repository: `OWNER/NAME`.
        is_private: Whether a new repository is private.

    Returns:
        The uploaded version as `hf://OWNER/NAME@COMMIT`.

    Raises:
        InputError: If the repository cannot be written.
        ModuleNotFoundError: If `huggingface_hub` is not installed.
    """
    from huggingface_hub import HfApi

    name, revision = parse_repository(repository)
    if revision is not None:
        raise InputError(f"repository={repository}: must be without a revision, since a push makes one; use {name}")
    with _hub_errors(repository):
        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        api.create_repo(name, private=is_private, exist_ok=True)
        commit = api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload from linflab")
    return f"{HUB_PREFIX}{name}@{commit.oid}"


def copy_network(weights: Path, output_dir: Path) -> list[Path]:
    """Copy downloaded weights and their manifest to a folder, and return the paths of the copies.

    Both files appear whole, the manifest first, so that an interrupted copy leaves no weights without a hash and can be
    repeated.

    Raises:
        InputError: If the folder cannot be written, or has other files of these names, or the weights differ from the
            manifest.
    """
    targets = [output_dir / name for name in (WEIGHTS_FILE, MANIFEST_FILE)]
    if existing := [str(path) for path in targets if os.path.lexists(path) and not _is_first_half(path, weights)]:
        raise InputError(f"output-dir={output_dir}: has {existing[0]}; use a new or empty directory")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        # Inside the folder, which may be a mounted file system of its own, to which nothing can be renamed.
        with tempfile.TemporaryDirectory(dir=output_dir, prefix=".copy-") as temporary:
            for target in targets:
                shutil.copyfile(weights.parent / target.name, Path(temporary) / target.name)
            verify_file(Path(temporary) / WEIGHTS_FILE)
            _replace_files(Path(temporary), output_dir)
    except OSError as error:
        raise InputError(f"output-dir={output_dir}: cannot be written ({error}); use another directory") from None
    return targets


def _is_first_half(path: Path, weights: Path) -> bool:
    """Return whether a file is the manifest of the weights, which an interrupted copy wrote before them."""
    try:
        return path.name == MANIFEST_FILE and read_bytes(path, MAX_MANIFEST_BYTES) == read_bytes(
            weights.parent / MANIFEST_FILE, MAX_MANIFEST_BYTES
        )
    except OSError:
        return False
