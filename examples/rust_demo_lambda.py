"""The demo of the Rust crate as a function of AWS Lambda: `examples.rust_demo_lambda.handler`.

It answers what the demo's own Lambda script sends. Its view is kept by the pump, which is this
function too, rung by the table's stream; see docs/serverless.md.
"""

from __future__ import annotations

from cqrs_es import serverless
from examples.rust_demo import api, app, gateway

handler = serverless.handler(app, gateway=gateway, asgi=api)
