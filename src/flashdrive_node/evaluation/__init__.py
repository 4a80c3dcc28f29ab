"""What is computed beside the node: synthetic recordings, replay reports, videos."""
