# vpmoe-train on GPUs: Megatron-Core, TransformerEngine and the trainer. Built by docker/compose.yaml, which gives the version.
ARG TORCH_IMAGE
FROM ${TORCH_IMAGE}
ENV HF_HUB_DISABLE_TELEMETRY=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 PYTHONUNBUFFERED=1
WORKDIR /vpmoe
COPY pyproject.toml README.md ./
COPY requirements requirements
COPY docker docker
COPY common common
COPY datastore datastore
COPY trainer trainer
COPY demo demo
RUN bash docker/install.sh trainer
COPY configs configs
COPY benchmarks benchmarks
COPY tests tests
COPY conftest.py ./
# What manifests and run folders state as the revision; compose.yaml asks for it.
ARG GIT_SHA
RUN test -n "$GIT_SHA" && echo "$GIT_SHA" > GIT_SHA
ENTRYPOINT ["/vpmoe/docker/entrypoint.sh"]
CMD ["vpmoe-train", "--help"]
