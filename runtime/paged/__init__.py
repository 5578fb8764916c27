"""The `paged` engine's execution: decoders over pages of a pool that many LLMs share."""
