# The service on a CPU: a virtual environment with app/ and the [cpu] dependencies, and nothing else.
# The base is any Debian with Python 3.11 or newer and pip. Another package index: --build-arg PIP_INDEX_URL=…
# Traces for OpenTelemetry: --build-arg EXTRAS="cpu otel"
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST
ARG EXTRAS=cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build

# Dependencies in a layer of their own: a change of the code does not install them again. pip stays outside the
# environment; numpy's tests and onnxruntime's conversion tools are never imported in service.
COPY pyproject.toml constraints.txt ./
RUN python3 -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb')); \
print(*p['build-system']['requires'], sep='\n', file=open('build.txt', 'w')); \
extras = p['project']['optional-dependencies']; \
print(*p['project']['dependencies'], *[r for name in '$EXTRAS'.split() for r in extras[name]], sep='\n', file=open('serve.txt', 'w'))" \
 && python3 -m pip install --no-cache-dir -c constraints.txt -r build.txt \
 && python3 -m venv --without-pip /opt/venv \
 && python3 -m pip --python /opt/venv/bin/python install --no-cache-dir -c constraints.txt -r serve.txt \
 && find /opt/venv/lib/*/site-packages/numpy -type d -name tests -prune -exec rm -r {} + \
 && rm -r /opt/venv/lib/*/site-packages/onnxruntime/transformers \
          /opt/venv/lib/*/site-packages/onnxruntime/tools \
          /opt/venv/lib/*/site-packages/onnxruntime/quantization

# Without model/ and training/ beside it the same package holds only app/; its second command would find nothing to run.
COPY README.md LICENSE ./
COPY app app
RUN python3 -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir dist . \
 && python3 -m pip --python /opt/venv/bin/python install --no-cache-dir --no-deps --no-index dist/*.whl \
 && rm /opt/venv/bin/convmixer-train

FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="convmixer-serve" \
      org.opencontainers.image.description="ConvMixer image classification over HTTP" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/venv /opt/venv
# Without the last variable onnxruntime's official builds report usage to Microsoft
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    CONVMIXER_HOST=0.0.0.0 \
    ORT_DISABLE_TELEMETRY=1
USER 10001:10001
EXPOSE 8000
# http.client and not urllib.request: an http_proxy in the environment is not for this
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 \
    CMD ["python", "-Ic", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=2); c.request('GET', '/readyz'); raise SystemExit(c.getresponse().status != 200)"]
CMD ["convmixer", "serve"]
