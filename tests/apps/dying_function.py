"""Transfers as a function that kills itself at a given instant: see `tests.apps.dying`."""

import os

from cqrs_es import serverless
from tests.apps import dying
from tests.transfers import bank

dying.die_as_told()
handler = serverless.handler(bank(os.environ["CQRS_ES_SERVICE"]))
