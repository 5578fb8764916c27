"""Decoders of the `paged` engine say what transformers says, token for token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from foreserve.models.errors import InvalidInput

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="the paged engine needs torch")
pytest.importorskip("transformers", reason="compared with transformers")

from foreserve.runtime.engines import tiny  # noqa: E402
from foreserve.runtime.memory.safetensors import Checkpoint, fill  # noqa: E402
from foreserve.runtime.paged.config import parse, read_config  # noqa: E402
from foreserve.runtime.paged.layout import Part, lay_out  # noqa: E402
from foreserve.runtime.paged.loading import views  # noqa: E402
from foreserve.runtime.paged.rope import frequencies  # noqa: E402
from tests.paged_llms import Llm, Pages, Sequence_, iterate  # noqa: E402

CONFIGS = Path(__file__).parent / "configs"
LENGTHS = (1, 3, 17, 64, 131)
VARIANTS = {
    **{family: (family, {}) for family in tiny.FAMILIES},
    "mistral-window": ("mistral", {"sliding_window": 24}),
    "qwen-window": (
        "qwen",
        {"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 1},
    ),
    "llama-yarn": (
        "llama",
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama-linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
}


def prompt(length: int, seed: int) -> list[int]:
    """Of words and bytes alike."""
    drawn = torch.Generator().manual_seed(1000 * length + seed)
    return torch.randint(0, 540, (length,), generator=drawn).tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_answers_are_those_of_transformers(variant, tmp_path):
    """Five prompts of 1 to 131 tokens, computed 48 tokens at a time, so that prompts and
    decodes share iterations; a second one joins late; pages lie anywhere and were full of
    rubbish; after 9 iterations one loses its pages and computes all of it again."""
    family, changed = VARIANTS[variant]
    llm, pages = Llm(tmp_path, family, **changed), Pages(40)
    asked = [Sequence_(llm, prompt(n, 1), 24) for n in LENGTHS]
    waiting = asked[1:2]
    running = asked[:1] + asked[2:]
    for count in range(100):
        iterate(llm, pages, running, chunk=48)
        if count == 3:
            running += waiting
        if count == 9:
            pages.forget(asked[3])
        running = [one for one in running if not one.done]
        if not running:
            break
    assert len(pages.free) == 40
    for one in asked:
        assert one.answer == llm.told(one.prompt, 24)
        assert len(set(one.answer)) > 5  # or it would prove little


def test_several_llms_share_the_pages(tmp_path):
    """Four LLMs with 512 and 1024 bytes a token take turns over the same 24 pages: what
    each says is what it says alone."""
    families = ("llama", "qwen3-moe", "gemma2", "mistral")
    llms = [Llm(tmp_path / family, family) for family in families]
    pages = Pages(24)
    asked = [Sequence_(llm, prompt(20 + 9 * i, i), 12) for llm in llms for i in (1, 2)]
    while any(not one.done for one in asked):
        for llm in llms:
            mine = [one for one in asked if one.llm is llm and not one.done]
            if mine:
                iterate(llm, pages, mine, chunk=16)
    for one in asked:
        assert one.answer == one.llm.told(one.prompt, 12)


def test_weights_are_views_in_order_of_need(tmp_path):
    """All bytes lie at the layout's offsets, layer after layer, nothing twice; a decoder's
    weights are those bytes and no copy. Shards of two ranks together are as large."""
    folder = tiny.make(tmp_path, "qwen")
    config = read_config(folder)
    layout = lay_out(config, "bfloat16")
    offsets = [piece.offset_bytes for piece in layout.pieces]
    assert offsets == sorted(set(offsets))
    names = list(layout.weights)
    assert names[0] == "embedding"
    assert names.index("0.down") < names.index("1.norm") < names.index("head")
    memory = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    checkpoint = Checkpoint(folder)
    fill(layout, checkpoint, memory.numpy())
    weights = views(layout, memory)
    for name, weight in layout.weights.items():
        address = memory.data_ptr() + weight.offset_bytes
        assert weights[name].data_ptr() == address
    up = checkpoint.read("model.layers.1.mlp.up_proj.weight")
    there = weights["1.gate_up"][len(up) :].view(torch.int16).numpy()
    assert (there.view("u2") == up).all()
    halves = [lay_out(config, "bfloat16", Part(rank=rank, size=2)) for rank in (0, 1)]
    shared = sum(2 * 128 for name in names if "norm" in name)
    sizes = [
        sum(w.shape[0] * (w.shape[1:] or (1,))[0] for w in part.weights.values())
        for part in (layout, *halves)
    ]
    assert sizes[1] + sizes[2] == sizes[0] + shared // 2


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_frequencies(kind):
    """Each kind of stretched positions is transformers', for a head of 64."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    stated = {
        "rope_type": kind,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
        "rope_theta": 5e5,
    }
    wanted, attention = ROPE_INIT_FUNCTIONS[kind](
        LlamaConfig(head_dim=64, rope_parameters=stated), "cpu"
    )
    raw = {
        "model_type": "llama",
        "vocab_size": 8,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
        "rope_parameters": stated,
    }
    (rope, _) = parse(raw).ropes
    torch.testing.assert_close(frequencies(rope, 64), wanted)
    assert rope.attention == pytest.approx(attention)


@pytest.mark.parametrize(
    ("name", "layers", "windows"),
    [
        ("llama-3.2-3b", 28, 0),
        ("qwen2.5-7b", 28, 0),
        ("qwen3-32b", 64, 0),
        ("qwen3-235b-a22b", 94, 0),
        ("mixtral-8x7b", 32, 0),
        ("gemma-2-9b", 42, 21),
        ("gemma-3-27b", 62, 52),
    ],
)
def test_published_configs(name, layers, windows):
    """Files as published: so many layers, of which so many see a window only; every sixth
    of Gemma 3 and every second of Gemma 2 sees everything."""
    raw = json.loads((CONFIGS / f"{name}.json").read_text())
    raw = raw.get("text_config", raw)
    raw = {"intermediate_size": 1, "vocab_size": 8, "num_attention_heads": 32} | raw
    config = parse(raw)
    assert config.layers == layers == len(config.windows)
    assert sum(window is not None for window in config.windows) == windows


def test_what_there_is_no_decoder_for(tmp_path):
    """It is said in a line: the family, the kind of positions, a missing tensor, and
    a number of GPUs that heads do not divide by."""
    folder = tiny.make(tmp_path, "llama")
    raw = json.loads((folder / "config.json").read_text())
    with pytest.raises(InvalidInput, match="gpt_neox"):
        parse(raw | {"model_type": "gpt_neox"})
    with pytest.raises(InvalidInput, match="longrope"):
        parse(raw | {"rope_scaling": {"type": "longrope"}})
    with pytest.raises(InvalidInput, match="3 GPUs"):
        lay_out(parse(raw), "float32", Part(rank=0, size=3))
    layout = lay_out(parse(raw | {"attention_bias": True}), "float32")
    memory = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    with pytest.raises(InvalidInput, match=r"q_proj\.bias"):
        fill(layout, Checkpoint(folder), memory.numpy())
