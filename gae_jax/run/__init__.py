"""Run directories: sessions, finished stages and the networks in them."""
