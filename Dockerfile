# Two images: `api` (also the scheduler and the migrations; no torch) and `worker` (torch with CUDA).
#   docker build --target api -t secateur-api .
#   docker build --target worker -t secateur-worker .

FROM python:3.12-slim AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
RUN useradd --uid 10001 --create-home secateur \
    && mkdir -p /var/lib/secateur /models \
    && chown secateur:secateur /var/lib/secateur
WORKDIR /srv/secateur
ENV PYTHONPATH=/srv/secateur SECATEUR_STATE=/var/lib/secateur SECATEUR_MODELS_ROOT=/models
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY secateur ./secateur

FROM base AS api
RUN pip install -c constraints.txt ".[server,s3,mlflow]"
COPY alembic.ini ./
COPY migrations ./migrations
COPY app ./app
COPY workers ./workers
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/livez', timeout=2)"]
CMD ["uvicorn", "--factory", "app.main:create_app", "--host", "0.0.0.0", "--port", "8000", "--no-access-log", \
     "--timeout-graceful-shutdown", "8"]

FROM base AS worker
# PyPI's torch for Linux brings the CUDA libraries with it; the host needs the NVIDIA driver and container toolkit.
RUN pip install -c constraints.txt ".[worker,s3]"
COPY alembic.ini ./
COPY migrations ./migrations
COPY app ./app
COPY workers ./workers
USER 10001
# Celery's own ping: the worker answers through the broker.
HEALTHCHECK --interval=30s --timeout=20s --start-period=40s \
    CMD ["sh", "-c", "celery -A workers.celery_app inspect ping -d worker@$HOSTNAME --timeout 10"]
CMD ["sh", "-c", "exec celery -A workers.celery_app worker -P prefork -c 1 -n worker@$HOSTNAME --loglevel INFO"]
