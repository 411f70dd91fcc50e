# The bank as an image: any process of it, by the verb that is given as command.
#
#   docker build --tag bank .
#   docker run --rm bank --help

ARG PYTHON=python:3.13-slim-bookworm

FROM ${PYTHON} AS build
WORKDIR /build
# Which stores and brokers the image can reach; see pyproject.toml.
ARG EXTRAS=mysql,postgres,redis,amqp,http,metrics
RUN python -m venv /opt/venv
COPY pyproject.toml constraints.txt README.md CHANGELOG.md LICENSE ./
COPY cqrs_es ./cqrs_es
RUN python -m pip wheel --quiet --no-cache-dir --no-deps --wheel-dir dist . \
    && /opt/venv/bin/python -m pip install --quiet --no-cache-dir --constraint constraints.txt \
        "$(ls dist/*.whl)[$EXTRAS]"

FROM ${PYTHON}
LABEL org.opencontainers.image.title="bank" \
      org.opencontainers.image.description="A bank on cqrs-es: commands in, events and views out" \
      org.opencontainers.image.licenses="MIT"
WORKDIR /app
# An unknown CQRS_ES_* name is refused, so what is no setting has other names.
ENV PATH="/opt/venv/bin:$PATH" \
    PYTHONDONTWRITEBYTECODE=1 \
    CQRS_ES_APP=worker.app:app
COPY --from=build /opt/venv /opt/venv
COPY domain ./domain
COPY worker ./worker
COPY projectors ./projectors
COPY config/__init__.py config/settings.py ./config/
# The file system is read-only later; compiled code starts sooner.
RUN python -m compileall -q .
# A number, so that Kubernetes can see that it is not root.
USER 10001:10001
EXPOSE 8000 8080
# For processes that run with `--health-port 0.0.0.0:8080`; others switch it off.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/ready', timeout=4)"]
ENTRYPOINT ["cqrs-es"]
CMD ["--help"]
