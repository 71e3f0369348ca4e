"""Exported networks in folders, at URLs and in repositories; the servers run on this machine."""

import base64
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import linflab
from linflab.platform.errors import InputError
from linflab.platform.exchange.manifest import MANIFEST_FILE, WEIGHTS_FILE
from linflab.platform.results import sharing
from linflab.platform.training.weights import load_weights
from tests.conftest import FinishedTraining, RunCli, assert_rejected

pytest.importorskip("huggingface_hub", reason="requires the extra hub (huggingface_hub)")
TOKEN = "hf_token_of_this_test"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def exported(tmp_path: Path, run_cli: RunCli, finished_training: FinishedTraining) -> Path:
    """The network of the finished run as safetensors, with its manifest."""
    folder = tmp_path / "exported"
    options = ["--format", "safetensors", "--output-dir", str(folder), "--storage", str(finished_training.storage)]
    assert run_cli("export", finished_training.id, *options).returncode == 0
    return folder


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


class Hub(BaseHTTPRequestHandler):
    """The part of the Hugging Face Hub that pushes and pulls use, for regular files."""

    commits: dict[str, dict[str, bytes]]  # files by commit
    created: list[dict[str, object]]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "invalid token"}, 401)
        elif self.path == "/api/repos/create":
            self.created.append(json.loads(body))
            self.answer({"url": "http://127.0.0.1/me/net"})
        elif self.path.startswith("/api/models/me/net/preupload/"):
            files = [one["path"] for one in json.loads(body)["files"]]
            self.answer({"files": [{"path": one, "uploadMode": "regular", "shouldIgnore": False} for one in files]})
        elif self.path.startswith("/api/models/me/net/commit/"):
            entries = [json.loads(line) for line in body.splitlines()]
            files = {
                one["value"]["path"]: base64.b64decode(one["value"]["content"])
                for one in entries
                if one["key"] == "file"
            }
            commit = hashlib.sha1(body).hexdigest()
            self.commits[commit] = files
            url = f"http://127.0.0.1/me/net/commit/{commit}"
            self.answer({"success": True, "commitOid": commit, "commitUrl": url})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        else:
            self.answer({"error": "not found"}, 404)

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].split("/")
        if parts[1:3] == ["api", "models"]:
            if self.commits:
                self.answer({"id": "me/net", "sha": list(self.commits)[-1], "siblings": []})
            else:
                self.answer({"error": "Repository not found"}, 404)
            return
        _, owner, name, _, revision, file = parts if len(parts) == 6 else ["", "", "", "", "", ""]
        commit = list(self.commits)[-1] if revision == "main" and self.commits else revision
        if (owner, name) != ("me", "net") or file not in self.commits.get(commit, {}):
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound" if (owner, name) != ("me", "net") else "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = self.commits[commit][file]
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET


def serve(handler: object) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:  # type: ignore[arg-type]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    yield from serve(partial(Quiet, directory=str(tmp_path)))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    """A hub on this machine, with one repository `me/net`, which it creates on demand."""
    from huggingface_hub import constants

    handler = type("OneHub", (Hub,), {"commits": {}, "created": []})
    for url in serve(handler):
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_ENDPOINT", url)
        yield handler


def assert_same_network(found: torch.nn.Module, finished_training: FinishedTraining) -> None:
    expected = load_weights(finished_training.weights).network
    images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found(images), expected(images)) and not found.training


def test_folders_and_files_are_loaded(exported: Path, finished_training: FinishedTraining) -> None:
    assert_same_network(linflab.load(exported), finished_training)
    assert_same_network(linflab.load(exported / WEIGHTS_FILE), finished_training)
    (exported / MANIFEST_FILE).unlink()
    assert_same_network(linflab.load(exported / WEIGHTS_FILE), finished_training)


def test_certify_takes_an_exported_folder(exported: Path, run_cli: RunCli, tmp_path: Path) -> None:
    import numpy as np

    np.save(tmp_path / "images.npy", np.zeros((2, 1, 8, 8), np.uint8))
    done = run_cli("certify", str(exported), str(tmp_path / "images.npy"), "--json")
    assert done.returncode == 0 and len(json.loads(done.stdout)) == 2, done.stderr


