"""Shards by name, for the node's store; and the process that is this store.

A key says all that is needed to read a shard: so whoever asks for the same weights, laid
out alike, means the same copy. It changes when the files do. No torch.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
from collections.abc import Callable
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

from foreserve.models.errors import InvalidInput
from foreserve.runtime.memory.filling import Fill
from foreserve.runtime.memory.node_store import StoreServer
from foreserve.runtime.memory.safetensors import Checkpoint, fill
from foreserve.runtime.memory.store import HostStore
from foreserve.runtime.paged.config import read_config
from foreserve.runtime.paged.layout import Part, lay_out


def key_of(folder: Path, dtype: str, part: Part) -> str:
    """Of one rank's shard of the checkpoint in ``folder``, as its files are now."""
    folder = folder.resolve()
    return json.dumps([str(folder), dtype, part.rank, part.size, _state(folder)])


def keys_of(folder: Path) -> str:
    """What all keys of that checkpoint begin with."""
    return f"[{json.dumps(str(folder.resolve()))}, "


def _state(folder: Path) -> str:
    """Of the files: another one if any has changed."""
    seen = []
    for file in (folder / "config.json", *sorted(folder.glob("*.safetensors"))):
        try:
            about = file.stat()
        except OSError:
            continue
        seen.append((file.name, about.st_size, about.st_mtime_ns))
    return blake2b(json.dumps(seen).encode(), digest_size=8).hexdigest()


def shard(key: str) -> tuple[int, Fill]:
    """What a key of `key_of` means: for a `HostStore`. Raises `InvalidInput`."""
    try:
        name, dtype, rank, size, _ = json.loads(key)
        folder, part = Path(name), Part(rank=rank, size=size)
    except (ValueError, TypeError) as error:
        raise InvalidInput(f"no key of a shard: {key!r}") from error
    layout = lay_out(read_config(folder), dtype, part)

    @cache
    def checkpoint() -> Checkpoint:
        return Checkpoint(folder)

    def read(memory: Any, begin: int, stop: Callable[[], bool]) -> None:
        fill(layout, checkpoint(), memory, begin=begin, stop=stop)

    return layout.num_bytes, read


def main() -> None:
    """Be a node's store until the end of the process; its memory goes with it, but for
    what others have mapped."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--host-bytes", type=int, required=True)
    given = parser.parse_args()
    ended = {signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, ended)
    StoreServer(HostStore(given.host_bytes, shard), socket.socket(fileno=given.fd))
    signal.sigwait(ended)
    os._exit(0)


if __name__ == "__main__":
    main()
