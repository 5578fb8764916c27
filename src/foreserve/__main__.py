"""`python -m foreserve` is the same program as `plan`."""

from __future__ import annotations

from foreserve.cli import main

if __name__ == "__main__":
    main()
