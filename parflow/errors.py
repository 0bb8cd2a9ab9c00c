"""Every error parflow raises, drawn as a tree.

::

    ParflowError
    |-- UsageError                 an argument makes no sense (also a ValueError)
    |-- GraphError                 a workflow is built wrongly (also a TypeError)
    |   `-- LazyValueError         a lazy value was used as if it were computed
    |-- InputError                 inputs are wrong, said before the run starts
    |   |-- NoInputError           a pattern matches nothing
    |   |-- NotAFileError          a path names a directory, a pipe or a device
    |   `-- UnreadableInputError   a named file can't be opened
    |-- OutputError                a sink can't be written where it was asked to
    |-- CodeError                  a step's code can't travel or can't be loaded
    |-- StoreError                 a result can't be read, written or trusted
    |   `-- StoreNotVisibleError   a worker doesn't see the driver's store
    |-- JournalError               the history can't be read, written or trusted
    |   |-- RunNotFoundError       no run has that name
    |   |-- RunOwnedError          another coordinator owns the run
    |   `-- FencedError            this coordinator lost the run to another one
    |-- ClusterError               the cluster can't be used
    |   |-- VersionMismatchError   a worker runs other versions than the driver
    |   |-- ResourcesMissingError  no worker has what a task asks for
    |   `-- ClusterLostError       the scheduler or all workers went away
    |-- ResumeError                a run can't be gone on with as asked
    |   |-- CodeChangedError       steps are not what they were
    |   `-- InputsChangedError     inputs are not what they were
    |-- RunError                   a run ended without a result
    |   |-- TooManyFailuresError   more dead letters than max_failures
    |   |-- StepError              a step is broken as a whole
    |   |-- CallFailedError        a call failed that the result needs
    |   |-- CompensationFailedError  it was to be undone, and something still stands
    |   |-- RunStoppedError        somebody stopped it; it can be resumed
    |   `-- RunCancelledError      somebody cancelled it; it can be resumed all the same
    |-- InjectedError              a fault script wanted an error
    `-- RecordError                why one record became a dead letter
        |-- RecordTooLargeError    longer than max_record
        |-- InputChangedError      the file changed after it was listed
        |-- NotJSONError           a line is not JSON
        |-- NotCSVError            a row is not CSV, or doesn't fit the columns
        |-- NotTextError           bytes are not text in the declared encodings
        |-- RecordCrashedError     the child died with the record in hand
        |-- RecordTimeoutError     the record took longer than its task's timeout
        |-- RecordMemoryError      the record needed more than the child's memory
        |-- EffectInDoubtError     nobody knows whether something outside was done
        |-- UndoneError            something outside was done and undone: its record had failed
        `-- UndoFailedError        something outside was done, and can't be undone

`Cancelled` stands apart: like ``KeyboardInterrupt`` it's no error, and no ``except Exception`` stops it. `InDoubt` is raised
by users' code.

The class docstring's first line says what happened; ``template`` says it with the particulars. Arguments are positional
and are kept in ``args``, so every error survives pickling.
"""

from __future__ import annotations

from typing import ClassVar


class ParflowError(Exception):
    """Something in parflow went wrong."""

    template: ClassVar[str] = "{0}"

    def __str__(self) -> str:
        try:
            return self.template.format(*self.args)
        except (IndexError, KeyError, ValueError):  # other arguments than the template's
            return " ".join(str(arg) for arg in self.args) or type(self).__name__


class UsageError(ParflowError, ValueError):
    """An argument makes no sense."""


class GraphError(ParflowError, TypeError):
    """A workflow is built wrongly."""


