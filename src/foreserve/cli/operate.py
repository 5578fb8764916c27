"""What to ask of a cluster that serves: `plan status`, `plan approve`, `plan reject`,
`plan drain`, `plan stop`."""

from __future__ import annotations

import json
import os
import signal
import threading
import urllib.error
import urllib.request
import webbrowser
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click

from foreserve.cli.common import consoles, echo_json, json_option
from foreserve.models.errors import ForeserveError, InvalidInput

STATE = ".foreserve"
REFRESH_S = 1.0
WIDTH = 132
"""Of what is shown once, in characters, at least."""
LOOK_S = 0.2
"""Between looks at an action that is waited for."""
state_option = click.option(
    "--state",
    "folder",
    type=click.Path(path_type=Path),
    default=Path(STATE),
    show_default=True,
    help="Folder of the cluster's logs, journal, plan and sockets.",
)


@click.command(epilog="Example: plan status --state .foreserve")
@click.option("--once", is_flag=True, help="Show it once; else live on a terminal.")
@click.option("--open", "opened", is_flag=True, help="Open the page in a browser.")
@state_option
@json_option
def status(folder: Path, once: bool, opened: bool, as_json: bool) -> int:
    """What a serving cluster holds, wants and waits for.

    On a terminal the view is live; end it with Ctrl-C. The same and more is on the page
    that --open shows.
    """
    if as_json:
        echo_json(ask(folder, "GET", "status"))
        return 0
    out, _ = consoles(False)
    if opened:
        about = _about(folder)
        page = _opener(folder, about)
        shown = webbrowser.open(page.resolve().as_uri())
        if out.is_terminal:
            out.print(page_url(about), soft_wrap=True)
        return 0 if shown else 1
    from foreserve.cli.status_view import render

    view = ask(folder, "GET", "view")
    if once or not out.is_terminal:
        out.width = max(out.width, WIDTH)
        out.print(render(view))
        return 0
    from rich.live import Live

    pause = threading.Event()
    with Live(render(view), console=out, screen=True, auto_refresh=False) as live:
        try:
            while not pause.wait(REFRESH_S):
                live.update(render(ask(folder, "GET", "view")), refresh=True)
        except KeyboardInterrupt:
            return 0
    return 0


def page_url(about: dict[str, Any]) -> str:
    """The status page. The token stays in the browser: what follows # is not sent."""
    return f"http://127.0.0.1:{about['admin_port']}/#token={about['token']}"


