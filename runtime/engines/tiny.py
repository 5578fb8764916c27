"""Tiny LLMs with random weights, made on the spot: real checkpoints for real engines.

A folder as Hugging Face's: ``config.json``, ``model.safetensors`` and a tokenizer. What
they say means nothing, but it is words, always the same, and different for each seed. No
library but numpy is needed: the weights file is a JSON header and raw numbers, and the
tokenizer knows every byte and a few hundred words.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreserve.models.errors import InvalidInput

FAMILIES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen": ("Qwen2ForCausalLM", "qwen2"),
    "mistral": ("MistralForCausalLM", "mistral"),
}
SPECIAL = ("<|begin|>", "<|end|>", "<|user|>", "<|assistant|>")
CHAT = (
    "{% for m in messages %}"
    "{{ '<|user|>' if m['role'] != 'assistant' else '<|assistant|>' }}{{ m['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SYLLABLES = ("ka", "lo", "mi", "ra", "su", "te", "vo", "ne", "pi", "du", "fa", "go")


def make(
    folder: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    hidden: int = 128,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    context_tokens: int = 4096,
) -> Path:
    """Write the LLM into ``folder``, which is made if it is not there; same arguments,
    same bytes. With the default sizes about a million weights."""
    if family not in FAMILIES:
        raise InvalidInput(f"family {family!r}: expected one of {', '.join(FAMILIES)}")
    if hidden % (2 * heads) or heads % kv_heads:
        raise InvalidInput(
            f"hidden={hidden}: expected a multiple of {2 * heads}, for {heads} heads"
        )
    folder.mkdir(parents=True, exist_ok=True)
    words = vocabulary()
    architecture, kind = FAMILIES[family]
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "vocab_size": len(words),
        "max_position_embeddings": context_tokens,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": words[SPECIAL[0]],
        "eos_token_id": words[SPECIAL[1]],
        "torch_dtype": "bfloat16",
    }
    if family == "mistral":
        config["sliding_window"] = None
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": words[SPECIAL[0]], "eos_token_id": words[SPECIAL[1]]},
    )
    _write_tokenizer(folder, words, context_tokens)
    rng = np.random.default_rng(seed)
    _write_weights(folder / "model.safetensors", _weights(config, family, words, rng))
    return folder


def vocabulary() -> dict[str, int]:
    """Token -> id: all bytes, words of two and three syllables, and the special tokens."""
    words = [first + second for first in SYLLABLES for second in SYLLABLES]
    words += [f"{word}{word[:2]}" for word in words]
    tokens = [*_byte_letters(), *("\u0120" + word for word in words), *SPECIAL]
    return {token: number for number, token in enumerate(tokens)}


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level tokenizers (GPT-2's table):
    printable ones for themselves, the others from 256 on."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


def _weights(
    config: dict[str, Any],
    family: str,
    words: dict[str, int],
    rng: np.random.Generator,
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config["head_dim"]
    queries, keys = (
        config["num_attention_heads"] * head,
        head * (config["num_key_value_heads"]),
    )

    # Sharp attention and strong layers keep answers from running in circles.
    def drawn(rows: int, columns: int, factor: float = 1.0) -> NDArray[np.float32]:
        values = rng.standard_normal((rows, columns)) * (factor * columns**-0.5)
        return np.asarray(values, np.float32)

    ones = np.ones(hidden, np.float32)
    yield "model.embed_tokens.weight", drawn(len(words), hidden, 4)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        yield f"{name}.input_layernorm.weight", ones
        for part, rows, factor in (("q", queries, 4), ("k", keys, 4), ("v", keys, 1)):
            yield f"{name}.self_attn.{part}_proj.weight", drawn(rows, hidden, factor)
            if family == "qwen":
                yield f"{name}.self_attn.{part}_proj.bias", drawn(rows, 1, 0.1)[:, 0]
        yield f"{name}.self_attn.o_proj.weight", drawn(hidden, queries)
        yield f"{name}.post_attention_layernorm.weight", ones
        yield f"{name}.mlp.gate_proj.weight", drawn(inner, hidden)
        yield f"{name}.mlp.up_proj.weight", drawn(inner, hidden)
        yield f"{name}.mlp.down_proj.weight", drawn(hidden, inner, 2)
    yield "model.norm.weight", ones
    # Only words are ever likely: bytes and special tokens have no weight in the end.
    out = drawn(len(words), hidden, 4)
    silent = [number for word, number in words.items() if word[0] != "\u0120"]
    out[silent] = 0
    yield "lm_head.weight", out


def _write_weights(
    path: Path, weights: Iterator[tuple[str, NDArray[np.float32]]]
) -> None:
    """The safetensors format: length of the header, header, numbers; as bfloat16."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts, at = [], 0
    for name, values in weights:
        # The upper half of a float32 is a bfloat16, truncated.
        raw = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
        offsets = [at, at + len(raw)]
        header[name] = {
            "dtype": "BF16",
            "shape": list(values.shape),
            "data_offsets": offsets,
        }
        at += len(raw)
        parts.append(raw)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))


def _write_tokenizer(folder: Path, words: dict[str, int], context_tokens: int) -> None:
    special = [
        {
            "id": words[token],
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token in SPECIAL
    ]
    bytewise = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    _write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": special,
            "normalizer": None,
            "pre_tokenizer": bytewise,
            "post_processor": None,
            "decoder": bytewise,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                # Words that are in the vocabulary as they stand need no merges.
                "ignore_merges": True,
                "vocab": words,
                "merges": [],
            },
        },
    )
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL[0],
            "eos_token": SPECIAL[1],
            "model_max_length": context_tokens,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT,
        },
    )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
