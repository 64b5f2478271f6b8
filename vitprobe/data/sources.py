"""Opening images: a folder, a tar, files, pictures or tensors in memory, a DataLoader - or the packaged photographs."""

from __future__ import annotations

import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from vitprobe.data.decoding import EXTENSIONS, BadChannelsError, BadImageError
from vitprobe.data.hub_sets import open_hub
from vitprobe.data.images import (
    FileImages,
    Groups,
    Images,
    ListImages,
    TarImages,
    TensorImages,
    check_groups,
    printable,
)
from vitprobe.data.listing import LeftOut, list_folder, list_tar
from vitprobe.data.loaders import LoaderImages
from vitprobe.data.samples import sample_images
from vitprobe.data.stacks import StackImages, is_stack
from vitprobe.data.webdatasets import open_webdataset
from vitprobe.errors import UserError

__all__ = ["EXTENSIONS", "BadImageError", "Images", "LoaderImages", "open_images"]


def open_images(data: Any = None, *, groups: Groups | object = None) -> Images:
    """The images in nearly anything that holds images.

    Args:
        data: None for the packaged sample photographs; a folder (searched with its subfolders, links too, but no
            folder twice; hidden files and folders are left out), a plain `.tar`, one image file, or one `.npy` of
            several images, (n, H, W, C), (n, C, H, W) or (n, H, W); "wds:DIR/{0000..0063}.tar" (WebDataset),
            "hfds:NAME" or "hfids:NAME" (a Hugging Face data set, on disk or streamed), each with "#SPLIT" at its end
            or without; a list of paths, PIL images or float tensors (C, H, W); a float tensor (n, C, H, W) or
            (C, H, W) - tensors are taken as normalised already; a torch DataLoader; or an `Images`. An image file is
            what Pillow reads, an array (`.npy`), or a TIFF with any number of bands.
        groups: what each image was taken from (crops of one photograph, frames of one film): one entry an image, or a
            function from an image's name. By default each image stands for itself.

    Raises:
        UserError: for what is missing, empty, broken or of another kind.

    Example:
        >>> from PIL import Image
        >>> images = open_images([Image.new("RGB", (64, 48), "red"), Image.new("RGB", (64, 48), "blue")])
        >>> images.source, len(images), images.names
        ('a list of 2 images', 2, ['0', '1'])
        >>> images.read(1).getpixel((0, 0))
        (0, 0, 255)
    """
    groups = check_groups(groups)
    if data is None:
        data = sample_images()
    if isinstance(data, Images):
        return data if groups is None else data.regrouped(groups)
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
        f"PIL images or tensors, a float tensor (n, channels, height, width), or a DataLoader"
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
    if is_stack(path):
        return StackImages(path, groups)
    images = FileImages(shown, [path], [path.name], groups)
    if path.suffix.lower() == ".npy":  # whose channels only a model can judge
        return images
    try:
        images.read(0)
    except BadChannelsError:  # which a model may take
        pass
    except BadImageError as error:
        raise UserError(f"{shown} cannot be read as an image: {error.reason}") from error
    return images


def _open_folder(folder: Path, groups: Groups) -> Images:
    shown = printable(str(folder))
    try:
        names, left_out = list_folder(folder)
    except ValueError as error:  # a name that timm cannot sort
        raise UserError(f"{shown} cannot be listed: {' '.join(str(error).split())}") from error
    if not names:
        raise UserError(f"{shown} holds no images, nor do its subfolders{_instead(left_out)}")
    images = FileImages(shown, [folder / name for name in names], names, groups)
    images.left_out = left_out
    return images


def _open_tar(path: Path, groups: Groups) -> Images:
    shown = printable(str(path))
    try:
        members, left_out = list_tar(path)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{shown} cannot be read as a plain tar: {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise UserError(f"{shown} cannot be listed: {' '.join(str(error).split())}") from error
    if not members:
        raise UserError(f"{shown} holds no images{_instead(left_out)}")
    places = [(member.start, member.size) for member in members]
    images = TarImages(path, places, [member.name for member in members], groups)
    images.left_out = left_out
    return images


def _instead(left_out: LeftOut) -> str:
    """What a place without images holds."""
    said = [line.partition(" left out: ")[2] for line in left_out.describe()]
    return f" (it holds {said[0]})" if said else ""


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
        f"entry {position} of the list is a {type(item).__name__}: give paths, PIL images or float tensors (C, H, W)"
    )


def _checked(pixels: Tensor, ndim: int, what: str) -> Tensor:
    """A user's tensor, on the CPU and without its history, so that it can go to other processes."""
    if pixels.ndim != ndim or 0 in pixels.shape or (pixels.shape[-1] in (1, 3) and pixels.shape[-3] not in (1, 3)):
        expected = "(channels, height, width)" if ndim == 3 else "(n, channels, height, width)"
        raise UserError(f"{what} has the shape {tuple(pixels.shape)}: images are {expected}, none of them 0")
    if not pixels.is_floating_point():
        raise UserError(
            f"{what} holds {str(pixels.dtype).removeprefix('torch.')}: normalise it as the model expects "
            f"(float, minus mean, over std), or give PIL images"
        )
    return pixels.detach().cpu()
