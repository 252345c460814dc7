# convai-fast in an image: for a CPU, or with --build-arg DEVICE=cuda for NVIDIA's GPUs.
# docs/serving.md says how it is used. Debian keeps one version of a package: there is none to pin.
# hadolint global ignore=DL3008
ARG DEVICE=cpu

# The two take the same steps. On PyPI torch is built for CUDA 13; for a CPU it is a tenth of that.
FROM debian:trixie-slim AS cpu
FROM cpu AS cpu-build
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
FROM nvidia/cuda:13.0.2-base-ubuntu24.04 AS cuda
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04 AS cuda-build

FROM ${DEVICE}-build AS build
ARG DEVICE
ARG EXTRAS=serve,train
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/convai-fast
ENV PATH=/opt/convai-fast/bin:$PATH PIP_NO_CACHE_DIR=1
WORKDIR /source
COPY constraints.txt .
RUN pip install -c constraints.txt 'setuptools>=77' pybind11 ninja numpy torch
COPY . .
RUN CONVAI_FAST_BUILD=${DEVICE} pip wheel --no-deps --no-build-isolation -w /wheels . \
    && pip install -c constraints.txt "$(echo /wheels/*.whl)[${EXTRAS}]" \
    && pip uninstall -y ninja pybind11

FROM ${DEVICE}
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 convai \
    && install -d -o convai -g convai /work
COPY --from=build /opt/convai-fast /opt/convai-fast
ENV PATH=/opt/convai-fast/bin:$PATH
USER 10001
WORKDIR /work
EXPOSE 8000
ENTRYPOINT ["convai-fast"]
CMD ["--help"]
