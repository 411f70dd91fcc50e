"""The bank in a process that kills itself at a given instant: see `tests.apps.dying`."""

from tests.apps import dying
from worker.app import app as app

dying.die_as_told()
