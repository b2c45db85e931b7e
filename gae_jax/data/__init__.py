"""Images and latents as random-access sources, and the grain pipelines over them."""
