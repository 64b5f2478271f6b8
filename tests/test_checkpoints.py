"""Checkpoint files: official layouts fit, damaged ones are one line, and nothing in them ever runs."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitprobe.errors import UserError
from vitprobe.models import checkpoints
from vitprobe.models.checkpoints import classifier_size, load_into, read_checkpoint, strip_prefix
from vitprobe.models.meta import on_meta
from vitprobe.models.pickles import Foreign, TensorRecord, unpickle

ZIP_AND_LEGACY = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def small_vit(seed: int = 0, **options) -> VisionTransformer:
    torch.manual_seed(seed)
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    return VisionTransformer(**{**settings, **options})


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def save(content, path: Path, zipped: bool = True, protocol: int = 2) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    return path


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def refusal(path: Path) -> str:
    """What is said of a file that is refused: after its name, one line."""
    with pytest.raises(UserError) as caught:
        read_checkpoint(path)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{path} ")
    return text.removeprefix(f"{path} ")


def fits(module: nn.Module, state: dict[str, Tensor]) -> None:
    load_into(module, state, source="it")


def misfit(module: nn.Module, state: dict[str, Tensor]) -> str:
    before = weights(module)
    with pytest.raises(UserError) as caught:
        load_into(module, state, source="file.pth")
    assert_same(weights(module), before)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("file.pth does not fit ")
    return text.removeprefix("file.pth does not fit ")


def test_the_helper_for_equality_can_fail():
    with pytest.raises(AssertionError):
        assert_same({"a": torch.ones(1)}, {"a": torch.zeros(1)})


# Files that are read -------------------------------------------------------------------------------------------------


@ZIP_AND_LEGACY
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_state_dict_comes_back(tmp_path, zipped, protocol):
    state = small_vit().state_dict()
    assert_same(read_checkpoint(save(state, tmp_path / "file.pth", zipped, protocol)), state)


@ZIP_AND_LEGACY
def test_every_kind_of_tensor(tmp_path, zipped):
    base = torch.arange(24.0)
    tied = torch.randn(3, 4)
    state: dict[str, Any] = {
        **{
            str(dtype): torch.tensor([0, 1, 1]).to(dtype)
            for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16)
        },
        **{str(dtype): torch.tensor([0, 1, 1]).to(dtype) for dtype in (torch.int8, torch.uint8, torch.bool)},
        "complex": torch.tensor([1j, 2.0]),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 5),
        "transposed": base.view(4, 6).t(),
        "slice": base[5:11:2],
        "parameter": nn.Parameter(torch.randn(2, 3)),
        "tied": tied,
        "tied again": tied,
    }
    found = read_checkpoint(save(state, tmp_path / "file.pth", zipped))
    assert_same(found, {name: tensor.detach() for name, tensor in state.items()})
    assert found["tied"].data_ptr() == found["tied again"].data_ptr()


def test_kinds_of_number_that_only_newer_files_have(tmp_path):
    state = {"small": torch.tensor([0.5, 2.0]).to(torch.float8_e4m3fn), "other": torch.ones(3)}
    found = read_checkpoint(save(state, tmp_path / "file.pth"))
    assert torch.equal(found["small"].float(), torch.tensor([0.5, 2.0]))


def test_a_tensor_with_attributes(tmp_path):
    tensor = torch.randn(3)
    tensor.note = "written by hand"  # type: ignore[attr-defined]
    marked = nn.Parameter(torch.randn(2))
    marked.note = "too"  # type: ignore[attr-defined]
    found = read_checkpoint(save({"a": tensor, "b": marked}, tmp_path / "file.pth"))
    assert torch.equal(found["a"], tensor)
    assert torch.equal(found["b"], marked.detach())
    assert not hasattr(found["a"], "note")


def test_safetensors_by_content_whatever_the_suffix(tmp_path):
    state = weights(small_vit())
    for name in ("file.safetensors", "file.bin"):
        save_file(state, tmp_path / name)
        assert {*read_checkpoint(tmp_path / name)} == {*state}
    path = save(state, tmp_path / "misnamed.safetensors")
    assert_same(read_checkpoint(path), state)
    assert_same(read_checkpoint(str(path)), state)


HOLDERS = (
    *("model", "state_dict", "teacher", "student", "model_state", "model_ema", "module", "target_encoder", "encoder"),
    *("backbone", "something_of_their_own"),
)


@pytest.mark.parametrize("holder", HOLDERS)
def test_weights_are_found_under(tmp_path, holder):
    state = weights(small_vit())
    content = {"epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}, holder: state}
    assert_same(read_checkpoint(save(content, tmp_path / "file.pth")), state)
    assert_same(read_checkpoint(save({"model": {"teacher": state}}, tmp_path / "deep.pth")), state)


def test_the_teacher_comes_before_the_student(tmp_path):
    content = {"student": {"a": torch.zeros(1)}, "teacher": {"a": torch.ones(1)}}
    assert read_checkpoint(save(content, tmp_path / "file.pth"))["a"] == 1


def test_what_is_not_wanted_is_not_read(tmp_path):
    """The optimiser's storages are missing from the file, and nobody minds."""
    path = save({"model": {"a": torch.ones(3)}, "optimizer": {"b": torch.zeros(1000)}}, tmp_path / "file.pth")
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(tmp_path / "part.pth", "w") as part:
        for name in whole.namelist():
            if not name.endswith("data/1"):
                part.writestr(name, whole.read(name))
    assert_same(read_checkpoint(tmp_path / "part.pth"), {"a": torch.ones(3)})


