"""The parameter table on a running node: declared with ranges, checked at start and at every change."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult
from rclpy.node import Node
from rclpy.parameter import Parameter

from flashdrive_node.ros.parameters import (
    ANY_TIME,
    AT_START,
    SPECS,
    ParameterError,
    Parameters,
    ParameterSpec,
    parameters_from,
)

#: Parameters of rclpy's own, which are none of ours and no typing errors either.
_FOREIGN = ("use_sim_time", "qos_overrides.", "start_type_description_service", "start_parameter_services")


def descriptor(spec: ParameterSpec) -> ParameterDescriptor:
    """The range, read-only flag and description of one parameter as ``ros2 param describe`` shows them."""
    unit = f" [{spec.unit}]" if spec.unit else ""
    message = ParameterDescriptor(
        name=spec.name,
        type=Parameter.Type.from_parameter_value(spec.default).value,
        description=f"{spec.description}{unit}; changes {spec.changes}",
        additional_constraints=spec.range_text if spec.choices else "",
        read_only=spec.changes == AT_START,
    )
    if spec.minimum is not None and spec.maximum is not None:
        if isinstance(spec.default, float):
            span = FloatingPointRange(from_value=float(spec.minimum), to_value=float(spec.maximum), step=0.0)
            message.floating_point_range = [span]
        else:
            message.integer_range = [IntegerRange(from_value=int(spec.minimum), to_value=int(spec.maximum), step=1)]
    return message


def declare_parameters(node: Node) -> Parameters:
    """Check what the command line and the YAML gave and declare every parameter of the table.

    The node must have been made with ``automatically_declare_parameters_from_overrides``: only so do misspelt names
    and all bad values show at once, instead of the first one as an exception of rclpy.

    Raises:
        ParameterError: Lists every value that cannot be used.
    """
    given = {name: node.get_parameter(name).value for name in node.list_parameters([], 0).names}
    for name in given:
        if name not in SPECS and not name.startswith(_FOREIGN):
            close = difflib.get_close_matches(name, SPECS, 1)
            hint = f"; is '{close[0]}' meant?" if close else ""
            node.get_logger().warning(f"parameter '{name}' is unknown and ignored{hint}")
    parameters = parameters_from({name: value for name, value in given.items() if name in SPECS})
    for spec in SPECS.values():
        if spec.name in given:
            node.undeclare_parameter(spec.name)
        value = spec.accept(given.get(spec.name, spec.default))
        node.declare_parameter(spec.name, value, descriptor(spec), ignore_override=True)
    return parameters


def check_change(node: Node, changes: Sequence[Parameter], configured: bool) -> list[Parameter]:
    """Parameters as they are to be set: of the table's type.

    Raises:
        ParameterError: Out of range, of a wrong type, read-only, or only to be changed while the node is unconfigured.
    """
    problems: list[str] = []
    checked: list[Parameter] = []
    for parameter in changes:
        spec = SPECS.get(parameter.name)
        if spec is None:  # not ours: rclpy says whether it exists
            checked.append(parameter)
            continue
        try:
            value = spec.accept(parameter.value)
        except ValueError as error:
            problems.append(str(error))
            continue
        current = node.get_parameter(spec.name).value
        if value != current and spec.changes == AT_START:
            problems.append(f"parameter '{spec.name}' is read-only: it can only be given at start (is {current!r})")
        elif value != current and spec.changes != ANY_TIME and configured:
            problems.append(
                f"parameter '{spec.name}' takes effect at configure and the node is configured: "
                f"call cleanup first (is {current!r})"
            )
        checked.append(Parameter(spec.name, value=value))
    if not problems:
        parameters_from(current_values(node) | {p.name: p.value for p in checked if p.name in SPECS})
        return [p for p in checked if p.name not in SPECS or p.value != node.get_parameter(p.name).value]
    raise ParameterError(problems)


def current_values(node: Node) -> dict[str, object]:
    """The values of all parameters of the table by ROS name."""
    return {name: node.get_parameter(name).value for name in SPECS}


def refusal(error: ParameterError) -> SetParametersResult:
    """The answer to a change that cannot be made."""
    return SetParametersResult(successful=False, reason=str(error))
