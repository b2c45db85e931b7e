"""What everything else stands on: errors, files, processes, meshes."""
