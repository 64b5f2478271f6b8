"""Weights that are elsewhere: the cache without a socket, a missing network within seconds, one line for the rest."""

from __future__ import annotations

import argparse
import http.server
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import constants, errors
from safetensors.torch import save_file

from helpers import serving
from vitprobe.errors import UserError
from vitprobe.models import downloads, network
from vitprobe.models.identity import weights_sha256
from vitprobe.models.loading import load_model, require_loadable
from vitprobe.models.registry import find_spec

WAY_OUT = "; give the weights with --checkpoint FILE, or use a bundled model (--model mae_vit_nano)"


@pytest.fixture(autouse=True)
def empty_caches(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return tmp_path


@pytest.fixture
def no_sockets(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def silent_server():
    """Takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def server():
    """Answers with what a test puts into `answers` (by path), otherwise 404."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            status, headers, body = answers.get(self.path, (404, {}, b""))
            seen.append(f"{self.command} {self.path}")
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_GET = do_HEAD

        def log_message(self, format, *args):
            pass

    answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
    seen: list[str] = []
    with serving(Handler, answers=answers, seen=seen) as running:
        yield running


def put_in_hub_cache(cache: Path, repository: str, files: dict[str, bytes | dict[str, torch.Tensor]]) -> None:
    folder = cache / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    for name, content in files.items():
        if isinstance(content, bytes):
            (snapshot / name).write_bytes(content)
        else:
            save_file(content, snapshot / name)


def pickled(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def small_config(**more) -> bytes:
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 0,
        "model_args": {"img_size": 32},
        "pretrained_cfg": {"input_size": [3, 32, 32], "fixed_input_size": True, "mean": [0.1, 0.2, 0.3]},
    }
    return json.dumps({**config, **more}).encode()


def untrained(name: str, **options) -> timm.models.VisionTransformer:
    torch.manual_seed(3)
    return timm.create_model(name, **options)  # type: ignore[return-value]


# The cache -----------------------------------------------------------------------------------------------------------


def test_a_cached_model_loads_without_a_socket(empty_caches, no_sockets):
    module = untrained("eva02_tiny_patch14_224.mim_in22k")
    put_in_hub_cache(empty_caches, "timm/eva02_tiny_patch14_224.mim_in22k", {"model.safetensors": module.state_dict()})
    loaded = load_model("eva02_vit_t", img_size=None)
    assert loaded.spec is find_spec("eva02_vit_t")
    assert loaded.transform.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert not loaded.module.training
    assert weights_sha256(loaded.module) == weights_sha256(module)
    downloads.require_weights(loaded.spec)  # asks nobody either


def test_cached_weights_are_resampled_to_another_size(empty_caches, no_sockets):
    module = untrained("vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    put_in_hub_cache(
        empty_caches, "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", {"model.safetensors": module.state_dict()}
    )
    loaded = load_model("vit_tiny_patch16_224", img_size=(64, 96))  # its default tag is the entry's
    assert loaded.spec is find_spec("augreg_vit_t")
    assert loaded.layout.grid == (4, 6)
    assert loaded.transform.size == (64, 96)
    state = loaded.module.state_dict()
    assert state["pos_embed"].shape == (1, 25, 192)
    torch.testing.assert_close(state["head.weight"], module.state_dict()["head.weight"])


def test_damaged_cached_weights_are_one_line(empty_caches, no_sockets):
    put_in_hub_cache(empty_caches, "timm/eva02_tiny_patch14_224.mim_in22k", {"model.safetensors": b"cut off"})
    with pytest.raises(UserError, match=r"/model\.safetensors is no safetensors file, .*; delete it to download it ag"):
        load_model("eva02_vit_t")


def test_cached_weights_of_another_model_are_one_line(empty_caches, no_sockets):
    state = untrained("vit_tiny_patch16_224").state_dict()
    put_in_hub_cache(empty_caches, "timm/eva02_tiny_patch14_224.mim_in22k", {"model.safetensors": state})
    with pytest.raises(UserError, match=r"does not fit eva02_tiny_patch14_224: .* - delete it to download it again$"):
        load_model("eva02_vit_t")


def test_a_cached_hub_repository_loads_without_a_socket(empty_caches, no_sockets):
    module = untrained("vit_tiny_patch16_224", num_classes=0, img_size=32)
    files = {"config.json": small_config(), "model.safetensors": module.state_dict()}
    put_in_hub_cache(empty_caches, "someone/small", files)
    loaded = load_model("hf-hub:someone/small")
    assert (loaded.spec.name, loaded.spec.source) == ("small", "hf-hub:someone/small")
    assert (loaded.spec.paradigm, loaded.spec.normalisation) == ("unknown", "other")
    assert loaded.layout.grid == (2, 2)
    assert loaded.transform.mean == (0.1, 0.2, 0.3)
    assert weights_sha256(loaded.module) == weights_sha256(module)
    with pytest.raises(
        UserError, match=r"cannot take images of 33×33 pixels: it takes multiples of 16, such as 32; its own"
    ):
        load_model("hf-hub:someone/small", img_size=33)
    untrained_spec = load_model("hf-hub:someone/small", pretrained=False).spec
    assert (untrained_spec.name, untrained_spec.paradigm) == ("small-random", "random")


class Payload:
    ran = False

    def __reduce__(self):
        return setattr, (Payload, "ran", True)


def test_code_in_a_downloaded_file_neither_runs_nor_keeps_it_from_loading(empty_caches, no_sockets):
    module = untrained("vit_tiny_patch16_224", num_classes=0, img_size=32)
    checkpoint = {"args": argparse.Namespace(lr=1), "more": Payload(), "model": module.state_dict()}
    put_in_hub_cache(
        empty_caches, "someone/small", {"config.json": small_config(), "pytorch_model.bin": pickled(checkpoint)}
    )
    assert weights_sha256(load_model("hf-hub:someone/small").module) == weights_sha256(module)
    assert not Payload.ran


def test_averaged_weights_come_first_as_in_timm(empty_caches, no_sockets):
    module = untrained("vit_tiny_patch16_224", num_classes=0, img_size=32)
    zeros = {name: torch.zeros_like(value) for name, value in module.state_dict().items()}
    checkpoint = {"model": zeros, "model_ema": module.state_dict()}
    put_in_hub_cache(
        empty_caches, "someone/small", {"config.json": small_config(), "pytorch_model.bin": pickled(checkpoint)}
    )
    assert weights_sha256(load_model("hf-hub:someone/small").module) == weights_sha256(module)


def test_a_classifier_of_other_classes_than_the_config_counts_is_left_out(empty_caches, no_sockets):
    module = untrained("vit_tiny_patch16_224", num_classes=7, img_size=32)
    config = small_config(num_classes=7, model_args={"img_size": 32, "num_classes": 5})
    put_in_hub_cache(empty_caches, "someone/small", {"config.json": config, "model.safetensors": module.state_dict()})
    loaded = load_model("hf-hub:someone/small").module.state_dict()
    assert loaded["head.weight"].shape == (5, 192)
    assert all(torch.equal(loaded[name], value) for name, value in module.state_dict().items() if "head" not in name)


def test_a_repository_whose_arguments_timm_does_not_take(empty_caches, no_sockets):
    put_in_hub_cache(empty_caches, "someone/small", {"config.json": small_config(model_args={"depth": "deep"})})
    for attempt in (load_model, require_loadable):
        with pytest.raises(
            UserError, match=r"^timm cannot build what the config\.json of hf-hub:someone/small describes"
        ):
            attempt("hf-hub:someone/small")


def test_a_repository_whose_weights_are_not_here(empty_caches, monkeypatch):
    put_in_hub_cache(empty_caches, "someone/small", {"config.json": small_config()})
    monkeypatch.setattr(downloads, "why_no_answer", lambda address: "no route")
    with pytest.raises(UserError, match=r"^cannot download someone/small from .*: no route"):
        require_loadable("hf-hub:someone/small")
    monkeypatch.setattr(downloads, "why_no_answer", lambda address: "")
    require_loadable("hf-hub:someone/small")
    with pytest.raises(UserError, match="cannot take images of 33×33 pixels"):
        require_loadable("hf-hub:someone/small", img_size=33)


def test_a_hub_repository_of_a_known_model_has_its_spec(empty_caches, no_sockets):
    config = {"architecture": "eva02_tiny_patch14_224", "pretrained_cfg": {"input_size": [3, 224, 224]}}
    put_in_hub_cache(
        empty_caches, "timm/eva02_tiny_patch14_224.mim_in22k", {"config.json": json.dumps(config).encode()}
    )
    loaded = load_model("hf-hub:timm/eva02_tiny_patch14_224.mim_in22k", pretrained=False)
    assert loaded.spec.name == "eva02_vit_t-random"
    assert loaded.spec.method == loaded.spec.source == "random"


@pytest.mark.parametrize("config", [b"{}", b"not json", b"[1]", b'{"architecture": "no_such"}', b'{"architecture": 3}'])
def test_a_hub_repository_that_is_not_timms(empty_caches, no_sockets, config):
    put_in_hub_cache(empty_caches, "someone/else", {"config.json": config})
    with pytest.raises(UserError) as caught:
        load_model("hf-hub:someone/else")
    assert str(caught.value) == (
        "hf-hub:someone/else holds no model of timm's: its config.json names no architecture that timm has; for a "
        "model of transformers write hf:someone/else"
    )


# No network ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", ["refused", "silent"])
def test_without_a_network_the_whole_process_ends_within_ten_seconds(endpoint, silent_server, tmp_path):
    address = "http://127.0.0.1:9" if endpoint == "refused" else silent_server
    code = (
        "from vitprobe.errors import UserError\nfrom vitprobe.models.downloads import require_weights\n"
        "from vitprobe.models.registry import find_spec\n"
        "try:\n    require_weights(find_spec('mae_vit_b'))\nexcept UserError as error:\n    print(error)"
    )
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert time.monotonic() - start < 10
    assert done.stdout.startswith(f"cannot download timm/vit_base_patch16_224.mae from {address}: ")
    assert ("refused" if endpoint == "refused" else "no answer within 2.5 s") in done.stdout
    assert done.stdout.strip().endswith(WAY_OUT)
    assert done.stderr == ""


def test_a_name_look_up_that_hangs_does_not_hold_us(monkeypatch):
    release = threading.Event()

    def hang(*args, **kwargs):
        release.wait(20)
        raise OSError("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    start = time.monotonic()
    assert network.why_no_answer("https://hub.invalid", seconds=0.3) == "no answer within 0.3 s"
    assert time.monotonic() - start < 5
    release.set()


def test_load_model_names_what_it_tried(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        load_model("mae_vit_b")
    assert time.monotonic() - start < 4
    text = str(caught.value)
    assert text.startswith("cannot download timm/vit_base_patch16_224.mae from http://127.0.0.1:9: ")
    assert text.endswith(WAY_OUT)
    assert "\n" not in text
    spec = find_spec("mae_vit_b")
    assert spec is not None
    with pytest.raises(UserError) as before:
        downloads.require_weights(spec)
    assert str(before.value) == text


def test_offline_by_choice(monkeypatch, no_sockets):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        load_model("dino_vit_s")
    assert str(caught.value) == (
        f"timm/vit_small_patch16_224.dino is not in the local cache and HF_HUB_OFFLINE is set{WAY_OUT}"
    )


def test_a_plain_address_without_a_network(monkeypatch):
    spec = find_spec("ijepa_vit_h")
    assert spec is not None
    monkeypatch.setattr(downloads, "why_no_answer", lambda address: "no route")
    with pytest.raises(UserError) as caught:
        downloads.require_weights(spec)
    assert str(caught.value) == f"cannot download ijepa_vit_h from https://dl.fbaipublicfiles.com: no route{WAY_OUT}"
    with pytest.raises(UserError, match="no route"):
        load_model("ijepa_vit_h")


def test_bundled_models_need_no_network(no_sockets):
    spec = find_spec("mae_vit_nano")
    assert spec is not None
    downloads.require_weights(spec)


# Whether anybody answers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "answered"), [(200, True), (302, True), (404, True), (503, False), (407, False)])
def test_any_answer_counts_but_a_gateways(server, status, answered):
    server.answers["/"] = (status, {"Location": "http://127.0.0.1:9/"}, b"")
    assert network.why_no_answer(server.address + "/") == ("" if answered else f"status {status}")
    assert server.seen == ["HEAD /"]


@pytest.mark.parametrize("name", ["http_proxy", "ALL_PROXY"])
def test_the_proxy_is_asked(server, monkeypatch, name):
    monkeypatch.setenv(name, server.address)
    assert network.why_no_answer("http://hub.invalid/x") == ""
    assert server.seen == ["HEAD http://hub.invalid/x"]


def test_a_proxy_that_refuses(server, monkeypatch):
    monkeypatch.setenv("https_proxy", server.address)  # it knows no CONNECT
    assert "501" in network.why_no_answer("https://hub.invalid/x")


def test_no_proxy_is_respected(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert network.why_no_answer(server.address) == ""


def test_a_socks_proxy_is_left_to_the_client(no_sockets, monkeypatch):
    monkeypatch.setenv("all_proxy", "socks5h://127.0.0.1:9")
    assert network.why_no_answer("https://hub.invalid") == ""


def test_an_unknown_certificate_is_left_to_the_client(monkeypatch):
    import ssl
    import urllib.error
    import urllib.request

    def fail(*args, **kwargs):
        raise urllib.error.URLError(ssl.SSLCertVerificationError("self-signed certificate"))

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", fail)
    assert network.why_no_answer("https://hub.invalid") == ""


def test_an_address_that_is_none():
    assert "unknown url type" in network.why_no_answer("hub")


# Downloads -----------------------------------------------------------------------------------------------------------


def response(status: int):
    """An HTTP response as this version of the hub client's errors want it."""
    import inspect

    library = sys.modules[inspect.getmodule(errors.HfHubHTTPError.__mro__[1]).__name__.partition(".")[0]]  # type: ignore[union-attr]
    return library.Response(status, request=library.Request("GET", "http://hub"))


def gated():
    return errors.GatedRepoError("403", response=response(403))


def absent():
    return errors.RepositoryNotFoundError("401", response=response(401))


def no_revision():
    return errors.RevisionNotFoundError("404", response=response(404))


def broken():
    return errors.LocalEntryNotFoundError("the connection\nbroke")


def full_disk():
    return OSError(28, "No space left on device")


def no_file():
    return errors.EntryNotFoundError("404")


FAILURES = [
    (gated, "o/n@v2 is gated: accept its licence on its page at http://hub/o/n and log in (hf auth login), or "
     + WAY_OUT[2:]),
    (absent, "there is no repository o/n at http://hub, or it is private (hf auth login)" + WAY_OUT),
    (no_revision, "o/n has no revision 'v2' at http://hub" + WAY_OUT),
    (broken, "the download of o/n@v2 failed: the connection broke" + WAY_OUT),
    (full_disk, "the download of o/n@v2 failed: [Errno 28] No space left on device" + WAY_OUT),
    (ValueError, "the download of o/n@v2 failed: ValueError" + WAY_OUT),
    (no_file, "o/n@v2 at http://hub has no model.safetensors or pytorch_model.bin" + WAY_OUT),
]  # fmt: skip


@pytest.mark.parametrize(("failure", "text"), FAILURES, ids=[str(index) for index in range(len(FAILURES))])
def test_a_download_that_fails_is_one_line(monkeypatch, failure, text):
    def fail(*args, **kwargs):
        raise failure()

    monkeypatch.setattr(constants, "ENDPOINT", "http://hub")
    monkeypatch.setattr(downloads, "why_no_answer", lambda address: "")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(UserError) as caught:
        downloads.fetch_from_hub("o/n@v2")
    assert str(caught.value) == text


def test_a_repository_that_the_hub_does_not_have(server, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE  # made when the client was imported
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + template[template.index("/{") :])
    for name in ("model.safetensors", "config.json"):
        server.answers[f"/o/n/resolve/main/{name}"] = (401, {"X-Error-Code": "RepoNotFound"}, b"")
    with pytest.raises(UserError, match=rf"^there is no repository o/n at {server.address}, or it is private"):
        downloads.fetch_from_hub("o/n")
    with pytest.raises(UserError, match=rf"^there is no repository o/n at {server.address}, or it is private"):
        require_loadable("hf-hub:o/n")


def test_the_second_file_is_taken_where_the_first_is_not_there(tmp_path, monkeypatch):
    def download(name, filename, **options):
        if filename == "model.safetensors":
            raise errors.EntryNotFoundError("404")
        return str(tmp_path / filename)

    monkeypatch.setattr(downloads, "why_no_answer", lambda address: "")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert downloads.fetch_from_hub("o/n") == tmp_path / "pytorch_model.bin"


def test_a_plain_address_is_downloaded_once(server):
    server.answers["/weights.pth"] = (200, {}, b"content")
    path = downloads.fetch_from_address(f"{server.address}/weights.pth", "it")
    assert path.read_bytes() == b"content"
    assert path == Path(torch.hub.get_dir()) / "checkpoints" / "weights.pth"
    assert downloads.fetch_from_address(f"{server.address}/weights.pth", "it") == path
    assert server.seen == ["HEAD /weights.pth", "GET /weights.pth"]


def test_a_plain_address_that_breaks_leaves_nothing(server):
    with pytest.raises(UserError, match=r"^the download of http.*/gone\.pth failed: HTTP Error 404: Not Found; give"):
        downloads.fetch_from_address(f"{server.address}/gone.pth", "it")
    assert list((Path(torch.hub.get_dir()) / "checkpoints").iterdir()) == []
