"""Two things that rclpy's lifecycle node leaves out: saying what a transition raised, and refusing politely."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import wraps
from typing import Any

from lifecycle_msgs.srv import ChangeState
from rclpy.lifecycle import LifecycleState, TransitionCallbackReturn
from rclpy.lifecycle.node import LifecycleNode

Transition = Callable[[Any, LifecycleState], TransitionCallbackReturn]


def logged(transition: Transition) -> Transition:
    """Log what a transition raises: rclpy goes to error processing without a word."""

    @wraps(transition)
    def run(node: LifecycleNode, state: LifecycleState) -> TransitionCallbackReturn:
        try:
            return transition(node, state)
        except Exception as error:
            text = "".join(traceback.format_exception(error))
            node.get_logger().error(f"{transition.__name__} in state '{state.label}' raised:\n{text}")
            raise

    return run


def refuse_impossible_transitions(node: LifecycleNode) -> None:
    """Answer ``success: false`` to a transition that the state does not have; rclpy would end the process."""
    service = node._service_change_state
    change = service.callback

    def checked(request: ChangeState.Request, response: ChangeState.Response) -> ChangeState.Response:
        try:
            return change(request, response)
        except RuntimeError as error:  # rclpy's RCLError
            label = node._state_machine.current_state[1]
            node.get_logger().warning(f"transition {request.transition.id} refused in state '{label}': {error}")
            response.success = False
            return response

    service.callback = checked
