"""Makes an interface send frames whole, with finished checksums, as a cable of ours needs them: python3 whole-frames.py NAME."""

import array
import fcntl
import socket
import struct
import sys

SIOCETHTOOL = 0x8946
TX_CHECKSUM, SCATTER_GATHER, TSO, GSO, GRO = 0x17, 0x19, 0x1F, 0x24, 0x2C

with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
    for command in (TX_CHECKSUM, SCATTER_GATHER, TSO, GSO, GRO):
        off = array.array("B", struct.pack("II", command, 0))
        request = struct.pack("16sP", sys.argv[1].encode(), off.buffer_info()[0])
        fcntl.ioctl(any_socket, SIOCETHTOOL, request)
