# Three images from one file: `docker build --target service|gpu-service|training .`
# hadolint checks this file in the tests.

FROM python:3.12-slim-bookworm AS wheel
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# Serves a bundle on the CPU. No torch in it.
FROM python:3.12-slim-bookworm AS service
COPY constraints.txt /tmp/constraints.txt
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir -c /tmp/constraints.txt "$(ls /wheels/resight-*.whl)[cpu]" && rm -r /wheels
RUN useradd --uid 10001 --create-home resight && install -d -o 10001 /data /models
USER 10001
ENV RESIGHT_BUNDLE=/bundle RESIGHT_DATA=/data RESIGHT_LISTEN=0.0.0.0:50051 RESIGHT_AUTH=tokens
VOLUME /data
EXPOSE 50051
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "from resight.cli.options import connect; connect('localhost:50051').wait_ready(3)"]
# It starts with TLS files or RESIGHT_BEHIND_TLS_PROXY, and answers whoever has a token (docs/security.md).
ENTRYPOINT ["resight", "serve"]

# Serves a bundle on an NVIDIA GPU: onnxruntime-gpu and faiss with cuVS bring CUDA 13 as wheels.
FROM python:3.12-slim-bookworm AS gpu-service
COPY constraints.txt /tmp/constraints.txt
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir -c /tmp/constraints.txt "$(ls /wheels/resight-*.whl)[gpu]" && rm -r /wheels
RUN useradd --uid 10001 --create-home resight && install -d -o 10001 /data
USER 10001
ENV RESIGHT_BUNDLE=/bundle RESIGHT_DATA=/data RESIGHT_LISTEN=0.0.0.0:50051 RESIGHT_AUTH=tokens RESIGHT_PROVIDER=cuda \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME /data
EXPOSE 50051
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "from resight.cli.options import connect; connect('localhost:50051').wait_ready(3)"]
ENTRYPOINT ["resight", "serve"]

# Ingests, adapts, exports and runs the cycle.
FROM python:3.12-slim-bookworm AS training
# What opencv, which the tracker's library loads, links against.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends libgl1 libglib2.0-0 && rm -rf /var/lib/apt/lists/*
COPY constraints.txt /tmp/constraints.txt
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir -c /tmp/constraints.txt "$(ls /wheels/resight-*.whl)[cpu,train,export,ingest,cycle]" && rm -r /wheels
RUN useradd --uid 10001 --create-home resight && install -d -o 10001 /srv/resight /srv/resight/models /srv/resight/state
USER 10001
WORKDIR /srv/resight
VOLUME /srv/resight
HEALTHCHECK NONE
ENTRYPOINT ["resight"]
CMD ["--help"]