class LazyValueError(GraphError):
    """A lazy value was used as if it were computed.

    Its arguments are the value's repr and what was asked of it; ``advice`` says what to write instead of that.
    """

    template = "{0} is lazy: it has no {1} before it is computed."

    advice: ClassVar[dict[str, str]] = {
        "truth": "In place of `if`, write `pf.when(value, then, otherwise)`; in place of `while`, let a task decide, which "
        "returns the graph to go on with; in place of `and`, `or`, `sorted` and `max`, give the values to a task, `f(a, b)`.",
        "items": "For each item write `pf.expand(value).map(f)`, for each record `docs.map(f)`; to take the results of one "
        "task apart, say how many there are: `@pf.task(outputs=2)`.",
        "length": "Count in a step, `docs.reduce(pf.count())`, or give the value to a task, `f(value)`.",
        "membership": "In place of `in`, write `docs.filter(f)`, or give the value to a task, `f(value)`.",
        "number": "A task gets the number itself: `f(value)`, or, beside each record, `docs.map(f, value)`.",
        "format": "A task gets the value itself: write the text there, `f(value)`.",
    }

    def __str__(self) -> str:
        advice = self.advice.get(str(self.args[-1]) if self.args else "", "Give the value to a task: `f(value)`.")
        return f"{super().__str__()} {advice} To see it now: `.compute()`, or `.run().result()`."


class InputError(ParflowError):
    """Inputs are wrong."""


class NoInputError(InputError):
    """A pattern matches nothing."""

    template = "no file matches {0!r} (looked in {1}). Check the path; '**' matches folders at any depth."


class NotAFileError(InputError):
    """A path names something that is not a regular file."""

    template = "{0!r} is {1}, not a file. To read the files in a folder, write a pattern such as {2!r}."


class UnreadableInputError(InputError):
    """A named file can't be opened."""

    template = "can't read {0!r}: {1}. Check that it exists and that you may read it."


class OutputError(ParflowError):
    """A sink can't be written where it was asked to."""


class CodeError(ParflowError):
    """A step's code can't travel to a worker or can't be loaded there."""

    template = "step {0!r}: {1}"


class StoreError(ParflowError):
    """A result can't be read, written or trusted."""


class StoreNotVisibleError(StoreError):
    """A worker doesn't see the driver's store."""

    template = (
        "worker {0} can't see the store {1!r}: {2}. Give a place that every worker shares (store='/shared/dir' or --store), "
        "or run on this machine."
    )


class JournalError(ParflowError):
    """The history can't be read, written or trusted."""


class RunNotFoundError(JournalError):
    """No run has that name."""

    template = "no run {0!r} in {1}. `parflow runs` lists them; --home or PARFLOW_HOME names another place."


class RunOwnedError(JournalError):
    """Another coordinator owns the run."""

    template = "run {0} is owned by {1}, which is alive. Wait for it, or stop it first (Ctrl-C there)."


class FencedError(JournalError):
    """The run was lost to another coordinator."""

    template = "run {0}: another coordinator took over (epoch {2}; ours was {1}). Nothing more was written from here."


class ClusterError(ParflowError):
    """The cluster can't be used."""


class VersionMismatchError(ClusterError):
    """A worker runs other versions than the driver."""

    template = "worker {0} runs {1} {2}, the driver {3}. Install the same versions on both."


class ClusterLostError(ClusterError):
    """The scheduler or all workers went away."""

    template = "the cluster is gone: {0}. Everything finished is kept; `parflow resume {1}` goes on."


class ResourcesMissingError(ClusterError):
    """No worker has the resources that a task asks for."""

    template = (
        "no worker has {0}, which tasks of this run ask for. Start workers that do (dask worker … --resources '{0}', or "
        "LocalCluster(resources=…)) and go on with: parflow resume {1} --cluster ADDRESS"
    )


class ResumeError(ParflowError):
    """A run can't be gone on with as asked."""


class CodeChangedError(ResumeError):
    """Steps are not what they were when the run started."""

    template = (
        "run {0} was started with other code: {1}. Start a new run to use the new code, or finish this one with the code it "
        "was started with: `parflow resume {0} --force`."
    )


class InputsChangedError(ResumeError):
    """Inputs are not what they were when the run listed them."""

    template = (
        "run {0}: {1} unfinished inputs changed since they were listed, first {2!r}. Start a new run, or go on with those as "
        "dead letters: `parflow resume {0} --force`."
    )


class RunError(ParflowError):
    """A run ended without a result."""


