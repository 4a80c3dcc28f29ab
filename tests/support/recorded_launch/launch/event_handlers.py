class OnProcessExit:
    def __init__(self, *, target_action=None, on_exit):
        self.target_action, self.on_exit = target_action, on_exit


class OnProcessIO:
    def __init__(self, *, target_action=None, on_stdin=None, on_stdout=None, on_stderr=None):
        self.target_action, self.on_stdout, self.on_stderr = target_action, on_stdout, on_stderr
