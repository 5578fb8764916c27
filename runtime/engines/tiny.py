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

WINDOW = 64
FAMILIES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen": ("Qwen2ForCausalLM", "qwen2"),
    "mistral": ("MistralForCausalLM", "mistral"),
    "llama3": ("LlamaForCausalLM", "llama"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "qwen3_moe"),
    "mixtral": ("MixtralForCausalLM", "mixtral"),
    "gemma": ("GemmaForCausalLM", "gemma"),
    "gemma2": ("Gemma2ForCausalLM", "gemma2"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
}
MORE: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "llama3": {
        "tie_word_embeddings": True,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    },
    "qwen3-moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma": {"hidden_activation": "gelu_pytorch_tanh"},
    "gemma2": {"sliding_window": WINDOW, "query_pre_attn_scalar": 24},
    "gemma3": {
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 2,
        "rope_local_base_freq": 10000.0,
        "rope_theta": 1000000.0,
    },
}
"""What a family's file says beside what all say."""
TIED = ("llama3", "gemma", "gemma2", "gemma3")
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
    config |= MORE.get(family, {})
    if family == "qwen3-moe":
        config["moe_intermediate_size"] = hidden
    if family in ("gemma2", "gemma3"):
        # Every second layer sees everything, every other one a window.
        kinds = ("sliding_attention", "full_attention")
        config["layer_types"] = [kinds[layer % 2] for layer in range(layers)]
        config["attn_logit_softcapping"] = 50.0 if family == "gemma2" else None
        config["final_logit_softcapping"] = 30.0 if family == "gemma2" else None
    if family in TIED:
        config["tie_word_embeddings"] = True
    if family.startswith("gemma"):
        config["hidden_act"] = config["hidden_activation"] = "gelu_pytorch_tanh"
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
    tokens = [*byte_letters(), *("\u0120" + word for word in words), *SPECIAL]
    return {token: number for number, token in enumerate(tokens)}


def byte_letters() -> list[str]:
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

    def norm(size: int = hidden) -> NDArray[np.float32]:
        """Ones where files of earlier versions have them; else near what is 1 to the
        family, and no two alike."""
        if family in ("llama", "qwen", "mistral"):
            return np.ones(size, np.float32)
        middle = 0.0 if family.startswith("gemma") else 1.0
        return np.asarray(middle + 0.2 * rng.standard_normal(size), np.float32)

    tied, sandwich = config["tie_word_embeddings"], family in ("gemma2", "gemma3")
    # Gemmas make theirs larger by the root of the width.
    faint = 0.05 if family.startswith("gemma") else 1.0
    embedding = drawn(len(words), hidden, faint if tied else 4)
    # All but words with their space: also that space alone.
    silent = [n for word, n in words.items() if word[0] != "\u0120" or len(word) == 1]
    if tied:
        # What is silent at the end is still heard at the beginning, if faintly.
        embedding[silent] *= 0.25
    yield "model.embed_tokens.weight", embedding
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        yield f"{name}.input_layernorm.weight", norm()
        for part, rows, factor in (("q", queries, 4), ("k", keys, 4), ("v", keys, 1)):
            yield f"{name}.self_attn.{part}_proj.weight", drawn(rows, hidden, factor)
            if family == "qwen":
                yield f"{name}.self_attn.{part}_proj.bias", drawn(rows, 1, 0.1)[:, 0]
        if family in ("qwen3", "qwen3-moe", "gemma3"):
            yield f"{name}.self_attn.q_norm.weight", norm(head)
            yield f"{name}.self_attn.k_norm.weight", norm(head)
        yield f"{name}.self_attn.o_proj.weight", drawn(hidden, queries)
        yield f"{name}.post_attention_layernorm.weight", norm()
        if sandwich:
            yield f"{name}.pre_feedforward_layernorm.weight", norm()
            yield f"{name}.post_feedforward_layernorm.weight", norm()
        for path, rows, columns, strength in _feed_forward(config, family, inner):
            yield f"{name}.{path}.weight", drawn(rows, columns, strength)
    yield "model.norm.weight", norm()
    if tied:
        return
    # Only words are ever likely: bytes and special tokens have no weight in the end.
    out = drawn(len(words), hidden, 4)
    out[silent] = 0
    yield "lm_head.weight", out


def _feed_forward(
    config: dict[str, Any], family: str, inner: int
) -> Iterator[tuple[str, int, int, float]]:
    """Its matrices: name, rows, columns, strength."""
    hidden = config["hidden_size"]
    if family == "mixtral":
        at, names, count = "block_sparse_moe", ("w1", "w3", "w2"), 4
    else:
        at, names, count = "mlp", ("gate_proj", "up_proj", "down_proj"), 4
        inner = config.get("moe_intermediate_size", inner)
    if family not in ("mixtral", "qwen3-moe"):
        experts = [at]
    else:
        yield f"{at}.gate", count, hidden, 2
        experts = [f"{at}.experts.{expert}" for expert in range(count)]
    gate, up, down = names
    for expert in experts:
        yield f"{expert}.{gate}", inner, hidden, 1
        yield f"{expert}.{up}", inner, hidden, 1
        yield f"{expert}.{down}", hidden, inner, 2


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
