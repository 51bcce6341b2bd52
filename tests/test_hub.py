"""Models in Hugging Face repositories, against a stand-in for the Hub that holds its files in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from tiny import TINY, randomize

from cavmae_fast import CAVMAE
from cavmae_fast.models import hub
from cavmae_fast.models.hub import HubError

COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """What the client asks of a Hub to make a repository, to commit small files, and to read them."""

    files: dict[str, dict[str, bytes]]

    def answer(self, value: object = None, status: int = 200, body: bytes = b"", **headers: str) -> None:
        content = json.dumps(value).encode() if value is not None else body
        self.send_response(status)
        for name, text in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            asked = json.loads(sent)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.files.setdefault(name, {})
            self.answer({"url": f"{self.address}/{name}", "name": name, "id": name})
        elif match := re.match(r"/api/models/([^/]+/[^/]+)/preupload/", self.path):
            plan = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(sent)["files"]]
            self.answer({"files": plan})
        elif match := re.match(r"/api/models/([^/]+/[^/]+)/commit/", self.path):
            for line in map(json.loads, sent.splitlines()):
                if line["key"] == "file":
                    self.files[match[1]][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{self.address}/{match[1]}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self.answer({"error": f"unexpected POST {self.path}"}, 500)

    def do_GET(self) -> None:
        if match := re.match(r"/api/models/([^/]+/[^/]+?)(/revision/[^/?]+)?(\?.*)?$", self.path):
            files = self.files.get(match[1])
            if files is None:
                return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            siblings = [{"rfilename": name} for name in files]
            return self.answer({"id": match[1], "sha": COMMIT, "siblings": siblings, "private": False})
        if match := re.match(r"/api/models/([^/]+/[^/]+)/tree/", self.path):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files[match[1]].items()
            ]
            return self.answer(tree)
        match = re.match(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)$", self.path)
        data = self.files.get(match[1], {}).get(match[2]) if match else None
        if data is None:
            return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        return self.answer(body=data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    handler = type("OneHub", (Hub,), {"files": {}})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def on_hub(server: ThreadingHTTPServer, folder: Path, code: str) -> subprocess.CompletedProcess:
    """Runs `code` in a process whose Hub is `server`: the client reads the address when it is imported."""
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    address = f"http://127.0.0.1:{server.server_address[1]}"
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(folder / "cache"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True)


PUSH = """
from tiny import TINY, randomize
from cavmae_fast import CAVMAE
print(randomize(CAVMAE(**TINY), seed=3).push_to_hub("lab/model", token="secret"))
"""
PULL = """
from cavmae_fast import CAVMAE
CAVMAE.from_pretrained("lab/model").save_pretrained("copy")
"""


def test_a_model_goes_up_and_comes_down(server, tmp_path):
    pushed = on_hub(server, tmp_path, PUSH)
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.strip().endswith(COMMIT)
    assert {"config.json", "model.safetensors"} <= server.RequestHandlerClass.files["lab/model"].keys()
    pulled = on_hub(server, tmp_path, PULL)
    assert pulled.returncode == 0, pulled.stderr
    wanted = randomize(CAVMAE(**TINY), seed=3).state_dict()
    got = CAVMAE.from_pretrained(tmp_path / "copy").state_dict()
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_what_the_hub_lacks_is_one_sentence(server, tmp_path):
    missing = on_hub(server, tmp_path, PULL.replace("lab/model", "lab/nothing"))
    assert missing.returncode == 1
    last = missing.stderr.strip().splitlines()[-1]
    assert "lab/nothing is no folder here, and cannot be read from the Hub" in last


def test_a_folder_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = randomize(CAVMAE(**TINY), seed=1)
    model.save_pretrained("lab/model")
    monkeypatch.setattr(hub, "download", lambda *_, **__: pytest.fail("asked the Hub for a folder that is here"))
    got, wanted = CAVMAE.from_pretrained("lab/model").state_dict(), model.state_dict()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("name", ["./lab/model", "/lab/model", "runs/pretrain/model", "model", "../lab"])
def test_paths_are_no_repositories(name):
    assert not hub.names_repository(name)


def test_without_the_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(HubError, match=r"lab/model is no folder here.*pip install 'cavmae_fast\[hub\]'"):
        CAVMAE.from_pretrained("lab/model")
    with pytest.raises(HubError, match=r"to write lab/model.*cavmae_fast\[hub\]"):
        randomize(CAVMAE(**TINY), seed=1).push_to_hub("lab/model")
