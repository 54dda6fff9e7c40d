# syntax=docker/dockerfile:1
# nemo_popsd on the NGC NeMo container, with its versions of torch, Transformer Engine, apex, megatron-core and
# Megatron-Bridge. NeMo's core is added where the container lacks it (since 26.04).
#
#   docker build --tag nemo_popsd .
#   docker build --tag nemo_popsd:26.02.01 --build-arg NEMO_TAG=26.02.01 .
#   docker run --rm --gpus all --shm-size=16g nemo_popsd doctor
#   docker run --rm --gpus all --shm-size=16g -v /models:/models -v "$PWD/runs:/workspace/runs" \
#     nemo_popsd train conf/qwen3_8b.yaml student.source=/models/Qwen3-8B
#
# On a cluster: docs/slurm.md. It does not run as root; enroot runs it as the calling user.
ARG NEMO_TAG=26.08
FROM nvcr.io/nvidia/nemo:${NEMO_TAG}

ARG VERSION=dev
LABEL org.opencontainers.image.title="nemo_popsd" \
      org.opencontainers.image.description="Purified On-Policy Self-Distillation on NVIDIA NeMo and Megatron-core" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

WORKDIR /opt/nemo_popsd
COPY . .

# docker/install.sh fails if it changes a version. The doctor then imports all packages, prints their versions, and fails
# if one is missing or outside its declared range; modules that need a GPU driver cannot be tested during the build.
RUN docker/install.sh . \
    && python -m nemo_popsd doctor --imports --strict \
    && python -m pip list --format=freeze > /opt/nemo_popsd/versions.txt

# The container may have a user with this id, which is used then.
ARG USER_ID=1000
RUN if ! getent passwd "${USER_ID}" > /dev/null; then \
        useradd --uid "${USER_ID}" --user-group --create-home --shell /bin/bash popsd; \
    fi \
    && install --directory --owner="${USER_ID}" --mode=0775 /workspace /workspace/runs \
    && cp --recursive conf /workspace/conf

WORKDIR /workspace
USER ${USER_ID}

HEALTHCHECK --interval=10m --timeout=2m --start-period=2m --retries=2 CMD ["popsd", "doctor"]

ENTRYPOINT ["popsd"]
CMD ["--help"]
