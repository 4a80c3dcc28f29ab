class DeclareLaunchArgument:
    def __init__(self, name, *, default_value=None, description=None, choices=None):
        self.name, self.default_value, self.description = name, default_value, description
        assert description, f"launch argument '{name}' has no description"
        assert default_value is None or isinstance(default_value, str), f"'{name}': defaults are text"


class OpaqueFunction:
    def __init__(self, *, function, args=None, kwargs=None):
        self.function = function


class ExecuteProcess:
    def __init__(
        self, *, cmd, name=None, output="log", additional_env=None, respawn=False, respawn_delay=0.0, emulate_tty=False
    ):
        assert all(isinstance(part, str) for part in cmd), cmd
        self.cmd, self.additional_env, self.respawn = list(cmd), dict(additional_env or {}), respawn


class IncludeLaunchDescription:
    def __init__(self, launch_description_source, *, launch_arguments=None):
        self.source, self.launch_arguments = launch_description_source, list(launch_arguments or [])


class RegisterEventHandler:
    def __init__(self, event_handler):
        self.event_handler = event_handler


class EmitEvent:
    def __init__(self, *, event):
        self.event = event
