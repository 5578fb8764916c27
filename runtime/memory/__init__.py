"""Memory of an engine that is ours: one pool of physical pages for weights and KV caches.

`books` says whose a page is, `pool` maps pages into ranges of addresses over `posix` or
`cuda`; `kv` lays out and grants KV pages, `store`, `loading` and `weights` bring weights.
"""
