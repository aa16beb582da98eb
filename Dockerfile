# ssd on the CPU: docker build -t ssd .
# A server with its page: docker run --rm -p 127.0.0.1:8000:8000 ssd
# Any other verb: docker run --rm --no-healthcheck -v "$PWD:/data" --user "$(id -u)" ssd detect photo.jpg --output results
FROM python:3.13-slim AS wheel
WORKDIR /source
RUN pip install --no-cache-dir build
COPY . .
RUN python -m build --wheel --outdir /wheel

FROM python:3.13-slim
COPY --from=wheel /wheel /wheel
# PyTorch's own builds for CPUs come without CUDA, which would be most of the image.
RUN pip install --no-cache-dir torch torchvision --index-url https://download.pytorch.org/whl/cpu \
 && pip install --no-cache-dir "$(echo /wheel/*.whl)[serve]" \
 && useradd --create-home ssd \
 && install --directory --owner ssd /data
USER ssd
# Weights that are downloaded, whoever runs it.
ENV TORCH_HOME=/tmp/torch
WORKDIR /data
# Of the server; other verbs run with --no-healthcheck.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s \
  CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/healthz', timeout=5)"]
EXPOSE 8000
ENTRYPOINT ["ssd"]
CMD ["serve", "shapes", "--host", "0.0.0.0"]
