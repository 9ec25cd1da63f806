"""What travels between device and server: codecs, chunks and the join string."""
