"""`plan serve --engine paged` for some minutes, asked for all that clients may ask for.

    PYTHONPATH=.:benchmarks python benchmarks/paged_soak.py
        [--minutes 5] [--gentle] [--seed 0] [--keep FOLDER]

Six tiny LLMs of different families, two of them on two GPUs each, share two nodes of two
GPUs that hold less than all of them want. Clients send chats and completions, streamed
and whole: greedy, drawn, with penalties, log probabilities, two choices and stop strings,
from one token to as many as fit and more than that; some leave in mid-stream. Whom they
ask changes every `HOT_S`, and from time to time one LLM gets many at once. Halfway a
server, the store of a node and an agent are killed, unless ``--gentle``.

In the end: greedy answers are compared with transformers', all others with what the same
body got before; each request has one end, by the journal; failures that no kill explains
are counted; every GPU's pool holds the weights of its replicas and nothing else, each
node's store no more than it may; private memory of each process at a minute and at the
end; and the logs are checked (`runtime/live/check.py`). Needs torch and transformers.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from os import getloadavg
from pathlib import Path
from time import monotonic
from typing import Any

import aiohttp
import click
import numpy as np
from record import write_result

from foreserve.runtime.engines import tiny
from foreserve.runtime.live.check import check
from foreserve.runtime.memory.node_store import RemoteStore
from foreserve.runtime.paged.config import read_config
from foreserve.runtime.paged.layout import Part, lay_out
from foreserve.runtime.paged.text import Speech, Words

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.fault_run import Supervised, processes
from tests.tiny_cluster import CORE

FAMILIES = {
    "llama": 1,
    "qwen": 1,
    "mistral": 2,
    "qwen3": 1,
    "qwen3-moe": 1,
    "gemma2": 2,
}
"""And on how many GPUs each."""
CONTEXT = 768
SHAPE = {"hidden": 384, "layers": 2, "kv_heads": 4, "context_tokens": CONTEXT}
"""Some 4 million weights, and 6 KiB of KV a token, in float32. No more layers: errors of
rounding grow so much from one to the next that answers hang on who is in the batch."""
SCENARIO = """
cluster:
  nodes: [{{name: n, count: 2, gpu: core, gpus: 2, host_ram: 256MiB}}]
{core}
models: [{llms}]
epoch: 20s
slo: {{ttft: 10s, tpot: 500ms}}
forecast: {{method: last}}
solver: {{name: greedy, time_limit: 2s}}
runtime: {{max_num_seqs: 16, residue: 0GiB, keep_alive: 500ms}}
"""
MEMORY_BYTES = 150_000_000
LENGTHS = (1, 2, 17, 60, 150, 300)
TOKENS = (1, 8, 24, 48)
KINDS = ("plain", "n", "logprobs", "penalties", "drawn", "stop", "cancelled")
CLIENTS = 10
THINK_S = 1.0
HOT_S = 15.0
HOT_SHARE = 0.7
"""Of requests, to the two LLMs that are asked most for now."""
BURST_S = 25.0
BURST = 24
EXPLAINS_S = 45.0
"""What fails for so long after a kill is the kill's doing."""
DEADLINE_S = 300.0
LOOK_S = 10.0
IDLE_WITHIN_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A body that is sent again and again, so that its answers can be compared."""

    llm: str
    kind: str
    chat: bool
    body: Mapping[str, Any]
    prompt: tuple[int, ...]
    """Tokens of it."""
    leaves_after: int = 0
    """Events, if the client does not wait for the end."""

    @property
    def greedy(self) -> bool:
        """The answer is that of the LLM alone, word by word."""
        return self.kind not in ("penalties", "drawn", "long")


@dataclass(slots=True, kw_only=True, eq=False)
class Sent:
    question: int
    stream: bool
    sent_s: float
    first_s: float | None = None
    end_s: float = 0.0
    outcome: str = ""
    """``ok``, ``left``, a status with its code, ``event`` with its code, ``broken``,
    ``refused``, ``late``, ``cut``."""
    texts: tuple[str, ...] = ()
    tokens: int = 0
    """Of the answer, as the server counts."""
    told: str = ""


def question(
    rng: np.random.Generator, llm: str, words: Words, kind: str, i: int
) -> Question:
    chat = bool(rng.random() < 0.5)
    most = TOKENS[i % len(TOKENS)]
    body: dict[str, Any] = {"model": llm, "temperature": 0, "ignore_eos": i % 3 > 0}
    length = LENGTHS[int(rng.integers(len(LENGTHS)))]
    vocabulary = sorted(set(range(300, 500)))
    ids = [int(token) for token in rng.choice(vocabulary, length)]
    if kind == "long":
        chat, most = False, 8
        ids = [int(token) for token in rng.choice(vocabulary, CONTEXT)]
    elif kind == "full":
        chat, most = False, 8
        ids = [int(token) for token in rng.choice(vocabulary, CONTEXT - most)]
    if chat:
        messages = [{"role": "user", "content": words.text(ids)}]
        body["messages"] = messages
        prompt = words.chat(messages, {})
        body["max_completion_tokens"] = most
    else:
        prompt = ids
        body |= {"prompt": ids, "max_tokens": most}
    more: dict[str, dict[str, Any]] = {
        "n": {"n": 2},
        "logprobs": {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 3},
        "penalties": {"frequency_penalty": 0.8, "repetition_penalty": 1.2},
        "drawn": {"temperature": 0.9, "seed": i, "top_p": 0.95, "n": 1 + i % 2},
        "stop": {"stop": ["ka", "vo"]},
        "cancelled": {"max_tokens": 48, "max_completion_tokens": 48},
    }
    body |= more.get(kind, {})
    leaves = 1 + int(rng.integers(6)) if kind == "cancelled" else 0
    return Question(
        llm=llm,
        kind=kind,
        chat=chat,
        body=body,
        prompt=tuple(prompt),
        leaves_after=leaves,
    )


def questions(rng: np.random.Generator, folders: Mapping[str, Path]) -> list[Question]:
    found = []
    for llm, folder in folders.items():
        words = Words(folder)
        for kind in KINDS:
            for i in range(4 if kind == "plain" else 2):
                found.append(question(rng, llm, words, kind, i + len(found)))
        found += [question(rng, llm, words, kind, 0) for kind in ("long", "full")]
    return found


@dataclass(slots=True)
class Clients:
    """All that is sent, and what came of it."""

    url: str
    asked: list[Question]
    rng: np.random.Generator
    sent: list[Sent] = field(default_factory=list)

    async def ask(self, number: int, session: aiohttp.ClientSession) -> None:
        asked = self.asked[number]
        stream = bool(asked.leaves_after or self.rng.random() < 0.6)
        sent = Sent(question=number, stream=stream, sent_s=monotonic())
        self.sent.append(sent)
        path = "chat/completions" if asked.chat else "completions"
        body = {**asked.body, "stream": stream}
        if stream:
            body["stream_options"] = {"include_usage": True}
        try:
            async with (
                asyncio.timeout(DEADLINE_S + 10.0),
                session.post(f"{self.url}/v1/{path}", json=body) as answer,
            ):
                sent.outcome = await _heard(answer, sent, asked)
        except TimeoutError:
            sent.outcome = "late"
        except aiohttp.ClientConnectorError:
            sent.outcome = "refused"
        except (aiohttp.ClientError, ConnectionError) as error:
            sent.outcome, sent.told = "broken", repr(error)
        sent.end_s = monotonic()

    async def play(self, seconds: float) -> None:
        """Until then, and until all is answered."""
        headers = {
            "x-foreserve-max-wait": f"{DEADLINE_S:g}",
            "x-foreserve-deadline": f"{DEADLINE_S:g}",
        }
        until_s = monotonic() + seconds
        names = tuple(FAMILIES)
        hot = list(names[:2])
        by_llm: dict[str, list[int]] = defaultdict(list)
        for number, one in enumerate(self.asked):
            by_llm[one.llm].append(number)

        def draw(llms: list[str]) -> int:
            mine = by_llm[llms[int(self.rng.integers(len(llms)))]]
            return mine[int(self.rng.integers(len(mine)))]

        async def client(session: aiohttp.ClientSession) -> None:
            while monotonic() < until_s:
                to_hot = self.rng.random() < HOT_SHARE
                await self.ask(draw(hot if to_hot else list(names)), session)
                await asyncio.sleep(float(self.rng.exponential(THINK_S)))

        async def change() -> None:
            while monotonic() < until_s:
                hot[:] = [names[i] for i in self.rng.permutation(len(names))[:2]]
                await asyncio.sleep(HOT_S)

        async def burst(session: aiohttp.ClientSession) -> None:
            async with asyncio.TaskGroup() as group:
                while monotonic() + BURST_S < until_s:
                    await asyncio.sleep(BURST_S)
                    llm = names[int(self.rng.integers(len(names)))]
                    for _ in range(BURST):
                        group.create_task(self.ask(draw([llm]), session))

        async with (
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=None),
                headers=headers,
            ) as session,
            asyncio.TaskGroup() as group,
        ):
            group.create_task(change())
            group.create_task(burst(session))
            for _ in range(CLIENTS):
                group.create_task(client(session))


async def _heard(answer: aiohttp.ClientResponse, sent: Sent, asked: Question) -> str:
    if answer.status != 200:
        error = (await answer.json())["error"]
        sent.told = error["message"]
        return f"{answer.status} {error['code']}"
    if not sent.stream:
        told = await answer.json()
        sent.texts = tuple(_text(choice, asked.chat) for choice in told["choices"])
        sent.tokens = told["usage"]["completion_tokens"]
        return "ok"
    texts: dict[int, str] = {}
    events = 0
    async for line in answer.content:
        line = line.strip()
        if not line.startswith(b"data: "):
            continue
        if sent.first_s is None:
            sent.first_s = monotonic()
        if line == b"data: [DONE]":
            sent.texts = tuple(texts[i] for i in sorted(texts))
            return "ok"
        told = json.loads(line[6:])
        if "error" in told:
            sent.told = told["error"]["message"]
            return f"event {told['error']['code']}"
        for choice in told["choices"]:
            text = _text(choice, asked.chat)
            texts[choice["index"]] = texts.get(choice["index"], "") + text
        if told.get("usage"):
            sent.tokens = told["usage"]["completion_tokens"]
        events += 1
        if events == asked.leaves_after:
            answer.close()
            return "left"
    return "cut"


def _text(choice: Mapping[str, Any], chat: bool) -> str:
    if not chat:
        return str(choice["text"])
    said = choice.get("message") or choice.get("delta") or {}
    return said.get("content") or ""


# --- what runs -----------------------------------------------------------------------


@dataclass(slots=True)
class Cluster:
    """The processes of one `plan serve`."""

    run: Supervised

    def children(self, node: str) -> Iterator[tuple[str, int]]:
        """``paged-0``, ``paged-1`` and ``store`` of a node, and their processes."""
        alive = list(processes())
        for path in sorted((self.run.state / node).glob("*.process.json")):
            with suppress(OSError, ValueError):
                session = json.loads(path.read_text())["session"]
                name = path.name.rpartition("-")[0]
                for pid, _, own in alive:
                    if own == session != pid:
                        yield name, pid

    def pids(self) -> dict[str, int]:
        found = {"plan serve": self.run.process.pid}
        for node in self.run.nodes():
            found[f"{node} agent"] = self.run.agent(node)
            found |= {f"{node} {name}": pid for name, pid in self.children(node)}
        return found

    async def pool(self, pid: int) -> dict[str, int]:
        """What a server says of its pages."""
        environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        keys = [v for v in environ if v.startswith(b"FORESERVE_ENGINE_KEY=")]
        key = keys[0].partition(b"=")[2].decode()
        listener = os.readlink(f"/proc/{pid}/fd/{_word(pid, '--fd')}")
        for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] != "0A" or f"socket:[{fields[9]}]" != listener:
                continue
            url = f"http://127.0.0.1:{int(fields[1].partition(':')[2], 16)}/pool"
            headers = {"authorization": f"Bearer {key}"}
            async with (
                aiohttp.ClientSession(headers=headers) as session,
                session.get(url) as answer,
            ):
                told: dict[str, int] = await answer.json()
                return told
        raise LookupError(pid)


def private_bytes(pid: int) -> int | None:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return None


async def watch(cluster: Cluster, seen: dict[tuple[str, int], list[Any]]) -> None:
    """Sample every process's private memory, for ever."""
    begin_s = monotonic()
    while True:
        for name, pid in cluster.pids().items():
            num_bytes = private_bytes(pid)
            if num_bytes is not None:
                at_s = round(monotonic() - begin_s, 1)
                seen.setdefault((name, pid), []).append((at_s, num_bytes))
        await asyncio.sleep(LOOK_S)


