"""`plan catalog`: LLMs and GPU types that are known by name, and adding one's own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from foreserve.cli.common import check_parent, consoles, echo_json, json_option
from foreserve.models.errors import InvalidInput

if TYPE_CHECKING:
    from foreserve.models.llm import ModelSpec
    from foreserve.models.specs import GpuType


@click.group(epilog="Example: plan catalog show llama-3.1-8b")
def catalog() -> None:
    """LLMs and GPU types that are known by name."""


@catalog.command("list", epilog="Example: plan catalog list --json")
@json_option
def list_catalog(as_json: bool) -> None:
    """All LLMs and GPU types, the LLMs you added among them."""
    from rich.table import Table

    from foreserve.models.catalog import gpus, llms, user_llms

    known = {llm.name: llm for llm in (*llms(), *user_llms())}
    llm_rows = [
        {
            "name": llm.name,
            "params": llm.params,
            "active_params": llm.active_params,
            "weights_gib": round(llm.weight_bytes / 2**30, 2),
            "kv_kib_per_token": round(llm.kv_bytes_per_token_per_gpu(1) / 2**10, 1),
            "tp": list(llm.tp),
        }
        for _, llm in sorted(known.items())
    ]
    gpu_rows = [
        {
            "name": gpu.name,
            "memory_gib": round(gpu.memory_bytes / 2**30, 1),
            "hbm_tb_per_s": gpu.hbm_bytes_per_s / 1e12,
            "bf16_tflop_per_s": gpu.bf16_flop_per_s / 1e12,
            "price_usd_per_h": gpu.price_usd_per_h,
        }
        for gpu in gpus()
    ]
    if as_json:
        echo_json({"llms": llm_rows, "gpus": gpu_rows})
        return
    out, _ = consoles(quiet=False)
    for title, rows in (("LLMs", llm_rows), ("GPU types", gpu_rows)):
        table = Table(title=title, title_justify="left", box=None)
        for key in rows[0]:
            table.add_column(key, justify="left" if key == "name" else "right")
        for row in rows:
            table.add_row(*(_cell(value) for value in row.values()))
        out.print(table)


def _cell(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


@catalog.command("show", epilog="Example: plan catalog show h100 --json")
@click.argument("name", metavar="NAME|FILE.toml|config.json")
@json_option
def show_catalog(name: str, as_json: bool) -> None:
    """One LLM or GPU type, with the source of each number.

    An LLM may also be named by a catalogue file or by its config.json.
    """
    from foreserve.models.codec import to_json

    item = _find(name)
    if as_json:
        click.echo(to_json(item), nl=False)
        return
    plain = json.loads(to_json(item))
    sources = plain.pop("sources")
    width = max(map(len, plain))
    for key, value in plain.items():
        source = sources.get(key, "")
        shown = value if isinstance(value, str) else json.dumps(value)
        click.echo(f"{key:<{width}}  {shown}" + (f"  [{source}]" if source else ""))
    if "default" in sources:
        click.echo(f"source of the rest: {sources['default']}")


def _find(name: str) -> ModelSpec | GpuType:
    from foreserve.models import catalog as known
    from foreserve.models.codec import did_you_mean

    if known.is_path(name):
        return known.read_llm(name)
    items: dict[str, ModelSpec | GpuType] = {gpu.name: gpu for gpu in known.gpus()}
    items |= {llm.name: llm for llm in (*known.llms(), *known.user_llms())}
    if name not in items:
        hint = did_you_mean(name, list(items))
        raise InvalidInput(f"{name!r} is not in the catalogue", hint=hint)
    return items[name]


@catalog.command("add", epilog="Example: plan catalog add ./my-llm/config.json")
@click.argument("path", metavar="config.json")
@click.option("--name", help="What to call the LLM; else as config.json or its folder.")
@click.option("--into", metavar="DIR|FILE", help="Where to write.  [default: catalog/]")
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
@json_option
def add(
    path: str, name: str | None, into: str | None, force: bool, as_json: bool
) -> None:
    """Add an LLM described by a Hugging Face config.json.

    Scenarios and other commands find it by name in ./catalog/, by path elsewhere.
    """
    from foreserve.models import catalog as known
    from foreserve.models.codec import write_text

    target = Path(into) if into else known.USER_FOLDER
    if target.suffix == ".toml":
        if name not in (None, target.stem):
            raise InvalidInput(
                f"the LLM is called {name!r}: the file must be {name}.toml", file=into
            )
        name = target.stem
    if name is not None and not re.fullmatch(r"\w[\w.-]*", name):
        raise InvalidInput(f"--name {name!r}: letters, digits and ._- are allowed")
    llm = known.read_llm(path, name=name)
    if target.suffix != ".toml":
        target = target / f"{llm.name}.toml"
        check_parent(str(target.parent))
        if target.parent.exists() and not target.parent.is_dir():
            raise InvalidInput("is a file, a folder is needed", file=str(target.parent))
    else:
        check_parent(str(target))
    hint = "--force does it all the same, --name picks another name"
    if target.exists() and not force:
        raise InvalidInput("the file exists", file=str(target), hint=hint)
    if any(llm.name == shipped.name for shipped in known.llms()) and not force:
        raise InvalidInput(f"{llm.name!r} would hide a known LLM", file=path, hint=hint)
    target.parent.mkdir(exist_ok=True)
    write_text(target, known.to_toml(llm))
    facts = _facts(llm)
    if as_json:
        echo_json({"file": str(target), "name": llm.name, **facts})
        return
    _print_facts(facts)
    click.echo(f"source: {llm.sources['default']}")
    click.echo(f"wrote {target}")


def _print_facts(facts: dict[str, Any]) -> None:
    from rich.table import Table

    width = max(map(len, facts))
    for key, value in facts.items():
        if key != "per_gpu":
            click.echo(f"{key:<{width}}  {_cell(value)}")
    table = Table(title="On each GPU", title_justify="left", box=None)
    for key in facts["per_gpu"][0]:
        table.add_column(key.replace("_", " "), justify="right")
    for row in facts["per_gpu"]:
        table.add_row(*(_cell(value) for value in row.values()))
    consoles(quiet=False)[0].print(table)


def _facts(llm: ModelSpec) -> dict[str, Any]:
    """What follows from the shape, and what each GPU of each TP size holds of it."""
    experts = llm.moe.dtype if llm.moe and llm.moe.dtype else llm.weight_dtype
    return {
        "params": llm.params,
        "active_params": llm.active_params,
        "weight_dtype": llm.weight_dtype,
        **({"experts_dtype": experts} if llm.moe else {}),
        "weight_bytes": llm.weight_bytes,
        "max_context_tokens": llm.max_context_tokens,
        "per_gpu": [
            {
                "tp": tp,
                "weight_bytes": llm.weight_bytes_per_gpu(tp),
                "kv_bytes_per_token": llm.kv_bytes_per_token_per_gpu(tp),
                "kv_bytes_per_sequence": llm.kv_bytes_fixed_per_sequence_per_gpu(tp),
            }
            for tp in llm.tp
        ],
    }
