"""What both sides must agree on: the run, its messages, its accounting; no sockets."""
