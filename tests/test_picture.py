"""The picture of a plan shows every stage, call and decision once, what waits for what, and how a run stands."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import parflow as pf
from parflow.core.entries import BarrierOpened, ChunksListed, RunStarted
from parflow.core.explain import explain
from parflow.core.history import RunState
from parflow.core.plan import Plan
from parflow.model import Chunk
from parflow.nodes import Task
from parflow.views.boxes import MOST_BOXES, boxes_of
from parflow.views.picture import LONGEST, html_of, picture

SVG = "{http://www.w3.org/2000/svg}"


# --- workflows -------------------------------------------------------------------------------------------------------------


def named(name: str, *args: Any) -> Any:
    """Call something of a name."""
    return pf.call(Task(lambda *given: given, name), *args)


@pf.task
def alert(share: float) -> str:
    return f"alert {share}"


@pf.task
def archive(share: float) -> str:
    return f"quiet {share}"


@pf.workflow
def watch(n: int = 10) -> Any:
    rows = pf.items(range(n)).map(lambda x: {"x": x}, name="row")
    mean = rows.reduce(pf.mean("x"))
    centred = rows.map(lambda row, mean: row["x"] - mean, mean, name="centre").reduce(pf.max())
    return pf.when(mean > 4, alert(mean), archive(mean)), centred


@pf.workflow
def words() -> Any:
    lines = pf.items(["a b"])
    split = lines.flat_map(str.split, name="split")
    lower = split.map(str.lower, name="lower").filter(str.isalpha, name="is_word")
    return lower.reduce(pf.counter()), split.reduce(pf.count()), lines.map(len, name="length").reduce(pf.max())


@pf.workflow
def rounds(count: int, leaves: int = 1000) -> Any:
    total: Any = 0
    for _ in range(count):
        level = [named("leaf", total, i) for i in range(leaves)]
        while len(level) > 1:
            level = [named("join", level[at : at + 10]) for at in range(0, len(level), 10)]
        total = named("end", level[0])
    return total


# --- reading a picture -----------------------------------------------------------------------------------------------------


def of_kind(svg: str, kind: str) -> Iterator[ET.Element]:
    root = ET.fromstring(svg)
    return (group for group in root.iter(f"{SVG}g") if (group.get("class") or "").split()[:1] == [kind])


def groups(svg: str, kind: str) -> list[list[str]]:
    """Return the lines of each box of a kind, without what is said beside them."""
    return [[text.text or "" for text in box.iter(f"{SVG}text")] for box in of_kind(svg, kind)]


def heads(svg: str, kind: str) -> list[str]:
    return sorted(lines[0] for lines in groups(svg, kind))


def arrows(svg: str) -> list[str]:
    """Return what each arrow says of itself."""
    found = [*of_kind(svg, "need"), *of_kind(svg, "arm")]
    return sorted(group.findtext(f"{SVG}title") or "" for group in found)


def edges(box: ET.Element) -> tuple[float, float, float, float]:
    """Return left, right, top and bottom of what a box is drawn as."""
    rect, polygon = box.find(f"{SVG}rect"), box.find(f"{SVG}polygon")
    if rect is not None:
        x, y, width, height = (float(rect.get(name) or 0) for name in ("x", "y", "width", "height"))
        return x, x + width, y, y + height
    assert polygon is not None
    points = [tuple(map(float, point.split(","))) for point in (polygon.get("points") or "").split()]
    return min(p[0] for p in points), max(p[0] for p in points), min(p[1] for p in points), max(p[1] for p in points)


def joined(svg: str) -> set[tuple[str, str]]:
    """Return which boxes arrows lead from and to, by where these begin and end."""
    boxes = {
        next(iter(box.iter(f"{SVG}text"))).text: edges(box)
        for kind in ("stage", "call", "decision")
        for box in of_kind(svg, kind)
    }

    def at(x: float, y: float) -> str:
        (name,) = (
            head for head, (left, right, top, low) in boxes.items() if left - 1 <= x <= right + 1 and top - 1 <= y <= low + 1
        )
        return name or ""

    pairs = set()
    for group in [*of_kind(svg, "need"), *of_kind(svg, "arm")]:
        path, tip = group.find(f"{SVG}path"), group.find(f"{SVG}polygon")
        assert path is not None
        assert tip is not None
        start = re.match(r"M([\d.]+) ([\d.]+)", path.get("d") or "")
        assert start
        end = (tip.get("points") or "").split()[-1].split(",")
        pairs.add((at(float(start[1]), float(start[2])), at(float(end[0]), float(end[1]))))
    return pairs


def begun(plan: Plan) -> RunState:
    """Return the state of a run that has just begun."""
    facts, state = plan.facts(), RunState()
    state.apply(RunStarted(plan.name, "", facts.stages, 16, {}, facts.tasks, facts.calls, plan.targets))
    return state


# --- what is drawn ---------------------------------------------------------------------------------------------------------


def test_every_stage_call_and_decision_is_a_box_of_its_own() -> None:
    svg = watch().picture()
    assert heads(svg, "stage") == ["stage 0: items (10)", "stage 1: records of row (stage 0)"]
    assert heads(svg, "call") == ["alert", "archive", "gt"]
    assert heads(svg, "decision") == ["when"]


def test_arrows_lead_from_what_is_needed_to_who_needs_it() -> None:
    svg = watch().picture()
    first, second = "stage 0: items (10)", "stage 1: records of row (stage 0)"
    needs = {(first, second), (first, "gt"), (first, "alert"), (first, "archive")}
    assert joined(svg) == needs | {("gt", "when"), ("alert", "when"), ("archive", "when")}


def test_an_arrow_says_what_it_carries() -> None:
    assert arrows(watch().picture()) == [
        "else: archive (call 2) → when",
        "gt (call 0) → when",
        "mean (stage 0) → alert",
        "mean (stage 0) → archive",
        "mean (stage 0) → gt",
        "mean (stage 0), records of row (stage 0) → stage 1: records of row (stage 0)",
        "then: alert (call 1) → when",
    ]


def test_steps_stand_under_those_they_follow_and_each_branch_is_indented() -> None:
    (stage,) = of_kind(words().picture(), "stage")
    rows = [(text.text, round(float(text.get("x") or 0))) for text in stage.iter(f"{SVG}text")]
    left = rows[1][1]
    assert [(name, (x - left) // 16) for name, x in rows[1:]] == [
        ("flat_map split", 0),
        ("reduce count", 1),
        ("map lower", 1),
        ("filter is_word", 1),
        ("reduce counter", 1),
        ("map length", 0),
        ("reduce max", 0),
    ]


def test_barriers_have_marks_of_their_own_and_say_what_is_stored(tmp_path: Path) -> None:
    rows = pf.items([1, 2]).map(lambda x: {"x": x}, name="row")
    svg = picture(rows.write_jsonl(tmp_path / "out").plan())
    assert svg.count('class="bar"') == 2  # two strokes
    assert "a file a chunk in …/" in svg
    assert "→ partial results in the store, in 64 buckets" in rows.reduce_by("x", pf.count()).picture()
    assert "→ partial results in the store" in rows.reduce(pf.count()).picture()
    assert "→ records in the store" in rows.picture()
    assert svg.count('class="dot"') == 1


def test_a_decision_names_its_arms() -> None:
    kind = named("kind")
    svg = pf.switch(kind, {"pdf": named("pages"), "mail": named("parts")}, named("none")).picture()
    assert [text.text for text in ET.fromstring(svg).iter(f"{SVG}text") if "word" in (text.get("class") or "")] == [
        "pdf",
        "mail",
        "else",
    ]
    assert arrows(svg)[0] == "else: none (call 3) → switch"
    assert heads(pf.quorum(2, named("a"), named("b"), named("c")).picture(), "decision") == ["quorum, 2 of 3"]


# --- much in little --------------------------------------------------------------------------------------------------------


def test_thousands_of_equal_calls_are_one_box_a_row() -> None:
    svg = rounds(3).picture()
    calls = [lines[0] for lines in groups(svg, "call")]
    assert calls == ["1,000 x leaf", "100 x join", "10 x join", "join", "end"] * 3
    assert len(joined(rounds(1).picture())) == 4


def test_the_rounds_of_a_loop_are_drawn_once() -> None:
    svg = rounds(10).picture()
    assert groups(svg, "call") == [
        [name, "in each of 10 rounds"] for name in ("1,000 x leaf", "100 x join", "10 x join", "join", "end")
    ]
    assert len(arrows(svg)) == 4
    assert len(svg) < 6_000
    assert groups(rounds(12, leaves=1).picture(), "call") == [[name, "in each of 12 rounds"] for name in ("leaf", "end")]


def test_a_long_chain_of_one_task_is_a_box() -> None:
    value: Any = 0
    for _ in range(2000):
        value = named("step", value)
    assert groups(value.picture(), "call") == [["step", "2,000 times, one after the other"]]
    assert arrows(value.picture()) == []


def test_many_equal_stages_are_one_box_and_few_are_not() -> None:
    def total(count: int) -> str:
        return str(named("total", [pf.items(range(n)).reduce(pf.sum()) for n in range(count)]).picture())

    assert heads(total(30), "stage") == ["30 stages: items"]
    assert heads(total(3), "stage") == ["stage 0: items (0)", "stage 1: items (1)", "stage 2: items (2)"]


def test_a_decision_for_each_of_many_is_drawn_once_with_its_arms() -> None:
    scores = [named("score", n) for n in range(50)]
    svg = named("all", [pf.when(score, named("alarm", score), named("file", score)) for score in scores]).picture()
    assert heads(svg, "decision") == ["50 x when"]
    assert heads(svg, "call") == ["50 x alarm", "50 x file", "50 x score", "all"]
    assert "then: 50 x alarm → 50 x when" in arrows(svg)


def test_a_decision_with_many_arms_tells_how_many() -> None:
    svg = pf.settle(*[named("agent", n) for n in range(50)]).picture()
    assert groups(svg, "decision") == [["settle", "50 arms"]]
    assert heads(svg, "call") == ["50 x agent"]


def test_a_picture_has_room_for_no_more_than_so_many_boxes() -> None:
    value = named("seed")
    for n in range(3000):
        value = named(f"step {n}", value)
    svg = value.picture()
    calls = groups(svg, "call")
    assert len(calls) == MOST_BOXES + 1
    assert calls[-1] == [f"… {3001 - MOST_BOXES:,} more calls"]


def test_a_stage_has_room_for_no_more_than_so_many_steps() -> None:
    rows = pf.items([1])
    for n in range(100):
        rows = rows.map(abs, name=f"step {n}")
    (stage,) = groups(rows.picture(), "stage")
    assert stage[-1] == "… and 62 more"
    assert len(stage) == 41


@given(st.data())
def test_every_node_is_in_one_box_and_every_need_an_arrow(data: st.DataObject) -> None:
    made: list[Any] = [pf.items([1]).reduce(pf.sum())]
    for _ in range(data.draw(st.integers(1, 25))):
        given = data.draw(st.lists(st.sampled_from(made), min_size=1, max_size=3))
        kind = data.draw(st.sampled_from(["f", "f", "g", "race", "when"]))
        if kind == "race":
            made.append(pf.race(*given))
        elif kind == "when":
            made.append(pf.when(given[0], given[-1], 0))
        else:
            made.append(named(kind, *given))
    plan = named("all", made).plan()
    boxes, drawn = boxes_of(plan, None)
    first_call = len(plan.stages)
    members = [node for box in boxes for node in box.members]
    assert sorted(members) == [*range(first_call + len(plan.calls))]
    box_of = {node: number for number, box in enumerate(boxes) for node in box.members}
    pairs = {(arrow.start, arrow.end) for arrow in drawn}
    assert all(start < end for start, end in pairs)
    needs = [(need, first_call + n) for n, call in enumerate(plan.calls) for need in (*call.facts.needs, *call.facts.arms)]
    for (node, _), user in needs:
        ends = box_of[node if node >= 0 else first_call + ~node], box_of[user]
        again = any("rounds" in note or "times" in note for number in ends for note in boxes[number].notes)
        assert ends in pairs or again
    ET.fromstring(picture(plan))


# --- how a run stands ------------------------------------------------------------------------------------------------------


def test_a_run_shows_its_chunks_and_the_branch_that_it_took(tmp_path: Path) -> None:
    svg = watch(10).run(home=tmp_path, isolation="inline").picture()
    assert [stage[-1] for stage in groups(svg, "stage")] == ["10 of 10 chunks, barrier open"] * 2
    calls = {lines[0]: lines[-1] for lines in groups(svg, "call")}
    assert calls["archive"] == "not run"
    assert calls["alert"].startswith("done")
    assert groups(svg, "decision") == [["when", "took then"]]
    arms = {group.findtext(f"{SVG}title"): group.get("class") for group in of_kind(svg, "arm")}
    assert arms == {"then: alert (call 1) → when": "arm chosen", "else: archive (call 2) → when": "arm idle"}
    assert [group.get("class") for group in of_kind(svg, "call")].count("call idle") == 1


def test_a_run_that_goes_on_says_what_is_still_to_come() -> None:
    plan = watch().plan()
    state = begun(plan)
    state.apply(ChunksListed(0, (Chunk(0, "a", (), 1), Chunk(1, "b", (), 1))))
    svg = picture(plan, state)
    assert [stage[-1] for stage in groups(svg, "stage")] == ["0 of 2 chunks so far, barrier closed", "not yet run"]
    assert {lines[-1] for lines in groups(svg, "call")} == {"not yet run"}
    assert groups(svg, "decision") == [["when", "not yet decided"]]
    state.apply(ChunksListed(0, (), last=True))
    state.apply(BarrierOpened(0))
    assert groups(picture(plan, state), "stage")[0][-1] == "0 of 2 chunks, barrier open"


def test_dead_letters_that_keep_a_barrier_closed_are_told(tmp_path: Path) -> None:
    @pf.workflow
    def failing() -> Any:
        return named("after", pf.items([1, 0]).map(lambda x: 1 / x, name="divide").reduce(pf.sum()))

    kept = failing().run(home=tmp_path / "a", isolation="inline").picture()
    (stage,) = of_kind(kept, "stage")
    assert stage.get("class") == "stage failed"
    assert groups(kept, "stage")[0][-2:] == ["2 of 2 chunks, barrier closed", "1 dead letter"]
    borne = failing().run(home=tmp_path / "b", isolation="inline", max_failures=1).picture()
    (stage,) = of_kind(borne, "stage")
    assert stage.get("class") == "stage "
    assert groups(borne, "stage")[0][-2:] == ["2 of 2 chunks, barrier open", "1 dead letter"]


def test_a_call_that_failed_says_how(tmp_path: Path) -> None:
    svg = pf.settle(pf.call(int, "no number"), pf.call(int, "1")).run(home=tmp_path, isolation="inline").picture()
    failed, made = groups(svg, "call")
    assert failed[-1] == "failed: ValueError"
    assert made[-1].startswith("done")
    assert groups(svg, "decision")[0][-1] == "1 of 2 succeeded"
    assert [group.get("class") for group in of_kind(svg, "call")] == ["call failed", "call "]


def test_equal_calls_are_counted(tmp_path: Path) -> None:
    outcomes = pf.settle(*[pf.call(int, text) for text in ["1", "2", "three", *"456789"]])
    svg = outcomes.run(home=tmp_path, isolation="inline").picture()
    assert groups(svg, "call") == [["9 x int", "8 of 9 done, 1 failed"]]


def test_a_call_that_returned_a_graph_says_so(tmp_path: Path) -> None:
    value = pf.call(lambda: named("within"))
    run = value.run(home=tmp_path, isolation="inline")
    assert groups(run.picture(), "call") == [["lambda", "returned a graph"]]
    assert "1 grown call (not drawn)" in html_of(value.plan(), run.state)


# --- safe and for everybody ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "<script>alert('x')</script>" * 5,
        "</text></svg><img src=x onerror=alert(1)>",
        '" onload="alert(1)',
        "]]>&lt;\x00\x1b[31m\ud800\n" * 9,
        "名前が長い日本語のステップ" * 9,
    ],
)
def test_the_text_of_strangers_is_escaped_and_long_names_are_shortened(name: str) -> None:
    rows = pf.items([1]).map(lambda x: x, name=name).reduce(pf.count())
    value = pf.switch(named(name, rows), {name: named(name), "b": rows})
    plan = value.plan()
    for text in (picture(plan), html_of(Plan(name, plan.stages, plan.targets, plan.tasks, plan.calls))):
        root = ET.fromstring(text)
        tags = {element.tag.removeprefix(SVG) for element in root.iter()}
        assert tags <= {
            *("svg", "style", "g", "title", "text", "tspan", "path", "polygon", "rect", "circle"),
            *("div", "details", "summary", "pre"),
        }
        assert not any(attribute.startswith("on") for element in root.iter() for attribute in element.attrib)
        assert all(len("".join(line.itertext())) <= LONGEST for line in root.iter(f"{SVG}text"))
    titles = "".join(title.text or "" for title in ET.fromstring(picture(plan)).iter(f"{SVG}title"))
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in name)
    assert shown in titles  # the whole of it shows when the pointer rests on it


def test_a_picture_needs_nothing_else_and_tells_those_who_cannot_see_it() -> None:
    svg = watch().picture()
    assert not re.search(r"href|src=|url\(|@import|<script|<foreignObject", svg)
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", svg)
    assert ' id="' not in svg  # so that several can be on one page
    root = ET.fromstring(svg)
    assert root.get("role") == "img"
    assert root.get("aria-label") == "plan of watch: 2 stages and 4 calls"


@pytest.mark.parametrize("name", ["a_name_of_a_step", "名前が長い"])
def test_lines_fit_into_their_boxes(name: str) -> None:
    svg = pf.items([1]).map(abs, name=name).reduce(pf.count(), name=name * 3).picture()
    (box,) = of_kind(svg, "stage")
    left, right, top, bottom = edges(box)
    lines = [("".join(text.itertext()), text) for text in box.iter(f"{SVG}text")]
    assert any(name in line for line, _ in lines)
    for line, text in lines:
        x, y = float(text.get("x") or 0), float(text.get("y") or 0)
        assert left < x
        assert x + sum(14.4 if ord(letter) > 0x3000 else 7.2 for letter in line) < right
        assert top < y < bottom


def test_the_html_has_the_picture_and_the_plan_in_words(tmp_path: Path) -> None:
    flow = watch()
    page = html_of(flow.plan(), flow.run(home=tmp_path, isolation="inline").state)
    root = ET.fromstring(page)
    assert root.find(f".//{SVG}svg") is not None
    words = "plan of watch: 2 stages and 4 calls; 20 of 20 chunks done, 3 of 4 calls done"
    assert root.findtext(".//summary") == words
    assert "barrier: reduce mean: partial results in the store" in (root.findtext(".//pre") or "")


def test_notebooks_show_it_for_all_that_is_lazy_and_for_runs(tmp_path: Path) -> None:
    value = pf.items([1, 2]).reduce(pf.sum())
    run = value.run(home=tmp_path, isolation="inline")
    for shown in (value, pf.items([1]), watch(3), run):
        assert "<svg" in shown._repr_html_()
    assert Path(run.report(tmp_path / "report.html")).read_text().count("<svg") == 1


# --- in words --------------------------------------------------------------------------------------------------------------


def test_the_words_of_a_plan_name_sources_and_what_is_waited_for() -> None:
    told = watch(3).plan().explain()
    assert "stage 0: items (3)" in told
    assert "stage 1: records of row (stage 0), after mean (stage 0)" in told
    assert "call 0: gt(mean (stage 0))" in told
    assert "when(gt (call 0)) runs one of: alert (call 1), archive (call 2)" in told


def test_the_words_of_a_plan_are_a_tree() -> None:
    assert words().plan().explain().splitlines()[1:] == [
        "stage 0: items (1)",
        "    flat_map split",
        "      barrier: reduce count: partial results in the store, merged in input order",
        "      map lower",
        "      filter is_word",
        "      barrier: reduce counter: partial results in the store, merged in input order",
        "    map length",
        "    barrier: reduce max: partial results in the store, merged in input order",
    ]


def test_the_words_of_a_plan_show_the_ends_of_paths(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text("1\n")
    paths = [tmp_path / f"{name}.jsonl" for name in "abc"]
    told = pf.read_jsonl(paths).write_jsonl(tmp_path / "out").plan().explain()
    folder = tmp_path.name
    assert f"stage 0: read_jsonl …/{folder}/a.jsonl, …/{folder}/b.jsonl and 1 more" in told
    assert f"barrier: write_jsonl out: a file a chunk in …/{folder}/out, published when the stage is complete" in told


def test_the_words_of_a_plan_tell_deadlines_and_what_a_list_is_made_of() -> None:
    told = pf.items([1]).reduce(pf.sum(), deadline="30s", at_least=0.9).plan().explain()
    assert "opens after 30 s with 90% of the input" in told
    told = pf.expand(str.upper, named("names")).plan().explain()
    assert told.splitlines()[1] == "stage 0: each item of names (call 0)"
    assert told.splitlines()[-2] == "  barrier: collect: records in the store"


def test_of_many_calls_the_words_say_how_many_of_each() -> None:
    told = rounds(2, leaves=10).plan().explain().splitlines()
    assert told[1:] == ["20 x leaf", "2 x join", "2 x end"]


def test_the_words_of_a_run_tell_the_chunks(tmp_path: Path) -> None:
    flow = watch(3)
    told = explain(flow.plan(), flow.run(home=tmp_path, isolation="inline").state)
    assert "stage 0: items (3), 3 chunks" in told
