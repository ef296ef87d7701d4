"""Talks to a daemon's control socket, in good ways and in bad ones, and prints what it answers.

control.py SOCKET --say LINE      says a line
control.py SOCKET --half LINE     says a line, and that there will be no other
control.py SOCKET --silent SECONDS
control.py SOCKET --drip          a byte every half second, until the daemon has enough of it (40 s at most)
control.py SOCKET --long          a line without an end, until the daemon has enough of it
"""

import socket
import sys
import time

stream = socket.socket(socket.AF_UNIX)
stream.connect(sys.argv[1])
how = sys.argv[2]


def answer():
    said = b""
    try:
        while part := stream.recv(4096):
            said += part
    except ConnectionResetError:
        pass  # the daemon has not read all that was sent
    print(said.decode(), end="")


if how in ("--say", "--half"):
    stream.sendall(sys.argv[3].encode() + b"\n")
    if how == "--half":
        stream.shutdown(socket.SHUT_WR)
    answer()
elif how == "--silent":
    print("connected", flush=True)
    time.sleep(float(sys.argv[3]))
elif how == "--drip":
    stream.settimeout(0.5)
    for _ in range(80):
        stream.sendall(b"x")
        try:
            print(stream.recv(4096).decode(), end="")
            sys.exit(0)
        except TimeoutError:
            pass
    sys.exit("it still listens")
elif how == "--long":
    stream.setblocking(False)
    sent = 0
    while sent < 1 << 20:
        try:
            sent += stream.send(b"x" * 4096)
        except BlockingIOError:
            time.sleep(0.01)
        except (BrokenPipeError, ConnectionResetError):
            break
    stream.setblocking(True)
    answer()
