"""The command line: arguments, exit codes and text; no logic.

Exit codes: 0 the run succeeded; 1 it failed, or something went wrong; 2 the command makes no sense; 130 it was interrupted
(Ctrl-C), 143 terminated (SIGTERM).
"""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn

import click

from parflow.errors import ParflowError, UsageError

if TYPE_CHECKING:
    from parflow.api.runs import Run
    from parflow.api.tasks import Workflow

SUCCESS, FAILURE, USAGE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143


class _Terminated(KeyboardInterrupt):
    """SIGTERM: what a cluster sends before it takes a machine away. It does what Ctrl-C does."""


def _terminate(*_: Any) -> NoReturn:
    raise _Terminated


def _leave(code: int) -> NoReturn:
    """Exit; a signal that comes meanwhile, as children are ended, makes it shorter."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os._exit(128 + number))
    sys.exit(code)


def _code_of(pressed: KeyboardInterrupt) -> int:
    return TERMINATED if isinstance(pressed, _Terminated) else INTERRUPTED


class _Group(click.Group):
    """Lists commands in the order in which a user meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(self.commands)


def _say_json(value: Any) -> None:
    import orjson

    try:
        text = orjson.dumps(value, default=_plain, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_PASSTHROUGH_DATACLASS).decode()
    except TypeError:  # what JSON allows and orjson doesn't: large integers, broken Unicode; and keys that are no text
        text = json.dumps(_text_keys(value), default=_plain)
    _say(text + "\n")


def _say(text: str) -> None:
    """Print text for programs as it is; a terminal that gets it all the same obeys none of it."""
    if sys.stdout.isatty():
        from parflow.views.words import printable

        text = "\n".join(map(printable, text.split("\n")))
    click.echo(text.encode("utf-8", "backslashreplace"), nl=False)


def _plain(value: Any) -> Any:
    from parflow.api.runs import Records
    from parflow.model import Failure

    if isinstance(value, Failure):
        return asdict(value)
    if isinstance(value, (Records, set, frozenset, tuple)):
        return list(value)
    return repr(value)


def _text_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key if isinstance(key, str) else repr(key): _text_keys(item) for key, item in value.items()}
    return [_text_keys(item) for item in value] if isinstance(value, (list, tuple)) else value


@contextmanager
def _errors(debug: bool) -> Iterator[None]:
    """Say what went wrong in a sentence; parflow's own traceback is shown with ``--debug`` only."""
    try:
        yield
    except KeyboardInterrupt as pressed:
        click.echo("parflow: interrupted", err=True)
        _leave(_code_of(pressed))
    except ParflowError as error:
        if debug:
            raise
        _complain(error)
        sys.exit(USAGE if isinstance(error, UsageError) else FAILURE)
    except Exception as error:
        own = _own_lines(error)
        if debug or not own:
            raise
        click.echo(own, err=True)
        sys.exit(FAILURE)


def _complain(error: object) -> None:
    from parflow.views.words import printable

    click.echo("parflow: " + "\n".join(map(printable, str(error).splitlines())), err=True)


def _own_lines(error: Exception) -> str:
    """Return the traceback of an error in the flow's own file, from the file's first line on; "" when it's parflow's fault."""
    import traceback

    ours = (os.path.dirname(os.path.abspath(__file__)), os.path.dirname(click.__file__), "<frozen ")
    tb = error.__traceback__
    while tb is not None and tb.tb_frame.f_code.co_filename.startswith(ours):
        tb = tb.tb_next
    if tb is None and not isinstance(error, SyntaxError):
        return ""
    return "".join(traceback.format_exception(type(error), error, tb)).rstrip()


def _common(function: Callable[..., Any]) -> Callable[..., Any]:
    function = click.option("--home", help="Where journal and results are. [default: $PARFLOW_HOME or .parflow]")(function)
    function = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(function)
    return click.option("--debug", is_flag=True, hidden=True, help="Show parflow's own traceback.")(function)


def _running(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--workers", type=int, help="Slots of the local cluster. [default: the cores]"),
        click.option("--scheduler", "--cluster", "cluster", default="local", help="Address of a Dask scheduler."),
        click.option("--timeout", help="What one call may take, such as 30s, for tasks that say nothing."),
        click.option("--memory", help="What a child may use, such as 512MiB, for tasks that say nothing."),
        click.option("--progress/--no-progress", default=None, help="Show progress. [default: in a terminal]"),
    ):
        function = option(function)
    return _common(function)


def _choosing(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--source", metavar="GLOB", help="Those of these inputs: a path, or a pattern such as '2024/**/*.pdf'."),
        click.option("--error", help="Those of this exception, or derived from it: ValueError, requests.exceptions.Timeout."),
        click.option("--step", help="Those of this step or task."),
    ):
        function = option(function)
    return function


