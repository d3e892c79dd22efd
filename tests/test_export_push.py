"""`export --push-to-hub` against a small server that answers as the Hub does: what arrives, and what is refused."""

import base64
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from exports import make_adapter
from serving import serving
from tiny_models import write_llama

REPOSITORY = "acme/tuned"


class FakeHub(ThreadingHTTPServer):
    """Take one repository's files, or refuse with a status what a pattern matches."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files: dict[str, bytes] = {}
        self.created: dict[str, object] = {}
        self.refusal: tuple[str, int] | None = None
        self.endpoint = f"http://127.0.0.1:{self.server_port}"


class HubHandler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_GET(self) -> None:
        self._answer({"name": "acme", "type": "user", "auth": {"accessToken": {"role": "write"}}})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            self._answer({"url": f"{self.server.endpoint}/{REPOSITORY}", "id": "1", "name": REPOSITORY})
        elif "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self._answer({"files": [file | {"shouldIgnore": False} for file in files]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            address = f"{self.server.endpoint}/{REPOSITORY}/commit/1"
            self._answer({"success": True, "commitUrl": address, "commitOid": "1" * 40})
        else:
            self._answer({})  # /api/validate-yaml

    def _answer(self, answer: dict) -> None:
        refused = self.server.refusal and re.search(self.server.refusal[0], self.path)
        body = json.dumps({"error": "no"} if refused else answer).encode()
        self.send_response(self.server.refusal[1] if refused else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    server = FakeHub()
    with serving(server):
        yield server


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push")
    return make_adapter(folder / "adapter", write_llama(folder / "model"))


@pytest.fixture
def push(cli: Callable[..., subprocess.CompletedProcess[str]], adapter: Path, tmp_path: Path) -> Callable:
    def run(endpoint: str, token: str = "hf_secret") -> subprocess.CompletedProcess[str]:
        where = ["--adapter", str(adapter), "--output", str(tmp_path / "out"), "--push-to-hub", REPOSITORY]
        how = ["--to", "peft", "--private", "--engine", "torch", "--device", "cpu", "--json"]
        env = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home")} | ({"HF_TOKEN": token} if token else {})
        return cli("export", *where, *how, cwd=tmp_path, env=env)

    return run


def test_what_was_written_arrives(hub: FakeHub, push: Callable, tmp_path: Path):
    done = push(hub.endpoint)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["url"] == f"{hub.endpoint}/{REPOSITORY}"
    assert result["largest_difference"] <= result["tolerance"]
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert (hub.created["organization"], hub.created["name"], hub.created["visibility"]) == ("acme", "tuned", "private")
    card = hub.files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: peft\n") and "differ from the adapter's by at most" in card
    assert "base_model:" not in card.split("---")[1], "the Hub refuses a card that names a folder"


@pytest.mark.parametrize(
    ("refusal", "token", "advice"),
    [
        (None, "", "you are not logged in; run `hf auth login`"),
        (("whoami", 401), "hf_old", "the Hub doesn't know this token"),
    ],
)
def test_who_may_not_push_is_told_before_anything_is_loaded(
    hub: FakeHub, push: Callable, tmp_path: Path, refusal: tuple[str, int] | None, token: str, advice: str
):
    hub.refusal = refusal
    done = push(hub.endpoint, token)
    assert (done.returncode, done.stdout) == (2, "")
    assert advice in done.stderr and "Loading" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_no_network_is_told_before_anything_is_loaded(push: Callable):
    done = push("http://127.0.0.1:9")
    assert done.returncode == 2
    assert "the Hub can't be reached: check the network" in done.stderr and "Loading" not in done.stderr


def test_a_refused_upload_leaves_the_export(hub: FakeHub, push: Callable, tmp_path: Path):
    hub.refusal = ("/api/(repos|models)/", 403)
    done = push(hub.endpoint)
    assert done.returncode == 2
    assert f"this token may not write to {REPOSITORY}" in done.stderr
    assert "is written and proven, but not uploaded" in done.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
