# GPU by default: PyTorch's ordinary wheels carry CUDA. Run with `docker run --gpus all ... --device cuda`.
# For a smaller CPU image name an index of CPU wheels of PyTorch:
#   docker build --build-arg TORCH_INDEX=ADDRESS -t wsi-gradcam:cpu .
FROM python:3.11-slim

ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /opt/wsi-gradcam
COPY constraints.txt ./
RUN versions=$(grep -E '^(torch|torchvision)==' constraints.txt) \
 && if [ -n "$TORCH_INDEX" ]; then pip install --index-url "$TORCH_INDEX" $versions; else pip install $versions; fi

COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY wsi_gradcam ./wsi_gradcam
# npm is needed while the package is built: hatch_build.py fetches what the viewer's page shows slides with.
# Triton, by which torch.compile makes kernels for a GPU, needs a C compiler while it runs.
RUN apt-get update && apt-get install -y --no-install-recommends npm \
 && if [ -z "$TORCH_INDEX" ]; then apt-get install -y --no-install-recommends gcc libc6-dev && apt-mark manual gcc libc6-dev; fi \
 && grep -vE '^(torch|torchvision|nvidia-|cuda-|triton)' constraints.txt > without-torch.txt \
 && pip install -c without-torch.txt ".[cluster,fast,features,remote,timm,viewer,xarray${TORCH_INDEX:+,engines}]" \
 && apt-get purge -y npm && apt-get autoremove -y && rm -rf /var/lib/apt/lists/*

# A number, as Kubernetes sees from it alone that the user is not root.
RUN useradd --create-home --uid 1000 reader
USER 1000
WORKDIR /data
ENTRYPOINT ["wsi-gradcam"]
CMD ["--help"]
