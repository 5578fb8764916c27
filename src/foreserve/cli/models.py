"""`plan models`: LLMs as files."""

from __future__ import annotations

from pathlib import Path

import click


@click.group(epilog="Example: plan models make-tiny out/tiny-llama")
def models() -> None:
    """LLMs as files, for engines that read them."""


@models.command(
    "make-tiny", epilog="Example: plan models make-tiny out/tiny-qwen --family qwen"
)
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--family",
    type=click.Choice(
        [
            *("llama", "qwen", "mistral", "llama3", "qwen3"),
            *("qwen3-moe", "mixtral", "gemma", "gemma2", "gemma3"),
        ]
    ),
    default="llama",
    show_default=True,
    help="Its architecture.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of its weights.")
@click.option(
    "--hidden",
    type=click.IntRange(min=32),
    default=128,
    show_default=True,
    help="Width of its layers; a multiple of 4 heads.",
)
@click.option("--layers", type=click.IntRange(min=1), default=2, show_default=True)
def make_tiny(folder: Path, family: str, seed: int, hidden: int, layers: int) -> None:
    """Write a tiny LLM with random weights and its tokenizer into FOLDER: a checkpoint
    that vLLM and transformers load, for trying things out without a network. What it says
    means nothing."""
    from foreserve.runtime.engines.tiny import make

    make(folder, family, seed=seed, hidden=hidden, layers=layers)
    size = sum(path.stat().st_size for path in folder.iterdir())
    click.echo(f"{folder}: {family}, {size / 1e6:.1f} MB")
