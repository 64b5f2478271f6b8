"""Weights that are not on this machine yet: where they lie, whether they are cached, and fetching them.

Needs neither torch nor timm until something is downloaded from a plain address. What is cached is used without any
request. Before a download one request asks, for at most `PATIENCE` seconds, whether the other side answers at all: the
hub client's own retries take far longer than a user without a network wants to wait.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import ssl
import threading
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from vitprobe.errors import UserError
from vitprobe.models.entries import ADDRESSES, ModelSpec
from vitprobe.models.official.entries import OfficialCheckpoint, find_official

PATIENCE = 2.5  # seconds for name look-up, connection and first answer together
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # in timm's order of preference
WAY_OUT = "give the weights with --checkpoint FILE, or use a bundled model (--model mae_vit_nano)"
# What a gateway answers when it cannot reach the host behind it, or wants a password first.
_GATEWAY_TROUBLE = (407, 502, 503, 504)


def hub_repository(source: str) -> str | None:
    """The Hugging Face repository (`owner/name` or `owner/name@revision`) of a spec's source, or None."""
    kind, _, name = source.partition(":")
    if kind == "hf-hub":
        return name
    if kind != "timm" or source in ADDRESSES:
        return None
    # The same weights with another activation: timm keeps one repository for both.
    return "timm/" + name.replace("_clip_quickgelu_", "_clip_")


def local_folder(repository: str) -> Path | None:
    """The folder on this machine that a repository's name means; None where it means one of the Hugging Face hub.

    A folder with a config.json comes before a repository of the same name.

    Raises:
        UserError: for a path without such a folder.
    """
    folder = Path(repository).expanduser()
    if repository and (folder / "config.json").is_file():
        return folder
    if not repository.startswith((".", "/", "~", "\\")) and repository.rstrip("/").count("/") < 2:
        return None
    if not folder.is_dir():
        raise UserError(f"there is no folder {repository}")
    raise UserError(f"the folder {repository} holds no config.json: {what_in(folder)}")


def what_in(folder: Path) -> str:
    """What to give instead of a folder that says nothing of its model."""
    if (folder / "adapter_config.json").is_file():
        return "it is an adapter of PEFT: load it with its model, call merge_and_unload(), and save what that gives"
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    endings = (".safetensors.index.json", ".bin.index.json", ".safetensors", ".npz", ".bin", ".pth", ".pt", ".ckpt")
    files = [name for ending in endings for name in names if name.endswith(ending)]
    if files:
        return f"give the file {folder / files[0]} with its architecture (--arch NAME)"
    return "give a folder that save_pretrained wrote, or a checkpoint file"


def names_one_of_the_hub(repository: str) -> bool:
    """Whether a name is one that a repository of the hub may have, too."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repository) is not None


def at_commit(repository: str, file: Path) -> str:
    """The repository at the commit that a cached file of it is of, which names its folder; a local folder itself."""
    return repository if local_folder(repository) else f"{repository.partition('@')[0]}@{file.parent.name}"


def name_of(repository: str) -> str:
    """The last part of a repository's or folder's name."""
    folder = local_folder(repository)
    return folder.resolve().name if folder else repository.partition("@")[0].rpartition("/")[2]


def cached_weights(repository: str, filenames: tuple[str, ...] = WEIGHT_FILES) -> Path | None:
    """The first of `filenames` that the local Hugging Face cache, or a folder, holds; asks no network.

    Raises:
        UserError: for what cannot be a repository's name.
    """
    if (folder := local_folder(repository)) is not None:
        return next((folder / name for name in filenames if (folder / name).is_file()), None)
    from huggingface_hub import try_to_load_from_cache

    name, _, revision = repository.partition("@")
    for filename in filenames:
        try:
            found = try_to_load_from_cache(name, filename, revision=revision or None)
        except ValueError as error:
            raise UserError(f"{repository!r} is no repository of the Hugging Face hub: write owner/name") from error
        if isinstance(found, str):
            return Path(found)
    return None


def address_path(address: str, filename: str = "") -> Path:
    """Where torch.hub (and timm) keep the file of a plain address, or a file of this name."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("TORCH_HOME") or os.path.join(cache, "torch")  # noqa: PTH118 - "~" is expanded below
    return Path(home).expanduser() / "hub" / "checkpoints" / (filename or Path(urlsplit(address).path).name)


