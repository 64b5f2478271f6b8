"""Opening images: a folder, a tar, files, pictures or tensors in memory, a DataLoader - or the packaged photographs."""

from __future__ import annotations

import copy
import os
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions, set_img_extensions
from timm.data.readers.reader_factory import create_reader
from timm.utils.misc import natural_key
from torch import Tensor
from torch.utils.data import DataLoader

from vitprobe.data.decoding import EXTENSIONS, BadImageError
from vitprobe.data.hub_sets import open_hub
from vitprobe.data.images import (
    FileImages,
    Groups,
    Images,
    ListImages,
    LoaderImages,
    TarImages,
    TensorImages,
    check_groups,
    printable,
    resolve_groups,
)
from vitprobe.data.samples import sample_images
from vitprobe.data.streams import StreamImages
from vitprobe.data.webdatasets import open_webdataset
from vitprobe.errors import UserError

__all__ = ["EXTENSIONS", "BadImageError", "Images", "LoaderImages", "open_images"]


def open_images(data: Any = None, *, groups: Groups | object = None) -> Images:
    """The images in nearly anything that holds images.

    Args:
        data: None for the packaged sample photographs; a folder (searched with its subfolders, links too, but no
            folder twice), a plain `.tar` or one image file; "wds:DIR/{0000..0063}.tar" (WebDataset), "hfds:NAME" or
            "hfids:NAME" (a Hugging Face data set, on disk or streamed), each with "#SPLIT" at its end or without; a
            list of paths, PIL images or float tensors (3, H, W); a float tensor (n, 3, H, W) or (3, H, W) - tensors are
            taken as normalised already; a torch DataLoader; or an `Images`.
        groups: what each image was taken from (crops of one photograph, frames of one film): one entry an image, or a
            function from an image's name. By default each image stands for itself.

    Raises:
        UserError: for what is missing, empty, broken or of another kind.
    """
    groups = check_groups(groups)
    if data is None:
        data = sample_images()
    if isinstance(data, Images):
        return data if groups is None else _regrouped(data, groups)
    if isinstance(data, str) and data.startswith("wds:"):
        return open_webdataset(data.removeprefix("wds:"), groups)
    if isinstance(data, str) and data.startswith(("hfds:", "hfids:")):
        kind, _, name = data.partition(":")
        return open_hub(name, groups, streamed=kind == "hfids")
    if isinstance(data, str | os.PathLike):
        return _open_path(path_of(data), groups)
    if isinstance(data, DataLoader):
        return LoaderImages(data, groups)
    if isinstance(data, Tensor):
        stack = data[None] if data.ndim == 3 else data
        return TensorImages(_checked(stack, 4, "the tensor"), groups)
    if isinstance(data, Image.Image):
        return ListImages([data], groups)
    if isinstance(data, list | tuple):
        if not data:
            raise UserError("the list of images is empty: give at least one path, PIL image or tensor")
        return ListImages([_item(item, position) for position, item in enumerate(data)], groups)
    raise UserError(
        f"cannot read images from a {type(data).__name__}: give a folder, a .tar, an image file, a list of paths, "
        f"PIL images or tensors, a float tensor (n, 3, height, width), or a DataLoader"
    )


def path_of(given: str | os.PathLike) -> Path:
    """The path that a user wrote, "~" taken for the home folder.

    Raises:
        UserError: for an empty one.
    """
    if given == "":  # Path would take it for the current folder
        raise UserError("the path of the images is empty: give a folder, a .tar or an image file")
    return Path(os.path.expanduser(given))  # noqa: PTH111 - Path's own raises where there is no such user


def _open_path(path: Path, groups: Groups) -> Images:
    shown = printable(str(path))
    if not path.exists():
        raise UserError(f"{shown} does not exist: give a folder of images, a .tar or an image file")
    if path.is_dir():
        return _open_folder(path, groups)
    if path.suffix == ".tar":
        return _open_tar(path, groups)
    if path.is_file() and (tarfile.is_tarfile(path) or zipfile.is_zipfile(path)):
        raise UserError(f"{shown} is an archive, but no plain .tar: unpack it, or repack it uncompressed as .tar")
    images = FileImages(shown, [path], [path.name], groups)
    try:
        images.read(0)
    except BadImageError as error:
        raise UserError(f"{shown} cannot be read as an image: {error.reason}") from error
    return images


