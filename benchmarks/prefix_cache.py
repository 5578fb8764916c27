"""What a prefix cache finds of Mooncake's conversations, by engines and their memory.

    python benchmarks/prefix_cache.py --shared ../shared

The hour of 12,031 requests (`mooncake/`, prompts in blocks of 512 tokens) on some replicas
of Llama-3.1-8B on H100 with their usual KV cache, or a quarter or ten times of it; requests
go to the replica with the fewest in flight, whatever it has in its cache. Tokens found are
a share of all prompt tokens; an unlimited cache in one engine would find 37.4 %. Writes
benchmarks/results/prefix_cache.json.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from record import write_result

from foreserve.models import catalog
from foreserve.models.perf.compact import compact
from foreserve.models.perf.model import Measured
from foreserve.runtime.simulated.engine import EngineLimits, Engines
from foreserve.runtime.simulated.layout import Columns
from foreserve.traces.formats import read_trace

KV_TOKENS = 420_000
"""51.4 GiB of KV at 128 KiB a token: Llama-3.1-8B on an 80 GB H100 (vLLM's books)."""


@click.command()
@click.option("--shared", default="../shared", show_default=True)
def main(shared: str) -> None:
    """Print and write the share found and the TTFTs."""
    file = Path(shared) / "data" / "mooncake" / "conversation_trace.jsonl.gz"
    trace = read_trace(str(file))
    assert trace.prefixes is not None
    unlimited = int(trace.prefixes.found_tokens(trace.input_tokens).sum())
    prompts = int(trace.input_tokens.sum())
    timing = Measured().timing(catalog.llm("llama-3.1-8b"), catalog.gpu("h100"), 1)
    assert timing is not None
    time = compact(timing)
    rows: list[dict[str, Any]] = []
    for replicas, memory in ((4, 1.0), (8, 1.0), (16, 1.0), (8, 0.25), (8, 10.0)):
        for caching in (True, False):
            limits = replace(EngineLimits(), prefix_tokens=512 if caching else 0)
            columns = Columns(
                trace.arrival_s,
                trace.llm,
                trace.input_tokens,
                trace.output_tokens,
                trace.prefixes.starts,
                trace.prefixes.ids,
            )
            engines = Engines(1, columns)
            for number in range(replicas):
                engines.open(0, number, time, round(KV_TOKENS * memory), limits)
            while engines.run(np.inf):
                engines.top["woken"] = False
            state = engines.state
            ttft_s = state.first_s - state.arrival_s
            rows.append(
                {
                    "replicas": replicas,
                    "kv_tokens": round(KV_TOKENS * memory),
                    "caching": caching,
                    "found": round(int(state.found_tokens[0]) / prompts, 4),
                    "ttft_mean_s": round(float(np.nanmean(ttft_s)), 3),
                    "ttft_p99_s": round(float(np.nanquantile(ttft_s, 0.99)), 3),
                    "failed": int((state.result != 1).sum()),
                }
            )
            click.echo(rows[-1])
    found = {"unlimited": round(unlimited / prompts, 4), "rows": rows}
    write_result("prefix_cache", found)


if __name__ == "__main__":
    main()
