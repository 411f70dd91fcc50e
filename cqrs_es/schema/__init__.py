"""What an application takes, stores and publishes, described for others: pure functions."""

from cqrs_es.schema.asyncapi import asyncapi as asyncapi
from cqrs_es.schema.compare import compare as compare
from cqrs_es.schema.describe import describe as describe
from cqrs_es.schema.describe import json_schemas as json_schemas
from cqrs_es.schema.openapi import openapi as openapi