def _open_folder(folder: Path, groups: Groups) -> Images:
    shown = printable(str(folder))
    names, repeats = _list_once(folder)
    if not names:
        raise UserError(f"{shown} holds no images ({' '.join(EXTENSIONS)}), nor do its subfolders")
    try:
        if not repeats:  # timm's reader would follow a link that leads back, again and again
            reader: Any = create_reader("", root=str(folder), input_key=";".join(EXTENSIONS))
            names = [Path(name).as_posix() for name in reader.filenames()]
        # timm's order ignores upper and lower case, so names that differ in nothing else come as the disk has them
        names.sort(key=lambda name: (natural_key(name), name))
    except ValueError as error:  # a name that timm cannot sort
        raise UserError(f"{shown} cannot be listed: {' '.join(str(error).split())}") from error
    return FileImages(shown, [folder / name for name in names], names, groups)


def _list_once(folder: Path) -> tuple[list[str], bool]:
    """The image files below a folder, and whether a link leads to a folder that is listed already, or to one above.

    Such a link is left out: it has no images of its own. Real folders come first, so theirs are the names that stay.
    """
    seen = set(folder.resolve().parents)
    names, repeats = [], False
    pending = [folder]
    for start in pending:  # grows by the links found on the way
        for root, subfolders, files in os.walk(start):  # does not go into links
            here = Path(root)
            real = here.resolve()
            if real in seen:
                subfolders.clear()
                repeats = True
                continue
            seen.add(real)
            subfolders.sort()
            pending += [here / name for name in subfolders if (here / name).is_symlink()]
            images = [here / name for name in files if Path(name).suffix.lower() in EXTENSIONS]
            names += [path.relative_to(folder).as_posix() for path in images]
    return names, repeats


def _open_tar(path: Path, groups: Groups) -> Images:
    shown = printable(str(path))
    try:
        with _tar_extensions():
            # cache_tarinfo=False: timm would write an index beside a tar of over 10 GB, and believe it when outdated
            reader: Any = create_reader("", root=str(path), cache_tarinfo=False)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{shown} cannot be read as a plain tar: {' '.join(str(error).split())}") from error
    except ValueError as error:
        if "not enough values to unpack" in str(error):  # how timm finds none
            raise UserError(f"{shown} holds no images ({' '.join(EXTENSIONS)})") from error
        raise UserError(f"{shown} cannot be listed: {' '.join(str(error).split())}") from error
    names, places = [], []
    for member, _, inner in reader.samples:  # inner: the tar within the tar that holds the member, or None
        names.append(member.name if inner is None else f"{inner.name}/{member.name}")
        places.append((member.offset_data + (0 if inner is None else inner.offset_data), member.size))
    return TarImages(path, places, names, groups)


@contextmanager
def _tar_extensions() -> Iterator[None]:
    """timm's reader of tars takes its file types from a global list; this lends it ours."""
    before = get_img_extensions()
    set_img_extensions(EXTENSIONS)
    try:
        yield
    finally:
        set_img_extensions(before)


def _item(item: Any, position: int) -> Path | Image.Image | Tensor:
    """One entry of a user's list, checked."""
    if isinstance(item, Tensor):
        return _checked(item, 3, f"tensor {position} of the list")
    if isinstance(item, Image.Image):
        return item
    if isinstance(item, str | os.PathLike):
        path = path_of(item)
        if path.is_dir():
            raise UserError(f"{printable(str(path))} is a folder: a list takes image files; give the folder alone")
        if not path.exists():
            raise UserError(f"{printable(str(path))} (entry {position} of the list) does not exist")
        return path
    raise UserError(
        f"entry {position} of the list is a {type(item).__name__}: give paths, PIL images or float tensors (3, H, W)"
    )


def _checked(pixels: Tensor, ndim: int, what: str) -> Tensor:
    """A user's tensor, on the CPU and without its history, so that it can go to other processes."""
    if pixels.ndim != ndim or pixels.shape[-3] != 3 or 0 in pixels.shape:
        expected = "(3, height, width)" if ndim == 3 else "(n, 3, height, width)"
        raise UserError(f"{what} has the shape {tuple(pixels.shape)}: images are {expected}, none of them 0")
    if not pixels.is_floating_point():
        raise UserError(
            f"{what} holds {str(pixels.dtype).removeprefix('torch.')}: normalise it as the model expects "
            f"(float, minus mean, over std), or give PIL images"
        )
    return pixels.detach().cpu()


def _regrouped(images: Images, groups: Groups) -> Images:
    if isinstance(images, LoaderImages):
        return LoaderImages(images.loader, groups)
    if isinstance(images, StreamImages):
        return images.regrouped(groups)
    images = copy.copy(images)
    images.groups = resolve_groups(images.names, groups)
    return images
