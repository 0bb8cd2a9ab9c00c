"""The picture of a plan shows every stage, call and decision, what waits for what, and how a run stands."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import parflow as pf

SVG = "{http://www.w3.org/2000/svg}"


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
    rows.map(lambda row, mean: row["x"] - mean, mean, name="centre").reduce(pf.max())
    return pf.when(mean > 4, alert(mean), archive(mean))


def groups(svg: str, kind: str) -> list[list[str]]:
    """Return the lines of each box of a kind."""
    root = ET.fromstring(svg)
    boxes = [box for box in root.iter(f"{SVG}g") if (box.get("class") or "").split()[:1] == [kind]]
    return [[text.text or "" for text in box.iter(f"{SVG}text")] for box in boxes]


def boxes_overlap(svg: str) -> bool:
    rects = [
        tuple(float(rect.get(name) or 0) for name in ("x", "y", "width", "height"))
        for rect in ET.fromstring(svg).iter(f"{SVG}rect")
    ]
    return any(
        a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]
        for number, a in enumerate(rects)
        for b in rects[number + 1 :]
    )


def test_every_stage_call_and_decision_is_a_box_of_its_own() -> None:
    svg = watch().picture()
    (stage,) = groups(svg, "stage")
    assert stage[0] == "stage 0: items"
    assert "map row" in stage
    assert any("reduce mean" in line for line in stage)
    assert sorted(lines[0] for lines in groups(svg, "call")) == ["alert", "archive", "gt"]
    assert [lines[0] for lines in groups(svg, "decision")] == ["when"]
    assert not boxes_overlap(svg)


def test_an_arrow_leads_from_what_is_needed_to_who_needs_it() -> None:
    paths = [*ET.fromstring(watch().picture()).iter(f"{SVG}path")]
    assert len(paths) == 6  # the mean into three calls; into the decision, its condition and its two arms
    assert sum("arm" in (path.get("class") or "") for path in paths) == 2


def test_a_run_shows_its_chunks_and_the_branch_that_it_took(tmp_path: Path) -> None:
    svg = watch(10).run(home=tmp_path, isolation="inline").picture()
    (stage,) = groups(svg, "stage")
    assert stage[-1] == "10 of 10 chunks, barrier open"
    idle = re.findall(r'<g class="call idle"><title>([^<]*)', svg)
    assert [title.splitlines() for title in idle] == [["archive", "not run"]]
    assert svg.count("arm chosen") == 1


def test_a_call_that_failed_is_said_to_have(tmp_path: Path) -> None:
    svg = pf.call(int, "no number").run(home=tmp_path, isolation="inline").picture()
    (call,) = groups(svg, "call")
    assert call[-1].endswith("1 failed")
    assert 'class="call failed"' in svg


def test_thousands_of_equal_calls_are_one_box_a_layer() -> None:
    @pf.task
    def leaf(x: int, i: int) -> int:
        return x + i

    @pf.task
    def join(parts: list[int]) -> int:
        return sum(parts)

    @pf.workflow
    def tree() -> Any:
        total: Any = 0
        for _ in range(3):
            total = join([leaf(total, i) for i in range(1000)])
        return total

    svg = tree().picture()
    assert [lines[0] for lines in groups(svg, "call")].count("1,000 x leaf") == 3
    assert len(svg) < 10_000


def test_the_text_of_strangers_is_escaped_and_long_names_are_shortened() -> None:
    name = "<script>alert('x')</script>" * 5
    svg = pf.items([1]).map(lambda x: x, name=name).reduce(pf.count()).picture()
    assert "<script" not in svg
    (stage,) = groups(svg, "stage")
    assert all(len(line) <= 44 for line in stage)
    assert name in "".join(title.text or "" for title in ET.fromstring(svg).iter(f"{SVG}title"))


def test_notebooks_show_it_for_all_that_is_lazy_and_for_runs(tmp_path: Path) -> None:
    value = pf.items([1, 2]).reduce(pf.sum())
    run = value.run(home=tmp_path, isolation="inline")
    for shown in (value, pf.items([1]), watch(3), run):
        assert "<svg" in shown._repr_html_()
    assert Path(run.report(tmp_path / "report.html")).read_text().count("<svg") == 1


def test_the_words_of_a_plan_name_sources_and_what_is_waited_for() -> None:
    words = watch(3).plan().explain()
    assert "stage 0: items" in words
    assert "call 0: gt(mean (stage 0))" in words
    assert "when(gt (call 0)) runs one of: alert (call 1), archive (call 2)" in words
