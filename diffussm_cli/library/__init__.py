"""What `import diffussm` offers beside the networks: runs, and the commands as functions."""
