"""One rank of a tiny LLM, as a process of its own: `python -m tests.paged_ranks ...`.

Prints greedy answers as JSON, each rank its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import distributed

from foreserve.runtime.memory.safetensors import Checkpoint, fill
from foreserve.runtime.paged.attention import Work, cache_view
from foreserve.runtime.paged.config import read_config
from foreserve.runtime.paged.decoder import Decoder
from foreserve.runtime.paged.layout import Part, lay_out
from foreserve.runtime.paged.loading import views
from foreserve.runtime.paged.peers import Ranks


def main(rank: int, size: int, place: Path, folders: list[str], told: str) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(str(place), size)
    peers = Ranks(Part(rank=rank, size=size), "127.0.0.1", store)
    prompts, tokens = json.loads(told)
    answers = [answer(peers, Path(folder), prompts, tokens) for folder in folders]
    sys.stdout.write(json.dumps(answers))


def answer(
    peers: Ranks, folder: Path, prompts: list[list[int]], tokens: int
) -> list[list[int]]:
    config = read_config(folder)
    layout = lay_out(config, "float32", peers.part)
    memory = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    fill(layout, Checkpoint(folder), memory.numpy())
    decoder = Decoder(config, peers)
    cache = cache_view(
        torch.zeros(40, 16384, dtype=torch.uint8),
        layers=config.layers,
        kv_heads=decoder.kv_heads,
        head_dim=config.head_dim,
        dtype="float32",
    )
    known, done = [list(prompt) for prompt in prompts], [0] * len(prompts)
    # The pages of each rank are its own: here they are in another order.
    order = list(range(40)) if peers.part.rank else list(range(39, -1, -1))
    tables = [order[10 * i : 10 * i + 10] for i in range(len(prompts))]
    for _ in range(tokens):
        work = [
            Work(tokens=tokens[begin:], begin=begin, table=table)
            for tokens, begin, table in zip(known, done, tables, strict=True)
        ]
        step = decoder.plan(work, cache)
        done = [len(one) for one in known]
        best = decoder(views(layout, memory), cache, step).argmax(-1).tolist()
        for one, token in zip(known, best, strict=True):
            one.append(token)
    return [one[len(prompt) :] for one, prompt in zip(known, prompts, strict=True)]


if __name__ == "__main__":
    number, count, where, *rest = sys.argv[1:]
    main(int(number), int(count), Path(where), rest[:-1], rest[-1])
