class Shutdown:
    def __init__(self, *, reason="", due_to_sigint=False):
        self.reason = reason
