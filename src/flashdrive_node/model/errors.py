"""Errors of the model layer. Each message states what was required, what was found, and where."""


class ModelError(Exception):
    """Base of everything the model layer raises on purpose."""


class ConfigError(ModelError):
    """A configuration that cannot be used; lists every problem found, not only the first."""

    def __init__(self, where: str, problems: list[str]):
        self.where = where
        self.problems = problems
        super().__init__(f"{where}: {len(problems)} problem(s)\n" + "\n".join(f"  - {p}" for p in problems))


class CheckpointError(ModelError):
    """A checkpoint whose files or tensors do not fit; lists every problem found, not only the first."""

    def __init__(self, where: str, problems: list[str]):
        self.where = where
        self.problems = problems
        super().__init__(f"{where}: {len(problems)} problem(s)\n" + "\n".join(f"  - {p}" for p in problems))


class PromptError(ModelError, ValueError):
    """Text, cameras or frames that no valid prompt can be built from."""


class InputError(ModelError, ValueError):
    """Images, poses or tensors of a shape, type or value that the model does not take."""
