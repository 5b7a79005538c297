"""Reads back what was written for TensorBoard and W&B."""

import glob
import json
import pathlib
import struct

import tensorboardX.proto.event_pb2
import wandb.proto.wandb_internal_pb2


def raw_events_of(folder):
    """What is in TensorBoard's only file."""
    (path,) = glob.glob(f"{folder}/events.out.tfevents.*")
    data = pathlib.Path(path).read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield tensorboardX.proto.event_pb2.Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]  # length, its checksum, the event, its checksum


def events_of(folder):
    """The values in it, as (step, name, value), in the order in which they were written."""
    return [(event.step, value.tag, value) for event in raw_events_of(folder) for value in event.summary.value]


def rows_of(folder):
    """What W&B logged, by step. Its files are LevelDB's logs: blocks of 32 KiB, of records that go on in the next."""
    wandb.teardown()  # the process that writes them may be at it still, after the run is finished
    (path,) = glob.glob(f"{folder}/wandb/offline-run-*/*.wandb")
    data, position, record, rows = pathlib.Path(path).read_bytes(), 7, b"", {}
    while position < len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            message = wandb.proto.wandb_internal_pb2.Record.FromString(record)
            if message.WhichOneof("record_type") == "history":
                values = {}
                for item in message.history.item:
                    *outer, name = item.nested_key or [item.key]
                    node = values
                    for key in outer:
                        node = node.setdefault(key, {})
                    node[name] = json.loads(item.value_json)
                rows[values["_step"]] = values
            record = b""
    return rows
