"""The stages of the pipeline: each reads a config section and leaves a folder in the run."""
