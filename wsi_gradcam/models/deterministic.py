"""The same sums on any number of threads."""

from __future__ import annotations

import os


def steady_sums() -> None:
    """Ask MKL for matrix products that do not depend on the number of threads; call before torch is first used.

    Workers have fewer threads than a single process, and results must agree to the last bit: with MKL's default,
    VGG-11's logits differ between 1 and 2 threads. STRICT mode exists for AVX2 and later; elsewhere MKL falls back
    to its compatible mode. Convolutions do not go through MKL; they agree where batches have the same size.
    """
    os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")
