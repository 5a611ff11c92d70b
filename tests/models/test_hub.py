"""Models by name, from a hub that answers on loopback as Hugging Face's does."""

import contextlib
import hashlib
import http.server
import json
import pathlib
import shutil
import threading

import pytest

from mixgrpo_jax.models.io import hub
from tests.python import run_program

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_made_up"


class Hub(http.server.BaseHTTPRequestHandler):
    """The few routes that the client uses: a model, its tree, and its files. `models`: folders; `asked`: what came."""

    models: dict[str, pathlib.Path]
    asked: list[tuple[str, str]]

    def do_GET(self):
        self.asked.append((self.path.partition("?")[0], self.headers.get("Authorization", "")))
        place = self.path.partition("?")[0].removeprefix("/api/models").strip("/").split("/")
        repo, what, rest = "/".join(place[:2]), place[2:3], place[4:]
        if repo == "owner/gated" and TOKEN not in self.headers.get("Authorization", ""):
            return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if repo not in self.models:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        files = {file.relative_to(self.models[repo]).as_posix(): file for file in self.models[repo].rglob("*.*")}
        if what == ["resolve"]:
            data = files["/".join(rest)].read_bytes()
            return self.answer(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT})
        if what == ["tree"]:
            tree = [{"type": "file", "oid": "0", "size": f.stat().st_size, "path": name} for name, f in files.items()]
            return self.answer(200, json.dumps(tree).encode())
        return self.answer(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": []}).encode())

    do_HEAD = do_GET

    def answer(self, status, data, headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving(models):
    handler = type("Models", (Hub,), {"models": models, "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler.asked
        server.shutdown()


PROGRAM = """
import json, sys, time
from mixgrpo_jax.models.io import hub

time.sleep = lambda seconds: None  # between the client's own attempts

for name, *wanted in json.loads(sys.argv[1]):
    try:
        print(hub.local(name, "field", *wanted))
    except ValueError as error:
        print(error)
    print(hub.is_here(name))
"""
LOAD = """
import jax, numpy as np, sys
from mixgrpo_jax.models import families

(_, part), (parts, params), (_, own) = (
    families.load(name, text=text)
    for name, text in (("owner/small", False), ("owner/small", True), (sys.argv[1], True))
)
print(*part, *params, *parts.tokenizers)
jax.tree.map(np.testing.assert_array_equal, params, own)
"""


def said(program, *arguments, endpoint, home, **environment):
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_TOKEN": TOKEN} | environment
    return run_program(program, *arguments, **environment, NO_PROXY="127.0.0.1", no_proxy="127.0.0.1").splitlines()


def fetched(asked):
    return sorted({path.split("/resolve/")[1].partition("/")[2] for path, _ in asked if "/resolve/" in path})


@pytest.fixture
def weights(tmp_path):
    """A repository of several precisions and formats."""
    folder = tmp_path / "weights"
    (folder / "vae").mkdir(parents=True)
    names = [
        "model.safetensors",
        "model.fp16.safetensors",
        "pytorch_model.bin",
        "tf_model.h5",
        "vocab.json",
        "config.json",
    ]
    for name in [*names, "vae/model.fp16.safetensors", "vae/config.json", "old.pt"]:
        (folder / name).write_text(name)
    return folder


def test_a_name_is_fetched_once_and_found_without_the_hub(tmp_path, weights):
    cases = [["owner/weights", *hub.WEIGHTS], ["owner/weights@main/old.pt"], ["owner/weights/vae"]]
    with serving({"owner/weights": weights, "owner/gated": weights}) as (endpoint, asked):
        options = dict(endpoint=endpoint, home=tmp_path / "home")
        online = said(PROGRAM, json.dumps(cases), **options)
        assert fetched(asked) == ["model.safetensors", "old.pt", "vae/config.json", "vae/model.fp16.safetensors"]
        assert all(TOKEN in token for path, token in asked if "weights" in path)
        other = [
            ["owner/none"],
            ["owner/weights@nowhere/a.pt"],
            ["no/such/file.pt"],
            ["nowhere"],
            ["/no/where"],
            ["owner/weights"],
        ]
        refused = said(
            PROGRAM, json.dumps([["owner/gated"], *other]), **options | {"home": "/proc/self/x"}, HF_TOKEN=""
        )
    found = [pathlib.Path(line) for line in online[::2]]
    assert [path.name for path in found] == [COMMIT, "old.pt", "vae"] and found[1].read_text() == "old.pt"
    assert online[1::2] == ["True"] * 3 and not (found[0] / "pytorch_model.bin").exists()
    offline = json.dumps(
        [*cases, ["owner/weights", "tokenizer.json"], ["owner/weights/old.safetensors"], ["owner/other"]]
    )
    away = said(PROGRAM, offline, **options, HF_HUB_OFFLINE="1")
    assert away[:6] == online == said(PROGRAM, json.dumps(cases), **options)  # nobody listens there any more
    assert away[7::2] == ["True", "False", "False"]
    for line in away[6::2]:
        assert "there is no such file or folder, and the model owner/" in line and "HF_HUB_OFFLINE is set" in line
    told = [
        "gated: accept its licence",
        "no such model, or it is private",
        "a.pt",
        "no/such",
        "owner/model",
        "owner/model",
    ]
    told.append("Set HF_HOME to a folder that can be written")
    for text, line, here in zip(told, refused[::2], refused[1::2], strict=True):
        assert line.startswith("field='") and text in line and here == "False", line


def test_a_checkpoint_is_fetched_by_the_parts_that_are_needed(tmp_path, small_policy):
    folder = shutil.copytree(small_policy, tmp_path / "small")
    for name in (
        "flux1.safetensors",
        "transformer/diffusion_pytorch_model.fp16.safetensors",
        "scheduler/scheduler.json",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not read")
    with serving({"owner/small": folder}) as (endpoint, asked):
        printed = said(LOAD, small_policy, endpoint=endpoint, home=tmp_path / "home")
        first = [path for path, _ in asked if path.endswith(".safetensors")]
    assert printed[-1] == "transformer transformer text_encoder_2 tokenizer_2"
    assert "transformer" in first[0] and "text_encoder_2" in first[-1]
    own = [file.relative_to(small_policy).as_posix() for file in small_policy.rglob("*.*")]
    assert set(fetched(asked)) <= set(own) and {name for name in own if name.endswith(".safetensors")} <= set(
        fetched(asked)
    )


def test_a_path_wins_and_needs_no_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "model").mkdir(parents=True)
    assert hub.local("owner/model", "field") == pathlib.Path("owner/model") and hub.is_here("owner/model")
    with pytest.raises(ValueError, match=r"field='~/none': there is no such file or folder, .* named owner/model"):
        hub.local("~/none", "field")
