"""What prompts share: read, checked, kept by all that selects requests, and written."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreserve.models.errors import InvalidInput
from foreserve.planner.fleet import align
from foreserve.traces import files
from foreserve.traces.formats import open_trace, read_trace, write_trace
from foreserve.traces.info import describe
from foreserve.traces.prefixes import Prefixes
from foreserve.traces.readers import joined
from foreserve.traces.sources import group_of
from foreserve.traces.trace import Trace, merge
from foreserve.traces.writers import merge_rows, rows_of, write_rows

DATA = Path(__file__).parents[1] / "../shared/data/mooncake"
FIVE = """\
{"timestamp": 0, "input_length": 1200, "output_length": 9, "hash_ids": [0, 1, 2]}
{"timestamp": 1000, "input_length": 1200, "output_length": 9, "hash_ids": [0, 1, 2]}
{"timestamp": 1000, "input_length": 1024, "output_length": 9, "hash_ids": [0, 3]}
{"timestamp": 2000, "input_length": 700, "output_length": 0, "hash_ids": [4, 5]}
{"timestamp": 3000, "input_length": 1500, "output_length": 9, "hash_ids": [4, 6, 7]}
"""


def put(folder, text, name="t.jsonl"):
    path = folder / name
    path.write_text(text)
    return path


def prefixes(lists, block_tokens=512):
    return Prefixes(
        starts=np.cumsum([0, *map(len, lists)]),
        ids=np.array([block for row in lists for block in row], dtype=np.int32),
        block_tokens=block_tokens,
    )


def make(arrival_s, lists, llms=("a",), llm=None, inputs=None, block_tokens=512):
    """A trace whose prompts are as long as their blocks; no lists: none are known."""
    count = len(arrival_s)
    return Trace(
        arrival_s=np.array(arrival_s, dtype=np.float64),
        llm=np.array(llm or [0] * count, dtype=np.int32),
        llms=llms,
        input_tokens=np.array(
            inputs or [max(1, block_tokens * len(row)) for row in lists],
            dtype=np.int32,
        ),
        output_tokens=np.ones(count, dtype=np.int32),
        prefixes=prefixes(lists, block_tokens),
    )


def lists(trace):
    return None if trace.prefixes is None else trace.prefixes.lists()


@pytest.mark.parametrize(("rows", "items"), [(100, 100), (2, 100), (100, 4)])
def test_five_requests_by_hand(tmp_path, monkeypatch, rows, items):
    """The fourth failed, so the fifth finds nothing of it. The second finds all of its
    1,200 tokens but the last, the third a block: 1,711 of 4,924. With the fourth kept it
    is 512 more, of 5,624. The same in chunks of few rows, or of few ids."""
    monkeypatch.setattr(files, "CHUNK_ROWS", rows)
    monkeypatch.setattr(files, "CHUNK_ITEMS", items)
    path = put(tmp_path, FIVE)
    trace = read_trace(path)
    # Numbered anew: nobody has 4's successor 5 any more.
    assert lists(trace) == [[0, 1, 2], [0, 1, 2], [0, 3], [4, 5, 6]]
    assert trace.prefixes.block_tokens == 512
    assert describe(trace).llms[0].prefix_share == 1711 / 4924
    kept = read_trace(path, keep_failed=True)
    assert lists(kept) == [[0, 1, 2], [0, 1, 2], [0, 3], [4, 5], [4, 6, 7]]
    assert describe(kept).llms[0].prefix_share == (1711 + 512) / 5624
    assert open_trace(path).left_out == ()


def test_canonical_lines_by_hand(tmp_path):
    """Lists may be absent, null or empty, in the first line too; ids of any size become
    dense; each LLM has a share of its own, or none if its prompts have no blocks."""
    row = '{{"arrival_s": {}, "llm": "{}", "input_tokens": 40, "output_tokens": 1{}}}\n'
    blocks = ', "prefix_blocks": {}, "prefix_block_tokens": {}'
    path = put(
        tmp_path,
        row.format(0, "a", "")
        + row.format(1, "b", blocks.format([2_000_000_000, 7], 16))
        + row.format(2, "b", blocks.format("null", "null"))
        + row.format(3, "c", blocks.format([2_000_000_000, 9], 16))
        + row.format(4, "b", blocks.format([2_000_000_000, 7, 5], 16))
        + row.format(5, "a", blocks.format([], 16)),
    )
    trace = read_trace(path)
    assert lists(trace) == [[], [0, 1], [], [0, 2], [0, 1, 3], []]
    shares = {llm.llm: llm.prefix_share for llm in describe(trace).llms}
    assert shares == {"a": None, "b": 32 / 120, "c": 0.0}
    assert read_trace(put(tmp_path, row.format(0, "a", ""))).prefixes is None
    # One group name is not a list of blocks; neither is a cell of CSV.
    table = (
        "arrival_s,llm,input_tokens,output_tokens,prefix,prefix_blocks\n0,a,9,1,x,y\n"
    )
    path = put(tmp_path, table, "t.csv")
    assert read_trace(path).prefixes is None
    assert open_trace(path).left_out == ("prefix", "prefix_blocks")


GOOD = '{"arrival_s": 0, "llm": "a", "input_tokens": 40, "output_tokens": 1, '
GOOD += '"prefix_blocks": [1, 2], "prefix_block_tokens": 16}\n'


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        (FIVE.replace("[0, 3]", "3"), 3, "hash_ids: '3' is not a list of ids"),
        (FIVE.replace("[0, 3]", '"0"'), 3, "hash_ids: '0' is not a list of ids"),
        (FIVE.replace("3]", "-3]"), 3, "'[0, -3]' has an id that is not a whole number"),
        (FIVE.replace("3]", "true]"), 3, "'[0, True]' has an id that"),
        (FIVE.replace("3]", "3.0]"), 3, "'[0, 3.0]' has an id that"),
        (FIVE.replace("3]", "[3]]"), 3, "'[0, [3]]' has an id that"),
        (FIVE.replace("3]", "null]"), 3, "'[0, None]' has an id that"),
        (FIVE.replace("3]", f"{2**80}]"), 3, "number the blocks from 0"),
        (FIVE.replace("3]", "3, 8]"), 3, "more blocks of 512 tokens than the prompt"),
        (FIVE.replace("3]", f"{[*range(3, 99)]}"[1:]), 3, "19, 20, 2...' has more"),
        # A block has one way to it; it cannot be in a prompt twice.
        (FIVE.replace("[0, 3]", "[3, 1]"), None, "hash_ids: the request at 1 s has a"),
        (FIVE.replace("[0, 1, 2]", "[0, 0]"), None, "mean equal tokens from the prompt"),
        (GOOD + GOOD.replace("16", "0"), 2, "prefix_block_tokens: '0' is not a whole"),
        (GOOD + GOOD.replace("16", "null"), 2, "prefix_block_tokens: 'None' is not"),
        (GOOD + GOOD.replace("16", "32"), 2, "prefix_block_tokens: '32' is not 16, as"),
        (GOOD.replace("[1, 2]", "[1, 2, 3, 4]"), 1, "than the prompt can hold"),
        (GOOD.replace(', "prefix_block_tokens": 16', ""), 1, "prefix_block_tokens: 'No"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("rows", [1, 100])
def test_broken_lists_are_named_in_one_line(
    tmp_path, monkeypatch, rows, text, line, expected
):
    """File, line, field, what to do; whatever chunks it is read in."""
    monkeypatch.setattr(files, "CHUNK_ROWS", rows)
    path = put(tmp_path, text)
    with pytest.raises(InvalidInput) as caught:
        read_trace(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert expected in message
    assert "\n" not in message
    assert len(message) < 400
    assert caught.value.line == line


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_round_trips(tmp_path, monkeypatch, rows):
    """Mooncake's ids come back as they are, through canonical JSON lines too; formats
    that cannot hold them say so."""
    monkeypatch.setattr(files, "CHUNK_ROWS", rows)
    source = put(
        tmp_path, FIVE.replace('length": 0', 'length": 1').replace("7]", "70]")
    )
    out, back = tmp_path / "o.jsonl", tmp_path / "b.jsonl"
    assert write_rows(open_trace(source).chunks, out).lost("canonical") == []
    row = json.loads(out.read_text().splitlines()[3])
    assert (row["prefix_blocks"], row["prefix_block_tokens"]) == ([4, 5], 512)
    written = write_rows(open_trace(out).chunks, back, "mooncake")
    assert written.lost("mooncake") == ["the name of the LLM, t"]
    assert back.read_text() == source.read_text()
    trace = read_trace(source)
    write_trace(trace, out)
    assert lists(read_trace(out)) == lists(trace)
    for format in ("canonical", "azure"):
        written = write_rows(rows_of(trace), tmp_path / "o.csv", format)
        assert "what prompts share, in blocks of 512 tokens" in written.lost(format)[-1]


def test_mooncake_has_ids_for_blocks_that_are_not_known(tmp_path, monkeypatch):
    """A prompt known in part, or not at all, before and after those that are: what is
    known stays the same, and nothing else is shared. Blocks of another size say nothing."""
    monkeypatch.setattr(files, "CHUNK_ROWS", 1)
    path = tmp_path / "o.jsonl"
    tokens = [600, 1600, 600, 1024]
    trace = make([0, 1, 2, 3], [[], [0, 1], [], [0, 2]], inputs=tokens)

    def chunks():
        first, *rest = rows_of(trace)
        yield replace(first, prefixes=None)
        yield from rest

    write_rows(chunks(), path, "mooncake")
    rows = [json.loads(line)["hash_ids"] for line in path.read_text().splitlines()]
    last = 2**31 - 1
    assert rows == [[0, 1], [2, 3, last - 1, last], [last - 3, last - 2], [2, 4]]
    assert lists(read_trace(path)) == [[0, 1], [2, 3, 4, 5], [6, 7], [2, 8]]
    small = make([0, 1], [[0, 1], [0, 1]], block_tokens=16, inputs=[32, 32])
    written = write_rows(rows_of(small), path, "mooncake")
    assert "in blocks of 16 tokens" in written.lost("mooncake")[-1]
    assert lists(read_trace(path)) == [[0], [1]]
    none_left = make([0, 1], [[last], []])
    with pytest.raises(InvalidInput, match="no ids are left"):
        write_rows(rows_of(none_left), path, "mooncake")


def test_what_selects_requests_keeps_their_blocks():
    """A time, one LLM of several, another order of LLMs."""
    trace = make([0, 1, 2], [[0, 1], [2], [0, 3]], ("a", "b"), [0, 1, 0])
    assert lists(trace.between(1, 3)) == [[2], [0, 3]]
    assert lists(trace.between(3, 4)) == []
    assert lists(group_of(trace, "a")) == [[0, 1], [0, 3]]
    assert lists(align(trace, ("b", "c", "a"))) == lists(trace)
    # Requests in another order than their blocks, one of them twice.
    assert trace.prefixes.take(np.array([2, 0, 2])).lists() == [[0, 3], [0, 1], [0, 3]]
    for array in (trace.prefixes.ids, trace.between(1, 3).prefixes.starts):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 5


def test_merged_traces_share_nothing():
    """The same ids in two traces are other tokens; one without blocks has empty lists;
    one alone keeps its ids."""
    one, two = make([0, 2], [[0, 9], [0]]), make([1, 2], [[0, 9], []], ("b",))
    none = replace(make([1], [[]]), prefixes=None)
    assert lists(merge([one, none, two])) == [[0, 1], [], [2, 3], [0], []]
    assert lists(merge([none, one])) == [[0, 9], [], [0]]
    assert lists(merge([one])) == lists(one)
    assert merge([none, none]).prefixes is None
    other = make([0], [[0]], block_tokens=16)
    with pytest.raises(InvalidInput, match=r"of 512 and of 16 tokens.*CSV first"):
        merge([one, other])


def test_sources_in_chunks_share_nothing(tmp_path, monkeypatch):
    """The same where nothing is known of the ids to come; blocks of two sizes, in chunks
    that never meet, and ids too large are refused."""
    monkeypatch.setattr(files, "CHUNK_ROWS", 1)
    one, two = make([0, 2], [[0, 9], [0]]), make([1, 2], [[0, 9], []], ("b",))
    rows = joined(list(merge_rows([rows_of(one), rows_of(two)])))
    assert rows.prefixes.lists() == [[0, 18], [1, 19], [0], []]
    far = make([8, 9], [[0], [0]], block_tokens=16)
    path = tmp_path / "o.jsonl"
    with pytest.raises(InvalidInput, match="blocks of 512 and of 16"):
        write_rows(merge_rows([rows_of(one), rows_of(far)]), path)
    assert not path.exists()
    large = make([0], [[2**30]])
    with pytest.raises(InvalidInput, match="id is too large"):
        list(merge_rows([rows_of(one), rows_of(large)]))


WORDS = st.lists(st.integers(0, 1), min_size=1, max_size=7)


@given(st.lists(st.lists(st.tuples(st.integers(0, 5), WORDS), max_size=8), max_size=3))
def test_any_prompts_word_by_word(sources):
    """Prompts of two words in blocks of two: what is found is what comparing them word by
    word finds, in whole blocks or in the same partial one; sources merged in chunks share
    what they share when merged at once."""
    traces, expected = [], []
    for source in sources:
        rows = sorted(source, key=lambda row: row[0])
        ids, blocks, found = {}, [], []
        for _, words in rows:
            ends = range(2, len(words) + 2, 2)
            heads = [tuple(words[:end]) for end in ends]
            known = [head for head in heads if head in ids]
            found.append(min(len(known[-1]) if known else 0, len(words) - 1))
            blocks.append([ids.setdefault(head, len(ids)) for head in heads])
        lengths = [len(words) for _, words in rows]
        at_s = [at for at, _ in rows]
        traces.append(make(at_s, blocks, inputs=lengths, block_tokens=2))
        expected.append(found)
    for trace, found in zip(traces, expected, strict=True):
        assert trace.prefixes.found_tokens(trace.input_tokens).tolist() == found
        assert trace.prefixes.contradiction() is None
    if sum(map(len, traces)):
        whole = merge(traces).prefixes
        before = files.CHUNK_ROWS
        try:
            files.CHUNK_ROWS = 2
            chunks = joined(list(merge_rows([rows_of(trace) for trace in traces])))
        finally:
            files.CHUNK_ROWS = before
        assert chunks.prefixes.dense().lists() == whole.dense().lists()
        tokens = whole.found_tokens(chunks.input_tokens)
        assert tokens.sum() == sum(map(sum, expected))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"starts": np.array([0, 1, 4])}, "of each request"),
        ({"starts": np.array([0, 3, 2, 4])}, "must not decrease"),
        ({"starts": np.array([1, 2, 3, 4])}, "from 0 to the number"),
        ({"starts": np.array([0, 2, 3, 5])}, "from 0 to the number"),
        ({"starts": np.array([], dtype=np.int64)}, r"\[request \+ 1\]"),
        ({"starts": np.array([0, 2, 3, 4], dtype=np.int32)}, "int64 starts"),
        ({"ids": np.array([0, 1, -2, 3], dtype=np.int32)}, "not be negative"),
        ({"ids": np.zeros((2, 2), dtype=np.int32)}, r"ids \[block\]"),
        ({"block_tokens": 0}, "a token at least"),
        ({"block_tokens": 1023}, "more blocks than it can hold"),
    ],
)
def test_prefixes_that_exist_are_sound(change, expected):
    """Kinds, order, range and what fits a prompt are checked when they are made."""
    trace = make([0, 1, 2], [[0, 1], [2], [0]], inputs=[1022, 1, 512])
    with pytest.raises(InvalidInput, match=expected):
        replace(trace, prefixes=replace(trace.prefixes, **change))


def test_info_and_compose_on_the_command_line(tmp_path, plan):
    """`info` tells the share of each LLM that has one. A composed trace is other
    requests: it shares nothing, whatever the source did."""
    source = put(tmp_path, FIVE)
    code, text, err = plan("trace info", source)
    assert (code, err) == (0, "")
    assert "t 34.7%" in " ".join(text.split())
    found = json.loads(plan("trace info --json", source)[1])
    assert found["llms"][0]["prefix_share"] == 1711 / 4924
    text = plan("trace info --json sample:azure-2023")[1]
    assert {llm["prefix_share"] for llm in json.loads(text)["llms"]} == {None}
    assert "prefix" not in plan("trace info sample:azure-2023")[1]
    recipe = put(
        tmp_path,
        f"span: 3s\nsources: {{s: {source}}}\nllms: [{{name: x, source: s}}]\n",
        "recipe.yaml",
    )
    code, _, err = plan("trace compose", recipe, tmp_path / "fleet.jsonl")
    assert (code, err) == (0, "")
    made = read_trace(tmp_path / "fleet.jsonl")
    assert (len(made), made.prefixes) == (3, None)


def test_the_recorded_conversations(tmp_path):
    """12,031 requests with 288,500 blocks: a cache without limits finds 37.4 % of the
    tokens, and they are written as they were read."""
    source = DATA / "conversation_trace.jsonl.gz"
    if not source.exists():
        pytest.skip("needs ../shared/data/mooncake")
    trace = read_trace(source)
    assert len(trace.prefixes.ids) == 288_500
    share = describe(trace).llms[0].prefix_share
    assert share == 54_098_293 / 144_793_823
    path = tmp_path / "o.jsonl"
    write_rows(rows_of(trace), path, "mooncake")
    assert path.read_bytes() == gzip.decompress(source.read_bytes())
