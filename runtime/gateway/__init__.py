"""OpenAI-compatible HTTP in front of the engines; with the engine servers, the only
asyncio code."""
