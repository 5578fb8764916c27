"""How long an engine's iteration takes: measured kernels, composed."""
