# One image for worker, beat, flower, metrics and the commands. The base must have Python 3.11 or
# later with venv; name a digest to build the same image again.
ARG BASE=python:3.13-slim-bookworm

FROM ${BASE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 SOURCE_DATE_EPOCH=1700000000
WORKDIR /src
# Two environments: one that builds the wheel and stays behind, one that goes into the image.
RUN python3 -m venv /opt/build && python3 -m venv --without-pip /opt/venv
COPY requirements/image.txt requirements/build.txt requirements/
RUN /opt/build/bin/pip install --require-hashes -r requirements/build.txt \
    && /opt/build/bin/pip --python /opt/venv/bin/python install --no-compile --require-hashes \
        -r requirements/image.txt
COPY pyproject.toml README.md ./
COPY worker worker
COPY migrations migrations
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir dist . \
    && /opt/build/bin/pip --python /opt/venv/bin/python install --no-compile --no-deps dist/*.whl

FROM ${BASE}
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    POSTROOM_LOG_FORMAT=json
RUN mkdir /var/lib/postroom && chown 10001:10001 /var/lib/postroom
# Celery looks into the working directory first: there is no module named `worker` in this one.
WORKDIR /var/lib/postroom
USER 10001:10001
STOPSIGNAL SIGTERM
CMD ["celery", "-A", "worker", "worker", "-P", "threads", "-c", "32", "-l", "INFO"]
