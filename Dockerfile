# One file, five images (docs/deploy.md has their sizes):
#   server  what `docker build .` gives: CPU, the shipped models, no torch
#   gpu     --target gpu: the same on onnxruntime-gpu with CUDA and cuDNN from their wheels
#   load    --target load: locust and loadtests/
#   web     --target web: the HTTP face and the page, before a server
#   build   what they are made in; not shipped
# BASE is any image with Python 3.11 or newer as python3 and its venv module.
ARG BASE=python:3.11.11-slim-bookworm

FROM ${BASE} AS build
WORKDIR /src
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/seqserve
ENV PIP="/opt/pip/bin/pip --python /opt/seqserve/bin/python --disable-pip-version-check --no-cache-dir --quiet"
# What the project needs changes less often than the project: installed from pyproject.toml alone, so that it is a layer of its own.
COPY pyproject.toml constraints.txt ./
RUN python3 -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; e = p['optional-dependencies']; \
    [open(f'/tmp/{n}.txt', 'w').write('\n'.join(d)) for n, d in {**e, 'base': p['dependencies']}.items()]"
RUN $PIP install --constraint constraints.txt --requirement /tmp/base.txt --requirement /tmp/redis.txt --requirement /tmp/mtls.txt

FROM build AS code
COPY README.md LICENSE ./
COPY contract contract
COPY protos protos
COPY server server
COPY seqserve seqserve
COPY training training
COPY export export
COPY web web
RUN /opt/pip/bin/pip wheel --disable-pip-version-check --quiet --no-deps --wheel-dir /wheels .

FROM build AS cpu-built
RUN $PIP install --constraint constraints.txt --requirement /tmp/cpu.txt
COPY --from=code /wheels /wheels
RUN $PIP install --no-deps /wheels/*.whl

FROM build AS gpu-built
RUN $PIP install --constraint constraints.txt --requirement /tmp/gpu.txt
COPY --from=code /wheels /wheels
RUN $PIP install --no-deps /wheels/*.whl

FROM build AS load-built
RUN $PIP install --constraint constraints.txt --requirement /tmp/loadtest.txt
COPY --from=code /wheels /wheels
RUN $PIP install --no-deps /wheels/*.whl

FROM build AS web-built
RUN $PIP install --constraint constraints.txt --requirement /tmp/web.txt
COPY --from=code /wheels /wheels
RUN $PIP install --no-deps /wheels/*.whl

FROM ${BASE} AS run
# Nothing is written but what is mounted: /var/lib/seqserve for sessions, /tmp where Python insists.
ENV PATH=/opt/seqserve/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
RUN install -d -o 10001 -g 10001 /var/lib/seqserve
USER 10001:10001

FROM run AS load
COPY --from=load-built /opt/seqserve /opt/seqserve
COPY loadtests /srv/loadtests
WORKDIR /srv
EXPOSE 8089
ENTRYPOINT ["locust", "-f", "loadtests/locustfile.py"]

FROM run AS web
COPY --from=web-built /opt/seqserve /opt/seqserve
ENV SEQSERVE_WEB_HOST=0.0.0.0 SEQSERVE_WEB_TARGET=server:8001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=10s --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://localhost:8000/healthz', timeout=3)"]
ENTRYPOINT ["seqserve", "web"]

FROM run AS serving
ENV SEQSERVE_HOST=0.0.0.0 SEQSERVE_MODELS=/models SEQSERVE_STORE=lmdb:/var/lib/seqserve/sessions
COPY models /models
EXPOSE 8001 8002
STOPSIGNAL SIGTERM
# Asking costs 0.3 s of CPU, most of it importing: not too often.
HEALTHCHECK --interval=15s --timeout=10s --start-period=30s --retries=3 CMD ["seqserve", "health", "--timeout", "3"]
ENTRYPOINT ["seqserve", "serve"]

FROM serving AS gpu
ENV SEQSERVE_DEVICE=cuda SEQSERVE_MEASURED=/var/lib/seqserve/measured.json
COPY --from=gpu-built /opt/seqserve /opt/seqserve

FROM serving AS server
COPY --from=cpu-built /opt/seqserve /opt/seqserve
