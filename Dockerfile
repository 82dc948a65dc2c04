# GPU by default: PyTorch's ordinary wheels carry CUDA. Run with `docker run --gpus all ... --device cuda`.
# For a smaller CPU image, with OpenVINO, name an index of CPU wheels of PyTorch:
#   docker build --build-arg TORCH_INDEX=ADDRESS -t wsi-gradcam:cpu .
ARG PYTHON_IMAGE=python:3.11-slim

# What is built stays behind with the tools that build it: npm, pip's downloads, the sources.
FROM ${PYTHON_IMAGE} AS build
ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# hatch_build.py fetches with npm what the viewer's page shows slides with.
RUN apt-get update && apt-get install -y --no-install-recommends npm && rm -rf /var/lib/apt/lists/*
WORKDIR /src
RUN python3 -m venv /opt/wsi-gradcam
ENV PATH=/opt/wsi-gradcam/bin:$PATH
COPY constraints.txt ./
RUN versions=$(grep -E '^(torch|torchvision)==' constraints.txt) \
 && if [ -n "$TORCH_INDEX" ]; then pip install --index-url "$TORCH_INDEX" $versions; else pip install $versions; fi
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY wsi_gradcam ./wsi_gradcam
RUN grep -vE '^(torch|torchvision|nvidia-|cuda-|triton)' constraints.txt > without-torch.txt \
 && pip install -c without-torch.txt ".[cluster,fast,features,remote,timm,viewer,xarray${TORCH_INDEX:+,engines}]"

FROM ${PYTHON_IMAGE}
ARG TORCH_INDEX=""
ARG VERSION=0.1.0
ARG REVISION=""
LABEL org.opencontainers.image.title="wsi-gradcam" \
      org.opencontainers.image.description="Grad-CAM heatmaps of whole-slide images, and an audit of what they are worth" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
# Triton, by which torch.compile makes kernels for a GPU, needs a C compiler while it runs.
RUN if [ -z "$TORCH_INDEX" ]; then \
      apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
    fi \
 && useradd --create-home --uid 1000 reader
COPY --from=build /opt/wsi-gradcam /opt/wsi-gradcam
ENV PATH=/opt/wsi-gradcam/bin:$PATH
# A number, as Kubernetes sees from it alone that the user is not root.
USER 1000
WORKDIR /data
EXPOSE 8765
# Of `view`: where nothing listens at its port, as beside explain, there is nothing to be ill.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s CMD ["python3", "-c", "\
import http.client\n\
server = http.client.HTTPConnection('127.0.0.1', 8765, timeout=8)\n\
try:\n\
    server.connect()\n\
except ConnectionRefusedError:\n\
    raise SystemExit(0)\n\
server.request('GET', '/')\n\
assert server.getresponse().status < 500\n\
"]
ENTRYPOINT ["wsi-gradcam"]
CMD ["--help"]