async def kill(
    cluster: Cluster, seconds: float, rng: np.random.Generator
) -> list[tuple[str, float]]:
    """A server, a store and an agent, at a half, 0.65 and 0.8 of the time."""
    begin_s, done = monotonic(), []
    for what, share in (("paged", 0.5), ("store", 0.65), ("agent", 0.8)):
        await asyncio.sleep(begin_s + share * seconds - monotonic())
        pids = [
            (name, pid)
            for name, pid in cluster.pids().items()
            if name.partition(" ")[2].startswith(what)
        ]
        name, pid = pids[int(rng.integers(len(pids)))]
        os.kill(pid, signal.SIGKILL)
        done.append((name, monotonic()))
    return done


async def idle(cluster: Cluster, folders: Mapping[str, Path]) -> dict[str, Any]:
    """What is held when nobody asks any more: the last look, or the first that shows
    what should be."""
    until_s = monotonic() + IDLE_WITHIN_S
    while True:
        found = await _held(cluster, folders)
        good = all(row["used"] == row["weights"] for row in found["pools"].values())
        if (good and found["settled"]) or monotonic() > until_s:
            return found
        await asyncio.sleep(1.0)


async def _held(cluster: Cluster, folders: Mapping[str, Path]) -> dict[str, Any]:
    rows = (await cluster.run.admin("status"))["observed"]
    settled = all(row["phase"] in ("WARM", "ACTIVE") for row in rows)
    pools, stores = {}, {}
    for node in cluster.run.nodes():
        for name, pid in cluster.children(node):
            if name == "store":
                path = cluster.run.state / node / "store.sock"
                stores[node] = RemoteStore(path).look(10.0)
                continue
            told = await cluster.pool(pid)
            gpu = f"{node}/{name.partition('-')[2]}"
            page_bytes = _word(pid, "--page-bytes")
            there = {
                f"{row['llm']}@{','.join(row['gpus'])}": _pages(
                    folders[row["llm"]], sorted(row["gpus"]), gpu, page_bytes
                )
                for row in rows
                if gpu in row["gpus"] and row["phase"] in ("WARM", "ACTIVE")
            }
            pools[gpu] = {
                "pages": told["pages"],
                "used": told["used"],
                "weights": sum(there.values()),
                "replicas": there,
            }
    return {"settled": settled, "pools": pools, "stores": stores}


