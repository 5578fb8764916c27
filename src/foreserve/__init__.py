"""foreserve: plan and run many LLMs on one shared GPU cluster."""

from __future__ import annotations

__version__ = "0.1.0"
