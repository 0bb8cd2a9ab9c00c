"""The in-process cluster that the runs of one process share.

Kept apart from `parflow.runtime.cluster`, because that imports Dask: here the children are started first, and Dask is imported
while they start.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from parflow.runtime.sandbox import Sandbox

if TYPE_CHECKING:
    from parflow.runtime.cluster import Hands, LocalSession


class Sessions:
    """Keeps one local cluster for as long as the process lives, or until a run asks for another size.

    Running a notebook cell again therefore starts nothing anew.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.session: LocalSession | None = None
        self.users = 0

    def hands(self, slots: int, warm: Callable[[Sandbox], None]) -> Hands:
        """Return a connection to a local cluster of ``slots``; the children of a new one are started while Dask starts."""
        with self.lock:
            old = self.session
            if old is not None and old.slots == slots and not old.sandbox.closed:
                threading.Thread(target=warm, args=(old.sandbox,), name="parflow-warm", daemon=True).start()
                self.users += 1
                return old.hands(self._release)
            if old is not None and not self.users:
                old.close()
                old = self.session = None
            sandbox = Sandbox()
            threading.Thread(target=warm, args=(sandbox,), name="parflow-warm", daemon=True).start()
            from parflow.runtime.cluster import LocalSession

            session = LocalSession(slots, sandbox)
            if old is not None:  # two runs of different sizes at once: the second has a cluster of its own
                return session.hands(session.close)
            self.session = session
            self.users += 1
            return session.hands(self._release)

    def _release(self) -> None:
        with self.lock:
            self.users -= 1

    def close(self) -> None:
        """End the cluster, if there is one."""
        with self.lock:
            if self.session is not None:
                self.session.close()
                self.session = None


SESSIONS = Sessions()
atexit.register(SESSIONS.close)