def is_downloaded(spec: ModelSpec) -> bool:
    """Whether a model's weights are in a local cache; asks no network."""
    if spec.source in ADDRESSES:
        return address_path(ADDRESSES[spec.source]).is_file()
    if entry := find_official(spec.source):
        return address_path(entry.address, entry.cached_name).is_file()
    repository = hub_repository(spec.source)
    return repository is not None and cached_weights(repository) is not None


def require_weights(spec: ModelSpec) -> None:
    """Returns at once where a model's weights are here, or after one answer from where they would come.

    The command line calls this before it imports torch, so that a missing network costs seconds.

    Raises:
        UserError: for weights that are neither cached nor to be had.
    """
    if spec.source in ADDRESSES:
        require_address(ADDRESSES[spec.source], spec.name)
    elif entry := find_official(spec.source):
        require_official(entry)
    elif repository := hub_repository(spec.source):
        require_hub(repository)


def require_hub(repository: str, filenames: tuple[str, ...] = WEIGHT_FILES) -> Path | None:
    """The first of `filenames` that is cached, at once; otherwise None, after one answer from the hub.

    Raises:
        UserError: where they are not cached and the hub does not answer.
    """
    cached = cached_weights(repository, filenames)
    if cached is None and local_folder(repository):
        raise UserError(f"the folder {repository} has no {' or '.join(filenames)}")
    if cached is None:
        _require_online(repository)
    return cached


def require_address(address: str, name: str, filename: str = "") -> Path | None:
    """The cached file of a plain address, at once; otherwise None, after one answer from there.

    Raises:
        UserError: where it is not cached and the address does not answer.
    """
    path = address_path(address, filename)
    if path.is_file():
        return path
    _require_answer(address, name)
    return None


def fetch_from_hub(repository: str, filenames: tuple[str, ...] = WEIGHT_FILES) -> Path:
    """The local path of the first of `filenames` that a repository has; cached files first, without any request.

    Raises:
        UserError: where it cannot be had: no network, no such repository, gated, or a download that breaks off.
    """
    cached = require_hub(repository, filenames)
    if cached is not None:
        return cached

    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, _, revision = repository.partition("@")
    for filename in filenames:
        try:
            return Path(hf_hub_download(name, filename, revision=revision or None, endpoint=_endpoint()))
        except LocalEntryNotFoundError as error:  # the client's word for a network that failed
            raise _download_failed(repository, error) from error
        except EntryNotFoundError:
            continue
        except GatedRepoError as error:
            raise UserError(
                f"{repository} is gated: accept its licence on its page at {_endpoint()}/{name} and log in "
                f"(hf auth login), or {WAY_OUT}"
            ) from error
        except RevisionNotFoundError as error:
            raise UserError(f"{name} has no revision {revision!r} at {_endpoint()}; {WAY_OUT}") from error
        except RepositoryNotFoundError as error:
            raise UserError(
                f"there is no repository {name} at {_endpoint()}, or it is private (hf auth login); {WAY_OUT}"
            ) from error
        except Exception as error:  # the client's own, its HTTP library's, the file system's
            raise _download_failed(repository, error) from error
    raise UserError(f"{repository} at {_endpoint()} has no {' or '.join(filenames)}; {WAY_OUT}")


def fetch_from_address(address: str, name: str, *, filename: str = "", digest: str = "") -> Path:
    """The local path of the file at a plain address, downloaded into torch.hub's cache where it is not there yet.

    Shows torch's progress bar. What breaks off or is not the right file is not left in the cache.

    Args:
        address: of the file.
        name: of the model, for messages.
        filename: in the cache; by default the address's last part.
        digest: "sha256:" or "md5:" and the hexadecimal digits of the file, or the first of them; "" asks for none.

    Raises:
        UserError: where it cannot be had, or is another file.
    """
    cached = require_address(address, name, filename)
    if cached is not None:
        return cached

    from torch.hub import download_url_to_file

    path = address_path(address, filename)
    unchecked = path.with_name(f"{path.name}.{os.getpid()}.unchecked")  # another process may fetch the same
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        download_url_to_file(address, str(unchecked))  # to a temporary name first: a broken download leaves nothing
        found = _digest_like(digest, unchecked)
        if found == digest:
            unchecked.replace(path)
            return path
    except Exception as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the answer, and with it the socket
        raise _download_failed(address, error) from error
    finally:
        unchecked.unlink(missing_ok=True)
    raise UserError(
        f"what {address} gave is not the file of {name}: its digest is {found}, published is {digest}; try again, or "
        f"{WAY_OUT}"
    )