def _word(pid: int, name: str) -> int:
    """Of its command line."""
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return int(words[words.index(name) + 1])


def _pages(folder: Path, gpus: list[str], gpu: str, page_bytes: int) -> int:
    part = Part(rank=gpus.index(gpu), size=len(gpus))
    layout = lay_out(read_config(folder), "float32", part)
    return -(-layout.num_bytes // page_bytes)


# --- what it means -------------------------------------------------------------------


def explained(sent: Sent, kills: list[tuple[str, float]]) -> bool:
    return any(sent.sent_s < at + EXPLAINS_S and sent.end_s >= at for _, at in kills)


def failed(sent: Sent, asked: Question) -> bool:
    if asked.kind == "long":
        return sent.outcome != "400 context_length_exceeded"
    if asked.kind == "full" and sent.outcome == "400 context_length_exceeded":
        return False  # The plan leaves some LLMs less room than their context.
    return sent.outcome not in ("ok", "left")


def compare(clients: Clients, folders: Mapping[str, Path]) -> dict[str, Any]:
    """Answers, with transformers' or with each other."""
    alone: dict[str, Alone] = {}
    answers: dict[int, Counter[tuple[str, ...]]] = defaultdict(Counter)
    for sent in clients.sent:
        if sent.outcome == "ok":
            answers[sent.question][sent.texts] += 1
    same, other = 0, []
    against: Counter[str] = Counter()
    for number, seen in sorted(answers.items()):
        asked = clients.asked[number]
        if asked.greedy:
            if asked.llm not in alone:
                alone[asked.llm] = Alone(folders[asked.llm])
            right = alone[asked.llm].says(asked)
        else:
            right = seen.most_common(1)[0][0]
        against["transformers" if asked.greedy else "each other"] += sum(seen.values())
        same += seen[right]
        other += [
            {"llm": asked.llm, "kind": asked.kind, "got": texts, "alone": right}
            for texts in seen
            if texts != right
        ]
    return {"compared_with": dict(against), "equal": same, "other": other[:10]}


class Alone:
    """An LLM in transformers, alone."""

    def __init__(self, folder: Path) -> None:
        import torch
        import transformers

        self._torch = torch
        transformers.utils.logging.disable_progress_bar()
        self._llm: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        self._words, self._ends = Words(folder), read_config(folder).end_tokens
        self._told: dict[tuple[tuple[int, ...], int], list[int]] = {}

    def says(self, asked: Question) -> tuple[str, ...]:
        """Its greedy answers."""
        body = asked.body
        speech = Speech(
            self._words,
            tuple(body.get("stop", ())),
            after=() if asked.chat else asked.prompt,
        )
        ends = () if body["ignore_eos"] else self._ends
        text = ""
        most = body.get("max_tokens") or body["max_completion_tokens"]
        for token in self._tokens(asked.prompt, most):
            if token in ends:
                break
            text += speech.add(token)
            if speech.stopped:
                break
        return (text + speech.end(),) * body.get("n", 1)

    def _tokens(self, prompt: tuple[int, ...], most: int) -> list[int]:
        if (prompt, most) not in self._told:
            ids = self._torch.tensor([prompt])
            out = self._llm.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                max_new_tokens=most,
                min_new_tokens=most,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            )
            self._told[prompt, most] = out[0][len(prompt) :].tolist()
        return self._told[prompt, most]


