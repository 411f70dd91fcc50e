"""An application during whose import its process is told to stop."""

from __future__ import annotations

import os
import signal

from cqrs_es.application import Application

os.kill(os.getpid(), signal.SIGTERM)

app = Application("told")
