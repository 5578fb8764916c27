"""`plan serve`: an OpenAI-compatible endpoint whose cluster re-plans itself."""

from __future__ import annotations

import gc
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from foreserve.cli.common import (
    consoles,
    quiet_option,
    read_history,
    read_scenario,
)
from foreserve.cli.operate import page_url, state_option
from foreserve.models.errors import ForeserveError, InvalidInput

if TYPE_CHECKING:
    from foreserve.cli.serving import Serving


@click.command(
    epilog="Example: plan serve --scenario sample:fleet-day --engine simulated "
    "--port 8000"
)
@click.option("--scenario", required=True, help="Scenario YAML, or sample:NAME.")
@click.option(
    "--plan",
    "plan_path",
    type=click.Path(),
    help="Follow this plan until the first new one.",
)
@click.option(
    "--engine",
    type=click.Choice(["vllm", "paged", "simulated"]),
    help="What answers: vLLM, our own engine, or servers that keep vLLM's pace and "
    "compute nothing.  [default: vllm where it is installed, else paged]",
)
@click.option("--replan", metavar="5m", help="Epoch; default: the scenario's.")
@click.option(
    "--mode",
    type=click.Choice(["observe", "recommend", "automatic"]),
    default="automatic",
    show_default=True,
    help="Plans are made but not used; used once approved; or used.",
)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option(
    "--admin-port",
    type=click.IntRange(0, 65535),
    default=0,
    help="On the loopback interface.  [default: a free one]",
)
@click.option(
    "--keys", type=click.Path(path_type=Path), help="File of API keys, as hashes."
)
@click.option("--insecure", is_flag=True, help="No keys, although others can reach it.")
@click.option(
    "--time-scale",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    help="Of simulated engines: seconds of theirs in one of ours.",
)
@click.option(
    "--python", help="Interpreter that has vLLM, or torch.  [default: this one]"
)
@click.option(
    "--keep-engines", is_flag=True, help="Leave agents and engines when it stops."
)
@click.option("--ray", "own_ray", is_flag=True, help="Agents in a Ray of its own.")
@click.option(
    "--address", metavar="HOST:PORT|auto", help="Agents in this Ray cluster, as actors."
)
@click.option(
    "--node-folder",
    type=click.Path(path_type=Path),
    help="Folder of the agents' logs on the machines of --address.  "
    "[default: ~/.foreserve/NAME]",
)
@state_option
@quiet_option
def serve(
    scenario: str,
    plan_path: str | None,
    engine: str | None,
    replan: str | None,
    mode: Any,
    host: str,
    port: int,
    admin_port: int,
    keys: Path | None,
    insecure: bool,
    time_scale: float,
    python: str | None,
    keep_engines: bool,
    own_ray: bool,
    address: str | None,
    node_folder: Path | None,
    folder: Path,
    quiet: bool,
) -> int:
    """Serve the scenario's LLMs behind one OpenAI-compatible endpoint.

    Every epoch is planned anew from the requests that have come; the plan that is
    carried out is kept in the state folder, so that the next start goes on with it.
    Ends with SIGINT or SIGTERM: what was accepted is answered first.
    """
    if own_ray and address is not None:
        raise InvalidInput("--ray or --address, not both")
    serving = make(
        scenario,
        plan_path,
        engine,
        replan,
        folder,
        time_scale,
        python,
        mode=mode,
        host=host,
        port=port,
        admin_port=admin_port,
        keys=keys,
        insecure=insecure,
        ray="local" if own_ray else address,
        node_folder=node_folder,
    )
    from foreserve.cli.agents import shared_machines
    from foreserve.cli.news import News

    out, _ = consoles(quiet)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    serving.start()
    # What there is now stays. Looking through it for garbage would hold up everybody who
    # is being answered, for 60 ms.
    gc.collect()
    gc.freeze()
    llms = ", ".join(llm.name for llm in serving.fleet.llms)
    out.print(f"serving {llms}")
    out.print(f"  http://{host}:{serving.server.port}/v1")
    if address is not None:
        for machine, nodes in shared_machines(serving.backend.status()):
            out.print(
                f"  {machine} is {', '.join(nodes)}: plans take them to fail apart"
            )
    if out.is_terminal:  # not into a log: whoever has the token may change things
        url = page_url(
            {"admin_port": serving.server.admin_port, "token": serving.token}
        )
        out.print(f"  {url}", soft_wrap=True, highlight=False)
    out.print(f"  plan status --state {folder}")
    news = News(serving.policy, serving.feed)
    while not ended.wait(0.5) and serving.failed is None:
        for line in news.lines():
            out.print(line, soft_wrap=True, highlight=False)
    out.print("stopping: what was accepted is answered first")
    serving.stop(engines=not keep_engines)
    if serving.failed is not None:
        raise ForeserveError(f"the controller ended: {serving.failed}")
    return 0


def make(
    scenario: str,
    plan_path: str | None,
    engine: str | None,
    replan: str | None,
    folder: Path,
    time_scale: float = 1.0,
    python: str | None = None,
    *,
    keys: Path | None = None,
    **options: Any,
) -> Serving:
    """All parts of a serving cluster, nothing of it started."""
    try:
        from foreserve.cli.serving import ServeOptions, Serving
    except ImportError as error:
        raise InvalidInput(
            f"serving needs {error.name}", hint="pip install 'foreserve[serve]'"
        ) from None
    from foreserve.cli import engines
    from foreserve.models.codec import load_plan
    from foreserve.models.quantities import parse_seconds
    from foreserve.planner.arrivals import trace_of
    from foreserve.planner.fleet import (
        USUAL_INPUT_TOKENS,
        USUAL_OUTPUT_TOKENS,
        build_fleet,
        request_lengths,
        with_usual_lengths,
    )
    from foreserve.planner.pipeline import fit_history
    from foreserve.runtime.gateway.keys import read_keys

    wanted = read_scenario(scenario)
    if replan is not None:
        try:
            epoch_s = float(str(parse_seconds(replan)))
        except ValueError:
            raise InvalidInput(f"{replan!r} is no time", field="--replan") from None
        wanted = replace(wanted, epoch=epoch_s)
    history = read_history(wanted, {})
    if history is not None:
        fit_history(history, wanted)  # now, not when the first epoch is planned
    first = None if plan_path is None else load_plan(plan_path)
    if first is None:
        wanted, guessed = with_usual_lengths(wanted, history)
        if guessed:
            click.echo(
                f"planned as if each request of {', '.join(guessed)} had "
                f"{USUAL_INPUT_TOKENS:.0f} tokens and its answer "
                f"{USUAL_OUTPUT_TOKENS:.0f}; state input_tokens and output_tokens if "
                "you know better",
                err=True,
            )
        nobody = trace_of([llm.name for llm in wanted.models])
        fleet = build_fleet(wanted, request_lengths(wanted, nobody, history))
    else:
        fleet = first.fleet
    engine = engine or engines.usual(python)
    settings = engines.engine_settings(
        wanted, fleet, engine, folder, time_scale, python
    )
    return Serving(
        wanted,
        fleet,
        ServeOptions(
            folder=folder,
            engine=engine,
            settings=settings,
            keys=None if keys is None else read_keys(keys),
            keep_alive_s=wanted.runtime.keep_alive,
            time_scale=time_scale,
            sleeps=engines.sleeps(settings),
            **options,
        ),
        first=first,
        history=history,
    )
