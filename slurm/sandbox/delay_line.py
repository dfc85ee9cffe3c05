"""Carries Ethernet frames between two interfaces, each a fixed time after it came: what netem does, in user space.

    python delay_line.py INTERFACE INTERFACE MILLISECONDS

A program of its own, which knows nothing of the sandbox and needs root. Prints ``ready`` once it carries frames, and
leaves when one of the interfaces is gone; one that is merely down loses what is sent to it, as a cable does.

Frames come and go with the header of virtio (packet(7), PACKET_VNET_HDR), so that what the kernel leaves to network
cards, checksums and the cutting of large segments, stays left to the next one.
"""

from __future__ import annotations

import errno
import select
import socket
import sys
import time
from collections import deque
from pathlib import Path

SOL_PACKET = 263
PACKET_VNET_HDR = 15
PACKET_IGNORE_OUTGOING = 23
ETH_P_ALL = 3
LARGEST_FRAME = 10 + 65535 + 64
"""Bytes: the header of virtio, a segment that is still to be cut, and room for the header of Ethernet and tags."""
BUFFER_BYTES = 64 * 2**20
GONE = (errno.ENODEV, errno.ENXIO)


def listen(interface: str) -> socket.socket:
    """A socket that gets every frame that arrives at an interface, and sends what it is given as it is."""
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    end.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    end.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
    end.bind((interface, ETH_P_ALL))
    end.setblocking(False)
    return end


def take_in(end: socket.socket, waiting: deque[tuple[float, bytes]], delay_s: float) -> None:
    """Queue what has arrived, each frame with the time at which it is due."""
    while True:
        try:
            frame = end.recv(LARGEST_FRAME)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno in GONE:
                raise
            continue  # the interface went down, which is told once
        waiting.append((time.monotonic() + delay_s, frame))


def give_out(waiting: deque[tuple[float, bytes]], end: socket.socket) -> None:
    """Send what is due."""
    while waiting and waiting[0][0] <= time.monotonic():
        try:
            end.send(waiting[0][1])
        except BlockingIOError:
            return  # the interface's queue is full: a little later
        except OSError as error:
            if error.errno in GONE:
                raise
        waiting.popleft()


def carry(names: tuple[str, str], delay_s: float) -> None:
    """Carry frames both ways until an interface is gone."""
    ends = listen(names[0]), listen(names[1])
    ways: tuple[deque[tuple[float, bytes]], deque[tuple[float, bytes]]] = (deque(), deque())
    print("ready", flush=True)
    while all(Path("/sys/class/net", name).exists() for name in names):
        due = [way[0][0] for way in ways if way]
        # At least once a second, to see whether both interfaces are still there; a full queue is not asked in a circle.
        pause_s = max(0.0001, min(due) - time.monotonic()) if due else 1.0
        readable, _, _ = select.select(ends, [], [], min(1.0, pause_s))
        for end, way in zip(ends, ways, strict=True):
            if end in readable:
                take_in(end, way, delay_s)
        for way, end in zip(ways, reversed(ends), strict=True):
            give_out(way, end)


if __name__ == "__main__":
    try:
        carry((sys.argv[1], sys.argv[2]), float(sys.argv[3]) / 1000)
    except OSError as problem:
        if problem.errno not in GONE:
            raise
