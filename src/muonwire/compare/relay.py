"""Cables with a delay: Ethernet frames between pairs of tap interfaces, held for a time in one direction.

Run as a program of its own, by its path, so that it starts without the package's imports:

    python -I relay.py DELAY_S HOST_END:SWITCH_END ...

It makes the interfaces in its own network namespace, writes "ready" on standard output once they are there, and ends when its
standard input does, so that it never outlives who started it. Frames from a host's end to the switch's are held; the other way they
pass at once, so that a frame between two hosts is held once. Frames carry the kernel's header for segments of one TCP stream
(IFF_VNET_HDR): up to 64 kB pass as one.
"""

import fcntl
import os
import select
import struct
import sys
import time
from collections import deque

_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
# Checksums left open, and segments of TCP over IPv4, IPv6, and with ECN bits.
_OFFLOAD = 0x01 | 0x02 | 0x04 | 0x08
_FRAME = 1 << 17
# Frames that are taken from one end before the others are looked at.
_BURST = 64


def open_tap(name: str) -> int:
    """Make a tap interface; returns what frames are read from and written to."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR))
    fcntl.ioctl(fd, _TUNSETOFFLOAD, _OFFLOAD)
    return fd


def put(fd: int, frame: bytes) -> None:
    """Write a frame; one that the interface does not take, as while it is down, is lost as on a cable."""
    try:
        os.write(fd, frame)
    except OSError:
        pass


def relay(delay_s: float, cables: list[tuple[int, int]]) -> None:
    """Carry frames until standard input ends."""
    other = {end: fd for host, switch in cables for end, fd in ((host, switch), (switch, host))}
    held = {host: deque[tuple[float, bytes]]() for host, _ in cables}
    ends = [0, *other]
    while True:
        heads = [queue[0][0] for queue in held.values() if queue]
        left_s = max(min(heads) - time.monotonic(), 0.0) if heads else None
        ready, _, _ = select.select(ends, [], [], left_s)
        for fd in ready:
            if fd == 0:
                if not os.read(0, 4096):
                    return
                continue
            due_s = time.monotonic() + delay_s
            for _ in range(_BURST):
                try:
                    frame = os.read(fd, _FRAME)
                except OSError:
                    break
                if fd in held:
                    held[fd].append((due_s, frame))
                else:
                    put(other[fd], frame)
        now_s = time.monotonic()
        for fd, queue in held.items():
            while queue and queue[0][0] <= now_s:
                put(other[fd], queue.popleft()[1])


def main() -> None:
    delay_s, *cables = sys.argv[1:]
    opened = [(open_tap(host), open_tap(switch)) for host, _, switch in (c.partition(":") for c in cables)]
    try:
        # A link does not slow down where the machine's cores are busy.
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except OSError:
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    print("ready", flush=True)
    relay(float(delay_s), opened)


if __name__ == "__main__":
    main()
