# syntax=docker/dockerfile:1
# nemo_popsd on the NGC NeMo container, whose torch, Transformer Engine, apex, megatron-core, Megatron-Bridge and NeMo stay
# as they are.
#
#   docker build --tag nemo_popsd .
#   docker run --rm --gpus all --shm-size=16g nemo_popsd doctor
#   docker run --rm --gpus all --shm-size=16g -v /models:/models -v "$PWD/runs:/workspace/runs" \
#     nemo_popsd train conf/qwen3_8b.yaml student.source=/models/Qwen3-8B
#
# On a cluster: docs/slurm.md. It does not start as root; enroot runs it as whoever calls it.
ARG NEMO_TAG=26.02.01
FROM nvcr.io/nvidia/nemo:${NEMO_TAG}

ARG VERSION=dev
LABEL org.opencontainers.image.title="nemo_popsd" \
      org.opencontainers.image.description="Purified On-Policy Self-Distillation on NVIDIA NeMo and Megatron-core" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

WORKDIR /opt/nemo_popsd
COPY . .

# docker/install.sh fails if it would change a version. The doctor then imports everything, prints all versions, and fails
# if one is missing or outside its declared range; what needs a GPU's driver cannot be judged while an image is built.
RUN docker/install.sh . \
    && python -m nemo_popsd doctor --imports --strict \
    && python -m pip list --format=freeze > /opt/nemo_popsd/versions.txt

# The container may have a user with this number already; any will do.
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
