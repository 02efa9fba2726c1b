# vpmoe-data on GPUs: vLLM 0.32.0 and the datastore. Built by docker/compose.yaml, which gives the version.
ARG VLLM_IMAGE
FROM ${VLLM_IMAGE}
ENV HF_HUB_DISABLE_TELEMETRY=1 VLLM_NO_USAGE_STATS=1 RAY_USAGE_STATS_ENABLED=0 DO_NOT_TRACK=1 PYTHONUNBUFFERED=1
WORKDIR /vpmoe
COPY pyproject.toml README.md ./
COPY requirements requirements
COPY docker docker
COPY common common
COPY datastore datastore
COPY trainer trainer
COPY demo demo
RUN bash docker/install.sh datastore
COPY configs configs
COPY benchmarks benchmarks
COPY tests tests
COPY conftest.py ./
# What manifests and run folders state as the revision; compose.yaml asks for it.
ARG GIT_SHA
RUN test -n "$GIT_SHA" && echo "$GIT_SHA" > GIT_SHA
ENTRYPOINT ["/vpmoe/docker/entrypoint.sh"]
CMD ["vpmoe-data", "--help"]