# Foreign classes and payloads ----------------------------------------------------------------------------------------


class Own:
    """A class of the one who trained."""

    def __init__(self):
        self.values = [1, 2]


@ZIP_AND_LEGACY
@pytest.mark.parametrize("protocol", [2, 4])
def test_the_harmless_classes_of_training_checkpoints(tmp_path, zipped, protocol):
    state = weights(small_vit())
    content = {
        "model": OrderedDict(state),
        "args": argparse.Namespace(lr=0.1, nested=argparse.Namespace(x=[1])),
        "epoch": np.float64(3.0),
        "counts": defaultdict(int, {"a": 1}),
        "numbers": np.arange(5),
        "own": Own(),
        "path": Path("somewhere"),
        "kinds": [torch.float32, torch.device("cpu"), torch.Size([1, 2]), {1, 2}, frozenset({3}), 1j, slice(1, 2)],
        "generator": torch.Generator().get_state(),
    }
    assert_same(read_checkpoint(save(content, tmp_path / "file.pth", zipped, protocol)), state)


def test_foreign_objects_take_everything_and_do_nothing():
    foreign = Foreign()
    foreign.label = "a.b"
    assert foreign(1, 2, x=3).label == "a.b"
    assert foreign.__new__(foreign, 1).label == "a.b"  # as a pickle calls it
    foreign.append(1)
    foreign.extend([1])
    foreign.__setstate__({"label": "no"})
    assert foreign.label == "a.b"


class Payload:
    """Pickles as a call of `function(*args)`, and then whatever more a reduction may ask for."""

    def __init__(self, function, args, *more):
        self.reduction = (function, args, *more)

    def __reduce__(self):
        return self.reduction

    def __call__(self):
        """Lets the result of one call be called by the next."""


def payloads(target: Path) -> dict[str, object]:
    touch = f"touch {target}"
    write = f"open({str(target)!r}, 'w')"
    return {
        "os.system": Payload(os.system, (touch,)),
        "open": Payload(open, (str(target), "w")),
        "eval": Payload(eval, (write,)),
        "exec": Payload(exec, (write,)),
        "subprocess": Payload(subprocess.Popen, (["touch", str(target)],)),
        "getattr": Payload(getattr, (Payload(__import__, ("os",)), "system")),
        "call of a getattr": Payload(Payload(getattr, (Payload(__import__, ("os",)), "system")), (touch,)),
        "state": Payload(Own, (), {"__class__": Payload(os.system, (touch,))}),
        "slot state": Payload(Own, (), (None, {"values": Payload(os.system, (touch,))})),
        "items": Payload(list, (), None, iter([Payload(os.system, (touch,))])),
        "pairs": Payload(dict, (), None, None, iter([("a", Payload(os.system, (touch,)))])),
        "setter": Payload(Own, (), {"a": 1}, None, None, exec),
        "factory": defaultdict(os.getcwd, {"a": Payload(os.system, (touch,))}),
        "import": Payload(__import__, ("antigravity",)),
        "torch.load": Payload(torch.load, (str(target),)),
        "hub": Payload(torch.hub.load, (str(target.parent), "x", "local")),
    }