def growth(seen: Mapping[tuple[str, int], list[Any]]) -> dict[str, Any]:
    """Private MiB of each process a minute after it was first seen, and at the end."""
    found = {}
    for (name, pid), samples in seen.items():
        later = [size for at, size in samples if at >= samples[0][0] + 60.0]
        if later:
            found[f"{name} ({pid})"] = {
                "after_a_minute": round(later[0] / 2**20, 1),
                "at_the_end": round(later[-1] / 2**20, 1),
                "most": round(max(later) / 2**20, 1),
            }
    return found


def percentiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {
        "count": len(values),
        **{f"p{q}": round(float(np.percentile(values, q)), 3) for q in (50, 90, 99)},
    }


async def soak(
    folder: Path, folders: Mapping[str, Path], minutes: float, gentle: bool, seed: int
) -> tuple[Clients, dict[str, Any]]:
    rng = np.random.default_rng(seed)
    run = Supervised(folder, ["--scenario", "s.yaml", "--engine", "paged"])
    cluster = Cluster(run)
    seconds = 60.0 * minutes
    kills: list[tuple[str, float]] = []
    seen: dict[tuple[str, int], list[Any]] = {}
    try:
        await run.up()
        clients = Clients(
            f"http://127.0.0.1:{run.port}", questions(rng, folders), rng.spawn(1)[0]
        )
        watching = asyncio.create_task(watch(cluster, seen))
        killing = None
        if not gentle:
            killing = asyncio.create_task(kill(cluster, seconds, rng.spawn(1)[0]))
        begin_s = monotonic()
        await clients.play(seconds)
        took_s = monotonic() - begin_s
        kills = await killing if killing else []
        held = await idle(cluster, folders)
        watching.cancel()
        metrics = await _preemptions(cluster)
    finally:
        run.stop()
    bad = [
        (sent, clients.asked[sent.question])
        for sent in clients.sent
        if failed(sent, clients.asked[sent.question])
    ]
    unexplained = [
        {"llm": asked.llm, "kind": asked.kind, "at_s": round(sent.sent_s - begin_s, 1)}
        | {"outcome": sent.outcome, "told": sent.told}
        for sent, asked in bad
        if not explained(sent, kills)
    ]
    streamed = [
        (clients.asked[sent.question].llm, sent.first_s - sent.sent_s)
        for sent in clients.sent
        if sent.first_s is not None and sent.outcome in ("ok", "left")
    ]
    kinds = Counter(
        f"{clients.asked[sent.question].kind}: {sent.outcome}" for sent in clients.sent
    )
    return clients, {
        "seconds": round(took_s, 1),
        "kills": [(name, round(at - begin_s, 1)) for name, at in kills],
        "sent": len(clients.sent),
        "tokens": sum(sent.tokens for sent in clients.sent),
        "outcomes": dict(Counter(sent.outcome for sent in clients.sent)),
        "by_kind": dict(sorted(kinds.items())),
        "failed": len(bad),
        "failed_unexplained": unexplained,
        "ttft_s": percentiles([s for _, s in streamed])
        | {
            llm: percentiles([s for name, s in streamed if name == llm])
            for llm in FAMILIES
        },
        "engines": metrics,
        "idle": held,
        "private_mib": growth(seen),
    }


