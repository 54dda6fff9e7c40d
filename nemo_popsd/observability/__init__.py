"""What a run tells about itself: metrics by name, where they are written, how long each phase takes, progress."""