def _number(text: str) -> float:
    return int(text) if text.isdecimal() else float(text)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="parflow")
def main() -> None:
    """Durable parallel data processing on Dask.

    \b
    parflow run recipes/wordcount.py --source 'texts/**/*.txt' --workers 2
    parflow runs
    parflow resume last
    """


@main.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.argument("flow")
@_running
@click.option(
    "--max-failures",
    type=_number,
    default="0",
    metavar="NUMBER",
    help="Dead letters to go on over: a count, or a share below 1.",
)
@click.option("--retry", type=int, metavar="ATTEMPTS", help="How often a record is tried, for tasks that say nothing.")
@click.option("--compensate", is_flag=True, help="If the run fails, undo all that its compensable steps did.")
@click.option("--grace", default="30s", help="What is in flight has so long to end when the run ends early.")
@click.option("--isolation", type=click.Choice(["process", "inline"]), default="process", help="Children, or none.")
@click.option("--slice", "slice_", default="30s", help="How long a chunk may take before it's committed as far as it is.")
@click.option("--store", help="Where results are kept: a folder or URL that every worker sees.")
@click.pass_context
def run(
    ctx: click.Context, /, flow: str, as_json: bool, debug: bool, progress: bool | None, slice_: str, **options: Any
) -> None:
    """Run a workflow: FLOW is file.py, file.py:name or module:name.

    Options that are not listed below are the workflow's own parameters.

    \b
    parflow run recipes/wordcount.py --source 'texts/**/*.txt' --workers 2
    parflow run flows.py:sentiment --source data.jsonl --max-failures 0.01
    """
    signal.signal(signal.SIGTERM, _terminate)
    with _errors(debug):
        from parflow.api.flows import load_flow, note_of

        workflow = load_flow(flow)
        arguments = _parameters(workflow, ctx.args)
        note = note_of(flow, arguments)
        bound = workflow(**arguments)
        started = bound.run(wait=False, slice=slice_, note=note, **options)
        _follow(started, as_json=as_json, progress=progress)


@main.command()
@click.argument("name", default="last")
@_running
@click.option("--max-failures", type=_number, metavar="NUMBER", help="A new tolerance for dead letters.")
@click.option(
    "--force",
    is_flag=True,
    help="Go on although code or inputs changed: with the recorded code, changed inputs become dead letters.",
)
def resume(name: str, as_json: bool, debug: bool, progress: bool | None, **options: Any) -> None:
    """Go on with a run: NAME as `parflow runs` shows it, a beginning of it, or "last".

    \b
    parflow resume last
    parflow resume wordcount-261125 --max-failures 3
    """
    signal.signal(signal.SIGTERM, _terminate)
    with _errors(debug):
        from parflow.api.flows import plan_again
        from parflow.api.runs import find_run, status_of
        from parflow.api.starting import resume as go_on

        row = find_run(name, options["home"])
        plan = None if options["force"] or status_of(row) == "succeeded" else plan_again(row.run_id, row.note)
        _follow(go_on(name, plan=plan, wait=False, **options), as_json=as_json, progress=progress)


@main.command()
@click.argument("name", default="last")
@_choosing
@_running
def redrive(name: str, as_json: bool, debug: bool, progress: bool | None, **options: Any) -> None:
    """Run dead letters of run NAME again, and what came too late for a deadline; what rests on them is made again.

    \b
    parflow redrive
    parflow redrive report-261125 --error TimeoutError
    parflow redrive --step fetch --source 'texts/2024-*.txt'
    """
    signal.signal(signal.SIGTERM, _terminate)
    with _errors(debug):
        from parflow.api.mending import redrive as go_on

        _follow(go_on(name, wait=False, **options), as_json=as_json, progress=progress)


@main.command()
@click.argument("name", default="last")
@click.option("--by", help="Who accepts. [default: the user and this machine]")
@click.option("--workers", type=int, help="Slots of the local cluster. [default: the cores]")
@click.option("--scheduler", "--cluster", "cluster", default="local", help="Address of a Dask scheduler.")
@click.option("--progress/--no-progress", default=None, help="Show progress. [default: in a terminal]")
@_common
def accept(name: str, as_json: bool, debug: bool, progress: bool | None, **options: Any) -> None:
    """Take run NAME to be right although so much failed: its barriers open over the dead letters that it has now.

    \b
    parflow accept
    parflow accept report-261125 --by 'Ada, who looked at all five'
    """
    signal.signal(signal.SIGTERM, _terminate)
    with _errors(debug):
        from parflow.api.mending import accept as go_on

        _follow(go_on(name, wait=False, **options), as_json=as_json, progress=progress)


