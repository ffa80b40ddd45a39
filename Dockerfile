# Two targets:
#   docker build --target gpu -t nemo_minitron .        # for DGX nodes: the NGC NeMo image with this package (the default)
#   docker build --target cpu -t nemo_minitron:cpu .    # a plain Python image; `docker run nemo_minitron:cpu` is `make demo`
#
# Which NGC tag. The published component lists (Megatron-Bridge, docs/releases/software-versions.md) say
#   25.09: Megatron Core 0.14.0,     NeMo 2.5.0, Transformer Engine 2.7,  PyTorch 2.8
#   25.11: Megatron Core dev:0.15.0, NeMo 2.6.0, Transformer Engine 2.9,  PyTorch 2.9
#   26.02: Megatron Core 0.16.0,     NeMo 2.7.0, Transformer Engine 2.12, PyTorch 2.10
# This project needs Megatron-core 0.15.x (0.16 changed get_megatron_optimizer, which NeMo 2.7 calls) and NeMo 2.7.x: no
# tag has both. 25.11.01 is the one whose compiled parts (PyTorch, Transformer Engine, Apex, flash-attention) are those that
# Megatron-core 0.15 was made with; Megatron-core and NeMo themselves are pure Python but for optional helpers, and are
# installed over it at the exact pins of constraints.txt. The image has both as checkouts (/opt/megatron-lm, /opt/NeMo):
# the last RUN fails the build unless ours are the ones that are imported, and torch, Transformer Engine and Apex are as before.
#
# Not verified, for want of a Docker engine and of the image: that it builds; that 25.11.01 is still served and has not been
# pushed again; the versions inside beyond the list above (a third party's report gives Python 3.12.3, megatron-core
# 0.16.0rc0 as an editable checkout and transformers 4.56.0); anything on a GPU.
ARG NEMO_IMAGE=nvcr.io/nvidia/nemo:25.11.01
ARG PYTHON_IMAGE=python:3.11.13-slim-bookworm

# ---------------------------------------------------------------------------------------------------------------- cpu
FROM ${PYTHON_IMAGE} AS cpu
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1
# The CPU build of torch; PyPI's own brings several GB of CUDA libraries.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /opt/nemo_minitron
COPY pyproject.toml constraints.txt README.md ./
COPY nemo_minitron nemo_minitron
COPY conf conf
COPY models models
RUN python -m pip install --extra-index-url "${TORCH_INDEX}" -c constraints.txt . \
 && useradd --uid 10001 --create-home minitron \
 && install -d -m 0755 -o minitron -g minitron /workspace
USER 10001
WORKDIR /workspace
HEALTHCHECK --interval=10m --timeout=3m --start-period=3m CMD ["python", "-m", "nemo_minitron.health"]
CMD ["minitron", "experiment=demo"]

# ---------------------------------------------------------------------------------------------------------------- gpu
FROM ${NEMO_IMAGE} AS gpu
USER 0
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# PIP_CONSTRAINT: the image's own constraints would refuse our pins; the check below takes their place.
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT= PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
WORKDIR /opt/nemo_minitron
COPY pyproject.toml constraints-container.txt README.md ./
COPY nemo_minitron nemo_minitron
COPY conf conf
COPY models models
# --no-deps throughout: a resolver would take torch from PyPI and throw away the image's builds.
RUN python nemo_minitron/health.py --record /tmp/compiled.json \
 && python -m pip install --no-deps --no-build-isolation -r constraints-container.txt . \
 && (id minitron >/dev/null 2>&1 || useradd --uid 10001 --create-home minitron) \
 && install -d -m 0755 -o minitron -g minitron /workspace
USER 10001
WORKDIR /workspace
# Whatever checkouts PYTHONPATH names in the image, what was installed comes first.
ENV PYTHONPATH=
RUN python -m nemo_minitron.health --unchanged /tmp/compiled.json --pins /opt/nemo_minitron/constraints-container.txt
HEALTHCHECK --interval=10m --timeout=3m --start-period=3m CMD ["python", "-m", "nemo_minitron.health"]
CMD ["minitron", "--help"]
