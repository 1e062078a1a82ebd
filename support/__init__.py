"""What lets a long run be trusted: files, flags, checkpoints, processes, the run itself."""