@main.command()
@click.argument("name", default="last")
@click.option("--now", is_flag=True, help="Abandon the records in hand, rather than wait for each child's next one.")
@click.option("--compensate", is_flag=True, help="Undo all that its compensable steps did, the newest first.")
@click.option("--wait/--no-wait", default=True, help="Wait for the run's end. [default: wait]")
@_common
def cancel(name: str, now: bool, compensate: bool, wait: bool, home: str | None, as_json: bool, debug: bool) -> None:
    """Cancel run NAME, whichever process on this machine runs it; `parflow resume` goes on with it all the same.

    \b
    parflow cancel
    parflow cancel wordcount-261125 --now
    """
    with _errors(debug):
        from parflow.api.runs import open_run
        from parflow.views.words import done_line, undone_line

        opened = open_run(name, home)
        if compensate and opened.status in ("failed", "stopped", "lost"):
            from parflow.api.mending import compensate as undo

            cancelled = undo(name, home=home, wait=True, progress=False)
        else:
            cancelled = opened.cancel(now=now, compensate=compensate, wait=wait)
        status = cancelled.status
        if as_json:
            stages = cancelled.state.stages
            chunks = [chunk for stage in stages for chunk in stage.chunks]
            done = sum(not chunk.pending for chunk in chunks)
            _say_json({"run_id": cancelled.run_id, "status": status, "chunks": len(chunks), "done": done})
        elif compensate:
            click.echo(f"run {cancelled.run_id}: {status}; {undone_line(cancelled)}")
        elif status == "cancelled":
            click.echo(f"run {cancelled.run_id}: cancelled; {done_line(cancelled)}")
        else:
            click.echo(f"run {cancelled.run_id} is asked to end; it is {status}: parflow show {cancelled.run_id}")


def _follow(started: Run, *, as_json: bool, progress: bool | None) -> None:
    """Show progress, wait, and print what became of the run."""
    from parflow.views.progress import show_progress, stopping
    from parflow.views.words import summary

    code, told, result, error = SUCCESS, 0, None, ""

    def say(presses: int) -> None:
        nonlocal told
        if presses > told:
            told = presses
            click.echo(stopping(presses), err=True)

    try:
        shown = progress if progress is not None else (sys.stderr.isatty() and not as_json)
        show_progress(started) if shown else started.wait(say)
    except KeyboardInterrupt as pressed:
        code = _code_of(pressed)
    try:
        result = started.result()
        code = SUCCESS  # even if Ctrl-C was pressed: it was too late
    except ParflowError as failed:
        code, error = code or FAILURE, str(failed)
    if as_json:
        out = {"run_id": started.run_id, "status": started.status, "result": result}
        _say_json(out | ({"error": error} if error else {}))
    else:
        click.echo(summary(started), err=True)
        if error:
            _complain(error)
        elif result is not None:
            click.echo(_shorten(result))
        click.echo(f"report: {started.report()}", err=True)
        click.echo(f"look further: parflow show {started.run_id}; parflow failures {started.run_id}", err=True)
    _leave(code)


def _shorten(result: Any, most: int = 20) -> str:
    """Write a result for a terminal: the beginning of what is long."""
    from itertools import islice

    from parflow.api.runs import Records
    from parflow.views.words import printable

    if isinstance(result, dict):
        lines = [f"{printable(str(key))}: {printable(_short(value))}" for key, value in islice(result.items(), most)]
        more = len(result) - most
    elif isinstance(result, (list, tuple, Records)):
        lines = [printable(_short(item)) for item in islice(result, most)]
        more = len(result) - most
    else:
        return printable(_short(result))
    return "\n".join(lines + ([f"… and {more:,} more"] if more > 0 else []))


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 500 else f"{text[:500]}…"


def _parameters(workflow: Workflow, words: Sequence[str]) -> dict[str, Any]:
    """Read the workflow's own parameters from the words that no option took."""
    signature = inspect.signature(workflow.function)
    hints = typing.get_type_hints(workflow.function)
    given: dict[str, Any] = {}
    rest = list(words)
    known = ", ".join("--" + name.replace("_", "-") for name in signature.parameters) or "none"
    while rest:
        word = rest.pop(0)
        name, has_value, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") or name not in signature.parameters:
            raise UsageError(f"{workflow.name} has no parameter {word!r}; it has {known}")
        if not has_value:
            if not rest:
                raise UsageError(f"{word} wants a value")
            value = rest.pop(0)
        given[name] = _convert(name, value, hints.get(name, str))
    missing = [
        "--" + name.replace("_", "-")
        for name, parameter in signature.parameters.items()
        if parameter.default is parameter.empty and name not in given
    ]
    if missing:
        raise UsageError(f"{workflow.name} wants {', '.join(missing)}")
    return given