NAMES = list(payloads(Path("x")))


@ZIP_AND_LEGACY
@pytest.mark.parametrize("name", NAMES)
def test_payloads_stay_inert(tmp_path, zipped, name):
    target = tmp_path / "was_here"
    payload = payloads(target)[name]
    state = {"a": torch.ones(2)}
    nested = {"model": state, "args": payload, "deep": [({"x": [payload]},)], "key": {("k",): payload}}
    modules = set(sys.modules)
    path = save(nested, tmp_path / "file.pth", zipped)
    target.unlink(missing_ok=True)  # some run already when they are written
    assert_same(read_checkpoint(path), state)
    assert not target.exists()
    assert "antigravity" not in set(sys.modules) - modules


@ZIP_AND_LEGACY
def test_a_payload_at_the_top_or_among_the_weights(tmp_path, zipped):
    target = tmp_path / "was_here"
    payload = Payload(os.system, (f"touch {target}",))
    path = save(payload, tmp_path / "top.pth", zipped)
    assert refusal(path) == (
        f"holds a whole pickled object ({os.system.__module__}.system), which is code to run: save its state_dict() "
        "instead"
    )
    path = save({"a": torch.ones(2), "b": payload, payload: torch.ones(1)}, tmp_path / "among.pth", zipped)
    assert_same(read_checkpoint(path), {"a": torch.ones(2)})
    assert not target.exists()


def test_a_payload_does_run_where_nothing_stops_it(tmp_path):
    """The proof that the tests above could fail."""
    target = tmp_path / "was_here"
    path = save(Payload(os.system, (f"touch {target}",)), tmp_path / "file.pth")
    torch.load(path, weights_only=False)
    assert target.exists()


def hand_written(*opcodes: bytes) -> object:
    return unpickle(io.BytesIO(b"\x80\x02" + b"".join(opcodes) + b"."))[0]


TENSOR_FUNCTION = b"ctorch._utils\n_rebuild_tensor_v2\n"


@pytest.mark.parametrize(
    "opcodes",
    [
        # setattr and update of __dict__ on what find_class gives: state is never set
        (TENSOR_FUNCTION, b"}", b"X\x09\x00\x00\x00_functioncos\nsystem\nsb"),
        (TENSOR_FUNCTION, b"N}", b"X\x09\x00\x00\x00_functioncos\nsystem\ns\x86b"),
        (b"ccollections\nOrderedDict\n", b"}", b"X\x08\x00\x00\x00__init__cos\nsystem\nsb"),
        (b"ctorch\nfloat32\n", b"}", b"X\x05\x00\x00\x00dtypecos\nsystem\nsb"),
        (b"cos\nsystem\n", b"}", b"X\x05\x00\x00\x00labelK\x01sb"),
    ],
)
def test_what_a_file_is_given_cannot_be_changed(opcodes):
    from vitprobe.models import pickles

    before = {name: dict(vars(value)) for name, value in pickles._NAMES.items()}
    result = hand_written(*opcodes)
    assert {name: dict(vars(value)) for name, value in pickles._NAMES.items()} == before
    assert getattr(result, "label", "os.system") == "os.system"


