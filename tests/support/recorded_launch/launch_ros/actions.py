import tempfile

import yaml
from launch.actions import ExecuteProcess

from .parameter_descriptions import ParameterValue


class Node(ExecuteProcess):
    """Builds the command line that launch_ros would: a parameter file per dictionary, then remappings."""

    def __init__(
        self,
        *,
        executable,
        package=None,
        name=None,
        namespace=None,
        parameters=None,
        remappings=None,
        ros_arguments=None,
        arguments=None,
        **process,
    ):
        self.package, self.executable, self.name, self.namespace = package, executable, name, namespace or ""
        self.parameters, self.remappings = list(parameters or []), list(remappings or [])
        cmd = [executable, *(arguments or []), "--ros-args", *(ros_arguments or [])]
        if name:
            cmd += ["-r", f"__node:={name}"]
        if self.namespace:
            cmd += ["-r", f"__ns:=/{self.namespace.strip('/')}"]
        for entry in self.parameters:
            cmd += ["--params-file", entry if isinstance(entry, str) else _written(entry)]
        for old, new in self.remappings:
            cmd += ["-r", f"{old}:={new}"]
        super().__init__(cmd=cmd, **process)


def _written(values):
    plain = {}
    for name, value in values.items():
        if isinstance(value, ParameterValue):
            value = value.value_type(value.value)
        assert isinstance(value, (bool, int, float, str)), f"{name}: {value!r}"
        plain[name] = value
    with tempfile.NamedTemporaryFile("w", prefix="launch_params_", suffix=".yaml", delete=False) as file:
        yaml.safe_dump({"/**": {"ros__parameters": plain}}, file)
    return file.name
