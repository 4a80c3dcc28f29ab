"""The ``flashdrive`` command and its subcommands."""