@pytest.mark.parametrize(
    "opcodes",
    [
        (b"(S'touch x'\nios\nsystem\n",),  # INST
        (b"(cos\nsystem\nS'touch x'\no",),  # OBJ
        (b"cos\nsystem\nS'touch x'\n\x85\x81",),  # NEWOBJ
        (b"cos\nsystem\nS'touch x'\n\x85}\x92",),  # NEWOBJ_EX
        (b"X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93S'touch x'\n\x85R",),  # STACK_GLOBAL
    ],
)
def test_every_way_of_making_an_object_makes_an_inert_one(opcodes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = hand_written(*opcodes)
    assert isinstance(result, Foreign)
    assert result.label == "os.system"
    assert list(tmp_path.iterdir()) == []


def test_keys_that_would_take_forever_to_hash_are_left_out():
    twice = b")q\x000" + b"".join(b"h%ch%c\x86q%c0" % (n, n, n + 1) for n in range(200)) + b"h%c" % 200
    assert hand_written(b"}", twice, b"K\x01s") == {}
    assert hand_written(b"}(", twice, b"K\x01S'a'\nK\x02u") == {"a": 2}
    assert hand_written(b"(", twice, b"K\x01S'a'\nK\x02d") == {"a": 2}
    assert hand_written(b"\x8f(", twice, b"\x90") == set()
    assert hand_written(b"(", twice, b"\x91") == frozenset()
    pairs = b"](](", twice, b"K\x01e](S'a'\nK\x02ee\x85R"
    assert hand_written(b"ccollections\nOrderedDict\n", *pairs) == {"a": 2}


def test_names_in_a_file_cannot_break_a_line_or_colour_a_terminal(tmp_path):
    hostile = "two\nlines\x1b[31m" + "x" * 500
    said = refusal(save({hostile: 1, "b": 2}, tmp_path / "file.pth"))
    assert said.startswith("holds no weights: only two lines?[31mxxx")
    assert len(said) < 150
    assert "\x1b" not in misfit(small_vit(), {**weights(small_vit()), hostile: torch.ones(1)})
    content = b"\x80\x04\x8c\x05a\x1b\nbc\x8c\x01d\x93."
    path = save(torch.ones(1), tmp_path / "other.pth")
    assert refusal(rewrite(path, {"data.pkl": content})).startswith("holds a whole pickled object (a? bc.d)")


@pytest.mark.parametrize(
    "opcodes",
    [
        (b"\x82\x01",),  # EXT1: a registered extension
        (b"K\x01Q",),  # a persistent id that is no storage
        (b"(S'storage'\nNS'0'\nS'cpu'\nK\x01tQ",),
        (b"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nS'1'\ntQ",),
        (b"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nK\x01(K\x01ttQ",),  # a view of another storage
        (b"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nK\x01tQ(S'storage'\nctorch\nLongStorage\nS'0'\nNK\x01tQ",),
        (b"K\x05)\x81",),
        (b"]K\x00]K\x01\x86R",),
        (b"cos\nsystem\nK\x05R",),
    ],
)
def test_pickles_that_make_no_sense(opcodes):
    from vitprobe.models.pickles import BadFileError

    with pytest.raises(BadFileError, match=r"^is damaged: its pickle cannot be read"):
        hand_written(*opcodes)


def test_tensors_of_other_kinds_are_foreign():
    storage = b"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nK\x04tQ"
    rest = b"K\x00(K\x04t(K\x01t\x89N"
    assert isinstance(hand_written(TENSOR_FUNCTION, b"(", storage, rest, b"tR"), TensorRecord)
    assert isinstance(hand_written(TENSOR_FUNCTION, b"(", storage, rest, b"}S'neg'\n\x88stR"), Foreign)
    assert isinstance(hand_written(TENSOR_FUNCTION, b"(", b"N", rest, b"tR"), Foreign)
    third = b"ctorch._utils\n_rebuild_tensor_v3\n"
    assert isinstance(hand_written(third, b"(", storage, rest, b"ctorch\nint32\ntR"), TensorRecord)
    assert isinstance(hand_written(third, b"(", storage, rest, b"cos\nsystem\ntR"), Foreign)
    by_type = b"ctorch._tensor\n_rebuild_from_type_v2\n"
    assert isinstance(hand_written(by_type, b"(cos\nsystem\nNS'touch x'\n\x85NtR"), Foreign)


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((5,), (1,), 0),  # longer than its storage
        ((2,), (1,), 3),
        ((2, 2), (10**12, 1), 0),
        ((10**9, 10**9), (0, 0), 0),  # any amount of memory for nothing
        ((2,), (-1,), 3),
        ((-2,), (1,), 0),
        ((2,), (1, 1), 0),
        (("a",), (1,), 0),
        ((2.0,), (1,), 0),
        ((True,), (1,), 0),
        (3, 1, 0),
        ((2,), (1,), None),
        ((10**30, 0), (1, 1), 0),
    ],
)
@ZIP_AND_LEGACY
def test_tensors_that_lie_about_their_shape(tmp_path, zipped, size, stride, offset):
    class Lie:
        def __init__(self, tensor):
            self.tensor = tensor

        def __reduce__(self):
            storage = self.tensor.untyped_storage()
            typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
            return torch._utils._rebuild_tensor_v2, (typed, offset, size, stride, False, OrderedDict())

    path = save({"model": {"weight": Lie(torch.arange(4.0))}}, tmp_path / "file.pth", zipped)
    assert refusal(path).startswith("is damaged at weight")


