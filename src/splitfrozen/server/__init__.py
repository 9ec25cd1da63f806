"""The server's side of the network and of the disk; it never imports torch."""