def _convert(name: str, value: str, kind: Any) -> Any:
    kinds = [option for option in typing.get_args(kind) if option is not type(None)] or [kind]
    try:
        if kinds[0] is bool:
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[value.lower()]
        return kinds[0](value) if kinds[0] in (int, float) else value
    except (ValueError, KeyError):
        raise UsageError(f"--{name.replace('_', '-')} wants {kinds[0].__name__}, not {value!r}") from None


@main.command()
@_common
def runs(home: str | None, as_json: bool, debug: bool) -> None:
    """List all runs, newest first.

    \b
    parflow runs
    parflow runs --json
    """
    with _errors(debug):
        import time

        from parflow.api.runs import list_runs, status_of

        rows: list[dict[str, Any]] = [
            {"run_id": row.run_id, "status": status_of(row), "flow": row.flow, "created": row.created}
            for row in list_runs(home)
        ]
        if as_json:
            _say_json(rows)
            return
        if not rows:
            click.echo("no runs yet; `parflow run FLOW` makes one")
        width = max((len(row["run_id"]) for row in rows), default=0)
        for row in rows:
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["created"]))
            click.echo(f"{row['run_id']:{width}}  {row['status']:9}  {when}  {row['flow']}")


@main.command()
@click.argument("name", default="last")
@_common
def show(name: str, home: str | None, as_json: bool, debug: bool) -> None:
    """Show how a run stands: NAME as `parflow runs` shows it, a beginning of it, or "last".

    \b
    parflow show
    parflow show wordcount-261125 --json
    """
    with _errors(debug):
        from parflow.api.runs import open_run
        from parflow.views.numbers import call_numbers, stage_numbers
        from parflow.views.words import summary

        opened = open_run(name, home)
        if as_json:
            stages = [asdict(stage_numbers(stage)) for stage in opened.state.stages]
            calls = [asdict(numbers) for numbers in call_numbers(opened.state)]
            missing = [asdict(left_out) for left_out in opened.missing()]
            stands = {"run_id": opened.run_id, "status": opened.status, "stages": stages, "calls": calls, "missing": missing}
            _say_json(stands)
        else:
            click.echo(summary(opened))
            click.echo(f"  report: {opened.report()}")


@main.command()
@click.argument("name", default="last")
@_choosing
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="How many to list. [default: 100; JSON and CSV: all]")
@click.option("--traceback", is_flag=True, help="Show what each one printed, and its traceback.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV, a row each. Spreadsheets should import it as text.")
@_common
def failures(
    name: str,
    limit: int | None,
    traceback: bool,
    as_csv: bool,
    home: str | None,
    as_json: bool,
    debug: bool,
    **which: str | None,
) -> None:
    """List what failed in a run: what the failures have in common first, then each one.

    \b
    parflow failures
    parflow failures --step parse --error UnicodeError --traceback
    parflow failures wordcount-261125 --source '**/2024/*.txt' --csv > failures.csv
    """
    with _errors(debug):
        from parflow.api.runs import letters_of, open_run
        from parflow.views import failures as view

        if as_csv and as_json:
            raise UsageError("--csv or --json: one of them")
        opened = open_run(name, home)
        letters = letters_of(opened, **which)
        if as_json:
            _say_json([letter.row() for letter in letters[:limit]])
        elif as_csv:
            _say(view.as_csv(letters[:limit]))
        elif letters:
            for line in view.told(opened.run_id, letters, limit=limit or 100, details=traceback):
                click.echo(line)
        else:
            click.echo(f"run {opened.run_id} has no dead letters{' like that' if any(which.values()) else ''}")


@main.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.argument("flow")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.option("--picture", metavar="FILE.svg", help="Draw it into a file as well.")
@click.option("--debug", is_flag=True, hidden=True)
@click.pass_context
def plan(ctx: click.Context, flow: str, as_json: bool, picture: str | None, debug: bool) -> None:
    """Show the stages, barriers and calls that a workflow has, without running it.

    \b
    parflow plan recipes/wordcount.py --source 'texts/**/*.txt'
    parflow plan recipes/wordcount.py --source 'texts/**/*.txt' --picture plan.svg
    """
    with _errors(debug):
        from parflow.api.flows import load_flow

        workflow = load_flow(flow)
        bound = workflow(**_parameters(workflow, ctx.args))
        made = bound.plan()
        if picture is not None:
            with open(picture, "w", encoding="utf-8") as file:
                file.write(bound.picture())
        if as_json:
            _say_json({"name": made.name, **asdict(made.facts())})
        else:
            click.echo(made.explain())


if __name__ == "__main__":
    main()