# Files that are none -------------------------------------------------------------------------------------------------


def picture(suffix: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, suffix)
    return stream.getvalue()


NONE = "is no checkpoint: neither safetensors nor a file that torch.save wrote"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is empty"),
        (b"\n <!DOCTYPE html><html>", "is no checkpoint but a web page: download the file itself"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid",
            "is no checkpoint but a Git LFS pointer to one: fetch it with git lfs pull",
        ),
        (picture("jpeg"), "is no checkpoint but a picture"),
        (picture("png"), "is no checkpoint but a picture"),
        (b"plain text, and some more of it", NONE),
        (bytes(range(256)) * 10, NONE),
        (pickle.dumps({"a": 1}), NONE),
        (pickle.dumps(Payload(os.abort, ())), NONE),
        (b"\x80", NONE),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path, content, text):
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    assert refusal(path) == text


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(UserError, match=rf"^there is no checkpoint file {tmp_path}/none\.pth$"):
        read_checkpoint(tmp_path / "none.pth")
    assert refusal(tmp_path) == "is not a file: give a checkpoint (.safetensors, .pth, .pt, .bin)"


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    path = save({"a": torch.ones(1)}, tmp_path / "file.pth")
    monkeypatch.setattr(Path, "open", refuse)
    assert refusal(path) == "cannot be read: Permission denied"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({}, "holds no weights"),
        ({"epoch": 3, "args": "x"}, "holds no weights: only epoch, args"),
        ({"model": {}, "b": 1, 3: 4, "c": 5}, "holds no weights: only model, b, 3, …"),
        ([torch.ones(1)], "holds no weights by name but a list"),
        (torch.ones(1), "holds no weights by name but a single tensor"),
        (
            {"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}},
            "holds several sets of weights (a, b): choose one with --weights-key KEY",
        ),
    ],
)
def test_checkpoints_without_weights(tmp_path, content, text):
    assert refusal(save(content, tmp_path / "file.pth")) == text


def test_safetensors_without_weights(tmp_path):
    save_file({}, tmp_path / "file.safetensors")
    assert refusal(tmp_path / "file.safetensors") == "holds no weights"


def test_a_whole_pickled_model(tmp_path):
    said = refusal(save(nn.Linear(2, 2), tmp_path / "file.pth"))
    assert said == (
        "holds a whole pickled object (torch.nn.modules.linear.Linear), which is code to run: "
        "save its state_dict() instead"
    )


def test_torchscript_is_refused(tmp_path):
    path = tmp_path / "file.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("file/data.pkl", b"")
        archive.writestr("file/constants.pkl", b"")
    text = "is a TorchScript archive, which holds code: save model.state_dict() instead"
    assert refusal(path) == text
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("file/code/__torch__.py", b"")
    assert refusal(path) == text


def test_other_archives(tmp_path):
    path = tmp_path / "weights.npz"
    np.savez(path, a=np.ones(3))
    assert refusal(path) == "is a zip archive that torch.save did not write"
    with tarfile.open(tmp_path / "old.tar", "w") as archive:
        archive.add(path, "storages")
    assert refusal(tmp_path / "old.tar") == NONE


def rewrite(path: Path, change: dict[str, bytes | None], compression: int = zipfile.ZIP_STORED) -> Path:
    """A copy of an archive with records replaced or left out."""
    target = path.with_name("changed.pth")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            content = change.get(name.partition("/")[2], old.read(name))
            if content is not None:
                new.writestr(name, content)
    return target


def test_damaged_zip_archives(tmp_path):
    path = save({"a": torch.arange(1000.0)}, tmp_path / "file.pth")
    assert refusal(rewrite(path, {"data/0": None})) == "is damaged at a: is damaged: it has no record data/0"
    said = refusal(rewrite(path, {"data/0": b"123"}))
    assert said == "is damaged at a: its storage has 3 bytes instead of 4000"
    assert refusal(rewrite(path, {"byteorder": b"big"})) == (
        "was saved on a big-endian machine, which is not read here"
    )
    assert refusal(rewrite(path, {"data.pkl": b"\x80\x02"})).startswith("is damaged: its pickle cannot be read")
    assert refusal(rewrite(path, {}, zipfile.ZIP_DEFLATED)) == (
        "is damaged: its records are not stored as torch.save stores them"
    )
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(10.0).numpy().tobytes()) + 8] ^= 1
    path.write_bytes(content)
    assert refusal(path).startswith("is damaged at a: is damaged: Bad CRC-32")


