"""Models and runs on disk: downloaded, created, found, checked, restored, saved."""
