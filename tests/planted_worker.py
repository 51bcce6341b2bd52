"""A tuner's worker with planted candidates, for tests/test_tuning.py: `CAVMAE_PLANTED` names those that are there.

They are forms of `gather_tokens`, whose PyTorch forward is made slow, so that what is right and fast is faster.
"""

from __future__ import annotations

import os
import sys
import time

from cavmae_fast.ops import dispatch
from cavmae_fast.tuning import worker

FORWARD = dict(dispatch._implementations["gather_tokens"])["torch"]
SLOW, SLOWER = 0.01, 0.03
"Seconds."


def waiting(seconds):
    def forward(*args):
        time.sleep(seconds)
        return FORWARD(*args)

    return forward


def wrong(*args):
    return FORWARD(*args) * 1.0001


def crash(*args):
    os.abort()


def hang(*args):
    time.sleep(600)


def raising(*args):
    raise RuntimeError("this machine has no such instruction")


def killed_here(*args):
    """The whole run is cut off: whoever watches dies too."""
    os.kill(os.getppid(), 9)
    os._exit(9)


PLANTS = {
    "a wrong": wrong,
    "b crash": crash,
    "c hang": hang,
    "d slow": waiting(SLOWER),
    "e fast": FORWARD,
    "f raising": raising,
    "cut off": killed_here,
}

if __name__ == "__main__":
    dispatch._implementations["gather_tokens"]["torch"] = waiting(SLOW)
    for name in os.environ["CAVMAE_PLANTED"].split(","):
        dispatch.add_form("gather_tokens", name, forward=PLANTS[name])
    sys.exit(worker.main())
