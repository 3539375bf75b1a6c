# syntax=docker/dockerfile:1
# The endpoint. From the root of the repository:
#   docker build -f infra/docker/serve.Dockerfile -t echodistill/serve:0.1.0 .
#
# torch's wheels bring CUDA's libraries along, so the base is plain Python: an image of CUDA's would
# hold them twice. For a reproducible build add the digest to it (...-bookworm@sha256:...).
ARG PYTHON_IMAGE=python:3.12.10-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV PATH=/opt/venv/bin:$PATH
# The build of torch is the machine's business: this one is for the driver's CUDA. On another one, name
# its index with --build-arg PIP_EXTRA_INDEX_URL=...
ARG TORCH=torch==2.13.0
ARG PIP_EXTRA_INDEX_URL=
RUN python -m venv /opt/venv
WORKDIR /app
# What is installed depends on these alone, so that a change of code builds no layer of gigabytes.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY model/pocket/NOTICE model/pocket/
COPY infra/docker/install.sh infra/docker/sbom.py infra/docker/
RUN infra/docker/install.sh /app serve "$TORCH" \
    && python -m pip uninstall --yes echodistill \
    && rm -rf build
COPY model model
COPY components components
COPY pipeline pipeline
COPY serve serve
# The code stays where it is and is imported from there; what it needs is there already.
RUN python -m pip install --no-cache-dir --disable-pip-version-check --no-deps --editable . \
    && python infra/docker/sbom.py echodistill-serve "$(python -c 'from importlib.metadata import version as v; print(v("echodistill"))')" > sbom.json \
    && python -m compileall -q model components pipeline serve

FROM ${PYTHON_IMAGE}
# gcc: Triton compiles with it what torch fuses (`speed: compile`). The profile: KubeRay may start Ray from a
# login shell.
# hadolint ignore=DL3008 # the base's digest pins the distribution; its fixes should come in
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 echodistill \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin echodistill \
    && install -d -o 10001 -g 10001 /var/cache/echodistill \
    && echo "export PATH=/opt/venv/bin:\$PATH" > /etc/profile.d/venv.sh
COPY --from=build /opt/venv /opt/venv
COPY --from=build /app /app
# Which GPUs the container gets is for whoever starts it to say: a pod without one must not see its node's.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    ECHODISTILL_CACHE=/var/cache/echodistill \
    RAY_max_direct_call_object_size=4194304 \
    RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD=0 \
    RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP=0 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="EchoDistill, endpoint" \
      org.opencontainers.image.description="Draws registered concepts in one step, over the OpenAI Images API" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
# A number, so that Kubernetes can see that it is not root.
USER 10001:10001
# /app is not the user's to write in; what a command writes goes here.
WORKDIR /tmp
EXPOSE 8000
CMD ["echodistill", "serve", "--host", "0.0.0.0", "--port", "8000"]
