import runpy


class PythonLaunchDescriptionSource:
    def __init__(self, launch_file_path):
        self.path = launch_file_path

    def load(self):
        return runpy.run_path(self.path)["generate_launch_description"]()
