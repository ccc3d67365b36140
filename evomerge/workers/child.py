"""The process behind a local worker: `python -m evomerge.workers.child FD`.

Reads a pickled `MakeEvaluator` and then work units from a socket that only its parent holds, so nothing
untrusted is unpickled here.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection

from evomerge.errors import UserError


def main() -> int:
    """Serve until the parent closes its end."""
    # Ctrl-C reaches the whole process group; stopping is the driver's business.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _leave_with_parent()
    pipe = Connection(int(sys.argv[1]))
    try:
        make = pickle.loads(pipe.recv_bytes())
        try:
            evaluator = make()
        except UserError as e:
            pipe.send(("bad_start", e))
            return 2
        except Exception as e:
            pipe.send(("bad_start", f"{type(e).__name__}: {e}"))
            raise
        pipe.send(("ready", None))
        while True:
            unit = pipe.recv()
            pipe.send(("done", evaluator.evaluate(unit)))
    except (EOFError, ConnectionError):
        return 0


def _leave_with_parent() -> None:
    """A driver that was killed cannot stop its workers, so each looks whether it is still there."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
