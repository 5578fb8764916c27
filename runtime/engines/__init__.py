"""Engines that serve replicas: each behind the contract of `base`."""
