# The service: a virtual environment with app/, pictures/ and what they need, and nothing else. --build-arg VARIANT=gpu: with CUDA (its
# libraries come from PyPI; the host needs a driver and NVIDIA's container toolkit).
# The base is any Debian with Python 3.11 or newer and pip. Another package index: --build-arg PIP_INDEX_URL=…
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST
# Debian's own pip keeps off the system's packages unless told otherwise; this stage is thrown away
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_BREAK_SYSTEM_PACKAGES=1
WORKDIR /build
RUN apt-get update && apt-get install -y --no-install-recommends tini && rm -r /var/lib/apt/lists/*

# Dependencies in a layer of their own: a change of the code does not install them again. Every file is one whose hash is
# in the repository (`make pins`). pip stays outside the environment; numpy's tests and onnxruntime's conversion tools are
# never imported in service.
ARG VARIANT=cpu
COPY requirements requirements
RUN python3 -m pip install --no-cache-dir --require-hashes -r requirements/build.txt \
 && python3 -m venv --without-pip /opt/venv \
 && python3 -m pip --python /opt/venv/bin/python install --no-cache-dir --require-hashes -r requirements/${VARIANT}.txt \
 && find /opt/venv/lib/*/site-packages/numpy -type d -name tests -prune -exec rm -r {} + \
 && rm -r /opt/venv/lib/*/site-packages/onnxruntime/transformers \
          /opt/venv/lib/*/site-packages/onnxruntime/tools \
          /opt/venv/lib/*/site-packages/onnxruntime/quantization

# Without model/ and training/ beside it the same package holds only the service; its second command would find nothing to run.
COPY pyproject.toml README.md LICENSE ./
COPY app app
COPY pictures pictures
RUN python3 -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir dist . \
 && python3 -m pip --python /opt/venv/bin/python install --no-cache-dir --no-deps --no-index dist/*.whl \
 && rm /opt/venv/bin/convmixer-train

FROM ${BASE_IMAGE}
COPY --from=build /usr/bin/tini /usr/bin/tini
COPY --from=build /opt/venv /opt/venv
# Without the last variable onnxruntime's official builds report usage to Microsoft
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    CONVMIXER_HOST=0.0.0.0 \
    ORT_DISABLE_TELEMETRY=1
USER 10001:10001
EXPOSE 8000
# http.client and not urllib.request: an http_proxy in the environment is not for this. Whoever connects to 0.0.0.0 or :: reaches
# its own machine
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 \
    CMD ["python", "-Ic", "import http.client as h, os; e = os.environ.get; c = h.HTTPConnection(e('CONVMIXER_HOST', '127.0.0.1'), e('CONVMIXER_PORT', '8000'), timeout=2); c.request('GET', '/readyz'); raise SystemExit(c.getresponse().status != 200)"]
# tini passes SIGTERM on and takes in the dead processes that a process 1 inherits, e.g. of a health check that timed out
ENTRYPOINT ["tini", "--"]
CMD ["convmixer", "serve"]
# Last, so that another commit makes no other layers; `make docker` fills them in
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="convmixer-serve" \
      org.opencontainers.image.description="ConvMixer image classification over HTTP" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
