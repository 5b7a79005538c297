"""Reads back what was written for TensorBoard."""

import glob
import pathlib
import struct

import tensorboardX.proto.event_pb2


def raw_events_of(folder):
    """The events of TensorBoard's only file in the folder."""
    (path,) = glob.glob(f"{folder}/events.out.tfevents.*")
    data = pathlib.Path(path).read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield tensorboardX.proto.event_pb2.Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]  # length, its checksum, the event, its checksum


def events_of(folder):
    """The values as (step, name, value), in the order in which they were written."""
    return [(event.step, value.tag, value) for event in raw_events_of(folder) for value in event.summary.value]
