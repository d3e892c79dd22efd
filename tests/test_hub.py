"""Base models from the Hub: a small server answers as the Hub does, and every way to fail ends in good advice."""

import hashlib
import json
import socket
import subprocess
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from serving import serving

from common.base.hub import resolve_model
from common.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "acme/tiny"
LINE = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}


class FakeHub(ThreadingHTTPServer):
    """Serve one model folder under the Hub's addresses, or refuse everything with a status and an error code."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.model: Path | None = None
        self.refusal: tuple[int, str] | None = None
        self.endpoint = f"http://127.0.0.1:{self.server_port}"


class HubHandler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_GET(self) -> None:
        if self.server.refusal:
            status, code = self.server.refusal
            self._send(status, b"{}", {"X-Error-Code": code} if code else {})
            return
        path = self.path.partition("?")[0]
        files = {file.name: file for file in self.server.model.iterdir()}
        if path.startswith(f"/api/models/{NAME}/tree/"):
            tree = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": self._etag(file)}
                for name, file in files.items()
            ]
            self._send(200, json.dumps(tree).encode())
        elif path.startswith(f"/api/models/{NAME}"):
            self._send(200, json.dumps({"id": NAME, "sha": COMMIT, "siblings": []}).encode())
        elif (file := files.get(path.rpartition("/")[2])) is not None:
            self._send(200, file.read_bytes(), {"ETag": f'"{self._etag(file)}"', "X-Repo-Commit": COMMIT})
        else:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Keep quiet."""

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _etag(self, file: Path) -> str:
        return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    server = FakeHub()
    with serving(server):
        yield server


@pytest.fixture
def preview(cli: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> Callable:
    """Run `preview`, the quickest verb that needs a model, on a base of some name."""
    (tmp_path / "train.jsonl").write_text(json.dumps(LINE) + "\n")

    def run(name: str, endpoint: str = "", revision: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        config = {"model_name_or_path": name, "revision": revision or None, "data": {"train": "train.jsonl"}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        at = {"HF_ENDPOINT": endpoint} if endpoint else {}
        env = {"HF_HOME": str(tmp_path / "hub-cache")} | at | env
        return cli("preview", "--config", "config.json", cwd=tmp_path, env=env)

    return run


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    assert (done.returncode, done.stdout) == (2, "")
    *progress, message = done.stderr.splitlines()
    assert message.startswith("error: ") and all(line.startswith("Fetching") for line in progress if line)
    return message


def test_a_model_is_downloaded_once_and_then_found_without_the_hub(hub: FakeHub, preview: Callable, tiny_model: Path):
    hub.model = tiny_model
    done = preview(NAME, hub.endpoint)
    assert done.returncode == 0, done.stderr
    assert "[[yes<|im_end|>]]" in done.stdout
    hub.refusal = (503, "")
    assert preview(NAME, hub.endpoint).stdout == done.stdout
    assert preview(NAME, "http://127.0.0.1:9").stdout == done.stdout
    assert preview(NAME, HF_HUB_OFFLINE="1").stdout == done.stdout


@pytest.mark.parametrize(
    ("status", "code", "advice"),
    [
        (401, "GatedRepo", "accept its licence at https://huggingface.co/acme/tiny, then log in with `hf auth login`"),
        (403, "GatedRepo", "accept its licence at https://huggingface.co/acme/tiny, then log in with `hf auth login`"),
        (404, "RepoNotFound", "no such model, or it is private; check the spelling, log in with `hf auth login`"),
        (404, "RevisionNotFound", "no revision 'v9' of it; check the branch, tag or commit"),
        (401, "", "401 Unauthorized"),
        (500, "", "500 Internal Server Error"),
    ],
)
def test_what_the_hub_refuses_is_explained(hub: FakeHub, preview: Callable, status: int, code: str, advice: str):
    hub.refusal = (status, code)
    message = refusal(preview(NAME, hub.endpoint, "v9"))
    assert message.startswith(f"error: {NAME}: ") and advice in message
    assert code == "RevisionNotFound" or "or download it elsewhere and give the path of the folder" in message


def test_a_repository_without_a_transformers_model_is_refused(hub: FakeHub, preview: Callable, tmp_path: Path):
    hub.model = tmp_path / "repository"
    hub.model.mkdir()
    (hub.model / "generation_config.json").write_text("{}")
    assert "has no config.json; expected a Hugging Face model folder" in refusal(preview(NAME, hub.endpoint))


def test_no_network_is_said_at_once(preview: Callable):
    message = refusal(preview(NAME, "http://127.0.0.1:9"))
    assert "no such folder here, and the Hub gives no model" in message
    assert "check the name, the network and HF_TOKEN, or download it elsewhere and give the path" in message


def test_a_network_that_swallows_everything_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Behind a firewall the hub library alone would wait for ever, and this test with it."""
    monkeypatch.setattr("common.base.hub.ANSWER_SECONDS", 0.5)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(UserError, match=r"the Hub gives no model .timed out.; check the name, the network"):
            resolve_model(NAME)


def test_offline_mode_is_named(preview: Callable):
    assert "HF_HUB_OFFLINE" in refusal(preview(NAME, HF_HUB_OFFLINE="1"))


@pytest.mark.parametrize("name", ["nosuch", "./acme/tiny", "models/tiny", "a/b/c", "/acme/tiny", "~/acme/tiny"])
def test_what_can_be_no_hub_name_is_called_a_missing_folder(name: str):
    with pytest.raises(UserError) as error:
        resolve_model(name)
    assert (
        f"model_name_or_path: {name}: no such folder; expected a local model folder or a Hub name" in f"{error.value}"
    )


def test_a_name_the_hub_forbids_is_refused_with_its_rule(preview: Callable):
    assert "a b/c!: neither a folder nor a Hub name: Repo id must use alphanumeric" in refusal(preview("a b/c!"))


def test_a_file_in_place_of_a_folder_is_told_of_convert(tmp_path: Path):
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(UserError, match=r"model.gguf: a file; expected a model folder \(twintune convert makes one"):
        resolve_model(str(tmp_path / "model.gguf"))


def test_an_estimate_fetches_no_weights(hub: FakeHub, preview: Callable, cli: Callable, tiny_model: Path, tmp_path):
    hub.model = tiny_model
    values = {"model_name_or_path": NAME, "data": {"train": "train.jsonl"}}
    (tmp_path / "hub.json").write_text(json.dumps(values))
    env = {"HF_HOME": str(tmp_path / "hub-cache"), "HF_ENDPOINT": hub.endpoint}
    done = cli("estimate", "--config", "hub.json", "--json", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["memory_bytes"]["weights"] > 0 and found["seconds_per_epoch"] is None
    assert not list((tmp_path / "hub-cache").rglob("*.safetensors"))
    hub.refusal = (404, "RepoNotFound")
    (tmp_path / "hub.json").write_text(json.dumps(values | {"model_name_or_path": "acme/other"}))
    assert "no such model" in refusal(cli("estimate", "--config", "hub.json", "--json", cwd=tmp_path, env=env))
