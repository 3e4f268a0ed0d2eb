# An operator's coordinator; with EXTRA=simulation,ray what a large simulation runs in. Build it in
# the repository's root; docs/deploy-docker.md has the commands. Python packages come in the
# versions of constraints.txt. The authority's passphrase is never in it, and never needed by it.
ARG PYTHON=python:3.11.14-slim-bookworm

FROM ${PYTHON} AS build
ARG EXTRA=coordinator
ARG VARIANT=cpu
# PyTorch publishes its CPU builds in an index of their own; the default index has the CUDA builds.
ARG TORCH_INDEX=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY constraints.txt ./
RUN python -m venv /build \
 && /build/bin/pip install --no-cache-dir --constraint constraints.txt hatchling \
 && python -m venv --without-pip /opt/cloister
COPY . .
RUN /build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
 && /build/bin/pip --python /opt/cloister install --no-cache-dir --constraint constraints.txt \
      ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} "$(echo /wheels/cloister-*.whl)[${EXTRA}]" \
 && /opt/cloister/bin/python -c "import sys, torch; found = 'cuda' if torch.version.cuda else 'cpu'; sys.exit(found != '${VARIANT}' and f'this torch is for {found}, and VARIANT is ${VARIANT}: see TORCH_INDEX')"

FROM ${PYTHON}
# Nothing is installed at run time, so there is nothing to install with.
RUN pip uninstall --yes --root-user-action=ignore pip setuptools wheel \
 && groupadd --gid 10001 cloister \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/cloister \
      --shell /usr/sbin/nologin cloister \
 && install --directory --owner=10001 --group=10001 --mode=0700 /var/lib/cloister
COPY --from=build /opt/cloister /opt/cloister
# What is not the coordinator's folder is written to /tmp, and gone with the container.
ENV PATH=/opt/cloister/bin:/usr/local/bin:/usr/bin:/bin \
    CLOISTER_COORDINATOR_HOME=/var/lib/cloister/coordinator \
    HOME=/tmp \
    FLWR_HOME=/tmp/flwr \
    FLWR_TELEMETRY_ENABLED=0 \
    FLWR_DISABLE_UPDATE_CHECK=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    MPLCONFIGDIR=/tmp/matplotlib \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /var/lib/cloister
EXPOSE 9092
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s --retries=3 \
    CMD ["python", "-m", "deploy.probe", "127.0.0.1:9093", "ready"]
CMD ["cloister", "coordinator", "start", "--health-port", "9093"]
