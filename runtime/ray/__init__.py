"""What needs a Ray cluster: the only folder that imports ray, which is an extra."""