def test_changed_weights_are_rejected(exported: Path) -> None:
    content = bytearray((exported / WEIGHTS_FILE).read_bytes())
    content[-1] ^= 1
    (exported / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(InputError) as caught:
        linflab.load(exported)
    assert_rejected(caught, WEIGHTS_FILE, MANIFEST_FILE, "SHA-256")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"files": {"a": 1}}', b'{"files": {"a": {"sha256": "0", "bytes": 1}}}']
)
def test_damaged_manifests_are_rejected(exported: Path, content: bytes) -> None:
    (exported / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(InputError) as caught:
        linflab.load(exported)
    assert_rejected(caught, MANIFEST_FILE)


@pytest.mark.parametrize("suffix", ["exported", "exported/", f"exported/{MANIFEST_FILE}"])
def test_urls_are_downloaded_once(
    exported: Path, site: str, suffix: str, finished_training: FinishedTraining, cache: Path
) -> None:
    assert_same_network(linflab.load(f"{site}/{suffix}"), finished_training)
    (exported / WEIGHTS_FILE).unlink()
    assert_same_network(linflab.load(f"{site}/{suffix}"), finished_training)
    assert len(list((cache / "linflab" / "networks").iterdir())) == 1


@pytest.mark.parametrize("change", [lambda content: content + b"1", lambda content: content[:-1] + b"\1"])
def test_downloads_that_differ_from_the_manifest_leave_nothing(
    exported: Path, site: str, cache: Path, change: object
) -> None:
    (exported / WEIGHTS_FILE).write_bytes(change((exported / WEIGHTS_FILE).read_bytes()))  # type: ignore[operator]
    with pytest.raises(InputError) as caught:
        linflab.load(f"{site}/exported")
    assert_rejected(caught, f"{site}/exported/{WEIGHTS_FILE}", "SHA-256")
    assert list((cache / "linflab" / "networks").iterdir()) == []


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\1")])
@pytest.mark.parametrize("name", [WEIGHTS_FILE, MANIFEST_FILE])
def test_damaged_files_of_the_cache_are_downloaded_again(
    exported: Path, site: str, cache: Path, finished_training: FinishedTraining, damage: object, name: str
) -> None:
    weights = sharing.fetch_weights(f"{site}/exported")
    damage(weights.parent / name)  # type: ignore[operator]
    assert sharing.fetch_weights(f"{site}/exported") == weights
    assert (weights.parent / name).read_bytes() == (exported / name).read_bytes()
    assert_same_network(linflab.load(f"{site}/exported"), finished_training)
    assert list((cache / "linflab" / "networks").iterdir()) == [weights.parent]


def test_simultaneous_downloads_share_the_cache(exported: Path, tmp_path: Path, cache: Path) -> None:
    waiting = threading.Barrier(2, timeout=60)

    class Together(Quiet):
        def do_GET(self) -> None:
            if self.path.endswith(WEIGHTS_FILE):  # each download has found the cache empty
                waiting.wait()
            super().do_GET()

    for url in serve(partial(Together, directory=str(tmp_path))):
        with ThreadPoolExecutor(2) as pool:
            first, second = pool.map(sharing.fetch_weights, [f"{url}/exported"] * 2)
    assert first == second and first.read_bytes() == (exported / WEIGHTS_FILE).read_bytes()
    assert list((cache / "linflab" / "networks").iterdir()) == [first.parent]


def test_redirections_are_checked_before_they_are_followed(exported: Path, tmp_path: Path, site: str) -> None:
    reached = []

    class Insecure(Quiet):
        def do_GET(self) -> None:
            reached.append(self.path)

    class Redirect(Quiet):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", f"{target}{self.path}")
            self.end_headers()

    for insecure in serve(partial(Insecure, directory=str(tmp_path))):
        for url in serve(partial(Redirect, directory=str(tmp_path))):
            # 127.0.0.2 is this machine too, but not one of the names that need no https.
            target = insecure.replace("127.0.0.1", "127.0.0.2")
            with pytest.raises(InputError) as caught:
                sharing.fetch_weights(f"{url}/exported")
            assert_rejected(caught, f"{target}/exported/{MANIFEST_FILE}", "https")
            target = site
            assert sharing.fetch_weights(f"{url}/exported").exists()
    assert reached == []


def test_insecure_and_missing_urls_are_rejected(site: str) -> None:
    with pytest.raises(InputError) as caught:
        linflab.load("http://example.org/network")
    assert_rejected(caught, "https")
    with pytest.raises(InputError) as caught:
        linflab.load(f"{site}/absent")
    assert_rejected(caught, f"{site}/absent/{MANIFEST_FILE}", "linflab export")


def test_pushed_network_is_pulled(
    hub: type[Hub], run_cli: RunCli, finished_training: FinishedTraining, tmp_path: Path
) -> None:
    done = run_cli("push", finished_training.id, "me/net", "--private", "--storage", str(finished_training.storage))
    assert done.returncode == 0, done.stderr
    assert "private" in (hub.created[0].get("visibility"), *hub.created[0])
    (commit,) = hub.commits
    assert f"hf://me/net@{commit}" in done.stdout and MANIFEST_FILE in hub.commits[commit]
    manifest = json.loads(hub.commits[commit][MANIFEST_FILE])
    assert manifest["certifier"] and manifest["certified"] is not None
    assert_same_network(linflab.load("hf://me/net"), finished_training)
    pulled = run_cli("pull", f"hf://me/net@{commit}", "--output-dir", str(tmp_path / "pulled"))
    assert pulled.returncode == 0, pulled.stderr
    assert_same_network(linflab.load(tmp_path / "pulled"), finished_training)
    again = run_cli("pull", "me/net", "--output-dir", str(tmp_path / "pulled"))
    assert_rejected(again, "output-dir")


def test_repositories_that_cannot_be_used_are_rejected(
    hub: type[Hub], run_cli: RunCli, finished_training: FinishedTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    push = ["push", finished_training.id]
    storage = ["--storage", str(finished_training.storage)]
    assert_rejected(run_cli(*push, "nowhere", *storage), "repository=nowhere", "OWNER/NAME")
    assert_rejected(run_cli(*push, "me/net@main", *storage), "repository=me/net@main")
    with pytest.raises(InputError) as caught:
        linflab.load("hf://me/absent")
    assert_rejected(caught, "repository=hf://me/absent", "hf auth login")
    with pytest.raises(InputError) as caught:  # a name that the Hub does not allow
        linflab.load("hf://me/my--net")
    assert_rejected(caught, "repository=hf://me/my--net")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert_rejected(run_cli(*push, "me/net", *storage), "repository=me/net", "hf auth login")
    assert hub.commits == {}


def test_changed_pushes_are_rejected(
    hub: type[Hub], run_cli: RunCli, finished_training: FinishedTraining, tmp_path: Path
) -> None:
    assert run_cli("push", finished_training.id, "me/net", "--storage", str(finished_training.storage)).returncode == 0
    (files,) = hub.commits.values()
    files[WEIGHTS_FILE] = files[WEIGHTS_FILE][:-1] + b"\1"
    assert_rejected(run_cli("pull", "me/net", "--output-dir", str(tmp_path / "pulled")), WEIGHTS_FILE, "SHA-256")
    assert not (tmp_path / "pulled").exists()


def test_copies_need_an_empty_place(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError) as caught:
        sharing.copy_network(exported / WEIGHTS_FILE, tmp_path / "file" / "folder")
    assert_rejected(caught, "output-dir")
    shutil.rmtree(tmp_path / "exported")


@pytest.mark.parametrize("failing", [MANIFEST_FILE, WEIGHTS_FILE])
def test_interrupted_copies_leave_no_unverified_weights_and_are_repeated(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    replace = os.replace

    def interrupt(source: Path, target: Path) -> None:
        if target.name == failing:
            raise KeyboardInterrupt
        replace(source, target)

    copy = tmp_path / "copy"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", interrupt)
        sharing.copy_network(exported / WEIGHTS_FILE, copy)
    assert {path.name for path in copy.iterdir()} <= {MANIFEST_FILE}
    sharing.copy_network(exported / WEIGHTS_FILE, copy)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == {
        name: (exported / name).read_bytes() for name in (MANIFEST_FILE, WEIGHTS_FILE)
    }
    with pytest.raises(InputError) as caught:
        sharing.copy_network(exported / WEIGHTS_FILE, copy)
    assert_rejected(caught, "output-dir", WEIGHTS_FILE)
