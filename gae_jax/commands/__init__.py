"""The command line: one file per command that is no stage of the pipeline."""
