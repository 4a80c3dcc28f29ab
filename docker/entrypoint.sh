#!/bin/bash
# Runs a command with the ROS install, the workspace and the large shared-memory profile in place.
set -e
source /opt/ros/jazzy/setup.bash
source /opt/flashdrive_ws/setup.bash
export PATH="/opt/flashdrive/bin:${PATH}"
profile=/opt/flashdrive_ws/flashdrive_node/share/flashdrive_node/params/fastdds_shared_memory.xml
if [[ -z "${FASTRTPS_DEFAULT_PROFILES_FILE:-}" && -f "${profile}" ]]; then
  export FASTRTPS_DEFAULT_PROFILES_FILE="${profile}"
fi
exec "$@"
