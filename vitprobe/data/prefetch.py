"""Batches that are on their way to a GPU while it works on those before them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from vitprobe.data.batches import Batch
from vitprobe.errors import UserError

Sent = tuple[Batch, Any]  # with the event that its copy is done; None where it is not copied


def on_their_way(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches, on a GPU with pixels that are copied there one batch ahead; elsewhere as they are.

    What is read ahead is given out before an error that comes behind it. A batch that the GPU has no memory for stays
    where it was.
    """
    if device.type != "cuda":
        yield from batches
        return
    side = torch.cuda.Stream(device)
    sent: list[Sent] = []
    try:
        for batch in batches:
            sent.append(_send(batch, device, side))
            if len(sent) > 1:
                yield _arrived(sent.pop(0))
    except UserError:
        yield from map(_arrived, sent)
        raise
    yield from map(_arrived, sent)


def _send(batch: Batch, device: torch.device, side: Any) -> Sent:
    try:
        with torch.cuda.stream(side):  # copies from page-locked memory there run beside what the GPU computes
            return replace(batch, pixels=batch.pixels.to(device, non_blocking=True)), side.record_event()
    except torch.OutOfMemoryError:
        return batch, None


def _arrived(sent: Sent) -> Batch:
    """A batch that was sent: what the GPU is told to do from here on waits for its pixels."""
    batch, copied = sent
    if copied is not None:
        current = torch.cuda.current_stream(batch.pixels.device)
        current.wait_event(copied)
        batch.pixels.record_stream(current)  # or its memory might be taken for the next copy too soon
    return batch