def _digest_like(digest: str, path: Path) -> str:
    """A file's digest, of the kind and length of another."""
    if not digest:
        return ""
    kind, _, digits = digest.partition(":")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=False))
    return f"{kind}:{found.hexdigest()[: len(digits)]}"


def require_official(entry: OfficialCheckpoint) -> Path | None:
    """The cached file of an official checkpoint, at once; otherwise None, after one answer from where it lies.

    Raises:
        UserError: where it is not cached and its address does not answer, or where no program can download it.
    """
    name = entry.spec.name
    if entry.by_hand:
        raise UserError(f"{name} can only be fetched by hand ({entry.by_hand}): give the file with --checkpoint FILE")
    if not entry.address:
        raise UserError(f"{name} has no public source: if you have its weights, give them with --checkpoint FILE")
    return require_address(entry.address, name, entry.cached_name)


def fetch_official(entry: OfficialCheckpoint) -> Path:
    """The local path of an official checkpoint's file, downloaded into torch.hub's cache where it is not there yet.

    Raises:
        UserError: where it cannot be had, or is not the file that was published.
    """
    return require_official(entry) or fetch_from_address(
        entry.address, entry.spec.name, filename=entry.cached_name, digest=entry.digest
    )


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _require_online(repository: str) -> None:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{repository} is not in the local cache and HF_HUB_OFFLINE is set; {WAY_OUT}")
    _require_answer(_endpoint(), repository)


def _require_answer(address: str, what: str) -> None:
    trouble = why_no_answer(address)
    if trouble:
        parts = urlsplit(address)
        raise UserError(f"cannot download {what} from {parts.scheme}://{parts.netloc}: {trouble}; {WAY_OUT}")


def _download_failed(what: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(f"the download of {what} failed: {reason}; {WAY_OUT}")


def why_no_answer(address: str, seconds: float = PATIENCE) -> str:
    """Why nothing answers at an address within `seconds`; the empty string where something does.

    Goes through the proxies that the environment names, as the hub client does.
    """
    outcome: list[str] = []
    # A daemon, because a name look-up that hangs can be neither interrupted nor timed out.
    thread = threading.Thread(target=lambda: outcome.append(_ask(address, seconds + 1)), daemon=True)
    thread.start()
    thread.join(seconds)
    return outcome[0] if outcome else f"no answer within {seconds:g} s"


class _AnyAnswer(urllib.request.HTTPErrorProcessor):
    """Takes every status as an answer, and follows no redirection."""

    def http_response(self, request, response):
        """The response as it is."""
        return response

    https_response = http_response


def _ask(address: str, seconds: float) -> str:
    """One HEAD request; the empty string for an answer, otherwise the trouble in words."""
    try:
        parts = urlsplit(address)
        proxies = urllib.request.getproxies()
        proxy = proxies.get(parts.scheme) or proxies.get("all", "")
        if proxy and urllib.request.proxy_bypass(parts.hostname or ""):
            proxy = ""
        if proxy.startswith("socks"):  # urllib does not speak it; whether the proxy is there must do
            way = urlsplit(proxy)
            socket.create_connection((way.hostname or "", way.port or 1080), timeout=seconds).close()
            return ""
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({parts.scheme: proxy} if proxy else {}), _AnyAnswer
        )
        with opener.open(urllib.request.Request(address, method="HEAD"), timeout=seconds) as response:
            return f"status {response.status}" if response.status in _GATEWAY_TROUBLE else ""
    except Exception as error:  # in a thread of its own, where nobody else would take it
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        # The hub client may know certificates that this Python does not: it decides.
        return "" if isinstance(reason, ssl.SSLCertVerificationError) else str(reason) or type(reason).__name__