async def _preemptions(cluster: Cluster) -> dict[str, int]:
    """Loads, wakes and sleeps that the journal tells of."""
    phases: Counter[str] = Counter()
    for line in (cluster.run.state / "journal.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "phase":
            phases[str(event["phase"])] += 1
    return dict(phases)


def logs(clients: Clients, state: Path) -> dict[str, Any]:
    """What the separate check says, and whether the clients' sums agree."""
    command = [sys.executable, "-m", "foreserve.runtime.live.check", str(state)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    found = check(state)
    return {
        "check": checked.stdout.strip(),
        "exit_code": checked.returncode,
        "accepted": found.requests,
        "sent": len(clients.sent),
        "without_an_end": found.unfinished,
        "ends": dict(found.ends),
        "peak_share_of_a_gpu": round(max(found.peak.values(), default=0.0), 4),
    }


@click.command()
@click.option("--minutes", default=5.0)
@click.option("--gentle", is_flag=True, help="Kill nothing.")
@click.option("--seed", default=0)
@click.option("--keep", type=click.Path(path_type=Path), help="Leave the files here.")
def main(minutes: float, gentle: bool, seed: int, keep: Path | None) -> None:
    """Write benchmarks/results/paged_soak.json."""
    folder = keep or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    folders = {
        name: tiny.make(folder / name, name, seed=len(name), **SHAPE)
        for name in FAMILIES
    }
    rows = (
        f"{{name: {name}, llm: {folders[name].resolve()}, tp: [{gpus}], "
        "input_tokens: 100, output_tokens: 25}"
        for name, gpus in FAMILIES.items()
    )
    (folder / "s.yaml").write_text(
        SCENARIO.format(
            llms=", ".join(rows), core=CORE.format(memory_bytes=MEMORY_BYTES)
        )
    )
    load = getloadavg()
    clients, found = asyncio.run(soak(folder, folders, minutes, gentle, seed))
    found |= {
        "answers": compare(clients, folders),
        "logs": logs(clients, folder / "st"),
    }
    document = {
        "minutes": minutes,
        "gentle": gentle,
        "seed": seed,
        "load_average": [load, getloadavg()],
        **found,
    }
    write_result("paged_soak", document)
    click.echo(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
