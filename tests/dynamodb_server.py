"""A DynamoDB for tests: moto's server, one request at a time. `python dynamodb_server.py PORT`.

With threads it lets two transactions win that exclude each other.
"""

from __future__ import annotations

import sys

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

if __name__ == "__main__":
    app = DomainDispatcherApplication(create_backend_app)
    run_simple("127.0.0.1", int(sys.argv[1]), app, threaded=False)