@ZIP_AND_LEGACY
def test_files_cut_off_anywhere(tmp_path, zipped):
    content = save(weights(small_vit(depth=1)), tmp_path / "file.pth", zipped).read_bytes()
    path = tmp_path / "cut.pth"
    for length in [*range(1, 64, 3), *range(64, len(content), len(content) // 40), len(content) - 1]:
        path.write_bytes(content[:length])
        assert refusal(path)


def test_safetensors_cut_off_anywhere(tmp_path):
    path = tmp_path / "file.safetensors"
    save_file(weights(small_vit(depth=1)), path)
    content = path.read_bytes()
    for length in [0, 1, 8, 9, 100, len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:length])
        assert refusal(path).startswith("is no safetensors file, or a damaged one (")


@settings(max_examples=150, deadline=None)
@given(data=st.data(), zipped=st.booleans())
def test_flipped_bytes_never_end_in_anything_but_one_line(tmp_path_factory, data, zipped):
    folder = tmp_path_factory.mktemp("flipped")
    path = save({"model": {"a": torch.ones(3, 2), "b": torch.zeros(2)}, "epoch": 1}, folder / "file.pth", zipped)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        found = read_checkpoint(path)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert all(isinstance(tensor, Tensor) for tensor in found.values())


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=200), legacy=st.booleans())
def test_random_bytes_are_refused(tmp_path_factory, content, legacy):
    from vitprobe.models.saved_files import LEGACY_MAGIC

    path = tmp_path_factory.mktemp("random") / "file.pth"
    path.write_bytes((b"\x80\x02" + LEGACY_MAGIC + b"." if legacy else b"") + content)
    assert refusal(path)


def legacy(*parts: object, tail: bytes = b"") -> bytes:
    from vitprobe.models.saved_files import LEGACY_MAGIC

    head = b"\x80\x02" + LEGACY_MAGIC + b"."
    return head + b"".join(part if isinstance(part, bytes) else pickle.dumps(part, 2) for part in parts) + tail


SYSTEM = {"little_endian": True}
STORAGE = (
    b"\x80\x02}S'a'\nctorch._utils\n_rebuild_tensor\n((S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nK\x02NtQ"
    b"K\x00K\x02\x85K\x01\x85tRs."
)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (legacy(1000), "was saved by a version of torch that is not known"),
        (legacy(1001, {"little_endian": False}), "was saved on a big-endian machine, which is not read here"),
        (legacy(1001, 3), "was saved on a big-endian machine, which is not read here"),
        (legacy(1001, SYSTEM, STORAGE, ["1"]), "is damaged or cut off"),
        (legacy(1001, SYSTEM, STORAGE, [1]), "is damaged or cut off"),
        (legacy(1001, SYSTEM, STORAGE, ["0"]), "is damaged or cut off"),
        (
            legacy(1001, SYSTEM, STORAGE, ["0"], tail=struct.pack("<q", 3)),
            "is damaged: a storage is not as long as it should be",
        ),
        (legacy(1001, SYSTEM, STORAGE, ["0"], tail=struct.pack("<q", 2)), "is damaged at a: the file is cut off"),
        (legacy(1001, SYSTEM, STORAGE, 7), "is damaged at a: the file is cut off"),
    ],
)
def test_damaged_legacy_files(tmp_path, content, text):
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    assert refusal(path) == text


def test_the_legacy_file_of_those_tests_is_sound_when_whole(tmp_path):
    path = tmp_path / "file.pth"
    path.write_bytes(legacy(1001, SYSTEM, STORAGE, ["0"], tail=struct.pack("<qff", 2, 1.0, 2.0)))
    assert_same(read_checkpoint(path), {"a": torch.tensor([1.0, 2.0])})


# Fitting -------------------------------------------------------------------------------------------------------------


