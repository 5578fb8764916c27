"""Files in and out: byte-identical round trips, and errors that help."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreserve.models import codec
from foreserve.models.errors import InvalidInput
from foreserve.models.placement import Action, Placement, Replica, diff
from foreserve.models.plan import SCHEMA_VERSION, Plan
from foreserve.models.specs import GpuId
from tests.build import small_plan


def test_load_then_dump_gives_the_same_bytes(tmp_path):
    """A plan file is canonical: reading and writing it changes no byte."""
    text = codec.to_json(small_plan())
    path = tmp_path / "plan.json"
    codec.write_text(path, text)
    assert codec.to_json(codec.load_plan(path)) == text
    assert codec.load_plan(path) == small_plan()


@given(st.permutations(range(4)), st.lists(st.booleans(), min_size=4, max_size=4))
def test_placements_are_canonical(order, active):
    """The order in which replicas are listed does not reach the file."""
    replicas = [
        Replica(
            llm="a",
            gpus=(GpuId(node="n0", index=i),),
            state="ACTIVE" if active[i] else "WARM",
        )
        for i in range(4)
    ]
    listed = Placement(replicas=tuple(replicas[i] for i in order))
    assert codec.to_json(listed) == codec.to_json(Placement(replicas=tuple(replicas)))


def test_diff_lists_the_steps_in_a_safe_order():
    """By hand: a moves from n0/0 to n0/1 as ACTIVE, b on n0/1 is dropped."""
    g0, g1 = (GpuId(node="n0", index=i) for i in range(2))
    before = Placement(
        replicas=(
            Replica(llm="a", gpus=(g0,), state="ACTIVE"),
            Replica(llm="b", gpus=(g1,), state="WARM"),
        )
    )
    after = Placement(replicas=(Replica(llm="a", gpus=(g1,), state="ACTIVE"),))
    assert diff(before, after) == (
        Action(kind="demote", llm="a", gpus=(g0,)),
        Action(kind="drop", llm="a", gpus=(g0,)),
        Action(kind="drop", llm="b", gpus=(g1,)),
        Action(kind="load", llm="a", gpus=(g1,)),
        Action(kind="activate", llm="a", gpus=(g1,)),
    )
    assert diff(after, after) == ()


def _broken(text: str) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        codec.from_json(Plan, text, "plan.json")
    message = str(caught.value)
    assert message.startswith("plan.json")
    assert "\n" not in message
    return caught.value


def test_misspelt_key_names_the_line_and_the_right_key():
    """`nods` for `nodes`: file, line, field, did-you-mean; the missing key comes too."""
    text = codec.to_json(small_plan()).replace('"nodes": [\n', '"nods": [\n', 1)
    error = _broken(text)
    assert error.message == "unknown key 'nods'"
    assert error.hint == "did you mean 'nodes'?"
    assert text.splitlines()[error.line - 1].strip().startswith('"nods"')
    assert any("required" in also.message for also in error.also)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('"n0/0"', '"n0"', "expected NODE/INDEX"),
        ('"ACTIVE"', '"SERVING"', "'ACTIVE' or 'WARM'"),
        ('"epoch_s"', '"epoch"', "unknown key"),
        ("300.0", "NaN", "NaN is not a number"),
        ("300.0", '"x"', "valid number"),
    ],
)
def test_wrong_values_are_named(old, new, expected):
    """Each fault is one line that says what was found."""
    text = codec.to_json(small_plan())
    if old not in text:
        text = text.replace('"end_s"', '"epoch_s"', 1)
        old = '"epoch_s"'
    assert expected in str(_broken(text.replace(old, new, 1)))


def test_truncated_plan():
    """A cut-off file is recognised as one."""
    error = _broken(codec.to_json(small_plan())[:700])
    assert "not valid JSON" in error.message
    assert error.line is not None
    assert "cut off" in str(_broken(codec.to_json(small_plan())[:-30]))


def test_duplicate_key_and_duplicate_gpu():
    """Neither is silently resolved."""
    text = codec.to_json(small_plan())
    assert "twice" in str(_broken('{"epochs": [], "epochs": []}'))
    doubled = text.replace('"n0/0"\n', '"n0/0",\n      "n0/0"\n', 1)
    assert "duplicate GPU n0/0" in str(_broken(doubled))


def test_newer_schema_version(tmp_path):
    """A plan of a newer foreserve is refused before its unknown keys are."""
    newer = f'"schema_version": {SCHEMA_VERSION + 1}, "new_key": 1'
    text = codec.to_json(small_plan()).replace(
        f'"schema_version": {SCHEMA_VERSION}', newer
    )
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(InvalidInput, match="schema version") as caught:
        codec.load_plan(path)
    assert caught.value.field == "schema_version"


def test_writing_is_whole_or_not_at_all(tmp_path):
    """A failed write leaves the old file and no temporary one."""
    path = tmp_path / "out.json"
    codec.write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        codec.write_text(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
