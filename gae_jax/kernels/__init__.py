"""What GPUs and TPUs compute instead of XLA's own passes."""
