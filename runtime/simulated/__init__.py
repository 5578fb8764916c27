"""The simulator: a cluster behind the `Backend` protocol, in virtual time."""

from foreserve.runtime.simulated.run import simulate

__all__ = ["simulate"]
