# Flexrun in a container: `flexrun api` unless another command is given (`flexrun worker`, `flexrun migrate`).
# DATABASE_URL has to be set. Nothing is written to the file system, so it may be read-only.
# docs/DEPLOYMENT.md tells how to run it.

FROM python:3.12-slim-bookworm AS build

WORKDIR /app
COPY requirements.txt ./
# Wheels only, with the hashes of the lock: nothing is compiled, and nothing unlocked gets in.
RUN python -m venv --without-pip /opt/flexrun \
    && pip --python /opt/flexrun/bin/python install --no-cache-dir --disable-pip-version-check \
        --only-binary=:all: --require-hashes --requirement requirements.txt
COPY pyproject.toml README.md LICENSE alembic.ini models.yaml ./
COPY migrations ./migrations
COPY app ./app
# Editable: the package stays in /app, beside the migrations that it looks for there. setuptools is
# in the lock only to build the package. Compiled once here, because the root may be read-only.
RUN pip --python /opt/flexrun/bin/python install --no-cache-dir --disable-pip-version-check \
        --no-index --no-deps --no-build-isolation --editable . \
    && pip --python /opt/flexrun/bin/python uninstall --yes setuptools \
    && python -m compileall -q -j 0 /opt/flexrun/lib app migrations


FROM python:3.12-slim-bookworm

RUN groupadd --gid 10001 flexrun \
    && useradd --uid 10001 --gid 10001 --no-create-home --shell /usr/sbin/nologin flexrun \
    && python -m pip uninstall --yes --quiet --root-user-action=ignore pip
COPY --from=build /opt/flexrun /opt/flexrun
COPY --from=build /app /app
# A container has to listen on its own address. It does so only with FLEXRUN_ALLOW_UNAUTHENTICATED.
ENV PATH=/opt/flexrun/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    FLEXRUN_HOST=0.0.0.0
WORKDIR /app
USER 10001:10001
EXPOSE 8000 8001
STOPSIGNAL SIGTERM
# Ready, not only alive: compose starts what depends on it when it is healthy, and restarts nothing
# for being unhealthy. http.client, because urllib would ask a proxy of the environment.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-ISc", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/readyz'); raise SystemExit(c.getresponse().status != 200)"]
CMD ["flexrun", "api"]
