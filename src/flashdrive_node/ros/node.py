"""The lifecycle node: joins parameters, inputs, pipeline and outputs.

    configure    make the pipeline, subscribe, advertise; the engine loads and warms up in its own thread while the
                 executor goes on serving parameters and diagnostics
    activate     form windows and publish; allowed while the engine still loads, results come when it is ready
    deactivate   publish nothing, keep the engine loaded
    cleanup      end the threads and free the device

Everything here runs in the executor's thread, except ``_wake``.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockChange, ClockType, JumpThreshold, TimeJump
from rclpy.duration import Duration
from rclpy.lifecycle import LifecycleState, TransitionCallbackReturn
from rclpy.lifecycle.node import LifecycleNode
from rclpy.parameter import Parameter
from std_srvs.srv import SetBool, Trigger

from flashdrive_node.engine.protocol import EngineInfo
from flashdrive_node.ros import topics
from flashdrive_node.ros.declare import check_change, current_values, declare_parameters, refusal
from flashdrive_node.ros.diagnostics import NodeState, Publication
from flashdrive_node.ros.engines import EngineChoice, adjust_fake, choose_engine
from flashdrive_node.ros.inputs import Inputs
from flashdrive_node.ros.lifecycle import logged, refuse_impossible_transitions
from flashdrive_node.ros.messages import OutputFrame
from flashdrive_node.ros.navigation import Navigation
from flashdrive_node.ros.outputs import Outputs
from flashdrive_node.ros.parameters import ParameterError, parameters_from
from flashdrive_node.ros.reporter import Reporter
from flashdrive_node.ros.settings import check_rule, pipeline_settings
from flashdrive_node.runtime.checks import Violation, check_prediction
from flashdrive_node.runtime.ego_history import EgoWindow
from flashdrive_node.runtime.pipeline import Delivery, Pipeline
from flashdrive_node.runtime.rig import load_rig
from flashdrive_node.runtime.timing import StageTimings

#: Jumps of the ROS clock that start the stream anew. Simulated clocks tick in steps; smaller ones are none.
JUMP_FORWARD_S, JUMP_BACKWARD_S = 1.0, 0.1
#: How often the state is looked at; it is published when it changed or its period is over.
WATCH_PERIOD_S = 0.1
#: Longest wait for the running step when the device is to be freed.
CLOSE_TIMEOUT_S = 5.0

SUCCESS, FAILURE = TransitionCallbackReturn.SUCCESS, TransitionCallbackReturn.FAILURE


class FlashdriveNode(LifecycleNode):
    """Cameras, odometry and navigation text in; trajectory and reasoning out."""

    def __init__(self, **kwargs: Any):
        """Keyword arguments are rclpy's.

        Raises:
            ParameterError, RigError: A parameter or the rig file cannot be used; lists everything that is wrong.
        """
        super().__init__(topics.NODE_NAME, automatically_declare_parameters_from_overrides=True, **kwargs)
        self._values = declare_parameters(self)
        self.rig = load_rig(self._values.rig)
        self._pipeline: Pipeline | None = None
        self._inputs: Inputs | None = None
        self._outputs: Outputs | None = None
        self._engine: EngineChoice | None = None
        self._announced: EngineInfo | None = None
        self._state = NodeState("unconfigured")
        self._publication = Publication()
        self._timings = StageTimings()
        self._deliveries: deque[Delivery] = deque()
        self._epoch_seen = 0
        self._navigation = Navigation()
        self._ready = self.create_guard_condition(self._publish_deliveries)
        self._reporter = Reporter(self, self.rig, self._values.diagnostics_period_s)
        # Diagnostics must go on while a simulation stands still.
        self._steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(WATCH_PERIOD_S, self._watch, clock=self._steady)
        self.create_service(Trigger, topics.RESET, self._on_reset)
        self.create_service(SetBool, topics.PAUSE, self._on_pause)
        self.add_post_set_parameters_callback(self._on_parameters)
        threshold = JumpThreshold(
            min_forward=Duration(seconds=JUMP_FORWARD_S), min_backward=Duration(seconds=-JUMP_BACKWARD_S)
        )
        self._jumps = self.get_clock().create_jump_callback(threshold, post_callback=self._on_clock_jump)
        refuse_impossible_transitions(self)

    # Lifecycle

    @logged
    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Start loading the engine; returns at once."""
        parameters = self._values
        try:
            self._engine = choose_engine(parameters, self.rig)
        except ParameterError as error:
            self._state = NodeState("unconfigured", configure_error=str(error))
            self.get_logger().error(f"cannot be configured: {error}")
            return FAILURE
        self._publication, self._timings = Publication(), StageTimings()
        self._epoch_seen = 0
        # One of its own for every pipeline: an engine that was left behind may deliver long after cleanup.
        self._deliveries = deque()
        self._pipeline = Pipeline(
            self.rig,
            self._engine.make,
            partial(self._on_delivery, self._deliveries),
            pipeline_settings(parameters),
            lambda _: self._wake(),
        )
        self._outputs = Outputs(self, self.rig)
        self._inputs = Inputs(self, self.rig, self._pipeline, self._on_navigation)
        self._pipeline.start()
        self._state = NodeState("inactive")
        self.get_logger().info(f"configured: rig {self.rig.name}, engine {parameters.engine}; loading")
        return super().on_configure(state)

    @logged
    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Form windows and publish from now on."""
        assert self._pipeline is not None
        worker = self._pipeline.status().worker
        if worker.state == "failed":
            self.get_logger().error(f"cannot be activated, {worker.text}; call cleanup, then configure again")
            return FAILURE
        result = super().on_activate(state)
        self._state = NodeState("active")
        self._pipeline.set_active(True)
        self._note_reset()
        return result

    @logged
    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Publish nothing from now on; the engine stays loaded."""
        self._stop()
        return super().on_deactivate(state)

    @logged
    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free the device and withdraw all topics."""
        result = super().on_cleanup(state)
        self.close()
        return result

    @logged
    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """As cleanup, from any state, and for good."""
        result = super().on_shutdown(state)
        self.close()
        return result

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """A transition raised: free everything, so that the node can be configured again."""
        result = super().on_error(state)
        self.close()
        return result

    def close(self) -> None:
        """End all threads and withdraw all topics; may be called in any state and again."""
        self._stop()
        pipeline, self._pipeline = self._pipeline, None
        if self._engine is not None and self._engine.fake is not None:
            self._engine.fake.release()
        if pipeline is not None and not pipeline.close(CLOSE_TIMEOUT_S):
            self.get_logger().error(f"the engine did not end within {CLOSE_TIMEOUT_S:.0f} s and is left behind")
        if self._inputs is not None:
            self._inputs.destroy()
        if self._outputs is not None:
            self._outputs.destroy()
        self._inputs, self._outputs, self._engine, self._announced = None, None, None, None
        self._deliveries.clear()
        self._navigation = Navigation()
        self._state = NodeState("unconfigured")

    def _stop(self) -> None:
        if self._state.lifecycle != "active":
            return
        assert self._pipeline is not None
        assert self._outputs is not None
        self._pipeline.set_active(False)
        self._deliveries.clear()
        self._outputs.clear_markers()
        self._state = NodeState("inactive")

    # Results

    def _on_delivery(self, deliveries: deque[Delivery], delivery: Delivery) -> None:
        """Called from the pipeline's threads."""
        deliveries.append(delivery)
        self._wake()

    def _wake(self) -> None:
        if self.context.ok():
            self._ready.trigger()

    def _publish_deliveries(self) -> None:
        self._announce_engine()
        self._note_reset()
        while self._deliveries:
            self._take(self._deliveries.popleft())

    def _take(self, delivery: Delivery) -> None:
        publication, pipeline = self._publication, self._pipeline
        if delivery.kind == "failed":
            publication.last, publication.last_text, publication.last_s = "failed", delivery.text, time.monotonic()
        if delivery.prediction is None or pipeline is None or self._outputs is None:
            return
        if self._state.lifecycle != "active" or self._state.paused or delivery.epoch != pipeline.epoch:
            publication.withheld["overtaken"] = publication.withheld.get("overtaken", 0) + 1
            return
        parameters = self._values
        age_s = (self.get_clock().now().nanoseconds - delivery.t0_ns) / 1e9
        violations = check_prediction(delivery.prediction, age_s, check_rule(parameters), delivery.ego.speed_twist)
        frame = self._output_frame(delivery.ego)
        if isinstance(frame, Violation):
            violations.append(frame)
        publication.last_s = time.monotonic()
        if violations or isinstance(frame, Violation):
            for violation in violations:
                publication.withheld[violation.kind] = publication.withheld.get(violation.kind, 0) + 1
            publication.last = "withheld"
            publication.last_text = "; ".join(f"{v.kind}: {v.text}" for v in violations)
            return
        times_ms = self._outputs.publish(delivery, delivery.prediction, frame, parameters, self._announced)
        self._timings.add(times_ms)
        publication.published += 1
        publication.last, publication.last_text, publication.age_ms = "published", "", age_s * 1e3

    def _output_frame(self, ego: EgoWindow) -> OutputFrame | Violation:
        wanted = self._values.output_frame
        if wanted == "base":
            return OutputFrame(self.rig.base_frame)
        if wanted == "map" and ego.frame_id != "map":
            text = f"output_frame is 'map', the odometry's frame is '{ego.frame_id}'"
            return Violation("output_frame", text)
        x, y, z = ego.position.tolist()
        qx, qy, qz, qw = ego.orientation_xyzw.tolist()
        return OutputFrame(ego.frame_id, (x, y, z), (qx, qy, qz, qw))

    def _note_reset(self) -> None:
        """React to a reset, whoever caused it: what is drawn goes, and the diagnostics say so."""
        if self._pipeline is None or self._pipeline.epoch == self._epoch_seen:
            return
        self._epoch_seen = self._pipeline.epoch
        if self._state.lifecycle == "active" and self._outputs is not None:
            self._publication.since_s = time.monotonic()
            self._publication.since_text = f"reset by {self._pipeline.status().last_reset}"
            self._outputs.clear_markers()

    def _announce_engine(self) -> None:
        if self._pipeline is None or self._announced is not None:
            return
        worker = self._pipeline.status().worker
        if worker.state == "ready" and worker.info is not None:
            self._announced = info = worker.info
            self.get_logger().info(
                f"engine ready: {info.name}, checkpoint {info.checkpoint}, sha256 {info.sha256 or 'none'}, "
                f"{info.device}, {info.precision}"
            )

    # Inputs and services

    def _on_navigation(self, text: str) -> None:
        now_ns = self.get_clock().now().nanoseconds
        if self._navigation.receive(text, now_ns, self._values.navigation_max_length):
            self._apply_navigation()
        else:
            self.get_logger().warning(self._navigation.problem, throttle_duration_sec=5.0)

    def _apply_navigation(self) -> None:
        if self._pipeline is not None:
            self._pipeline.set_navigation(self._navigation.text)

    def _on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        if self._pipeline is None:
            response.success, response.message = False, "nothing to reset: the node is not configured"
            return response
        self._pipeline.reset("service", "~/reset was called")
        self._note_reset()
        response.success, response.message = True, "the stream starts anew"
        return response

    def _on_pause(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        if self._state.lifecycle != "active" or self._pipeline is None:
            response.success, response.message = False, f"the node is {self._state.lifecycle}, not active"
            return response
        self._state = replace(self._state, paused=request.data)
        self._pipeline.set_active(not request.data)
        self._note_reset()
        response.success, response.message = True, "paused" if request.data else "resumed"
        return response

    def _on_clock_jump(self, jump: TimeJump) -> None:
        if self._pipeline is None:
            return
        if jump.clock_change in (ClockChange.ROS_TIME_ACTIVATED, ClockChange.ROS_TIME_DEACTIVATED):
            self._pipeline.reset("clock_change", "use_sim_time was switched")
        # The first /clock of a simulation is no jump: there was no time before it.
        elif self.get_clock().now().nanoseconds != jump.delta.nanoseconds:
            self._pipeline.reset("clock_jump", f"the clock jumped by {jump.delta.nanoseconds / 1e9:+.3f} s")

    # Parameters

    def set_parameters_atomically(self, parameter_list: Sequence[Parameter]) -> SetParametersResult:
        """Refuse what the table does not accept, with the reason; every other way to set parameters ends here."""
        try:
            changes = check_change(self, parameter_list, self._pipeline is not None)
        except ParameterError as error:
            return refusal(error)
        return super().set_parameters_atomically(changes) if changes else SetParametersResult(successful=True)

    def _on_parameters(self, changes: Sequence[Parameter]) -> None:
        self._values = parameters_from(current_values(self))
        if self._engine is not None and self._engine.fake is not None:
            adjust_fake(self._engine.fake, self._values)

    def _watch(self) -> None:
        if self._navigation.expire(self.get_clock().now().nanoseconds, self._values.navigation_timeout_s):
            self.get_logger().warning(self._navigation.problem)
            self._apply_navigation()
        self._note_reset()
        self._reporter.report(
            self._state,
            self._pipeline.status() if self._pipeline is not None else None,
            self._publication,
            self._navigation,
            self._inputs.camera_info if self._inputs is not None else {},
            self._timings,
            time.monotonic(),
        )