class TooManyFailuresError(RunError):
    """More records failed than max_failures allows."""

    template = (
        "run {0}: {1} of {2} records failed, max_failures is {3}; first: {4}. Everything finished is kept. "
        "`parflow failures {0}` shows them; `parflow resume {0} --max-failures {1}` goes on without them."
    )


class StepError(RunError):
    """A step is broken as a whole."""

    template = "run {0}: step {1!r}: {2}"


class CallFailedError(RunError):
    """A call failed that the result needs."""

    template = (
        "run {0}: call {1!r} failed: {2}. Everything finished is kept. `parflow failures {0}` shows more; `parflow resume {0}` "
        "makes the call again."
    )


class RunStoppedError(RunError):
    """Somebody stopped the run."""

    template = "run {0} was stopped. Everything finished is kept; `parflow resume {0}` goes on."


class RunCancelledError(RunError):
    """Somebody cancelled the run."""

    template = "run {0} was cancelled. Everything finished is kept; `parflow resume {0}` goes on if its result is wanted."


class CompensationFailedError(RunError):
    """What a run did was to be undone, and some of it could not be."""

    template = (
        "run {0}: {1} of what it did still stands, though it was to be undone; first: {2}. `parflow failures {0}` lists it; "
        "`parflow resume {0}` tries again."
    )


class InjectedError(ParflowError):
    """A fault script wanted an error."""

    template = "the fault script of step {0!r} lets attempt {1} fail"


class RecordError(ParflowError):
    """One record can't be processed."""


class RecordTooLargeError(RecordError):
    """A record is longer than max_record."""

    template = "a record of more than {0:,} bytes (max_record); nothing of it was processed"


class InputChangedError(RecordError):
    """A file changed after it was listed."""

    template = "{0!r} changed after it was listed ({1}); it was not read, or only in part"


class NotJSONError(RecordError):
    """A line is not JSON."""

    template = "not JSON: {0}"


class NotCSVError(RecordError):
    """A row is not CSV, or doesn't fit the columns."""

    template = "not CSV: {0}"


class NotTextError(RecordError):
    """Bytes are not text in the declared encodings."""

    template = "not {0}: {1}"


class RecordCrashedError(RecordError):
    """The child process died with the record in hand."""

    template = "the process died: {0}"


class RecordTimeoutError(RecordError):
    """A record took longer than its task's timeout."""

    template = "took longer than its timeout of {0:g} s"


class RecordMemoryError(RecordError):
    """A record needed more than the child's memory."""

    template = "needed more memory than its process may use (memory=)"


class EffectInDoubtError(RecordError):
    """It is not known whether something outside was done."""

    template = (
        "{0!r} may have been done or not: {1}. Look for the idempotency key {2} at the service, and set right what is missing; "
        "where a second call with that key does no harm, in_doubt='retry' makes it by itself."
    )


class UndoneError(RecordError):
    """Something outside was done and undone, since its record had failed."""

    template = (
        "{0!r} was done, and undone when its record failed ({1}) in an attempt that was cut off. `parflow redrive` does it."
    )


class UndoFailedError(RecordError):
    """Something outside was done and can't be undone."""

    template = "{0!r} was done and stands, since it could not be undone: {1}. Its idempotency key is {2}."


class InDoubt(Exception):  # noqa: N818 - it says what is the matter
    """Raised in a function that `once` calls, when it can't tell whether it had its effect.

    Any other exception says that nothing was done, and that it may be tried again. With ``in_doubt="retry"`` so does this one.

    Examples
    --------
    >>> def charge(order, client):
    ...     try:
    ...         return client.post("/charges", order)
    ...     except TimeoutError as error:  # sent, but was it received?
    ...         raise InDoubt("no answer within 10 s") from error
    """


class Cancelled(BaseException):
    """Nobody waits for this call any more: raised within the call, so that it can clean up and leave.

    Examples
    --------
    >>> def fetch(url, client):
    ...     try:
    ...         return client.get(url)
    ...     finally:  # also when another branch of a race was faster
    ...         client.close()
    """
