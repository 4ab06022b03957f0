# rowmill with the dependencies of its examples, for docker-compose.yml.
FROM python:3.11-slim

# Not root, and with a home for what rowmill keeps between starts.
RUN useradd --create-home --uid 10001 rowmill \
    && install --directory --owner=rowmill --mode=0700 /app/.rowmill

# Only what the package is made of, so that editing an example or a document installs nothing anew.
COPY pyproject.toml README.md LICENSE __init__.py py.typed /src/
COPY state /src/state
COPY handlers /src/handlers
COPY streams /src/streams
RUN pip install --no-cache-dir "/src[examples]" && rm -rf /src

WORKDIR /app
COPY examples /app/examples
USER rowmill

ENV PYTHONUNBUFFERED=1
STOPSIGNAL SIGTERM
ENTRYPOINT ["rowmill"]
CMD ["--help"]
