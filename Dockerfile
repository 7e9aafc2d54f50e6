# CPU:   docker build -t proxydet .
# CUDA:  docker build -t proxydet:cuda --build-arg DEVICE=cuda .
#
#        docker run --rm -v "$PWD:/data" -v proxydet-models:/models proxydet predict photo.jpg -v "mug, kettle" --yes
#        docker run --rm -p 8000:8000 -v "$PWD:/data" proxydet serve --run runs/pets --host 0.0.0.0
#        docker run --rm --gpus all --ipc=host -v "$PWD:/data" proxydet:cuda train --recipe small --data pets.toml --output runs/pets
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

# cpu: torch built for CPUs, 2 GB smaller; cuda: torch as the package index has it, with the CUDA libraries it needs.
ARG DEVICE=cpu
ENV PYTHONUNBUFFERED=1 UV_SYSTEM_PYTHON=1 UV_NO_CACHE=1 UV_COMPILE_BYTECODE=1

WORKDIR /opt/proxydet
RUN pip install --no-cache-dir "uv>=0.9,<0.14"

# The locked versions; in a layer of its own, which changes of the code do not build again. torch for CPUs comes from PyTorch's
# index, whose files the lock has no hashes of.
COPY pyproject.toml requirements-dev.lock ./
RUN case "$DEVICE" in cpu) set -- --torch-backend cpu --no-verify-hashes;; cuda) set --;; *) echo "DEVICE is cpu or cuda" >&2; exit 2;; esac; \
    uv pip install "$@" --constraints requirements-dev.lock --requirements pyproject.toml \
        --extra video --extra serve --extra export --extra index --extra parquet

COPY README.md LICENSE ./
COPY proxydet proxydet
COPY proxydet_cli proxydet_cli
RUN uv pip install --no-deps --no-build-isolation . && proxydet setup

# Whoever runs it may write there; `--user "$(id -u):$(id -g)"` gives files in /data to you.
ENV PROXYDET_MODELS=/models PROXYDET_CACHE=/cache HF_HOME=/cache/huggingface HOME=/cache
RUN mkdir -p /data /models /cache && chmod 1777 /data /models /cache
VOLUME ["/data", "/models", "/cache"]
WORKDIR /data
USER 1000:1000
EXPOSE 8000
ENTRYPOINT ["proxydet"]
CMD ["--help"]
