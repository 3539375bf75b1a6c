# syntax=docker/dockerfile:1
# MLflow's server with what it needs for PostgreSQL and S3, of the version that the others talk to. From
# the root of the repository:  docker build -f infra/docker/mlflow.Dockerfile -t echodistill/mlflow:0.1.0 .
# For a reproducible build add a digest to the base (...-bookworm@sha256:...).
ARG PYTHON_IMAGE=python:3.12.10-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /app
COPY constraints.txt ./
COPY infra/docker/install.sh infra/docker/sbom.py infra/docker/
# The constraints say which versions.
RUN python -m venv /opt/venv \
    && infra/docker/install.sh /app 'mlflow>=3' 'psycopg2-binary>=2' 'boto3>=1' \
    && python infra/docker/sbom.py echodistill-mlflow "$(mlflow --version | tr -dc 0-9.)" > sbom.json

FROM ${PYTHON_IMAGE}
RUN groupadd --gid 10001 mlflow \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin mlflow
COPY --from=build /opt/venv /opt/venv
COPY --from=build /app/sbom.json /app/
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="EchoDistill, registry" \
      org.opencontainers.image.description="MLflow with PostgreSQL and S3" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
# A number, so that Kubernetes can see that it is not root.
USER 10001:10001
WORKDIR /tmp
EXPOSE 5000
CMD ["mlflow", "server", "--host", "0.0.0.0"]