def _opener(folder: Path, about: dict[str, Any]) -> Path:
    """A file that leads to the page: on a browser's command line, others could read the
    token."""
    path = folder / "page.html"
    url = escape(page_url(about))
    path.unlink(missing_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(f'<meta http-equiv="refresh" content="0; url={url}">\n')
    return path


@click.command(epilog="Example: plan approve 3f2a9c01d4b5 --state .foreserve")
@click.argument("plan_id")
@state_option
@json_option
def approve(plan_id: str, folder: Path, as_json: bool) -> int:
    """Carry out a proposed plan, in mode ``recommend``."""
    done = ask(folder, "POST", f"plans/{quote(plan_id, safe='')}/approve")
    return _told(done, f"plan {plan_id} is carried out", as_json)


@click.command(epilog="Example: plan reject 3f2a9c01d4b5 --state .foreserve")
@click.argument("plan_id")
@state_option
@json_option
def reject(plan_id: str, folder: Path, as_json: bool) -> int:
    """Forget a proposed plan; the one before stays."""
    done = ask(folder, "POST", f"plans/{quote(plan_id, safe='')}/reject")
    return _told(done, f"plan {plan_id} is rejected", as_json)


@click.command(epilog="Example: plan drain n0 --wait --state .foreserve")
@click.argument("name", metavar="NODE|LLM")
@click.option("--resume", is_flag=True, help="Undo it.")
@click.option("--wait", "waits", is_flag=True, help="Until nothing is left there.")
@click.option("--dry-run", is_flag=True, help="Show the steps, and do nothing.")
@state_option
@json_option
def drain(
    name: str, resume: bool, waits: bool, dry_run: bool, folder: Path, as_json: bool
) -> int:
    """Clear a node, or stop an LLM, without breaking off a request.

    Nothing new comes to a drained node; what serves there is replaced elsewhere first,
    where there is room, and goes when its requests have ended. A drained LLM takes no
    requests until it is resumed. Both last over restarts.
    """
    if resume and waits:
        raise InvalidInput("--wait goes with draining, not with --resume")
    known = ask(folder, "GET", "status")
    nodes = [row["node"] for row in known["nodes"]]
    llms = [row["llm"] for row in ask(folder, "GET", "models")]
    if name in nodes:
        path, verb = f"nodes/{quote(name, safe='')}", "resume" if resume else "drain"
    elif name in llms:
        path, verb = f"models/{quote(name)}", "wake" if resume else "unload"
    else:
        from foreserve.models.codec import did_you_mean

        raise InvalidInput(
            f"no node and no LLM {name!r}", hint=did_you_mean(name, [*nodes, *llms])
        )
    if dry_run:
        return _steps(ask(folder, "POST", f"{path}/{verb}?dry_run=true"), as_json)
    done = ask(folder, "POST", f"{path}/{verb}")
    if not waits:
        what = "is resumed" if resume else "is being drained"
        return _told(done, f"{name} {what}", as_json)
    receipt = _follow(folder, done["action"], quiet=as_json)
    if receipt["state"] != "done":
        why = (
            "by another change" if receipt["state"] == "superseded" else "if it is done"
        )
        raise ForeserveError(f"{name}: {receipt['state']} {why}")
    return _told(receipt, f"{name} is drained, in {receipt['took_s']:.1f} s", as_json)


@click.command(epilog="Example: plan stop --state .foreserve")
@state_option
@json_option
def stop(folder: Path, as_json: bool) -> int:
    """End a serving cluster, after what it has accepted is answered."""
    about = _about(folder)
    os.kill(about["pid"], signal.SIGTERM)
    return _told({"pid": about["pid"]}, f"process {about['pid']} is stopping", as_json)


def ask(folder: Path, method: str, path: str) -> Any:
    """What the admin port of the cluster in ``folder`` answers."""
    about = _about(folder)
    request = urllib.request.Request(
        f"http://127.0.0.1:{about['admin_port']}/admin/v1/{path}",
        method=method,
        headers={"authorization": f"Bearer {about['token']}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=10.0) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        told = json.loads(error.read() or b"{}").get("error", {})
        raise InvalidInput(told.get("message", str(error))) from None
    except OSError as error:
        raise ForeserveError(
            f"{folder}: the cluster does not answer: {error}"
        ) from None


def _about(folder: Path) -> dict[str, Any]:
    path = folder / "admin.json"
    if not path.exists():
        raise InvalidInput(
            "no cluster serves from here", file=str(folder), hint="plan serve --state"
        )
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _follow(folder: Path, action: str, *, quiet: bool) -> dict[str, Any]:
    """The receipt of an action once it is no longer under way; says what it waits for."""
    pause, said = threading.Event(), ""
    while True:
        receipt: dict[str, Any] = ask(folder, "GET", f"actions/{action}")
        if receipt["state"] != "running":
            return receipt
        if receipt["reason"] != said and not quiet:
            said = receipt["reason"]
            click.echo(said, err=True)
        pause.wait(LOOK_S)


def _steps(outlook: dict[str, Any], as_json: bool) -> int:
    if as_json:
        echo_json(outlook)
        return 0
    for text in outlook.get("refused", ()):
        click.echo(f"refused: {text}")
    for step in outlook["steps"]:
        gap = ", and its LLM serves nowhere for a while" if step["outage"] else ""
        click.echo(
            f"{step['start_s']:6.1f} s  {step['kind']} {step['llm']} "
            f"on {', '.join(step['gpus'])}{gap}"
        )
    if not outlook["steps"] and "refused" not in outlook:
        click.echo("nothing to do")
    return 0


def _told(document: dict[str, Any], text: str, as_json: bool) -> int:
    if as_json:
        echo_json(document)
    else:
        click.echo(text)
    return 0
