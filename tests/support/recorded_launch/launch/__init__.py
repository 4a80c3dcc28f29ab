"""The part of ROS 2's ``launch`` that the launch files use, which records instead of starting anything.

``launch`` is not on PyPI. Signatures are those of Jazzy; an argument that they do not have is an error.
"""


class LaunchDescription:
    def __init__(self, initial_entities=None):
        self.entities = list(initial_entities or [])


class LaunchContext:
    def __init__(self, arguments):
        self.launch_configurations = dict(arguments)


def run(description, arguments):
    """Every action of a launch description with these arguments, those of included files too.

    Raises:
        KeyError: An argument without default is missing, or one is given that the file does not declare.
    """
    from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription, OpaqueFunction

    context, declared, actions, pending = LaunchContext(arguments), set(), [], list(description.entities)
    while pending:
        entity = pending.pop(0)
        if isinstance(entity, DeclareLaunchArgument):
            declared.add(entity.name)
            if entity.name not in context.launch_configurations:
                if entity.default_value is None:
                    raise KeyError(f"launch argument '{entity.name}' is required")
                context.launch_configurations[entity.name] = entity.default_value
        elif isinstance(entity, OpaqueFunction):
            pending = list(entity.function(context) or []) + pending
        elif isinstance(entity, IncludeLaunchDescription):
            actions += run(entity.source.load(), dict(entity.launch_arguments))
        else:
            actions.append(entity)
    if unknown := set(arguments) - declared:
        raise KeyError(f"launch arguments {sorted(unknown)} are not declared")
    return actions
