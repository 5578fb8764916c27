"""A controller in a process of its own, to be killed: ``python -m tests.live_controller
FOLDER LOAD_S``. It wants a on both GPUs, and says when the first load has begun."""

from __future__ import annotations

import sys
from pathlib import Path

from foreserve.runtime.live.host import Hosted
from tests.live_setup import live, on, setup, three

folder, load_s = Path(sys.argv[1]), float(sys.argv[2])
f = three(load_s)
with live(folder, f, {"n0": Hosted(setup(folder, f))}) as run:
    run.want(on("a", 0), on("a", 1))
    run.until(lambda: len(run.phases()) == 2)
    run.pause(0.1)
    sys.stdout.write("loading\n")
    sys.stdout.flush()
    run.pause(60.0)
