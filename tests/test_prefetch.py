"""Batches sent to a GPU one ahead; its streams are stand-ins here, `test_cuda.py` has real ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vitprobe.data import prefetch
from vitprobe.data.batches import Batch
from vitprobe.data.prefetch import on_their_way
from vitprobe.errors import UserError


class Log(list[str]):
    """What happened, in its order."""

    def batches(self, count: int, error: Exception | None = None) -> Iterator[Batch]:
        for number in range(count):
            self.append(f"read {number}")
            yield Batch(torch.full((1, 3, 2, 2), float(number)), [number], [str(number)], ["g"])
        if error is not None:
            raise error


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()

    class Stream:
        def __init__(self, device: torch.device) -> None: ...

    monkeypatch.setattr(prefetch.torch.cuda, "Stream", Stream)
    monkeypatch.setattr(
        prefetch, "_send", lambda batch, device, side: log.append(f"send {batch.names[0]}") or (batch, None)
    )
    return log


def test_the_cpu_gets_batches_as_they_come() -> None:
    log = Log()
    for batch in on_their_way(log.batches(2), torch.device("cpu")):
        log.append(f"use {batch.names[0]}")
    assert log == ["read 0", "use 0", "read 1", "use 1"]


def test_a_gpu_gets_the_next_while_it_works(log: Log) -> None:
    for batch in on_their_way(log.batches(3), torch.device("cuda")):
        log.append(f"use {batch.names[0]}")
    assert log == ["read 0", "send 0", "read 1", "send 1", "use 0", "read 2", "send 2", "use 1", "use 2"]
    assert list(on_their_way(iter(()), torch.device("cuda"))) == []


def test_what_was_read_comes_before_an_error(log: Log) -> None:
    used = []
    with pytest.raises(UserError, match="a worker died"):
        for batch in on_their_way(log.batches(2, UserError("a worker died")), torch.device("cuda")):
            used.append(batch.names[0])
    assert used == ["0", "1"]


@pytest.mark.parametrize("memory", ["enough", "too little"])
def test_a_copy_is_waited_for_and_one_without_memory_left_out(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []

    class Pixels(torch.Tensor):
        def to(self, *args: object, **kwargs: object) -> torch.Tensor:
            if memory == "too little":
                raise torch.OutOfMemoryError("no room")
            assert kwargs == {"non_blocking": True}
            return self

        def record_stream(self, stream: object) -> None:
            told.append("its memory is in use")

    class Stream:
        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None: ...

        def record_event(self) -> str:
            return "copied"

        def wait_event(self, event: object) -> None:
            told.append(event)

    monkeypatch.setattr(prefetch.torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(prefetch.torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(prefetch.torch.cuda, "current_stream", lambda device: Stream())
    batch = Batch(torch.zeros(1, 3, 2, 2), [0], ["0"], ["g"])
    batch.pixels = torch.zeros(1, 3, 2, 2).as_subclass(Pixels)
    sent = prefetch.__dict__["_send"].__wrapped__ if hasattr(prefetch._send, "__wrapped__") else prefetch._send
    arrived = prefetch._arrived.__wrapped__ if hasattr(prefetch._arrived, "__wrapped__") else prefetch._arrived
    assert arrived(sent(batch, torch.device("cuda"), Stream())).names == ["0"]
    assert told == (["copied", "its memory is in use"] if memory == "enough" else [])
