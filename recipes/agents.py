"""Plan, ask unlike workers side by side, take the first three drafts, and judge: a fork-join of calls to a service.

`python recipes/agents.py` answers a question with a service that it starts itself (stub_service.py); for another one write
`parflow run recipes/agents.py --question '…' --url http://…`. It needs `pip install httpx`.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from typing import Any

import httpx

import parflow as pf

QUESTION = "How high is Mount Everest and how deep is the Mariana Trench?"

Draft = dict[str, Any]
"""Who wrote it (``by``), and the ``text``."""


async def ask(url: str, what: str, **given: Any) -> Any:
    """Ask the service, and return its answer; an error of the service is an error here."""
    async with httpx.AsyncClient(timeout=600, trust_env=False) as client:  # the tasks' timeouts are what counts
        answer = await client.post(f"{url}/{what}", json=given)
        answer.raise_for_status()
        return answer.json()


@pf.task(timeout="1min")
async def plan(question: str, url: str) -> list[str]:
    """Cut the question into smaller ones: how many shows only at run time."""
    parts: list[str] = await ask(url, "plan", question=question)
    return parts


@pf.task(timeout="1min", concurrency=20)
async def research(part: str, url: str) -> str:
    """Find out about one of the smaller questions; twenty of them wait at the same time in one child."""
    note: str = await ask(url, "research", question=part)
    return note


# --- five workers, each with a way of its own ----------------------------------------------------------------------------


@pf.task(timeout="10min")
async def expert(question: str, url: str) -> Draft:
    """Ask the one who knows best, and takes longest."""
    return {"by": "expert", "text": await ask(url, "expert", question=question)}


@pf.task(timeout="1min")
async def compute(question: str, url: str) -> Draft:
    """Let a tool do the sums; it's often out of order."""
    return {"by": "compute", "text": await ask(url, "compute", question=question)}


@pf.task(timeout="1min")
async def search(question: str, url: str) -> Draft:
    """Take what a search finds first."""
    return {"by": "search", "text": await ask(url, "search", question=question)}


@pf.task(timeout="1min")
async def vote(question: str, url: str) -> Draft:
    """Ask three small models at once, and take what most of them say."""
    said = await asyncio.gather(*(ask(url, "guess", question=question, seed=seed) for seed in range(3)))
    return {"by": "vote", "text": Counter(said).most_common(1)[0][0]}


@pf.task(timeout="1min")
async def write(notes: list[str], url: str) -> Draft:
    """Make a text of the notes."""
    return {"by": "write", "text": await ask(url, "write", notes=notes)}


# --- the join ---------------------------------------------------------------------------------------------------------------


@pf.task(timeout="1min")
async def judge(question: str, drafts: list[Draft], url: str) -> dict[str, Any]:
    """Choose one of the drafts, and say how ``sure`` that is."""
    verdict: dict[str, Any] = await ask(url, "judge", question=question, drafts=drafts)
    return verdict


@pf.task
def settled(outcome: pf.Outcome, enough: float) -> bool:
    """Tell whether there is a verdict that is sure enough."""
    return outcome.ok and outcome.value["sure"] >= enough


@pf.task
def answer(outcome: pf.Outcome) -> dict[str, Any]:
    """Give the answer that the judge is sure of."""
    return {"answer": outcome.value["text"], "by": outcome.value["by"]}


@pf.task
def escalate(question: str, outcome: pf.Outcome) -> dict[str, Any]:
    """Hand the question to a person, with the reason."""
    if outcome.failure is not None:
        return {"a person should answer": question, "because": f"{outcome.failure.step}: {outcome.failure.message}"}
    return {"a person should answer": question, "because": f"{outcome.value['by']} is {outcome.value['sure']:.0%} sure"}


@pf.workflow
def agents(url: str, question: str = QUESTION, enough: float = 0.8) -> Any:
    """Answer a question: three drafts of five are enough, and when it can't be answered a person is called."""
    notes = pf.expand(research, plan(question, url), url)
    drafts = pf.quorum(
        3,
        expert(question, url),
        compute(question, url),
        search(question, url),
        vote(question, url),
        write(notes, url),
    )
    outcome = pf.settle(judge(question, drafts, url))[0]  # whatever fails up to here is no failure of the run
    return pf.when(settled(outcome, enough), answer(outcome), escalate(question, outcome))


if __name__ == "__main__":
    from stub_service import Service

    with Service(slow={"expert": 60}, failing={"compute": 1}) as service:
        run = agents(service.url, *sys.argv[1:2]).run(workers=2)
        print(run.result())
        print("asked:", ", ".join(f"{what} {count}" for what, count in sorted(service.asked.items())))
        service.wait_until(lambda: service.left.total() > 0, 5)
        print("hung up on:", *service.left)
