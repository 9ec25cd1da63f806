"""What is learned from many runs, or from none: comparing, simulating, replaying."""
