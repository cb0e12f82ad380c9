"""A cable between two interfaces that delays every frame: python3 slow-cable.py A B MILLISECONDS. Runs until SIGTERM; then it
says how many frames it has carried.

Raw sockets instead of netem, which not every kernel has. Both ends must send frames with finished checksums, unsegmented."""

import collections
import select
import signal
import socket
import sys
import time

ETH_P_ALL = 3
SOL_PACKET, PACKET_OUTGOING, PACKET_IGNORE_OUTGOING = 263, 4, 23

ends = []
for name in sys.argv[1:3]:
    side = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    side.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    side.bind((name, ETH_P_ALL))
    ends.append(side)
delay = float(sys.argv[3]) / 1000
carried = 0


def end(*_):
    print(carried, flush=True)
    sys.exit()


signal.signal(signal.SIGTERM, end)
late = collections.deque()  # (due, end to send it from, frame)
print("ready", flush=True)
while True:
    wait = None if not late else max(0, late[0][0] - time.monotonic())
    readable, _, _ = select.select(ends, [], [], wait)
    for side in readable:
        frame, address = side.recvfrom(1 << 17)
        if address[2] != PACKET_OUTGOING:
            late.append((time.monotonic() + delay, ends[1 - ends.index(side)], frame))
    while late and late[0][0] <= time.monotonic():
        _, side, frame = late.popleft()
        try:
            side.send(frame)
            carried += 1
        except OSError as error:  # an end that is down loses frames, as cables do
            print(error, file=sys.stderr, flush=True)
