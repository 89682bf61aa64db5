# The server on a CPU: docs/deploy.md says how to build and run it, and what of this was run where there was no engine.
FROM python:3.11.11-slim-bookworm

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
WORKDIR /srv/mixtral-lab
COPY constraints.txt ./
# The CPU build of PyTorch first: what follows leaves it alone.
RUN python -m pip install --index-url https://download.pytorch.org/whl/cpu torch==2.13.0
COPY pyproject.toml README.md LICENSE ./
COPY mixtral_lab ./mixtral_lab
COPY data ./data
RUN python -m pip install --constraint constraints.txt '.[serve]'

RUN useradd --create-home --uid 10001 lab
USER lab
WORKDIR /home/lab
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=3)"]
# Beyond the container's own address a key is asked for: give MIXTRAL_LAB_API_KEY, or it does not start.
ENTRYPOINT ["mixtral-lab", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["mini-mixtral"]
