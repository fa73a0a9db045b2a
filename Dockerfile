# The service. Build: docker build -t neo-kms .
FROM python:3.11-slim-bookworm AS build
WORKDIR /src
COPY requirements.lock .
# Every file that can end up in the image is checked against the lock; then only what the service itself needs is installed.
RUN pip download --quiet --no-cache-dir --require-hashes --only-binary :all: -r requirements.lock -d /wheels
COPY pyproject.toml README.md LICENSE ./
COPY schema schema
COPY kms kms
RUN pip wheel --quiet --no-deps --no-index --find-links /wheels -w /wheels . \
    && python -m venv /opt/kms \
    && /opt/kms/bin/pip install --quiet --no-index --find-links /wheels neo-kms

FROM python:3.11-slim-bookworm
RUN apt-get -qq update \
    && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends softhsm2 >/dev/null \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --home-dir /var/lib/kms --shell /usr/sbin/nologin kms \
    && install -d -o kms -g kms -m 0711 /var/lib/kms /var/lib/kms/hsm /var/lib/kms/service /var/lib/kms/password
COPY --from=build /opt/kms /opt/kms
ENV PATH=/opt/kms/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER kms
WORKDIR /var/lib/kms
EXPOSE 7443 7480
STOPSIGNAL SIGTERM
ENTRYPOINT ["kms"]
CMD ["serve"]
