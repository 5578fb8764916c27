"""Runs a command and ends with its owner: `python guard.py GRACE_S COMMAND...`.

The owner holds the other end of standard input. When that closes, because the owner asks
for it or because it is gone, however it went, the whole process group is asked to end,
and killed after the grace. Nothing of the group outlives the guard's orderly end; if it is
killed, as Ray does to what a dead actor has started, the command is killed with it. Run by
path, with the standard library alone.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl(2): the signal a process gets when its parent ends."""


def main() -> int:
    grace_s, command = float(sys.argv[1]), sys.argv[2:]
    os.set_blocking(0, True)
    # Its own death is what ends the group at last; until then it sees to the others.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, lambda *_: None)
    inherited = [int(fd) for fd in os.environ.get("FORESERVE_FDS", "").split()]
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        pass_fds=inherited,
        preexec_fn=_end_with_parent if sys.platform == "linux" else None,
    )
    for fd in inherited:
        os.close(fd)
    ended = threading.Event()

    def watch_owner() -> None:
        while os.read(0, 4096):
            pass
        ended.set()

    def watch_child() -> None:
        child.wait()
        ended.set()

    for watch in (watch_owner, watch_child):
        threading.Thread(target=watch, daemon=True).start()
    ended.wait()
    os.killpg(0, signal.SIGTERM)
    try:
        code = child.wait(grace_s)
    except subprocess.TimeoutExpired:
        code = -signal.SIGKILL
    # The child's own children may take a little longer than it.
    if not _alone_within(grace_s if code >= 0 else 0.5):
        os.killpg(0, signal.SIGKILL)
    return code if code >= 0 else 128 - code


def _end_with_parent() -> None:
    """In the child, before the command."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _alone_within(seconds: float) -> bool:
    """Whether all others of the session end in time."""
    waiting = threading.Event()
    for _ in range(max(1, int(seconds / 0.05))):
        if not _others():
            return True
        waiting.wait(0.05)
    return not _others()


def _others() -> list[int]:
    """Processes of this session but this one; those that have ended do not count."""
    me = os.getpid()
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == me and int(name) != me and fields[0] != b"Z":
            found.append(int(name))
    return found


if __name__ == "__main__":
    sys.exit(main())
