"""A command on one rank with something wrong: python ailing.py HOW COMMAND argument ..."""

from __future__ import annotations

import importlib.metadata
import sys
import time
from unittest import mock

from s3rec_dist.__main__ import main
from s3rec_dist.training import doctor, preflight


def ail(how: str) -> None:
    if how == "clock":
        mock.patch.object(preflight, "clock", lambda: time.time() + 60).start()
    elif how == "version":
        version = importlib.metadata.version
        mock.patch.object(
            importlib.metadata, "version", lambda name: "0.9.1" if name == "deepspeed" else version(name)
        ).start()
    elif how == "impatient":
        mock.patch.object(doctor, "WAIT_S", 2.0).start()


if __name__ == "__main__":
    for how in filter(None, sys.argv[1].split(",")):
        ail(how)
    sys.exit(main(sys.argv[2:]))
