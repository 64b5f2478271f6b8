"""Fetch weights that are not on this machine yet, from the Hugging Face hub or from a plain address.

Needs neither torch nor timm until something is downloaded from a plain address. What is cached is used without any
request. Before a download one request asks whether the other side answers at all (`network.py` says why).
"""

from __future__ import annotations

import hashlib
import os
import urllib.error
from pathlib import Path
from urllib.parse import urlsplit

from vitprobe.errors import UserError
from vitprobe.models.caches import WEIGHT_FILES, address_path, cached_weights
from vitprobe.models.entries import ADDRESSES, ModelSpec
from vitprobe.models.network import why_no_answer
from vitprobe.models.official.entries import OfficialCheckpoint, find_official
from vitprobe.models.repositories import hub_repository, local_folder

WAY_OUT = "give the weights with --checkpoint FILE, or use a bundled model (--model mae_vit_nano)"


def require_weights(spec: ModelSpec) -> None:
    """Raise `UserError` unless a model's weights are cached, or the place that they would come from answers.

    The command line calls this before it imports torch, so that a missing network costs seconds.

    Raises:
        UserError: for weights that are neither cached nor to be had.
    """
    if spec.source in ADDRESSES:
        require_address(ADDRESSES[spec.source], spec.name)
    elif entry := find_official(spec.source):
        require_official(entry)
    elif spec.source.startswith("timm:") and (repository := hub_repository(spec.source)):
        require_hub(repository)  # another repository may have its weights under another name, which its config says


def require_hub(repository: str, filenames: tuple[str, ...] = WEIGHT_FILES) -> Path | None:
    """Return the first of `filenames` that is cached, at once; otherwise None, after one answer from the hub.

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
    """Return the cached file of a plain address, at once; otherwise None, after one answer from there.

    Raises:
        UserError: where it is not cached and the address does not answer.
    """
    path = address_path(address, filename)
    if path.is_file():
        return path
    _require_answer(address, name)
    return None


def fetch_from_hub(repository: str, filenames: tuple[str, ...] = WEIGHT_FILES) -> Path:
    """Return the local path of the first of `filenames` in a repository; cached files first, without any request.

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
    """Return the local path of the file at a plain address, after a download into torch.hub's cache where needed.

    Shows torch's progress bar. What breaks off or is not the right file is not left in the cache.

    Args:
        address: of the file.
        name: of the model, for messages.
        filename: its name in the cache. Default "": the last part of the address.
        digest: "sha256:" or "md5:" and the hexadecimal digits of the file, or the first of them. Default "": any file.

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
    """Return the cached file of an official checkpoint, at once; otherwise None, after one answer from its address.

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
    """Return the local path of an official checkpoint's file, after a download into torch.hub's cache where needed.

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