def test_mae_as_it_was_released(tmp_path):
    source = small_vit(1)
    extras = {
        "mask_token": torch.zeros(1, 1, 16),
        "decoder_embed.weight": torch.zeros(16, 32),
        "decoder_pos_embed": torch.zeros(1, 17, 16),
        "decoder_blocks.0.norm1.weight": torch.ones(16),
        "decoder_pred.bias": torch.ones(192),
    }
    content = {"model": {**weights(source), **extras}, "args": argparse.Namespace(lr=1.0), "epoch": np.float64(799)}
    target = small_vit(2)
    fits(target, read_checkpoint(save(content, tmp_path / "file.pth")))
    assert_same(weights(target), weights(source))


def test_dino_as_it_was_released(tmp_path):
    source = small_vit(1)
    network = {f"module.backbone.{name}": tensor for name, tensor in weights(source).items()}
    network |= {"module.head.mlp.0.weight": torch.zeros(8, 32), "module.head.last_layer.weight_v": torch.zeros(9, 8)}
    path = save({"student": {}, "teacher": network, "args": argparse.Namespace(), "epoch": 1}, tmp_path / "file.pth")
    target = small_vit(2)
    fits(target, read_checkpoint(path))
    assert_same(weights(target), weights(source))


@pytest.mark.parametrize(
    "prefix",
    [
        *("module.", "backbone.", "module.base_encoder.", "encoder.", "_orig_mod.module."),
        "model.teacher.backbone.",
    ],
)
def test_prefixes_of_wrappers_are_stripped(prefix):
    source, target = small_vit(1), small_vit(2)
    state = {f"{prefix}{name}": tensor for name, tensor in weights(source).items()}
    fits(target, {**state, "momentum_encoder.x": torch.ones(1), "queue": torch.ones(1)})
    assert_same(weights(target), weights(source))
    assert set(strip_prefix(state, target.state_dict())) == set(target.state_dict())


def test_a_models_own_prefix_stays():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = small_vit(1)

    state = weights(Wrapped())
    assert strip_prefix(state, state) == state
    assert strip_prefix({"module._orig_mod.unknown": torch.ones(1)}, []) == {"unknown": torch.ones(1)}
    assert strip_prefix({}, ["a"]) == {}
    fits(Wrapped(), {f"module.{name}": tensor for name, tensor in state.items()})


def test_deit_with_its_head():
    source = small_vit(1, num_classes=7)
    assert classifier_size(weights(source), small_vit()) == 7
    target = small_vit(2, num_classes=7)
    fits(target, weights(source))
    assert_same(weights(target), weights(source))
    bare = small_vit(2)
    fits(bare, weights(source))
    assert torch.equal(bare.norm.weight, source.norm.weight)


def test_a_head_that_is_no_linear_classifier_counts_none():
    state = weights(small_vit(num_classes=7))
    module = small_vit()
    assert classifier_size(weights(module), module) == 0
    assert classifier_size({**state, "head.weight": torch.zeros(7, 64)}, module) == 0
    assert classifier_size({**state, "head.weight": torch.zeros(7, 32, 1)}, module) == 0
    assert classifier_size({name: state[name] for name in state if name != "head.bias"}, module) == 0


def test_a_distilled_model_has_two_heads():
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    module = VisionTransformerDistilled(**options, num_classes=5)
    module.pretrained_cfg = {"classifier": ("head", "head_dist"), "architecture": "distilled"}  # type: ignore[assignment]
    assert classifier_size(weights(module), module) == 5
    assert classifier_size({**weights(module), "head_dist.weight": torch.ones(4, 32)}, module) == 0


def test_attention_pooling_goes_where_the_model_has_none():
    source = timm.create_model("vit_base_patch32_siglip_256.v2_webli", depth=1)
    target = timm.create_model("vit_base_patch32_siglip_gap_256.v2_webli", depth=1)
    assert any(name.startswith("attn_pool.") for name in source.state_dict())
    load_into(target, source.state_dict(), source="it")
    assert torch.equal(target.state_dict()["norm.weight"], source.state_dict()["norm.weight"])


@pytest.mark.parametrize(
    ("architecture", "home", "options"),
    [
        ("vit_tiny_r_s16_p8_224", "timm.models.vision_transformer_hybrid", {}),
        ("flexivit_small", "timm.models.vision_transformer", {"interpolation": "bilinear", "antialias": False}),
        (
            "vit_base_patch16_radio_v3",
            "timm.models.vision_transformer",
            {"interpolation": "bilinear", "antialias": False, "align_corners": True},
        ),
    ],
)
def test_the_translation_is_the_one_that_timm_asks_for(architecture, home, options):
    with on_meta():
        module = timm.create_model(architecture)
    translation = checkpoints._translation(module, {})
    assert (translation.func.__module__, translation.keywords) == (home, options)  # type: ignore[attr-defined]


