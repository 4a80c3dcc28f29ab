# syntax=docker/dockerfile:1
# The node on Jetson Thor (aarch64, JetPack 7, CUDA 13). Build on the Jetson, from the top of the repository:
#   docker build -f docker/Dockerfile.thor -t flashdrive_node:thor .
# Pin the base by digest for a release: --build-arg BASE=ros:jazzy-ros-base-noble@sha256:...
ARG BASE=ros:jazzy-ros-base-noble

FROM ${BASE} AS runtime
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# The version of an apt package is that of the base image's ROS snapshot.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --no-install-recommends --yes \
      python3-venv python3-setuptools ros-jazzy-rmw-fastrtps-cpp ros-jazzy-rosbag2-storage-mcap \
 && rm -rf /var/lib/apt/lists/*

# The environment sees the distribution's Python packages, so that rclpy and colcon work in it. PyTorch's own index has
# the aarch64 wheels with CUDA 13, which run on Thor; those of PyPI are built without CUDA.
COPY docker/requirements.txt /tmp/requirements.txt
RUN python3 -m venv --system-site-packages /opt/flashdrive \
 && /opt/flashdrive/bin/pip install --no-cache-dir --requirement /tmp/requirements.txt \
      --extra-index-url https://download.pytorch.org/whl/cu130 "torch==2.13.0+cu130"

# On the base image, user 1000 is an unused "ubuntu". DDS shared memory is open to one user only: give the node the
# user id under which the camera drivers run.
ARG UID=1000
RUN (userdel --remove ubuntu 2>/dev/null || true) \
 && useradd --create-home --uid "${UID}" --shell /bin/bash flashdrive

COPY . /opt/flashdrive_node
WORKDIR /opt/flashdrive_node/ros2_ws
# "python -m colcon" writes the environment's interpreter into the console scripts.
RUN . /opt/ros/jazzy/setup.bash \
 && /opt/flashdrive/bin/python -m colcon build --install-base /opt/flashdrive_ws \
 && rm -rf build log
COPY --chmod=0755 docker/entrypoint.sh /usr/local/bin/flashdrive-entrypoint

# Weights are mounted, never fetched: the image works without a network. Checkpoints without tokenizer files name a
# Hugging Face id for them; its cache is looked for beside the checkpoint.
ENV HF_HUB_OFFLINE=1 \
    HF_HOME=/models/huggingface \
    PYTHONUNBUFFERED=1 \
    RMW_IMPLEMENTATION=rmw_fastrtps_cpp \
    ROS_LOG_DIR=/tmp/ros
VOLUME ["/models"]
USER ${UID}
WORKDIR /home/flashdrive

# Healthy means active: a node that is still loading its weights is "starting" until the start period ends.
HEALTHCHECK --interval=15s --timeout=12s --start-period=180s --retries=3 \
  CMD ["flashdrive-entrypoint", "bash", "-c", "ros2 lifecycle get --no-daemon /flashdrive_node | grep -q '^active'"]
STOPSIGNAL SIGINT
ENTRYPOINT ["flashdrive-entrypoint"]
CMD ["ros2", "launch", "flashdrive_node", "flashdrive.launch.py", "checkpoint:=/models/checkpoint", "auto_activate:=true"]
