"""``python -m foreserve.runtime.live SETUP``: the agent of one node."""

import sys
from pathlib import Path

from foreserve.runtime.live.host import serve

serve(Path(sys.argv[1]))
