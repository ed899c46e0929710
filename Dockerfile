# The image for NVIDIA GPUs: NVIDIA's PyTorch image (torch, NCCL, transformer-engine built for each other) and this project
# beside it. Build from the top of the checkout:
#
#     docker build -t nemo-aligner-diffusion:gpu .
#
# docker/README.md tells how to start it; docs/containers.md, why it is made like this and what of it was proven how.
# No "# syntax=" line: it would fetch a frontend from a registry, which sites without a network cannot do, for nothing
# that is used here.

# The one place that names NVIDIA's image. A site's mirror or a digest: --build-arg PYTORCH_IMAGE=registry/pytorch@sha256:…
ARG PYTORCH_IMAGE=nvcr.io/nvidia/pytorch:26.07-py3

# ---------------------------------------------------------------------------------------------------------------------
# This package, installed in a stage of its own: sources and build tools stay out of the image, and its few files are
# copied into the same place there.
FROM ${PYTORCH_IMAGE} AS package
# Read by pip where given: --build-arg PIP_INDEX_URL=… (no password in it: build arguments are on record), PIP_NO_INDEX=1
ARG PIP_INDEX_URL
ARG PIP_NO_INDEX
WORKDIR /source
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY conf conf
COPY nemo_aligner_diffusion nemo_aligner_diffusion
# The build's own environment takes setuptools from our constraints, not from the image's (PIP_CONSTRAINT holds there too
# up to pip 25.2, PIP_BUILD_CONSTRAINT from 25.3 on).
RUN --mount=type=bind,source=docker/wheels,target=/wheels \
    grep '^setuptools==' constraints.txt > /build-constraints.txt \
    && python3 -m venv --system-site-packages --without-pip /opt/nad \
    && PIP_CONSTRAINT=/build-constraints.txt PIP_BUILD_CONSTRAINT=/build-constraints.txt \
       /opt/nad/bin/python -m pip install --no-cache-dir --no-deps --find-links /wheels .

# ---------------------------------------------------------------------------------------------------------------------
FROM ${PYTORCH_IMAGE}
# Extras of pyproject.toml, separated by commas.
ARG EXTRAS=megatron

# Dependencies before sources: a change of code renews the small last layers only. They go into an environment that *sees*
# the image's packages and cannot overwrite them; combined constraints (docker/python_packages.py says how) keep pip
# from laying another torch, NumPy … over the image's own, and the last command stops the build if it did.
# --without-pip: the image's pip serves, and the image needs no ensurepip for it.
ARG PIP_INDEX_URL
ARG PIP_NO_INDEX
WORKDIR /opt/nad/build
COPY pyproject.toml constraints.txt docker/python_packages.py ./
RUN --mount=type=bind,source=docker/wheels,target=/wheels \
    python3 -m venv --system-site-packages --without-pip /opt/nad \
    && python3 python_packages.py freeze > image-packages.txt \
    && python3 python_packages.py requirements pyproject.toml --extras "${EXTRAS}" > requirements.txt \
    && python3 python_packages.py combine constraints.txt --image "${PIP_CONSTRAINT:-}" > /opt/nad/constraints.txt \
    && PIP_CONSTRAINT=/opt/nad/constraints.txt \
       /opt/nad/bin/python -m pip install --no-cache-dir --find-links /wheels -r requirements.txt \
    && /opt/nad/bin/python python_packages.py compare image-packages.txt

# The image's torchrun starts the image's Python, which does not see /opt/nad: this one does.
RUN printf '#!/bin/sh\nexec /opt/nad/bin/python -m torch.distributed.run "$@"\n' > /opt/nad/bin/torchrun \
    && chmod 755 /opt/nad/bin/torchrun \
    && groupadd --gid 10001 nad \
    && useradd --uid 10001 --gid 10001 --create-home --shell /bin/bash nad \
    && mkdir -p /workspace /results \
    && chown 10001:10001 /results

# What a derived image installs later is bound by the same constraints: RUN /opt/nad/bin/python -m pip install …
ENV PATH=/opt/nad/bin:${PATH} \
    PIP_CONSTRAINT=/opt/nad/constraints.txt \
    PYTHONUNBUFFERED=1 \
    NAD_RESULTS=/results \
    NAD_EXPECT_GPU=1

COPY --from=package /opt/nad/lib /opt/nad/lib
COPY --from=package /opt/nad/bin/nad-* /opt/nad/bin/
RUN /opt/nad/bin/python /opt/nad/build/python_packages.py imports --optional apex,transformer_engine \
    torch,diffusers,transformers,peft,pytorch_lightning,nemo_aligner_diffusion.training.run
COPY --chmod=755 docker/entrypoint.sh /usr/local/bin/nad-entrypoint
COPY examples /workspace/examples
COPY LICENSE /workspace/LICENSE

# Last: these change with every build.
ARG VERSION=unknown
ARG REVISION=unknown
ARG PYTORCH_IMAGE
LABEL org.opencontainers.image.title="nemo_aligner_diffusion" \
      org.opencontainers.image.description="Reward fine-tuning of text-to-image diffusion models (NVIDIA GPUs)" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${PYTORCH_IMAGE}"

WORKDIR /workspace
USER 10001:10001
# NVIDIA's own entry point stays in front: it sets up CUDA's forward compatibility with older drivers.
ENTRYPOINT ["/opt/nvidia/nvidia_entrypoint.sh", "/usr/local/bin/nad-entrypoint"]
CMD ["help"]