def test_deit3_layer_scale_is_translated():
    source, target = small_vit(1, init_values=0.1), small_vit(2, init_values=0.3)
    state = {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): tensor
        for name, tensor in weights(source).items()
    }
    assert "blocks.0.gamma_1" in state
    fits(target, state)
    assert_same(weights(target), weights(source))


def test_dinov2_registers_are_translated():
    """cls_token takes its position in with it: timm's own rule for the official file."""
    target = small_vit(2, reg_tokens=4, no_embed_class=True)
    state = weights(small_vit(1))
    fits(target, {**state, "register_tokens": torch.full((1, 4, 32), 2.0), "mask_token": torch.zeros(1, 32)})
    assert torch.equal(target.cls_token, state["cls_token"] + state["pos_embed"][:, :1])
    assert torch.equal(target.pos_embed, state["pos_embed"][:, 1:])
    assert (target.reg_token == 2).all()


def test_positions_are_resampled_to_another_grid():
    target = small_vit(2, img_size=64)
    fits(target, weights(small_vit(1)))
    assert target.pos_embed.shape == (1, 65, 32)
    assert torch.equal(target.pos_embed[:, 0], small_vit(1).pos_embed[:, 0])


def test_half_precision_fits_a_float32_model():
    source, target = small_vit(1), small_vit(2)
    fits(target, {name: tensor.half() for name, tensor in weights(source).items()})
    assert {tensor.dtype for tensor in weights(target).values()} == {torch.float32}
    torch.testing.assert_close(target.cls_token, source.cls_token.half().float())


def test_a_class_of_the_users_own_is_translated_by_its_parents_rule():
    class Own(VisionTransformer):
        pass

    target = Own(img_size=64, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    fits(target, weights(small_vit(1)))
    linear = nn.Linear(2, 2)
    fits(linear, {"module.weight": torch.ones(2, 2), "module.bias": torch.ones(2)})
    assert (linear.weight == 1).all()


def test_misfits_name_three_of_each_kind():
    state = weights(small_vit(1))
    for name in [name for name in state if name.startswith("blocks.1.")]:
        state[name.replace("blocks.1.", "blocks.7.")] = state.pop(name)
    state["norm.weight"] = torch.ones(31)
    state["norm.bias"] = torch.ones(32, dtype=torch.int64)
    assert misfit(small_vit(), state) == (
        "VisionTransformer: 12 missing: blocks.1.norm1.weight, blocks.1.norm1.bias, blocks.1.attn.qkv.weight, …; "
        "12 unexpected: blocks.7.norm1.weight, blocks.7.norm1.bias, blocks.7.attn.qkv.weight, …; "
        "2 of another shape: norm.weight (has 31, needs 32), norm.bias (has 32 int64, needs 32)"
        " - give the architecture it was trained with (--arch NAME)"
    )


def test_another_width_is_a_misfit_and_so_is_nothing_at_all():
    module = small_vit()
    module.pretrained_cfg = {"architecture": "vit_small"}  # type: ignore[assignment]
    said = misfit(module, weights(small_vit(embed_dim=48)))
    assert said.startswith("vit_small: ")
    assert "cls_token (has 1×1×48, needs 1×1×32)" in said
    assert f"{len(weights(module))} missing: " in misfit(module, {})
    assert f"{len(weights(module))} missing: " in misfit(module, {"a": torch.ones(1)})


def test_another_patch_size_is_not_resampled_in_silence():
    assert misfit(small_vit(), weights(small_vit(patch_size=16))) == (
        "VisionTransformer: its patches are 16×16 pixels, the architecture's 8×8 (patch_embed.proj.weight)"
        " - give the architecture it was trained with (--arch NAME)"
    )


def test_weights_that_timm_cannot_translate():
    state = weights(small_vit(1))
    state["pos_embed"] = torch.zeros(1, 14, 32)  # no square grid
    said = misfit(small_vit(), state)
    assert "1 of another shape: pos_embed (has 1×14×32, needs 1×17×32) (" in said
